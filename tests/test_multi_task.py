"""Several tasks that train one body under one mask: a step of them, and their chain as cells, each held against another way."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from conftest import sentiment_rows, tiny_model, write_task
from test_asked import corpus, questions, squad_file
from test_report import Page
from test_train import cut, orders, random_rows, without_dropout
from tombola.errors import MaskError, SearchError, SettingsError, TombolaError
from tombola.evaluate import predict, score
from tombola.gates import hold, load
from tombola.held import HeldValues
from tombola.joint import Joint
from tombola.levels import Levels
from tombola.mask import Mask
from tombola.objective import Objective, load_weights
from tombola.order import Several, Stretch
from tombola.report import render
from tombola.search.imp import ImpSettings, Round, Snapshot, imp, order_seed
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.chains import plan_chains
from tombola.study.data import encoded_rows, task_data
from tombola.study.jobs import open_lab
from tombola.study.joint import JointChain, plan_joint
from tombola.study.plan import Study, plan_study, read_study
from tombola.study.results import collect
from tombola.study.settings import resolve
from tombola.study.steps import STEPS
from tombola.study.steps import imp as steps
from tombola.study.steps.shared import read_predictions, ticket_of
from tombola.study.verdicts import existence_of
from tombola.tasks.encode import collate, encode
from tombola.train import RunSeeds, TrainSettings, fine_tune

MASKED, SPAN = Objective((), form="masked"), Objective((), form="span")
SEEDS = RunSeeds(head=0, data=2, dropout=0, mask=0)


# --------------------------------------------------------------------------------------------------------------- one step


def models_of(folder: Path) -> dict[str, Any]:
    return {
        "class": load_weights(folder, ("a", "b", "c"), head_seed=0),
        "masked": load_weights(folder, MASKED, head_seed=0),
        "span": load_weights(folder, SPAN, head_seed=0),
    }


def batches_of(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = replace(corpus(9, 4), labels=tuple(i % 3 for i in range(9)))
    return {
        "class": collate(encode(tokenizer, texts, 32), [0, 3, 5, 7]),
        "masked": collate(encode(tokenizer, corpus(40), 16, objective=MASKED), [1, 2, 4], drawn=(3, 0)),
        "span": collate(encode(tokenizer, questions(8), 32, objective=SPAN, stride=8), [0, 6]),
    }


def hand_loss(model: Any, name: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss as it is defined, of transformers' own logits at every position."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "at")}
    rows, out = range(len(batch["labels"])), model(**inputs)
    if name == "class":
        picked = [out.logits[i].log_softmax(0)[batch["labels"][i]] for i in rows]
    elif name == "masked":
        at, wanted = batch["at"][:, :-1], batch["labels"][:, 1:]
        picked = [out.logits[i, at[i, j]].log_softmax(0)[wanted[i, j]] for i in rows for j in range(at.shape[1])]
    else:
        real = batch["attention_mask"].sum(1)
        starts = [out.start_logits[i, : real[i]].log_softmax(0)[batch["labels"][i, 1]] for i in rows]
        picked = starts + [out.end_logits[i, : real[i]].log_softmax(0)[batch["labels"][i, 2]] for i in rows]
    return -torch.stack(picked).mean()


def test_loss_and_gradients_of_a_step_are_the_sums_over_models_with_bodies_of_their_own(tiny_folder: Path) -> None:
    alone = {name: copy.deepcopy(model).double() for name, model in models_of(tiny_folder).items()}
    for name in ("masked", "span"):
        alone[name].tombola_asked.remove()  # as transformers has them
    joint = Joint(models_of(tiny_folder)).double()
    batches, total = batches_of(tiny_folder), 0.0
    for name, model in alone.items():
        loss = hand_loss(model, name, batches[name])
        loss.backward()
        total += loss.item()
    found = joint(batches)["loss"]
    found.backward()
    assert found.item() == pytest.approx(total, rel=1e-12)
    seen = set()
    for name, parameter in joint.named_parameters():
        if not name.startswith("heads."):
            of = [grad for m in alone.values() if (grad := dict(m.named_parameters())[name].grad) is not None]
            assert len(of) == (1 if "pooler" in name else 3), name
        else:
            i, own = name.removeprefix("heads.").split(".", 1)
            of = [dict(list(alone.values())[int(i)].named_parameters())[own].grad]
            seen.add(int(i))
        assert torch.allclose(parameter.grad, sum(of), rtol=1e-9, atol=1e-14), name
    assert seen == {0, 1, 2}
    tied = joint.models["masked"].get_output_embeddings().weight
    assert tied is joint.get_parameter("bert.embeddings.word_embeddings.weight"), "output embeddings are those of the one body"


def test_the_body_is_one_and_heads_are_apart(tiny_folder: Path) -> None:
    joint = Joint(models_of(tiny_folder))
    assert len({id(model.bert) for model in joint.models.values()}) == 1
    heads = [{id(p) for n, p in joint.named_parameters() if n.startswith(f"heads.{i}.")} for i in range(3)]
    assert all(heads) and not heads[0] & heads[1] and not heads[0] & heads[2] and not heads[1] & heads[2]
    batch = batches_of(tiny_folder)["class"]
    joint({"class": batch})["loss"].backward()
    with_gradient = {
        name.split(".")[1] for name, p in joint.named_parameters() if name.startswith("heads.") and p.grad is not None
    }
    assert with_gradient == {"0"}
    before = predict(joint.models["span"], encode_questions(tiny_folder)).logits
    with torch.no_grad():
        joint.get_parameter("heads.0.classifier.weight").add_(1.0)
    assert torch.equal(predict(joint.models["span"], encode_questions(tiny_folder)).logits, before)
    for mode in (True, False):
        joint.train(mode)
        assert {module.training for model in joint.models.values() for module in model.modules()} == {mode}


def encode_questions(folder: Path) -> Any:
    return encode(transformers.AutoTokenizer.from_pretrained(folder), questions(8), 32, objective=SPAN, stride=8)


def test_the_body_is_the_one_that_has_all_parts(tmp_path: Path, tiny_folder: Path) -> None:
    """A base without a pooler: a classifier draws one, a masked model has none."""
    base = transformers.AutoModelForMaskedLM.from_pretrained(tiny_folder)
    base.save_pretrained(tmp_path)
    masked, classes = load_weights(tmp_path, MASKED, head_seed=0), load_weights(tmp_path, ("a", "b"), head_seed=0)
    assert masked.bert.pooler is None
    drawn = classes.bert.pooler.dense.weight.detach().clone()
    joint = Joint({"masked": masked, "class": classes})
    assert torch.equal(joint.get_parameter("bert.pooler.dense.weight"), drawn) and masked.bert is classes.bert


def test_what_cannot_share_a_body_is_refused(tiny_folder: Path) -> None:
    small = load_weights(tiny_folder, ("a", "b"), head_seed=0)
    with pytest.raises(TombolaError, match="cannot share a body"):
        Joint({"a": small})
    with pytest.raises(TombolaError, match="cannot share a body") as caught:
        Joint({"a": small, "wide": tiny_model("bert", width=32, d_ffn=40)})
    assert "wide" in str(caught.value.got) or "a" in str(caught.value.got)
    with pytest.raises(TombolaError, match="cannot share a body"):
        Joint({"a": small, "other": tiny_model("distilbert")})
    rows = Several({"a": random_rows()}, {"a": 4})
    with pytest.raises(TombolaError, match="trained on together"):
        fine_tune(small, rows, TrainSettings(), SEEDS, stretch=Stretch(steps=1, schedule_steps=1))


# ------------------------------------------------------------------------------------------------------- a run of several


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 7), st.integers(1, 7), st.integers(0, 30), st.integers(1, 25))
def test_each_task_sees_its_own_epochs_one_after_the_other(n: int, m: int, a: int, b: int, first: int, steps: int) -> None:
    rows = Several({"a": random_rows(n), "b": random_rows(m, seed=1)}, {"a": a, "b": b})
    streams = rows.streams(5, Stretch(steps=steps, schedule_steps=99, rows_from=first))
    for name, size in (("a", a), ("b", b)):
        of = rows.rows[name]
        every = [batch for order in orders(of.lengths, size, 5, first + steps) for batch in cut(order, size)]
        assert [[item % len(of) for item in batch] for batch in streams[name]] == every[first : first + steps]


def small_models() -> dict[str, Any]:
    torch.manual_seed(0)
    first = without_dropout(tiny_model("bert", width=8, d_ffn=12).double())
    second = copy.deepcopy(first)
    second.classifier = nn.Linear(8, 2).double()  # a head of its own
    return {"a": first, "b": second}


@pytest.mark.parametrize("masked", [False, True])
def test_weights_are_those_of_a_hand_loop(masked: bool) -> None:
    """Bodies of their own, gradients added by hand, one AdamW step written out; rows in the order of epochs."""
    rows = Several({"a": random_rows(30), "b": random_rows(11, seed=1)}, {"a": 8, "b": 4})
    how, n_steps = TrainSettings(learning_rate=1e-3, clip_norm=0.5), 9  # epochs of 4 and of 3 steps
    hand, joint = small_models(), Joint(small_models())
    name = "bert.encoder.layer.1.output.dense.weight"
    kept = torch.rand(joint.get_parameter(name).shape, generator=torch.Generator().manual_seed(1)) < (0.4 if masked else 2.0)
    if masked:
        HeldValues(joint, {name: kept})
        for model in hand.values():
            model.get_parameter(name).data *= kept
    log = fine_tune(joint, rows, how, SEEDS, stretch=Stretch(steps=n_steps, schedule_steps=n_steps))
    batches = {
        task: [
            b for order in orders(of.lengths, rows.batch_sizes[task], SEEDS.data, 9) for b in cut(order, rows.batch_sizes[task])
        ]
        for task, of in rows.rows.items()
    }
    body = [n for n, _ in hand["a"].named_parameters() if n.startswith("bert.")]
    values = {n: [dict(m.named_parameters())[n] for m in hand.values()] for n in body}
    values |= {f"{task}.{n}": [p] for task, m in hand.items() for n, p in m.named_parameters() if not n.startswith("bert.")}
    moments = {n: (torch.zeros_like(of[0]), torch.zeros_like(of[0])) for n, of in values.items()}
    losses, clipped = [], 0
    for step in range(n_steps):
        loss_sum = 0.0
        for task, model in hand.items():
            model.zero_grad()
            batch = collate(rows.rows[task], batches[task][step])
            labels = batch.pop("labels")
            logits = model.train()(**batch).logits
            loss = (logits.logsumexp(1) - logits[torch.arange(len(labels)), labels]).mean()
            loss.backward()
            loss_sum += loss.item()
        losses.append(loss_sum)
        grads = {n: sum(p.grad for p in of) for n, of in values.items()}
        grads[name] = grads[name] * kept
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        clipped += int(norm > how.clip_norm)
        for n, of in values.items():
            g = grads[n] * min(1.0, how.clip_norm / (float(norm) + 1e-6))
            m, v = moments[n]
            m.mul_(0.9).add_(g, alpha=0.1)
            v.mul_(0.999).add_(g * g, alpha=0.001)
            t, rate = step + 1, how.learning_rate * (n_steps - step) / n_steps
            change = rate * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + how.adam_epsilon)
            for p in of:
                p.data -= change
    assert clipped > 2
    assert [loss for _, loss in log.losses] == pytest.approx(losses, abs=1e-4)
    for task, model in hand.items():
        ours = dict(joint.models[task].named_parameters())
        for n, p in model.named_parameters():
            assert float((ours[n] - p).detach().abs().max()) < 1e-6, (task, n)
            assert masked or float((p - small_models()[task].get_parameter(n)).detach().abs().max()) > 1e-4 or "key.bias" in n
    if masked:
        assert (
            not any(m.get_parameter(name)[~kept].any() for m in joint.models.values()) and joint.get_parameter(name)[kept].all()
        )
    tokens = [[rows.rows[task].lengths[i] for i in b] for task, of in batches.items() for b in of[:n_steps]]
    assert (log.tokens, log.padded_tokens) == (sum(map(sum, tokens)), sum(len(t) * max(t) for t in tokens))


def test_a_run_of_several_that_is_stopped_goes_on_and_ends_with_the_same_bits(tiny_folder: Path, tmp_path: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    texts = replace(corpus(40, 4), labels=tuple(i % 2 for i in range(40)))
    rows = Several(
        {"a": encode(tokenizer, texts, 32), "m": encode(tokenizer, corpus(60), 16, objective=MASKED)}, {"a": 8, "m": 4}
    )

    def started() -> Joint:
        return Joint(
            {"a": load_weights(tiny_folder, ("x", "y"), head_seed=0), "m": load_weights(tiny_folder, MASKED, head_seed=0)}
        )

    part, how = Stretch(steps=8, schedule_steps=12, rows_from=3, schedule_from=2), TrainSettings(learning_rate=3e-3)
    whole, again = started(), started()
    fine_tune(whole, rows, how, SEEDS, stretch=part)

    def stop(share: float) -> None:
        if round(share * 8) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(started(), rows, how, SEEDS, stretch=part, checkpoints=tmp_path, every_seconds=0.0, progress=stop)
    assert list(tmp_path.glob("checkpoint-*"))
    with pytest.raises(TombolaError, match="of another run") as caught:
        other = replace(rows, batch_sizes={"a": 8, "m": 5})
        fine_tune(started(), other, how, SEEDS, stretch=part, checkpoints=tmp_path)
    assert "rows.m" in str(caught.value.got)
    fine_tune(again, rows, how, SEEDS, stretch=part, checkpoints=tmp_path, every_seconds=0.0)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values(), strict=True))
    moved = [n for n, p in started().named_parameters() if not torch.equal(p, whole.get_parameter(n))]
    assert {n.split(".")[1] for n in moved if n.startswith("heads.")} == {"0", "1"}, "dropout and all, both heads learned"


# ------------------------------------------------------------------------------------------------------------------- cells

FAST: dict[str, Any] = {"epochs": 1, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 64, "selection_rows": 30}
FAST |= {"report_rows": 30, "imp_last_level": 0.2, "max_length": 32, "stride": 8}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Sentences decided by a word; fewer of the same kind with the other answer; questions for that word; running text."""
    folder = tmp_path_factory.mktemp("multi")
    for task, turn, n in (("sst2", 0, 200), ("cola", 1, 60)):
        for split, rows, seed in (("train", n, 1 + turn), ("validation", 40, 3 + turn)):
            write_task(folder / "data", task, split, [row | {"label": row["label"] ^ turn} for row in sentiment_rows(rows, seed)])
    for split, n, seed in (("train", 60, 1), ("validation", 20, 2)):
        squad_file(folder / "data", split, n, seed)
        rows = [{"text": " ".join(row["sentence"] for row in sentiment_rows(200, seed)[i : i + 10])} for i in range(0, 200, 10)]
        write_task(folder / "data", "wikitext2", split, rows)
    return open_lab(folder / "store", folder / "data")


