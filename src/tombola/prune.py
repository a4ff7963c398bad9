"""Scores and a count → which entries go. Exact counts, ties broken by position, nothing adjusted in silence.

Of several tensors together, "position" runs through the tensors in the order of their mapping. −0.0 and 0.0 are equal,
±inf are scores like others (−inf goes first, inf last), NaN is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from tombola.errors import MaskError

Granularity = Literal["global", "per_matrix"]

_SAMPLE = 1 << 16  # values looked at to guess where a threshold lies


def lowest(scores: Shaped[Tensor, "..."], count: int, among: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """True at the `count` lowest-scoring entries of `among`; of equal scores the first by position goes first.

    Raises: MaskError when fewer than `count` entries are there, or a score is NaN.
    """
    return _lowest({"": scores}, count, {"": among})[""]


def to_sparsity(scores: Shaped[Tensor, "..."], sparsity: float) -> Bool[Tensor, "..."]:
    """The mask (True = kept) that removes the `round(sparsity · n)` lowest-scoring of all n entries.

    Raises: MaskError when sparsity is outside [0, 1).
    """
    return prune({"": scores}, sparsity)[""]


def prune(
    scores: Mapping[str, Shaped[Tensor, "..."]],
    sparsity: float,
    *,
    granularity: Granularity = "global",
    among: Mapping[str, Bool[Tensor, "..."]] | None = None,
) -> dict[str, Bool[Tensor, "..."]]:
    """Masks (True = kept) that remove the `round(sparsity · n)` lowest-scoring entries: of all n entries of all tensors
    together ("global"), or of the n entries of each tensor ("per_matrix").

    among: what is left from before. Entries outside it stay removed and count among the removed, so that masks of rising
    sparsity, each `among` the one before, are nested and each of its exact size. None = all are there.

    Raises: MaskError when sparsity is outside [0, 1), there are no scores, a score is NaN, names or shapes of `among`
    differ, or more than asked for is removed already.
    """
    if not 0.0 <= sparsity < 1.0:
        raise MaskError("sparsity is out of range", got=sparsity, expected="[0, 1): the share of maskable entries removed")
    if not scores:
        raise MaskError("there is nothing to prune", got="no scores", expected="scores of at least one parameter")
    left = {name: torch.ones(x.shape, dtype=torch.bool) for name, x in scores.items()} if among is None else dict(among)
    _check_match(scores, left)
    kept: dict[str, Tensor] = {}
    for names in groups(list(scores), granularity):
        n, there = sum(scores[name].numel() for name in names), count_of(left[name] for name in names)
        more = round(sparsity * n) - (n - there)
        if more < 0:
            raise MaskError(
                "more is removed already than the sparsity asks for",
                got=f"{n - there} of {n} entries removed" + (f" in {names[0]}" if granularity == "per_matrix" else ""),
                expected=f"at most {round(sparsity * n)} at sparsity {sparsity}",
                next="ask for a higher sparsity, or start from a mask that keeps more",
            )
        kept |= without_lowest({name: scores[name] for name in names}, more, left)
    return kept


def without_lowest(
    scores: Mapping[str, Shaped[Tensor, "..."]], count: int, among: Mapping[str, Bool[Tensor, "..."]]
) -> dict[str, Bool[Tensor, "..."]]:
    """`among` without its `count` lowest-scoring entries, all tensors of `scores` taken together. True = kept.

    Raises: MaskError when fewer than `count` entries are there, a score is NaN, or names or shapes of `among` differ.
    """
    gone = _lowest(scores, count, among)
    return {name: among[name].cpu() & ~gone[name] for name in scores}


def groups(names: Sequence[str], granularity: Granularity) -> list[list[str]]:
    """Which names compete with each other: all in one group, or each in a group of its own."""
    return [list(names)] if granularity == "global" else [[name] for name in names]


def count_of(masks: Iterable[Bool[Tensor, "..."]]) -> int:
    """How many entries are True in all of them together; `Tensor.sum` takes 20 times as long."""
    return sum(int(np.count_nonzero(mask.numpy(force=True))) for mask in masks)


# ------------------------------------------------------------------------------------------------------ exact selection


def _lowest(scores: Mapping[str, Tensor], count: int, among: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """True at the `count` lowest of all entries of `among`, on the CPU."""
    _check_match(scores, among)
    masks = {name: among[name].numpy(force=True).reshape(-1) for name in scores}
    available = sum(int(np.count_nonzero(mask)) for mask in masks.values())
    if not 0 <= count <= available:
        raise MaskError("more entries asked for than there are", got=count, expected=f"0 to {available}")
    values = _candidates(scores, masks)
    broken = [name for name, x in values.items() if np.isnan(np.min(x, initial=np.inf))]
    if broken:
        where = ", ".join(name for name in broken if name)
        raise MaskError("a score is NaN", got=where or None, next="check the model's outputs for overflow")
    if count == 0:
        return {name: torch.zeros(x.shape, dtype=torch.bool) for name, x in scores.items()}
    threshold, below, equal = _threshold(list(values.values()), count)
    ties, gone = count - below, {}
    all_ties = ties == equal  # never where entries that are no candidates, which score inf, are among the equal ones
    for name, x in values.items():
        chosen = x <= threshold if all_ties else x < threshold
        if ties and not all_ties:
            first = np.flatnonzero((x == threshold) & masks[name])[:ties]
            chosen[first] = True
            ties -= len(first)
        gone[name] = torch.from_numpy(chosen).reshape(scores[name].shape)
    return gone


def _check_match(scores: Mapping[str, Tensor], among: Mapping[str, Tensor]) -> None:
    wrong = [name for name, x in scores.items() if name not in among or among[name].shape != x.shape]
    if wrong:
        there = {name: tuple(among[name].shape) if name in among else "missing" for name in wrong}
        raise MaskError("scores and mask do not belong together", got=there, expected={n: tuple(scores[n].shape) for n in wrong})


def _candidates(scores: Mapping[str, Tensor], masks: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Scores as flat arrays of one float type, with inf for what is no candidate; without a copy where all are."""
    kinds = {x.dtype: torch.promote_types(x.dtype, torch.float32) for x in scores.values()}
    # whole numbers go to fp64: in fp32 counts above 2^24 would tie. One type for all: numpy 1 compares an fp32 array with
    # an fp64 number in fp32.
    single = all(kind.is_floating_point and wide == torch.float32 for kind, wide in kinds.items())
    flat = {
        name: x.detach().cpu().to(torch.float32 if single else torch.float64).reshape(-1).numpy() for name, x in scores.items()
    }
    return {name: x if masks[name].all() else np.where(masks[name], x, x.dtype.type(np.inf)) for name, x in flat.items()}


