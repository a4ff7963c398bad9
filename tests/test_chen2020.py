"""The experiments of Chen et al. 2020, each planned and run on a tiny model, its cells checked by another way."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import sentiment_rows, tiny_model, write_task
from tombola import stats
from tombola.anatomy import read_anatomy
from tombola.criteria import CRITERIA, Given
from tombola.errors import SettingsError
from tombola.gates import load
from tombola.lesion import add_noise
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.search.controls import ControlSettings, control
from tombola.study import chen2020
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.chen2020 import Transferred
from tombola.study.experiments import EXPERIMENTS
from tombola.study.jobs import open_lab
from tombola.study.plan import Study, plan_study, read_study
from tombola.study.reference.chen2020 import FIGURE_2, TABLE_2, TABLE_3_RECALLED, TARGETS
from tombola.study.results import collect
from tombola.study.steps.shared import ticket_of
from tombola.study.verdicts import (
    barriers,
    cost_to,
    existence,
    matrices_of,
    overlaps,
    run_until_lost,
    score_of,
    transfer_matrices,
)
from tombola.tasks.encode import batches

FAST: dict[str, Any] = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 64, "selection_rows": 30}
FAST |= {"report_rows": 30, "imp_last_level": 0.2}
TASKS = ("sst2", "cola")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Two tasks: sentences decided by a word, and the same sentences with the other answer."""
    folder = tmp_path_factory.mktemp("chen")
    for task, turn in (("sst2", 0), ("cola", 1)):
        for split, n, seed in (("train", 200, 1 + turn), ("validation", 60, 3 + turn)):
            write_task(folder / "data", task, split, [row | {"label": row["label"] ^ turn} for row in sentiment_rows(n, seed)])
    return open_lab(folder / "store", folder / "data")


def parts(
    lab: Lab, model: Path, experiment: str, tasks: tuple[str, ...] = TASKS, seeds: tuple[int, ...] = (0,), **options: Any
) -> dict[str, list[Cell]]:
    said = {"name": "paper", "model": str(model), "tasks": list(tasks), "seeds": list(seeds), "settings": FAST}
    study = Study(**said, experiments=[experiment], options={experiment: options} if options else {})
    return {part.task: list({cell.key: cell for cell in part.cells}.values()) for part in plan_study(lab, study).parts}


def of_step(cells: list[Cell], step: str) -> list[Cell]:
    return [cell for cell in cells if cell.step == step]


# ------------------------------------------------------------------------------------------------------------- the data


def test_the_study_asks_for_every_row_and_is_read_whole() -> None:
    study = read_study("chen2020")
    rows = {row for name in study.experiments for row in EXPERIMENTS[name].rows}
    assert rows == {str(i) for i in range(1, 13)} | {"X1", "X2", "X3", "X4", "X5", "X6", "X9"}
    assert len(study.tasks) == 11 and study.per_task["mlm-wikitext2"]["steps"] == 10_000
    assert all(EXPERIMENTS[name].about.startswith(("row", "X")) for name in study.experiments)


def test_the_papers_numbers_hang_together() -> None:
    assert TABLE_2.keys() == set(TARGETS) and {len(row) for row, _ in FIGURE_2.values()} == {11} == {
        len(r) for r in TABLE_3_RECALLED.values()
    }
    for i, task in enumerate(TARGETS):
        assert abs(TABLE_3_RECALLED["full"][i] - TABLE_2[task].full[0]) < 0.06, "row full agrees after rounding"
    known = [task for task in TARGETS if task in FIGURE_2]  # sources whose own column is known
    for source, (row, dark) in FIGURE_2.items():
        counted = sum(row[TARGETS.index(t)] >= FIGURE_2[t][0][TARGETS.index(t)] for t in known if t != source)
        assert counted <= dark <= counted + len(TARGETS) - len(known), source
    beats_dense = {t for t in TARGETS if FIGURE_2["mlm"][0][TARGETS.index(t)] >= -TABLE_2[t].full[1]}
    assert beats_dense == {"mnli", "qqp", "wnli", "qnli"}, "against the dense model the universal ticket clears four"


