"""Control tickets: what a found ticket must be compared with.

Each has exactly the size of the ticket it controls, per type (heads, MLPs), and is drawn independently for every run seed,
kind and draw. Rules for heads and MLPs: Prasanna et al. 2020, sec. 4 (`bad_s_rule` of the reproduction's table).
"""

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from tombola.errors import SearchError
from tombola.mask import UNITS, Mask

Draw = Callable[[Tensor, np.random.Generator], Tensor]


def random(good: Tensor, rng: np.random.Generator) -> Tensor:
    """As many entries as `good` keeps, drawn from all."""
    return _keep(good, rng.permutation(good.numel())[: int(good.sum())])


def bad(good: Tensor, rng: np.random.Generator) -> Tensor:
    """As many entries as `good` keeps, drawn from those it removed; topped up with random survivors when too few.

    With more than half kept, a bad ticket must share parts with the good one: print the overlap.
    """
    removed, survivors = (rng.permutation(np.flatnonzero(part.flatten().numpy())) for part in (~good, good))
    return _keep(good, np.concatenate([removed, survivors])[: int(good.sum())])


def strict_bad(good: Tensor, rng: np.random.Generator) -> Tensor:
    """Only entries that `good` removed: min(kept, removed) of them. Smaller than `good` when that keeps more than half."""
    removed = rng.permutation(np.flatnonzero((~good).flatten().numpy()))
    return _keep(good, removed[: int(good.sum())])


CONTROLS: dict[str, Draw] = {"random": random, "bad": bad, "strict-bad": strict_bad}


def control(good: Mask, kind: str, *, seed: int, draw: int) -> Mask:
    """The control mask of one kind for (mask seed, draw); the same arguments always give the same mask.

    Draws are independent: the generator is seeded by all of good mask, kind, seed and draw (the released code reseeds with
    42 after each model, so that its draws repeat). Raises: SearchError for an unknown kind.
    """
    if kind not in CONTROLS:
        raise SearchError(f"unknown kind of control {kind!r}", expected=", ".join(CONTROLS))
    packed = b"".join(name.encode() + bits.numpy().tobytes() for name, bits in good.pack().items())
    entropy = hashlib.sha256(b"|".join([packed, kind.encode(), str(seed).encode(), str(draw).encode()])).digest()
    rng = np.random.default_rng(int.from_bytes(entropy[:16], "big"))
    parts = {name: CONTROLS[kind](part, rng) for name, part in good.parts().items()}
    units = {name: parts.pop(name) for name in UNITS if name in parts}
    return Mask(**units, values=parts)


def _keep(like: Tensor, positions: np.ndarray) -> Tensor:
    kept = torch.zeros(like.numel(), dtype=torch.bool)
    kept[torch.from_numpy(np.asarray(positions, dtype=np.int64))] = True
    return kept.reshape(like.shape)
