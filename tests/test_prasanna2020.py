"""The experiments of Prasanna et al. 2020 beyond searches and controls, each run on a tiny model and checked by another way."""

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import tombola
from tombola.anatomy import read_anatomy
from tombola.errors import MaskError, SearchError, SettingsError
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.search.controls import inverted
from tombola.search.supers import SuperSettings, super_control, survivors
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.data import task_data
from tombola.study.experiments import EXPERIMENTS
from tombola.study.jobs import open_lab
from tombola.study.kinds import TRAIN_MODES
from tombola.study.lesions import Cut, check_cut
from tombola.study.plan import Study, plan_study, read_study
from tombola.study.prasanna2020 import EXPERIMENTS as OWN
from tombola.study.results import collect
from tombola.study.steps.shared import ticket_of
from tombola.study.steps.training import prepare_mode
from tombola.train import RunSeeds

FAST: dict[str, Any] = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 60}


def cells_of(lab: Lab, model: Path, experiment: str, *, seeds: tuple[int, ...] = (0, 1), **options: Any) -> list[Cell]:
    """The cells of one experiment on the tiny model and task."""
    said = {"name": "paper", "model": str(model), "tasks": ["sst2"], "seeds": list(seeds), "settings": FAST}
    study = Study(**said, experiments=[experiment], options={experiment: options} if options else {})
    return list({cell.key: cell for part in plan_study(lab, study).parts for cell in part.cells}.values())


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Lab:
    """One store for all: what experiments share is computed once."""
    return open_lab(tmp_path_factory.mktemp("paper") / "store", data_folder)


def by_step(cells: list[Cell], step: str) -> list[Cell]:
    return [cell for cell in cells if cell.step == step]


def scores(lab: Lab, cell: Cell, role: str = "report") -> list[dict[str, Any]]:
    return [row for row in read_rows(lab.folder(cell) / "scores.jsonl") if row["role"] == role]


# ----------------------------------------------------------------------------------------------------- X8, X11, X10, E8


def test_one_shot_removes_the_shares_of_the_released_script(lab: Lab, tiny_folder: Path) -> None:
    searches = by_step(cells_of(lab, tiny_folder, "one-shot", seeds=(0,)), "search")
    lab.run(searches)
    found = {(one.settings["search"]["criterion"], one.settings["search"]["sparsity"]): ticket_of(lab, one) for one in searches}
    assert found.keys() == {(criterion, share) for criterion in ("magnitude", "random") for share in (0.2, 0.5, 0.7)}
    for (_, share), ticket in found.items():
        kept, n = ticket.mask.counts_by_type()["values"]
        assert n - kept == round(share * n)


def test_size_matched_masks_remove_exactly_the_share_of_the_s_mask(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "size-matched", seeds=(0,))
    retrained = {one.inputs["ticket"].key: one for one in by_step(cells, "retrain")}
    assert retrained.keys() == {one.inputs["ticket"].key for one in by_step(cells, "evaluate")} and len(retrained) == 3
    ran = [*(one for one in cells if one.step != "retrain"), retrained[by_step(cells, "derive")[0].key]]
    lab.run(ran)
    (derived,) = by_step(cells, "derive")
    s_ticket, matched = ticket_of(lab, derived.inputs["ticket"]), ticket_of(lab, derived)
    kept, n = matched.mask.counts_by_type()["values"]
    assert n - kept == round(s_ticket.sparsity * n) > 0
    # By hand: every value kept is at least as large as every value removed, in the weights of the dense model.
    import safetensors.torch

    dense = next(cell for cell in derived.needed() if cell.step == "fine_tune")
    weights = safetensors.torch.load_file(lab.folder(dense) / "weights" / "model.safetensors")
    pairs = [(weights[name].abs().flatten(), part.flatten()) for name, part in matched.mask.values.items()]
    size, keep = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    assert size[keep].min() >= size[~keep].max()
    controls = {ticket_of(lab, one).kind: ticket_of(lab, one).mask for one in by_step(cells, "control")}
    assert controls.keys() == {"random", "bad"}
    for mask in controls.values():
        assert mask.counts_by_type()["values"] == (kept, n)
    shared = matched.mask.overlap_by_type(controls["bad"])["values"].shared
    assert shared == max(0, 2 * kept - n), "bad shares with good only what it must"
    stages = [(row["kind"], row["stage"]) for one in ran if one.step in ("evaluate", "retrain") for row in scores(lab, one)]
    assert set(stages) == {("bad", "pruned"), ("good", "pruned"), ("random", "pruned"), ("good", "retrained")}


