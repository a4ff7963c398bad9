"""Fine-tuning and retraining on Hugging Face Trainer.

What is ours: the order of the rows (`tombola.order`: a function of data seed and epoch alone, in batches of similar length),
and the separation of seeds. Trainer's `group_by_length` breaks bit-identical resume from the second epoch on, ignores the
data seed and shuffles what `predict()` returns; so the sampler is our own and evaluation does not go through Trainer at all.
A mask is held by the gates of `tombola.gates.hold`, which a model carries itself: nothing here knows of it.

A run that is given a folder for checkpoints can be killed at any moment: the same call goes on from the last one, and
ends with the same bits. What makes it so: the order of rows is a function of the epoch, token counts are a function of
that order (rows already trained on are skipped unread), saves come right after a log (`tombola.checkpoint` says why), and
Trainer brings back weights, moments, schedule and random state.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch import nn
from torch.utils.data import DataLoader

from tombola.checkpoint import keep_checkpoints, last_checkpoint
from tombola.errors import TombolaError
from tombola.gates import Gates
from tombola.held import HeldValues
from tombola.joint import Joint
from tombola.mask import Mask
from tombola.order import Several, Stretch, loader, tokens_seen
from tombola.tasks.encode import Encoded

if TYPE_CHECKING:
    from transformers import PreTrainedModel


PRECISION = "ACCELERATE_MIXED_PRECISION"
# Of a config: where it came from, and what a first forward pass writes into it
NO_PART = ("_name_or_path", "transformers_version", "problem_type", "dtype")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a model is trained. The defaults are those of Prasanna et al. 2020 (section 3 of the reproduction's list)."""

    learning_rate: Annotated[float, Gt(0)] = 2e-5  # AdamW, decaying linearly to 0
    epochs: Annotated[int, Ge(0)] = 3  # 0: the model as it comes; with a new head its answers are chance
    steps: Annotated[int, Ge(1)] | None = None  # of the optimizer, in place of epochs: of running text an epoch can be long
    batch_size: Annotated[int, Ge(1)] = 32
    warmup_steps: Annotated[int, Ge(0)] = 0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    clip_norm: Annotated[float, Gt(0)] = 1.0
    # bf16: matrix products of training in bfloat16 (autocast), weights and moments in float32; all else is always float32
    precision: Literal["fp32", "bf16"] = "fp32"

    def plain(self) -> dict[str, Any]:
        """As JSON, by the names of the fields; what came later only where it is set, so that older runs keep their names."""
        later = {"steps": None, "precision": "fp32"}
        return {name: value for name, value in asdict(self).items() if name not in later or value != later[name]}

    def steps_of(self, rows: int) -> int:
        """Optimizer steps of a whole run on so many rows."""
        return self.steps if self.steps is not None else -(-rows // self.batch_size) * self.epochs


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What a run does otherwise than to minimise the model's own loss."""

    # (logits, labels, numbers of the rows in `train`, share of training done in [0, 1]) → the loss of the batch
    loss: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor] | None = None
    before_step: Callable[[int, float], object] = lambda step, share: None  # step from 0, share done before it
    said: Mapping[str, Any] = field(default_factory=dict)  # all that these depend on, as JSON: a part of what a checkpoint is for


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSeeds:
    """The four seeds of a run. A run seed n stands for RunSeeds(head=n, data=n, dropout=n, mask=n)."""

    head: int  # initial values of the task head
    data: int  # order of the train rows
    dropout: int
    mask: int  # draws of controls


@dataclass(frozen=True, slots=True)
class TrainLog:
    """What a training run did. Tokens are per run, over all epochs."""

    steps: int
    tokens: int  # real tokens seen
    padded_tokens: int  # tokens computed, padding included
    losses: tuple[tuple[int, float], ...]  # (step, mean loss since the entry before): nats, or of a regression squared units


