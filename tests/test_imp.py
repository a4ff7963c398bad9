"""Iterative magnitude pruning against chains written anew, torch's own pruning, numbers of the paper, and runs stopped."""

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import chain as joined
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from conftest import Run, sentiment, tiny_model
from tombola import order
from tombola.errors import SearchError, SettingsError, TombolaError
from tombola.held import HeldValues
from tombola.levels import Levels
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.order import Stretch
from tombola.search.imp import (
    ImpSettings,
    Rewind,
    Round,
    Snapshot,
    cut,
    imp,
    order_seed,
    rounds,
    settings_for,
    sparsities,
)
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.chains import Chain, nested, plan_chains
from tombola.study.jobs import found_ticket, open_lab
from tombola.study.results import collect
from tombola.study.runs import plan_find
from tombola.study.settings import resolve
from tombola.study.steps import imp as steps
from tombola.study.steps.shared import ticket_of
from tombola.ticket import Ticket
from tombola.train import RunSeeds, TrainSettings, fine_tune

LINEAR = ImpSettings()

# ------------------------------------------------------------------------------------------------------------- the plan


def test_linear_levels_are_the_tens() -> None:
    assert sparsities(LINEAR) == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    assert (
        sparsities(replace(LINEAR, imp_last_level=1.0))[-1] == 1.0 and len(sparsities(replace(LINEAR, imp_last_level=1.0))) == 10
    )
    assert sparsities(replace(LINEAR, imp_last_level=0.25)) == (0.1, 0.2, 0.25)


def test_geometric_levels_are_those_that_the_text_of_the_paper_gives() -> None:
    at = sparsities(replace(LINEAR, imp_schedule="geometric"))
    assert [round(100 * x, 1) for x in at[:5]] == [10.0, 19.0, 27.1, 34.4, 41.0]
    assert [round(100 * x, 1) for x in at[10:12]] == [68.6, 71.8]
    assert at[-1] == 0.9 and at[-2] < 0.9


@pytest.mark.parametrize(
    ("text", "step"), [("step_0", 0), ("step_7", 7), ("epoch_1", 40), ("epoch_0.5", 20), ("percent_5", 6), ("percent_50", 60)]
)
def test_a_rewind_step_in_steps_epochs_and_percent(text: str, step: int) -> None:
    """Of a run of 120 steps, 40 an epoch."""
    assert Rewind.read(text).step(120, 40) == step


@pytest.mark.parametrize("text", ["", "0", "5%", "step_1.5", "step_-1", "epoch", "never", "percent_x"])
def test_what_is_no_rewind_step_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="no place to rewind to"):
        Rewind.read(text)


@pytest.mark.parametrize("text", ["step_120", "epoch_3", "percent_100", "step_9999"])
def test_a_rewind_step_past_the_end_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="past the end of a round") as caught:
        rounds(replace(LINEAR, rewind=text), rows=640, batch_size=16, epochs=3)
    assert "less than the 120 steps" in str(caught.value)


def test_rounds_of_mnli_are_those_of_the_spec() -> None:
    """12,272 steps an epoch; the released loop counts 36,813 a round, and its rate falls from 2e-5 to 1.8e-5 in the first."""
    mnli = {"rows": 392_702, "batch_size": 32, "epochs": 3}
    assert rounds(LINEAR, **mnli)[0].steps == 3 * 12_272 == 36_816
    released = replace(
        LINEAR,
        round_end="fixed_step_count",
        lr_schedule_span="whole_chain",
        round_data_order="continuing_rng",
        imp_last_level=0.9,
    )
    plan = rounds(released, **mnli)
    assert plan[0].steps == 36_813
    assert [one.rows_from for one in plan[:3]] == [0, 36_813, 73_626], "the boundaries drift"
    assert len(plan) == 10 and plan[0].schedule_steps == 10 * 36_813
    end = 2e-5 * (1 - (plan[0].schedule_from + plan[0].steps) / plan[0].schedule_steps)
    assert end == pytest.approx(1.8e-5)


def test_a_round_goes_from_the_rewind_step_to_the_end_on_the_schedule_of_a_full_run() -> None:
    plan = rounds(replace(LINEAR, rewind="percent_25", imp_last_level=0.2), rows=160, batch_size=16, epochs=2)
    assert [(r.steps, r.rows_from, r.schedule_from, r.schedule_steps) for r in plan] == [(15, 5, 5, 20)] * 3
    assert [r.data_round for r in plan] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "starts", "heads"),
    [
        ({}, ["snapshot"] * 3, ["snapshot"] * 3),
        ({"head_rewind": "carried"}, ["snapshot"] * 3, ["snapshot", "carried", "carried"]),
        ({"rewind": "none"}, ["snapshot", "carried", "carried"], ["snapshot", "carried", "carried"]),
        ({"rewind": "learning_rate_only"}, ["snapshot", "carried", "carried"], ["snapshot", "carried", "carried"]),
        ({"rewind_source": "aliased_mlm"}, ["snapshot", "carried", "carried"], ["snapshot", "carried", "carried"]),
    ],
)
def test_what_is_rewound(changes: dict[str, Any], starts: list[str], heads: list[str]) -> None:
    plan = rounds(replace(LINEAR, imp_last_level=0.2, **changes), rows=64, batch_size=16, epochs=1)
    assert [one.start for one in plan] == starts and [one.head for one in plan] == heads


