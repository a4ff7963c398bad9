"""Held means held: against training loops written out by hand, under all that Trainer can be told to do, in two processes."""

import copy
import gc
import io
import math
import os
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from conftest import tiny_model
from tombola.anatomy import read_anatomy
from tombola.callback import HoldMask
from tombola.errors import MaskError
from tombola.gates import hold
from tombola.held import HeldValues
from tombola.mask import Mask
from tombola.ticket import Ticket, Weights

Masks = dict[str, Tensor]

LAYER = "bert.encoder.layer"
HELD = (  # a matrix of each kind, a bias, an embedding, the head
    f"{LAYER}.0.attention.self.query.weight",
    f"{LAYER}.0.attention.self.value.bias",
    f"{LAYER}.1.attention.output.dense.weight",
    f"{LAYER}.0.intermediate.dense.weight",
    f"{LAYER}.1.output.dense.weight",
    "bert.embeddings.word_embeddings.weight",
    "classifier.weight",
)
ROWS, LENGTH, BATCH, STEPS = 24, 8, 8, 6


def tiny() -> Any:
    """A tiny BERT without dropout, so that a loop by hand sees the same."""
    model = tiny_model("bert")
    for module in model.modules():
        for name in ("p", "dropout_prob", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    return model


def values_for(model: nn.Module, names: tuple[str, ...] = HELD, seed: int = 0, kept: float = 0.3) -> Masks:
    """Random masks of these parameters."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(model.get_parameter(name).shape, generator=generator) < kept for name in names}


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (ROWS, LENGTH), generator=generator)
    labels = torch.randint(0, 2, (ROWS,), generator=generator)
    return [{"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)]


def batch_of(some: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in some]) for name in some[0]}


def removed(model: nn.Module, values: Masks, of: Callable[[nn.Parameter], Tensor | None]) -> Tensor:
    """What `of` says of every removed value, as one vector."""
    found = ((of(model.get_parameter(name)), part) for name, part in values.items())
    return torch.cat([x[~part].float() for x, part in found if x is not None])


def all_zero(model: nn.Module, values: Masks) -> bool:
    return not removed(model, values, lambda p: p.detach()).any()


def one_step(model: Any, optimizer: torch.optim.Optimizer, batch: dict[str, Tensor] | None = None) -> None:
    optimizer.zero_grad()
    model(**(batch or batch_of(rows()[:BATCH]))).loss.backward()
    optimizer.step()


class Witness(transformers.TrainerCallback):
    """The largest removed value, gradient, exp_avg, exp_avg_sq (absolute) at every step, before values are enforced."""

    def __init__(self, values: Masks) -> None:
        self.values, self.seen, self.kept_moved = values, [], []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        self.gradients = removed(given["model"], self.values, lambda p: p.grad)
        self.before = {name: given["model"].get_parameter(name).detach().clone() for name in self.values}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        model, memory = given["model"], given["optimizer"].state
        quantities = [removed(model, self.values, lambda p: p.detach()), self.gradients]
        quantities += [removed(model, self.values, lambda p, key=key: memory[p][key]) for key in ("exp_avg", "exp_avg_sq")]
        self.seen.append([float(x.abs().max()) for x in quantities])
        moved = [(model.get_parameter(name).detach() - self.before[name])[part] for name, part in self.values.items()]
        self.kept_moved.append(float(torch.cat(moved).abs().max()))


def train(model: Any, folder: Path, callbacks: list[Any], *, n: int = ROWS, resume: bool = False, **more: Any) -> Any:
    """Trains with Trainer on rows in random order and returns the trainer."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": BATCH,
        "max_steps": STEPS,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.5,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "logging_steps": 1,
        "seed": 3,
    }
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(**arguments | more),
        train_dataset=rows()[:n],
        data_collator=batch_of,
        callbacks=callbacks,
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=resume or None)
    return trainer


@contextmanager
def batches_seen(model: nn.Module) -> Iterator[list[dict[str, Tensor]]]:
    seen: list[dict[str, Tensor]] = []
    handle = model.register_forward_pre_hook(lambda _, __, given: seen.append(dict(given)), with_kwargs=True)
    yield seen
    handle.remove()