def fine_tune(
    model: "PreTrainedModel | Joint",
    train: Encoded | Several,
    settings: TrainSettings,
    seeds: RunSeeds,
    *,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
    checkpoints: Path | None = None,
    every_seconds: float = 60.0,
    ours: Callable[[], object] = lambda: None,
    stretch: Stretch | None = None,
    recipe: Recipe | None = None,
) -> TrainLog:
    """Trains `model` in place on all of `train` and leaves it in eval mode; returns what was done.

    The same arguments give the same weights bit for bit at the same thread count. `progress` is told the share done, in
    [0, 1]. The caller's random state is untouched. The head must have been drawn before (seed `head`, see `load_weights`).

    checkpoints     a folder for what a killed run can go on from, made when missing; the same call on the same starting
                    model then ends with the same weights and log, bit for bit. One checkpoint stays there, two while one
                    is being written: weights and both moments, three times the size of the model each. Removing the
                    folder once the result is safe is the caller's part.
    every_seconds   how long after a save the next one is due. It comes with the next log, of which a run has about 20;
                    0 saves at every log.
    ours            raises when `checkpoints` belongs to another process by now: asked before each save, and before it counts.
    stretch         a part of the run instead of all of it, with a new optimizer: `epochs` and `steps` then play no part.
    recipe          another loss than the model's own, and what is done before each step.

    With rows of several tasks the model is a `Joint`, the run a stretch, and `batch_size` plays no part.

    Raises: TombolaError when the folder holds checkpoints of a run with other settings, seeds, rows, starting weights,
    threads, device or versions (naming each), damaged ones (naming each file), or somebody else's.
    """
    own_loss = None if recipe is None else recipe.loss
    if isinstance(train, Several) and (stretch is None or own_loss is not None or not isinstance(model, Joint)):
        raise TombolaError(
            "tasks are trained on together for a number of steps, by their own losses, on one body",
            got=f"{type(model).__name__}, {'no stretch' if stretch is None else 'a stretch'}, loss {own_loss}",
            expected="a Joint and a stretch, without another loss",
        )
    if isinstance(train, Encoded) and stretch is None and (settings.steps is not None or train.masking is not None):
        steps = settings.steps_of(len(train))
        stretch = Stretch(steps=steps, schedule_steps=steps) if steps else None
    if stretch is None and settings.epochs == 0:
        model.eval()
        return TrainLog(0, 0, 0, ())
    import transformers
    from safetensors.torch import save_model

    class OwnOrder(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader[Any]:
            batches = loader(train, settings.batch_size, seeds.data, stretch, numbered=own_loss is not None)
            ready: DataLoader[Any] = self.accelerator.prepare(batches)
            return ready

        def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if own_loss is None:
                return super().compute_loss(model, inputs, *args, **kwargs)
            rows, labels = inputs.pop("rows"), inputs.pop("labels")
            return own_loss(model(**inputs).logits, labels, rows, self.state.global_step / max(self.state.max_steps, 1))

        def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
            if stretch is None:
                return super().create_scheduler(num_training_steps, optimizer)
            factor = partial(_falling, stretch, settings.warmup_steps)
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer if optimizer is None else optimizer, factor)
            self._created_lr_scheduler = True
            return self.lr_scheduler

        def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
            # `save_pretrained` may write other names than the model has; on resume these would be passed over unloaded.
            assert output_dir is not None
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            save_model(self.model, str(Path(output_dir) / "model.safetensors"))

        def _issue_warnings_after_load(self, load_result: Any) -> None:
            shared = {name for name in load_result.missing_keys if _is_shared(self.model, name)}
            if load_result.unexpected_keys or set(load_result.missing_keys) - shared:
                raise TombolaError("the weights of a checkpoint do not fit the model", got=str(load_result))

    class Report(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if recipe is not None:
                recipe.before_step(state.global_step, state.global_step / max(state.max_steps, 1))

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step / max(state.max_steps, 1))

    callbacks, resumed = [Report()], None
    if checkpoints is not None:
        run = _identity(model, train, settings, seeds, device) | ({} if stretch is None else {"stretch": asdict(stretch)})
        run |= {} if recipe is None else {"recipe": dict(recipe.said)}
        resumed = last_checkpoint(checkpoints, run)
        callbacks.append(keep_checkpoints(checkpoints, run, every_seconds, resumed, ours))
    n = 0 if isinstance(train, Several) else len(train)
    steps = stretch.steps if stretch else -(-n // settings.batch_size) * settings.epochs
    with nullcontext(checkpoints) if checkpoints else tempfile.TemporaryDirectory() as folder, _own_surroundings():
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            num_train_epochs=settings.epochs,
            max_steps=stretch.steps if stretch else -1,
            per_device_train_batch_size=settings.batch_size,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="linear",
            warmup_steps=settings.warmup_steps,
            weight_decay=settings.weight_decay,
            adam_epsilon=settings.adam_epsilon,
            max_grad_norm=settings.clip_norm,
            optim="adamw_torch_fused",
            seed=seeds.dropout,
            data_seed=seeds.data,
            use_cpu=device == "cpu",
            bf16=settings.precision == "bf16",
            save_strategy="no",  # but for what `keep_checkpoints` asks for
            eval_strategy="no",
            logging_strategy="steps",
            logging_steps=max(1, steps // 20),
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, Trainer splits batches over copies that gates do not follow
        trainer = OwnOrder(model=model, args=arguments, train_dataset=range(n), callbacks=callbacks)
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        history = trainer.state.log_history
    model.eval()
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)
    return TrainLog(
        int(trainer.state.global_step), *tokens_seen(train, settings.batch_size, settings.epochs, seeds.data, stretch), losses
    )


def _falling(stretch: Stretch, warmup: int, step: int) -> float:
    """The learning rate of a step over its peak: up through the warm-up and then linearly down to 0, as a whole run has it."""
    at = stretch.schedule_from + step
    if at < warmup:
        return at / max(1, warmup)
    return max(0.0, (stretch.schedule_steps - at) / max(1, stretch.schedule_steps - warmup))


def _identity(
    model: "PreTrainedModel | Joint", train: Encoded | Several, settings: TrainSettings, seeds: RunSeeds, device: str
) -> dict[str, Any]:
    """All that the bits of a run depend on, as JSON: what a checkpoint must have been made with to be gone on from."""
    start = hashlib.sha256(type(model).__name__.encode())
    for name, value in sorted(model.state_dict().items()):
        start.update(repr((name, value.dtype, tuple(value.shape))).encode())
        start.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    gates, held = getattr(model, "tombola_gates", None), HeldValues.on(model)
    mask = (gates.mask if isinstance(gates, Gates) else Mask()) & Mask(values={} if held is None else held.values)
    config = {name: value for name, value in model.config.to_dict().items() if name not in NO_PART}
    return {
        "settings": settings.plain(),
        "seeds": asdict(seeds),
        "config": hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode()).hexdigest()[:32],
        "mask": None if mask.removes_nothing else mask.digest()[:32],
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "rows": _rows_digest(train)
        if isinstance(train, Encoded)
        else {name: [_rows_digest(of), train.batch_sizes[name]] for name, of in train.rows.items()},
        "starting weights": start.hexdigest()[:32],
        "threads": torch.get_num_threads(),
        "device": device,
        # the kind of processor decides which kernels run, and those round in their own ways
        "processor": torch.backends.cpu.get_cpu_capability() if device == "cpu" else torch.cuda.get_device_name(device),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate")},
    }


def _rows_digest(train: Encoded) -> str:
    rows = hashlib.sha256(repr((sorted(train.pad.items()), train.pad_to)).encode())
    for name, row, label in zip(train.ids, train.inputs, train.labels, strict=True):
        rows.update(repr((name, sorted(row.items()), label)).encode())
    if train.masking is not None or train.spans is not None:
        rows.update(repr((train.masking, None if train.spans is None else [one.label for one in train.spans.windows])).encode())
    if train.replies is not None:
        rows.update(repr(train.replies).encode())
    return rows.hexdigest()[:32]


def _is_shared(model: nn.Module, name: str) -> bool:
    """Whether a tensor of the state is the same memory as one of another name, of which `save_model` writes but one."""
    state = model.state_dict()
    return any(other != name and state[other].data_ptr() == state[name].data_ptr() for other in state)


@contextmanager
def _own_surroundings() -> Iterator[None]:
    """Gives the global generators back as they were, since Trainer seeds all of them; and hides accelerate's precision, which it
    would obey and in some versions leaves behind for the next training."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator others may be using
    precision = os.environ.pop(PRECISION, None)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
            os.environ.pop(PRECISION, None)
            if precision is not None:
                os.environ[PRECISION] = precision