def test_learning_rate_rewinding_starts_the_schedule_anew_whatever_its_span() -> None:
    given = {"rows": 64, "batch_size": 16, "epochs": 1}
    whole = replace(LINEAR, lr_schedule_span="whole_chain", imp_last_level=0.2)
    assert [one.schedule_from for one in rounds(replace(whole, rewind="none"), **given)] == [0, 4, 8]
    assert [one.schedule_from for one in rounds(replace(whole, rewind="learning_rate_only"), **given)] == [0, 0, 0]


def test_faults_of_the_mlm_script_play_no_part_elsewhere() -> None:
    released = replace(LINEAR, rewind_source="aliased_mlm", mlm_first_cut="before_training")
    assert settings_for(released, mlm=False) == LINEAR
    assert settings_for(released, mlm=True) == released


# ---------------------------------------------------------------------------------------------------------------- weights


class Flat(nn.Module):
    def __init__(self, seed: int, *sizes: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        for i, size in enumerate(sizes):  # few different values: many ties
            self.register_parameter(f"p{i}", nn.Parameter(torch.from_numpy(rng.integers(-9, 10, size)).float()))


@pytest.mark.parametrize("granularity", ["global", "per_matrix"])
def test_exact_cuts_are_nested_exact_and_take_the_first_of_equal_values(granularity: Any) -> None:
    model, sizes = Flat(0, 60, 45), (60, 45)
    options = replace(LINEAR, granularity=granularity)
    kept = {f"p{i}": torch.ones(n, dtype=torch.bool) for i, n in enumerate(sizes)}
    at = (0.0, *sparsities(options))
    for since, to in pairwise(at):
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randint(-1, 2, p.shape, generator=torch.Generator().manual_seed(int(to * 10))).float())
        smaller = cut(model, kept, options, since=since, to=to)
        for names in [["p0", "p1"]] if granularity == "global" else [["p0"], ["p1"]]:
            left = [
                (abs(float(model.get_parameter(n).detach()[i])), n, i) for n in names for i in range(len(kept[n])) if kept[n][i]
            ]
            n_all = sum(len(kept[n]) for n in names)
            gone = sorted(left)[: round(to * n_all) - (n_all - len(left))]
            expected = {n: {i for _, name, i in gone if name == n} for n in names}
            for n in names:
                assert set(torch.nonzero(kept[n] & ~smaller[n]).flatten().tolist()) == expected[n]
        kept = smaller
    assert sum(int((~part).sum()) for part in kept.values()) == (round(0.9 * 105) if granularity == "global" else 54 + 40)


def test_rounded_cuts_are_those_of_torchs_own_pruning() -> None:
    """What the released code calls: each time 1 / (10 − k) of what is left, rounded."""
    from torch.nn.utils import prune

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(13, 7, bias=False), nn.Linear(9, 5, bias=False)

    model = Two()
    theirs, options = copy.deepcopy(model), replace(LINEAR, cut_count="rounded_per_call")
    kept = {f"{n}.weight": torch.ones_like(getattr(model, n).weight, dtype=torch.bool) for n in ("a", "b")}
    drifted = False
    for k in range(9):
        left = sum(int(part.sum()) for part in kept.values())
        kept = cut(model, kept, options, since=round(0.1 * k, 12), to=round(0.1 * (k + 1), 12))
        prune.global_unstructured([(theirs.a, "weight"), (theirs.b, "weight")], prune.L1Unstructured, amount=1 / (10 - k))
        for n in ("a", "b"):
            assert torch.equal(kept[f"{n}.weight"], getattr(theirs, n).weight_mask.bool()), f"call {k}, {left} left"
        drifted |= 136 - sum(int(part.sum()) for part in kept.values()) != round(0.1 * (k + 1) * 136)
    assert drifted, "else exact counts would be the same and the option nothing"


def test_the_last_released_level_is_an_empty_network() -> None:
    model = Flat(1, 20)
    kept = cut(model, {"p0": torch.ones(20, dtype=torch.bool)}, LINEAR, since=0.9, to=1.0)
    assert not kept["p0"].any()
    with pytest.raises(SearchError, match="removes more"):
        cut(model, kept, LINEAR, since=0.5, to=0.5)