# ------------------------------------------------------------------------------------------------------- under Trainer

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fused": {"optim": "adamw_torch_fused"},
    "bf16 autocast": {"bf16": True},
    "accumulation": {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3},
    "weight decay": {"weight_decay": 0.1},
    "checkpointing": {"gradient_checkpointing": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.filterwarnings("ignore")  # compiling and checkpointing warn of their own affairs
@pytest.mark.parametrize("way", WAYS)
def test_values_gradients_and_moments_are_zero_after_every_step(way: str, tmp_path: Path) -> None:
    model = tiny()
    values = values_for(model)
    witness = Witness(values)
    train(model, tmp_path, [HoldMask(Mask(values=values)), witness], **WAYS[way])
    assert witness.seen == [[0.0] * 4] * STEPS
    assert min(witness.kept_moved) > 1e-4
    assert all_zero(model, values)
    torch._dynamo.reset()


def test_a_dense_model_does_not_stay_zero(tmp_path: Path) -> None:
    model = tiny()
    values = values_for(model)
    HeldValues(model, values).remove()
    assert all_zero(model, values)
    witness = Witness(values)
    train(model, tmp_path, [witness])
    assert all(min(step) > 0 for step in witness.seen)
    assert not all_zero(model, values)


def by_hand(model: Any, values: Masks, batches: list[dict[str, Tensor]], clip: float, decay: float) -> list[float]:
    """AdamW as its paper has it, on the held model: w = (w - step) · mask, the norm over kept values. Returns the norms."""
    masks = {name: values[name].float() if name in values else torch.ones(p.shape) for name, p in model.named_parameters()}
    parameters, norms, eta = dict(model.named_parameters()), [], 1e-2
    m, v = ({name: torch.zeros_like(p) for name, p in parameters.items()} for _ in range(2))
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(torch.where(masks[name] == 1, p, torch.zeros_like(p)))
    for t, batch in enumerate(batches, start=1):
        gradients = torch.autograd.grad(model(**batch).loss, list(parameters.values()))
        kept = {name: g * masks[name] for name, g in zip(parameters, gradients, strict=True)}
        norms.append(math.sqrt(sum(float(g.double().square().sum()) for g in kept.values())))
        with torch.no_grad():
            for name, p in parameters.items():
                g = kept[name] * min(1.0, clip / (norms[-1] + 1e-6))
                m[name] = 0.9 * m[name] + 0.1 * g
                v[name] = 0.999 * v[name] + 0.001 * g * g
                step = eta * (m[name] / (1 - 0.9**t)) / ((v[name] / (1 - 0.999**t)).sqrt() + 1e-8)
                bare = name.endswith("bias") or "LayerNorm" in name
                p.copy_((p - eta * (0.0 if bare else decay) * p - step) * masks[name])
    return norms


def test_kept_values_train_as_in_a_loop_by_hand_and_removed_ones_are_not_in_the_norm(tmp_path: Path) -> None:
    # In fp64: the gradient of a key bias is rounding and no more, and Adam makes whole steps of it.
    model, hand, dense = (tiny().double() for _ in range(3))
    values = values_for(model)
    with batches_seen(model) as seen:
        trainer = train(model, tmp_path, [HoldMask(Mask(values=values))], weight_decay=0.1)
    norms = by_hand(hand, values, seen, clip=0.5, decay=0.1)
    told = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert told == pytest.approx(norms, rel=1e-6)
    assert max(norms) > 0.5  # clipping did something
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, hand.get_parameter(name), rtol=1e-7, atol=1e-9, msg=name)
    HeldValues(dense, values).remove()
    first = torch.autograd.grad(dense(**seen[0]).loss, list(dense.parameters()))
    assert math.sqrt(sum(float(g.square().sum()) for g in first)) > 1.05 * told[0]  # with them it would be another norm


def test_a_resumed_optimizer_forgets_what_it_knew_of_removed_values(tmp_path: Path) -> None:
    dense, model = tiny(), tiny()
    values = values_for(model)
    train(dense, tmp_path, [], max_steps=2, save_strategy="steps", save_steps=2)
    witness = Witness(values)
    train(model, tmp_path, [HoldMask(Mask(values=values)), witness], resume=True)
    assert witness.seen == [[0.0] * 4] * (STEPS - 2)


def test_zeros_are_in_the_saved_weights(tmp_path: Path) -> None:
    model = tiny()
    values = values_for(model)
    trainer = train(model, tmp_path, [HoldMask(Mask(values=values))])
    trainer.save_model(str(tmp_path / "saved"))
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert all_zero(again, values)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    assert not removed(again, values, lambda p: torch.signbit(p.detach())).any()  # +0 and not -0: zeros of one kind of bytes


