"""The classifier of attention patterns: a small CNN, how it is trained, the weights that come with tombola, and its folds.

The net is that of Prasanna et al. 2020 (sec. 6), with three deviations, all said here: its convolutions keep the size of the map
(without padding a map of fewer than 32 tokens would vanish), each map is scaled to a largest entry of 1 (so that maps of
all sizes, and norms of any unit, look alike, as they do to the eye), and no checkpoint is chosen: the last step counts.

Order of reading: `PatternClassifier`, `shipped`, `train`, `k_fold`.
"""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import load, save
from torch import Tensor, nn

from tombola.attention.known import CLASSES, LARGEST, SMALLEST, known_map, some_size
from tombola.errors import DataError, SettingsError, TombolaError

# (maps padded in training, maps padded at prediction); padding is centred, to the largest map of the training
MAP_PREPROCESS: dict[str, tuple[bool, bool]] = {
    "same": (False, False),
    "same_padded": (True, True),
    "train_padded_predict_unpadded": (True, False),  # the released code
}
LEAST = 4  # tokens: two poolings


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternSettings:
    """How a classifier is trained. Published: Adam 1e-3, batch 64, 200 epochs of 320 to 480 labelled maps, nothing generated."""

    generated_steps: int = 600  # batches of maps of known class, drawn anew each time
    generated_largest: int = LARGEST  # tokens
    real_epochs: int = 15  # passes over the labelled maps, after that; beside each batch a generated one
    batch: int = 64
    learning_rate: float = 1e-3
    map_preprocess: str = "same"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises: SettingsError saying all that is wrong."""
        wrong: list[TombolaError] = []
        if self.map_preprocess not in MAP_PREPROCESS:
            wrong.append(DataError("unknown map_preprocess", got=self.map_preprocess, expected=", ".join(MAP_PREPROCESS)))
        numbers = (self.generated_steps >= 0, self.real_epochs >= 0, self.batch >= 1, self.learning_rate > 0)
        if not all(numbers) or self.generated_largest < SMALLEST:
            got = f"{self.generated_steps} steps of maps up to {self.generated_largest} tokens, {self.real_epochs} epochs, "
            got += f"batch {self.batch}, rate {self.learning_rate}"
            expected = f"steps and epochs of 0 or more, {SMALLEST} tokens or more, batch of 1 or more, a rate above 0"
            wrong.append(DataError("a number of the pattern settings is out of range", got=got, expected=expected))
        if wrong:
            raise SettingsError(wrong)


class PatternNet(nn.Module):
    """[map, 1, query, key] → logits [map, class]: 3×3 convolutions 16-16-pool-32-32-pool-64-64, 1×1 to 16, mean, 1×1 to 5."""

    def __init__(self) -> None:
        super().__init__()
        widths = [(1, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64)]
        layers: list[nn.Module] = []
        for i, (n_in, n_out) in enumerate(widths):
            layers += [nn.Conv2d(n_in, n_out, 3, padding=1), nn.ReLU(), *([nn.MaxPool2d(2)] if i in (1, 3) else [])]
        self.net = nn.Sequential(*layers, nn.Conv2d(64, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(16, len(CLASSES), 1))

    def forward(self, maps: Tensor) -> Tensor:
        logits: Tensor = self.net(maps)
        return logits.flatten(1)


@dataclass(frozen=True, slots=True, eq=False)
class PatternClassifier:
    """A trained net, and what maps are padded to before it sees them."""

    net: PatternNet
    trained_padded_to: int | None = None
    pad_to: int | None = None  # at prediction; None: maps as they are

    def probabilities(self, maps: Sequence[Tensor]) -> Float[Tensor, "map class"]:
        """Of each class for each map [query, key], rows summing to 1; columns in the order of CLASSES. Sizes may differ.

        Raises: DataError for maps that are no maps, see `prepared`.
        """
        found = torch.zeros(len(maps), len(CLASSES))
        ready = [prepared(one, self.pad_to) for one in maps]
        self.net.eval()
        with torch.no_grad():
            for rows in _by_shape(ready, 256):
                found[rows] = self.net(torch.stack([ready[i] for i in rows])).softmax(-1)
        return found

    def classify(self, maps: Sequence[Tensor]) -> list[int]:
        """The likeliest class of each map, as a position in CLASSES."""
        return [int(c) for c in self.probabilities(maps).argmax(-1)]


def prepared(one: Float[Tensor, "query key"], pad_to: int | None) -> Float[Tensor, "1 height width"]:
    """A map as the net sees it: its largest entry 1, with zeros around it up to `pad_to`.

    Raises: DataError for a map of fewer than 4 tokens, one with negative or infinite entries or none above 0, and one larger than
    `pad_to`.
    """
    if min(one.shape) < LEAST or not bool(one.isfinite().all()) or float(one.min()) < 0 or float(one.max()) <= 0:
        raise DataError(
            "this is no attention map that could be classified",
            got=f"shape {tuple(one.shape)}, entries from {float(one.min()):.3g} to {float(one.max()):.3g}",
            expected=f"at least {LEAST} queries and keys, entries of 0 or more and not all 0",
            next="leave out heads whose weights are zero: their norm-weighted maps are empty",
        )
    scaled = (one / one.max()).float()[None]
    if pad_to is None:
        return scaled
    if max(one.shape) > pad_to:
        raise DataError(
            "a map is larger than those the classifier was trained on",
            got=f"{max(one.shape)} tokens",
            expected=f"at most {pad_to}, to which maps are padded",
            next='train with map_preprocess="same", which pads nothing',
        )
    high, wide = (pad_to - n for n in one.shape)
    return nn.functional.pad(scaled, (wide // 2, wide - wide // 2, high // 2, high - high // 2))


def shares(classes: Sequence[int]) -> dict[str, float]:
    """Share of each class among these maps, in [0, 1]. Raises: DataError when there are none."""
    if not classes:
        raise DataError("there are no maps to take shares of", expected="at least one map")
    return {name: sum(c == i for c in classes) / len(classes) for i, name in enumerate(CLASSES)}


# -------------------------------------------------------------------------------------------------------------- training


def train(
    maps: Sequence[Tensor],
    labels: Sequence[int],
    settings: PatternSettings | None = None,
    start: PatternClassifier | None = None,
) -> PatternClassifier:
    """A classifier trained on generated maps and then on these labelled ones (which may be none).

    With `start` the generated steps are skipped: its net, a copy of it, is trained on. The result depends on the maps, their
    order, the settings and the seed, and on nothing else that is random.
    Raises: DataError when there is no label for each map, or a label is no class.
    """
    settings = settings or PatternSettings()
    if len(maps) != len(labels) or any(not 0 <= label < len(CLASSES) for label in labels):
        got, expected = f"{len(maps)} maps, labels {sorted(set(labels))}", f"a label of 0…{len(CLASSES) - 1} for each map"
        raise DataError("labels and maps do not fit", got=got, expected=expected)
    padded, padded_later = MAP_PREPROCESS[settings.map_preprocess]
    side = max([settings.generated_largest, *(max(one.shape) for one in maps)]) if padded else None
    rng = np.random.default_rng(settings.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        net = _fresh()
    if start is not None:
        if start.trained_padded_to != side:
            raise DataError(
                "the net to start from saw maps padded otherwise", got=start.trained_padded_to, expected=side or "not padded"
            )
        net.load_state_dict(start.net.state_dict())
    ready = [prepared(one, side) for one in maps]
    optimizer = torch.optim.Adam(net.parameters(), lr=settings.learning_rate)
    net.train()
    for _ in range(0 if start is not None else settings.generated_steps):
        _step(net, optimizer, [_generated(settings.batch, settings.generated_largest, side, rng)])
    for _ in range(settings.real_epochs if maps else 0):
        for rows in _by_shape(ready, settings.batch, rng):
            real = torch.stack([ready[i] for i in rows]), torch.tensor([labels[i] for i in rows])
            _step(net, optimizer, [real, _generated(len(rows), settings.generated_largest, side, rng)])
    net.eval()
    return PatternClassifier(net, side, side if padded_later else None)


def _fresh() -> PatternNet:
    """Xavier weights and biases of 0, from the global generator."""
    net = PatternNet()
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.xavier_normal_(module.weight)
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return net


def _step(net: PatternNet, optimizer: torch.optim.Optimizer, batches: Sequence[tuple[Tensor, Tensor]]) -> None:
    """One step on the mean loss over the maps of all batches, which may be of different size."""
    optimizer.zero_grad()
    n = sum(len(labels) for _, labels in batches)
    for maps, labels in batches:
        (nn.functional.cross_entropy(net(maps), labels, reduction="sum") / n).backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _generated(n: int, largest: int, side: int | None, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """n generated maps, of one size, and their classes: as many of each class, up to rounding."""
    size = some_size(rng, largest)
    labels = (np.arange(n) + rng.integers(len(CLASSES))) % len(CLASSES)
    return torch.stack([prepared(known_map(int(c), size, rng), side) for c in labels]), torch.from_numpy(labels)


def _by_shape(maps: Sequence[Tensor], most: int, rng: np.random.Generator | None = None) -> Iterator[list[int]]:
    """Positions of maps in batches of one shape each; shuffled by `rng`, else in order."""
    order = list(range(len(maps))) if rng is None else rng.permutation(len(maps)).tolist()
    of_shape: dict[tuple[int, ...], list[int]] = {}
    for i in order:
        of_shape.setdefault(tuple(maps[i].shape), []).append(i)
    batches = [rows[at : at + most] for rows in of_shape.values() for at in range(0, len(rows), most)]
    yield from batches if rng is None else (batches[i] for i in rng.permutation(len(batches)))


# ----------------------------------------------------------------------------------------------------------------- folds


@dataclass(frozen=True, slots=True, eq=False)
class FoldScores:
    """What k classifiers say of maps that each of them has not seen."""

    weighted_f1: float  # mean F1 of the classes, by their number of maps
    confusion: Int[Tensor, "label predicted"]  # counts, in the order of CLASSES
    predicted: tuple[int, ...]  # of every map, by the classifier that had not seen it

    @property
    def counts(self) -> dict[str, int]:
        """Maps of each class."""
        return {name: int(n) for name, n in zip(CLASSES, self.confusion.sum(1), strict=True)}


def k_fold(
    maps: Sequence[Tensor],
    labels: Sequence[int],
    settings: PatternSettings | None = None,
    *,
    folds: int = 5,
    groups: Sequence[Any] | None = None,
    start: PatternClassifier | None = None,
) -> FoldScores:
    """Stratified k-fold cross-validation: each map is classified once, by a net trained on the other folds.

    With `groups`, maps of one group are never on both sides: heads have habits, and a net that has seen a head on other
    sentences has an easier task. `start` must not have seen these maps; a net trained on generated ones has not.
    Raises: DataError when there are fewer maps, or groups, than folds.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    settings = settings or PatternSettings()
    if not 2 <= folds <= len(set(range(len(maps)) if groups is None else groups)):
        raise DataError("too few maps for so many folds", got=f"{len(maps)} maps, {folds} folds", expected="2 folds or more")
    seeded = {"n_splits": folds, "shuffle": True, "random_state": settings.seed}
    if groups is not None:
        with warnings.catch_warnings():  # of a class rarer than the folds: it is in as many as it can be
            warnings.filterwarnings("ignore", message="The least populated class")
            splits = list(StratifiedGroupKFold(**seeded).split(maps, labels, groups))
    elif min(np.unique(labels, return_counts=True)[1]) >= folds:
        splits = list(StratifiedKFold(**seeded).split(maps, labels))
    else:  # a class rarer than the folds cannot be in each: dealt out class by class instead, so that each still has its share
        order = np.argsort(labels, kind="stable")
        dealt = np.empty(len(maps), dtype=int)
        dealt[order] = np.arange(len(maps)) % folds
        splits = [(np.flatnonzero(dealt != fold), np.flatnonzero(dealt == fold)) for fold in range(folds)]
    predicted = [-1] * len(maps)
    for seen, unseen in splits:
        classifier = train([maps[i] for i in seen], [labels[i] for i in seen], settings, start)
        for i, found in zip(unseen, classifier.classify([maps[i] for i in unseen]), strict=True):
            predicted[i] = found
    return scored(labels, predicted)


