"""What a store says: methods and presets beside each other, never averaged together; ladders, rung by rung."""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from tombola import build_page, cli
from tombola.study.cells import Cell, read_rows
from tombola.study.jobs import find, open_lab
from tombola.study.presets import Rung
from tombola.study.results import Results, collect, ladder_rows, scores_of
from tombola.study.runs import RungCells, plan_controls, plan_find, plan_ladder
from tombola.study.settings import resolve
from tombola.study.steps import STEPS
from tombola.study.steps.shared import ticket_of
from tombola.study.variants import short_names, variants_of

FAST = {"epochs": 4, "learning_rate": 4e-3, "batch_size": 16, "train_rows": 128, "selection_rows": 60}
# Of the ladder from released to corrected, what decides the dense model, set for every rung: one fine-tune serves them all.
SHARED = FAST | {"padding": "bucketed", "selection_split": "held_out_from_train"}


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> tuple[Path, Results]:
    """A store with tickets of heads and MLPs, of values to a floor, and of values to two sizes, all on one dense model."""
    store = tmp_path_factory.mktemp("both") / "store"
    common: dict[str, Any] = {"store": store, "data": data_folder, **FAST}
    for method, more in (
        ("s-prune", {}),
        ("m-prune", {}),
        ("one-shot", {"sparsity": 0.3}),
        ("one-shot", {"sparsity": 0.6}),
    ):
        find(str(tiny_folder), "sst2", method=method, **common, **more)
    lab = open_lab(store, data_folder)
    for method in ("s-prune", "m-prune"):
        settings = resolve(FAST, method=method)
        (found,) = plan_find(lab, str(tiny_folder), "sst2", settings, (0,))
        controls = plan_controls(found.search, found.dense, ("random", "random-per-layer"), 2, settings, retrain=False)
        lab.run([cell for one in controls for cell in one.cells])
    return store, collect(lab.store)


# ------------------------------------------------------------------------------------------------------------- variants


def test_methods_and_sizes_are_variants_of_a_task_with_short_names(both: tuple[Path, Results]) -> None:
    _, results = both
    names = {
        "sst2 (method=s-prune)",
        "sst2 (method=m-prune)",
        "sst2 (method=one-shot, sparsity=0.3)",
        "sst2 (method=one-shot, sparsity=0.6)",
    }
    assert {row.task for row in results.scores} == names == {row.task for row in results.tickets}
    for name in names:
        (good,) = [t for t in results.tickets if t.task == name and t.kind == "good"]
        assert (good.values is None) == ("s-prune" in name)
        for stage, kind in (("full", "full"), ("pruned", "good")):
            rows = [r for r in results.scores if (r.task, r.kind, r.stage, r.role) == (name, kind, stage, "report")]
            assert len(rows) == 1, f"one {kind} model under {name}: nothing else is mixed in"


def test_controls_belong_to_the_method_of_what_they_control(both: tuple[Path, Results]) -> None:
    """A per-layer draw changes a setting of controls of its own, and makes no variant by it."""
    _, results = both
    drawn = [(t.task, t.kind, t.draw) for t in results.tickets if t.kind != "good"]
    assert sorted(drawn) == [
        (f"sst2 (method={method})", kind, draw)
        for method in ("m-prune", "s-prune")
        for kind in ("random", "random-per-layer")
        for draw in (0, 1)
    ]
    for ticket in results.tickets:
        (good,) = [t for t in results.tickets if t.kind == "good" and t.task == ticket.task]
        if ticket.values:
            assert ticket.values == good.values and ticket.body_share == good.body_share
            assert ticket.body_share == pytest.approx(ticket.values[0] / ticket.values[1], abs=1e-12)
        else:
            assert sum(map(sum, ticket.heads)) == sum(map(sum, good.heads)) and sum(ticket.mlps) == sum(good.mlps)