# ------------------------------------------------------------------------------------------------------- in two processes


def in_each_process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    said = {}
    for name, seed in (("different", rank), ("same", 0)):
        model = tiny().double()
        values = values_for(model, seed=seed)
        witness = Witness(values)
        try:
            train(
                model,
                Path(folder, f"trainer-{rank}"),
                [HoldMask(Mask(values=values)), witness],
                n=BATCH,  # every step sees every row: the order of rows is no matter
                per_device_train_batch_size=BATCH // 2,
                average_tokens_across_devices=False,  # else Trainer doubles the loss of a model that counts no tokens
                ddp_backend="gloo",
                ddp_find_unused_parameters=False,
            )
        except MaskError as error:
            said[name] = str(error)
        else:
            said[name] = witness.seen
    torch.save(said | {"model": model.state_dict()}, Path(folder, f"{rank}.pt"))
    said = {}
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    whole = nn.Linear(4, 4)
    parts: Any = fully_shard(whole, mesh=init_device_mesh("cpu", (2,)))
    for what, how in {
        "values": lambda: HeldValues(parts, {"weight": torch.eye(4) == 0}),
        "callback": lambda: begin(HoldMask(Mask(values={"weight": torch.eye(4) == 0})), parts),
    }.items():
        try:
            how()
        except MaskError as error:
            said[what] = str(error)
    torch.save(said, Path(folder, f"sharded-{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_two_processes_train_as_one_and_refuse_different_masks(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(in_each_process, args=(port, str(tmp_path)), nprocs=2)
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    alone = tiny().double()
    train(alone, tmp_path / "alone", [HoldMask(Mask(values=values_for(alone)))], n=BATCH)
    for found in both:
        assert "rank 0;" in found["different"] and "rank 1" in found["different"] and "different masks" in found["different"]
        assert found["same"] == [[0.0] * 4] * STEPS
        for name, expected in alone.state_dict().items():
            torch.testing.assert_close(found["model"][name], expected, rtol=1e-7, atol=1e-9, msg=name)
    for rank in (0, 1):
        sharded = torch.load(tmp_path / f"sharded-{rank}.pt")
        assert "sharded" in sharded["values"] and "sharded" in sharded["callback"]


# ------------------------------------------------------------------------------------------------------------ the callback


def begin(callback: HoldMask, model: nn.Module, **more: Any) -> None:
    """What Trainer calls before the first step."""
    optimizer = torch.optim.SGD(model.parameters())
    args = SimpleNamespace(device="cpu", deepspeed=None, fsdp=None, **more)
    callback.on_train_begin(args, None, None, model=model, optimizer=optimizer)


def hooks_of(model: nn.Module) -> int:
    modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


def structured() -> Mask:
    return Mask(heads=torch.tensor([[1, 0, 1, 1], [0, 0, 1, 0]]).bool(), mlps=torch.tensor([True, False]))


def with_both() -> Mask:
    name = f"{LAYER}.0.intermediate.dense.weight"
    return structured() & Mask(values=values_for(tiny(), (name,)))


def ticket(mask: Mask) -> Ticket:
    weights = Weights("x", "0" * 32)
    anatomy = read_anatomy(tiny()).summary()
    return Ticket(mask, weights, weights, anatomy, kind="good", scope="heads+mlps", sparsity=0.5)


@pytest.mark.parametrize("bf16", [False, True])
def test_heads_mlps_and_values_of_a_ticket_are_held_together(bf16: bool, tmp_path: Path) -> None:
    model, mask = tiny(), with_both()
    parts = read_anatomy(model).as_values(mask.structured())
    everything = parts | {name: part & parts.get(name, part) for name, part in mask.values.items()}
    witness = Witness(everything)
    train(model, tmp_path, [HoldMask(ticket(mask)), witness], bf16=bf16, weight_decay=0.1)
    assert witness.seen == [[0.0] * 4] * STEPS
    assert all_zero(model, everything)


def test_a_resumed_optimizer_forgets_removed_heads_too() -> None:
    model, mask = tiny(), structured()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    one_step(model, optimizer)
    args = SimpleNamespace(device="cpu", deepspeed=None, fsdp=None)
    HoldMask(mask).on_train_begin(args, None, None, model=model, optimizer=optimizer)
    parts = read_anatomy(model).as_values(mask)
    assert not removed(model, parts, lambda p: optimizer.state[p]["momentum_buffer"]).any()
    one_step(model, optimizer)
    assert all_zero(model, parts)


def test_what_moves_values_otherwise_is_undone_after_each_step() -> None:
    model, callback = tiny(), HoldMask(Mask(values=values_for(tiny())))
    begin(callback, model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)  # as an optimizer may that mixes the rows of a gradient, or an average over steps
    before = copy.deepcopy(model)
    callback.on_step_end(None, None, None)
    assert all_zero(model, values_for(model))
    for name, p in model.named_parameters():
        kept = values_for(model).get(name, torch.ones(p.shape, dtype=torch.bool))
        assert torch.equal(p[kept], before.get_parameter(name)[kept])


@pytest.mark.parametrize("make", [structured, with_both, lambda: Mask(values=values_for(tiny(), HELD[:1]))])
def test_a_model_that_carries_the_mask_gets_no_second_set_of_hooks(make: Callable[[], Mask]) -> None:
    model: Any = tiny()
    model.tombola_gates = hold(model, read_anatomy(model), make())  # as tombola.load does
    before, held = hooks_of(model), HeldValues.on(model)
    for _ in range(2):
        begin(HoldMask(make()), model)
        assert hooks_of(model) == before
        assert HeldValues.on(model) is held


def test_beginning_twice_hangs_the_hooks_once() -> None:
    model, callback = tiny(), HoldMask(with_both())
    begin(callback, model)
    before = hooks_of(model)
    begin(callback, model)
    assert hooks_of(model) == before


def test_another_mask_on_the_model_is_refused() -> None:
    model: Any = tiny()
    model.tombola_gates = hold(model, read_anatomy(model), with_both())
    for other in (structured(), Mask(values=with_both().values), ~structured()):
        with pytest.raises(MaskError, match="another mask"):
            begin(HoldMask(other), model)
    model.tombola_gates.remove()
    begin(HoldMask(structured()), model)


def test_a_mask_that_does_not_fit_is_refused() -> None:
    with pytest.raises(MaskError, match="fit"):
        begin(HoldMask(Mask(values={"no.such": torch.tensor([True, False])})), tiny())
    with pytest.raises(MaskError, match="fit"):
        begin(HoldMask(Mask(mlps=torch.tensor([True, False, True]))), tiny())


@pytest.mark.parametrize("how", ["deepspeed", "fsdp"])
def test_sharded_training_is_refused(how: str) -> None:
    args = SimpleNamespace(**{"device": "cpu", "deepspeed": None, "fsdp": None} | {how: "full_shard"})
    with pytest.raises(MaskError, match="sharded"):
        HoldMask(structured()).on_train_begin(args, None, None, model=tiny(), optimizer=None)


def test_the_model_is_found_inside_what_wraps_it() -> None:
    model = tiny()
    begin(HoldMask(Mask(values=values_for(model))), nn.DataParallel(torch.compile(model, backend="eager")))
    assert HeldValues.on(model) is not None


# ---------------------------------------------------------------------------------------------------- on any model at all


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b = nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(x).tanh())
        return out


def steps(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 3, each: Callable[[], None] = lambda: None) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(n):
        optimizer.zero_grad()
        x = torch.randn(6, 5, generator=generator).to(next(model.parameters()).dtype)
        (model(x) - 1).square().sum().backward()
        optimizer.step()
        each()


MASK = {"a.weight": torch.arange(20).reshape(4, 5) % 3 != 0, "b.bias": torch.tensor([True, False, True])}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=0.05, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
}


