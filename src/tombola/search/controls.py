"""Control tickets: what a found ticket must be compared with.

Each has exactly the size of the ticket it controls, per type (heads, MLPs, neurons, values of parameters), and is drawn
independently for every run seed, kind and draw. The values of all parameters are one type: what is exact is their total,
and a matrix may keep more or fewer than the ticket's. Of a ticket of whole layers, layers are drawn. Rules: Prasanna et al.
2020, sec. 4; `ControlSettings` has the ways in which the paper, the released code and correct practice differ.

Order of reading: the rules, the tables that choose one, `control`, the draw itself.
"""

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tombola.errors import SearchError
from tombola.mask import UNITS, Mask
from tombola.prune import lowest

DRAWS_AT_ONCE = 10**9  # numpy draws the sizes of matrices exactly below this many values


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlSettings:
    """Options of controls, by the names of the reproduction's table; the defaults are its `corrected` column."""

    # exact_per_layer: of values, as many in each matrix as the ticket; same_share: each matrix keeps the ticket's share of all;
    # of_reinit: the largest values of matrices drawn anew from one distribution (the released code of Chen et al. 2020)
    random_size: Literal["exact", "bernoulli", "exact_per_layer", "same_share", "of_reinit"] = "exact"
    control_draws: Literal["independent", "reseeded_42"] = "independent"
    bad_s_rule: Literal["pruned_plus_fill", "lowest_importance"] = "pruned_plus_fill"  # heads, MLPs, neurons
    bad_m_rule: Literal["pruned_plus_fill", "remove_highest"] = "pruned_plus_fill"  # values


@dataclass(frozen=True, slots=True)
class Pool:
    """What one control is drawn over: all heads, all MLPs, all neurons, layers, or the values of all parameters together."""

    unit: str  # "heads" | "mlps" | "neurons" | "layers" | "values"
    good: dict[str, Tensor]  # the ticket's parts of this type; one, or a parameter each
    scores: Mapping[str, Tensor] | None  # of the weights the ticket was found on, by part; higher = more important
    rng: np.random.Generator

    @property
    def kept(self) -> int:
        return _count(self.good)


Draw = Callable[[Pool], dict[str, Tensor]]


# ------------------------------------------------------------------------------------------------------------- the rules


def random(pool: Pool) -> dict[str, Tensor]:
    """As many entries as `good` keeps, drawn from all."""
    return _draw({name: torch.ones_like(part) for name, part in pool.good.items()}, pool.kept, pool.rng)


def random_bernoulli(pool: Pool) -> dict[str, Tensor]:
    """Each entry kept with the probability that `good` keeps one: of its size only in the mean (the released code)."""
    share = pool.kept / max(1, sum(part.numel() for part in pool.good.values()))
    return {name: torch.from_numpy(np.asarray(pool.rng.random(tuple(p.shape)) < share)) for name, p in pool.good.items()}


def random_per_layer(pool: Pool) -> dict[str, Tensor]:
    """As many entries as `good` keeps in every layer: a row of heads or neurons, a parameter of values.

    A layer has one MLP, so that drawn by layer nothing would be random: MLPs, and layers, are drawn as `random` does.
    """
    if pool.unit == "values":
        return {name: _pick(torch.ones_like(part), int(part.sum()), pool.rng) for name, part in pool.good.items()}
    if pool.unit in ("mlps", "layers"):
        return random(pool)
    ((name, part),) = pool.good.items()
    return {name: torch.stack([_pick(torch.ones_like(row), int(row.sum()), pool.rng) for row in part])}


def random_same_share(pool: Pool) -> dict[str, Tensor]:
    """Every parameter keeps the same share, as near as whole numbers allow; all other types of part are drawn as `random` does.

    What rounding leaves goes to the largest remainders, the first of equal ones, so that the total is the ticket's.
    """
    if pool.unit != "values":
        return random(pool)
    sizes = [part.numel() for part in pool.good.values()]
    shares = [pool.kept * size / max(1, sum(sizes)) for size in sizes]
    counts = [int(share) for share in shares]
    largest = sorted(range(len(sizes)), key=lambda i: (counts[i] - shares[i], i))
    for i in largest[: pool.kept - sum(counts)]:
        counts[i] += 1
    return {name: _pick(torch.ones_like(p), n, pool.rng) for (name, p), n in zip(pool.good.items(), counts, strict=True)}


def random_of_reinit(pool: Pool) -> dict[str, Tensor]:
    """The largest of as many normal numbers, of one standard deviation for all: in law the same as `random`."""
    if pool.unit != "values":
        return random(pool)
    flat = torch.from_numpy(np.abs(pool.rng.standard_normal(sum(part.numel() for part in pool.good.values()), dtype=np.float32)))
    kept = ~lowest(flat, flat.numel() - pool.kept, torch.ones_like(flat, dtype=torch.bool))
    parts = torch.split(kept, [part.numel() for part in pool.good.values()])
    return {name: of.reshape(part.shape) for (name, part), of in zip(pool.good.items(), parts, strict=True)}


