"""Tickets of single values, end to end on a tiny model and an easy task: found, controlled, retrained, and refused."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import tombola
from conftest import Run, tiny_model
from tombola.anatomy import read_anatomy
from tombola.lesion import LESIONS
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.study import runs
from tombola.study.cells import Cell, Given, Lab, read_json, read_rows
from tombola.study.jobs import find, open_lab
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.results import KINDS, collect
from tombola.study.runs import Found, plan_controls, plan_find, plan_retrain, plan_test
from tombola.study.settings import RetrainSettings, resolve
from tombola.study.steps import training
from tombola.study.steps.shared import lesion_seed, ticket_of
from tombola.ticket import Ticket
from tombola.train import TrainLog

FAST = {"epochs": 4, "learning_rate": 4e-3, "batch_size": 16, "train_rows": 128, "selection_rows": 60}
ONE_SHOT = {"sparsity": 0.3, "scope": "chen2020"}
# The tiny BERT of the fixtures: 2 layers of width 32, MLPs of 48, a pooler.
MATRICES = 2 * (4 * 32 * 32 + 2 * 32 * 48)
CHEN = MATRICES + 32 * 32
PRASANNA = MATRICES + 2 * (4 * 32 + 48)
LABELS = ("negative", "positive")


@dataclass(frozen=True)
class World:
    """One store: an m-pruned ticket, retrained beside every kind of control; a one-shot ticket and its controls, pruned only."""

    folder: Path
    data: Path
    m: Found
    one_shot: Found
    controls: dict[str, list[runs.Tested]]  # of m, retrained, two draws of random
    one_shot_controls: dict[str, list[runs.Tested]]
    good: runs.Tested

    def lab(self) -> Lab:
        return open_lab(self.folder, self.data)

    def ticket(self, cell: Cell | Given) -> Ticket:
        return ticket_of(self.lab(), cell)

    def weights(self, cell: Cell | None = None) -> dict[str, Tensor]:
        found: dict[str, Tensor] = load_file(self.lab().folder(cell or self.m.dense) / "weights" / "model.safetensors")
        return found


def by_kind(tested: list[runs.Tested]) -> dict[str, list[runs.Tested]]:
    kinds: dict[str, list[runs.Tested]] = {}
    for one in tested:
        assert isinstance(one.ticket, Cell)
        kinds.setdefault(one.ticket.settings["kind"], []).append(one)
    return kinds


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> World:
    lab = open_lab(tmp_path_factory.mktemp("values") / "store", data_folder)
    m_settings, one_settings = resolve(FAST, method="m-prune"), resolve(FAST | ONE_SHOT, method="one-shot")
    (m,) = plan_find(lab, str(tiny_folder), "sst2", m_settings, (0,))
    (one,) = plan_find(lab, str(tiny_folder), "sst2", one_settings, (0,))
    good = plan_test(m.search, m.dense, retrain=True)
    controls = plan_controls(m.search, m.dense, tuple(CONTROL_KINDS), 1, m_settings, retrain=True)
    controls += plan_controls(m.search, m.dense, ("random",), 2, m_settings, retrain=False)[1:]
    of_one = plan_controls(one.search, one.dense, tuple(CONTROL_KINDS), 1, one_settings, retrain=False)
    assert m.dense.key == one.dense.key, "one dense model serves both methods"
    lab.run([c for tested in (good, *controls, *of_one) for c in tested.cells] + [*m.cells, *one.cells])
    return World(lab.store.root, data_folder, m, one, by_kind(controls), by_kind(of_one), good)


def flat(values: dict[str, Tensor], names: list[str]) -> Tensor:
    return torch.cat([values[name].flatten() for name in names])


def lowest_of(weights: dict[str, Tensor], names: list[str], count: int) -> set[int]:
    """Positions of the `count` smallest magnitudes, all parameters laid end to end; sorted by plain Python."""
    magnitudes = flat(weights, names).abs().tolist()
    return set(sorted(range(len(magnitudes)), key=magnitudes.__getitem__)[:count])


def positions(mask: Tensor) -> set[int]:
    return set(torch.nonzero(mask).flatten().tolist())


def accuracy(model: Any, tokenizer_folder: Path, data: Path) -> float:
    """Over the validation rows, a sentence at a time."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    rows = [json.loads(line) for line in (data / "sst2" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        right = [int(model(**tokenizer(r["sentence"], return_tensors="pt")).logits.argmax()) == r["label"] for r in rows]
    return sum(right) / len(rows)