def test_shares_of_tickets_of_values_lie_between_those_of_whole_heads(both: tuple[Path, Results]) -> None:
    _, results = both
    for ticket in results.tickets:
        shares = [*(share for row in ticket.heads for share in row), *ticket.mlps]
        assert len(shares) == 2 * 4 + 2
        if ticket.values is None:
            assert set(shares) <= {0.0, 1.0} and ticket.scope == "heads+mlps"
        else:
            assert ticket.scope == "prasanna2020" and all(0 < share < 1 for share in shares)
            assert min(shares) < ticket.body_share < max(shares)
    (s,) = [t for t in results.tickets if t.kind == "good" and "s-prune" in t.task]
    (m,) = [t for t in results.tickets if t.kind == "good" and "m-prune" in t.task]
    assert s.head_importance is not None and m.head_importance is None
    assert {step.phase for step in m.path} == {"full", "m-prune"} and m.path[-1].kept.keys() == {"values"}
    assert m.floor_score is not None and m.full_score is not None and m.selection_rows == 60
    one_shot = [t for t in results.tickets if "one-shot" in t.task]
    assert sorted(t.body_share for t in one_shot) == pytest.approx([0.4, 0.7], abs=1e-4)
    assert all(t.floor_score is None and t.path == () for t in one_shot)


def test_the_page_of_a_store_with_both_kinds_of_ticket(both: tuple[Path, Results], tmp_path: Path) -> None:
    _, results = both
    text = build_page(results, tmp_path / "page.html").read_text()
    for name in ("s-prune", "m-prune", "one-shot magnitude, 30 %", "one-shot magnitude, 60 %"):
        assert f"sst2 · {name}" in text
    shown = re.sub(r"<(style|script)>.*?</\1>", "", text, flags=re.DOTALL)
    assert "random-per-layer" in shown and "nan" not in shown.lower().split()
    assert "None" not in shown, shown[shown.index("None") - 200 :][:400]
    again = build_page(results, tmp_path / "again.html").read_text()
    assert again == text, "the same store gives the same page"


def test_each_row_is_that_of_its_cell(both: tuple[Path, Results], data_folder: Path) -> None:
    store, results = both
    lab = open_lab(store, data_folder)
    for row in results.scores:
        folder = lab.store.load(row.cell)
        assert folder is not None
        same = [r for r in read_rows(folder / "scores.jsonl") if (r["role"], r["metric"]) == (row.role, row.metric)]
        assert [r["value"] for r in same] == [row.value]


def fine_tuned(**settings: Any) -> Cell:
    model = {"name": "tiny", "fingerprint": "0" * 32}
    return Cell("fine_tune", 1, {"model": model, "data": {"task": "t"}, "train": settings, "seeds": {"run": 0}})


def searched(dense: Cell, method: str = "m-prune", preset: str = "corrected", **search: Any) -> Cell:
    return Cell("search", 1, {"method": method, "preset": preset, "search": search}, {"model": dense})


def names_of(*cells: Cell) -> list[tuple[str, ...]]:
    every = {one.key: one for cell in cells for one in cell.needed()}
    variants = variants_of(every)
    return [tuple(variants[cell.key]) for cell in cells]


def test_one_find_has_no_name_and_a_second_seed_none_either() -> None:
    dense = fine_tuned(epochs=3)
    other = dataclasses.replace(dense, settings=dict(dense.settings) | {"seeds": {"run": 1}})
    assert names_of(dense, searched(dense, floor=0.9), other, searched(other, floor=0.9)) == [("",)] * 4


def test_variants_are_named_by_what_differs_and_by_nothing_else() -> None:
    dense = fine_tuned(epochs=3)
    a, b = searched(dense, floor=0.9, scope="body"), searched(dense, floor=0.8, scope="body")
    assert names_of(a, b) == [(" (floor=0.9)",), (" (floor=0.8)",)]
    assert sorted(names_of(a, b, dense)[2]) == [" (floor=0.8)", " (floor=0.9)"], "the dense model belongs to both"
    released = searched(dense, preset="released", floor=0.9, scope="body")
    assert names_of(a, released) == [(" (preset=corrected)",), (" (preset=released)",)]


def test_settings_that_only_one_method_has_are_no_names() -> None:
    dense = fine_tuned(epochs=3)
    s, m = searched(dense, "s-prune", s_head_step=0.1, floor=0.9), searched(dense, "m-prune", scope="body", floor=0.9)
    assert names_of(s, m) == [(" (method=s-prune)",), (" (method=m-prune)",)]
    wider = searched(dense, "m-prune", scope="chen2020", floor=0.9)
    assert names_of(s, m, wider) == [
        (" (method=s-prune)",),
        (" (method=m-prune, scope=body)",),
        (" (method=m-prune, scope=chen2020)",),
    ]