def bad(pool: Pool) -> dict[str, Tensor]:
    """As many entries as `good` keeps, drawn from those it removed; topped up with random survivors when too few.

    With more than half kept, a bad ticket must share parts with the good one: print the overlap.
    """
    removed = {name: ~part for name, part in pool.good.items()}
    from_removed = min(pool.kept, _count(removed))
    first = _draw(removed, from_removed, pool.rng)
    fill = _draw(pool.good, pool.kept - from_removed, pool.rng)
    return {name: first[name] | fill[name] for name in first}


def lowest_scoring(pool: Pool) -> dict[str, Tensor]:
    """As many entries as `good` keeps, those of the lowest scores; nothing is drawn, and every draw gives the same.

    For values: the highest are removed at the ticket's sparsity (the released code, under the name of bad).
    """
    scores = _scores_of(pool)
    sizes = [part.numel() for part in pool.good.values()]
    flat = torch.cat([score.flatten() for score in scores])
    kept = torch.split(lowest(flat, pool.kept, torch.ones_like(flat, dtype=torch.bool)), sizes)
    return {name: of.reshape(part.shape) for (name, part), of in zip(pool.good.items(), kept, strict=True)}


def strict_bad(pool: Pool) -> dict[str, Tensor]:
    """Only entries that `good` removed: min(kept, removed) of them. Smaller than `good` when that keeps more than half."""
    removed = {name: ~part for name, part in pool.good.items()}
    return _draw(removed, min(pool.kept, _count(removed)), pool.rng)


RANDOM_SIZES: dict[str, Draw] = {
    "exact": random,
    "bernoulli": random_bernoulli,
    "exact_per_layer": random_per_layer,
    "same_share": random_same_share,
    "of_reinit": random_of_reinit,
}
BAD_RULES: dict[str, Draw] = {"pruned_plus_fill": bad, "lowest_importance": lowest_scoring, "remove_highest": lowest_scoring}

# Kind of control -> its rule for one type of part, under given settings.
CONTROLS: dict[str, Callable[[str, ControlSettings], Draw]] = {
    "random": lambda unit, settings: RANDOM_SIZES[settings.random_size],
    "bad": lambda unit, settings: BAD_RULES[settings.bad_m_rule if unit == "values" else settings.bad_s_rule],
    "strict-bad": lambda unit, settings: strict_bad,
}


# ------------------------------------------------------------------------------------------------------------ the control


def control(
    good: Mask,
    kind: str,
    *,
    seed: int,
    draw: int,
    settings: ControlSettings = ControlSettings(),
    scores: Mapping[str, Tensor] | None = None,
    layers: Int[Tensor, " attention"] | None = None,
) -> Mask:
    """The control mask of one kind for (mask seed, draw); the same arguments always give the same mask.

    Its parts are those of `good`, of the same shapes. `scores` are the criterion's on the weights `good` was found on, by part
    ("heads", "mlps", "neurons", "layers", a parameter's name; higher = more important): needed by lowest_importance and
    remove_highest only.

    layers: for a ticket of whole layers, which layer each row of its heads is in (`Anatomy.layer_of_attention`); layers are
    then drawn, and heads and MLPs go with them. Those with cross-attention are larger, and are drawn among themselves.

    Draws are independent: the generator is seeded by all of good mask, kind, seed and draw. Under control_draws =
    reseeded_42 it is seeded with 42 for every model, as the released code does: draws then repeat over seeds, draws and tickets
    of the same size.

    Raises: SearchError for an unknown kind, for scores that are missing or of another shape, for `layers` and a mask that is not
    of whole layers; MaskError for a score that is NaN.
    """
    if kind not in CONTROLS:
        raise SearchError(f"unknown kind of control {kind!r}", expected=", ".join(CONTROLS))
    rng = np.random.default_rng(SEEDS[settings.control_draws](good, kind, seed, draw))
    if layers is not None:
        return _of_layers(good, layers, scores, rng, CONTROLS[kind]("layers", settings))
    pools = [Pool(unit, {unit: part}, scores, rng) for unit, part in good.parts().items() if unit in UNITS]
    if good.values:
        pools.append(Pool("values", dict(good.values), scores, rng))
    drawn = {name: part for pool in pools for name, part in CONTROLS[kind](pool.unit, settings)(pool).items()}
    units = {name: drawn.pop(name) for name in UNITS if name in drawn}
    return Mask(**units, values=drawn)


