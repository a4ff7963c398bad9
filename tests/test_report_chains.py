"""What the page says of chains and transfers, from rows whose answers are worked out by hand."""

from dataclasses import replace
from typing import Any

import pytest

from test_report import Page
from tombola.report import render
from tombola.report.about_chains import connectivity_parts, rewinding_parts
from tombola.report.build import sections_of
from tombola.report.cases import study_of
from tombola.stats import overlap_of_counts
from tombola.study.chain_rows import BarrierRow, ChainRows, LevelRow, SharedRow, TrainedRow
from tombola.study.results import Results
from tombola.study.verdicts import existence_of, matrices_of

MLM = "mlm-wikitext2:train=test,report=validation"


def level(task: str, seed: int, number: int, value: float, **changes: Any) -> LevelRow:
    row = LevelRow(
        cell=f"{task[:3]}{seed}{number}", model="m", task=task, seed=seed, chain="", rewind="step_0", level=number,
        sparsity=[0.0, 0.1, 0.5, 0.7][number], ticket=f"t{number}" if number else "", metric="accuracy", value=value, n=400,
        majority=0.5, selection=value, selection_rows=100, steps=10 * (number + 1), flops=1e12 * (number + 1),
    )  # fmt: skip
    return replace(row, **changes)


def trained(source: str, target: str, seed: int, value: float, dense: float, **changes: Any) -> TrainedRow:
    row = TrainedRow(
        cell=f"{source[:3]}{target[:3]}{seed}", model="m", task=target, seed=seed, chain="", mask="ticket", source=source,
        mask_seed=seed, draw=0, sparsity=0.7, start="base", metric="accuracy", value=value, n=400, majority=0.5, dense=dense,
    )  # fmt: skip
    return replace(row, **changes)


# dense .80 .82 .84 (std .02); level 1 the same; level 2 .80 in the mean (−.02: within one std); level 3 .70
CHAIN = [
    level("sst2", seed, number, value)
    for number, values in enumerate([(0.80, 0.82, 0.84), (0.80, 0.82, 0.84), (0.78, 0.80, 0.82), (0.68, 0.70, 0.72)])
    for seed, value in enumerate(values)
]


def page_of(**rows: Any) -> Page:
    return Page(render(Results((), (), chains=ChainRows(**{name: tuple(of) for name, of in rows.items()}))))


def test_the_highest_level_is_given_by_each_rule_side_by_side() -> None:
    found = existence_of(CHAIN)
    assert found.highest == {"literal_std": 0.5, "max_std": 0.5, "strict": 0.1, "non_inferiority": None}
    assert found.seeds == (0, 1, 2) and [one.match.difference for one in found.levels] == pytest.approx([0.0, -0.02, -0.12])
    (head, row) = page_of(levels=CHAIN).tables["The highest level that matches the dense model, by each rule"]
    said = dict(zip(head, row, strict=True))
    assert said["Chain"] == "sst2" and said["Majority"] == "0.500"
    assert [said[f"{rule}, report rows"] for rule in ("literal-std", "max-std", "strict", "non-inferiority")] == [
        "50 %", "50 %", "10 %", "none"
    ]  # fmt: skip
    assert said["Paper, Table 2"] == "60 %" and said["Paper, strict (second-hand)"] == "50 %"


def test_a_level_is_chosen_on_selection_rows_and_said_apart_from_the_report_rows() -> None:
    rows = [replace(row, selection=0.9 if row.level == 3 else row.value) for row in CHAIN]
    (head, row) = page_of(levels=rows).tables["The highest level that matches the dense model, by each rule"]
    said = dict(zip(head, row, strict=True))
    assert (said["strict, selection rows"], said["strict, report rows"]) == ("70 %", "10 %")


def test_every_level_has_its_difference_and_what_could_be_shown() -> None:
    table = page_of(levels=CHAIN).tables["Levels of sst2: accuracy, mean ± std over seeds"]
    rows = [dict(zip(table[0], row, strict=True)) for row in table[1:]]
    assert [row["Sparsity"] for row in rows] == ["10 %", "50 %", "70 %"]
    assert [row["Minus dense"] for row in rows] == ["0.000", "−0.020", "−0.120"]
    assert [row["strict"] for row in rows] == ["yes", "no", "no"]
    assert [row["non-inferiority"] for row in rows] == ["?", "?", "no"]
    assert [row["Steps to here"] for row in rows] == ["20", "30", "40"] and all(
        float(row["Could be shown from"]) > 0 for row in rows
    )