def test_dense_models_trained_otherwise_keep_their_tickets_apart() -> None:
    short, long = fine_tuned(epochs=3), fine_tuned(epochs=5)
    a, b = searched(short, floor=0.9), searched(long, floor=0.9)
    assert names_of(a, b, short, long) == [(" (epochs=3)",), (" (epochs=5)",)] * 2


def test_a_kind_of_control_is_no_variant_but_an_option_of_controls_is() -> None:
    search = searched(fine_tuned(epochs=3), floor=0.9)
    plain = {
        "random_size": "exact",
        "control_draws": "independent",
        "bad_s_rule": "pruned_plus_fill",
        "bad_m_rule": "pruned_plus_fill",
    }

    def control(kind: str, **changed: str) -> Cell:
        return Cell("control", 1, {"kind": kind, "draw": 0, "control": plain | changed}, {"ticket": search})

    assert names_of(control("random"), control("random-per-layer", random_size="exact_per_layer")) == [("",), ("",)]
    lowest = control("bad-lowest", bad_m_rule="remove_highest", bad_s_rule="lowest_importance")
    assert names_of(control("bad"), lowest, search) == [("",), ("",), ("",)]
    drawn_again = control("random", control_draws="reseeded_42")
    apart = names_of(control("random"), drawn_again)
    assert apart == [(" (control_draws=independent)",), (" (control_draws=reseeded_42)",)]


def test_tasks_are_named_without_options_where_that_says_enough() -> None:
    assert short_names(["sst2", "nli-overlap:strength=0.9"]) == {"sst2": "sst2", "nli-overlap:strength=0.9": "nli-overlap"}
    both = ["nli-overlap:strength=0.9", "nli-overlap:strength=0.5"]
    assert short_names(both) == {task: task for task in both}
    assert short_names([]) == {}


# --------------------------------------------------------------------------------------------------------------- ladder


@dataclasses.dataclass
class Climbed:
    store: Path
    rungs: list[RungCells]
    rows: list[dict[str, Any]]
    computed: list[str]  # steps that ran


