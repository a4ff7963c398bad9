"""The page read back as a reader would: as text and tables, and in a real browser."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from statsmodels.stats.proportion import confint_proportions_2indep

from tombola.errors import StoreError
from tombola.report import build_page, figures, latex_table, markdown_table, render
from tombola.study.results import Agreement, PathStep, Results, ScoreRow, TicketRow

HOSTILE = '<script>alert("x")</script> & \'"><img src=x onerror=alert(1)> a|b_c\\d $5 100% {{ 7*7 }}'
NO_MASK: tuple[tuple[bool, ...], ...] = ((False, False), (False, False))


def score(kind: str, stage: str, value: float, **changes: Any) -> ScoreRow:
    row = ScoreRow(
        cell="c", model="m", task="sst2", seed=1, kind=kind, stage=stage, draw=0, split="validation", role="report",
        metric="accuracy", value=value, n=400, majority=0.5,
    )  # fmt: skip
    return replace(row, **changes)


def ticket(kind: str, heads: Sequence[str], mlps: str, **changes: Any) -> TicketRow:
    """A ticket from pictures: "x." keeps the first of two."""
    row = TicketRow(
        cell="c", model="m", task="sst2", seed=1, kind=kind, draw=0, body_share=0.5, total_share=0.75,
        heads=tuple(tuple(float(mark == "x") for mark in row) for row in heads), mlps=tuple(float(mark == "x") for mark in mlps),
        search="s-prune", family="as found",
    )  # fmt: skip
    return replace(row, **changes)


def results(*rows: ScoreRow | TicketRow, **more: Any) -> Results:
    scores = tuple(row for row in rows if isinstance(row, ScoreRow))
    return Results(scores, tuple(row for row in rows if isinstance(row, TicketRow)), **more)


class Page(HTMLParser):
    """The parts of a page that tests ask for."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}  # caption → rows, the head first
        self.titles: list[str] = []  # of marks in figures
        self.items: list[str] = []
        self._open: list[str] = []
        self._caption = ""
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)
        if tag == "caption":
            self._caption = ""
        elif tag == "tr":
            self.tables.setdefault(self._caption, []).append([])
        elif tag in ("td", "th"):
            self.tables[self._caption][-1].append("")
        elif tag == "title" and "svg" in self._open:
            self.titles.append("")
        elif tag == "li":
            self.items.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        data = data.replace("\N{NO-BREAK SPACE}", " ")
        if "caption" in self._open:
            self._caption += data
        elif self._open and self._open[-1] in ("td", "th"):
            self.tables[self._caption][-1][-1] += data
        elif self._open and self._open[-1] == "title" and "svg" in self._open:
            self.titles[-1] += data
        elif self._open and self._open[-1] == "li":
            self.items[-1] += data
        if not {"style", "script"} & set(self._open):
            self.text += data

    def table(self, words: str) -> list[list[str]]:
        return next(rows for caption, rows in self.tables.items() if words in caption)

    def column(self, words: str, name: str) -> list[str]:
        head, *rows = self.table(words)
        return [row[head.index(name)] for row in rows]


def page(*rows: ScoreRow | TicketRow, **more: Any) -> Page:
    return Page(render(results(*rows, **more)))


# Numbers


def test_draws_are_averaged_within_their_seed_before_seeds_are() -> None:
    rows = (score("random", "pruned", 0.6), score("random", "pruned", 0.8, draw=1), score("random", "pruned", 0.9, seed=2))
    # seed means 0.7 and 0.9: mean 0.8, std 0.1414, not the mean 0.7667 of three rows; t(1 df) = 12.706: 0.8 ± 1.2706
    assert markdown_table(results(*rows)).splitlines() == [
        "| Task | Split | Metric | Stage | Ticket | Score | 95 % interval | Majority | Seeds | Draws per seed | Rows |",
        "| --- | --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        "| sst2 | validation (report) | accuracy | pruned | random | 0.800 ± 0.141 | −0.471 to 2.071 | 0.500 | 2 | 1–2 | 400 |",
    ]


def test_score_table_orders_stages_and_kinds_and_sets_each_beside_dense_and_majority() -> None:
    rows = [score("good", "pruned", 0.7), score("good", "pruned", 0.7, seed=2)]
    for seed, shift in ((1, 0.0), (2, 0.02)):
        rows += [score("bad", "retrained", 0.6 + shift, seed=seed), score("good", "retrained", 0.8 + shift, seed=seed)]
        rows += [score("full", "full", 0.85 + shift, seed=seed)]
    head, *body = page(*rows).table("mean ± std over seeds")
    assert head == ["Stage", "Ticket", "Score", "95 % interval", "Majority", "Seeds", "Draws per seed", "Rows", "Minus dense"]
    assert [row[:3] + row[4:] for row in body] == [
        ["full", "full (dense)", "0.860 ± 0.014", "0.500", "2", "1", "400", "—"],
        ["pruned", "good", "0.700 ± 0.000", "0.500", "2", "1", "400", "−0.160 ± 0.014"],
        ["retrained", "good", "0.810 ± 0.014", "0.500", "2", "1", "400", "−0.050 ± 0.000"],
        ["retrained", "bad", "0.610 ± 0.014", "0.500", "2", "1", "400", "−0.250 ± 0.000"],
    ]
    assert body[1][3] == "seeds equal"  # no interval is made of seeds that do not differ


