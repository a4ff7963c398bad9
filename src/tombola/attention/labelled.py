"""Maps with labels by eye: those of the demo model that come with tombola, and files in the published layout.

The 200 maps of the demo model, raw and norm-weighted, are recomputed from it; what is stored is which they are (sentence, block,
head) and their labels. How they were labelled, and what their two passes are worth: docs/attention-patterns.md.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from tombola.anatomy import read_anatomy
from tombola.attention.known import CLASSES
from tombola.attention.maps import attention_maps
from tombola.attention.sheets import contact_sheet
from tombola.errors import DataError
from tombola.tasks.base import Rows
from tombola.tasks.encode import encode

DATA = files("tombola.attention") / "data"
KINDS = ("raw", "weighted")
SAMPLE, SAMPLE_SEED, PER_SHEET = 200, 2005, 25


@dataclass(frozen=True, slots=True, order=True)
class Identity:
    """Which map of the demo model: of which sentence of the list, which attention block, which head."""

    sentence: str
    block: int
    head: int


@dataclass(frozen=True, slots=True, eq=False)
class Labelled:
    """Maps with a class each, as a position in CLASSES."""

    names: tuple[str, ...]
    maps: tuple[Tensor, ...]  # [query, key] each; sizes differ
    labels: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Agreement:
    """What two passes over the same maps have in common."""

    n: int
    share: float  # of maps with the same label in both
    kappa: float | None  # Cohen's; None where both passes give one and the same label throughout
    confusion: Int[Tensor, "first second"]  # counts, in the order of CLASSES


def sentences() -> Rows:
    """The sentences and pairs of sentences, written for this purpose; of single ones the second is empty; labels say nothing."""
    lines = [line.split("\t") for line in (DATA / "sentences.tsv").read_text(encoding="utf-8").splitlines()[1:]]
    ids, firsts, seconds = zip(*lines, strict=True)
    return Rows(tuple(ids), tuple(zip(firsts, seconds, strict=True)), (0,) * len(lines))


def sample(n: int = SAMPLE, seed: int = SAMPLE_SEED, blocks: int = 6, heads: int = 12) -> tuple[Identity, ...]:
    """n different maps, drawn uniformly over sentences, blocks and heads."""
    every = [Identity(s, b, h) for s in sentences().ids for b in range(blocks) for h in range(heads)]
    return tuple(random.Random(seed).sample(every, n))


def maps_of(wanted: Sequence[Identity], kind: str) -> list[Tensor]:
    """These maps of the demo model, recomputed: [query, key] each, "raw" or "weighted", segment ids passed, real tokens only.

    Raises: TombolaError when the demo model is not installed; DataError for another kind.
    """
    from transformers import AutoTokenizer

    from tombola.objective import load_weights
    from tombola.source import resolve_model

    if kind not in KINDS:
        raise DataError("there is no such kind of map", got=kind, expected=", ".join(KINDS))
    folder = resolve_model("demo").folder
    model, tokenizer = load_weights(folder, ("0", "1"), head_seed=0), AutoTokenizer.from_pretrained(folder)
    needed, found = set(wanted), dict[Identity, Tensor]()
    rows, anatomy = sentences(), read_anatomy(model)
    for paired in (False, True):
        some = rows.take(i for i, texts in enumerate(rows.texts) if bool(texts[1]) == paired)
        texts = some.texts if paired else tuple(texts[:1] for texts in some.texts)
        for row in attention_maps(model, anatomy, encode(tokenizer, Rows(some.ids, texts, some.labels), 128)):
            for one in row.maps:
                for head, each in enumerate(one.raw if kind == "raw" else one.weighted):
                    if (identity := Identity(row.id, one.block, head)) in needed:
                        found[identity] = each.clone()
    return [found[identity] for identity in wanted]


# ---------------------------------------------------------------------------------------------------------------- passes


def order_of(kind: str, labelling: int) -> list[int]:
    """In which order a pass (1, 2, …) shows the maps of `sample()`: another one for each kind and pass."""
    order = list(range(SAMPLE))
    random.Random(f"{kind} pass {labelling}").shuffle(order)
    return order


def sheets(kind: str, labelling: int) -> list[bytes]:
    """The contact sheets of a pass as PNG files, 25 maps each; nothing on them tells which map is which."""
    maps, order = maps_of(sample(), kind), order_of(kind, labelling)
    return [contact_sheet([maps[i] for i in order[at : at + PER_SHEET]]) for at in range(0, SAMPLE, PER_SHEET)]


def write_pass(file: Path, kind: str, labelling: int, answers: Sequence[str]) -> None:
    """Writes the labels of a pass, given in the order of its sheets, as a table of identities and labels.

    Raises: DataError unless there is a class for every map.
    """
    if len(answers) != SAMPLE or (unknown := set(answers) - set(CLASSES)):
        got = f"{len(answers)} answers" if len(answers) != SAMPLE else sorted(unknown)
        raise DataError("these are no labels of a pass", got=got, expected=f"{SAMPLE} of {', '.join(CLASSES)}")
    said = dict(zip(order_of(kind, labelling), answers, strict=True))
    lines = [f"{one.sentence}\t{one.block}\t{one.head}\t{said[i]}" for i, one in enumerate(sample())]
    file.write_text("\n".join(["sentence\tblock\thead\tlabel", *lines]) + "\n", encoding="utf-8")


def read_pass(kind: str, labelling: int) -> dict[Identity, int]:
    """The labels of a pass that comes with tombola: which map -> position in CLASSES."""
    lines = (DATA / f"labels-{kind}-{labelling}.tsv").read_text(encoding="utf-8").splitlines()[1:]
    fields = [line.split("\t") for line in lines]
    return {Identity(s, int(block), int(head)): CLASSES.index(label) for s, block, head, label in fields}


def agreement(first: Sequence[int], second: Sequence[int]) -> Agreement:
    """Share of equal labels, Cohen's kappa and confusion of two passes, given as positions in CLASSES, map by map."""
    confusion = torch.zeros(len(CLASSES), len(CLASSES), dtype=torch.int64)
    for a, b in zip(first, second, strict=True):
        confusion[a, b] += 1
    n = len(first)
    share = float(confusion.diagonal().sum()) / n
    by_chance = float((confusion.sum(0) * confusion.sum(1)).sum()) / n**2
    return Agreement(n, share, None if by_chance == 1 else (share - by_chance) / (1 - by_chance), confusion)