@pytest.fixture(scope="module")
def climbed(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> Climbed:
    """released:corrected of m-pruning with random controls, two seeds; nothing retrained."""
    store = tmp_path_factory.mktemp("ladder") / "store"
    lab = open_lab(store, data_folder)
    rungs = plan_ladder(
        lab, str(tiny_folder), "sst2", "released:corrected", SHARED, (0, 1), method="m-prune", kinds=("random",), draws=2
    )
    cells = [cell for rung in rungs for cell in rung.cells]
    computed = [cell.step for cell in lab.missing(cells)]
    lab.run(cells)
    return Climbed(store, rungs, ladder_rows(lab, rungs), computed)


def test_options_that_are_given_make_no_rungs(climbed: Climbed) -> None:
    assert [one.rung.name for one in climbed.rungs] == [
        "released", "random_size", "control_draws", "bad_m_rule", "empty_layer_bias", "corrected",
    ]  # fmt: skip
    for one in climbed.rungs:
        assert all(found.dense.settings["data"]["padding"] == "bucketed" for found in one.found)


def test_work_that_rungs_share_runs_once(climbed: Climbed) -> None:
    """Two seeds. The search differs by its preset alone, and where nothing is retrained the rung of the empty layers is the
    first one: released, random_size, control_draws, bad_m_rule and corrected have controls of their own."""
    controls = 2 * 5 * 2  # seeds × rungs × draws
    assert {step: climbed.computed.count(step) for step in set(climbed.computed)} == {
        "fine_tune": 2, "search": 2 * 2, "control": controls, "evaluate": 2 * 2 + controls,
    }  # fmt: skip
    first, last = climbed.rungs[0], climbed.rungs[-1]
    assert len({found.dense.key for one in climbed.rungs for found in one.found}) == 2
    assert all([f.search.key for f in one.found] == [f.search.key for f in first.found] for one in climbed.rungs[:-1])
    assert not {f.search.key for f in first.found} & {f.search.key for f in last.found}


def test_a_second_climb_computes_nothing(
    climbed: Climbed, tiny_folder: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a cell ran again")

    for name, step in STEPS.items():
        monkeypatch.setitem(STEPS, name, dataclasses.replace(step, run=never))
    lab = open_lab(climbed.store, data_folder)
    again = plan_ladder(
        lab, str(tiny_folder), "sst2", "released:corrected", SHARED, (0, 1), method="m-prune", kinds=("random",), draws=2
    )
    assert lab.missing([cell for rung in again for cell in rung.cells]) == []
    lab.run([cell for rung in again for cell in rung.cells])
    assert ladder_rows(lab, again) == climbed.rows


def test_each_rung_says_what_it_changes(climbed: Climbed) -> None:
    assert [(row["rung"], row["change"]) for row in climbed.rows] == [
        ("released", "all of the preset"),
        ("random_size", "random_size: bernoulli → exact"),
        ("control_draws", "control_draws: reseeded_42 → independent"),
        ("bad_m_rule", "bad_m_rule: remove_highest → pruned_plus_fill"),
        ("empty_layer_bias", "empty_layer_bias: mask_keeps_shrink_drops → keep"),
        ("corrected", "all of the preset"),
    ]
    for row in climbed.rows:
        assert (row["metric"], row["split"], row["n"], row["seeds"]) == ("accuracy", "validation", 80, 2)
        assert row["scores"].keys() == {"full, full", "good, pruned", "random, pruned"}


def test_scores_of_a_rung_are_means_over_seeds_of_means_over_draws(climbed: Climbed, data_folder: Path) -> None:
    lab = open_lab(climbed.store, data_folder)

    def by_hand(one: RungCells, kind: str) -> list[float]:
        values: dict[int, list[float]] = {}
        for row in scores_of(lab, one.cells):
            if row.kind == kind and row.role == "report":
                values.setdefault(row.seed, []).append(row.value)
        assert all(len(of) == (2 if kind == "random" else 1) for of in values.values())
        return [sum(values[seed]) / len(values[seed]) for seed in (0, 1)]

    for one, row in zip(climbed.rungs, climbed.rows, strict=True):
        sizes = [ticket_of(lab, found.search).mask.counts_by_type()["values"] for found in one.found]
        assert row["kept_share"] == pytest.approx(sum(kept / n for kept, n in sizes) / 2, abs=1e-12)
        for kind, stage in (("full", "full"), ("good", "pruned"), ("random", "pruned")):
            mine, first = by_hand(one, kind), by_hand(climbed.rungs[0], kind)
            assert row["scores"][f"{kind}, {stage}"]["value"] == pytest.approx(sum(mine) / 2, abs=1e-12)
            assert row["scores"][f"{kind}, {stage}"]["n_seeds"] == 2
            if one is not climbed.rungs[0]:
                cost = row["minus_first"][f"{kind}, {stage}"]
                assert cost["value"] == pytest.approx((mine[0] - first[0] + mine[1] - first[1]) / 2, abs=1e-12)


def test_the_first_rung_is_compared_with_nothing_and_equal_rungs_differ_by_nothing(climbed: Climbed) -> None:
    rows = {row["rung"]: row for row in climbed.rows}
    assert rows["released"]["minus_first"] == {}
    for name in ("random_size", "control_draws", "bad_m_rule", "empty_layer_bias"):
        assert rows[name]["minus_first"]["good, pruned"]["value"] == 0.0, "the same ticket, on the same weights"
        assert rows[name]["kept_share"] == rows["released"]["kept_share"]
    assert all(cost["value"] == 0.0 for cost in rows["empty_layer_bias"]["minus_first"].values())


def test_released_controls_are_of_about_the_size_and_corrected_of_exactly_the_size(climbed: Climbed, data_folder: Path) -> None:
    """And under reseeded_42 the two draws are one."""
    lab = open_lab(climbed.store, data_folder)
    kept: dict[str, list[int]] = {}
    masks: dict[str, list[Any]] = {}
    for one in climbed.rungs:
        for tested in one.tested:
            if isinstance(tested.ticket, Cell) and tested.ticket.settings["kind"] == "random":
                ticket = ticket_of(lab, tested.ticket)
                good = ticket.details["kept_good"]["values"]
                kept.setdefault(one.rung.name, []).append(ticket.mask.counts_by_type()["values"][0] - good)
                masks.setdefault(one.rung.name, []).append(ticket.mask)
    assert kept["random_size"] == kept["corrected"] == [0] * 4 and any(kept["released"])
    assert masks["released"][0] == masks["released"][1] and masks["random_size"][0] == masks["random_size"][1]
    assert masks["control_draws"][0] != masks["control_draws"][1] and masks["corrected"][0] != masks["corrected"][1]


def test_every_rung_is_a_variant_of_its_own_in_the_store(climbed: Climbed) -> None:
    from tombola.store import Store

    results = collect(Store(climbed.store))
    for row in results.scores:
        same = [r for r in results.scores if (r.task, r.kind, r.stage, r.role, r.seed, r.draw) ==
                (row.task, row.kind, row.stage, row.role, row.seed, row.draw)]  # fmt: skip
        assert same == [row], "two models under one name would be averaged"
    presets = {row.task for row in results.scores if "preset=" in row.task}
    assert len(presets) == 5 == len({row.task for row in results.scores})


@pytest.mark.slow
def test_a_ladder_with_retraining_changes_where_retraining_starts(
    tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path
) -> None:
    lab = open_lab(tmp_path_factory.mktemp("retrained") / "store", data_folder)
    values = SHARED | {"m_step_fraction": 0.2}
    rungs = plan_ladder(lab, str(tiny_folder), "sst2", "paper:corrected", values, (0,), method="m-prune", retrain=True)
    assert [one.rung for one in rungs] == [
        Rung("paper", "paper", {}),
        Rung("retrain_start", "paper", {"retrain_start": "pretrained_all"}),
        Rung("corrected", "corrected", {}),
    ]
    cells = [cell for one in rungs for cell in one.cells]
    assert [cell.step for cell in lab.missing(cells)].count("retrain") == 3
    lab.run(cells)
    rows = ladder_rows(lab, rungs)
    assert [row["rung"] for row in rows] == ["paper", "retrain_start", "corrected"]
    starts = [one.tested[0].retrained.settings["retrain"]["retrain_start"] for one in rungs]  # type: ignore[union-attr]
    assert starts == ["pretrained_keep_tuned_embeddings", "pretrained_all", "pretrained_all"]
    a, b, c = (row["scores"]["good, retrained"]["value"] for row in rows)
    assert b == c, "the last rung is the second but for its name"
    assert rows[1]["minus_first"]["good, retrained"]["value"] == pytest.approx(b - a, abs=1e-12)


def test_the_ladder_of_the_command_line_is_that_of_python(
    climbed: Climbed, tiny_folder: Path, data_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["find", tiny_folder, "sst2", "--ladder", "released:corrected", "--method", "m-prune", "--seeds", "0,1"]
    command += ["--controls", "random", "--draws", "2", "--store", climbed.store, "--data", data_folder]
    command += [part for name, value in SHARED.items() for part in ("--set", f"{name}={value}")]

    def said(*more: str) -> str:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tombola", *map(str, command), *more])
        with pytest.raises(SystemExit) as left:
            cli.main()
        assert left.value.code in (0, None)
        return capsys.readouterr().out

    assert json.loads(said("--json")) == {"rungs": json.loads(json.dumps(climbed.rows))}
    table = said()
    assert "bernoulli" in table and "corrected" in table and "random, pruned" in " ".join(table.split())


# --------------------------------------------------------------------------------------------------------------- compare


def test_two_presets_or_stores_are_compared_on_the_command_line(both: tuple[Path, Results], run: Any, tmp_path: Path) -> None:
    store, _ = both
    code, out, _ = run("study", "compare", store, store)
    assert code == 0 and "0 of" in out and "differ between" in out
    code, out, _ = run("study", "compare", "corrected", store, "--store", store, "--json", "--out", tmp_path / "page.html")
    said = json.loads(out)
    assert (
        code == 0
        and said["changed"] == 0
        and {"conclusion", "task", "search", "a", "b", "difference"} <= said["conclusions"][0].keys()
    )
    assert 'id="compare"' in (tmp_path / "page.html").read_text()
    code, _, err = run("study", "compare", "released", store, "--store", store)
    assert code == 2 and "no run of" in err and "corrected" in err
    code, _, err = run("study", "compare", "method=s-prune", "method=m-prune", "--store", store)
    assert code == 2 and "nothing to compare" in err