def study_of(model: Path, tasks: tuple[str, ...], seeds: tuple[int, ...] = (0,), *more: str, **changes: Any) -> Study:
    said: dict[str, Any] = {"name": "m", "model": str(model), "tasks": ["cola", "sst2", "squad", "mlm-wikitext2"]}
    said["per_task"] = {"mlm-wikitext2": {"steps": 3, "max_length": 16}}
    options = {"multi-task": {"tasks": [list(tasks)]}}
    return Study(**said, seeds=list(seeds), settings={**FAST, **changes}, experiments=["multi-task", *more], options=options)


def chains_of(lab: Lab, model: Path, tasks: tuple[str, ...] = ("sst2", "cola"), **changes: Any) -> list[JointChain]:
    asked = [(task, resolve({**FAST, "padding": "bucketed", **changes}, (0,), method="imp")) for task in tasks]
    return plan_joint(lab, str(model), asked, (0,))


@pytest.fixture(scope="module")
def chain(lab: Lab, tiny_folder: Path) -> JointChain:
    (planned,) = chains_of(lab, tiny_folder)
    lab.run(planned.cells)
    return planned


def test_the_experiment_asks_for_these_cells_once(lab: Lab, chain: JointChain, tiny_folder: Path) -> None:
    plan = plan_study(lab, study_of(tiny_folder, ("sst2", "cola")))
    assert plan.cells.keys() == {cell.key for cell in chain.cells}
    assert [part.task for part in plan.parts if part.cells] == ["sst2"]
    assert [cell.step for cell in chain.cells] == ["fine_tune"] * 2 + ["joint_round"] * 3
    (single,) = plan_chains(lab, str(tiny_folder), "cola", resolve(FAST, (0,), method="imp"), (0,))
    assert single.dense == chain.alone[1], "the dense model of each task serves its own chain too"
    titles = [STEPS[cell.step].title(cell) for cell in chain.cells]
    assert titles[2:] == [f"joint-round · {what} · sst2 + cola · seed 0" for what in ("to 10%", "to 20%", "last level")]
    for cell in chain.cells:
        assert Cell.from_description(cell.describe()).key == cell.key
    assert chain.at(0.2) == chain.levels[1]
    with pytest.raises(SettingsError, match="no ticket of this sparsity"):
        chain.at(0.5)