# --------------------------------------------------------------------------------------------------------- experiments


def test_a_chain_and_its_verdict(lab: Lab, tiny_folder: Path) -> None:
    from tombola.study.chains import plan_chains
    from tombola.study.settings import resolve

    cells = parts(lab, tiny_folder, "imp", tasks=("sst2",), seeds=(0, 1, 2))["sst2"]
    chains = plan_chains(lab, str(tiny_folder), "sst2", resolve(FAST, (0, 1, 2), method="imp"), (0, 1, 2))
    assert {c.key for chain in chains for c in chain.cells} == {c.key for c in cells}
    lab.run(cells)
    found = existence(lab, chains, margin=0.05)
    assert [round(level.sparsity, 3) for level in found.levels] == [0.1, 0.2]
    for k, level in enumerate(found.levels, start=1):
        by_hand = [
            next(r["value"] for r in read_rows(lab.folder(c.scored(k)) / "scores.jsonl") if r["role"] == "report") for c in chains
        ]
        assert list(level.scores) == by_hand
        assert level.total_sparsity < level.sparsity, "embeddings are not pruned: of the whole model less is gone"
        assert level.steps == 4 * (k + 1), "the dense run, and one a level"
        assert level.flops == pytest.approx(np.mean([cost_to(lab, c, k)[1] for c in chains])) and level.flops > 0
        assert level.match.verdicts == stats.matching(by_hand, found.dense, margin=0.05).verdicts
    assert found.levels[1].flops > found.levels[0].flops
    assert found.highest.keys() == found.chosen.keys() == level.match.verdicts.keys()


def test_existence_trains_one_mask_with_every_seed(lab: Lab, tiny_folder: Path) -> None:
    cells = of_step(parts(lab, tiny_folder, "existence", tasks=("sst2",), seeds=(0, 1), sparsities=(0.2,))["sst2"], "retrain")
    assert len(cells) == 2 and len({cell.inputs["ticket"].key for cell in cells}) == 1
    assert {cell.settings["seeds"]["run"] for cell in cells} == {0, 1}
    own = of_step(
        parts(lab, tiny_folder, "existence", tasks=("sst2",), seeds=(0, 1), sparsities=(0.2,), masks="own")["sst2"], "retrain"
    )
    assert len({cell.inputs["ticket"].key for cell in own}) == 2


def test_a_level_that_the_chain_does_not_have_is_refused_when_planned(lab: Lab, tiny_folder: Path) -> None:
    with pytest.raises(SettingsError, match="no ticket of this sparsity"):
        parts(lab, tiny_folder, "imp-controls", tasks=("sst2",), sparsities=(0.7,))


def test_controls_have_the_size_of_the_ticket_and_are_trained_like_it(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "imp-controls", tasks=("sst2",), sparsities=(0.2,))["sst2"]
    kinds = {c.inputs["ticket"].settings["kind"]: c for c in cells if c.inputs["ticket"].step == "control"}  # type: ignore[union-attr]
    assert kinds.keys() == set(chen2020.ControlsOptions().kinds)
    ran = [kinds[name] for name in ("random-same-share", "shuffle-layers")]
    lab.run(ran)
    good = ticket_of(lab, ran[0].inputs["ticket"].inputs["ticket"])  # type: ignore[union-attr]
    drawn = ticket_of(lab, ran[0].inputs["ticket"]).mask
    assert drawn.counts_by_type() == good.mask.counts_by_type()
    shares = [kept / n for kept, n in drawn.counts().values()]
    assert max(shares) - min(shares) < 1 / min(n for _, n in drawn.counts().values()) + 1e-9
    assert {row["kind"] for one in ran for row in read_rows(lab.folder(one) / "scores.jsonl")} == set(kinds) & {
        "random-same-share",
        "shuffle-layers",
    }