def test_challenge_and_selection_rows_stand_apart_from_report_rows() -> None:
    rows = [score("good", "pruned", 0.7), score("good", "pruned", 0.4, split="hans", role="challenge", n=300)]
    rows.append(score("good", "pruned", 0.75, split="held-out", role="selection", n=500))
    read = page(*rows)
    captions = ["Accuracy on validation (report rows, n = 400)", "Accuracy on hans (challenge rows, n = 300)",
                "Accuracy on held-out (selection rows, n = 500)"]  # fmt: skip
    assert [caption.split(":")[0] for caption in read.tables] == captions
    assert [read.column(caption, "Score") for caption in captions] == [["0.700"], ["0.400"], ["0.750"]]
    assert "The mask was chosen on these rows: good looks better here than it is." in read.text
    assert "held-out" not in markdown_table(results(*rows))
    assert "| held-out (selection) |" in markdown_table(results(*rows), role="selection")
    assert markdown_table(results(*rows), role="other") == latex_table(results(*rows), role="other") == ""


def test_agreement_with_the_dense_model_is_shares_of_rows_averaged_over_seeds() -> None:
    def agreement(flips: int, negative: int) -> Agreement:
        return Agreement(flips, 100, flips - 3, 3, {"neg": 50, "pos": 50}, {"neg": negative, "pos": 100 - negative})

    rows = (
        score("good", "pruned", 0.7, agreement=agreement(10, 56)),
        score("good", "pruned", 0.7, seed=2, agreement=agreement(20, 52)),
    )
    assert page(*rows).table("how the predictions differ")[1] == [
        "pruned", "good", "0.150 ± 0.071", "0.120 ± 0.071", "0.030 ± 0.000", "+0.040 ± 0.028", "−0.040 ± 0.028", "2", "1", "100",
    ]  # fmt: skip


def test_agreement_over_many_classes_keeps_those_that_change_most_and_says_so() -> None:
    dense = {f"class {i}": 10 for i in range(9)}
    after = dense | {f"class {i}": 10 + i for i in range(9)}
    read = page(score("good", "pruned", 0.5, agreement=Agreement(36, 90, 36, 0, dense, after)))
    assert read.table("how the predictions differ")[0][5:11] == [f"Δ class {i}" for i in range(3, 9)]
    assert "The 6 of 9 classes that change most." in read.text


def test_sizes_overlap_and_kappa_are_those_worked_by_hand() -> None:
    rows = [
        ticket("good", ["xx", ".."], "x."),
        ticket("good", ["x.", "x."], ".x", seed=2),
        ticket("random", ["x.", ".x"], "x.", shared_with_good={"heads": 1, "mlps": 1}),
        ticket("random", ["..", "xx"], ".x", draw=1, shared_with_good={"heads": 0, "mlps": 0}),
    ]
    read = page(*rows)
    assert read.table("What the tickets keep")[1:] == [
        ["good", "2.0 ± 0.0", "1.0 ± 0.0", "0.500 ± 0.000", "0.750 ± 0.000", "2", "1"],
        ["random", "2.0", "1.0", "0.500", "0.750", "1", "2"],
    ]
    # draws share 1 and 0 of 2 heads: mean 0.5, by chance 2 * 2 / 4 = 1; Jaccard 1/3 and 0;
    # its chance: shared 0, 1, 2 in 1, 4, 1 of 6 draws: (0 + 4/3 + 1) / 6 = 0.389
    assert read.table("What controls share with the good ticket")[1][:7] == [
        "random",
        "heads",
        "0.5",
        "1.0",
        "0.500",
        "0.167",
        "0.389",
    ]
    # the two good masks share 1 head; votes 2, 1, 1, 0: agreement (1 + 0 + 0 + 1) / 4 = 1/2 = chance; MLPs always disagree
    stable = read.table("Good tickets of different seeds")[1:]
    assert float(stable[0].pop(8)) == pytest.approx(5 / 6, abs=0.015)  # all but the one pair of masks of these sizes apart; drawn
    assert stable == [
        ["heads", "1.0", "1.0", "1.000", "0.333", "0.389", "0 of 1", "0.000", "not shown to differ", "2"],
        ["MLPs", "0.0", "0.5", "0.000", "0.000", "0.500", "0 of 1", "−1.000", "1.000", "not shown to differ", "2"],
    ]
    assert read.table("Good tickets of two seeds")[1][:3] == ["1 and 2", "heads", "1"]


def heat_maps(html: str) -> list[dict[str, Any]]:
    """What each heat map of a page holds for the script, and the shades that stand in it without."""
    found = []
    for data, drawn in re.findall(r'<g class="cells[^"]*" ([^>]*)>(.*?)</g>', html, flags=re.DOTALL):
        told = dict(re.findall(r'data-(\w+)="([^"]*)"', data))
        seeds = dict(one.split(":") for one in told["v"].split(";"))
        shades: dict[tuple[int, int], float] = {}
        for path, shade in re.findall(r'<path d="([^"]*)" (?:fill-opacity="([\d.]+)"|class="none")/>', drawn):
            shades |= {(int(y), int(x)): float(shade) if shade else -1.0 for x, y in re.findall(r"M(\d+) (\d+)h", path)}
        values = {int(seed): [float(value) for value in text.split(",")] for seed, text in seeds.items()}
        found.append({"told": told, "by_seed": values, "shades": [shades[place] for place in sorted(shades)]})
    return found


