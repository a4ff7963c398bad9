"""The page of a whole study: its parts over all tasks, read back; what a reader can do with it, in a real browser; its files."""

import csv
import io
import json
import math
import re
import zlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest

from test_report import Page
from tombola.errors import StoreError
from tombola.report import build, build_page, charts, render
from tombola.report.build import overview_tables
from tombola.report.cases import study_of
from tombola.report.conclusions import CONCLUSIONS, compare, decide, findings
from tombola.report.export import FORMS, drawing_style, markdown
from tombola.report.folder import write_results
from tombola.report.layout import Table
from tombola.report.words import of_seeds
from tombola.stats import over_seeds
from tombola.study.experiments import EXPERIMENTS
from tombola.study.prasanna2020 import ELSEWHERE, TABLES
from tombola.study.results import Results, ScoreRow, TicketRow
from whole_study import GLUE, only, whole_study

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module")
def study() -> Results:
    study = whole_study(("cola", "sst2"), SEEDS, layers=3, heads=4)
    of_nli = whole_study(("mnli",), SEEDS, layers=3, heads=4)
    return replace(study, subgroups=tuple(replace(one, task=study.scores[0].task) for one in of_nli.subgroups))


@pytest.fixture(scope="module")
def html(study: Results) -> str:
    return render(study)


@pytest.fixture(scope="module")
def read(html: str) -> Page:
    return Page(html)


def values(study: Results, task: str, kind: str, stage: str, **settings: Any) -> dict[int, float]:
    """Seed → score on report rows of the runs with these settings, from the rows themselves."""
    names = {
        name
        for name, of in study.variants.items()
        if of.task == task and all(of.settings.get(key) == value for key, value in settings.items())
    }
    assert len(names) == 1
    return {
        row.seed: row.value
        for row in study.scores
        if row.task in names and (row.kind, row.stage, row.role) == (kind, stage, "report")
    }


JOINT = {"method": "s-prune", "procedure": "joint", "mask": "as found", "epochs": 3, "selection_split": "dev"}


def spread(found: dict[int, float]) -> str:
    return f"{fmean(found.values()):.3f} ± {stdev(found.values()):.3f}".replace("-", "−")


# ------------------------------------------------------------------------------------------------------------------ parts


# Row of the reproduction's list → titles of the parts of the page that show it, or the experiment's own section of a task.
SHOWN: dict[str, tuple[str, ...]] = {
    "E1": ("Good, random and bad tickets: m-prune", "Do seeds keep as much of each part?", "How much can be removed?"),
    "E2": ("Good, random and bad tickets: s-prune",),
    "E3": ("Do tasks share their tickets? s-prune, heads only", "What the search went by, step by step: s-prune, heads only"),
    "E4": ("Do tasks share their tickets? s-prune, MLPs only", "What the search went by, step by step: s-prune, MLPs only"),
    "E5": ("Good, random and bad tickets: s-prune", "Good, random and bad tickets: m-prune"),
    "E6": ("How far do bad tickets come?",),
    "E7": ("Do bad tickets catch up with longer training?",),
    "E8": ("What survives in every seed",),
    "E9": ("Do seeds agree on which parts to keep?", "Do masks of single values agree?"),
    "E10": ("What the search went by, step by step: s-prune",),
    "E11": ("What do heads look at?", "Maps, as they look"),
    "E12": ("Are the maps of survivors heterogeneous more often?",),
    "E13": (
        "Do tasks share their tickets? s-prune",
        "Do tasks share their tickets? s-prune, super",
        "Single values that two tasks",
    ),
    "E14": ("Which parts survive for how many tasks?",),
    "X1": ("What does the score owe to pre-training?",),
    "X2": ("Masks used and turned around",),
    "X3": ("Where do shortcuts fail?",),
    "X4": ("Drawn again",),
    "X5": ("Set to zero",),
    "X6": ("Put back to the pre-trained values", "Put back, from the row before"),
    "X7": ("No residual around the MLP", "The MLP's output twice"),
    "X8": ("How much can be removed?", "Values removed in one step"),
    "X9": ("Removed heads drawn again, not masked",),
    "X10": ("Do heads and MLPs depend on each other?", "What is lost together and apart"),
    "X11": ("Single values removed, as much as whole parts",),
    "X12": ("Does it matter which rows a mask is chosen on?",),
    "X13": (
        "Do seeds and tasks rank the same parts first?",
        "Do parts with larger weights survive?",
        "What do tickets answer?",
        "Entropy",
    ),
    "X14": ("What the tickets keep",),  # sizes; what is really smaller is shipped and measured by other commands
    "X15": ("device-hours",),
    "beside": (
        "Do good tickets lie in the dense model’s valley?",
        "Which seed decides the mask?",
        "Do seeds with like masks make like errors?",
        "Does a ticket serve another task better",
    ),
}


