"""Rows of what is measured beside tickets and scores, as `tombola.study.results.collect` hands them on.

One dataclass and one row of `FILES` for each file that cells write; the fields of a row are those of the file's lines, but for
`cell`, the key of the cell that the line is from.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tombola.study.cells import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """One head of one model over a sample of rows, in maps of one kind."""

    cell: str
    model: str
    task: str
    seed: int | None  # None: of the pre-trained model, which all seeds share
    weights: str  # "fine_tuned" | "pretrained"
    kind: str  # "raw" | "weighted"
    layer: int  # row of a mask's heads
    run: int  # 0, or more where one block runs several times (ALBERT)
    head: int
    n: int  # maps with a class
    unclassified: int  # maps of zeros
    counts: Mapping[str, int]  # class → maps
    shares: Mapping[str, float]  # class → share of n; empty where n is 0
    # entropy (nats), distance (tokens), previous, self, next, mass_cls, mass_sep, mass_punctuation (shares): means over rows
    means: Mapping[str, float | None]
    f1: float  # weighted F1 of the classifier on labelled maps, see pattern_split
    split: str
    norm_map_weight: str
    map_inputs: str
    map_preprocess: str
    pattern_split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MapSample:
    """One map to look at, drawn by chance among those of its kind and class."""

    cell: str
    model: str
    task: str
    seed: int | None
    weights: str
    kind: str
    name: str
    layer: int
    run: int
    head: int
    tokens: int
    probability: float  # of its class
    row: str  # id of the row it is of
    label: str  # its class
    pixels: tuple[tuple[int, ...], ...]  # [query][key], 0…255, the largest 255


@dataclass(frozen=True, slots=True, kw_only=True)
class Magnitude:
    """Mean |weight| of one head or MLP of one model."""

    cell: str
    model: str
    task: str
    seed: int | None
    weights: str  # "fine_tuned" | "pretrained"
    part: str  # "heads" | "mlps"
    layer: int
    head: int | None
    mean_abs: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SubgroupRow:
    """The score of one subgroup of a split, as of one heuristic of HANS; of each cell that has a ScoreRow on that split."""

    cell: str
    model: str
    task: str
    seed: int
    kind: str
    stage: str
    draw: int
    split: str
    role: str
    group: str
    metric: str
    value: float
    n: int
    majority: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CrossedMask:
    """The ticket of one combination of a crossed design."""

    cell: str
    model: str
    task: str
    search: str
    head_seed: int
    data_seed: int
    dropout_seed: int
    heads: tuple[tuple[float, ...], ...]  # as of a TicketRow
    mlps: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LandscapeRow:
    """The loss around one model, on one set of rows; of a ticket also on the line from the dense model to it."""

    cell: str
    model: str
    task: str
    seed: int
    kind: str  # "full" for the dense model, else of a retrained ticket
    draw: int
    role: str  # "train" | "report"
    split: str
    n: int  # rows
    loss: float  # of the model itself: cross-entropy in nats, or mean squared error
    at: tuple[float, ...]  # places of the line, 0 = dense, 1 = ticket; empty for the dense model
    losses: tuple[float, ...]  # there
    over_line: float | None  # the largest excess over the straight line between both ends; 0 = no barrier
    over_ends: float | None  # over the higher end
    barrier_at: float | None
    sharpness: float  # mean rise of the loss when weights are moved by radius times a filter-normalised random direction
    rises: tuple[float, ...]  # of each direction
    radius: float
    search: str = ""  # as of a ScoreRow
    family: str = ""
    preset: str = ""


# field of Results → (file of a cell, dataclass of its lines)
FILES: Mapping[str, tuple[str, type[Any]]] = {
    "attention": ("attention.jsonl", AttentionRow),
    "map_samples": ("samples.jsonl", MapSample),
    "magnitudes": ("magnitudes.jsonl", Magnitude),
    "landscape": ("landscape.jsonl", LandscapeRow),
    "subgroups": ("subgroups.jsonl", SubgroupRow),
}


def rows_beside(key: str, folder: Path) -> dict[str, list[Any]]:
    """Field of Results → rows of one cell, for the files that it has."""
    found: dict[str, list[Any]] = {}
    for name, (file, kind) in FILES.items():
        if (folder / file).is_file() and (lines := read_rows(folder / file)):
            if kind is MapSample:
                pixels = _pixels(folder)
                lines = [line | {"pixels": pixels[line["name"]]} for line in lines]
            found[name] = [kind(cell=key, **{field: _frozen(value) for field, value in line.items()}) for line in lines]
    return found


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _pixels(folder: Path) -> dict[str, tuple[tuple[int, ...], ...]]:
    from safetensors.torch import load_file

    return {name: tuple(map(tuple, one.tolist())) for name, one in load_file(folder / "samples.safetensors").items()}