def test_heat_maps_hold_what_each_seed_keeps_and_show_the_share_of_seeds() -> None:
    importance = ((0.1, 0.2), (0.3, 0.4))
    rows = [
        ticket("good", ["xx", ".."], "x.", head_importance=importance, mlp_importance=(1.0, 2.0)),
        ticket("good", ["x.", ".."], "x.", seed=70, head_importance=((0.3, 0.4), (0.5, 0.6)), mlp_importance=(3.0, 4.0)),
        ticket("random", ["x.", ".."], "x."),
        ticket("random", [".x", ".."], "x.", draw=1),
    ]
    good, raw, random_ = heat_maps(render(results(*rows)))
    # heads of layer 0, heads of layer 1, then the MLPs
    assert good["by_seed"] == {1: [1, 1, 0, 0, 1, 0], 70: [1, 0, 0, 0, 1, 0]}
    assert random_["by_seed"] == {1: [0.5, 0.5, 0, 0, 1, 0]}, "a seed's draws are averaged within it"
    assert good["told"]["name"] == "good" and good["told"]["heads"] == "2" and good["told"]["layers"] == "2"
    # in the order of the picture: a layer's heads, then its MLP
    assert good["shades"] == [1.0, 0.5, 1.0, 0.0, 0.0, 0.0]
    assert raw["shades"] == [0.4, 0.6, 0.67, 0.8, 1.0, 1.0], "heads and MLPs on scales of their own"
    stored = [one.split(":")[1].split(",") for one in raw["told"]["raw"].split(";")]
    assert [list(map(float, one)) for one in stored] == [[0.1, 0.2, 0.3, 0.4, 1.0, 2.0], [0.3, 0.4, 0.5, 0.6, 3.0, 4.0]]


# Verdict and warnings


def pair(good: float, rand: float, *, seeds: Sequence[int] = (1, 2), **changes: Any) -> list[ScoreRow]:
    """Good and random, retrained, with a small wobble over seeds."""
    wobble = {seed: 0.001 * i for i, seed in enumerate(seeds)}
    both = (("good", good), ("random", rand))
    return [score(kind, "retrained", value + wobble[seed], seed=seed, **changes) for seed in seeds for kind, value in both]


def over_400_rows(good: float, rand: float) -> str:
    """The interval by another library."""
    low, high = confint_proportions_2indep(good * 400, 400, rand * 400, 400, method="newcomb", compare="diff")
    return f"95 % interval over 400 rows {low:.3f} to {high:.3f}".replace("-", "−")


def test_a_small_difference_is_said_to_be_one_that_other_rows_might_not_show() -> None:
    read = page(*pair(0.81, 0.79), score("full", "full", 0.85))
    # 2.8016 * sqrt(2 / 400) / 2 = 0.0990 on the arcsine scale: 0.8105 - sin(asin(sqrt(0.8105)) - 0.0990)^2 = 0.083
    interval = over_400_rows(0.8105, 0.7905)
    said = f"the difference of 0.020 may as well be zero on other rows ({interval}; they can show 0.083 or more)."
    assert f"(accuracy on validation, 400 rows, 2 seeds): {said}" in read.text
    assert (
        "Always answering the most frequent class scores 0.500 and the dense model 0.850 (1 seed) on the same rows." in read.text
    )
    limit = interval.replace("400 rows", "400 validation rows,")
    assert f"Retrained, good minus random is +0.020 (2 seeds): zero lies in its {limit}." in read.items


def test_a_large_difference_names_who_is_ahead_and_whether_seeds_agree() -> None:
    steady = [score(kind, "retrained", value, seed=seed) for seed in (1, 2) for kind, value in (("good", 0.85), ("random", 0.6))]
    steady[0] = replace(steady[0], value=0.86)  # differences 0.26 and 0.25: 0.255 ± 12.706 * 0.00707 / sqrt(2)
    over_rows = f"is not zero over rows ({over_400_rows(0.855, 0.6)})"
    said = f"{over_rows}, and over seeds (95 % interval over seeds 0.191 to 0.319): good is ahead."
    assert said in page(*steady).text
    torn = [replace(row, value=row.value - 0.2 * (row.kind == "good" and row.seed == 2)) for row in steady]
    turn = "but another seed might turn it (95 % interval over seeds −1.179 to 1.489)"  # 0.155 ± 12.706 * 0.21 / 2
    assert f"is not zero over rows ({over_400_rows(0.755, 0.6)}), {turn}." in page(*torn).text
    assert "in the one seed, where random is ahead." in page(*pair(0.6, 0.85, seeds=(1,))).text
    assert "may as well be zero" not in page(*steady).text


def test_good_or_random_and_the_claims_are_one_verdict() -> None:
    """Seeds agree on a difference that 400 rows do not show: neither place may say that good is ahead."""
    rows = [*pair(0.81, 0.79), *pair(0.9, 0.6, task="rte")]
    tickets = [ticket("good", ["xx", ".."], "x.", seed=seed, task=task) for task in ("sst2", "rte") for seed in (1, 2)]
    read = page(*rows, *tickets)
    table = [dict(zip(read.table("What was found")[0], row, strict=True)) for row in read.table("What was found")[1:]]
    assert [row["Good or random?"] for row in table] == ["too close to tell", "good ahead"]
    assert [row["95 % over seeds"] for row in table] == ["seeds equal", "seeds equal"]
    assert over_400_rows(0.8105, 0.7905).endswith(table[0]["over rows"])
    claim = next(row for row in read.table("Which claims hold") if row[0] == "good beats random when trained again")
    assert claim[2:] == ["1: rte", "—", "1: sst2"]


