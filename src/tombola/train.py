"""Fine-tuning and retraining on Hugging Face Trainer.

What is ours: the order of the rows (a function of data seed and epoch alone, in batches of similar length), and the
separation of seeds. Trainer's `group_by_length` breaks bit-identical resume from the second epoch on, ignores the data seed
and shuffles what `predict()` returns; so the sampler is our own and evaluation does not go through Trainer at all. A mask
is held by the gates of `tombola.gates.hold`, which a model carries itself: nothing here knows of it.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
from annotated_types import Ge, Gt
from torch.utils.data import DataLoader, Sampler

from tombola.tasks.encode import Encoded, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSettings:
    """How a model is trained. The defaults are those of Prasanna et al. 2020 (section 3 of the reproduction's list)."""

    learning_rate: Annotated[float, Gt(0)] = 2e-5  # AdamW, decaying linearly to 0
    epochs: Annotated[int, Ge(1)] = 3
    batch_size: Annotated[int, Ge(1)] = 32
    warmup_steps: Annotated[int, Ge(0)] = 0
    weight_decay: Annotated[float, Ge(0)] = 0.0
    adam_epsilon: Annotated[float, Gt(0)] = 1e-8
    clip_norm: Annotated[float, Gt(0)] = 1.0


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
    losses: tuple[tuple[int, float], ...]  # (step, mean training loss in nats since the entry before)


class LengthBuckets(Sampler[int]):
    """Row numbers of one epoch: a shuffle by (seed, epoch), in which every `batch_size` neighbours are of similar length.

    Rows are shuffled, cut into pools of 50 batches, sorted by length within a pool, and the batches of all pools are
    shuffled again. Rows that fill no batch come last, so that batches are cut where they were sorted; they are the end of
    the shuffle, of any length: left over from the sorting they would be the longest rows, in every epoch.
    """

    def __init__(self, lengths: list[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = lengths, batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = np.random.default_rng([self.seed, self.epoch])
        order, pool = rng.permutation(len(self.lengths)).tolist(), 50 * self.batch_size
        full = len(order) - len(order) % self.batch_size
        batches: list[list[int]] = []
        for start in range(0, full, pool):
            rows = sorted(order[start : min(start + pool, full)], key=self.lengths.__getitem__)
            batches += [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        yield from (row for i in rng.permutation(len(batches)) for row in batches[i])
        yield from order[full:]


def fine_tune(
    model: "PreTrainedModel",
    train: Encoded,
    settings: TrainSettings,
    seeds: RunSeeds,
    *,
    device: str = "cpu",
    progress: Callable[[float], None] = lambda share: None,
) -> TrainLog:
    """Trains `model` in place on all of `train` and leaves it in eval mode; returns what was done.

    The same arguments give the same weights bit for bit at the same thread count. `progress` is told the share done, in
    [0, 1]. The caller's random state is untouched. The head must have been drawn before (seed `head`, see `load_weights`).
    """
    import transformers

    counts = {"real": 0, "padded": 0}

    def to_batch(rows: list[int]) -> dict[str, torch.Tensor]:
        batch = collate(train, rows)
        counts["real"] += int(batch["attention_mask"].sum())
        counts["padded"] += batch["attention_mask"].numel()
        return batch

    class OwnOrder(transformers.Trainer):  # type: ignore[misc]
        def get_train_dataloader(self) -> DataLoader[Any]:
            sampler = LengthBuckets(train.lengths, settings.batch_size, seeds.data)
            rows = list(range(len(train)))  # the data set is the row numbers; `to_batch` looks them up
            loader: DataLoader[Any] = DataLoader(rows, batch_size=settings.batch_size, sampler=sampler, collate_fn=to_batch)  # type: ignore[arg-type]
            prepared: DataLoader[Any] = self.accelerator.prepare(loader)
            return prepared

    class Report(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress(state.global_step / max(state.max_steps, 1))

    steps = -(-len(train) // settings.batch_size) * settings.epochs
    with tempfile.TemporaryDirectory() as folder, _own_randomness():
        arguments = transformers.TrainingArguments(
            output_dir=folder,
            num_train_epochs=settings.epochs,
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
            save_strategy="no",
            eval_strategy="no",
            logging_strategy="steps",
            logging_steps=max(1, steps // 20),
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # with several, Trainer splits batches over copies that gates do not follow
        trainer = OwnOrder(model=model, args=arguments, train_dataset=range(len(train)), callbacks=[Report()])
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        history = trainer.state.log_history
    model.eval()
    losses = tuple((int(entry["step"]), float(entry["loss"])) for entry in history if "loss" in entry)
    return TrainLog(int(trainer.state.global_step), counts["real"], counts["padded"], losses)


@contextmanager
def _own_randomness() -> Iterator[None]:
    """Gives the global generators back as they were: Trainer seeds all of them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - the generator others may be using
    with torch.random.fork_rng():
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002