def _of_layers(
    good: Mask, layers: Int[Tensor, " attention"], scores: Mapping[str, Tensor] | None, rng: np.random.Generator, rule: Draw
) -> Mask:
    """A control of whole layers: `rule` draws among those that have as many rows of heads as each other."""
    kept = good.mlps
    whole = None if kept is None or good.heads is None or good.neurons is not None or good.values else kept[layers][:, None]
    if kept is None or good.heads is None or whole is None or not torch.equal(whole.expand_as(good.heads), good.heads):
        raise SearchError(
            "the ticket is not one of whole layers",
            got=good.counts_by_type(),
            expected="of each layer all heads and the MLP, or none of them",
            next="draw its controls of heads and MLPs: leave out layers=",
        )
    rows, drawn = torch.bincount(layers, minlength=len(kept)), torch.zeros_like(kept)
    for size in sorted(set(rows.tolist())):
        alike = torch.nonzero(rows == size).flatten()
        own = None if scores is None or "layers" not in scores else {"layers": scores["layers"][alike]}
        drawn[alike] = rule(Pool("layers", {"layers": kept[alike]}, own, rng))["layers"]
    return Mask(heads=drawn[layers][:, None].expand_as(good.heads), mlps=drawn)


def inverted(good: Mask, *, revive: int | None = None) -> Mask:
    """What `good` removed, and nothing it kept: of another size than `good`, so no control of `CONTROLS`.

    revive: a seed; each layer that would lose all its heads then keeps one, drawn by it. Source: Prasanna et al. 2020, released
    code (X2 of the reproduction's list), which revives; the plain inverse does not.
    """
    mask = ~good
    if revive is None or mask.heads is None:
        return mask
    rng, heads = np.random.default_rng([revive, 2]), mask.heads.clone()
    for row in heads:
        drawn = int(rng.integers(len(row)))  # drawn for every layer: which one is revived depends on no other
        if not bool(row.any()):
            row[drawn] = True
    return Mask(heads=heads, mlps=mask.mlps, neurons=mask.neurons, values=mask.values)


def needs_scores(good: Mask, kind: str, settings: ControlSettings) -> bool:
    """Whether the rule of this kind looks at scores, for any type of part that `good` has."""
    units = {name if name in UNITS else "values" for name in good.parts()}
    return any(CONTROLS[kind](unit, settings) is lowest_scoring for unit in units)


def _own_seed(good: Mask, kind: str, seed: int, draw: int) -> int:
    packed = b"".join(name.encode() + bits.numpy().tobytes() for name, bits in good.pack().items())
    entropy = hashlib.sha256(b"|".join([packed, kind.encode(), str(seed).encode(), str(draw).encode()])).digest()
    return int.from_bytes(entropy[:16], "big")


SEEDS: dict[str, Callable[[Mask, str, int, int], int]] = {"independent": _own_seed, "reseeded_42": lambda *_: 42}


def _scores_of(pool: Pool) -> list[Tensor]:
    scores = pool.scores or {}
    wrong = [name for name, part in pool.good.items() if name not in scores or scores[name].shape != part.shape]
    if wrong:
        few = wrong[:6]
        more = f" and {len(wrong) - len(few)} more" if len(wrong) > len(few) else ""
        raise SearchError(
            f"a control that keeps the lowest {pool.unit} needs a score for each",
            got="; ".join(f"{name}: {tuple(scores[name].shape) if name in scores else 'no scores'}" for name in few) + more,
            expected="; ".join(f"{name}: {tuple(pool.good[name].shape)}" for name in few) + more,
            next="pass scores= of the weights the ticket was found on, or take pruned_plus_fill, which needs none",
        )
    return [scores[name] for name in pool.good]


# --------------------------------------------------------------------------------------------------------------- the draw


def _count(parts: Mapping[str, Tensor]) -> int:
    return sum(int(part.sum()) for part in parts.values())


def _draw(among: Mapping[str, Tensor], count: int, rng: np.random.Generator) -> dict[str, Tensor]:
    """`count` of the true entries of these tensors together, every choice as likely as any other.

    First how many each tensor gives, then which: the same law as one draw from all, in the memory of one matrix.
    """
    if len(among) == 1:  # must draw nothing but the permutation: stored controls of heads and MLPs depend on it
        return {name: _pick(part, count, rng) for name, part in among.items()}
    available = [int(part.sum()) for part in among.values()]
    if sum(available) >= DRAWS_AT_ONCE:
        raise SearchError(
            "too many values for one exact draw",
            got=f"{sum(available):,}",
            expected=f"fewer than {DRAWS_AT_ONCE:,}",
            next="take random_size = exact_per_layer, or a smaller scope",
        )
    counts = rng.multivariate_hypergeometric(available, count, method="marginals")
    return {name: _pick(part, int(n), rng) for (name, part), n in zip(among.items(), counts, strict=True)}


def _pick(among: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` of the true entries of one tensor, as a mask of its shape."""
    positions = rng.permutation(np.flatnonzero(among.numpy()))[:count]
    kept = torch.zeros(among.numel(), dtype=torch.bool)
    kept[torch.from_numpy(positions)] = True
    return kept.reshape(among.shape)