def test_a_good_ticket_below_the_majority_line_gets_no_praise() -> None:
    means_little = "Good does not beat the most frequent class, so being ahead or behind means little."
    assert means_little in page(*pair(0.5, 0.3, majority=0.6)).text
    assert means_little not in page(*pair(0.8, 0.6, majority=0.6)).text


def test_for_other_metrics_the_interval_over_seeds_decides_and_one_seed_decides_nothing() -> None:
    clear = [
        score(k, "retrained", v, seed=s, metric="matthews")
        for s in (1, 2, 3)
        for k, v in (("good", 0.5 + s / 1000), ("random", 0.3))
    ]
    assert "is not zero (95 % interval over seeds 0.200 to 0.204): good is ahead." in page(*clear).text
    vague = [replace(row, value=row.value + 0.4 * (row.seed == 2) * (row.kind == "random")) for row in clear]
    assert "may as well be zero (95 % interval over seeds" in page(*vague).text
    assert "comes from one seed, and what these rows can show is not known" in page(*clear[:2]).text


def test_several_tasks_are_counted_by_outcome_and_set_side_by_side() -> None:
    read = page(*pair(0.81, 0.79), *pair(0.9, 0.6, task="rte"), *pair(0.8, 0.8, task="qnli"))
    assert "In 1 of 3 tasks good tickets are ahead" in read.text
    assert "In 2 of 3 tasks the difference between good and random tickets is smaller than rows or seeds can show." in read.text
    assert [row[0] for row in read.table("Good against random")[1:]] == ["sst2", "rte", "qnli"]
    assert read.column("Good against random", "Ahead") == ["too close", "good", "too close"]
    assert read.column("Good against random", "Difference") == ["+0.020 ± 0.000", "+0.300 ± 0.000", "0.000 ± 0.000"]


def test_six_seeds_give_a_p_and_several_tasks_share_one_error_rate() -> None:
    seeds = (1, 2, 3, 4, 5, 6)
    one = page(*pair(0.9, 0.6, seeds=seeds, metric="matthews"))
    assert "seeds equal, sign-flip p = 0.031" in one.text  # 2 / 2**6: all six differences have one sign
    both = page(*pair(0.9, 0.6, seeds=seeds), *pair(0.8, 0.6, seeds=seeds, task="rte"), *pair(0.8, 0.6, task="qnli"))
    # Two tests: the smaller p counts double, the larger at least as much; two seeds give no p below .05, so none is shown.
    assert both.column("Good against random", "p (Holm)") == ["0.062", "0.062", "—"]


def test_kappa_of_three_seeds_has_its_interval_and_sizes_that_differ_are_said() -> None:
    kept = ("xxxxxxxxxxx.", "xxxxxxxxxx.x", "x...........")
    read = page(*[ticket("good", [row], "x", seed=seed) for seed, row in enumerate(kept, 1)])
    heads = dict(zip(*(read.table("Good tickets of different seeds")[row] for row in (0, 1)), strict=True))
    assert heads["Fleiss kappa"].endswith(")") and " to " in heads["Fleiss kappa"]
    assert heads["Sizes"] == "differ"


def test_without_controls_or_report_rows_there_is_no_verdict() -> None:
    needs = "There is no verdict: it needs"
    assert f"{needs} good and random tickets of the same seeds." in page(score("good", "pruned", 0.8)).text
    assert f"{needs} good and random tickets" in page(score("good", "pruned", 0.8), score("random", "pruned", 0.8, seed=2)).text
    assert f"{needs} scores on report rows." in page(score("good", "pruned", 0.8, role="selection")).text