def _threshold(values: Sequence[np.ndarray], count: int) -> tuple[Any, int, int]:
    """(the count-th lowest value of all arrays together, how many are below it, how many equal it), exactly.

    A sorted sample brackets the threshold; one pass counts what lies below the bracket and takes out what lies inside, a
    few per cent of all, and only that is partitioned. The counts prove the bracket; if it missed (values in an order that
    the sample's stride resonates with), everything is partitioned.
    """
    n = sum(x.size for x in values)
    sample = np.sort(np.concatenate([x[:: max(1, n // _SAMPLE)] for x in values]))
    at, spread = count * sample.size // n, 2 * int(np.sqrt(sample.size)) + 1  # four standard errors of a sampled rank
    low, high = sample[max(at - spread, 0)], sample[min(at + spread, sample.size - 1)]
    # at the ends of the sample nothing bounds the threshold
    low, high = (low if at > spread else -np.inf), (high if at + spread < sample.size else np.inf)
    below = sum(int(np.count_nonzero(x < low)) for x in values)
    inside = np.concatenate([x[np.flatnonzero((x >= low) & (x <= high))] for x in values])
    if not below < count <= below + inside.size:
        below, inside = 0, np.concatenate(values)
    inside.partition(count - below - 1)
    threshold = inside[count - below - 1]
    return threshold, below + int(np.count_nonzero(inside < threshold)), int(np.count_nonzero(inside == threshold))