def test_a_snapshot_shares_no_memory_and_gives_back_every_bit() -> None:
    model = tiny_model("bert")
    with torch.no_grad():
        model.classifier.bias[0] = -0.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    snapshot = Snapshot(model)
    digest = snapshot.digest
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
    assert snapshot.digest == digest
    with pytest.raises(SearchError, match="did not give back"):
        snapshot.check(model, Mask())
    snapshot.restore(model)
    snapshot.check(model, Mask())
    for name, value in model.state_dict().items():
        assert value.numpy().tobytes() == before[name].numpy().tobytes(), name


@pytest.mark.parametrize("fault", ["one bit", "sign of zero", "removed value", "norm", "embedding"])
def test_the_check_sees_a_single_bit(fault: str) -> None:
    model = tiny_model("bert")
    name = "bert.encoder.layer.0.output.dense.weight"
    with torch.no_grad():
        model.classifier.bias[0] = 0.0
    snapshot, mask = Snapshot(model), Mask(values={name: torch.rand(24, 40, generator=torch.Generator().manual_seed(0)) < 0.5})
    HeldValues(model, mask.values).remove()
    snapshot.check(model, mask)
    row, column = (int(x) for x in torch.nonzero(mask.values[name] if fault == "one bit" else ~mask.values[name])[0])
    with torch.no_grad():
        if fault == "one bit":
            value = model.get_parameter(name)
            value[row, column] = torch.nextafter(value[row, column], torch.tensor(9.0))
        elif fault == "removed value":
            model.get_parameter(name)[row, column] = 1e-30
        elif fault == "sign of zero":
            model.classifier.bias[0] = -0.0
        elif fault == "norm":
            model.bert.encoder.layer[1].output.LayerNorm.weight[3] += 1e-6
        else:
            model.bert.embeddings.word_embeddings.weight[5, 5] += 1e-6
    with pytest.raises(SearchError, match="every surviving value bit for bit"):
        snapshot.check(model, mask)
    if fault == "sign of zero":
        snapshot.check(model, mask, carried=("classifier.bias",))


# ------------------------------------------------------------------------------------------------- the chain in one process


def _sgd(model: nn.Module, one: Round) -> None:
    """A step or two of plain gradient descent on drawn rows, other rows in every round."""
    rng = torch.Generator().manual_seed(order_seed(0, one.data_round))
    model.train(False)
    for _ in range(one.steps):
        ids = torch.randint(3, 60, (4, 6), generator=rng)
        labels = torch.randint(0, 2, (4,), generator=rng)
        loss = model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                if p.grad is not None:
                    p -= 0.5 * p.grad
        held = HeldValues.on(model)
        if held is not None:
            held.enforce()


def _anew(
    start: Any, names: list[str], plan: tuple[Round, ...], at: tuple[float, ...], *, rewinds: bool, head: bool
) -> list[Any]:
    """Algorithm 1 with copies of whole models and masks multiplied in after every step: the masks, level by level."""
    model, masks = copy.deepcopy(start), []
    mask = {name: np.ones(tuple(start.get_parameter(name).shape), dtype=bool) for name in names}
    for one in plan[: len(at) - 1]:
        if one.level and rewinds:
            old = copy.deepcopy(model)
            model = copy.deepcopy(start)
            if not head:
                model.classifier.load_state_dict(old.classifier.state_dict())
        for name in names:
            model.get_parameter(name).data *= torch.from_numpy(mask[name])
        rng = torch.Generator().manual_seed(order_seed(0, one.data_round))
        model.train(False)
        for _ in range(one.steps):
            ids = torch.randint(3, 60, (4, 6), generator=rng)
            labels = torch.randint(0, 2, (4,), generator=rng)
            model.zero_grad()
            model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss.backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.data -= 0.5 * p.grad
            for name in names:
                model.get_parameter(name).data *= torch.from_numpy(mask[name])
        size = [
            (abs(float(model.get_parameter(n).data.flatten()[i])), k, int(i))
            for k, n in enumerate(names)
            for i in np.flatnonzero(mask[n])
        ]
        n_all = sum(m.size for m in mask.values())
        for _, k, i in sorted(size)[: round(at[one.level + 1] * n_all) - (n_all - len(size))]:
            mask[names[k]].flat[i] = False
        masks.append({name: part.copy() for name, part in mask.items()})
    return masks