def reported(folder: Path) -> float:
    value: float = next(row["value"] for row in read_rows(folder / "scores.jsonl") if row["role"] == "report")
    return value


# ---------------------------------------------------------------------------------------------------------------- found


def test_a_one_shot_ticket_has_its_sparsity_to_the_value_and_removes_the_smallest(world: World) -> None:
    ticket = world.ticket(world.one_shot.search)
    names = list(ticket.mask.values)
    assert ticket.scope == "chen2020" and len(names) == 2 * 6 + 1 and ticket.mask.heads is None
    removed = round(0.3 * CHEN)
    assert ticket.mask.counts_by_type() == {"values": (CHEN - removed, CHEN)}
    assert ticket.sparsity == pytest.approx(removed / CHEN, abs=1e-15)
    assert positions(~ticket.mask.flat("values")) == lowest_of(world.weights(), names, removed)


def test_an_m_pruned_ticket_went_down_by_a_twentieth_of_what_remained_until_the_floor(world: World) -> None:
    ticket = world.ticket(world.m.search)
    path, floor = ticket.details["path"], ticket.details["floor_score"]
    sizes = [PRASANNA]
    while len(sizes) < len(path):
        sizes.append(sizes[-1] - round(0.05 * sizes[-1]))
    assert [step["kept"] for step in path] == [{"values": n} for n in sizes]
    assert [step["passed"] for step in path] == [True] * (len(path) - 1) + [False]
    assert floor == pytest.approx(0.9 * path[0]["score"]) and path[-1]["score"] < floor <= min(s["score"] for s in path[:-1])
    kept, names = sizes[-2], list(ticket.mask.values)
    assert len(path) > 4 and ticket.mask.counts_by_type() == {"values": (kept, PRASANNA)}
    assert ticket.sparsity == pytest.approx(1 - kept / PRASANNA, abs=1e-12)
    assert positions(~ticket.mask.flat("values")) == lowest_of(world.weights(), names, PRASANNA - kept)


def test_the_pruned_score_is_that_of_a_model_zeroed_by_hand(world: World) -> None:
    lab = world.lab()
    for found in (world.m, world.one_shot):
        model: Any = load_weights(lab.folder(found.dense) / "weights", LABELS, head_seed=0)
        with torch.no_grad():
            for name, kept in world.ticket(found.search).mask.values.items():
                model.get_parameter(name)[~kept] = 0
        by_hand = accuracy(model, lab.folder(found.dense) / "weights", world.data)
        assert reported(lab.folder(found.pruned)) == by_hand
        loaded = tombola.load(lab.folder(found.search) / "ticket", weights="found_on")
        assert accuracy(loaded, lab.folder(found.dense) / "weights", world.data) == by_hand


def test_what_survives_of_each_head_is_stored_with_the_ticket(world: World) -> None:
    ticket = world.ticket(world.one_shot.search)
    at, survival = "bert.encoder.layer.1", ticket.details["survival"]
    for head in range(4):
        rows = slice(8 * head, 8 * head + 8)
        of = [ticket.mask.values[f"{at}.attention.self.{part}.weight"][rows] for part in ("query", "key", "value")]
        of.append(ticket.mask.values[f"{at}.attention.output.dense.weight"][:, rows])
        share = sum(int(part.sum()) for part in of) / sum(part.numel() for part in of)
        assert survival["heads"][1][head] == pytest.approx(share, abs=1e-12)
    of = [ticket.mask.values[f"{at}.{part}.dense.weight"] for part in ("intermediate", "output")]
    assert survival["mlps"][1] == pytest.approx(sum(int(p.sum()) for p in of) / (2 * 32 * 48), abs=1e-12)