@settings(max_examples=40)
@given(st.sampled_from(sorted(OPTIMIZERS)), st.lists(st.booleans(), min_size=23, max_size=23), st.integers(0, 99))
def test_any_optimizer_trains_as_where_each_step_is_masked(kind: str, bits: list[bool], seed: int) -> None:
    values = {"a.weight": torch.tensor(bits[:20]).reshape(4, 5), "b.bias": torch.tensor(bits[20:])}
    held, hand = Net(seed), Net(seed)
    HeldValues(held, values)

    def mask_by_hand() -> None:
        with torch.no_grad():
            for name, part in values.items():
                hand.get_parameter(name)[~part] = 0.0

    for name, part in values.items():
        hand.get_parameter(name).register_post_accumulate_grad_hook(lambda p, part=part: p.grad.__setitem__(~part, 0.0))
    mask_by_hand()
    steps(held, OPTIMIZERS[kind](held.parameters()))
    steps(hand, OPTIMIZERS[kind](hand.parameters()), each=mask_by_hand)
    assert all_zero(held, values) if not all(bits) else True
    for name, p in held.named_parameters():
        assert torch.equal(p, hand.get_parameter(name)), name


def test_an_optimizer_that_has_run_before_is_cleaned() -> None:
    model, rival = Net(), Net()
    for net in (model, rival):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
        steps(net, optimizer)
        held = HeldValues(net, MASK)
        if net is model:
            held.clean(optimizer)
            assert not removed(net, MASK, lambda p, state=optimizer.state: state[p]["momentum_buffer"]).any()
            assert any(optimizer.state[net.b.weight]["momentum_buffer"].flatten().tolist())  # others are left alone
        steps(net, optimizer)
        assert all_zero(net, MASK) == (net is model)
    held.enforce()
    assert all_zero(rival, MASK)