def test_random_masks_of_four_flavours_have_one_size_and_their_own_shares() -> None:
    rng = torch.Generator().manual_seed(0)
    good = Mask(
        values={
            f"m{i}": torch.rand(shape, generator=rng) < keep
            for i, (shape, keep) in enumerate((((40, 30), 0.9), ((30, 20), 0.2), ((7, 3), 0.5)))
        }
    )
    kept, n = good.counts_by_type()["values"]
    by_size = {}
    for size in ("exact", "exact_per_layer", "same_share", "of_reinit"):
        made = [control(good, "random", seed=s, draw=0, settings=ControlSettings(random_size=size)) for s in (0, 0, 1)]  # type: ignore[arg-type]
        assert made[0] == made[1] != made[2] and made[0].counts_by_type()["values"] == (kept, n)
        by_size[size] = made[0].counts()
    assert by_size["exact_per_layer"] == good.counts()
    for kept_here, n_here in by_size["same_share"].values():
        assert abs(kept_here - kept * n_here / n) < 1
    for kept_here, n_here in by_size["of_reinit"].values():  # uniform in law
        assert abs(kept_here / n_here - kept / n) < 5 * np.sqrt(0.25 / n_here)


def test_rewinding_is_a_chain_for_each_step(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "rewinding", tasks=("sst2",), rewinds=("step_0", "percent_50", "none"))["sst2"]
    rewinds = [cell.settings["search"]["rewind"] for cell in of_step(cells, "round")]
    assert {name: rewinds.count(name) for name in rewinds} == {"step_0": 3, "percent_50": 3, "none": 3}
    assert len(of_step(cells, "snapshot")) == 1 and len(of_step(cells, "fine_tune")) == 1


def test_masks_of_the_base_are_those_of_its_own_weights(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "base-masks", tasks=("sst2",), sparsities=(0.5,), rows=24)["sst2"]
    masks = {c.inputs["ticket"].settings["search"]["criterion"]: c.inputs["ticket"] for c in of_step(cells, "retrain")}  # type: ignore[union-attr]
    lab.run([c for c in masks.values() if isinstance(c, Cell)])
    tickets = {name: ticket_of(lab, cell) for name, cell in masks.items()}
    weights = {f"bert.{n}": v for n, v in load_file(tiny_folder / "model.safetensors").items()}
    size, kept = (np.concatenate([of(n).ravel() for n in tickets["magnitude"].mask.values]) for of in (
        lambda n: weights[n].abs().numpy(), lambda n: tickets["magnitude"].mask.values[n].numpy()))  # fmt: skip
    assert size[kept].min() >= size[~kept].max()
    assert len({t.mask for t in tickets.values()}) == 3
    for ticket in tickets.values():
        kept_count, n = ticket.mask.counts_by_type()["values"]
        assert n - kept_count == round(0.5 * n) and ticket.found_on.fingerprint == ticket.base.fingerprint
    with pytest.raises(SettingsError, match="no such criterion"):
        parts(lab, tiny_folder, "base-masks", tasks=("sst2",), criteria=("size",))