def test_masks_and_scores_of_the_cells_are_those_of_the_chain_in_one_process(
    lab: Lab, chain: JointChain, tiny_folder: Path
) -> None:
    """`imp` and `fine_tune` from the files of the base, and a model of each task asked at the end of each round."""
    first = ticket_of(lab, chain.levels[0]).mask
    assert len(first.values) == 13 and "bert.pooler.dense.weight" in first.values, "six matrices a layer and the pooler"
    data = {task: task_data(lab, task, cell.settings["data"]) for task, cell in zip(("sst2", "cola"), chain.alone, strict=True)}
    parts = dict(zip(data, chain.alone, strict=True))
    rows = Several(
        {task: encoded_rows(lab, parts[task], "train", of.train) for task, of in data.items()}, {"sst2": 16, "cola": 16}
    )
    assert [len(of) for of in rows.rows.values()] == [64, 51], "four batches each"
    joint = Joint({task: load_weights(tiny_folder, of.task.objective, head_seed=0) for task, of in data.items()})
    start, found_scores = copy.deepcopy(joint.state_dict()), list[dict[str, float]]()

    def trained(model: nn.Module, one: Round) -> None:
        held = HeldValues.on(model)
        for name, value in start.items():  # each round begins with the base, bit for bit where the mask keeps
            kept = held.values.get(name) if held is not None else None
            now = model.state_dict()[name]
            assert torch.equal(now, value) if kept is None else torch.equal(now[kept], value[kept]) and not now[~kept].any()
        assert (one.steps, one.rows_from, one.schedule_steps) == (4, 0, 4)
        seeds = RunSeeds(head=0, data=order_seed(0, one.data_round), dropout=0, mask=0)
        fine_tune(joint, rows, TrainSettings(learning_rate=3e-3), seeds, stretch=Stretch(steps=4, schedule_steps=4))
        found_scores.append(
            {
                task: score(
                    predict(joint.models[task], encoded_rows(lab, parts[task], "report", of.report)), of.task.metric
                ).value
                for task, of in data.items()
            }
        )

    options = ImpSettings(imp_last_level=0.2)
    found = imp(joint, list(first.values), trained, chain.plan, options)
    for level, cell in enumerate(chain.levels, start=1):
        assert found.levels.mask(level) == ticket_of(lab, cell).mask
        kept, n = ticket_of(lab, cell).mask.counts_by_type()["values"]
        assert n - kept == round(level / 10 * n)
    Levels.of([ticket_of(lab, cell).mask for cell in chain.levels])  # nested, or it raises
    Snapshot(Joint({task: load_weights(tiny_folder, of.task.objective, head_seed=0) for task, of in data.items()})).check(
        joint, found.mask
    )
    for k, scores in enumerate(found_scores):  # of levels 0 and 1; the last round is the cells' alone
        for i, (task, value) in enumerate(scores.items()):
            place = lab.folder([*chain.levels, chain.last][k]) / f"task-{i}"
            written = next(row for row in read_rows(place / "scores.jsonl") if row["role"] == "report")
            assert (written["task"], written["value"], written["n"]) == (task, value, 30)
            assert written["stage"] == ("retrained" if k else "full") and written["agreement"]["n"] == 30
            assert read_predictions(place).keys() == {"selection", "report"}
    digests = {read_json(lab.folder(cell) / "train.json")["snapshot"] for cell in (*chain.levels, chain.last)}
    assert len(digests) == 1