def test_every_row_of_the_list_is_shown_and_no_two_parts_share_a_name(read: Page) -> None:
    of_experiments = {row for one in EXPERIMENTS.values() for row in one.rows if row[0] in "EX" and row[1:].isdigit()}
    listed = {*(f"E{i}" for i in range(1, 15)), *(f"X{i}" for i in range(1, 16))}
    assert listed == SHOWN.keys() - {"beside"}
    assert {*TABLES, *ELSEWHERE} <= listed and listed <= of_experiments | TABLES.keys() | ELSEWHERE.keys()
    missing = {row: [title for title in titles if title not in read.text] for row, titles in SHOWN.items()}
    assert {row: titles for row, titles in missing.items() if titles} == {}
    ids = [attributes["id"] for _, attributes in read.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {(attributes["href"] or "")[1:] for tag, attributes in read.tags if tag == "a"}
    assert targets <= set(ids)


def test_a_small_store_has_no_parts_over_tasks(study: Results) -> None:
    one = {name for name, of in study.variants.items() if of.task == "sst2" and of.settings | JOINT == of.settings}
    kept = [row for row in study.scores if row.task in one]
    text = Page(render(Results(tuple(kept), tuple(t for t in study.tickets if t.task in one)))).text
    assert "Tickets and controls" not in text and "Do tasks share" not in text and "Scores on report rows" in text


def test_bars_and_their_table_are_the_means_over_seeds(study: Results, read: Page, html: str) -> None:
    table = read.table("Good, random and bad tickets, s-prune")
    cola = dict(zip(table[0], next(row for row in table if row[0] == "cola"), strict=True))
    for column, kind, stage in (
        ("Full", "full", "full"),
        ("Bad, pruned", "bad", "pruned"),
        ("Good, retrained", "good", "retrained"),
    ):
        assert cola[column] == spread(values(study, "cola", kind, stage, **JOINT))
    both = [values(study, task, "good", "retrained", **JOINT) for task in ("cola", "sst2")]
    mean = {seed: fmean(one[seed] for one in both) for seed in SEEDS}
    total = dict(zip(table[0], table[-1], strict=True))
    assert total["Task"] == "mean of 2 tasks" and total["Good, retrained"] == spread(mean), "within each seed first"


def test_overview_has_a_line_for_each_task_and_search_with_intervals(study: Results, read: Page) -> None:
    table = read.table("What was found")
    lines = {(row[0], row[1]): dict(zip(table[0][:4], row[:4], strict=True)) for row in table[1:]}
    assert set(lines) == {(task, f"{search}, retrained") for task in ("cola", "sst2") for search in ("s-prune", "m-prune")}
    good = over_seeds(list(values(study, "cola", "good", "retrained", **JOINT).values()))
    row = next(row for row in table if row[:2] == ["cola", "s-prune, retrained"])
    at = table[0].index("Good")
    assert row[at : at + 2] == [f"{good.value:.3f}", f"{good.low:.3f} to {good.high:.3f}"]


def test_longer_training_and_one_shot_tables_have_a_number_for_each_setting(study: Results, read: Page) -> None:
    longer = read.table("Scores by epochs")
    assert longer[0][2:] == ["3 epochs", "4 epochs", "5 epochs", "6 epochs"]
    row = next(row for row in longer if row[0] == "sst2")
    assert row[3] == spread(values(study, "sst2", "bad", "retrained", **JOINT | {"epochs": 4}))
    one_shot = read.table("Values removed in one step")
    found = {(row[0], row[1], row[2]): row[3] for row in one_shot[1:]}
    wanted = values(study, "cola", "good", "pruned", method="one-shot", criterion="random", sparsity=0.5)
    assert found["cola", "one-shot random, pruned", "0.500"] == spread(wanted) and len(found) == 12


def test_lesions_are_told_apart_and_never_averaged(study: Results, read: Page) -> None:
    table = read.table("Set to zero: mean")
    row = next(row for row in table if row[:3] == ["cola", "q+k+v", "all"])
    found = {r.seed: r.value for r in study.lesions if r.lesion == "zero q+k+v" and r.task.startswith("cola")}
    assert row[3] == spread(found)
    redrawn = [row[:3] for row in read.table("Drawn again: mean")[1:]]
    assert len(redrawn) == len({tuple(row) for row in redrawn}), "a row for each place"
    assert ["cola", "layer", "layer 2"] in redrawn and ["sst2", "q", "layers 0-1"] in redrawn


def test_overlap_of_tasks_counts_shared_parts_at_matched_seeds(study: Results, read: Page) -> None:
    names = {of.task: name for name, of in study.variants.items() if of.settings | JOINT == of.settings}
    kept = {
        (task, t.seed): {(i, j) for i, row in enumerate(t.heads) for j, share in enumerate(row) if share}
        for task, name in names.items()
        for t in study.tickets
        if t.task == name and t.kind == "good"
    }
    shared = {seed: float(len(kept["cola", seed] & kept["sst2", seed])) for seed in SEEDS}
    chance = fmean(len(kept["cola", seed]) * len(kept["sst2", seed]) / 12 for seed in SEEDS)
    (row,) = read.table("heads that two tasks share, s-prune")[1:]
    assert row[:4] == ["cola", "sst2", f"{fmean(shared.values()):.1f} ± {stdev(shared.values()):.1f}", f"{chance:.1f}"]


def test_histograms_hold_every_step_of_every_seed(study: Results, html: str) -> None:
    (data,) = re.findall(r'class="histogram" data-steps="([^"]*)"', html)[:1]
    seeds = dict(one.split(":", 1) for one in data.split("|"))
    (ticket,) = [
        t
        for t in study.tickets
        if t.seed == 1
        and t.steps
        and t.task.startswith("cola")
        and "selection_split=dev" in t.task
        and "procedure=joint" in t.task
    ]
    told = [step.split("/") for step in seeds["1"].split(";")]
    assert len(told) == len(ticket.steps)
    for step, (counts, cut, _) in zip(ticket.steps, told, strict=True):
        assert sum(map(int, counts.split(","))) == len(step.heads)
        assert float(cut) == pytest.approx(step.head_cut, rel=1e-3)


def test_each_part_says_its_cells_and_the_command(study: Results, html: str) -> None:
    part = html[html.index('id="tickets-1-1"') :]
    source = part[: part.index("</article>")]
    assert "tombola study run prasanna2020" in source and "<code>controls</code>" in source
    names = {
        name
        for name, of in study.variants.items()
        if of.settings.get("procedure") == "joint" and of.settings | JOINT == of.settings
    }
    keys = {row.cell[:8] for row in (*study.scores, *study.tickets) if row.task in names}
    assert keys <= set(re.findall(r"\b[0-9a-f]{8}\b", source))


# ------------------------------------------------------------------------------------------------------------ conclusions


def test_a_conclusion_is_where_its_interval_lies() -> None:
    assert decide(over_seeds([0.3, 0.31, 0.32]), 0.0) == "holds"
    assert decide(over_seeds([-0.3, -0.31, -0.32]), 0.0) == "fails"
    assert decide(over_seeds([0.3, -0.31, 0.32]), 0.0) == "undecided"
    assert decide(over_seeds([0.3]), 0.0) == "undecided", "one seed decides nothing"
    assert decide(over_seeds([-0.01, -0.011, -0.012]), -0.05) == "holds"


def rows(kind: str, stage: str, found: tuple[float, ...], **more: Any) -> list[ScoreRow]:
    return [
        ScoreRow(
            cell=f"{kind}{stage}{seed}",
            model="m",
            task="rte",
            seed=seed,
            kind=kind,
            stage=stage,
            draw=0,
            split="validation",
            role="report",
            metric="accuracy",
            value=value,
            n=277,
            majority=0.5,
            **more,
        )
        for seed, value in enumerate(found)
    ]


def small(good: float, random: float = 0.6, n: int = 10_000) -> Results:
    wobble = (0.0, 0.004, 0.002)
    scores = rows("full", "full", tuple(0.8 + w for w in wobble)) + rows("good", "retrained", tuple(good + w / 2 for w in wobble))
    scores += rows("random", "retrained", tuple(random - w for w in wobble))
    return Results(tuple(replace(one, n=n) for one in scores), ())


def found_in(seed: int) -> TicketRow:
    """A good ticket of single values."""
    sizes = {"heads": ((0.5,),), "mlps": (0.5,), "body_share": 0.5, "total_share": 0.6, "values": (1, 2)}
    return TicketRow(cell=f"t{seed}", model="m", task="rte", seed=seed, kind="good", draw=0, **sizes)


def test_two_studies_differ_where_their_conclusions_do() -> None:
    a, b = study_of(small(0.79)), study_of(small(0.55))
    changes = {one.conclusion: one for one in compare(a, b)}
    turned = changes["good > random, retrained"]
    assert (turned.a.outcome, turned.b.outcome, turned.changed, turned.turned) == ("holds", "fails", True, True)
    assert turned.difference.value == pytest.approx(0.55 - 0.79) and turned.difference.n_seeds == 3
    # A tenth of 0.302 above the majority line may be lost: 0.79 is within it, 0.55 is not.
    matches = changes["good matches full"]
    assert (matches.a.outcome, matches.b.outcome) == ("holds", "fails")
    assert matches.a.mark == pytest.approx(-0.1 * (0.802 - 0.5))
    assert all(not one.changed and one.difference.value == 0 for one in compare(a, a))
    few = findings(study_of(replace(small(0.79, n=277), tickets=tuple(found_in(seed) for seed in range(3)))))
    outcomes = {name: next(iter(of.values())).outcome for name, of in few.items()}
    assert outcomes == {"good > random, retrained": "holds", "good matches full": "undecided", "random as good as good": "fails"}


def test_findings_speak_for_found_tickets_only(study: Results) -> None:
    found = findings(study_of(study))
    assert set(found) <= set(CONCLUSIONS) and {"good > random, pruned", "m smaller than s", "seeds agree on heads"} <= set(found)
    assert set(found["good > bad, retrained"]) == {
        (task, search) for task in ("cola", "sst2") for search in ("s-prune", "m-prune")
    }
    kept = {
        kind: [
            t.body_share
            for t in study.tickets
            if t.kind == "good"
            and t.task.startswith("cola")
            and t.family == "as found"
            and t.search == kind
            and "split=dev" in t.task
        ]
        for kind in ("s-prune", "m-prune")
    }
    difference = fmean(kept["s-prune"]) - fmean(kept["m-prune"])
    assert found["m smaller than s"]["cola", "s-prune"].estimate.value == pytest.approx(difference)


# ------------------------------------------------------------------------------------------------------------------ files

HOSTILE = Table("A caption: 50 % | <b>", ("Name", 'a "quoted", head'), (("x|y_z & #1", "−0.5 ± 0.1"), ("line\nbreak", "~^\\")))


def test_tables_and_figures_become_files(study: Results, tmp_path: Path) -> None:
    build_page(study, tmp_path / "page.html", tables=tmp_path / "tables", figures=tmp_path / "figures")
    tables, figures = sorted((tmp_path / "tables").iterdir()), sorted((tmp_path / "figures").iterdir())
    assert {path.suffix for path in tables} == set(FORMS) and len(tables) % 3 == 0 and len(figures) > 30
    assert not [path.name for path in (*tables, *figures) if path.name.startswith(".")]
    text = (tmp_path / "tables" / "tickets-and-controls-good-random-and-bad-tickets-s-prune-mean-std-over-seeds.csv").read_text()
    lines = list(csv.reader(io.StringIO(text)))
    assert lines[0][:2] == ["Task", "Full"] and lines[1][1] == spread(values(study, "cola", "full", "full", **JOINT))
    for path in figures:
        drawn = path.read_text(encoding="utf-8")
        ElementTree.fromstring(drawn)
        assert "var(" not in drawn and " data-" not in drawn


def test_results_become_a_folder_that_says_how_they_came_to_be(study: Results, tmp_path: Path) -> None:
    here = replace(
        study, provenance={**study.provenance, "store": str(tmp_path / "secret" / "store-of-mine")}, warnings=("beware",)
    )
    out = tmp_path / "published"
    (out / "tables").mkdir(parents=True)
    (out / "tables" / "of-an-earlier-run.md").write_text("old")
    told = {"notes": "1. A line of ours.\n", "ran": ["tombola find a b"], "hardware": "two cores"}
    text = write_results(here, out, title="Title", **told).read_text()
    assert text.index("1. A line of ours.") < text.index("## What was found"), "what is made of it before the numbers"
    assert {one.name for one in out.iterdir()} == {"README.md", "page.html", "tables", "figures"}
    assert len(list((out / "figures").glob("*.svg"))) > 50 and len(list((out / "tables").glob("*.md"))) > 20
    assert not (out / "tables" / "of-an-earlier-run.md").exists(), "a table that nothing stands behind any more"
    own = [one.stem for one in out.glob("*/*") if "how-the-predictions-differ" in one.name or one.name.startswith("task-")]
    assert not own, "a section of one task and search stays on the page"
    for said in (
        "# Title",
        "tombola study run prasanna2020\ntombola find a b",
        "Hardware: two cores.",
        "31.2 device-hours",
        "- beware",
    ):
        assert said in text, said
    assert "store-of-mine" in text and not any("secret" in one.read_text() for one in out.rglob("*.*") if one.is_file())
    overview = markdown(overview_tables(study_of(study))[0])
    assert overview in text
    taken = tmp_path / "file"
    taken.write_text("")
    with pytest.raises(StoreError, match="many files"):
        write_results(here, taken, title="")


def test_options_that_do_not_go_together_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    from tombola.cli.look import Written
    from tombola.errors import TombolaError

    for options, said in (
        (Written(results=tmp_path, tables=tmp_path, figures=tmp_path), "--results and --tables and --figures"),
        (Written(ran=["x"], notes=tmp_path, hardware="y"), "--notes and --ran and --hardware"),
        (Written(results=tmp_path, notes=tmp_path / "none.md"), "there are no such notes"),
    ):
        with pytest.raises(TombolaError, match=said):
            options.check()
    Written(results=tmp_path, ran=["x"]).check()


def test_colours_of_files_are_those_of_the_light_page() -> None:
    style = drawing_style()
    assert "svg .good .bar {fill: #0068a8" in re.sub(r"\{\s+", "{", style) and "--" not in style


def test_a_table_keeps_its_cells_in_every_form() -> None:
    assert FORMS[".csv"](HOSTILE).splitlines()[0] == 'Name,"a ""quoted"", head"'
    assert FORMS[".md"](HOSTILE).splitlines()[2] == r"| x\|y\_z \& #1 | −0.5 ± 0.1 |"
    assert r"x|y\_z \& \#1 & $-$0.5 $\pm$ 0.1 \\" in FORMS[".tex"](HOSTILE)


# ---------------------------------------------------------------------------------------------------------------- figures


def test_bars_stand_on_zero_and_reach_their_mean() -> None:
    bars = [charts.Bar("", "good", {0: 0.4, 1: 0.6}, "a"), charts.Bar("", "bad", {0: 0.25, 1: 0.25}, "b")]
    svg = charts.bar_chart(bars, [], label="bars")
    found = [tuple(map(float, one)) for one in re.findall(r'class="bar" [^>]*?y="([\d.]+)" height="([\d.]+)"', svg)]
    assert found[0][1] / found[1][1] == pytest.approx(2, rel=0.01)
    assert sum(found[0]) == pytest.approx(sum(found[1]), abs=0.11), "one ground"
    assert charts.bar_chart([charts.Bar("", "good", {0: math.nan}, "a")], [], label="none") == ""


def test_a_picture_is_a_png_of_its_values() -> None:
    svg = charts.picture([[0, 255], [128, 7]], size=40, label="map")
    png = b64decode(re.findall(r"base64,([^\"]+)", svg)[0])
    assert png.startswith(b"\x89PNG") and png[16:24] == b"\0\0\0\2\0\0\0\2"
    start = png.index(b"IDAT") + 4
    assert zlib.decompress(png[start : start + int.from_bytes(png[start - 8 : start - 4], "big")]) == bytes(
        [0, 90, 0, 90, 255, 0, 90, 128, 90, 7]
    )


MACHADO = {  # severity 1 (Machado et al. 2009), on linear RGB
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def lab(colour: str, seen: tuple[tuple[float, ...], ...] | None) -> tuple[float, float, float]:
    """CIE L*a*b* (D65) of a colour as somebody sees it."""
    rgb = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgb]
    if seen:
        linear = [min(1.0, max(0.0, sum(k * c for k, c in zip(row, linear, strict=True)))) for row in seen]
    to_xyz = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [
        sum(k * c for k, c in zip(row, linear, strict=True)) / white
        for row, white in zip(to_xyz, (0.95047, 1, 1.08883), strict=True)
    ]
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("sight", [None, *MACHADO])
@pytest.mark.parametrize("block", [0, 1], ids=["light", "dark"])
def test_kinds_can_be_told_apart_whatever_one_sees(block: int, sight: str | None) -> None:
    """The hues of Okabe and Ito (2008), moved apart: no two of a figure closer than ΔE 12, to any of four kinds of eyes."""
    sheet = re.findall(r":root \{(.*?)\}", render(Results((), ())), flags=re.DOTALL)[block]
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", sheet))
    for names in (("full", "good", "random", "bad"), ("more", "less"), ("good", "random", "strict-bad")):
        seen = {name: lab(colours[name], MACHADO[sight] if sight else None) for name in names}
        close = {(a, b): math.dist(seen[a], seen[b]) for a in names for b in names if a < b and math.dist(seen[a], seen[b]) < 12}
        assert close == {}, sight


# -------------------------------------------------------------------------------------------------------------- packed pages


def test_a_large_page_is_packed_and_holds_the_same(study: Results, html: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "LARGE", 1000)
    packed = render(study)
    assert len(packed) < len(html) / 2
    bodies = [zlib.decompress(b64decode(text)).decode() for text in re.findall(r'data-packed="([^"]+)"', packed)]
    assert "tombola study run prasanna2020" not in packed.split("<main>")[1].split('class="packed"')[0]
    whole = re.sub(r"\s+", " ", html)
    assert bodies and all(re.sub(r"\s+", " ", body).strip() in whole for body in bodies)


@pytest.mark.slow
def test_a_full_study_is_no_more_than_two_megabytes(tmp_path: Path) -> None:
    page = build_page(whole_study(), tmp_path / "page.html")
    assert len(GLUE) == 9 and page.stat().st_size <= 2_000_000


# ---------------------------------------------------------------------------------------------------------------- the browser


@pytest.fixture(scope="module")
def opened(browser: Any, study: Results, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = build_page(study, tmp_path_factory.mktemp("study") / "page.html")
    browser.get_log("performance")
    browser.get(path.as_uri())
    wait(browser)
    yield browser


def wait(browser: Any) -> None:
    """Until the page has opened what is packed."""
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(browser, 30).until(lambda b: b.execute_script("return 'ready' in document.documentElement.dataset"))


def choose(browser: Any, name: str, wanted: set[str]) -> None:
    """Ticks these boxes of the filter and no others."""
    script = """
      const [name, wanted] = arguments;
      for (const box of document.querySelectorAll(`#filter input[name=${name}]`)) {
        if (box.checked !== wanted.includes(box.dataset.name)) box.click();
      }"""
    browser.execute_script("document.querySelector('#filter').open = true")
    browser.execute_script(script, name, sorted(wanted))


def tables_of(browser: Any) -> dict[str, list[list[str]]]:
    """Caption → rows of every table, whatever is folded."""
    script = """
      return [...document.querySelectorAll("main table")].map((table) => [table.caption.textContent,
        [...table.rows].filter((row) => !row.classList.contains("off"))
          .map((row) => [...row.cells].map((cell) => cell.textContent))]);"""
    return dict(reversed(browser.execute_script(script)))


@pytest.mark.browser
def test_browser_shows_what_python_wrote_and_asks_no_network(opened: Any, read: Page) -> None:
    messages = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requested = {m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"}
    assert {url for url in requested if not url.startswith(("data:", "blob:"))} == {opened.current_url.split("#")[0]}
    assert opened.get_log("browser") == []
    shown = tables_of(opened)
    for caption in ("What was found", "Good, random and bad tickets, s-prune", "Scores by epochs", "Set to zero: mean"):
        (found,) = [table for name, table in shown.items() if caption in name][:1]
        assert [[cell.replace("\xa0", " ") for cell in row] for row in found] == read.table(caption)


@pytest.mark.browser
def test_browser_works_out_the_numbers_of_chosen_seeds_as_python_does(opened: Any, study: Results) -> None:
    choose(opened, "seeds", {"0", "2"})
    try:
        shown, wanted = tables_of(opened), Page(render(only(study, (0, 2)))).tables
        compared = 0
        for caption in (
            "Good, random and bad tickets, s-prune",
            "Good, random and bad tickets, m-prune",
            "Scores by epochs",
            "Values removed in one step",
            "Set to zero: mean",
            "Bad tickets beside baselines",
        ):
            (found,) = [table for name, table in shown.items() if caption in name][:1]
            (asked,) = [table for name, table in wanted.items() if caption in name][:1]
            assert [[cell.replace("\xa0", " ") for cell in row] for row in found] == asked, caption
            compared += sum(map(len, asked))
        assert compared > 100
        assert opened.find_element("id", "chosen").text == "all tasks · seeds 0, 2"
        hidden = opened.execute_script(
            "return [...document.querySelectorAll('[data-seed=\"1\"]')].every((e) => e.matches('.off'))"
        )
        assert hidden
    finally:
        choose(opened, "seeds", {"0", "1", "2"})
    assert tables_of(opened)["Scores by epochs of training again: mean ± std over seeds"][1][2] == of_seeds(
        values(study, "cola", "bad", "retrained", **JOINT)
    )


@pytest.mark.browser
def test_browser_moves_bars_and_curves_to_the_chosen_seeds(opened: Any, study: Results) -> None:
    bar = "#tickets-1-1 figure:first-of-type .good .bar"
    before = float(opened.find_element("css selector", bar).get_attribute("height"))
    choose(opened, "seeds", {"1"})
    try:
        after = float(opened.find_element("css selector", bar).get_attribute("height"))
        found = values(study, "cola", "good", "pruned", **JOINT)
        assert after / before == pytest.approx(found[1] / fmean(found.values()), rel=0.01)
        whisker = opened.find_element("css selector", "#tickets-1-1 figure:first-of-type .good .whisker")
        assert "off" in whisker.get_attribute("class"), "one seed has no std"
    finally:
        choose(opened, "seeds", {"0", "1", "2"})
    assert float(opened.find_element("css selector", bar).get_attribute("height")) == before


@pytest.mark.browser
def test_browser_keeps_the_chosen_tasks_in_the_address(opened: Any) -> None:
    choose(opened, "tasks", {"sst2"})
    try:
        figures = "return [...document.querySelectorAll('#tickets-1-1 figure:not(.off) h4')].map((one) => one.textContent)"
        assert opened.execute_script(figures) == ["sst2"]
        rows = [row[0] for row in tables_of(opened)["Good, random and bad tickets, s-prune: mean ± std over seeds"]]
        assert rows == ["Task", "sst2"], "no mean over tasks that are not shown"
        assert opened.execute_script("return location.hash") == "#?tasks=sst2"
        opened.refresh()
        wait(opened)
        assert opened.execute_script(figures) == ["sst2"]
        opened.execute_script("location.hash = '#seeds'")
        opened.execute_async_script("setTimeout(arguments[0], 200)")
        assert opened.execute_script("return location.hash") == "#seeds?tasks=sst2"
    finally:
        choose(opened, "tasks", {"cola", "sst2"})


@pytest.mark.browser
def test_browser_obeys_the_keys(opened: Any) -> None:
    from selenium.webdriver import ActionChains, Keys

    opened.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    )
    opened.execute_script("scrollTo({top: 0, behavior: 'instant'}); document.activeElement.blur()")

    def press(key: str) -> None:
        ActionChains(opened).send_keys(key).perform()
        opened.execute_async_script("setTimeout(arguments[0], 900)")

    focused = "return document.activeElement.closest('section, article')?.id"
    press("j")
    assert opened.execute_script(focused) == "tickets"
    press("j")
    assert opened.execute_script(focused) == "tickets-1-1"
    press("k")
    assert opened.execute_script(focused) == "tickets"
    assert opened.execute_script("return getComputedStyle(document.activeElement).outlineStyle") != "none"
    press("?")
    assert opened.execute_script("return document.querySelector('#help').open")
    press(Keys.ESCAPE)
    assert not opened.execute_script("return document.querySelector('#help').open")
    press("/")
    assert opened.execute_script("return document.activeElement.name") == "tasks"
    assert opened.execute_script("return document.querySelector('#filter').open")


@pytest.mark.browser
def test_browser_slides_histograms_through_the_steps_of_a_seed(opened: Any, study: Results) -> None:
    (ticket,) = [
        t
        for t in study.tickets
        if t.seed == 2
        and t.steps
        and t.task.startswith("cola")
        and "selection_split=dev" in t.task
        and "procedure=joint" in t.task
    ]
    script = """
      const article = document.querySelector("#search-1-1");
      const [slider, select] = [".steps input", ".steps select"].map((css) => article.querySelector(css));
      select.value = "2"; select.dispatchEvent(new Event("input"));
      slider.value = arguments[0]; slider.dispatchEvent(new Event("input"));
      const group = article.querySelector(".histogram"), [, per] = group.dataset.y.split(" ").map(Number);
      return [[...group.querySelectorAll(".bar")].map((bar) => Math.round(bar.getAttribute("height") / -per)),
        group.closest("figure").querySelector("figcaption").textContent, group.querySelector(".cut").getAttribute("x1")];"""
    cuts = []
    for at in (0, 3):
        counts, caption, cut = opened.execute_script(script, at)
        step, top = ticket.steps[at], max(v for t in study.tickets if t.task == ticket.task for s in t.steps for v in s.heads)
        wanted = [0] * charts.BINS
        for value in step.heads:
            wanted[min(charts.BINS - 1, int(charts.BINS * value / top))] += 1
        assert counts == wanted and f"trial {step.step}, seed 2: {len(step.heads)} heads" in caption
        cuts.append(float(cut))
    assert cuts[0] != cuts[1]


@pytest.mark.browser
def test_browser_copies_tables_as_python_writes_them(opened: Any) -> None:
    lines = [list(HOSTILE.head), *(list(row) for row in HOSTILE.rows)]
    for name, ending in (("Markdown", ".md"), ("LaTeX", ".tex"), ("CSV", ".csv")):
        assert opened.execute_script("return FORMS[arguments[0]](arguments[1], 1)", name, lines) == FORMS[ending](HOSTILE), name
    assert len(opened.find_elements("css selector", ".scroll + .tools button")) % 3 == 0


@pytest.mark.browser
def test_browser_gives_a_figure_that_stands_alone(opened: Any) -> None:
    text = opened.execute_script("return standalone(document.querySelector('#tickets-1-1 svg'))")
    drawn = ElementTree.fromstring(text)
    assert "var(" not in text and "class=" not in text and drawn.tag.endswith("svg")
    fills = {one.get("fill") for one in drawn.iter() if one.tag.endswith("rect")}
    assert "rgb(0, 104, 168)" in fills, "the blue of good"


@pytest.mark.browser
def test_browser_opens_a_packed_page_as_a_plain_one(
    browser: Any, study: Results, read: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "LARGE", 1000)
    browser.get(build_page(study, tmp_path / "packed.html").as_uri() + "#task-1")
    wait(browser)
    browser.execute_async_script("setTimeout(arguments[0], 500)")
    shown = tables_of(browser)
    for caption in ("Good, random and bad tickets, s-prune", "Set to zero: mean"):
        (found,) = [table for name, table in shown.items() if caption in name][:1]
        assert [[cell.replace("\xa0", " ") for cell in row] for row in found] == read.table(caption)
    assert browser.execute_script("return document.querySelector('#task-1 details').open"), "the address opens its section"
    assert browser.find_elements("css selector", "#task-1 svg.heat .cell"), "and what is in it is drawn"
    assert browser.get_log("browser") == []


@pytest.mark.browser
@pytest.mark.parametrize("width", [1280, 400])
def test_browser_never_scrolls_sideways(opened: Any, width: int) -> None:
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    opened.execute_script("for (const one of document.querySelectorAll('details')) one.open = true")
    seen, needed = opened.execute_script("const root = document.documentElement; return [root.clientWidth, root.scrollWidth]")
    assert needed == seen
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