def scored(labels: Sequence[int], predicted: Sequence[int]) -> FoldScores:
    """Weighted F1 and confusion of predictions that are there already."""
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for label, found in zip(labels, predicted, strict=True):
        confusion[label, found] += 1
    right, of_label, of_found = confusion.diagonal().double(), confusion.sum(1).double(), confusion.sum(0).double()
    f1 = 2 * right / (of_label + of_found).clamp_min(1)
    return FoldScores(float((f1 * of_label).sum() / of_label.sum()), confusion, tuple(predicted))


# --------------------------------------------------------------------------------------------------------------- weights


def shipped(kind: str) -> PatternClassifier:
    """The classifier that comes with tombola: "raw" or "weighted". How it was made: `card`.

    Raises: DataError for another kind.
    """
    if kind not in card()["nets"]:
        raise DataError("there is no such classifier of patterns", got=kind, expected=", ".join(card()["nets"]))
    stored = load((files("tombola.attention") / "data" / "patterns.safetensors").read_bytes())
    net = PatternNet()
    net.load_state_dict({name.removeprefix(f"{kind}."): x.float() for name, x in stored.items() if name.startswith(f"{kind}.")})
    return PatternClassifier(net.eval())


def card() -> dict[str, Any]:
    """How the shipped weights were made: settings, maps, folds, seeds, versions."""
    said: dict[str, Any] = json.loads((files("tombola.attention") / "data" / "patterns.json").read_text(encoding="utf-8"))
    return said


def packed(classifiers: dict[str, PatternClassifier]) -> bytes:
    """Their weights as one safetensors file in half precision, names beginning with the kind."""
    stored: bytes = save(
        {f"{kind}.{name}": x.half() for kind, one in classifiers.items() for name, x in one.net.state_dict().items()}
    )
    return stored
