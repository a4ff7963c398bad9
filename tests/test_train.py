"""Training against a plain PyTorch loop; the order of rows, the seeds, and what is left behind."""

import copy
import math
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from conftest import TINY, sentiment_rows, tiny_model
from tombola.anatomy import read_anatomy
from tombola.gates import hold
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.order import LengthBuckets
from tombola.tasks.base import Rows
from tombola.tasks.encode import Encoded, collate, encode
from tombola.train import RunSeeds, TrainLog, TrainSettings, fine_tune

SEEDS = RunSeeds(head=1, data=2, dropout=3, mask=4)
FAST = TrainSettings(learning_rate=1e-3, epochs=2, batch_size=8)
N = 30  # three batches of 8 and one of 6


def random_rows(n: int = N, family: str = "bert", seed: int = 0) -> Encoded:
    """Rows of 3 to 14 random tokens, no two of them alike, with random labels."""
    rng = np.random.default_rng(seed)
    inputs = tuple({"input_ids": tuple(int(t) for t in rng.integers(5, 60, rng.integers(3, 15)))} for _ in range(n))
    labels = tuple(int(label) for label in rng.integers(0, 2, n))
    return Encoded(tuple(f"row:{i}" for i in range(n)), inputs, labels, 0, {"input_ids": TINY[family].get("pad_token_id", 0)})