@pytest.mark.parametrize(
    ("changes", "rewinds", "head"),
    [({}, True, True), ({"head_rewind": "carried"}, True, False), ({"rewind": "none"}, False, True)],
    ids=["rewound", "head carried", "standard pruning"],
)
def test_the_chain_is_the_one_written_anew(changes: dict[str, Any], rewinds: bool, head: bool) -> None:
    start = tiny_model("bert", width=8, d_ffn=12)
    names = [n for n, p in start.named_parameters() if ".layer." in n and p.ndim == 2]
    options = replace(LINEAR, imp_last_level=0.4, **changes)
    plan = rounds(options, rows=24, batch_size=4, epochs=1)
    heads = [n for n, _ in start.named_parameters() if n.startswith("classifier")]
    model = copy.deepcopy(start)
    found = imp(model, names, _sgd, plan, options, head=heads)
    expected = _anew(start, names, plan, (0.0, *sparsities(options)), rewinds=rewinds, head=head)
    for level, mask in enumerate(expected, start=1):
        for name in names:
            assert np.array_equal(found.levels.mask(level).values[name].numpy(), mask[name]), f"level {level}, {name}"
    size = np.concatenate([start.get_parameter(n).detach().abs().numpy().ravel() for n in names])
    gone = np.concatenate([~found.mask.values[n].numpy().ravel() for n in names])
    assert set(np.argsort(size)[: gone.sum()]) != set(np.flatnonzero(gone)), (
        "training must decide something, or this shows nothing"
    )
    if rewinds and head:
        Snapshot(start).check(model, found.mask)
    assert HeldValues.on(model) is None


def test_an_aliased_snapshot_is_no_rewind_at_all() -> None:
    start = tiny_model("bert", width=8, d_ffn=12)
    names = [n for n, p in start.named_parameters() if ".layer." in n and p.ndim == 2]
    masks, drift = {}, {}
    for name, changes in {"rewound": {}, "aliased": {"rewind_source": "aliased_mlm"}, "none": {"rewind": "none"}}.items():
        options = replace(LINEAR, imp_last_level=0.3, **changes)
        model = copy.deepcopy(start)
        found = imp(model, names, _sgd, rounds(options, rows=24, batch_size=4, epochs=1), options)
        masks[name] = found.mask
        kept = found.mask.values[names[0]]
        drift[name] = float((model.get_parameter(names[0]) - start.get_parameter(names[0])).detach()[kept].abs().max())
    assert masks["aliased"] == masks["none"] != masks["rewound"]
    assert drift["rewound"] == 0.0 < drift["aliased"] == drift["none"]


def test_cutting_before_training_takes_the_first_level_from_the_start_weights() -> None:
    start = tiny_model("bert", width=8, d_ffn=12)
    names = [n for n, p in start.named_parameters() if ".layer." in n and p.ndim == 2]
    options = replace(LINEAR, imp_last_level=0.2, mlm_first_cut="before_training")
    trained: list[int] = []

    def watch(model: nn.Module, one: Round) -> None:
        trained.append(one.level)
        _sgd(model, one)

    found = imp(copy.deepcopy(start), names, watch, rounds(options, rows=24, batch_size=4, epochs=1), options)
    assert trained == [1]
    size = np.concatenate([start.get_parameter(n).detach().abs().numpy().ravel() for n in names])
    kept = np.concatenate([found.levels.mask(1).values[n].numpy().ravel() for n in names])
    assert size[kept].min() >= size[~kept].max()


# --------------------------------------------------------------------------------------------------- stretches of training

SEEDS = RunSeeds(head=0, data=2, dropout=3, mask=0)