def test_a_level_that_a_seed_lacks_is_of_the_others_and_never_the_highest() -> None:
    rows = [replace(row, value=0.99) if row.level == 3 else row for row in CHAIN if not (row.seed == 2 and row.level == 3)]
    found = existence_of(rows)
    assert found.seeds == (0, 1, 2) and [one.seeds for one in found.levels] == [(0, 1, 2), (0, 1, 2), (0, 1)]
    assert found.levels[2].match.difference == pytest.approx(0.99 - 0.81), "against the dense models of the same seeds"
    assert found.highest["strict"] == 0.1
    page = page_of(levels=rows)
    assert page.tables["Levels of sst2: accuracy, mean ± std over seeds"][3][3] == "2" and "not given up" in page.text


def test_a_dense_model_at_the_majority_line_is_flagged() -> None:
    rows = [replace(row, value=0.5, majority=0.5) for row in CHAIN]
    page = page_of(levels=rows)
    (_, row) = page.tables["The highest level that matches the dense model, by each rule"]
    assert row[1].endswith("*") and "matching it means nothing" in page.text


# own tickets sst2 .80, cola .30 (dense .82, .35); sst2 on cola .28; cola on sst2 .81; MLM on sst2 .83, on cola .29
TRANSFERS = [
    trained(source, target, seed, value + step, {"sst2": 0.82, "cola": 0.35, MLM: 0.4}[target] + step)
    for seed, step in enumerate((-0.01, 0.0, 0.01))
    for source, target, value in (
        ("sst2", "sst2", 0.80), ("cola", "cola", 0.30), ("sst2", "cola", 0.28), ("cola", "sst2", 0.81), (MLM, "sst2", 0.83),
        (MLM, "cola", 0.29), (MLM, MLM, 0.4),
    )
]  # fmt: skip