def without_dropout(model: Any) -> Any:
    """The same model, in which training computes what evaluation computes."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    batch = collate(random_rows(4), [0, 1, 2, 3])
    model.train()
    a, b = model(**batch).logits, model(**batch).logits
    assert torch.equal(a, b)
    return model.eval()


def same_weights(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def trained(model: Any, rows: Encoded, seeds: RunSeeds = SEEDS, how: TrainSettings = FAST) -> Any:
    """A copy of the model, trained."""
    model = copy.deepcopy(model)
    fine_tune(model, rows, how, seeds)
    return model


@contextmanager
def rows_seen(model: Any, rows: Encoded) -> Iterator[list[list[int]]]:
    """The row numbers of each batch the model is called on in training, told by their tokens."""
    number = {row["input_ids"]: i for i, row in enumerate(rows.inputs)}
    seen: list[list[int]] = []

    def hook(_: Any, __: Any, inputs: dict[str, Tensor]) -> None:
        if model.training:
            lengths = inputs["attention_mask"].sum(1).tolist()
            seen.append([number[tuple(ids[:n])] for ids, n in zip(inputs["input_ids"].tolist(), lengths, strict=True)])

    handle = model.register_forward_pre_hook(hook, with_kwargs=True)
    yield seen
    handle.remove()


def orders(lengths: list[int], batch_size: int, seed: int, epochs: int) -> list[list[int]]:
    sampler, found = LengthBuckets(lengths, batch_size, seed), []
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        found.append(list(sampler))
    return found


def cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]


# LengthBuckets


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 2**32 - 1), st.integers(0, 9))
def test_an_epoch_is_a_permutation_of_all_rows(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    sampler = LengthBuckets(lengths, batch_size, seed)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_order_is_a_function_of_seed_and_epoch_alone() -> None:
    lengths = [len(row["input_ids"]) for row in random_rows(200).inputs]
    first = orders(lengths, 8, seed=5, epochs=4)
    torch.manual_seed(99)
    random.seed(99)
    sampler = LengthBuckets(lengths, 8, 5)
    for epoch in (3, 1, 3, 0):  # in any order and more than once
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler) == first[epoch]
    everything = [tuple(order) for seed in range(5) for order in orders(lengths, 8, seed, 4)]
    assert len(set(everything)) == 20


def test_batches_are_cut_where_rows_were_sorted() -> None:
    lengths = [random.Random(i).randint(1, 60) for i in range(50 * 4 + 3)]  # one pool of 50 batches of 4, and 3 rows over
    *batches, rest = cut(orders(lengths, 4, seed=1, epochs=1)[0], 4)
    spans = sorted((min(lengths[row] for row in batch), max(lengths[row] for row in batch)) for batch in batches)
    assert all(high <= low for (_, high), (low, _) in pairwise(spans))
    assert len(rest) == 3
    starts = [min(lengths[row] for row in batch) for batch in batches]
    assert starts != sorted(starts)  # the batches themselves are shuffled


def test_padding_is_small_where_a_plain_shuffle_pads_by_half() -> None:
    lengths = [random.Random(i).randint(5, 60) for i in range(5000)]

    def padding(order: list[int]) -> float:
        return sum(len(b) * max(lengths[row] for row in b) for b in cut(order, 32)) / sum(lengths) - 1

    for order in orders(lengths, 32, seed=0, epochs=3):
        assert padding(order) < 0.04
        assert padding(random.Random(0).sample(order, len(order))) > 0.5


def test_rows_that_fill_no_batch_are_of_any_length_and_other_rows_each_epoch() -> None:
    lengths = list(range(100))  # row = length; 12 batches of 8 and 4 rows over
    last = [row for order in orders(lengths, 8, seed=0, epochs=300) for row in order[-4:]]
    assert set(last) == set(range(100))
    assert np.mean(last) == pytest.approx(49.5, abs=4 * 28.9 / math.sqrt(1200))


# what is trained on


def test_each_epoch_trains_on_the_rows_of_its_own_order() -> None:
    model, rows = tiny_model("bert"), random_rows()
    with rows_seen(model, rows) as seen:
        log = fine_tune(model, rows, TrainSettings(epochs=3, batch_size=8), SEEDS)
    expected = orders(rows.lengths, 8, SEEDS.data, epochs=3)
    assert seen == [batch for order in expected for batch in cut(order, 8)]
    assert expected[0] != expected[1] != expected[2]
    assert log.steps == len(seen) == 12


def test_log_counts_steps_tokens_and_padding() -> None:
    rows = random_rows()
    log = fine_tune(tiny_model("bert"), rows, FAST, SEEDS)
    padded = sum(
        len(batch) * max(rows.lengths[row] for row in batch)
        for order in orders(rows.lengths, 8, SEEDS.data, epochs=2)
        for batch in cut(order, 8)
    )
    assert (log.steps, log.tokens, log.padded_tokens) == (8, 2 * sum(rows.lengths), padded)
    assert [step for step, _ in log.losses] == list(range(1, 9))


def test_progress_rises_to_one() -> None:
    told: list[float] = []
    fine_tune(tiny_model("bert"), random_rows(), FAST, SEEDS, progress=told.append)
    assert told == [step / 8 for step in range(1, 9)]


# the numbers


def plain_loop(model: Any, rows: Encoded, how: TrainSettings, seed: int) -> tuple[list[float], list[float]]:
    """Trains in place as the papers say, without Trainer; returns losses and gradient norms by step."""
    decayed = {name for name, _ in model.named_parameters() if not name.endswith("bias") and "norm" not in name.lower()}
    groups: list[dict[str, Any]] = [
        {"params": [p for name, p in model.named_parameters() if (name in decayed) == decays], "weight_decay": amount}
        for decays, amount in ((True, how.weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW(groups, lr=how.learning_rate, betas=(0.9, 0.999), eps=how.adam_epsilon, foreach=False)
    batches = [batch for order in orders(rows.lengths, how.batch_size, seed, how.epochs) for batch in cut(order, how.batch_size)]
    losses, norms = [], []
    model.train()
    for step, batch in enumerate(batches):
        warm, left = step / max(how.warmup_steps, 1), (len(batches) - step) / (len(batches) - how.warmup_steps)
        for group in optimizer.param_groups:
            group["lr"] = how.learning_rate * (warm if step < how.warmup_steps else left)
        inputs = collate(rows, batch)
        labels = inputs.pop("labels")
        logits = model(**inputs).logits
        loss = (torch.logsumexp(logits, 1) - logits[torch.arange(len(batch)), labels]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for parameter in model.parameters():
            parameter.grad *= min(1.0, how.clip_norm / (float(norm) + 1e-6))
        optimizer.step()
        losses.append(loss.item())
        norms.append(float(norm))
    model.eval()
    return losses, norms


WAYS = {
    "defaults": TrainSettings(batch_size=8),
    "large steps": FAST,
    "everything": TrainSettings(
        learning_rate=1e-3, epochs=2, batch_size=8, warmup_steps=3, weight_decay=0.3, adam_epsilon=1e-3, clip_norm=0.2
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_weights_are_those_of_a_plain_adamw_loop(family: str, way: str) -> None:
    # fp64: where a gradient is zero but for rounding (key biases), Adam makes of the rounding a full step
    start, rows = without_dropout(tiny_model(family).double()), random_rows(N, family)
    plain, ours = copy.deepcopy(start), copy.deepcopy(start)
    losses, norms = plain_loop(plain, rows, WAYS[way], SEEDS.data)
    log = fine_tune(ours, rows, WAYS[way], SEEDS)
    if way == "everything":
        assert sum(norm > WAYS[way].clip_norm for norm in norms) > len(norms) / 2  # clipping acted
    apart = [(a - b).abs().max() for a, b in zip(plain.state_dict().values(), ours.state_dict().values(), strict=True)]
    moved = [(a - b).abs().max() for a, b in zip(plain.state_dict().values(), start.state_dict().values(), strict=True)]
    assert float(max(apart)) < 1e-6
    assert float(max(moved)) > 1e-4
    assert [loss for _, loss in log.losses] == pytest.approx(losses, abs=1e-4)


# seeds and state


def test_same_arguments_give_the_same_weights_whatever_the_global_generators_hold() -> None:
    start, rows, found = tiny_model("bert"), random_rows(), []
    for ambient in (0, 1):
        torch.manual_seed(ambient)
        random.seed(ambient)
        found.append(trained(start, rows))
    assert same_weights(*found)
    assert not same_weights(found[0], start)


def test_data_seed_alone_changes_the_order_and_dropout_seed_alone_does_not() -> None:
    rows, seen = random_rows(), []
    for seeds in (SEEDS, RunSeeds(head=1, data=9, dropout=3, mask=4), RunSeeds(head=1, data=2, dropout=9, mask=4)):
        model = tiny_model("bert")
        with rows_seen(model, rows) as batches:
            fine_tune(model, rows, FAST, seeds)
        seen.append(batches)
    assert seen[0] != seen[1]
    assert seen[0] == seen[2]


def test_dropout_seed_changes_weights_through_dropout_only() -> None:
    start, calm, rows = tiny_model("bert"), without_dropout(tiny_model("bert")), random_rows()
    other = RunSeeds(head=1, data=2, dropout=9, mask=4)
    assert not same_weights(trained(start, rows), trained(start, rows, other))
    assert same_weights(trained(calm, rows), trained(calm, rows, other))


def test_head_and_mask_seeds_play_no_part_in_training() -> None:
    start, rows = tiny_model("bert"), random_rows()
    assert same_weights(trained(start, rows), trained(start, rows, RunSeeds(head=8, data=2, dropout=3, mask=9)))


def test_head_seed_draws_the_head_and_nothing_else(tiny_folder: Path) -> None:
    one, same, other = (load_weights(tiny_folder, ("no", "yes"), head_seed=seed).state_dict() for seed in (5, 5, 6))
    assert all(torch.equal(one[name], same[name]) for name in one)
    differing = {name for name in one if not torch.equal(one[name], other[name])}
    assert "classifier.weight" in differing
    assert all(name.startswith(("classifier", "bert.pooler")) for name in differing)


def test_callers_random_state_is_left_as_it_was() -> None:
    model, rows = tiny_model("bert"), random_rows()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    fine_tune(model, rows, FAST, SEEDS)
    assert torch.equal(torch.get_rng_state(), torch.manual_seed(1).get_state())
    assert np.random.random() == np.random.RandomState(1).random()  # noqa: NPY002
    # The type checks of the test run look at one item of a list, chosen by `random`: it may have moved on, and no more.
    stream = random.Random(1)
    assert random.getrandbits(32) in {stream.getrandbits(32) for _ in range(100)}


# results


@pytest.fixture(scope="module")
def learned(tiny_folder: Path) -> tuple[Any, Encoded, TrainLog]:
    """A model that learned conftest's sentiment: (model, held-out rows, log)."""
    import transformers

    def rows(n: int, seed: int) -> Encoded:
        said = sentiment_rows(n, seed)
        return encode(
            tokenizer, Rows(tuple(map(str, range(n))), tuple((r["sentence"],) for r in said), tuple(r["label"] for r in said)), 32
        )

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    model = load_weights(tiny_folder, ("negative", "positive"), head_seed=0)
    return model, rows(80, 2), fine_tune(model, rows(400, 1), TrainSettings(learning_rate=5e-3, batch_size=16), SEEDS)


