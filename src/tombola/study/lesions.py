"""Lesions of a fine-tuned model that nothing is trained after: what is done (`ACTS`), to what, and where (`PLACES`).

One row of `ACTS` each. All leave the model as it was, bit for bit, so that one cell tries many places on one model.
Source: Prasanna et al. 2020, released code (X4 to X7 and X9 of the reproduction's list).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Bool
from torch import Tensor

from tombola.anatomy import Anatomy
from tombola.errors import SettingsError, TombolaError
from tombola.gates import restored
from tombola.lesion import PARTS, copy_values, head_values, part_values, reinitialise, without_residual, zero_values

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Values = Mapping[str, Bool[Tensor, "..."]]  # parameter name → which of its values are destroyed


@dataclass(frozen=True, slots=True)
class Cut:
    """One lesion, to be tried in one or many places."""

    act: str  # of ACTS
    what: str  # names of `tombola.lesion.PARTS` joined by "+"; of removed heads: all, o, o-rows; of residuals: mlp
    where: str = "all"  # of PLACES
    draw: int = 0  # of acts that draw; 0 of all others

    def __str__(self) -> str:
        return f"{self.act} {self.what}"


@dataclass(frozen=True, slots=True)
class Patient:
    """What a lesion is done to, and what it may look at."""

    model: "PreTrainedModel"
    anatomy: Anatomy
    base: "Callable[[], PreTrainedModel]"  # the pre-trained model, read when asked for
    seed: int


@dataclass(frozen=True, slots=True)
class Act:
    """One row of `ACTS`. `on_values(patient, values)` works in place."""

    about: str
    on_values: Callable[[Patient, Values], None] | None = None  # None: done to residuals, see `done`
    draws: bool = False
    of_heads: bool = False  # its `what` says which values of the heads that a ticket removes


def _draw(patient: Patient, values: Values) -> None:
    reinitialise(patient.model, values, patient.seed, values)


def _zero(patient: Patient, values: Values) -> None:
    zero_values(patient.model, values)


def _revert(patient: Patient, values: Values) -> None:
    copy_values(patient.model, patient.base(), values, values)


def _revert_rotated(patient: Patient, values: Values) -> None:
    copy_values(patient.model, patient.base(), values, values, rotated=True)


ACTS: Mapping[str, Act] = {
    "redraw": Act("drawn again as before any training; biases 0", _draw, draws=True),
    "zero": Act("weights set to 0; biases stay", _zero),
    "revert": Act("put back to the pre-trained values", _revert),
    "revert-rotated": Act("put back to the pre-trained values of the row before", _revert_rotated),
    "drop-residual": Act("the residual around the MLP left out"),
    "double-branch": Act("the MLP's output added to itself in place of the residual, as released"),
    "redraw-removed-heads": Act("the heads a ticket removes drawn again, not masked", _draw, draws=True, of_heads=True),
}

# where → the layers of each place, of a model of n layers.
PLACES: Mapping[str, Callable[[int], list[tuple[int, ...]]]] = {
    "all": lambda n: [tuple(range(n))],
    "each": lambda n: [(i,) for i in range(n)],
    "pairs": lambda n: [(i, i + 1) for i in range(n - 1)],
}
# For estimates of time only: places of a model of twelve layers.
EXPECTED_PLACES: Mapping[str, int] = {where: len(places(12)) for where, places in PLACES.items()}

HEADS = ("all", "o", "o-rows")


def check_cut(cut: Cut) -> None:
    """Raises: SettingsError with all that is wrong with it."""
    problems = []
    if cut.act not in ACTS:
        problems.append(TombolaError(f"there is no lesion {cut.act!r}", expected=", ".join(ACTS)))
    elif ACTS[cut.act].on_values is None:
        if cut.what != "mlp":
            problems.append(TombolaError(f"{cut.act} is done to another residual", got=cut.what, expected="mlp"))
    elif wrong := [one for one in cut.what.split("+") if one not in (HEADS if ACTS[cut.act].of_heads else PARTS)]:
        known = ", ".join(HEADS if ACTS[cut.act].of_heads else PARTS)
        problems.append(TombolaError(f"{cut.act} knows no such part", got=", ".join(wrong), expected=known))
    if cut.where not in PLACES:
        problems.append(TombolaError(f"there is no place {cut.where!r}", expected=", ".join(PLACES)))
    if problems:
        raise SettingsError(problems)


@contextmanager
def done(
    cut: Cut, layers: tuple[int, ...], patient: Patient, kept: Bool[Tensor, "attention head"] | None = None
) -> Iterator[None]:
    """The model with this lesion in these layers; afterwards it is as it was, bit for bit.

    kept: the heads that are not removed, for acts on those that are. Raises: AnatomyError where the model does not allow it.
    """
    act, model, anatomy = ACTS[cut.act], patient.model, patient.anatomy
    if act.on_values is None:
        with without_residual(model, anatomy, layers, "drop" if cut.act == "drop-residual" else "double"):
            yield
        return
    if act.of_heads:
        assert kept is not None
        values = head_values(anatomy, kept, cut.what)
    else:
        values = part_values(model, anatomy, cut.what, layers)
    with restored([model.get_parameter(name) for name in values]):
        act.on_values(patient, values)
        yield


def said_of(cut: Cut, layers: tuple[int, ...], n_layers: int) -> str:
    """The lesion in one place, in words: "redraw q+k, layers 3-4"."""
    if len(layers) == n_layers:
        return str(cut)
    return f"{cut}, layer{'s' if len(layers) > 1 else ''} {'-'.join(map(str, layers))}"