def test_a_scope_that_is_none_is_refused_before_anything_is_trained(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(MaskError, match="there is no scope"):
        cells_of(lab, tiny_folder, "size-matched", scope="bodi")


def test_joined_masks_keep_the_heads_of_one_and_the_mlps_of_the_other(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "joined", seeds=(0,))
    lab.run(by_step(cells, "evaluate"))
    below = {one.key: one for cell in by_step(cells, "evaluate") for one in cell.needed()}
    (derived,) = by_step(list(below.values()), "derive")
    procedures = {role: one.settings["search"]["procedure"] for role, one in derived.inputs.items()}  # type: ignore[union-attr]
    assert procedures == {"ticket": "heads", "other_0": "mlps"}
    heads, mlps, both = (ticket_of(lab, one).mask for one in (derived.inputs["ticket"], derived.inputs["other_0"], derived))
    assert torch.equal(both.parts()["heads"], heads.parts()["heads"]) and torch.equal(both.parts()["mlps"], mlps.parts()["mlps"])
    masks = {one.inputs["ticket"].step for one in by_step(cells, "retrain")}  # type: ignore[union-attr]
    assert masks == {"derive", "search"}, "the joint ticket is tested beside it"


def test_super_survivors_are_the_same_for_every_seed_and_tested_on_the_weights_of_each(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "super-survivors", seeds=(0, 1), retrain=False)
    lab.run(cells)
    derived = by_step(cells, "derive")
    assert len(derived) == 2 * 3
    searched = {one.key: ticket_of(lab, one).mask for cell in derived for one in cell.needed() if one.step == "search"}
    a, b = searched.values()
    for cell in derived:
        ticket = ticket_of(lab, cell)
        for part, kept in ticket.mask.parts().items():
            both = a.parts()[part] & b.parts()[part]
            assert int(kept.sum()) == int(both.sum())
            if cell.settings["rule"] == "super-survivors":
                assert torch.equal(kept, both)
            else:
                assert ticket.details["shared_with_good"][part] == int((kept & both).sum())
    for one in by_step(cells, "evaluate"):
        taken, dense = one.inputs["ticket"], one.inputs["weights"]
        assert isinstance(taken, Cell) and isinstance(dense, Cell)
        assert ticket_of(lab, taken).seeds["run"] == dense.settings["seeds"]["run"] == one.settings["seeds"]["run"]
        assert ticket_of(lab, taken).found_on.fingerprint == read_json(lab.folder(dense) / "train.json")["weights_fingerprint"]


def test_super_survivors_of_one_seed_are_refused(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="several seeds"):
        cells_of(lab, tiny_folder, "super-survivors", seeds=(0,))
    with pytest.raises(SettingsError, match="whole parts"):
        cells_of(lab, tiny_folder, "super-survivors", of=["m-prune"])


def test_rules_of_super_controls_come_from_the_preset_a_rung_or_the_study(lab: Lab, tiny_folder: Path) -> None:
    def rules(**changed: Any) -> set[tuple[str, str]]:
        said = {"name": "paper", "model": str(tiny_folder), "tasks": ["sst2"], "seeds": [0, 1], "settings": FAST}
        study = Study(**said | {"experiments": ["super-survivors"]} | changed)
        cells = plan_study(lab, study).cells.values()
        options = [one.settings["options"] for one in cells if one.step == "derive" and one.settings["options"]]
        return {(one["super_bad_rule"], one["super_bad_draw"]) for one in options}

    assert rules(preset="released") == {("removed_in_all", "once")}
    assert rules(preset="corrected") == rules() == {("least_surviving", "per_seed")}
    ladder = rules(ladder="released:corrected")
    assert ladder == {
        *{("removed_in_all", "once"), ("least_surviving", "once"), ("removed_in_all", "per_seed")},
        ("least_surviving", "per_seed"),
    }
    assert rules(options={"super-survivors": {"super_bad_rule": "removed_in_all"}}) == {("removed_in_all", "per_seed")}


def test_derived_tickets_are_variants_of_their_own(lab: Lab, tiny_folder: Path) -> None:
    """A control of a derived mask must never be averaged with one of the ticket that it was derived from."""
    wanted = [
        cell
        for name in ("controls", "size-matched", "super-survivors")
        for cell in cells_of(lab, tiny_folder, name)
        if cell.step in ("derive", "control", "search")
    ]
    lab.run(wanted)
    keys = {one.key for cell in wanted for one in cell.needed()}
    rows = collect(lab.store, keys).tickets
    families = {row.task: {one.kind for one in rows if one.task == row.task} for row in rows}
    assert len(families) == 3 and all("mask=" in task for task in families)
    assert {(row.search, row.family) for row in rows} == {("s-prune", one) for one in ("as found", "size-matched", "super")}
    for task in families:
        seeds = [(one.kind, one.seed, one.draw) for one in rows if one.task == task]
        assert len(seeds) == len(set(seeds)) == 2 * 3, "good, random and bad of each seed, each once"


# ------------------------------------------------------------------------------------------------ X4, X5, X6, X7, X9


def lesions(lab: Lab, cell: Cell, role: str = "report") -> dict[str, float]:
    """Lesion → score of a finished lesion cell."""
    rows = [row for row in read_rows(lab.folder(cell) / "lesions.jsonl") if row["role"] == role]
    assert all((row["kind"], row["stage"]) == ("lesion", "pruned") and row["n"] and row["agreement"] for row in rows)
    return {row["lesion"]: row["value"] for row in rows}


def loaded(lab: Lab, cell: Cell, data_folder: Path) -> tuple[Any, Any]:
    """The dense model of a cell, and a function (model) → accuracy on the report rows by a plain loop."""
    import transformers

    dense = cell if cell.step == "fine_tune" else cell.inputs["weights"]
    folder = lab.folder(dense) / "weights"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = [json.loads(line) for line in (data_folder / "sst2" / "validation.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def accuracy() -> float:
        right = [int(model(**tokenizer(r["sentence"], return_tensors="pt")).logits.argmax()) == r["label"] for r in rows]
        return sum(right) / len(rows)

    return model, accuracy


def test_lesions_are_those_of_the_list_in_their_places(lab: Lab, tiny_folder: Path) -> None:
    cells = by_step(cells_of(lab, tiny_folder, "redrawn", seeds=(0,)), "lesion")
    assert len(cells) == 1 + 9 * 3
    elsewhere = by_step(cells_of(lab, tiny_folder, "redrawn", seeds=(0,), layers_of=["rte"]), "lesion")
    assert {one.key for one in elsewhere} < {one.key for one in cells} and len(elsewhere) == 1 + 9, "all layers at once alone"
    chosen = [one for one in cells if one.settings["lesion"]["what"] in ("q+k+v", "words")]
    lab.run(chosen)
    said = [what for one in chosen for what in lesions(lab, one)]
    assert sorted(said) == sorted(
        [*(f"redraw q+k+v{where}" for where in ("", ", layer 0", ", layer 1")), "redraw q+k+v", "redraw words"]
    ), "of a model of two layers the one pair is all of it"
    rows = collect(lab.store, {one.key for cell in chosen for one in cell.needed()})
    assert len(rows.lesions) == 2 * len(said) and not [row for row in rows.scores if row.kind == "lesion"]


def test_zeroing_equals_zeroing_by_hand(lab: Lab, tiny_folder: Path, data_folder: Path) -> None:
    cells = by_step(cells_of(lab, tiny_folder, "zeroed", seeds=(0,)), "lesion")
    lab.run(cells)
    found = {what: value for one in cells for what, value in lesions(lab, one).items()}
    assert found.keys() == {f"zero {what}" for what in ("q", "k", "v", "q+k", "q+k+v")}
    for what, kinds in (("v", ["value"]), ("q+k", ["query", "key"])):
        model, accuracy = loaded(lab, cells[0], data_folder)
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                for kind in kinds:
                    getattr(layer.attention.self, kind).weight.zero_()
        assert found[f"zero {what}"] == accuracy(), what


def test_reverting_equals_copying_the_base_by_hand(lab: Lab, tiny_folder: Path, data_folder: Path) -> None:
    import transformers

    cells = by_step(cells_of(lab, tiny_folder, "reverted", seeds=(0,)), "lesion")
    lab.run(cells)
    found = {what: value for one in cells for what, value in lesions(lab, one).items()}
    assert len(found) == 9
    base = transformers.BertModel.from_pretrained(tiny_folder)
    for what, shift in (("revert words", 0), ("revert-rotated words", 1)):
        model, accuracy = loaded(lab, cells[0], data_folder)
        table = base.embeddings.word_embeddings.weight
        with torch.no_grad():
            model.bert.embeddings.word_embeddings.weight.copy_(torch.cat([table[-shift:], table[:-shift]]) if shift else table)
        assert found[what] == accuracy(), what
    model, accuracy = loaded(lab, cells[0], data_folder)
    with torch.no_grad():
        for ours, theirs in zip(model.bert.encoder.layer, base.encoder.layer, strict=True):
            for path in ("attention.output.dense", "intermediate.dense", "output.dense"):
                ours.get_submodule(path).load_state_dict(theirs.get_submodule(path).state_dict())
    assert found["revert o+in+out"] == accuracy()


def test_without_residual_equals_a_forward_written_by_hand(lab: Lab, tiny_folder: Path, data_folder: Path) -> None:
    cells = by_step(cells_of(lab, tiny_folder, "no-residual", seeds=(0,)), "lesion")
    lab.run(cells)
    found = {what: value for one in cells for what, value in lesions(lab, one).items()}
    assert len(found) == 2 * 3
    for act, factor in (("drop-residual", 1.0), ("double-branch", 2.0)):
        model, accuracy = loaded(lab, cells[0], data_folder)
        for layer in model.bert.encoder.layer[1:]:
            output = layer.output
            output.forward = lambda x, _, output=output, factor=factor: output.LayerNorm(factor * output.dense(x))
        assert found[f"{act} mlp, layer 1"] == accuracy()


def test_removed_heads_drawn_again_are_those_of_the_ticket_and_its_mlps_stay_masked(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "redrawn-heads", seeds=(0,))
    lab.run(cells)
    cuts = by_step(cells, "lesion")
    assert {what for one in cuts for what in lesions(lab, one)} == {f"redraw-removed-heads {w}" for w in ("all", "o", "o-rows")}
    assert len(by_step(cells, "evaluate")) == 1, "the same mask, masked, stands beside it"
    assert all(one.inputs["ticket"].key == by_step(cells, "search")[0].key for one in cuts)


def test_lesions_that_are_not_of_the_list_are_refused(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="no such lesions"):
        cells_of(lab, tiny_folder, "redrawn", what=["q+v"])
    with pytest.raises(SettingsError, match="no such lesions"):
        cells_of(lab, tiny_folder, "zeroed", where=["pairs"])
    for cut in (
        Cut("burn", "q"),
        Cut("zero", "qq"),
        Cut("zero", "q", "here"),
        Cut("drop-residual", "q"),
        Cut("redraw", "o-rows"),
    ):
        with pytest.raises(SettingsError):
            check_cut(cut)


# --------------------------------------------------------------------------------------------------- E7, X1, X2, X12


def test_bad_masks_are_trained_again_for_longer(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "longer", seeds=(0,))
    assert [one.settings["train"]["epochs"] for one in cells] == [3, 4, 5, 6] and {one.step for one in cells} == {"retrain"}
    assert len({one.inputs["ticket"].key for one in cells}) == 1
    short = cells_of(lab, tiny_folder, "longer", seeds=(0,), epochs=[1, 2])
    lab.run(short)
    steps = [read_json(lab.folder(one) / "train.json")["steps"] for one in short]
    assert steps == [10, 20], "160 rows in batches of 16"
    tasks = {
        row.task for row in collect(lab.store, {one.key for cell in short for one in cell.needed()}).scores if row.kind == "bad"
    }
    assert len(tasks) == 2, "not averaged with each other"


def test_train_modes_train_what_they_say(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "train-modes", seeds=(0,))
    lab.run(cells)
    kinds = {(row["kind"], row["stage"]) for one in cells for row in scores(lab, one)}
    assert kinds == {("full", "full"), *((kind, "retrained") for kind in ("frozen", "random-init", "random-init-frozen"))}
    page = tombola.build_page(collect(lab.store, {one.key for one in cells}), lab.store.root / "page.html").read_text()
    assert "random-init-frozen" in page


@pytest.mark.parametrize(
    ("name", "moved", "fresh"), [("frozen", "head", False), ("random", "all", True), ("random_frozen", "head", True)]
)
def test_a_mode_freezes_and_draws_what_it_says(name: str, moved: str, fresh: bool, tiny_folder: Path) -> None:
    model = load_weights(tiny_folder, ("bad", "good"), head_seed=0)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    prepare_mode(TRAIN_MODES[name], model, read_anatomy(model), RunSeeds(head=0, data=0, dropout=0, mask=0))
    trained = {key for key, value in model.named_parameters() if value.requires_grad}
    head = {"classifier.weight", "classifier.bias"}
    assert trained == (head if moved == "head" else set(before))
    same = {key for key, value in model.named_parameters() if torch.equal(value, before[key])}
    assert head <= same, "the head is drawn by its own seed"
    assert ("bert.encoder.layer.0.output.dense.weight" not in same) == fresh


def test_mask_modes_invert_and_draw_bad_twice(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "mask-modes", seeds=(0,), retrain=False)
    lab.run(cells)
    good = ticket_of(lab, by_step(cells, "search")[0]).mask
    made = {(t.kind, t.details["draw"]): t.mask for t in (ticket_of(lab, one) for one in by_step(cells, "control"))}
    assert made.keys() == {("inverted", 0), ("inverted-revived", 0), ("random", 0), ("bad", 0), ("bad", 1)}
    assert made["inverted", 0] == ~good


@given(bits=st.lists(st.booleans(), min_size=12, max_size=12), seed=st.integers(0, 9))
def test_an_inverted_mask_with_revived_heads_empties_no_layer(bits: list[bool], seed: int) -> None:
    good = Mask(heads=torch.tensor(bits).reshape(3, 4), mlps=torch.tensor([True, False, True]))
    plain, revived = inverted(good), inverted(good, revive=seed)
    assert plain.parts()["heads"].flatten().tolist() == [not bit for bit in bits]
    for row, before in zip(revived.parts()["heads"], plain.parts()["heads"], strict=True):
        assert torch.equal(row, before) if before.any() else int(row.sum()) == 1
    assert revived.parts()["mlps"].tolist() == [False, True, False]


def test_masks_on_train_rows_are_chosen_on_rows_that_were_trained_on(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "mask-on-train", seeds=(0,))
    lab.run(cells)
    dense = {one.settings["data"]["selection_split"]: one for one in by_step(cells, "fine_tune")}
    assert dense.keys() == {"train", "dev"}
    prints = {read_json(lab.folder(one) / "train.json")["weights_fingerprint"] for one in dense.values()}
    assert len(prints) == 1, "the same rows are trained on, so that masks alone differ"
    settings = dense["train"].settings["data"]
    data = task_data(lab, settings["task"], settings)
    assert set(data.selection.ids) <= set(data.train.ids) and len(data.selection) == 60
    doubts = {split: read_json(lab.folder(one) / "result.json").get("of_data", []) for split, one in dense.items()}
    assert [split for split, said in doubts.items() if any("trained on" in one for one in said)] == ["train"], doubts


# ----------------------------------------------------------------------------------------------------- the built-in study


def test_the_built_in_study_has_every_experiment_of_the_paper() -> None:
    study = read_study("prasanna2020")
    rows = {row for name in study.experiments for row in EXPERIMENTS[name].rows}
    assert rows == {*(f"E{i}" for i in (1, 2, 3, 4, 5, 6, 7, 8, 11, 12)), *(f"X{i}" for i in range(1, 13))}
    for name in study.experiments:
        assert all(row in EXPERIMENTS[name].about for row in EXPERIMENTS[name].rows if name in OWN), name


def test_a_share_that_an_experiment_sets_itself_cannot_be_set() -> None:
    with pytest.raises(SettingsError, match="sparsity is set by the experiments themselves"):
        read_study("prasanna2020", None, [("sparsity", 0.3)])


# -------------------------------------------------------------------------------------------------- rules of super-controls


def masks_of(bits: list[list[bool]]) -> list[Mask]:
    return [Mask(heads=torch.tensor(one).reshape(2, -1), mlps=torch.tensor([True, False])) for one in bits]


BITS = st.lists(st.lists(st.booleans(), min_size=8, max_size=8), min_size=2, max_size=4)


@given(bits=BITS, seed=st.integers(0, 5), rule=st.sampled_from(["least_surviving", "removed_in_all"]))
def test_super_controls_have_the_size_of_the_survivors_and_the_least_surviving_parts(
    bits: list[list[bool]], seed: int, rule: Any
) -> None:
    masks, settings = masks_of(bits), SuperSettings(super_bad_rule=rule)
    good = survivors(masks).parts()["heads"].flatten().tolist()
    assert good == [all(column) for column in zip(*bits, strict=True)]
    times = [sum(column) for column in zip(*bits, strict=True)]
    bad, random = (
        super_control(masks, kind, seed=seed, draw=0, settings=settings).parts()["heads"].flatten().tolist()
        for kind in ("bad", "random")
    )
    assert sum(bad) == sum(random) == sum(good)
    # By brute force: no choice of as many parts survives less often in all.
    if rule == "least_surviving":
        least = min(sum(times[i] for i in chosen) for chosen in combinations(range(8), sum(good)))
        assert sum(t for t, kept in zip(times, bad, strict=True) if kept) == least
        neither = [not g and not b for g, b in zip(good, bad, strict=True)]
    else:
        never = [t == 0 for t in times]
        inside = sum(b and n for b, n in zip(bad, never, strict=True))
        assert inside == min(sum(good), sum(never)), "first those that every seed removed"
        shared = sum(b and g for b, g in zip(bad, good, strict=True))
        assert shared == max(0, 2 * sum(good) - 8), "survivors last"
        neither = [not g and not n for g, n in zip(good, never, strict=True)]
    if sum(neither) >= sum(good):
        assert not any(r and not n for r, n in zip(random, neither, strict=True))


def test_one_bad_draw_serves_all_seeds_as_released_and_each_has_its_own_otherwise() -> None:
    rng = np.random.default_rng(0)
    masks = [Mask(heads=torch.from_numpy(rng.random((12, 12)) < 0.6)) for _ in range(5)]

    def draws(kind: Any, **settings: Any) -> set[str]:
        made = [super_control(masks, kind, seed=s, draw=0, settings=SuperSettings(**settings)) for s in range(5)]
        assert len({str(one.counts()) for one in made}) == 1
        return {one.digest() for one in made}

    assert len(draws("bad", super_bad_draw="once", super_bad_rule="removed_in_all")) == 1
    assert len(draws("bad", super_bad_rule="removed_in_all")) == 5
    assert len(draws("random", super_bad_draw="once")) == 5
    shuffled = super_control(masks[::-1], "bad", seed=0, draw=0)
    assert shuffled == super_control(masks, "bad", seed=0, draw=0) != super_control(masks, "bad", seed=0, draw=1)


def test_masks_that_have_no_survivors_to_compare_are_refused() -> None:
    mask = Mask(heads=torch.ones(2, 2, dtype=torch.bool))
    for wrong in ([mask], [mask, Mask(mlps=torch.ones(2, dtype=torch.bool))], [Mask(values={"w": torch.ones(2).bool()})] * 2):
        with pytest.raises(SearchError):
            survivors(wrong)
    with pytest.raises(SearchError, match="different shape"):
        survivors([mask, Mask(heads=torch.ones(3, 2, dtype=torch.bool))])
    with pytest.raises(SearchError, match="no control"):
        super_control([mask, mask], "worst", seed=0, draw=0)


# ------------------------------------------------------------------------------------------------------------- the list


def test_every_row_of_the_list_is_an_experiment_or_a_table() -> None:
    import importlib

    from tombola.study import prasanna2020
    from tombola.study.prasanna2020 import ELSEWHERE, STUDY, TABLES

    own = {"m-prune", "s-prune", "s-prune-heads", "s-prune-mlps", "controls", *prasanna2020.EXPERIMENTS}
    rows = {row for name in own for row in EXPERIMENTS[name].rows}
    expected = {*(f"E{i}" for i in range(1, 15)), *(f"X{i}" for i in range(1, 16))}
    assert rows | TABLES.keys() | ELSEWHERE.keys() == expected
    assert ELSEWHERE.keys() == {"X14"}, "nothing else is left out"
    for places in TABLES.values():
        for place in places:
            module, _, name = place.partition(":")
            assert callable(getattr(importlib.import_module(module), name))
    assert set(STUDY["experiments"]) == own, "a ladder goes between presets, and is asked for by name"


def test_the_built_in_study_is_read_whole() -> None:
    study = read_study("prasanna2020")
    assert len(study.tasks) == 9 and len(study.seeds) == 5 and {"m-prune", "s-prune", "one-shot"} == set(study.methods())


def test_study_files_are_read_and_that_of_the_paper_is_the_built_in_study() -> None:
    folder = Path(__file__).parents[1] / "studies"
    studies = {file.stem: read_study(str(file)) for file in sorted(folder.glob("*.toml"))}
    paper, own = studies["prasanna2020-bert-base"], read_study("prasanna2020")
    assert (paper.model, paper.tasks, paper.seeds, paper.preset) == (own.model, own.tasks, own.seeds, own.preset)
    assert set(paper.experiments) == set(own.experiments) and paper.options == own.options
    shown = [set(studies[name].experiments) for name in ("prasanna2020-demo", "prasanna2020-hans-demo")]
    assert shown == [set(own.experiments) - {"hans"}, {"hans"}]