# ------------------------------------------------------------------------------------------------------------- controls


def test_every_kind_of_control_is_planned_run_and_shown(world: World) -> None:
    rows = collect(world.lab().store).scores
    for kind in CONTROL_KINDS:
        assert kind in KINDS
        stages = {row.stage for row in rows if row.kind == kind}
        assert stages == {"pruned", "retrained"}, kind
    assert all(row.n == {"selection": 60, "report": 80}[row.role] and math.isfinite(row.value) for row in rows)


def test_controls_of_values_have_exactly_the_size_of_what_they_control(world: World) -> None:
    """Invariant 7, of all kinds, for a ticket that keeps little and for one that keeps most."""
    for good_cell, controls in ((world.m.search, world.controls), (world.one_shot.search, world.one_shot_controls)):
        good = world.ticket(good_cell)
        (kept, n) = good.mask.counts_by_type()["values"]
        assert controls.keys() == CONTROL_KINDS.keys()
        for kind, tested in controls.items():
            for one in tested:
                control = world.ticket(one.ticket)
                rest = n - kept  # values have no layer to revive
                sizes = {"strict-bad": min(kept, rest), "inverted": rest, "inverted-revived": rest}
                size = n if CONTROL_KINDS[kind].rule == "all" else sizes.get(kind, kept)
                assert control.kind == kind and control.parents == (good.identity,)
                assert control.mask.counts_by_type() == {"values": (size, n)}, kind
                assert {m: p.shape for m, p in control.mask.values.items()} == {m: p.shape for m, p in good.mask.values.items()}
                assert control.sparsity == pytest.approx(1 - size / n, abs=1e-12)
                shared = len(positions(control.mask.flat("values")) & positions(good.mask.flat("values")))
                assert control.details["shared_with_good"] == {"values": shared}
                assert control.details["kept_good"] == {"values": kept}


def test_which_values_each_rule_keeps(world: World) -> None:
    for good_cell, controls in ((world.m.search, world.controls), (world.one_shot.search, world.one_shot_controls)):
        good = world.ticket(good_cell)
        names, kept = list(good.mask.values), positions(good.mask.flat("values"))
        (count, n) = good.mask.counts_by_type()["values"]
        removed = set(range(n)) - kept
        of = {kind: world.ticket(tested[0].ticket).mask for kind, tested in controls.items()}
        got = {kind: positions(mask.flat("values")) for kind, mask in of.items()}
        assert got["strict-bad"] <= removed
        fill = max(0, count - len(removed))  # bad takes what good removed, and only then survivors
        assert len(got["bad"] & kept) == fill and len(got["bad"] & removed) == count - fill
        assert got["bad-lowest"] == lowest_of(world.weights(), names, count), "of the weights the mask was found on"
        assert {name: int(part.sum()) for name, part in of["random-per-layer"].values.items()} == {
            name: int(part.sum()) for name, part in good.mask.values.items()
        }
        assert got["random"] not in (kept, got["random-per-layer"]) and got["random-per-layer"] != kept
        for kind, lesioned in CONTROL_KINDS.items():
            if lesioned.rule == "good":
                assert of[kind] == good.mask and lesioned.lesion
        assert of["dense-random-init"].removes_nothing


def test_draws_of_random_share_what_chance_gives(world: World) -> None:
    one, other = (world.ticket(tested.ticket).mask for tested in world.controls["random"])
    overlap = one.overlap_by_type(other)["values"]
    assert one != other and overlap.p_at_least is not None and overlap.p_at_least > 1e-4


