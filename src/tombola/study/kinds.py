"""The kinds of control that a ticket is tested against: whose mask, and on which weights.

A control differs from the good ticket in its mask (drawn by a rule of `tombola.search.controls`) or in its weights (the good
mask on weights that a lesion has destroyed), so that what a ticket owes to each can be told apart.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ControlKind:
    """rule: of `search.controls.CONTROLS`; "good" keeps the ticket's own mask, "all" everything, "inverted" what it removed."""

    rule: str
    about: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # of ControlSettings, whatever the preset says
    lesion: str | None = None  # of `lesion.LESIONS`, done to the weights before the mask is put on

    @property
    def has_own_mask(self) -> bool:
        """Whether its mask is another than the good ticket's, or none."""
        return self.rule not in ("good", "all")


CONTROL_KINDS: Mapping[str, ControlKind] = {
    "random": ControlKind("random", "as many, drawn from all"),
    "random-per-layer": ControlKind(
        "random", "as many in each layer (of values: in each matrix), drawn from all", {"random_size": "exact_per_layer"}
    ),
    "random-same-share": ControlKind(
        "random", "as many, each matrix keeping the same share (heads and MLPs as random)", {"random_size": "same_share"}
    ),
    "random-of-reinit": ControlKind(
        "random", "the largest values of matrices drawn anew, as many (heads and MLPs as random)", {"random_size": "of_reinit"}
    ),
    "bad": ControlKind("bad", "as many, drawn from what good removed, topped up with random survivors"),
    "bad-lowest": ControlKind(
        "bad",
        "as many, those of the lowest importance (of values: magnitude)",
        {"bad_m_rule": "remove_highest", "bad_s_rule": "lowest_importance"},
    ),
    "strict-bad": ControlKind("strict-bad", "only what good removed"),
    "inverted": ControlKind("inverted", "all that good removed, of another size than good"),
    "inverted-revived": ControlKind("inverted-revived", "the same, with one head drawn in each layer that would have none"),
    "reinit-body": ControlKind("good", "the good mask; attention and MLPs drawn again", lesion="reinit-body"),
    "reinit-body-embeddings": ControlKind(
        "good", "the good mask; attention, MLPs and embeddings drawn again", lesion="reinit-body-embeddings"
    ),
    "shuffle-values": ControlKind("good", "the good mask; values permuted within each matrix", lesion="shuffle-values"),
    "shuffle-layers": ControlKind("good", "the good mask; layers permuted", lesion="shuffle-layers"),
    "dense-random-init": ControlKind("all", "nothing removed; all weights drawn again", lesion="random-init"),
    "dense-shuffle-values": ControlKind("all", "nothing removed; values permuted within each matrix", lesion="shuffle-values"),
    "dense-shuffle-layers": ControlKind("all", "nothing removed; layers permuted", lesion="shuffle-layers"),
    "random-init-random": ControlKind("random", "as many, drawn from all; all weights drawn again", lesion="random-init"),
}


@dataclass(frozen=True, slots=True)
class TrainMode:
    """How a dense model is trained otherwise than by fine-tuning all of the base."""

    kind: str  # of its scores
    about: str
    random: bool  # all weights but the task's head are drawn again first, as for dense-random-init
    frozen: bool  # the task's head alone is trained


# The train modes of Prasanna et al. 2020, released code (X1 of the reproduction's list); fine_tune is the dense model itself.
TRAIN_MODES: Mapping[str, TrainMode] = {
    "frozen": TrainMode("frozen", "the task's head alone is trained", random=False, frozen=True),
    "random": TrainMode("random-init", "all trained from weights drawn again", random=True, frozen=False),
    "random_frozen": TrainMode("random-init-frozen", "the head alone, on weights drawn again", random=True, frozen=True),
}