def test_counts_of_a_matrix_are_without_the_diagonal_and_by_both_verdicts() -> None:
    (matrix,) = matrices_of(TRANSFERS)
    assert matrix.dark == {"sst2": 0, "cola": 1, MLM: 1}
    assert {source: of["strict"] for source, of in matrix.matching_dense.items()} == {"sst2": 0, "cola": 0, MLM: 1}
    assert {source: of["literal_std"] for source, of in matrix.matching_dense.items()} == {"sst2": 0, "cola": 1, MLM: 1}
    page = page_of(trained=TRANSFERS)
    table = page.tables["On how many other tasks a mask does as well: as their own ticket, and as their dense model"]
    rows = {row[1]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert rows["cola"]["≥ own ticket"] == "1 of 1", "it was not trained on the corpus"
    assert rows["mlm-wikitext2"]["dense, strict"] == "1 of 2" and rows["mlm-wikitext2"]["Paper, ≥ own ticket"] == "10 of 10"
    titles = [title for title in page.titles if title.startswith("cola on sst2")]
    assert len(titles) == 2 and any("against same-task ticket" in one for one in titles)


def test_figure_2_stands_beside_what_was_obtained() -> None:
    table = page_of(trained=TRANSFERS).tables["Fig. 2 of the paper beside what was obtained: score minus dense score, in points"]
    said = {(row[0], row[1]): row[2:] for row in table[1:]}
    assert said["cola", "sst2"] == ["−3.48", "−1.00", "+2.48"] and said["mlm-wikitext2", "cola"][0] == "−7.36"


def test_masks_trained_by_other_seeds_or_from_elsewhere_are_of_no_matrix() -> None:
    strange = [replace(TRANSFERS[3], mask_seed=7, value=0.0), replace(TRANSFERS[3], start="trained on cola", value=0.0)]
    assert matrices_of([*TRANSFERS, *strange]) == matrices_of(TRANSFERS)


def test_the_mlm_ticket_has_a_curve_of_its_levels() -> None:
    more = [replace(row, sparsity=0.5, value=row.dense) for row in TRANSFERS if row.source == MLM]
    table = page_of(trained=[*TRANSFERS, *more]).tables[
        "The MLM ticket on each task: score minus dense score, mean ± std over seeds"
    ]
    assert table[0] == ["Task", "50 %", "70 %"]
    assert (
        [row[0] for row in table[1:]] == ["sst2", "cola"] and table[1][1].startswith("0.000") and table[2][2].startswith("−0.060")
    )


def test_controls_stand_beside_the_ticket_of_their_level() -> None:
    beside = [replace(row, mask="random", value=0.5) for row in TRANSFERS if row.source == row.task == "sst2"]
    beside += [
        replace(row, mask="base, magnitude", source="", value=0.79) for row in TRANSFERS if row.source == row.task == "sst2"
    ]
    table = page_of(trained=[*TRANSFERS, *beside]).tables[
        "Scores beside those of the ticket of the same level: mean ± std over seeds"
    ]
    rows = {row[2]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert list(rows) == ["ticket", "base, magnitude", "random"] and {row["Task"] for row in rows.values()} == {"sst2"}
    assert rows["random"]["Minus ticket"].startswith("−0.300") and rows["random"]["Score"].endswith("*")
    assert rows["random"]["Paper, points"] == "83.1 at 60 %" and rows["base, magnitude"]["Seeds × draws"] == "3 seeds × 1"


def test_rewinding_needs_chains_that_differ_in_nothing_else() -> None:
    later = [replace(row, chain="rewind=percent_5", rewind="percent_5", value=row.value + 0.01) for row in CHAIN if row.level]
    first = [replace(row, chain="rewind=step_0") for row in CHAIN]
    never = [replace(row, chain="rewind=none", rewind="none") for row in CHAIN if row.level]
    other = [replace(row, chain="epochs=9, rewind=epoch_1", rewind="epoch_1") for row in CHAIN if row.level]
    tables = page_of(levels=[*first, *later, *never, *other]).tables
    ours = tables["Scores by where a round rewinds to: mean ± std over seeds"]
    assert ours[0][3:] == ["step 0", "5 % of a run", "never"]
    assert [row[1] for row in ours[1:]] == ["10 %", "50 %", "70 %"] and ours[2][4].startswith("0.810")
    papers = next(of for caption, of in tables.items() if "Table 3" in caption)
    assert papers[1][:4] == ["sst2", "60 %", "92.12", "91.74"]
    assert rewinding_parts("x", study_of(Results((), (), chains=ChainRows(levels=tuple(CHAIN))))) == ()


def test_lines_between_levels_stand_beside_the_verdict_of_the_next() -> None:
    lines = [
        BarrierRow(cell=f"b{i}{seed}", model="m", task="sst2", seed=seed, chain="", lower=a, upper=b, barrier=rise)
        for i, (a, b, rise) in enumerate([(0.0, 0.1, 0.01), (0.1, 0.5, 0.02), (0.5, 0.7, 0.3)])
        for seed in range(3)
    ]
    page = page_of(levels=CHAIN, barriers=lines)
    table = page.tables["Barrier between each level and the next, and whether the next matches the dense model"]
    assert [row[1] for row in table[1:]] == ["0 % to 10 %", "10 % to 50 %", "50 % to 70 %"]
    assert [row[5] for row in table[1:]] == ["yes", "yes", "no"], "max-std"
    assert "a level that matches (max-std): 0.015 nats" in page.text and "does not match (max-std): 0.300 nats" in page.text
    assert connectivity_parts("x", study_of(Results((), ()))) == ()


def test_where_a_transfer_starts_and_what_tickets_share() -> None:
    late = [replace(row, start="trained on cola", value=0.7) for row in TRANSFERS if (row.source, row.task) == ("cola", "sst2")]
    table = page_of(trained=[*TRANSFERS, *late]).tables[
        "Scores by the weights a transferred mask starts from: mean ± std over seeds"
    ]
    assert table[0][3:] == ["From the base", "From the source’s trained weights"] and table[1][4].startswith("0.700")
    # 10 values, 5 kept by each, 4 by both: 4 of 6
    shared = [
        SharedRow(model="m", a="cola", b="sst2", seed=seed, chain="", sparsity=0.5, overlap=overlap_of_counts(10, 5, 5, 4))
        for seed in range(2)
    ]
    table = page_of(shared=shared).tables["Jaccard of tickets of the same seed at each level, mean over seeds / by chance"]
    assert table[1][0] == "cola and sst2" and table[1][1].startswith("0.667 / 0.3")


def test_a_store_without_chains_has_none_of_this() -> None:
    assert [section.anchor for section in sections_of(study_of(Results((), ())))] == []