@pytest.mark.parametrize("kind", [kind for kind, one in CONTROL_KINDS.items() if one.lesion])
def test_the_pruned_score_of_a_lesion_is_that_of_the_lesion_done_by_hand(kind: str, world: World) -> None:
    lab, (tested, *_) = world.lab(), world.controls[kind]
    ticket = world.ticket(tested.ticket)
    seed = lesion_seed(0, 0)
    assert ticket.details["lesion"] == {"name": CONTROL_KINDS[kind].lesion, "seed": seed}
    model: Any = load_weights(lab.folder(world.m.dense) / "weights", LABELS, head_seed=0)
    LESIONS[ticket.details["lesion"]["name"]](model, read_anatomy(model), seed)
    with torch.no_grad():
        for name, kept in ticket.mask.values.items():
            model.get_parameter(name)[~kept] = 0
    stored = [row for row in read_rows(lab.folder(tested.pruned) / "predictions.jsonl") if row["role"] == "report"]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(lab.folder(world.m.dense) / "weights")
    sentences = [json.loads(line)["sentence"] for line in (world.data / "sst2" / "validation.jsonl").read_text().splitlines()]
    with torch.no_grad():
        logits = torch.cat([model(**tokenizer(text, return_tensors="pt")).logits for text in sentences])
    assert torch.allclose(torch.tensor([row["logits"] for row in stored]), logits, atol=1e-5)


def test_lesions_of_other_draws_destroy_the_weights_otherwise() -> None:
    assert len({lesion_seed(seed, draw) for seed in range(5) for draw in range(5)}) == 25


# ----------------------------------------------------------------------------------------------------------- retraining


def test_retrained_weights_are_zero_where_removed_and_learnt_where_kept(world: World, tiny_folder: Path) -> None:
    lab, mask = world.lab(), world.ticket(world.m.search).mask
    cell = plan_retrain(world.m.search, world.m.dense, keep_weights=True)
    lab.run([cell])
    weights, base = world.weights(cell), load_file(tiny_folder / "model.safetensors")
    for name, kept in mask.values.items():
        assert not weights[name][~kept].any(), f"{name}: removed values are exactly zero in the saved file"
        if name.endswith("weight"):
            assert bool(weights[name][kept].all()) and not torch.equal(weights[name], base[name.removeprefix("bert.")] * kept)
    assert sum(int((~kept).sum()) for kept in mask.values.values()) > 1000
    rest = weights.keys() - mask.values.keys()
    assert all(bool(weights[name].any()) for name in rest), "what is out of scope is not touched"
    # The same training without keeping the weights gave the same score.
    assert world.good.retrained is not None and reported(lab.folder(cell)) == reported(lab.folder(world.good.retrained))
    plain: Any = load_weights(lab.folder(cell) / "weights", LABELS, head_seed=0)
    assert accuracy(plain, lab.folder(world.m.dense) / "weights", world.data) == reported(lab.folder(cell)), "without gates"