ON = "Accuracy on validation (report rows, n = 400)"
DOUBTFUL: dict[str, list[ScoreRow | TicketRow]] = {
    f"{ON}: at or below the majority line of 0.500: pruned good (seed 1); pruned bad (seed 1).": [
        *(score("good", "pruned", 0.5), score("good", "pruned", 0.6, seed=2), score("bad", "pruned", 0.4)),
    ],
    f"{ON}: at or below the majority line of 0.500: every model in every seed.": [score("full", "full", 0.3)],
    # of perplexity less is better
    f"{ON.replace('Accuracy', 'Perplexity')}: at or above the majority line of 0.500: pruned good (seed 2).": [
        *(score("good", "pruned", 0.4, metric="perplexity"), score("good", "pruned", 0.6, seed=2, metric="perplexity")),
    ],
    # controls that are made to be bad are counted where they are many
    f"{ON}: at or below the majority line of 0.500: dense (seed 1); 5 scores of other controls.": [
        *(score("full", "full", 0.4), score("good", "pruned", 0.8)),
        *(score(kind, "pruned", 0.5) for kind in ("bad", "bad-lowest", "strict-bad", "reinit-body", "shuffle-layers")),
    ],
    "2 seeds cannot give p < 0.05 in a paired sign-flip or Wilcoxon test: the smallest two-sided p is 0.500 whatever the scores. "
    "It takes 6 seeds.": [score("good", "pruned", 0.8), score("good", "pruned", 0.8, seed=2)],
    "The mask was chosen on the rows it is reported on (validation), so good looks better than it is.": [
        *(score("good", "pruned", 0.8), score("good", "pruned", 0.8, role="selection")),
    ],
    f"{ON.replace('400', '399–400')}: the scores were not measured on the same number of rows.": [
        *(score("good", "pruned", 0.8), score("good", "pruned", 0.8, seed=2, n=399)),
    ],
    f"{ON}: no mean where a seed has no finite score (pruned good).": [
        *(score("good", "pruned", 0.8), score("good", "pruned", float("nan"), seed=2)),
    ],
    "1 score came more than once for one seed and draw: the means mix different settings.": [
        *(score("good", "pruned", 0.8), score("good", "pruned", 0.7)),
    ],
    "A mask that keeps nothing: good of seed 1.": [ticket("good", ["..", ".."], "..")],
    "A mask that keeps no heads: random of seed 1, draw 2.": [ticket("random", ["..", ".."], "x.", draw=2)],
    "A mask that keeps no MLPs: good of seed 1.": [ticket("good", ["x.", ".."], "..")],
    "A mask that keeps everything: good of seed 1.": [ticket("good", ["xx", "xx"], "xx")],
    "Fleiss kappa over the seeds of good is undefined for heads and MLPs: kappa needs at least two masks.": [
        ticket("good", ["x.", ".."], "x."),
    ],
    "Fleiss kappa over the seeds of good is undefined for MLPs: all masks keep everything: chance agreement is already "
    "complete.": [
        *(ticket("good", ["x.", ".."], "xx"), ticket("good", ["x.", ".x"], "xx", seed=2)),
    ],
    "1 of 1 strict-bad controls differ from good in size: that comparison is not one of equals.": [
        *(ticket("good", ["xx", ".."], "x."), ticket("strict-bad", ["..", "x."], ".x")),
    ],
    "random of seed 1, draw 0 shares 1 heads with good, stored as 2: two studies are mixed.": [
        *(ticket("good", ["xx", ".."], "x."), ticket("random", ["x.", "x."], "x.", shared_with_good={"heads": 2})),
    ],
    "Tickets of models of different sizes (2 layers × 2 heads, 2 MLPs and 1 layer × 3 heads, 1 MLP): their maps, sizes and "
    "overlaps are not shown.": [ticket("good", ["x.", ".."], "x."), ticket("good", ["x.."], "x", seed=2)],
    "Models of different sizes are on this page (sst2 · m has 2 layers × 2 heads, 2 MLPs and rte · big has 1 layer × 3 heads, "
    "1 MLP): compare scores and sizes within a task only.": [
        *(ticket("good", ["x.", ".."], "x."), ticket("good", ["x.."], "x", task="rte", model="big")),
    ],
}


@pytest.mark.parametrize("warning", DOUBTFUL)
def test_doubtful_results_are_said_aloud(warning: str) -> None:
    assert warning in page(*DOUBTFUL[warning]).items


def test_a_clean_study_has_no_warnings_and_cells_are_heard_first() -> None:
    seeds = range(1, 7)
    scores = [*pair(0.9, 0.6, seeds=seeds)]
    tickets = [ticket("good", ["x.", "xx" if seed % 2 else "x."], "x." if seed % 3 else ".x", seed=seed) for seed in seeds]
    assert not any(attributes.get("class") == "warnings" for _, attributes in page(*scores, *tickets).tags)
    said = page(*pair(0.81, 0.79), warnings=("cell 3 was recomputed",)).items
    assert said[[item.startswith("cell 3") for item in said].index(True) + 1].startswith("Retrained, good minus random")


def test_a_warning_that_holds_for_several_tasks_is_said_once() -> None:
    read = page(*pair(0.9, 0.6), *pair(0.9, 0.6, task="rte"))
    assert sum("It takes 6 seeds" in item for item in read.items) == 1
    assert "sst2 and rte" in read.text


def test_a_broken_seed_gives_no_mean_and_no_nan_anywhere() -> None:
    rows = [*pair(0.8, 0.7), score("good", "retrained", float("nan"), seed=3), score("random", "retrained", 0.7, seed=3)]
    html = render(results(*rows))
    read = Page(html)
    assert read.column("mean ± std", "Score") == ["—", "0.700 ± 0.001"]
    assert "Retrained, good and random cannot be compared: 1 of 3 seeds gave no finite number." in read.text
    assert "nan" not in re.sub(r"<(style|script)>.*?</\1>", "", html, flags=re.DOTALL).lower()


# The document


def test_no_results_give_a_page_that_says_what_to_run() -> None:
    read = page(settings={"floor": 0.9})
    assert "There are no results here yet. Run a study, for instance tombola demo" in read.text
    assert read.table("Settings")[1] == ["floor", "0.9"]
    assert markdown_table(results()) == latex_table(results()) == ""


def test_scores_without_tickets_and_tickets_without_scores_are_shown() -> None:
    assert "Which heads and MLPs survive" not in page(score("good", "pruned", 0.8)).text
    read = page(ticket("good", ["x.", ".."], "x."))
    assert "Which heads and MLPs survive" in read.text
    assert "Scores on" not in read.text


def test_hostile_names_stay_text() -> None:
    agreement = Agreement(1, 400, 1, 0, {HOSTILE: 200}, {HOSTILE: 201})
    step = PathStep(1, HOSTILE, {"heads": 3, "mlps": 1}, 0.7, True)
    rows = [
        score(kind, "retrained", 0.8, seed=seed, task=HOSTILE, model=HOSTILE, split=HOSTILE, metric=HOSTILE, agreement=agreement)
        for kind in ("good", "random", HOSTILE)
        for seed in (1, 2)
    ] + [score("good", HOSTILE, 0.8, role=HOSTILE), score("good", "pruned", 0.8, role="selection", split=HOSTILE)]
    tickets = [
        ticket(kind, ["x.", ".x"], "x.", task=HOSTILE, model=HOSTILE, path=(step, step), full_score=0.9, floor_score=0.8)
        for kind in ("good", HOSTILE)
    ]
    read = page(*rows, *tickets, settings={HOSTILE: HOSTILE}, provenance={HOSTILE: HOSTILE}, warnings=(HOSTILE,))
    assert sum(tag == "script" for tag, _ in read.tags) == 1
    assert not any(tag == "img" for tag, _ in read.tags)
    assert not any(name.startswith("on") for _, attributes in read.tags for name in attributes)
    assert HOSTILE in read.items
    assert [HOSTILE, HOSTILE] in read.tables["Settings of this study, as resolved"]
    assert any(HOSTILE in title for title in read.titles)
    assert "{{ 7*7 }}" in read.text