def test_quantised_moments_are_refused() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.a.weight]["codes"] = torch.full((4, 5), 7, dtype=torch.uint8)
    with pytest.raises(MaskError, match="quantised"):
        HeldValues(model, MASK).clean(optimizer)


def test_gradients_of_a_sum_add_up_to_the_masked_whole() -> None:
    """Two backward passes without a step between, and what was there before the mask."""
    model, x = Net(), torch.randn(6, 5)
    model(x).sum().backward()
    HeldValues(model, MASK)
    assert not removed(model, MASK, lambda p: p.grad).any()
    model.zero_grad()
    for _ in range(2):
        model(x).sum().backward()
    assert not removed(model, MASK, lambda p: p.grad).any()
    free = Net()
    free.load_state_dict(model.state_dict())
    (2 * free(x).sum()).backward()
    for name, p in model.named_parameters():
        kept = MASK.get(name, torch.ones(p.shape, dtype=torch.bool))
        assert p.grad is not None and torch.allclose(p.grad, free.get_parameter(name).grad * kept)


def test_an_optimizer_that_steps_within_the_backward_pass_sees_masked_gradients() -> None:
    model = Net()
    for p in model.parameters():
        optimizer = torch.optim.SGD([p], lr=0.1)
        p.register_post_accumulate_grad_hook(lambda p, optimizer=optimizer: optimizer.step())
    HeldValues(model, MASK)  # after them
    model(torch.randn(6, 5)).sum().backward()
    assert all_zero(model, MASK)


def test_gradients_that_share_memory_do_not_lose_more_than_their_own() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4))

        def forward(self) -> Tensor:
            return ((self.a + self.b) * torch.arange(1.0, 5.0)).sum()

    model = Sum()
    HeldValues(model, {"a": torch.tensor([True, False, True, False])})
    model().backward()
    assert model.a.grad is not None and model.a.grad.tolist() == [1, 0, 3, 0]
    assert model.b.grad is not None and model.b.grad.tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_follows_the_model_to_another_type(dtype: torch.dtype) -> None:
    model = Net()
    HeldValues(model, MASK)
    model.to(dtype)
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert all_zero(model, MASK)
    assert model.a.weight.grad is not None and model.a.weight.grad.dtype == dtype


def test_it_follows_the_model_to_another_device() -> None:
    model = Net()
    held = HeldValues(model, MASK)
    model.to("meta")
    held.enforce()
    assert {part.device.type for part in held.values.values()} == {"meta"}