def test_transfer_gives_both_verdicts(lab: Lab, tiny_folder: Path) -> None:
    from tombola.study.context import Context
    from tombola.study.presets import Rung

    planned = parts(lab, tiny_folder, "transfer", sparsities=(0.2,))
    tasks = {name: (name, FAST) for name in TASKS}
    runs: list[Transferred] = []
    for name in TASKS:
        context = Context(lab, str(tiny_folder), name, (0,), (Rung("corrected", "corrected", {}),), FAST, tasks)
        mine = chen2020.planned_transfers(context, chen2020.TransferOptions(sparsities=(0.2,)))
        assert {one.cell.key for one in mine} | {one.dense.key for one in mine} == {cell.key for cell in planned[name]}
        runs += mine
    lab.run([one.cell for one in runs])
    (matrix,) = transfer_matrices(lab, runs)
    assert {(c.source, c.target) for c in matrix.cells} == {
        (source, target) for source in ("sst2", "cola", "base, magnitude", "random") for target in TASKS
    }
    for cell in matrix.cells:
        mine, own, dense = (
            score_of(lab, next(r for r in runs if (r.source, r.target) == pair).cell).value if pair[0] != "dense"
            else score_of(lab, next(r for r in runs if r.target == cell.target).dense).value
            for pair in ((cell.source, cell.target), (cell.target, cell.target), ("dense", cell.target))
        )  # fmt: skip
        assert cell.vs_dense.difference == pytest.approx(mine - dense)
        assert cell.vs_same_task is not None and cell.vs_same_task.difference == pytest.approx(mine - own)
    by_hand = dict.fromkeys(matrix.dark, 0)
    for cell in matrix.cells:
        assert cell.vs_same_task is not None and cell.vs_same_task.difference is not None
        by_hand[cell.source] += cell.source != cell.target and cell.vs_same_task.difference >= -1e-12
    assert matrix.dark == by_hand
    results = collect(lab.store, {one.key for run in runs for one in run.cell.needed()})
    per_variant: dict[tuple[str, str, str], set[str]] = {}
    for row in results.scores:
        if row.role == "report" and row.stage == "retrained":
            per_variant.setdefault((row.task, row.kind, row.stage), set()).add(row.cell)
    assert {len(cells) for cells in per_variant.values()} == {1}, "masks of different sources are never averaged"
    tickets = {r.source: r.cell.inputs["ticket"] for r in runs if r.source in TASKS and r.source == r.target}
    ((pair, shared),) = overlaps(lab, tickets).items()  # type: ignore[arg-type]
    a, b = (ticket_of(lab, tickets[name]).mask for name in pair)
    assert shared.shared == sum(int((a.values[n] & b.values[n]).sum()) for n in a.values) and shared.expected_shared is not None
    assert matrices_of(results.chains.trained) == [matrix], "a page reads of the store what a plan says"
    found = {one.sparsity: (one.overlap.shared, one.overlap.size_a) for one in results.chains.shared}
    assert found[0.2] == (shared.shared, shared.size_a) and found.keys() == {0.1, 0.2}
    assert {(row.task, row.level) for row in results.chains.levels} == {(task, k) for task in TASKS for k in (0, 1)}
    with pytest.raises(SettingsError, match="no task of the study"):
        parts(lab, tiny_folder, "transfer", sparsities=(0.2,), sources=("mnli",))


def test_a_transferred_mask_starts_from_weights_trained_elsewhere_and_never_from_their_head(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "transfer-start", sources=("sst2",), sparsity=0.2, rewind="step_2")["cola"]
    starts = [cell.inputs.get("start") for cell in cells]
    assert [getattr(one, "step", None) for one in starts] == [None, "fine_tune", "snapshot"]
    lab.run(cells)
    from tombola.study.data import same_data
    from tombola.study.steps import training

    (trained,) = (cell for cell, one in zip(cells, starts, strict=True) if getattr(one, "step", "") == "fine_tune")
    data = same_data(trained, lab)
    model = load_weights(tiny_folder, data.task.objective, head_seed=0)
    fresh = model.classifier.weight.clone()
    training._start_from(trained, lab, model, read_anatomy(model))
    source = load_file(lab.folder(trained.inputs["start"]) / "weights" / "model.safetensors")
    assert torch.equal(model.bert.pooler.dense.weight, source["bert.pooler.dense.weight"])
    assert torch.equal(model.classifier.weight, fresh) and not torch.equal(fresh, source["classifier.weight"])
    results = collect(lab.store, {cell.key for cell in cells})
    assert len({row.task for row in results.scores if row.kind == "good"}) == 3, "they are never averaged together"