def test_tables_for_papers_escape_what_their_languages_read_as_commands() -> None:
    rows = [score("good", "pruned", -0.25, task="a|b_c\n`d`<i>", metric="50 % & $x^2 {~}\\")]
    line = markdown_table(results(*rows)).splitlines()[-1]
    assert line.startswith(r"| a\|b\_c \`d\`\<i\> | validation (report) | 50 % \& $x^2 {\~}\\ | pruned | good | −0.250 | — |")
    assert latex_table(results(*rows)) == (
        "\\begin{tabular}{lllllrrrrrr}\n\\toprule\n"
        "Task & Split & Metric & Stage & Ticket & Score & 95 \\% interval & Majority & Seeds & Draws per seed & Rows \\\\\n"
        "\\midrule\n"
        "a|b\\_c `d`\\textless{}i\\textgreater{} & validation (report) & "
        "50 \\% \\& \\$x\\textasciicircum{}2 \\{\\textasciitilde{}\\}\\textbackslash{} & pruned & good & "
        "$-$0.250 & --- & 0.500 & 1 & 1 & 400 \\\\\n"
        "\\bottomrule\n\\end{tabular}\n"
    )


def test_page_fetches_nothing_and_has_no_clock() -> None:
    study = full_study()
    html = render(study)
    assert html == render(study)
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?:|url\(|@import|<link(?! rel=\"icon\" href=\"data:,\")|<iframe|\bsrc=", html)
    assert "default-src 'none'" in html


def test_every_table_has_a_caption_and_every_header_a_scope() -> None:
    read = Page(render(full_study()))
    tables = sum(tag == "table" for tag, _ in read.tags)
    assert tables == sum(tag == "caption" for tag, _ in read.tags) > 10
    assert all(attributes.get("scope") in ("row", "col") for tag, attributes in read.tags if tag == "th")
    assert all(attributes.get("role") == "img" and attributes.get("aria-label") for tag, attributes in read.tags if tag == "svg")
    names = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(names) == len(set(names))
    targets = [(attributes["href"] or "")[1:] for tag, attributes in read.tags if tag == "a"]
    assert targets and set(targets) <= set(names)


@pytest.mark.parametrize("block", [0, 1], ids=["light", "dark"])
def test_text_and_marks_are_readable_on_their_ground(block: int) -> None:
    sheet = re.findall(r":root \{(.*?)\}", render(results()), flags=re.DOTALL)[block]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", sheet))

    def luminance(name: str) -> float:
        parts = [int(colours[name][i : i + 2], 16) / 255 for i in (1, 3, 5)]
        red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    def contrast(a: str, b: str) -> float:  # WCAG 2: 4.5 for text, 3 for marks
        low, high = sorted((luminance(a), luminance(b)))
        return (high + 0.05) / (low + 0.05)

    assert all(contrast(ink, "paper") >= 4.5 for ink in ("ink", "muted", "link"))
    assert contrast("ink", "warn-panel") >= 4.5
    assert all(contrast(mark, "paper") >= 3 for mark in ("full", "good", "random", "bad", "strict-bad", "survival", "importance"))


# Figures


def test_dot_chart_puts_values_in_proportion_along_its_axis() -> None:
    dots = tuple(figures.Dot(value, (value,), "dot") for value in (0.2, 0.3, 0.6))
    row = figures.DotRow("", "good", "good", "text", 0.3, None, dots)
    svg = figures.dot_chart([row], [figures.Line("majority", "majority", 0.5)], label="chart")
    x = [float(value) for value in re.findall(r'class="dot" cx="([\d.]+)%"', svg)]
    assert (x[2] - x[0]) / (x[1] - x[0]) == pytest.approx(4, abs=0.01)
    line = float(re.findall(r'class="majority" x1="([\d.]+)%"', svg)[0])
    assert (line - x[0]) / (x[1] - x[0]) == pytest.approx(3, abs=0.01)
    ticks = re.findall(r'class="tick"[^>]*>([^<]+)<', svg)
    assert ticks == ["0.2", "0.3", "0.4", "0.5", "0.6"]


def test_charts_of_nothing_finite_are_empty_and_of_one_value_still_have_an_axis() -> None:
    nothing = figures.DotRow("", "good", "good", "—", None, None, (figures.Dot(float("nan"), (), "broken"),))
    assert figures.dot_chart([nothing], [], label="chart") == ""
    assert figures.path_chart([], None, label="chart") == ""
    same = replace(nothing, mean=0.5, dots=(figures.Dot(0.5, (0.5,), "one"),))
    assert 'cx="50.00%"' in figures.dot_chart([same], [], label="chart")


def test_search_path_follows_what_passed_and_marks_what_was_rolled_back() -> None:
    trials = [(0.9, True), (0.7, False), (0.85, True)]
    dots = [
        figures.PathDot(value, passed, "joint", {"heads": str(4 - i), "MLPs": "2"}, f"trial {i}")
        for i, (value, passed) in enumerate(trials)
    ]
    svg = figures.path_chart(dots, 0.8, label="path")
    step = r'class="path (failed|passed)" d="M([\d.]+) ([\d.]+)L([\d.]+) ([\d.]+)"'
    lines = {css: list(map(float, ends)) for css, *ends in re.findall(step, svg)}
    assert lines["failed"][:2] == lines["passed"][:2]  # both trials start from the first mask
    floor = float(re.findall(r'class="floor" [^>]*y1="([\d.]+)"', svg)[0])
    assert lines["passed"][3] < floor < lines["failed"][3]  # y grows downwards
    assert "floor 0.800" in svg
    assert 'data-tips="trial 0\n\ntrial 1\n\ntrial 2"' in svg


# The file


def test_page_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "new" / "page.html"
    assert build_page(results(score("good", "pruned", 0.8)), out) == out
    before = out.read_text(encoding="utf-8")
    assert before == render(results(score("good", "pruned", 0.8)))

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        build_page(results(score("good", "pruned", 0.1)), out)
    assert out.read_text(encoding="utf-8") == before
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]


