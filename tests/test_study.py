"""Cells, settings and jobs, end to end on a tiny model and an easy task: what runs, what is kept, what is said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import tombola
from tombola.errors import DataError, MaskError, SearchError, SettingsError, StoreError, TombolaError
from tombola.study import jobs
from tombola.study.cells import Cell, Given, Lab, Reporter, cell_of, read_json, read_rows
from tombola.study.jobs import dense_of, find, open_lab, plan_evaluate, plan_retrain_on
from tombola.study.results import Results, collect
from tombola.study.runs import plan_controls, plan_find, plan_test
from tombola.study.settings import resolve
from tombola.study.steps import STEPS
from tombola.ticket import Ticket

FAST = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 60}
SETTINGS = resolve(FAST, (0,))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> dict[str, Any]:
    """One store with everything in it: two seeds, found, controlled, retrained."""
    store = tmp_path_factory.mktemp("world") / "store"
    tickets = find(str(tiny_folder), "sst2", seeds=(0, 1), store=store, data=data_folder, **FAST)
    lab = open_lab(store, data_folder)
    planned = plan_find(lab, str(tiny_folder), "sst2", resolve(FAST, (0, 1)), (0, 1))
    cells = []
    for one in planned:
        tested = [plan_test(one.search, one.dense, retrain=True)]
        tested += plan_controls(one.search, one.dense, ("random", "bad", "strict-bad"), 2, SETTINGS, retrain=True)
        cells += [cell for each in tested for cell in each.cells]
    lab.run(cells)
    return {"store": store, "tickets": tickets, "planned": planned, "results": collect(lab.store)}


def lab_of(world: dict[str, Any], data_folder: Path) -> Lab:
    return open_lab(world["store"], data_folder)


def test_find_gives_one_ticket_per_seed_that_holds_the_floor(world: dict[str, Any]) -> None:
    assert [ticket.seeds["run"] for ticket in world["tickets"]] == [0, 1]
    for ticket in world["tickets"]:
        full, pruned = ({m["what"]: m for m in ticket.metrics}[what] for what in ("full", "pruned"))
        assert full["value"] > full["majority"], "the tiny model must have learnt something, or this test shows nothing"
        assert pruned["value"] >= 0.9 * full["value"]
        assert 0 < ticket.sparsity < 1


def test_the_same_command_again_computes_nothing(
    world: dict[str, Any], data_folder: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("a cell ran again")

    for name, step in STEPS.items():
        monkeypatch.setitem(STEPS, name, dataclasses.replace(step, run=never))
    again = find(str(tiny_folder), "sst2", seeds=(0, 1), store=world["store"], data=data_folder, **FAST)
    assert [t.identity for t in again] == [t.identity for t in world["tickets"]]
    with pytest.raises(AssertionError, match="ran again"):
        find(str(tiny_folder), "sst2", seeds=(2,), store=world["store"], data=data_folder, **FAST)


def test_a_second_store_gives_the_same_tickets_and_scores_bit_for_bit(
    world: dict[str, Any], tmp_path: Path, data_folder: Path, tiny_folder: Path
) -> None:
    (ticket,) = find(str(tiny_folder), "sst2", seeds=(1,), store=tmp_path / "other", data=data_folder, **FAST)
    assert ticket.identity == world["tickets"][1].identity
    here, there = open_lab(tmp_path / "other"), open_lab(world["store"])
    for entry in here.store.entries():
        for file in (
            "predictions.jsonl",
            "scores.jsonl",
            "weights/model.safetensors",
            "ticket/mask.safetensors",
            "ticket/ticket.json",
        ):
            ours, theirs = entry.folder / file, there.store.load(entry.key) / file  # type: ignore[operator]
            assert ours.exists() == theirs.exists()
            if ours.exists():
                assert ours.read_bytes() == theirs.read_bytes(), file


def test_a_store_can_be_moved_and_its_tickets_still_find_their_weights(
    world: dict[str, Any], tmp_path: Path, data_folder: Path
) -> None:
    import shutil

    moved = tmp_path / "moved"
    shutil.copytree(world["store"], moved)
    lab, one = open_lab(moved, data_folder), world["planned"][0]
    (control,) = plan_controls(one.search, one.dense, ("random",), 1, SETTINGS, retrain=False)
    for cell in (one.search, control.ticket):
        ticket = jobs.ticket_of(lab, cell)
        assert Path(str(ticket.found_on.path)).is_relative_to(moved)
        assert tombola.load(ticket, weights="found_on").tombola_weights["fingerprint"] == ticket.found_on.fingerprint


def test_selection_and_report_rows_are_different_rows(world: dict[str, Any]) -> None:
    """Invariant 9."""
    for one in world["planned"]:
        folder = world["store"] / "cells" / one.dense.key
        by_role: dict[str, set[str]] = {}
        for row in read_rows(folder / "predictions.jsonl"):
            by_role.setdefault(row["role"], set()).add(row["id"])
        assert len(by_role["selection"]) == 60 and len(by_role["report"]) == 80
        assert not by_role["selection"] & by_role["report"]
        assert all(row.startswith("train:") for row in by_role["selection"])


def test_selection_on_dev_rows_is_said_by_the_page(tmp_path: Path, data_folder: Path, tiny_folder: Path) -> None:
    find(str(tiny_folder), "sst2", store=tmp_path, data=data_folder, selection_split="dev", **FAST)
    page = tombola.build_page(collect(open_lab(tmp_path).store), tmp_path / "page.html").read_text()
    assert "The mask was chosen on the rows it is reported on" in page


def test_controls_have_exactly_the_size_of_what_they_control(world: dict[str, Any]) -> None:
    """Invariant 7, on stored tickets."""
    results: Results = world["results"]
    good = {t.seed: t for t in results.tickets if t.kind == "good"}
    controls = [t for t in results.tickets if t.kind != "good"]
    assert len(controls) == 2 * 3 * 2
    for control in controls:
        heads, mlps = (sum(map(sum, control.heads)), sum(control.mlps))
        good_heads, good_mlps = (sum(map(sum, good[control.seed].heads)), sum(good[control.seed].mlps))
        if control.kind != "strict-bad":
            assert (heads, mlps) == (good_heads, good_mlps)
        else:
            assert heads == min(good_heads, 8 - good_heads) and mlps == min(good_mlps, 2 - good_mlps)
            assert control.shared_with_good == {"heads": 0, "mlps": 0}
        shared = sum(
            a and b for x, y in zip(control.heads, good[control.seed].heads, strict=True) for a, b in zip(x, y, strict=True)
        )
        assert control.shared_with_good["heads"] == shared


def test_every_score_has_split_rows_majority_and_agreement(world: dict[str, Any]) -> None:
    results: Results = world["results"]
    assert {(s.kind, s.stage) for s in results.scores} == {("full", "full")} | {
        (kind, stage) for kind in ("good", "random", "bad", "strict-bad") for stage in ("pruned", "retrained")
    }
    for row in results.scores:
        assert row.n == {"selection": 60, "report": 80}[row.role]
        assert 0.5 <= row.majority <= 0.6
        assert (row.agreement is None) == (row.kind == "full")
        if row.agreement:
            assert row.agreement.n == row.n
            assert sum(row.agreement.counts.values()) == row.n
            dense = next(s for s in results.scores if (s.kind, s.seed, s.role) == ("full", row.seed, row.role))
            assert round((row.value - dense.value) * row.n) == row.agreement.gained - row.agreement.lost


def test_pruned_scores_are_those_of_a_model_loaded_by_hand(world: dict[str, Any], data_folder: Path) -> None:
    """An independent way to the same number: the exported ticket, `tombola.load`, and a plain loop over sentences."""
    import transformers

    lab, one = lab_of(world, data_folder), world["planned"][0]
    folder = lab.folder(one.search) / "ticket"
    model = tombola.load(folder, weights="found_on")
    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.folder(one.dense) / "weights")
    rows = [json.loads(line) for line in (data_folder / "sst2" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        right = [int(model(**tokenizer(r["sentence"], return_tensors="pt")).logits.argmax()) == r["label"] for r in rows]
    stored = next(r for r in read_rows(lab.folder(one.pruned) / "scores.jsonl") if r["role"] == "report")
    assert stored["value"] == sum(right) / len(rows)


def test_cell_descriptions_round_trip_and_their_keys_are_checked(world: dict[str, Any], data_folder: Path) -> None:
    lab = lab_of(world, data_folder)
    for entry in lab.store.entries():
        assert cell_of(entry).key == entry.key
    said = world["planned"][0].search.describe()
    said["inputs"]["model"]["settings"] = dict(said["inputs"]["model"]["settings"]) | {"train": {}}
    with pytest.raises(StoreError, match="does not fit its key"):
        Cell.from_description(said)


def test_a_changed_default_or_input_changes_the_key() -> None:
    a = Cell("search", 1, {"floor": 0.9})
    assert a.key != Cell("search", 1, {"floor": 0.8}).key
    assert a.key != Cell("search", 2, {"floor": 0.9}).key
    assert a.key != Cell("search", 1, {"floor": 0.9}, {"model": Given("0" * 32, Path(), "weights")}).key
    assert a.key == Cell("search", 1, {"floor": 0.9}).key


def test_missing_lists_shared_work_once_and_inputs_first(tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    lab = open_lab(tmp_path, data_folder)
    (found,) = plan_find(lab, str(tiny_folder), "sst2", resolve(FAST, (0,)), (0,))
    asked = [
        cell
        for tested in plan_controls(found.search, found.dense, ("random",), 2, SETTINGS, retrain=True)
        for cell in tested.cells
    ]
    missing = lab.missing(asked)
    assert [cell.step for cell in missing].count("fine_tune") == 1
    assert len({cell.key for cell in missing}) == len(missing) == 1 + 1 + 2 * 3
    seen: set[str] = set()
    for cell in missing:
        assert {taken.key for taken in cell.inputs.values()} <= seen
        seen.add(cell.key)


def test_retrain_with_other_settings_trains_its_own_dense_model(world: dict[str, Any], data_folder: Path) -> None:
    lab = lab_of(world, data_folder)
    key = world["planned"][0].search.key[:12]
    same, longer = plan_retrain_on(lab, key, None, {}), plan_retrain_on(lab, key, None, {"epochs": 5})
    assert same.inputs["dense"].key == world["planned"][0].dense.key
    assert longer.settings["train"]["epochs"] == 5 and longer.inputs["dense"].key != same.inputs["dense"].key


def test_evaluate_on_base_says_that_the_head_is_drawn(world: dict[str, Any], data_folder: Path) -> None:
    lab = lab_of(world, data_folder)
    cell = plan_evaluate(lab, world["planned"][0].search.key, None, "base", {})
    (folder,) = lab.run([cell])
    (said,) = read_json(folder / "result.json")["warnings"]
    assert "drawn, not trained" in said


def test_evaluate_on_a_folder_of_weights_equals_found_on(world: dict[str, Any], data_folder: Path) -> None:
    lab, one = lab_of(world, data_folder), world["planned"][0]
    own = plan_evaluate(lab, one.search.key, None, str(lab.folder(one.dense) / "weights"), {})
    (folder,) = lab.run([own])
    assert read_rows(folder / "scores.jsonl") == read_rows(lab.folder(one.pruned) / "scores.jsonl")
    with pytest.raises(TombolaError, match="no such weights"):
        plan_evaluate(lab, one.search.key, None, "nowhere", {})


def test_an_exported_ticket_is_the_cell_it_came_from(world: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    lab, one = lab_of(world, data_folder), world["planned"][0]
    Ticket.from_pretrained(lab.folder(one.search) / "ticket").save_pretrained(tmp_path / "mine")
    assert jobs.resolve_ticket(lab, str(tmp_path / "mine")).key == one.search.key
    assert dense_of(lab, str(tmp_path / "mine")).key == one.dense.key
    assert tombola.load(tmp_path / "mine", weights="found_on").tombola_weights["weights"] == "found_on"


def test_a_ticket_from_elsewhere_is_given_and_can_be_retrained(world: dict[str, Any], data_folder: Path, tmp_path: Path) -> None:
    Ticket.from_pretrained(world["store"] / "cells" / world["planned"][0].search.key / "ticket").save_pretrained(tmp_path / "t")
    lab = open_lab(tmp_path / "new-store", data_folder)
    taken = jobs.resolve_ticket(lab, str(tmp_path / "t"))
    assert isinstance(taken, Given)
    cell = plan_retrain_on(lab, str(tmp_path / "t"), None, {})
    assert cell.inputs["dense"].key == world["planned"][0].dense.key, "the same dense model is planned from the ticket alone"


def test_variants_of_one_task_are_never_averaged_together(
    world: dict[str, Any], data_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    import shutil

    store = tmp_path / "store"
    shutil.copytree(world["store"], store)
    find(str(tiny_folder), "sst2", seeds=(0,), store=store, data=data_folder, **FAST, floor=0.6)
    results = collect(open_lab(store).store)
    assert {row.task for row in results.scores} == {"sst2 (floor=0.6)", "sst2 (floor=0.9)"}
    assert [t.seed for t in results.tickets if t.kind == "good" and t.task == "sst2 (floor=0.6)"] == [0]
    full = [row.task for row in results.scores if row.kind == "full" and row.seed == 0 and row.role == "report"]
    assert sorted(full) == ["sst2 (floor=0.6)", "sst2 (floor=0.9)"], "the dense model belongs to both"


def test_compare_gives_overlap_chance_and_kappa(world: dict[str, Any], data_folder: Path) -> None:
    lab = lab_of(world, data_folder)
    keys = [one.search.key for one in world["planned"]]
    said = jobs.compare(lab, keys)
    heads = next(p for p in said["pairs"] if p["part"] == "heads")
    a, b = (Ticket.from_pretrained(lab.folder(one.search) / "ticket").mask.parts()["heads"] for one in world["planned"])
    assert heads["shared"] == int((a & b).sum()) and heads["expected_shared"] == pytest.approx(int(a.sum()) * int(b.sum()) / 8)
    assert said["fleiss_kappa"].keys() == {"heads", "mlps"}
    with pytest.raises(TombolaError, match="nothing to compare"):
        jobs.compare(lab, keys[:1])


# ------------------------------------------------------------------------------------------------------------ bad input


def test_all_wrong_settings_are_said_at_once() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({"floor": 0.0, "epochs": -1, "lerning_rate": 1e-4, "floor_rule": "half"}, (1, 1))
    text = str(caught.value)
    assert len(caught.value.problems) == 5
    for part in ("floor", "epochs", "did you mean 'learning_rate'?", "fraction_of_full", "a seed is given twice"):
        assert part in text


@pytest.mark.parametrize("floor", [0.0, -0.1, 1.5, float("nan"), "x"])
def test_a_floor_outside_its_range_is_refused(floor: object) -> None:
    with pytest.raises(SettingsError, match="floor is not valid"):
        resolve({"floor": floor})


@pytest.mark.parametrize("seeds", [(), (-1,), (2**32,), (0, 0)])
def test_bad_seeds_are_refused(seeds: tuple[int, ...]) -> None:
    with pytest.raises(SettingsError, match="seed"):
        resolve({}, seeds)


def test_head_mask_is_refused_by_name() -> None:
    with pytest.raises(MaskError, match="head_mask"):
        find("demo", "sst2", head_mask=torch.ones(6, 12))


def test_own_seeds_set_one_of_the_four_alone() -> None:
    (seeds,) = resolve({}, (7,), {"dropout": 3}).seeds
    assert (seeds.head, seeds.data, seeds.dropout, seeds.mask) == (7, 7, 3, 7)
    with pytest.raises(SettingsError, match="no seed 'heads'"):
        resolve({}, (7,), {"heads": 3})


def test_a_full_model_at_or_below_majority_is_refused_and_the_other_rule_offered(
    tmp_path: Path, data_folder: Path, tiny_folder: Path
) -> None:
    untrained = FAST | {"epochs": 1, "learning_rate": 1e-12}
    with pytest.raises(SearchError, match="majority") as caught:
        find(str(tiny_folder), "sst2", store=tmp_path, data=data_folder, **untrained)
    assert "--floor-rule fraction_above_baseline" in str(caught.value)
    tickets = find(str(tiny_folder), "sst2", store=tmp_path, data=data_folder, **untrained, floor_rule="fraction_above_baseline")
    assert len(tickets) == 1
    warnings = collect(open_lab(tmp_path).store).warnings
    assert any("at or below the majority line" in said for said in warnings), "a degenerate result is said (invariant 10)"


def test_data_of_another_day_are_not_taken_for_the_planned_ones(world: dict[str, Any], tmp_path: Path) -> None:
    from conftest import sentiment_rows, write_task

    write_task(tmp_path, "sst2", "train", sentiment_rows(400, seed=5))
    write_task(tmp_path, "sst2", "validation", sentiment_rows(80, seed=6))
    lab = open_lab(world["store"], tmp_path)
    one = world["planned"][0]
    (control,) = plan_controls(one.search, one.dense, ("random",), 8, SETTINGS, retrain=False)[7:]
    with pytest.raises(DataError, match="not those this run was made with"):
        lab.run([control.pruned])
    assert lab.store.load(control.pruned.key) is None, "nothing half-written"


def test_unknown_kinds_draws_and_methods_are_refused(world: dict[str, Any], data_folder: Path, tiny_folder: Path) -> None:
    one = world["planned"][0]
    with pytest.raises(SettingsError, match="unknown kind of control 'worse'"):
        plan_controls(one.search, one.dense, ("worse",), 1, SETTINGS, retrain=False)
    with pytest.raises(SettingsError, match="nothing is asked for"):
        plan_controls(one.search, one.dense, ("random",), 0, SETTINGS, retrain=False)
    with pytest.raises(TombolaError, match="unknown method"):
        resolve({}, (0,), method="magic")


def test_a_floor_that_an_empty_network_holds_is_said_before_the_search_falls_through_it(
    tmp_path: Path, tiny_folder: Path, data_folder: Path
) -> None:
    class Listening(Reporter):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, message: str) -> None:
            self.said.append(message)

        def share(self, done: float) -> None:
            self.said.append("went on")

    listening = Listening()
    lab = Lab(open_lab(tmp_path / "store").store, data_folder, listening)
    low = resolve({**FAST, "floor": 0.3, "m_max_steps": 3}, (0,), method="m-prune")  # a third of any score is below its line
    (found,) = plan_find(lab, str(tiny_folder), "sst2", low, (0,))
    lab.run([found.dense])
    listening.said.clear()
    lab.run([found.search])
    doubts = [at for at, said in enumerate(listening.said) if "an empty network would hold it" in said]
    assert len(doubts) == 1 and listening.said[doubts[0] :].count("went on") >= 3, "at the first trial, once"
    warnings = read_json(lab.folder(found.search) / "result.json")["warnings"]
    assert [one for one in warnings if "an empty network would hold it" in one], "and kept with the result"