def test_a_ticket_of_several_tasks_is_one_of_the_body(lab: Lab, chain: JointChain, tmp_path: Path) -> None:
    ticket = ticket_of(lab, chain.levels[1])
    assert (
        (ticket.task, ticket.labels) == ("sst2 + cola", ()) and ticket.parents and ticket.sparsity == pytest.approx(0.2, abs=1e-3)
    )
    assert not any("classifier" in name for name in ticket.mask.values)
    model = load(ticket)
    held = HeldValues.on(model)
    assert held is not None and not model.bert.pooler.dense.weight[~ticket.mask.values["bert.pooler.dense.weight"]].any()
    ticket.save_pretrained(tmp_path / "t")


def test_rows_are_of_each_task_beside_chains_of_its_own(lab: Lab, chain: JointChain, tiny_folder: Path) -> None:
    singles = [plan_chains(lab, str(tiny_folder), task, resolve(FAST, (0,), method="imp"), (0,))[0] for task in ("sst2", "cola")]
    lab.run([cell for one in singles for cell in one.cells])
    results = collect(lab.store, {cell.key for one in (chain, *singles) for cell in one.cells})
    assert {row.task.partition(" ")[0] for row in results.scores} == {"sst2", "cola"}, "of several tasks only rows of chains"
    together = [row for row in results.chains.levels if row.body_of]
    assert [(row.task, row.level, row.sparsity) for row in together] == [
        (task, level, level / 10) for task in ("cola", "sst2") for level in (0, 1, 2)
    ]
    assert {row.chain for row in together} == {"one body for sst2 + cola"}
    for row in together:
        cell = [*chain.levels, chain.last][row.level]
        place = lab.folder(cell) / f"task-{row.body_of.index(row.task)}"
        written = {one["role"]: one for one in read_rows(place / "scores.jsonl") if one["metric"] == row.metric}
        assert (row.value, row.selection) == (written["report"]["value"], written["selection"]["value"])
        assert row.cell == cell.key and row.steps == 4 * (row.level + 1) and row.flops > 0
    found = existence_of([row for row in together if row.task == "cola"])
    assert found.dense == (next(row.value for row in together if (row.task, row.level) == ("cola", 0)),)
    shared = {(one.b, one.sparsity): one.overlap for one in results.chains.shared if one.a.startswith("one body")}
    assert shared.keys() == {(task, level) for task in ("sst2", "cola") for level in (0.1, 0.2)}
    for (task, level), overlap in shared.items():
        own = singles[("sst2", "cola").index(task)].at(level)
        a, b = (
            np.concatenate([part.numpy().ravel() for part in ticket_of(lab, one).mask.values.values()])
            for one in (chain.at(level), own)
        )
        assert overlap.jaccard == pytest.approx((a & b).sum() / (a | b).sum()) and overlap.jaccard < 1
    tables = Page(render(results)).tables
    table = tables["Scores under a shared mask, beside chains of each task alone: mean ± std over seeds"]
    said = {(row[1], row[2]): dict(zip(table[0], row, strict=True)) for row in table[1:]}
    assert said.keys() == {(task, at) for task in ("sst2", "cola") for at in ("dense", "10 %", "20 %")}
    one = said["cola", "20 %"]
    mine = {(row.task, bool(row.body_of), row.level): row.value for row in results.chains.levels}
    assert one["Shared mask"].startswith(f"{mine['cola', True, 2]:.3f}".replace("-", "−"))
    assert one["Own mask, trained alone"].startswith(f"{mine['cola', False, 2]:.3f}".replace("-", "−"))
    assert one["Masks share / by chance"].startswith(f"{shared['cola', 0.2].jaccard:.3f} / ")
    assert said["cola", "dense"]["Masks share / by chance"] == "–" or "/" not in said["cola", "dense"]["Masks share / by chance"]


