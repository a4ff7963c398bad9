"""Tickets made from found ones: one function and one row of `RULES` each.

A derived ticket is tested like any other, and is never averaged with the tickets it was made from: its `family` is part of its
variant.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from tombola.anatomy import Anatomy
from tombola.canonical import fingerprint
from tombola.criteria import Given, magnitude
from tombola.errors import SettingsError, TicketError, TombolaError
from tombola.mask import Mask
from tombola.prune import prune
from tombola.scope import scope_parameters
from tombola.search.supers import SuperSettings, super_control, survivors
from tombola.ticket import Ticket

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Sources:
    """What a ticket is derived from."""

    ticket: Ticket  # whose base, weights and seeds the derived one has
    others: Sequence[Ticket]
    options: Mapping[str, Any]
    found_on: Callable[[], "tuple[PreTrainedModel, Anatomy]"]  # the weights `ticket` was found on, read when asked for

    @property
    def masks(self) -> list[Mask]:
        return [one.mask for one in (self.ticket, *self.others)]


@dataclass(frozen=True, slots=True)
class Derived:
    """A derived mask. `good` is what it is a control of, where it is one."""

    mask: Mask
    scope: str
    good: Mask | None = None
    lesion: Mapping[str, Any] | None = None  # done to the weights before the mask is put on, see `tombola.gates.lesion_of`


def size_matched(sources: Sources) -> Derived:
    """The values of lowest magnitude removed at exactly the share that the ticket removes of its own scope (X11)."""
    model, anatomy = sources.found_on()
    scope = sources.options["scope"]
    scores = magnitude(Given(model=model, names=list(scope_parameters(model, anatomy, scope))))
    return Derived(Mask(values=prune(scores, sources.ticket.sparsity)), scope)


def joined(sources: Sources) -> Derived:
    """What all of them keep: a ticket of heads alone and one of MLPs alone, applied together (X10)."""
    mask = sources.ticket.mask
    for other in sources.others:
        mask = mask & other.mask
    return Derived(mask, _one_scope(sources))


def union(sources: Sources) -> Derived:
    """What any of them keeps (Chen et al. 2020, X3). Of another size than each: its sparsity stands in the ticket."""
    mask = sources.ticket.mask
    for other in sources.others:
        mask = mask | other.mask
    return Derived(mask, _one_scope(sources))


def perturbed(sources: Sources) -> Derived:
    """In each parameter so many removed values are revived and as many kept ones removed, drawn: `share` of all its values (X4
    of Chen et al. 2020). Of exactly the size of the ticket; fewer where not so many are removed, or kept.
    """
    good, share, draw = sources.ticket.mask, sources.options["share"], sources.options["draw"]
    rng = np.random.default_rng([sources.ticket.seeds["mask"], draw, round(1e6 * share), int(good.digest()[:8], 16)])
    values = {}
    for name, kept in good.values.items():
        flat = kept.flatten().numpy().copy()
        gone, there = np.flatnonzero(~flat), np.flatnonzero(flat)
        n = min(round(share * flat.size), len(gone), len(there))
        flat[rng.permutation(gone)[:n]], flat[rng.permutation(there)[:n]] = True, False
        values[name] = torch.from_numpy(flat).reshape(kept.shape)
    return Derived(Mask(values=values), _one_scope(sources), good)


NOISE = 0.0387  # the standard deviation of BERT's pre-trained matrices, by which the released script scales its noise


def noised(sources: Sources) -> Derived:
    """The ticket's own mask on weights to which noise was added, of `times` × `NOISE` (X5 of Chen et al. 2020)."""
    times, draw = sources.options["times"], sources.options["draw"]
    said = {
        "name": "noise",
        "std": times * NOISE,
        "seed": int(fingerprint(["noise", sources.ticket.seeds["mask"], draw])[:12], 16),
    }
    return Derived(sources.ticket.mask, _one_scope(sources), sources.ticket.mask, said)


def super_survivors(sources: Sources) -> Derived:
    """The parts that the tickets of all seeds keep (E8)."""
    return Derived(survivors(sources.masks), _one_scope(sources))


def super_random(sources: Sources) -> Derived:
    """As many parts, drawn from those that are neither super-survivors nor bad (E8)."""
    return _super_control("random", sources)


def super_bad(sources: Sources) -> Derived:
    """As many parts, those least likely to survive, or removed for every seed (E8)."""
    return _super_control("bad", sources)


def _super_control(kind: Any, sources: Sources) -> Derived:
    names = {one.name for one in fields(SuperSettings)}
    settings = SuperSettings(**{name: value for name, value in sources.options.items() if name in names})
    seed, draw = sources.ticket.seeds["mask"], sources.options["draw"]
    mask = super_control(sources.masks, kind, seed=seed, draw=draw, settings=settings)
    return Derived(mask, _one_scope(sources), survivors(sources.masks))


def _one_scope(sources: Sources) -> str:
    scopes = {one.scope for one in (sources.ticket, *sources.others)}
    if len(scopes) > 1:
        raise TicketError("tickets of different scopes have no common one", got=sorted(scopes), expected="one scope")
    return scopes.pop()


@dataclass(frozen=True, slots=True)
class Rule:
    """One row of `RULES`."""

    make: Callable[[Sources], Derived]
    kind: str  # of the ticket it gives: "good", or the control that it is
    family: str  # tickets of one family are tested against each other, and with no others
    about: str
    options: tuple[str, ...] = field(default=())


_SUPER = (*(one.name for one in fields(SuperSettings)), "draw")

RULES: Mapping[str, Rule] = {
    "size-matched": Rule(size_matched, "good", "size-matched", "values of lowest magnitude, as large a share", ("scope",)),
    "joined": Rule(joined, "good", "joined", "heads-only and MLPs-only masks together"),
    "union": Rule(union, "good", "union", "what any of them keeps"),
    "intersection": Rule(joined, "good", "intersection", "what all of them keep"),
    "perturbed": Rule(perturbed, "good", "perturbed", "some values revived and as many removed, drawn", ("share", "draw")),
    "noised": Rule(noised, "good", "noised", "the same mask, noise added to the weights", ("times", "draw")),
    "super-survivors": Rule(super_survivors, "good", "super", "kept for every seed"),
    "super-random": Rule(super_random, "random", "super", "as many, neither super-survivors nor bad", _SUPER),
    "super-bad": Rule(super_bad, "bad", "super", "as many, those that survive least", _SUPER),
}


def check_rule(name: str, options: Mapping[str, Any]) -> None:
    """Raises: SettingsError for an unknown rule, or options that are not exactly those it has."""
    known = RULES.get(name)
    if known is None:
        raise SettingsError([TombolaError(f"there is no rule {name!r} to derive a ticket by", expected=", ".join(RULES))])
    if set(options) != set(known.options):
        expected = ", ".join(known.options) or "none"
        raise SettingsError([TombolaError(f"the options of {name} are others", got=", ".join(options), expected=expected)])