def _without_dropout(folder: Path) -> Any:
    model = load_weights(folder, ("negative", "positive"), head_seed=0)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def _weights(model: nn.Module) -> dict[str, bytes]:
    return {name: value.numpy(force=True).tobytes() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(("epochs", "dropout"), [(1, True), (3, False)])
def test_a_whole_run_is_the_stretch_from_its_beginning(tiny_folder: Path, epochs: int, dropout: bool) -> None:
    rows, how = sentiment(tiny_folder, 50, 1), TrainSettings(learning_rate=1e-3, epochs=epochs, batch_size=16, warmup_steps=2)
    steps = how.steps_of(50)
    start = load_weights(tiny_folder, ("negative", "positive"), head_seed=0) if dropout else _without_dropout(tiny_folder)
    whole, part = copy.deepcopy(start), copy.deepcopy(start)
    logs = (
        fine_tune(whole, rows, how, SEEDS),
        fine_tune(part, rows, how, SEEDS, stretch=Stretch(steps=steps, schedule_steps=steps)),
    )
    assert logs[0] == logs[1] and logs[0].steps == 4 * epochs
    assert _weights(whole) == _weights(part)


def test_a_stretch_sees_the_rows_and_the_rates_of_its_place_in_the_run(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, how = sentiment(tiny_folder, 50, 1), TrainSettings(learning_rate=1e-3, epochs=3, batch_size=16)
    seen: list[list[int]] = []
    real = order.collate
    monkeypatch.setattr(order, "collate", lambda e, numbers, **k: (seen.append(list(numbers)), real(e, numbers, **k))[1])
    rates: list[float] = []
    real_step = torch.optim.AdamW.step

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return real_step(self, *arguments, **named)

    monkeypatch.setattr(torch.optim.AdamW, "step", step)

    def run(**more: Any) -> tuple[list[list[int]], list[float]]:
        seen.clear()
        rates.clear()
        fine_tune(_without_dropout(tiny_folder), rows, how, SEEDS, **more)
        return [*seen], [*rates]

    whole, schedule = run()
    assert len(whole) == 12 and schedule == pytest.approx([1e-3 * (1 - i / 12) for i in range(12)])
    later, slower = run(stretch=Stretch(steps=7, rows_from=5, schedule_from=5, schedule_steps=12))
    assert later == whole[5:] and slower == pytest.approx(schedule[5:])
    beyond, spread = run(stretch=Stretch(steps=2, rows_from=12, schedule_from=12, schedule_steps=24))
    assert beyond[0] not in whole and sorted(joined(*beyond)) != sorted(joined(*whole[:2])) and spread[0] == pytest.approx(5e-4)
    capped, _ = run(stretch=Stretch(steps=3, schedule_steps=3))
    assert capped == whole[:3]


def test_steps_in_place_of_epochs(tiny_folder: Path) -> None:
    how = TrainSettings(learning_rate=1e-3, batch_size=16, steps=5)
    assert fine_tune(_without_dropout(tiny_folder), sentiment(tiny_folder, 50, 1), how, SEEDS).steps == 5
    assert "steps" not in TrainSettings().plain() and how.plain()["steps"] == 5, "runs without keep their names"


def test_a_stretch_that_is_stopped_goes_on_and_ends_with_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    rows, how = sentiment(tiny_folder, 50, 1), TrainSettings(learning_rate=1e-3, batch_size=16)
    part = Stretch(steps=9, rows_from=2, schedule_from=2, schedule_steps=20)
    start = load_weights(tiny_folder, ("negative", "positive"), head_seed=0)
    whole = copy.deepcopy(start)
    fine_tune(whole, rows, how, SEEDS, stretch=part)

    def stop(share: float) -> None:
        if share >= 6 / 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(copy.deepcopy(start), rows, how, SEEDS, stretch=part, checkpoints=tmp_path, every_seconds=0.0, progress=stop)
    again = copy.deepcopy(start)
    fine_tune(again, rows, how, SEEDS, stretch=part, checkpoints=tmp_path, every_seconds=0.0)
    assert _weights(again) == _weights(whole)
    with pytest.raises(TombolaError, match="of another run") as caught:
        fine_tune(copy.deepcopy(start), rows, how, SEEDS, stretch=replace(part, rows_from=3), checkpoints=tmp_path)
    assert "stretch.rows_from: 2 → 3" in str(caught.value.got)


# ------------------------------------------------------------------------------------------------------------------- cells

FAST: dict[str, Any] = {
    "epochs": 1,
    "learning_rate": 3e-3,
    "batch_size": 16,
    "train_rows": 80,
    "selection_rows": 40,
    "report_rows": 40,
}


def chain_of(lab: Lab, model: Path, preset: str = "corrected", seeds: tuple[int, ...] = (0,), **changes: Any) -> Chain:
    settings = resolve({**FAST, "padding": "bucketed", "imp_last_level": 0.3, **changes}, seeds, method="imp", preset=preset)
    return plan_chains(lab, str(model), "sst2", settings, seeds)[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Lab:
    return open_lab(tmp_path_factory.mktemp("imp") / "store", data_folder)


@pytest.fixture(scope="module")
def chain(lab: Lab, tiny_folder: Path) -> Chain:
    planned = chain_of(lab, tiny_folder)
    lab.run(planned.cells)
    return planned


def test_rounds_are_cells_that_share_the_dense_model(lab: Lab, chain: Chain) -> None:
    assert [cell.step for cell in chain.cells] == ["fine_tune", "round", "round", "round", "round"]
    assert chain.levels[0].inputs["model"] == chain.dense, "the first round trains just what the dense model is"
    assert [one.inputs["ticket"] for one in (*chain.levels[1:], chain.last)] == list(chain.levels)
    assert not any((lab.folder(cell) / "weights").exists() for cell in (*chain.levels, chain.last)), "one dense checkpoint"
    for k, cell in enumerate(chain.levels, start=1):
        kept, n = ticket_of(lab, cell).mask.counts_by_type()["values"]
        assert n - kept == round(k / 10 * n)
    Levels.of([ticket_of(lab, cell).mask for cell in chain.levels])  # nested, or it raises


def test_the_masks_of_the_cells_are_those_of_the_chain_in_one_process(lab: Lab, chain: Chain, tiny_folder: Path) -> None:
    """The first by sorting the dense model's weights; the others by `imp` with `fine_tune`, from the files of the base."""
    from safetensors.torch import load_file

    from tombola.study.data import encoded_rows, task_data

    first = ticket_of(lab, chain.levels[0]).mask.values
    dense = load_file(lab.folder(chain.dense) / "weights" / "model.safetensors")
    size, kept = (
        np.concatenate([of(n) for n in first])
        for of in (lambda n: dense[n].abs().numpy().ravel(), lambda n: first[n].numpy().ravel())
    )
    assert size[kept].min() >= size[~kept].max()
    assert len(first) == 13 and "bert.pooler.dense.weight" in first, "six matrices a layer and the pooler"

    data = task_data(lab, "sst2", chain.dense.settings["data"])
    rows = encoded_rows(lab, chain.dense, "train", data.train)
    seeds = RunSeeds(head=0, data=0, dropout=0, mask=0)

    def trained(model: nn.Module, one: Round) -> None:
        stretch = Stretch(
            steps=one.steps, schedule_steps=one.schedule_steps, rows_from=one.rows_from, schedule_from=one.schedule_from
        )
        how = TrainSettings(learning_rate=3e-3, batch_size=16, epochs=1)
        fine_tune(model, rows, how, replace(seeds, data=order_seed(0, one.data_round)), stretch=stretch)  # type: ignore[arg-type]

    model = load_weights(tiny_folder, ("negative", "positive"), head_seed=0)
    found = imp(model, list(first), trained, chain.plan, replace(LINEAR, imp_last_level=0.3))
    for level, cell in enumerate(chain.levels, start=1):
        assert found.levels.mask(level) == ticket_of(lab, cell).mask


def test_scores_of_a_level_are_those_of_the_round_that_trains_it(lab: Lab, chain: Chain) -> None:
    assert [chain.scored(k).key for k in range(4)] == [chain.dense.key, chain.levels[1].key, chain.levels[2].key, chain.last.key]
    results = collect(lab.store, {cell.key for cell in chain.cells})
    by_level = {row.task: row for row in results.scores if row.kind == "good" and row.role == "report"}
    assert sorted(by_level) == ["sst2 (sparsity=0.1)", "sst2 (sparsity=0.2)", "sst2 (sparsity=0.3)"]
    for k, name in enumerate(sorted(by_level), start=1):
        row = by_level[name]
        assert (row.cell, row.stage, row.n) == (chain.scored(k).key, "retrained", 40)
        written = next(r for r in read_rows(lab.folder(chain.scored(k)) / "scores.jsonl") if r["role"] == "report")
        assert row.value == written["value"] and row.agreement is not None
    assert {t.task: round(1 - t.body_share, 6) for t in results.tickets} == {
        f"sst2 (sparsity={k / 10})": k / 10 for k in (1, 2, 3)
    }


def test_the_found_ticket_carries_all_levels(lab: Lab, chain: Chain, tiny_folder: Path, tmp_path: Path) -> None:
    settings = resolve({**FAST, "imp_last_level": 0.3}, (0,), method="imp")
    (found,) = plan_find(lab, str(tiny_folder), "sst2", settings, (0,))
    ticket = Ticket.from_pretrained(found_ticket(lab, found).save_pretrained(tmp_path))
    assert ticket.levels is not None and ticket.levels.n == 3 and ticket.level == 3
    for k, cell in enumerate(chain.levels, start=1):
        assert ticket.at_level(k).mask == ticket_of(lab, cell).mask
    assert {m["what"] for m in ticket.metrics} == {"full", "retrained"}
    import tombola

    model = tombola.load(ticket.at_level(2), weights="base")
    assert model.tombola_gates is not None


def test_the_rewind_step_is_a_cell_and_every_round_starts_from_it(lab: Lab, tiny_folder: Path) -> None:
    planned = chain_of(lab, tiny_folder, rewind="step_2", imp_last_level=0.2)
    lab.run(planned.cells)
    assert planned.snapshot is not None and "model" not in planned.levels[0].inputs
    said = read_json(lab.folder(planned.snapshot) / "train.json")
    assert said["steps"] == 2
    trained = [read_json(lab.folder(cell) / "train.json") for cell in (*planned.levels, planned.last)]
    assert [one["steps"] for one in trained] == [3, 3, 3]
    assert {one["snapshot"] for one in trained} == {said["snapshot"]}
    assert ticket_of(lab, planned.levels[0]).mask != ticket_of(lab, chain_of(lab, tiny_folder).levels[0]).mask


def test_a_snapshot_that_changed_stops_the_chain(lab: Lab, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = chain_of(lab, tiny_folder, rewind="step_1", imp_last_level=0.2)
    lab.run([planned.levels[0]])
    real = steps.load_weights

    def moved(*arguments: Any, **named: Any) -> Any:
        model = real(*arguments, **named)
        with torch.no_grad():
            model.get_parameter("classifier.bias").add_(1e-7)
        return model

    monkeypatch.setattr(steps, "load_weights", moved)
    with pytest.raises(SearchError, match="not those that the chain began with"):
        lab.run([planned.levels[1]])


def test_a_rewind_that_does_nothing_is_caught_at_run_time(lab: Lab, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of the released script, made on purpose: the weights that a round starts from are trained ones."""
    planned = chain_of(lab, tiny_folder, imp_last_level=0.2, weight_decay=0.01)
    lab.run([planned.levels[0]])
    monkeypatch.setattr(steps, "hold", lambda model, *_: model.get_parameter("bert.pooler.dense.bias").data.add_(1e-3))
    with pytest.raises(SearchError, match="rewind did not give back"):
        lab.run([planned.levels[1]])


@pytest.mark.parametrize(
    "changes",
    [{"head_rewind": "carried"}, {"rewind": "none"}, {"rewind": "learning_rate_only", "lr_schedule_span": "whole_chain"}],
    ids=["head carried", "standard pruning", "learning rate"],
)
def test_what_is_carried_is_what_the_round_before_ended_with(lab: Lab, tiny_folder: Path, changes: dict[str, Any]) -> None:
    planned = chain_of(lab, tiny_folder, imp_last_level=0.2, **changes)
    lab.run(planned.cells)
    assert all((lab.folder(one) / "ticket").is_dir() for one in planned.levels)
    kept = [
        sorted(p.name for p in lab.folder(one).iterdir() if p.name in ("weights", "head.safetensors")) for one in planned.levels
    ]
    mine = [] if "model" in planned.levels[0].inputs else ["weights"]
    assert kept == ([[], ["head.safetensors"]] if "head_rewind" in changes else [mine, ["weights"]])
    from safetensors.torch import load_file

    if "rewind" in changes:  # a round that trains on: the weights it cuts are zero where the round before cut
        weights = load_file(lab.folder(planned.levels[1]) / "weights" / "model.safetensors")
        for name, part in ticket_of(lab, planned.levels[0]).mask.values.items():
            assert not weights[name][~part].any() and weights[name][part].all()


def test_released_goes_to_an_empty_network_and_says_so(lab: Lab, tiny_folder: Path) -> None:
    planned = chain_of(lab, tiny_folder, preset="released", imp_last_level=1.0, imp_step=0.5)
    lab.run(planned.cells)
    assert ticket_of(lab, planned.levels[-1]).mask.is_empty
    assert "empty" in read_json(lab.folder(planned.levels[-1]) / "result.json")["warnings"][0]
    one = planned.plan[1]
    assert (one.steps, one.rows_from, one.schedule_steps, one.head) == (5, 5, 15, "carried")
    assert planned.at(1.0) == planned.levels[0], "a released file of a level holds the mask of the level before"
    with pytest.raises(SettingsError, match="no ticket of this sparsity"):
        planned.at(0.5)


def test_a_round_that_is_stopped_goes_on_and_ends_with_the_same_bits(
    lab: Lab, chain: Chain, tiny_folder: Path, data_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = open_lab(tmp_path / "other", data_folder)
    other.checkpoint_seconds = 0.0
    planned = chain_of(other, tiny_folder)
    real, stops = steps.fine_tune, [3, 2]

    def stopped(*arguments: Any, progress: Callable[[float], None], **named: Any) -> Any:
        at = stops.pop() if stops else 99

        def told(share: float) -> None:
            progress(share)
            if round(share * 5) >= at:
                raise KeyboardInterrupt

        return real(*arguments, progress=told, **named)

    monkeypatch.setattr(steps, "fine_tune", stopped)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            other.run(planned.cells)
    other.run(planned.cells)
    assert not stops
    for ours, theirs in zip(planned.cells, chain.cells, strict=True):
        assert ours.key == theirs.key
        for file in ("ticket/mask.safetensors", "ticket/ticket.json", "scores.jsonl", "predictions.jsonl", "train.json"):
            a, b = other.folder(ours) / file, lab.folder(theirs) / file
            assert a.exists() == b.exists() and (not a.exists() or a.read_bytes() == b.read_bytes()), file


def test_changed_settings_are_another_chain_and_a_longer_chain_goes_on(lab: Lab, chain: Chain, tiny_folder: Path) -> None:
    longer = chain_of(lab, tiny_folder, imp_last_level=0.5)
    assert [cell.key for cell in longer.levels[:3]] == [cell.key for cell in chain.levels], "what is there is gone on from"
    for changes in (
        {"learning_rate": 1e-3},
        {"scope": "body:weights"},
        {"granularity": "per_matrix"},
        {"head_rewind": "carried"},
    ):
        other = chain_of(lab, tiny_folder, **changes)
        assert not {cell.key for cell in other.levels[1:]} & {cell.key for cell in chain.levels}, changes


def test_wrong_options_are_all_said_before_anything_runs(lab: Lab, tiny_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({"imp_last_level": 1.2, "imp_schedule": "cubic", "imp_step": 0, "head_rewind": "maybe"}, method="imp")
    assert len(caught.value.problems) == 4
    for rewind in ("step_99", "epoch_1"):
        with pytest.raises(SettingsError, match="past the end of a round"):
            chain_of(lab, tiny_folder, rewind=rewind)
    with pytest.raises(TombolaError, match="there is no scope"):
        chain_of(lab, tiny_folder, scope="bodi")


def test_find_by_imp_on_the_command_line(run: Run, tiny_folder: Path, data_folder: Path, tmp_path: Path) -> None:
    told = [x for name, value in FAST.items() for x in ("--set", f"{name}={value}")]
    arguments = ["find", tiny_folder, "sst2", "--method", "imp", "--data", data_folder, "--store", tmp_path / "s", *told]
    arguments += ["--set", "imp_last_level=0.2"]
    code, out, _ = run(*arguments, "--dry-run", "--json")
    assert code == 0 and not (tmp_path / "s" / "cells").exists()
    code, out, err = run(*arguments, "--out", tmp_path / "t", "--json")
    assert code == 0, err
    said = json.loads(out)["tickets"][0]
    assert said["folder"] == str(tmp_path / "t")
    ticket = Ticket.from_pretrained(tmp_path / "t")
    assert ticket.levels is not None and ticket.levels.sparsities == pytest.approx((0.1, 0.2), abs=1e-4)
    code, _, err = run(*arguments)
    assert code == 0 and "level by level on the report rows: dense" in err and "1 × 2" not in err
    code, _, err = run(*arguments, "--rewind", "step_500")
    assert code == 2 and "past the end of a round" in err
    assert math.isclose(ticket.sparsity, 0.2, abs_tol=1e-4)


def test_nested_is_refused_before_the_chain_is_finished(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(TombolaError, match="is not in the store"):
        nested(lab, chain_of(lab, tiny_folder, learning_rate=9e-4))


def test_cells_describe_themselves_and_are_read_back(chain: Chain) -> None:
    for cell in chain.cells:
        assert Cell.from_description(json.loads(json.dumps(cell.describe()))).key == cell.key


# ------------------------------------------------------------------------------------------- options of tasks and of reading


def test_squad_and_mlm_are_as_long_as_the_preset_says_unless_they_are_told() -> None:
    from tombola.study.runs import implied

    said = {preset: implied("squad", "imp", {}, preset)["epochs"] for preset in ("paper", "released", "corrected")}
    assert said == {"paper": 2, "released": 4, "corrected": 2}
    mlm = {preset: implied("mlm-wikitext2", "imp", {}, preset) for preset in ("paper", "released", "corrected")}
    assert {name: (one["batch_size"], one["steps"]) for name, one in mlm.items()} == {
        "paper": (16, 10_000), "released": (8, 20_000), "corrected": (16, 10_000)
    }  # fmt: skip
    assert "epochs" not in implied("squad", "imp", {"epochs": 5}, "released")
    assert "steps" not in implied("mlm-wikitext2", "imp", {"steps": 7}, "released")
    assert not {"epochs", "steps"} & implied("sst2", "imp", {}, "released").keys()
    assert implied("squad", "imp", {"squad_epochs": 3}, "released")["epochs"] == 3
    assert not {"epochs", "steps"} & implied("squad", "s-prune", {}, "released").keys()


def test_a_ladder_has_a_rung_of_a_tasks_length_on_that_task_alone(lab: Lab, tiny_folder: Path) -> None:
    from tombola.study.runs import plan_ladder

    values = {"epochs": 1, "train_rows": 48, "selection_rows": 20, "imp_last_level": 0.2, "batch_size": 16}
    rungs = {
        one.rung.name: one for one in plan_ladder(lab, str(tiny_folder), "sst2", "released:corrected", values, (0,), method="imp")
    }
    assert {"pruned_weight_decay", "std_kind"} <= rungs.keys() and not {"squad_epochs", "mlm_finetune_steps"} & rungs.keys()
    first = {cell.key for cell in rungs["released"].cells}
    for name in ("pruned_weight_decay", "std_kind"):
        assert {cell.key for cell in rungs[name].cells} == first, "what no result depends on costs nothing"


def test_decay_of_values_that_are_removed_changes_nothing_that_is_trained() -> None:
    """As torch's own pruning decays them in its copy: what is kept, and what the model computes, is what ours gives."""
    from torch.nn.utils import prune as torchs

    torch.manual_seed(0)
    ours = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    theirs = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    theirs.load_state_dict(ours.state_dict())
    mask = torch.rand(5, 6) > 0.5
    torchs.custom_from_mask(theirs[0], "weight", mask)
    held = HeldValues(ours, {"0.weight": mask})
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1) for model in (ours, theirs)]
    before = theirs[0].weight_orig.detach().clone()
    for step in range(5):
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
        held.enforce()
    assert not torch.equal(theirs[0].weight_orig[~mask], before[~mask]), "removed values decayed in its copy"
    theirs(torch.zeros(1, 6, dtype=torch.float64))  # it puts its mask on when it is called
    torch.testing.assert_close(ours[0].weight, theirs[0].weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours[2].weight, theirs[2].weight, rtol=1e-12, atol=1e-12)