def test_a_round_of_several_that_is_stopped_goes_on_and_ends_with_the_same_bits(
    lab: Lab, chain: JointChain, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert lab.data_dir is not None
    other = open_lab(tmp_path / "other", lab.data_dir)
    other.checkpoint_seconds = 0.0
    (planned,) = chains_of(other, tiny_folder)
    real, stops = steps.fine_tune, [2, 3]

    def stopped(*arguments: Any, progress: Callable[[float], None], **named: Any) -> Any:
        at = stops.pop() if stops else 99

        def told(share: float) -> None:
            progress(share)
            if round(share * 4) >= at:
                raise KeyboardInterrupt

        return real(*arguments, progress=told, **named)

    monkeypatch.setattr(steps, "fine_tune", stopped)
    wanted = planned.levels[1]
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            other.run([wanted])
    other.run([wanted])
    assert not stops and [cell.key for cell in planned.cells] == [cell.key for cell in chain.cells]
    for cell in planned.levels[:2]:
        for file in (
            "ticket/mask.safetensors",
            "ticket/ticket.json",
            "task-0/scores.jsonl",
            "task-1/predictions.jsonl",
            "train.json",
        ):
            assert (other.folder(cell) / file).read_bytes() == (lab.folder(cell) / file).read_bytes(), file


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({"rewind": "step_2"}, []),
        ({"rewind": "none"}, ["joint.safetensors"]),
        ({"head_rewind": "carried"}, ["head.safetensors"]),
    ],
    ids=["later step", "never", "heads carried"],
)
def test_what_is_rewound_and_what_is_carried(lab: Lab, tiny_folder: Path, changes: dict[str, Any], kept: list[str]) -> None:
    from safetensors.torch import load_file

    (planned,) = chains_of(lab, tiny_folder, **changes)
    lab.run([planned.levels[1]])
    files = [[f.name for f in lab.folder(one).iterdir() if f.suffix == ".safetensors"] for one in planned.levels]
    assert files == [kept, kept]
    if changes == {"rewind": "step_2"}:
        assert planned.snapshot is not None
        said = [read_json(lab.folder(one) / "train.json") for one in (planned.snapshot, *planned.levels)]
        assert [one["steps"] for one in said] == [2, 2, 2] and len({one["snapshot"] for one in said}) == 1
    elif kept == ["head.safetensors"]:
        assert {name.split(".")[1] for name in load_file(lab.folder(planned.levels[0]) / kept[0])} == {"0", "1"}
    else:
        weights = load_file(lab.folder(planned.levels[1]) / kept[0])
        for name, part in ticket_of(lab, planned.levels[0]).mask.values.items():
            assert not weights[name][~part].any() and weights[name][part].all()