def test_a_folder_is_no_page(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="the page is one file") as error:
        build_page(results(), tmp_path)
    assert error.value.next == f"use {tmp_path / 'page.html'}"


# The browser


@pytest.fixture(scope="module")
def opened(browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    study = full_study()
    hostile = replace(study.scores[0], kind=HOSTILE, stage="pruned")
    path = build_page(replace(study, scores=(*study.scores, hostile)), tmp_path_factory.mktemp("page") / "page.html")
    browser.get_log("performance")  # what the browser asked for at its own start
    browser.get(path.as_uri())
    return browser


@pytest.mark.browser
def test_browser_opens_the_page_without_errors_or_requests(opened: Any) -> None:
    import json

    assert opened.title == "Lottery tickets for sst2 and rte"
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requested = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith("data:")} == {opened.current_url}
    assert opened.get_log("browser") == []  # a refused script, style or image would be reported here


@pytest.mark.browser
def test_browser_shows_the_numbers_of_the_score_table(opened: Any) -> None:
    study = full_study()
    table = opened.find_element("css selector", "#task-1-scores-1 table")
    rows = [
        [c.text for c in row.find_elements("css selector", "th, td")] for row in table.find_elements("css selector", "tbody tr")
    ]
    good = [
        row.value for row in study.scores if (row.task, row.kind, row.stage, row.role) == ("sst2", "good", "retrained", "report")
    ]
    mean = sum(good) / 3
    std = (sum((value - mean) ** 2 for value in good) / 2) ** 0.5
    assert ["retrained", "good", f"{mean:.3f} ± {std:.3f}"] in [row[:3] for row in rows]
    assert [row[5:8] for row in rows if row[1] == "random"] == [["3", "3", "400"], ["3", "3", "400"]]
    assert table.find_element("css selector", "caption").text.startswith("Accuracy on validation (report rows, n = 400)")


