"""Super-survivors: the parts that the tickets of every seed keep, and their controls.

Source: Prasanna et al. 2020, appendix E (E8 of the reproduction's list). `SuperSettings` has the ways in which the paper and its
released code differ. Both draw within each type of part (heads, MLPs), and each control is exactly as large as the survivors.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tombola.errors import SearchError
from tombola.mask import UNITS, Mask


@dataclass(frozen=True, slots=True, kw_only=True)
class SuperSettings:
    """Options of the controls of super-survivors, by the names of the reproduction's table; defaults are `corrected`."""

    # least_surviving: bad are those that fewest seeds keep, ties drawn; removed_in_all: those no seed keeps, drawn or topped up
    super_bad_rule: Literal["least_surviving", "removed_in_all"] = "least_surviving"
    super_bad_draw: Literal["per_seed", "once"] = "per_seed"  # once: the bad mask of one draw serves all seeds


def survivors(masks: Sequence[Mask]) -> Mask:
    """What all of these masks keep.

    Raises: SearchError for fewer than two masks, masks of single values, of different parts or of different shape.
    """
    _check(masks)
    kept = masks[0]
    for mask in masks[1:]:
        kept = kept & mask
    return kept


def super_control(masks: Sequence[Mask], kind: str, *, seed: int, draw: int, settings: SuperSettings = SuperSettings()) -> Mask:
    """A control of the super-survivors of these masks, of exactly their size in each type of part.

    bad      by `super_bad_rule`. What it lacks when too few were removed by all is drawn from those that some seeds keep, and
             then from the survivors: print the overlap
    random   drawn from what is in neither, neither survivor nor bad; from all when these are too few. "bad" is here the bad
             mask of the same seed and draw, under removed_in_all everything that no seed keeps

    The generator is seeded by what the masks keep, kind, seed and draw; under super_bad_draw = once bad knows no seed.
    Raises: as `survivors`; SearchError for another kind.
    """
    if kind not in ("random", "bad"):
        raise SearchError(f"there is no control {kind!r} of super-survivors", expected="random, bad")
    _check(masks)
    own = None if settings.super_bad_draw == "once" else seed
    drawn = {}
    for unit in masks[0].parts():
        times = torch.stack([mask.parts()[unit].int() for mask in masks]).sum(0)
        bad, known = _bad(times, len(masks), settings.super_bad_rule, _rng(unit, times, "bad", own, draw))
        drawn[unit] = bad if kind == "bad" else _random(times, len(masks), known, _rng(unit, times, "random", seed, draw))
    return Mask(**drawn, values={})


def _bad(
    times: Int[Tensor, "..."], seeds: int, rule: str, rng: np.random.Generator
) -> tuple[Bool[Tensor, "..."], Bool[Tensor, "..."]]:
    """(the bad mask, what random has to leave alone as bad), of parts that so many seeds keep."""
    flat, count = times.flatten().numpy(), int((times == seeds).sum())
    # In random order, then by how often they survive: ties are drawn. Of removed_in_all "never", "at times", "always" are all.
    rank = flat if rule == "least_surviving" else np.where(flat == 0, 0, np.where(flat == seeds, 2, 1))
    order = rng.permutation(len(flat))
    chosen = order[np.argsort(rank[order], kind="stable")][:count]
    bad = _mask_of(chosen, times)
    return bad, bad if rule == "least_surviving" else times == 0


def _random(times: Int[Tensor, "..."], seeds: int, bad: Bool[Tensor, "..."], rng: np.random.Generator) -> Bool[Tensor, "..."]:
    good = times == seeds
    neither, count = np.flatnonzero(~(good | bad).flatten().numpy()), int(good.sum())
    among = neither if len(neither) >= count else np.arange(times.numel())
    return _mask_of(rng.permutation(among)[:count], times)


def _mask_of(positions: "np.ndarray[tuple[int], np.dtype[np.int64]]", like: Tensor) -> Bool[Tensor, "..."]:
    kept = torch.zeros(like.numel(), dtype=torch.bool)
    kept[torch.from_numpy(positions)] = True
    return kept.reshape(like.shape)


def _rng(unit: str, times: Tensor, kind: str, seed: int | None, draw: int) -> np.random.Generator:
    said = f"{unit}|{tuple(times.shape)}|{times.flatten().tolist()}|{kind}|{seed}|{draw}"  # the order of the masks plays no part
    return np.random.default_rng(int.from_bytes(hashlib.sha256(said.encode()).digest()[:16], "big"))


def _check(masks: Sequence[Mask]) -> None:
    if len(masks) < 2:
        raise SearchError(
            "super-survivors are what the tickets of several seeds keep", got=f"{len(masks)} ticket", expected="two or more"
        )
    units = [tuple(mask.parts()) for mask in masks]
    if set(units[0]) - set(UNITS) or len(set(units)) > 1:
        raise SearchError(
            "super-survivors are of whole parts, the same in every ticket",
            got="; ".join(dict.fromkeys(", ".join(one[:4]) for one in units)),
            expected="masks of heads and MLPs",
        )
    shapes = {tuple(tuple(part.shape) for part in mask.parts().values()) for mask in masks}
    if len(shapes) > 1:
        raise SearchError("the tickets are of models of different shape", got=sorted(shapes), expected="tickets of one base")