def test_a_rewind_that_does_nothing_is_caught_in_any_head(
    lab: Lab, chain: JointChain, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (planned,) = chains_of(lab, tiny_folder, weight_decay=0.01)
    lab.run([planned.levels[0]])

    def moved(model: nn.Module, *_: Any) -> None:
        model.get_parameter("heads.1.classifier.bias").data.add_(1e-3)

    monkeypatch.setattr(steps, "hold", lambda model, anatomy, mask: (hold(model, anatomy, mask), moved(model)))
    with pytest.raises(SearchError, match="rewind did not give back"):
        lab.run([planned.levels[1]])


def test_squad_and_masked_language_modelling_are_among_the_tasks(lab: Lab, tiny_folder: Path) -> None:
    """Runs are as long as the longest alone: here SQuAD's 51 train questions make 4 batches, of running text 3 are asked."""
    plan = plan_study(lab, study_of(tiny_folder, ("cola", "squad", "mlm-wikitext2"), imp_last_level=0.1))
    rounds = [cell for cell in plan.cells.values() if cell.step == "joint_round"]
    assert [cell.settings["round"]["steps"] for cell in rounds] == [4, 4]
    assert [one["data"]["max_length"] for one in rounds[0].settings["tasks"]] == [32, 32, 16]
    lab.run(rounds)
    mask = ticket_of(lab, rounds[0]).mask
    assert mask.counts_by_type()["values"][1] == sum(p.numel() for p in mask.values.values()) and len(mask.values) == 13
    rows = [row for row in collect(lab.store, plan.cells.keys()).chains.levels if row.body_of]
    assert {(row.task, row.metric) for row in rows} == {
        ("cola", "matthews"), ("squad", "answer_f1"), ("mlm-wikitext2", "masked_accuracy")
    }  # fmt: skip
    assert {row.level for row in rows} == {0, 1} and all(0 <= row.value <= 1 or row.metric == "matthews" for row in rows)


# -------------------------------------------------------------------------------------------------------------- bad calls


def test_what_makes_no_chain_of_several_tasks_is_refused_when_planned(lab: Lab, tiny_folder: Path) -> None:
    for tasks, changes, said in (
        (("sst2", "sst2"), {}, "two different tasks"),
        (("sst2",), {}, "two different tasks"),
        (("sst2", "cola"), {"scope": "liu2022"}, "the body they share"),
        (("sst2", "cola"), {"rewind": "step_4"}, "past the end of a round"),
    ):
        with pytest.raises(TombolaError, match=said):
            chains_of(lab, tiny_folder, tasks, **changes)
    one, other = (resolve({**FAST, "rewind": rewind}, (0,), method="imp") for rewind in ("step_0", "none"))
    with pytest.raises(SettingsError, match="have one chain") as caught:
        plan_joint(lab, str(tiny_folder), [("sst2", one), ("cola", other)], (0,))
    assert "rewind" in str(caught.value.problems[0].got)
    with pytest.raises(SettingsError, match="tasks of the study"):
        plan_study(lab, study_of(tiny_folder, ("sst2", "qnli")))
    with pytest.raises(MaskError, match="fit"):  # a mask of one model's head is none of the body's
        HeldValues(Joint(models_of(tiny_folder)), Mask(values={"classifier.weight": torch.zeros(3, 32, dtype=torch.bool)}).values)


def test_the_paper_asks_for_three_tasks_and_variants(lab: Lab, tiny_folder: Path) -> None:
    study = read_study("chen2020")
    assert "multi-task" in study.experiments
    said = study.options_for("multi-task").tasks  # type: ignore[attr-defined]
    assert {len(one) for one in said} == {3} and {name for one in said for name in one} <= set(study.tasks)
    # of the defaults those whose tasks are in the study, on every rung of a ladder
    small = Study(
        name="m", model=str(tiny_folder), tasks=["cola", "sst2", "squad"], seeds=[0], settings=FAST, experiments=["multi-task"],
        ladder="released:corrected",
    )  # fmt: skip
    cells = [cell for cell in plan_study(lab, small).cells.values() if cell.step == "joint_round"]
    assert {STEPS[cell.step].title(cell).split(" · ")[2] for cell in cells} == {"cola + sst2 + squad"}
    assert {cell.settings["search"]["head_rewind"] for cell in cells} == {"carried", "own_init"}
    assert {cell.settings["search"]["rewind_source"] for cell in cells} == {"immutable"}