@pytest.mark.browser
def test_browser_shows_a_tooltip_over_a_heat_map_cell_and_hides_it_again(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    cell = opened.find_elements("css selector", "#task-1-survival svg.heat .cell")[2 * 12 + 5]  # heads of all layers, then MLPs
    opened.execute_script("arguments[0].scrollIntoView({block: 'center', behavior: 'instant'})", cell)
    ActionChains(opened).move_to_element(cell).perform()
    tip = opened.find_element("id", "tip")
    goods = [t for t in full_study().tickets if (t.task, t.kind) == ("sst2", "good")]
    share = sum(t.heads[2][5] for t in goods) / 3
    lines = tip.text.splitlines()
    assert lines[:2] == ["layer 2 · head 5 · good", f"survival {share:.3f} (3 seeds)"]
    assert lines[2] == f"seed 42: {'kept' if goods[0].heads[2][5] else 'removed'}"
    ActionChains(opened).move_to_element(opened.find_element("css selector", "#task-1-survival h3")).perform()
    assert not tip.is_displayed()


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_never_scrolls_sideways(opened: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for fold in opened.find_elements("css selector", "details:not([open]) > summary"):
        opened.execute_script("arguments[0].click()", fold)
    assert opened.execute_script("return innerWidth") == width
    seen, needed = opened.execute_script("const root = document.documentElement; return [root.clientWidth, root.scrollWidth]")
    assert needed == seen


# A study large enough to look like one


def full_study() -> Results:
    """Two tasks on a model of 6 × 12 heads: sst2 with three seeds, rte with two and near its majority line."""
    draw = random.Random(7)
    scores: list[ScoreRow] = []
    tickets: list[TicketRow] = []
    for task, seeds, majority, n, centres in (
        ("sst2", (42, 71, 86), 0.509, 400, {"full": (0.871, 0.871), "good": (0.801, 0.852), "random": (0.66, 0.84),
                                            "bad": (0.55, 0.812), "strict-bad": (0.53, 0.79)}),
        ("rte", (42, 71), 0.527, 277, {"full": (0.621, 0.621), "good": (0.574, 0.588), "random": (0.52, 0.58),
                                       "bad": (0.505, 0.57), "strict-bad": (0.498, 0.549)}),
    ):  # fmt: skip
        dense = centres["full"][0]
        for seed in seeds:
            tickets += _tickets(draw, task, seed, dense)
            for split, role, shift, rows in (
                ("validation", "report", 0.0, n),
                ("train-held-out", "selection", 0.012, 500),
                ("hard", "challenge", -0.16, 300),
            ):
                for kind, both in centres.items():
                    for stage, centre in zip(("pruned", "retrained"), both, strict=True):
                        if kind == "full" and stage == "retrained":
                            continue
                        control = kind not in ("full", "good")
                        for number in range(3 if control else 1):
                            value = centre + shift + draw.gauss(0, 0.026 if control else 0.008)
                            row = score(
                                kind, "full" if kind == "full" else stage, round(value * rows) / rows, draw=number, seed=seed
                            )
                            agreement = None if kind == "full" else _agreement(draw, rows, dense - centre)
                            row = replace(row, task=task, model="demo", split=split, role=role, n=rows, majority=majority)
                            scores.append(replace(row, agreement=agreement))
    settings = {"preset": "corrected", "floor": 0.9, "floor_rule": "fraction_of_full", "selection_split": "held_out_from_train"}
    provenance = {
        "tombola": "0.1.0",
        "transformers": "5.2.0",
        "weights": "sha256:" + 5 * "4f0d3c21aa97",
        "device": "cpu, 2 threads",
    }
    return Results(tuple(scores), tuple(tickets), settings, provenance, ("rte seed 71: the search stopped at its first trial.",))


def _tickets(draw: random.Random, task: str, seed: int, dense: float) -> Iterator[TicketRow]:
    """The good ticket of a seed, which prefers layers 2 and 3, and three draws of each control."""
    units, blocks = list(range(72)), list(range(6))
    heads, mlps = draw.randint(32, 44), draw.randint(3, 5)
    order = sorted(units, key=lambda unit: draw.random() + 0.9 * (unit % 5 == 0) + 0.8 * (unit // 12 in (2, 3)), reverse=True)
    layers = sorted(blocks, key=lambda layer: draw.random() + 0.8 * (layer in (1, 2, 3)), reverse=True)
    masks = {("good", 0): (set(order[:heads]), set(layers[:mlps]))}
    for number in range(3):
        removed, out = draw.sample(order[heads:], 72 - heads), draw.sample(layers[mlps:], 6 - mlps)
        masks["random", number] = set(draw.sample(units, heads)), set(draw.sample(blocks, mlps))
        masks["bad", number] = set([*removed, *order][:heads]), set([*out, *layers][:mlps])
        masks["strict-bad", number] = set(removed[:heads]), set(out[:mlps])
    good = masks["good", 0]
    for (kind, number), (kept, kept_mlps) in masks.items():
        body = (len(kept) + 24 * len(kept_mlps)) / (72 + 24 * 6)
        row = TicketRow(
            cell="c", model="demo", task=task, seed=seed, kind=kind, draw=number, body_share=body, total_share=0.53 + 0.47 * body,
            heads=tuple(tuple(float(12 * i + j in kept) for j in range(12)) for i in blocks),
            mlps=tuple(float(i in kept_mlps) for i in blocks),
            shared_with_good={"heads": len(kept & good[0]), "mlps": len(kept_mlps & good[1])},
        )  # fmt: skip
        if kind == "good":
            row = replace(
                row,
                head_importance=tuple(tuple(draw.expovariate(1) * 0.004 * (1 + (2 < i < 5)) for _ in range(12)) for i in blocks),
                mlp_importance=tuple(draw.expovariate(1) * 0.05 for _ in blocks),
                path=tuple(_path(draw, dense, heads, mlps)),
                floor_score=0.9 * dense,
                full_score=dense,
            )
        yield row


def _path(draw: random.Random, dense: float, heads: int, mlps: int) -> Iterator[PathStep]:
    step, at, score_now = 0, (72, 6), dense
    yield PathStep(0, "full", {"heads": 72, "mlps": 6}, dense, True)
    for phase, (heads_off, mlps_off) in (("joint", (7, 1)), ("heads", (4, 0)), ("mlps", (0, 1))):
        passed = True
        while passed:
            step, to = step + 1, (at[0] - heads_off, at[1] - mlps_off)
            passed = (to[0] >= heads or not heads_off) and (to[1] >= mlps or not mlps_off)
            score_now = max(0.9 * dense + 0.001, score_now - abs(draw.gauss(0.005, 0.006)))
            kept = {"heads": to[0], "mlps": to[1]}
            yield PathStep(step, phase, kept, score_now if passed else 0.9 * dense - 0.012 - draw.random() * 0.02, passed)
            at = to if passed else at


def _agreement(draw: random.Random, rows: int, loss: float) -> Agreement:
    flips = round(rows * min(0.45, 0.06 + max(0.0, loss) * 1.2))
    dense, moved = rows // 2 + draw.randint(-6, 6), draw.randint(-flips // 3, flips // 2)
    return Agreement(
        flips, rows, flips, 0, {"no": dense, "yes": rows - dense}, {"no": dense - moved, "yes": rows - dense + moved}
    )


def test_what_many_cells_say_alike_is_told_once() -> None:
    from tombola.report.words import told_once

    said = (
        *(f"rte (a=1), seed {seed}: the mask keeps nothing" for seed in (2, 10)), "rte (a=2), seed 2: the mask keeps nothing",
        "cola, seed 0: the mask keeps nothing", "cola (a=1), seed 3: it is late", "nothing else",
    )  # fmt: skip
    assert told_once(said) == (
        "rte (2 settings), seeds 2 and 10: the mask keeps nothing",
        "cola, seed 0: the mask keeps nothing",
        "cola (a=1), seed 3: it is late",
        "nothing else",
    )