def labelled_maps(kind: str) -> Labelled:
    """The maps of the demo model whose label is the same in both passes, with it."""
    first, second = read_pass(kind, 1), read_pass(kind, 2)
    agreed = [identity for identity in sample() if first[identity] == second[identity]]
    names = tuple(f"{one.sentence}/{one.block}/{one.head}" for one in agreed)
    return Labelled(names, tuple(maps_of(agreed, kind)), tuple(first[one] for one in agreed))


# ------------------------------------------------------------------------------------------------------ published layout

# What published labels are called → ours. Three sub-labels of vertical are one class there, too.
PUBLISHED = {
    **{name: name for name in CLASSES},
    "vertical_diagonal": "mix",
    "diagonal_vertical": "mix",
    "vertical+diagonal": "mix",
    "heterogeneous": "other",
}


def read_published(folder: Path, labels: Path) -> Labelled:
    """Maps and labels in the published layout: `folder` with one map a file (NAME.npy, a square of numbers), and a text file.

    That has either lines "label = name, name, …" or, as .tsv, lines of name and label. A name is that of the file without .npy;
    one of digits alone may lack leading zeros. Labels with "vertical" in them are vertical, unless they name a diagonal too.
    Files that no line names are left out. Nothing is unpickled.

    Raises: DataError naming what cannot be read: unknown labels, names without a file, a map labelled twice.
    Source: the layout of Kovaleva et al. 2019 and Prasanna et al. 2020, by their released code.
    """
    stems = {file.stem: file for file in sorted(folder.glob("*.npy"))}
    pairs = list(_pairs(labels))
    named = [(_stem(name, stems), label) for name, label in pairs]
    missing = [name for (name, _), (stem, _) in zip(pairs, named, strict=True) if stem is None]
    unknown = sorted({label for _, label in pairs if _class(label) is None})
    of_stem: dict[str, set[int]] = {}
    for stem, label in named:
        if stem is not None and (found := _class(label)) is not None:
            of_stem.setdefault(stem, set()).add(found)
    twice = [stem for stem, found in of_stem.items() if len(found) > 1]
    wrong = [("labels unknown", unknown), ("no file for", missing), ("two labels for", twice)]
    if not pairs or any(names for _, names in wrong):
        said = "; ".join(f"{what} {', '.join(names[:6])}" for what, names in wrong if names)
        raise DataError(
            f"the labelled maps of {labels.name} cannot be read",
            got=said or "no labels",
            expected=f"lines 'label = name, name' or name, tab, label; labels of {', '.join(PUBLISHED)}; {folder.name}/NAME.npy",
        )
    maps = []
    for stem in of_stem:
        array = np.load(stems[stem], allow_pickle=False)
        if array.ndim != 2 or array.dtype.kind not in "fiu":
            raise DataError(f"{stem}.npy is no map", got=f"{array.dtype} {array.shape}", expected="numbers [query, key]")
        maps.append(torch.from_numpy(array.astype(np.float32)))
    return Labelled(tuple(of_stem), tuple(maps), tuple(next(iter(found)) for found in of_stem.values()))


def _pairs(labels: Path) -> list[tuple[str, str]]:
    """(name, label) as the file has them."""
    lines = [line.strip() for line in labels.read_text(encoding="utf-8").splitlines() if line.strip()]
    if labels.suffix == ".tsv":
        split = [line.split("\t") for line in lines]
        rows = [(x[0].strip(), x[1].strip()) for x in split if len(x) == 2]
        if len(rows) < len(lines):
            raise DataError(f"{labels.name} is no table of names and labels", expected="two columns, a tab between them")
        return rows[1:] if rows and rows[0][1] == "label" else rows
    found = []
    for line in lines:
        label, equals, names = line.partition("=")
        if not equals:
            raise DataError(f"a line of {labels.name} is no label", got=line[:80], expected="label = name, name, …")
        found += [(name.strip(), label.strip()) for name in names.split(",") if name.strip()]
    return found


def _stem(name: str, stems: dict[str, Path]) -> str | None:
    return next((one for one in (name, name.removesuffix(".npy"), name.zfill(4)) if one in stems), None)


def _class(label: str) -> int | None:
    label = label.lower().replace(" ", "_")
    known = PUBLISHED.get(label) or ("vertical" if "vertical" in label and "diagonal" not in label else None)
    return None if known is None else CLASSES.index(known)