def test_unions_and_intersections_of_two_tasks(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "set-algebra", joins=(("cola", "sst2"), ("cola", "squad")), sparsities=(0.2,))
    assert {name: len(of) for name, of in cells.items()} == {"sst2": 2, "cola": 2}, "of tasks that are not in the study nothing"
    derived = [cell.inputs["ticket"] for cell in cells["sst2"]]
    lab.run([one for one in derived if isinstance(one, Cell)])
    made = {one.settings["rule"]: ticket_of(lab, one) for one in derived if isinstance(one, Cell)}
    a, b = (ticket_of(lab, one).mask for one in derived[0].inputs.values())  # type: ignore[union-attr]
    for name in a.values:
        assert torch.equal(made["intersection"].mask.values[name], a.values[name] & b.values[name])
        assert torch.equal(made["union"].mask.values[name], a.values[name] | b.values[name])
    assert made["union"].sparsity < 0.2 < made["intersection"].sparsity


def test_perturbed_masks_exchange_the_share_that_is_asked_in_each_matrix(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "perturbed", tasks=("sst2",), sparsity=0.2, shares=(0.01, 0.1), draws=2)["sst2"]
    derived = [c.inputs["ticket"] for c in cells if c.inputs["ticket"].step == "derive"]  # type: ignore[union-attr]
    assert len(derived) == 4
    lab.run([one for one in derived if isinstance(one, Cell)])
    good = ticket_of(lab, derived[0].inputs["ticket"]).mask  # type: ignore[union-attr]
    made = [(one.settings["options"], ticket_of(lab, one).mask) for one in derived if isinstance(one, Cell)]
    for options, mask in made:
        for name, part in mask.values.items():
            was = good.values[name]
            n = min(round(options["share"] * was.numel()), int((~was).sum()))
            assert int((part & ~was).sum()) == int((was & ~part).sum()) == n
    assert len({mask for _, mask in made}) == 4, "each draw is its own"


def test_noise_is_added_to_the_maskable_values_alone(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "noised", tasks=("sst2",), sparsity=0.2, times=(1.0,))["sst2"]
    (derived,) = (c.inputs["ticket"] for c in cells if c.inputs["ticket"].step == "derive")  # type: ignore[union-attr]
    lab.run([derived])  # type: ignore[list-item]
    ticket = ticket_of(lab, derived)
    assert ticket.mask == ticket_of(lab, derived.inputs["ticket"]).mask  # type: ignore[union-attr]
    noisy, plain = load(ticket, weights="base"), load_weights(tiny_folder, ("negative", "positive"), head_seed=0)
    drawn = []
    for name, p in plain.named_parameters():
        moved = (noisy.get_parameter(name) - p).detach()
        if name in ticket.mask.values:
            drawn.append(moved[ticket.mask.values[name]])
            assert not noisy.get_parameter(name)[~ticket.mask.values[name]].any()
        else:
            assert not moved.any(), name
    noise = torch.cat(drawn)
    assert float(noise.std()) == pytest.approx(0.0387, rel=0.05) and abs(float(noise.mean())) < 0.002
    once, twice = (tiny_model("bert") for _ in range(2))
    for model in (once, twice):
        add_noise(model, ["classifier.weight"], 0.1, 7)
    assert torch.equal(once.classifier.weight, twice.classifier.weight)


def test_tickets_of_little_data_are_trained_on_all(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "small-data", tasks=("sst2",), train_rows=(32,), sparsity=0.2)["sst2"]
    assert len(cells) == 2
    for cell in cells:
        assert cell.settings["data"]["counts"]["train"] == 64
        found_on = [one for one in cell.inputs["ticket"].needed() if one.step == "round"]  # type: ignore[union-attr]
        assert {one.settings["data"]["counts"]["train"] for one in found_on} == {32}