def copied(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded: nn.Module = torch.load(file, weights_only=False)
    return loaded


def reassigned(model: nn.Module) -> nn.Module:
    model.load_state_dict({name: x.clone() for name, x in model.state_dict().items()}, assign=True)
    return model


def converted(model: nn.Module) -> nn.Module:
    before = model.a.weight
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model = model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert model.a.weight is not before
    return model


def thawed(model: nn.Module) -> nn.Module:
    model.requires_grad_(False)
    model(torch.randn(6, 5))
    return model.requires_grad_(True)


@pytest.mark.parametrize("change", [copied, pickled, reassigned, converted, thawed])
def test_it_holds_after_a_change_of_the_model(change: Callable[[nn.Module], nn.Module]) -> None:
    model = Net()
    held = HeldValues(model, MASK)
    other = change(model)
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    assert all_zero(other, MASK)
    own = HeldValues.on(other)
    assert own is not None
    own.remove()
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    assert not all_zero(other, MASK)
    if other is not model:  # each on its own
        assert own is not held
        steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
        assert all_zero(model, MASK)


def test_a_model_frozen_when_it_was_held_is_held_when_it_is_thawed() -> None:
    model = Net().requires_grad_(False)
    HeldValues(model, MASK)
    model.requires_grad_(True)
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert all_zero(model, MASK)


def test_the_original_may_go_while_the_copy_holds_on() -> None:
    model = Net()
    HeldValues(model, MASK)
    other, gone = copy.deepcopy(model), weakref.ref(model)
    steps(model, torch.optim.AdamW(model.parameters()))
    del model
    gc.collect()
    assert gone() is None  # hooks do not keep it alive
    steps(other, torch.optim.AdamW(other.parameters(), lr=0.05))
    assert all_zero(other, MASK)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("ran_before", [False, True])
def test_a_copy_that_runs_compiled_only_is_held(ran_before: bool) -> None:
    model = Net()
    if ran_before:
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        compiled(torch.randn(6, 5))
    HeldValues(model, MASK)
    if not ran_before:
        model = copy.deepcopy(model)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    steps(compiled, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert all_zero(model, MASK)
    torch._dynamo.reset()


def test_a_functional_call_with_other_tensors_is_left_alone() -> None:
    model, x = Net(), torch.randn(6, 5)
    HeldValues(model, MASK)
    other = {name: torch.randn(p.shape, requires_grad=True) for name, p in model.named_parameters()}
    out = torch.func.functional_call(model, other, (x,))
    assert torch.allclose(out, (x @ other["a.weight"].T + other["a.bias"]).tanh() @ other["b.weight"].T + other["b.bias"])
    steps(model, torch.optim.AdamW(model.parameters(), lr=0.05))
    assert all_zero(model, MASK)


def test_holding_costs_a_byte_a_value_and_nothing_where_nothing_goes() -> None:
    model = Net()
    full = torch.ones(3, 4, dtype=torch.bool)
    before = hooks_of(model)
    held = HeldValues(model, MASK | {"b.weight": full})
    stored = [x for x in gc.get_referents(held._masks) if isinstance(x, Tensor)]
    assert sum(x.untyped_storage().nbytes() for x in stored) == 20 + 3
    assert set(held.values) == set(MASK) and all(torch.equal(held.values[name], part) for name, part in MASK.items())
    assert not model.b.weight._backward_hooks
    held.remove()
    held.remove()
    assert hooks_of(model) == before
    with pytest.raises(MaskError, match="no longer"):
        held.enforce()


def test_the_masks_are_copied() -> None:
    model, mask = Net(), {"b.bias": torch.tensor([True, False, True])}
    HeldValues(model, mask)
    mask["b.bias"].logical_not_()
    steps(model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert float(model.b.bias[1].detach()) == 0.0 and bool(model.b.bias.detach()[[0, 2]].all())


def test_every_wrong_entry_is_told_and_nothing_is_done() -> None:
    model = Net()
    model.tied = model.a
    before = copy.deepcopy(model.state_dict())
    wrong = {
        "nothing.weight": torch.tensor([False]),
        "a.weight": torch.zeros(5, 4, dtype=torch.bool),
        "b.bias": torch.zeros(3),
        "tied.bias": torch.zeros(4, dtype=torch.bool),
    }
    with pytest.raises(MaskError) as caught:
        HeldValues(model, wrong)  # type: ignore[arg-type]
    said = str(caught.value)
    assert "4 of 4" in said and "use a.bias" in said and "(5, 4)" in said and "torch.float32" in said and "nothing.weight" in said
    assert hooks_of(model) == 0
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_a_parameter_that_changes_its_shape_or_goes_is_told() -> None:
    model = Net()
    HeldValues(model, MASK)
    model.a = nn.Linear(5, 6)
    with pytest.raises(MaskError, match="fit"):
        model(torch.randn(6, 5))
    model.a = nn.Identity()
    with pytest.raises(MaskError, match="fit"):
        model(torch.randn(6, 5))


def test_one_mask_a_model() -> None:
    model = Net()
    first = HeldValues(model, MASK)
    with pytest.raises(MaskError, match="already"):
        HeldValues(model, MASK)
    assert HeldValues.on(model) is first
    first.remove()
    assert HeldValues.on(model) is None
    HeldValues(model, {name: ~part for name, part in MASK.items()})
