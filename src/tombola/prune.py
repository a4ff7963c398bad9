"""Scores and a count → which entries go. Exact counts, ties broken by position, nothing adjusted in silence."""

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from tombola.errors import MaskError


def lowest(scores: Shaped[Tensor, "..."], count: int, among: Bool[Tensor, "..."]) -> Bool[Tensor, "..."]:
    """True at the `count` lowest-scoring entries of `among`; of equal scores the first by position goes first.

    Raises: MaskError when fewer than `count` entries are there, or a score is NaN.
    """
    available = int(among.sum())
    if not 0 <= count <= available:
        raise MaskError("more entries asked for than there are", got=count, expected=f"0 to {available}")
    if bool(torch.isnan(scores[among]).any()):
        raise MaskError("a score is NaN", next="check the model's outputs for overflow")
    candidates = torch.nonzero(among.flatten()).flatten()
    order = torch.argsort(scores.flatten()[candidates], stable=True)
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[candidates[order[:count]]] = True
    return chosen.reshape(scores.shape)


def to_sparsity(scores: Shaped[Tensor, "..."], sparsity: float) -> Bool[Tensor, "..."]:
    """The mask (True = kept) that removes the `round(sparsity · n)` lowest-scoring of all n entries.

    Raises: MaskError when sparsity is outside [0, 1).
    """
    if not 0.0 <= sparsity < 1.0:
        raise MaskError("sparsity is out of range", got=sparsity, expected="[0, 1): the share of maskable entries removed")
    return ~lowest(scores, round(sparsity * scores.numel()), torch.ones_like(scores, dtype=torch.bool))