class Start:
    """Stands in for `fine_tune`: looks at the weights that training would start from, and trains nothing."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def __call__(self, model: Any, *_: Any, **__: Any) -> TrainLog:
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        return TrainLog(0, 0, 0, ())


def start_of(
    world: World, where: Path, monkeypatch: pytest.MonkeyPatch, ticket: Cell | Given, options: RetrainSettings
) -> dict[str, Tensor]:
    """The weights that retraining under these options starts from; in a copy of the store, which is not to be believed."""
    shutil.copytree(world.folder, where)
    start = Start()
    monkeypatch.setattr(training, "fine_tune", start)
    lab = open_lab(where, world.data)
    lab.run([plan_retrain(ticket, world.m.dense, options, keep_weights=True)])
    return start.weights


@pytest.mark.parametrize("start", ["pretrained_all", "pretrained_keep_tuned_embeddings"])
def test_retraining_starts_from_the_base_and_where_asked_from_the_tuned_embeddings(
    start: Any, world: World, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = world.ticket(world.m.search).mask
    found = start_of(world, tmp_path / "s", monkeypatch, world.m.search, RetrainSettings(retrain_start=start))
    fresh: Any = load_weights(tiny_folder, LABELS, head_seed=0)
    base, tuned = {name: p.detach() for name, p in fresh.named_parameters()}, world.weights()
    tables = {f"bert.embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
    for name, value in found.items():
        origin = tuned if name in tables and start == "pretrained_keep_tuned_embeddings" else base
        assert torch.equal(value, origin[name] * mask.values[name] if name in mask.values else origin[name]), name
    assert not any(torch.equal(tuned[name], base[name]) for name in tables)


@pytest.mark.parametrize("kind", ["reinit-body", "dense-random-init", "shuffle-layers"])
def test_retraining_of_a_lesioned_control_starts_from_the_lesion_under_the_mask(
    kind: str, world: World, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = world.controls[kind][0].ticket
    found = start_of(world, tmp_path / "s", monkeypatch, cell, RetrainSettings())
    model: Any = load_weights(tiny_folder, LABELS, head_seed=0)
    LESIONS[str(CONTROL_KINDS[kind].lesion)](model, read_anatomy(model), lesion_seed(0, 0))
    for name, p in model.named_parameters():
        kept = world.ticket(cell).mask.values.get(name)
        assert torch.equal(found[name], p if kept is None else p * kept), name


def emptied(world: World, folder: Path) -> Given:
    """A ticket of heads and MLPs that keeps no head of layer 0."""
    good = world.ticket(world.m.search)
    mask = Mask(heads=torch.tensor([[False] * 4, [True, False, True, True]]), mlps=torch.tensor([True, True]))
    anatomy = read_anatomy(load_weights(world.lab().folder(world.m.dense) / "weights", LABELS, head_seed=0))
    ticket = replace(good, mask=mask, scope="heads+mlps", sparsity=anatomy.size(mask).sparsity, cell=None)
    return Given(ticket.identity, ticket.save_pretrained(folder), "ticket")


@pytest.mark.parametrize("rule", ["keep", "mask_keeps_shrink_drops"])
def test_the_bias_of_an_emptied_layer_is_dropped_only_as_released(rule: Any, world: World, tmp_path: Path) -> None:
    shutil.copytree(world.folder, tmp_path / "store")
    lab = open_lab(tmp_path / "store", world.data)
    options = RetrainSettings(empty_layer_bias=rule)
    cell = plan_retrain(emptied(world, tmp_path / "ticket"), world.m.dense, options, keep_weights=True)
    (folder,) = lab.run([cell])
    weights = load_file(folder / "weights" / "model.safetensors")
    empty, other = (weights[f"bert.encoder.layer.{i}.attention.output.dense.bias"] for i in range(2))
    assert bool(other.any()) and bool(empty.any()) == (rule == "keep")
    assert not weights["bert.encoder.layer.0.attention.output.dense.weight"].any()
    said = read_json(folder / "result.json")["warnings"] if (folder / "result.json").is_file() else []
    assert said == (
        [] if rule == "keep" else ["retrained without the bias of the attention output of 1 emptied layers, as released"]
    )


def test_a_ticket_of_values_has_no_emptied_layer(
    world: World, tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RetrainSettings(empty_layer_bias="mask_keeps_shrink_drops")
    as_released = start_of(world, tmp_path / "a", monkeypatch, world.m.search, options)
    plain = start_of(world, tmp_path / "b", monkeypatch, world.m.search, RetrainSettings())
    assert all(torch.equal(as_released[name], plain[name]) for name in plain)


# -------------------------------------------------------------------------------------------------------- the command line


def refused(run: Run, *arguments: object) -> str:
    """The message of a call that must fail: exit code 2, one message, no traceback, nothing on stdout."""
    code, out, err = run(*arguments)
    assert code == 2, err
    assert out == "" and "Traceback" not in err and err.count("tombola: ") == 1
    return err


def asked(world: World, tiny_folder: Path, *more: object) -> tuple[object, ...]:
    """A find in the store of `world`, where the dense model is there already."""
    settings = [part for name, value in FAST.items() for part in ("--set", f"{name}={value}")]
    return ("find", tiny_folder, "sst2", "--data", world.data, "--store", world.folder, *settings, *more)


def test_find_says_in_json_what_the_ticket_holds(world: World, run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    code, out, err = run(*asked(world, tiny_folder, "--method", "m-prune", "--json", "--out", tmp_path / "ticket"))
    assert code == 0 and "fine-tune" not in err
    (said,) = json.loads(out)["tickets"]
    ticket = Ticket.from_pretrained(tmp_path / "ticket")
    assert (said["kind"], said["seed"], said["draw"], said["cell"]) == ("good", 0, 0, world.m.search.key)
    assert said["identity"] == ticket.identity == world.ticket(world.m.search).identity
    assert said["kept"] == {"values": ticket.mask.counts_by_type()["values"][0]} and said["sparsity"] == ticket.sparsity
    assert said["shared_with_good"] is None and said["folder"] == str(tmp_path / "ticket")
    assert {(row["kind"], row["stage"], row["role"]) for row in said["scores"]} == {
        (kind, stage, role) for kind, stage in (("full", "full"), ("good", "pruned")) for role in ("selection", "report")
    }
    assert all({"value", "n", "majority", "split", "metric"} <= row.keys() for row in said["scores"])
    code, out, _ = run("controls", tmp_path / "ticket", "--kinds", "random,bad-lowest", "--draws", 1, "--store", world.folder,
                       "--data", world.data, "--json")  # fmt: skip
    assert [one["kind"] for one in json.loads(out)["controls"]] == ["good", "random", "bad-lowest"]
    assert all(one["kept"] == said["kept"] for one in json.loads(out)["controls"])


def test_find_of_a_size_makes_exactly_that_size(world: World, run: Run, tiny_folder: Path) -> None:
    one_shot = (
        "--method",
        "one-shot",
        "--sparsity",
        0.7,
        "--scope",
        "body:biases+pooler",
        "--granularity",
        "per_matrix",
        "--json",
    )
    code, out, _ = run(*asked(world, tiny_folder, *one_shot))
    (said,) = json.loads(out)["tickets"]
    sizes = [32] * 10 + [48] * 2 + [32 * 32, 32]  # q, k, v, o, out of two layers, in of two layers, the pooler's two
    removed = sum(round(0.7 * n) for n in sizes)
    assert code == 0 and said["kept"] == {"values": sum(sizes) - removed}
    assert said["sparsity"] == pytest.approx(removed / sum(sizes), abs=1e-12)
    code, out, _ = run(*asked(world, tiny_folder, "--method", "one-shot", "--sparsity", 0, "--json"))
    assert json.loads(out)["tickets"][0]["sparsity"] == 0.0, "nothing removed is a sparsity like others"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--method", "one-shot", "--sparsity", "1.0"), "sparsity is not valid"),
        (("--method", "one-shot", "--sparsity", "-0.1"), "sparsity is not valid"),
        (("--method", "one-shot", "--sparsity", "nan"), "sparsity is not valid"),
        (("--method", "m-prune", "--sparsity", "0.5"), "there is no setting 'sparsity' of m-prune"),
        (("--method", "m-prun"), "did you mean 'm-prune'?"),
        (("--method", "m-prune", "--criterion", "guess"), "criterion is not valid"),
        (("--method", "m-prune", "--granularity", "per_layer"), "granularity is not valid"),
        (("--preset", "relased"), "did you mean 'released'?"),
        (("--ladder", "released:corected"), "did you mean 'corrected'?"),
        (("--ladder", "released:released"), "a ladder goes from one preset to another"),
        (("--ladder", "released:corrected", "--preset", "paper"), "a ladder has presets of its own"),
        (("--ladder", "released:corrected", "--out", "folder"), "got:      --out"),
        (("--method", "m-prune", "--set", "m_step_fracton=0.1"), "did you mean 'm_step_fraction'?"),
        (("--set", "retrain_start=theta"), "pretrained_keep_tuned_embeddings"),
        (("--controls", "randm"), "did you mean 'random'?"),
        (("--controls", "random,random"), "a kind of control is given twice"),
        (("--controls", "random", "--draws", "0"), "nothing is asked for"),
        (("--set", "epochs=true"), "epochs is not valid"),
    ],
)
def test_bad_input_of_find_is_refused_before_anything_runs(
    arguments: tuple[str, ...], said: str, run: Run, tmp_path: Path, tiny_folder: Path, data_folder: Path
) -> None:
    err = refused(run, "find", tiny_folder, "sst2", "--data", data_folder, "--store", tmp_path / "store", *arguments)
    assert said in err
    assert not list((tmp_path / "store").glob("cells/*"))


@pytest.mark.parametrize(
    ("scope", "said"),
    [
        ("*.no-such-part.*", "the scope '*.no-such-part.*' matches nothing in this BertForSequenceClassification"),
        ("body+embedings", "did you mean 'embeddings'?"),
        ("*.key.bias", "the mask did not act"),
    ],
)
def test_a_scope_that_cannot_be_searched_leaves_no_ticket(
    scope: str, said: str, world: World, run: Run, tiny_folder: Path
) -> None:
    before = {entry.key for entry in world.lab().store.entries()}
    err = run(*asked(world, tiny_folder, "--method", "one-shot", "--scope", scope))
    assert err[0] == 2 and said in err[2] and "Traceback" not in err[2] and err[1] == ""
    assert {entry.key for entry in world.lab().store.entries()} == before, "nothing half-written"


def test_tickets_of_values_of_another_model_are_refused(world: World, run: Run, tmp_path: Path) -> None:
    tiny_model("bert", width=32, d_ffn=40).save_pretrained(tmp_path / "other")
    ticket, common = world.lab().folder(world.m.search) / "ticket", ("--store", world.folder, "--data", world.data)
    err = run("evaluate", ticket, "sst2", "--weights", tmp_path / "other", *common)
    assert err[0] == 2 and "the mask does not fit this bert" in err[2] and "Traceback" not in err[2]
    good = Ticket.from_pretrained(ticket)
    other = {name: torch.ones(3, 3, dtype=torch.bool) for name in good.mask.values}
    replace(good, mask=Mask(values=other), sparsity=0.0).save_pretrained(tmp_path / "shapes")
    assert "of different shape" in refused(run, "compare", ticket, tmp_path / "shapes", "--store", world.folder)
    assert "did you mean 'paper'?" in refused(run, "controls", ticket, "--preset", "papr", *common)
    assert "did you mean 'strict-bad'?" in refused(run, "controls", ticket, "--kinds", "strictbad", *common)


def test_tickets_of_different_scopes_are_compared_in_what_they_share(world: World, run: Run) -> None:
    """One has biases, the other the pooler: their overlap is that of the matrices both have."""
    a, b = (world.ticket(cell).mask for cell in (world.m.search, world.one_shot.search))
    common = [name for name in a.values if name in b.values]
    code, out, err = run("compare", world.m.search.key, world.one_shot.search.key, "--store", world.folder, "--json")
    assert code == 0, err
    (pair,) = json.loads(out)["pairs"]
    assert (pair["part"], pair["n"]) == ("values", MATRICES)
    assert pair["shared"] == sum(int((a.values[name] & b.values[name]).sum()) for name in common)


def test_find_in_python_takes_the_same_settings(world: World, tiny_folder: Path) -> None:
    (ticket,) = find(str(tiny_folder), "sst2", method="m-prune", store=world.folder, data=world.data, **FAST)
    assert ticket.identity == world.ticket(world.m.search).identity and ticket.preset == "corrected"
    assert {m["what"] for m in ticket.metrics} == {"full", "pruned"}
