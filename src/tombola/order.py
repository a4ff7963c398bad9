"""The order of rows in training: which rows come in which batch, a function of seed and epoch alone.

`loader` gives the batches of a run, of a stretch of one, or of several tasks at once; `tokens_seen` counts what they hold without
reading them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count, islice
from typing import Annotated, Any

import numpy as np
import torch
from annotated_types import Ge
from torch.utils.data import DataLoader, Dataset, Sampler

from tombola.tasks.encode import Encoded, collate


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """A part of a run, in optimizer steps: how many, and where they begin in the endless order of rows and on the schedule.

    The order of rows is epoch after epoch, as a whole run has it. A whole run of one epoch is the stretch from 0 bit for bit; of
    more epochs it is so without dropout, whose draws a loader shifts each time that an epoch begins.
    """

    steps: Annotated[int, Ge(1)]
    schedule_steps: Annotated[int, Ge(1)]  # the learning rate falls to 0 over so many
    rows_from: Annotated[int, Ge(0)] = 0
    schedule_from: Annotated[int, Ge(0)] = 0


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


class Stream(Sampler[list[int]]):
    """The batches of a stretch: those of `LengthBuckets`, epoch after epoch. An item is epoch · n + row, of n rows."""

    drop_last = False

    def __init__(self, lengths: list[int], batch_size: int, seed: int, stretch: Stretch) -> None:
        self.lengths, self.batch_size, self.seed, self.stretch = lengths, batch_size, seed, stretch

    def __len__(self) -> int:
        return self.stretch.steps

    def __iter__(self) -> Iterator[list[int]]:
        return islice(self._endless(), self.stretch.steps)

    def _endless(self) -> Iterator[list[int]]:
        n = len(self.lengths)
        per_epoch, sampler = -(-n // self.batch_size), LengthBuckets(self.lengths, self.batch_size, self.seed)
        first, skipped = divmod(self.stretch.rows_from, per_epoch)
        for epoch in count(first):
            sampler.set_epoch(epoch)
            order = [epoch * n + row for row in sampler]
            batches = [order[start : start + self.batch_size] for start in range(0, n, self.batch_size)]
            yield from batches[skipped if epoch == first else 0 :]


@dataclass(frozen=True, slots=True)
class Several:
    """Rows of several tasks that one run trains on, of `tombola.joint.Joint`: a step takes a batch of each, so that a task whose
    rows are fewer begins its next epoch before the others have ended theirs. Each sees its rows in the order that it would see
    them in alone.
    """

    rows: Mapping[str, Encoded]  # by the names that the model has for its tasks
    batch_sizes: Mapping[str, int]

    def streams(self, seed: int, stretch: Stretch) -> dict[str, Stream]:
        """The batches of each task."""
        return {name: Stream(of.computed_lengths, self.batch_sizes[name], seed, stretch) for name, of in self.rows.items()}


class Together(Sampler[list[tuple[str, list[int]]]]):
    """Batch by batch of several streams of one length: (task, items) of each."""

    drop_last = False

    def __init__(self, streams: Mapping[str, Stream]) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return min(len(one) for one in self.streams.values())

    def __iter__(self) -> Iterator[list[tuple[str, list[int]]]]:
        for together in zip(*self.streams.values(), strict=True):
            yield list(zip(self.streams, together, strict=True))


class _AsAsked(Dataset[Any]):
    """Its item of anything is that."""

    def __getitem__(self, item: Any) -> Any:
        return item


def loader(
    train: Encoded | Several, batch_size: int, seed: int, stretch: Stretch | None = None, *, numbered: bool = False
) -> DataLoader[Any]:
    """The batches of a run, `numbered` with the numbers of their rows; of several tasks {"batches": task → batch}."""
    if isinstance(train, Several):
        assert stretch is not None
        of = train.rows
        together = Together(train.streams(seed, stretch))

        def of_each(items: list[tuple[str, list[int]]]) -> dict[str, Any]:
            return {"batches": {name: _batch(of[name], mine, seed, stretch, False) for name, mine in items}}

        return DataLoader(_AsAsked(), batch_sampler=together, collate_fn=of_each)

    def to_batch(items: list[int]) -> dict[str, torch.Tensor]:
        return _batch(train, items, seed, stretch, numbered)

    if stretch is not None:
        stream = Stream(train.computed_lengths, batch_size, seed, stretch)
        return DataLoader(_AsAsked(), batch_sampler=stream, collate_fn=to_batch)
    sampler = LengthBuckets(train.computed_lengths, batch_size, seed)
    rows = list(range(len(train)))  # the data set is the row numbers; `_batch` looks them up
    return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=to_batch)  # type: ignore[arg-type]


def _batch(train: Encoded, items: list[int], seed: int, stretch: Stretch | None, numbered: bool) -> dict[str, torch.Tensor]:
    rows = [item % len(train) for item in items]
    batch = collate(train, rows, drawn=None if stretch is None else (seed, items[0] // len(train)))
    return batch | {"rows": torch.tensor(rows)} if numbered else batch


def tokens_seen(
    train: Encoded | Several, batch_size: int, epochs: int, seed: int, stretch: Stretch | None = None
) -> tuple[int, int]:
    """(real, padded) tokens of a whole run: each batch of `LengthBuckets` is as long as its longest row."""
    if isinstance(train, Several):
        assert stretch is not None
        each = [_stretch_tokens(train.rows[name], stream) for name, stream in train.streams(seed, stretch).items()]
        return sum(real for real, _ in each), sum(padded for _, padded in each)
    lengths = train.computed_lengths
    if stretch is not None:
        return _stretch_tokens(train, Stream(lengths, batch_size, seed, stretch))
    sampler, padded = LengthBuckets(lengths, batch_size, seed), 0
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        order = list(sampler)
        batches = (order[start : start + batch_size] for start in range(0, len(order), batch_size))
        padded += sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
    return epochs * sum(train.lengths), padded


def _stretch_tokens(train: Encoded, stream: Stream) -> tuple[int, int]:
    lengths, real = train.computed_lengths, train.lengths
    batches = [[item % len(train) for item in one] for one in stream]
    return sum(real[i] for one in batches for i in one), sum(len(one) * max(lengths[i] for i in one) for one in batches)