def test_a_barrier_is_the_rise_of_the_loss_above_the_line(lab: Lab, tiny_folder: Path) -> None:
    cells = parts(lab, tiny_folder, "connectivity", tasks=("sst2",), points=3)["sst2"]
    assert [cell.inputs["a"].step for cell in cells] == ["fine_tune", "retrain"]  # type: ignore[union-attr]
    lab.run(cells[1:])
    rows = read_rows(lab.folder(cells[1]) / "barrier.jsonl")
    ends = [load_file(lab.folder(cells[1].inputs[role]) / "weights" / "model.safetensors") for role in ("a", "b")]
    model = load_weights(tiny_folder, ("negative", "positive"), head_seed=0)
    from tombola.study.data import encoded_rows, same_data

    data = same_data(cells[1], lab)
    encoded, losses = encoded_rows(lab, cells[1], "report", data.report), []
    for share in (0.0, 0.5, 1.0):
        model.load_state_dict({n: (1 - share) * ends[0][n] + share * ends[1][n] for n in ends[0]})
        with torch.no_grad():
            total = [float(model(**b).loss) * len(i) for i, b in batches(encoded)]
        losses.append(sum(total) / len(encoded))
    found = [row["loss"] for row in rows if row["role"] == "report"]
    assert found == pytest.approx(losses, rel=1e-4)
    (barrier,) = barriers(lab, cells[1:])
    assert barrier.barrier == pytest.approx(max(0.0, losses[1] - (losses[0] + losses[2]) / 2), abs=1e-5)
    assert (barrier.lower, barrier.upper) == (0.1, 0.2)