def test_loss_goes_down_and_new_rows_are_answered(learned: tuple[Any, Encoded, TrainLog]) -> None:
    model, held_out, log = learned
    losses = [loss for _, loss in log.losses]
    assert losses[0] > 0.6
    assert losses[-1] < 0.2
    with torch.no_grad():
        inputs = collate(held_out, range(len(held_out)))
        assert int((model(**inputs).logits.argmax(-1) == inputs["labels"]).sum()) >= 76


def test_log_has_about_twenty_losses_each_the_mean_since_the_one_before(learned: tuple[Any, Encoded, TrainLog]) -> None:
    _, _, log = learned
    assert log.steps == 75  # 3 epochs of 25 batches: every 75 // 20 = 3 steps
    assert [step for step, _ in log.losses] == list(range(3, 76, 3))


def test_model_is_left_in_eval_mode_with_its_parameters_trainable() -> None:
    model = tiny_model("bert").train()
    fine_tune(model, random_rows(), FAST, SEEDS)
    assert not any(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_held_values_are_exactly_zero_after_training_and_the_others_moved() -> None:
    model, rows = tiny_model("bert"), random_rows()
    kept_heads, kept_mlps = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0]]).bool(), torch.tensor([True, False])
    anatomy = read_anatomy(model)
    hold(model, anatomy, Mask(heads=kept_heads, mlps=kept_mlps))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    fine_tune(model, rows, TrainSettings(learning_rate=1e-3, epochs=2, batch_size=8, weight_decay=0.1), SEEDS)
    after = dict(model.named_parameters())

    def look(name: str, kept: Tensor) -> None:
        value, kept = after[name].detach(), kept.expand(after[name].shape)
        assert not value[~kept].any(), name
        assert torch.count_nonzero((value != before[name])[kept]) >= 0.99 * int(kept.sum()), name

    for layer, heads, mlp in zip(anatomy.layers, kept_heads, kept_mlps, strict=True):
        channels = heads.repeat_interleave(layer.attention.d_head)
        look(f"{layer.attention.o.path}.weight", channels)
        for projection in (layer.attention.q, layer.attention.v):
            look(f"{projection.path}.weight", channels[:, None])
        for part in ("weight", "bias"):
            look(f"{layer.mlp.out.path}.{part}", mlp)


def test_bf16_is_of_its_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("bert"), random_rows()
    half = replace(FAST, precision="bf16")
    full = trained(model, rows)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # which Trainer would obey
    rounded = trained(model, rows, how=half)
    assert same_weights(trained(model, rows), full)  # neither that variable nor the training before changes anything
    assert os.environ["ACCELERATE_MIXED_PRECISION"] == "bf16"
    assert same_weights(trained(model, rows, how=half), rounded)
    start, float32, bfloat16 = (torch.nn.utils.parameters_to_vector(one.parameters()).detach() for one in (model, full, rounded))
    assert 0 < (float32 - bfloat16).norm() < (float32 - start).norm()
    assert bfloat16.dtype == torch.float32


def test_runs_older_than_a_setting_keep_their_names() -> None:
    assert FAST.plain().keys() & {"steps", "precision"} == set()
    assert replace(FAST, precision="bf16", steps=3).plain().items() >= {"precision": "bf16", "steps": 3}.items()