def test_a_chain_is_given_up_when_it_is_certainly_lost(lab: Lab, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola.study.chains import plan_chains
    from tombola.study.settings import resolve

    (chain,) = plan_chains(lab, str(tiny_folder), "sst2", resolve(FAST | {"learning_rate": 2.9e-3}, (0,), method="imp"), (0,))
    monkeypatch.setattr(stats, "certainly_lost", lambda *_, **__: True)
    assert run_until_lost(lab, chain) == 1
    assert lab.store.load(chain.levels[1].key) is not None and lab.store.load(chain.last.key) is None
    monkeypatch.setattr(stats, "certainly_lost", lambda *_, **__: False)
    assert run_until_lost(lab, chain) == 2


# ---------------------------------------------------------------------------------------------------------------- grasp


@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_grasp_is_the_weight_times_a_finite_difference_of_gradients(family: str) -> None:
    """Hg by moving all weights a little along g, in fp64: (∇L(w + εg) − ∇L(w − εg)) / 2ε."""
    import copy

    from test_criteria import names_of, random_rows

    model, rows = tiny_model(family), random_rows(7, family)
    names = names_of(model)
    found = CRITERIA["grasp"].scores(Given(model=model, names=names, batches=batches(rows, 40)))
    twin = copy.deepcopy(model).double()

    def gradient() -> dict[str, torch.Tensor]:
        twin.zero_grad()
        for row, label in zip(rows.inputs, rows.labels, strict=True):
            logits = twin(input_ids=torch.tensor([row["input_ids"]])).logits[0]
            ((torch.logsumexp(logits, 0) - logits[int(label or 0)]) / len(rows)).backward()
        return {n: twin.get_parameter(n).grad.clone() for n in names}

    g, ends = gradient(), []
    size = max(float(x.abs().max()) for x in g.values())
    step = 1e-4 / size
    for sign in (1, -1):
        with torch.no_grad():
            for n in names:
                twin.get_parameter(n).add_(sign * step * g[n])
        ends.append(gradient())
        with torch.no_grad():
            for n in names:
                twin.get_parameter(n).sub_(sign * step * g[n])
    scale = max(float(x.abs().max()) for x in found.values())
    for n in names:
        expected = twin.get_parameter(n).detach() * (ends[0][n] - ends[1][n]) / (2 * step)
        assert torch.allclose(found[n].double(), expected, atol=1e-5 * scale), n


def test_plans_survive_json(lab: Lab, tiny_folder: Path) -> None:
    for cells in parts(lab, tiny_folder, "transfer", sparsities=(0.2,)).values():
        for cell in cells:
            assert Cell.from_description(json.loads(json.dumps(cell.describe()))).key == cell.key
    assert read_json(lab.store.root / "store.json")


# --------------------------------------------------------------------------------------------------------------- stopping


def test_a_study_leaves_out_what_stands_on_a_lost_level_and_says_so(
    lab: Lab, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tombola.study.chains import plan_chains
    from tombola.study.engine import Watch, run_cells
    from tombola.study.executors import Options, executor_of
    from tombola.study.runs import plan_retrain
    from tombola.study.settings import resolve
    from tombola.study.stopping import by_reason, stopped, why_stopped

    class Heard(Watch):
        def __init__(self) -> None:
            self.said: list[str] = []

        def say(self, message: str) -> None:
            self.said.append(message)

    settings = resolve(FAST | {"learning_rate": 2.8e-3, "imp_last_level": 0.3}, (0,), method="imp")
    (chain,) = plan_chains(lab, str(tiny_folder), "sst2", settings, (0,))
    beyond = plan_retrain(chain.at(0.3), chain.dense, settings.retrain)
    asked = {cell.key: cell for cell in (*chain.cells, beyond)}
    judged: list[float] = []

    def lost(level: Any, dense: Any, rows: int, **_: Any) -> bool:  # the first level that is asked about
        judged.append(level[0])
        return True

    monkeypatch.setattr(stats, "certainly_lost", lost)
    heard = Heard()
    tally = run_cells(
        lab, list(asked.values()), executor_of("serial", Options()), heard, stop=lambda cell: why_stopped(lab, cell)
    )
    # rounds 0 (dense) and 1 (trains 10 %) are there; round 2 would train 20 %, though 10 % is lost
    left_out = {chain.levels[2].key, chain.last.key, beyond.key}
    assert tally.stopped.keys() == left_out and not tally.failed and not tally.blocked
    assert judged and judged[0] == score_of(lab, chain.levels[1], "selection").value
    assert any("left out: sst2, seed 0 is certainly lost at 10%" in said for said in heard.said)
    found = stopped(lab, asked.values())
    assert found.keys() == left_out and list(by_reason(found).values()) == [3]
    monkeypatch.setattr(stats, "certainly_lost", lambda *_, **__: False)
    assert stopped(lab, asked.values()) == {}
    tally = run_cells(lab, list(asked.values()), executor_of("serial", Options()), stop=lambda cell: why_stopped(lab, cell))
    assert set(tally.computed) == left_out and not tally.stopped, "the same chain goes on where it was given up"


def test_a_corpus_of_files_is_a_task_of_a_study(lab: Lab, tiny_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("other", 2)):
        (tmp_path / f"{name}.txt").write_text(
            "\n".join(" ".join(row["sentence"].split() * 4) for row in sentiment_rows(120, seed))
        )
    (tmp_path / "mine.toml").write_text(
        f"""model = "{tiny_folder}"\ntasks = ["mine"]\nexperiments = ["imp"]
[corpora.mine]\ntrain = "train.txt"\nvalidation = "other.txt"
[settings]\nsteps = 2\nbatch_size = 4\nmax_length = 16\nimp_last_level = 0.2\n"""
    )
    study = read_study(str(tmp_path / "mine.toml"))
    assert Path(study.corpora["mine"].train).is_absolute() and not study.stop_lost_chains
    plan = plan_study(lab, study)
    (last,) = [cell for cell in plan.cells.values() if cell.step == "round" and cell.settings["cuts"] is None]
    assert "mlm" in last.settings["data"] and last.settings["data"]["task"].startswith("mlm#")
    from tombola.study.engine import Order, run_one, write_plans

    fresh = open_lab(lab.store.root, None)  # as a worker elsewhere: it knows the files from the plan alone
    write_plans(lab, [last])
    ended = run_one(Order(last.key, str(lab.store.root)), lab=fresh)
    assert ended.error is None
    assert score_of(fresh, last).metric == "masked_accuracy"
    (tmp_path / "bad.toml").write_text((tmp_path / "mine.toml").read_text().replace('tasks = ["mine"]', 'tasks = ["sst2"]'))
    with pytest.raises(SettingsError, match="made of files"):
        read_study(str(tmp_path / "bad.toml"))
