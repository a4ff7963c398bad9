"""Nested masks of single values: one number a value says at which level it was removed, and the last of a chain says all.

Iterative pruning gives masks that lie within each other. Kept apart, nine of them weigh nine bits a value; as the level at which
each value goes they weigh four (`Levels.pack`: one plane of bits for each binary digit). What one mask removes of another weighs
less still (`pack_within`): a store keeps a chain so, each mask within the one before.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from torch import Tensor

from tombola.errors import MaskError
from tombola.mask import Mask

MOST = 255  # levels: a value's own is kept in one byte
BLOCKS = (1, 2, 3, 4, 6, 8, 12)  # sizes that `pack_within` tries


@dataclass(frozen=True, slots=True, eq=False)
class Levels:
    """A chain of nested masks. `pruned_at`: parameter name → the level at which each value goes, uint8; 0 = never.

    Levels count from 1, the largest mask; level 0 removes nothing. Raises: MaskError when a tensor is not uint8, or when there
    are no levels.
    """

    pruned_at: Mapping[str, Tensor]
    n: int  # levels; the last may remove nothing more than the one before it

    def __post_init__(self) -> None:
        wrong = {name: str(at.dtype) for name, at in self.pruned_at.items() if at.dtype != torch.uint8}
        beyond = [name for name, at in self.pruned_at.items() if at.numel() and int(at.max()) > self.n] if not wrong else []
        if wrong or beyond or not self.pruned_at or not 1 <= self.n <= MOST:
            got = wrong or (f"a level above {self.n} in {', '.join(beyond[:4])}" if beyond else f"{self.n} levels")
            raise MaskError("these are no levels", got=got, expected=f"uint8 for each parameter, of 1 to {MOST} levels")
        object.__setattr__(self, "pruned_at", MappingProxyType(dict(sorted(self.pruned_at.items()))))

    @staticmethod
    def of(masks: Sequence[Mask]) -> "Levels":
        """The levels of masks from the largest to the smallest. Raises: MaskError when they are not nested (naming the first
        pair and parameter), not of the same parameters, or not of single values alone."""
        if not masks or not 1 <= len(masks) <= MOST:
            raise MaskError("a chain has levels", got=f"{len(masks)} masks", expected=f"1 to {MOST}")
        names = list(masks[0].values)
        for level, mask in enumerate(masks, start=1):
            if list(mask.parts()) != names:
                raise MaskError(
                    "the masks of a chain are of the values of the same parameters",
                    got=f"level {level}: {', '.join(list(mask.parts())[:4])}",
                    expected=", ".join(names[:4]),
                )
        pruned_at = {name: torch.zeros(masks[0].values[name].shape, dtype=torch.uint8) for name in names}
        for level in range(len(masks), 0, -1):  # backwards: the first level that removes a value is written last
            for name, at in pruned_at.items():
                kept = masks[level - 1].values[name].cpu()
                if kept.shape != at.shape:
                    raise MaskError(
                        "the masks of a chain are of different shape",
                        got=f"{name}: {tuple(kept.shape)}",
                        expected=tuple(at.shape),
                    )
                back = ~kept & (at != level + 1)  # removed here and not by the next
                if level < len(masks) and bool(back.any()):
                    raise MaskError(
                        "the levels are not nested",
                        got=f"level {level + 1} keeps {int(back.sum())} values of {name} that level {level} removed",
                        expected="each level within the one before",
                        next="a chain prunes on from its last mask and never gives a value back",
                    )
                at[~kept] = level
        return Levels(pruned_at, len(masks))

    def mask(self, level: int) -> Mask:
        """What level 0 … n keeps. Raises: MaskError for another."""
        if not 0 <= level <= self.n:
            raise MaskError("there is no such level", got=level, expected=f"0 to {self.n}")
        return Mask(values={name: (at == 0) | (at > level) for name, at in self.pruned_at.items()})

    @property
    def sparsities(self) -> tuple[float, ...]:
        """The removed share of all values at levels 1 … n, exact."""
        counts = np.zeros(MOST + 1, dtype=np.int64)
        for at in self.pruned_at.values():
            counts += np.bincount(at.numpy().reshape(-1), minlength=MOST + 1)
        return tuple((np.cumsum(counts[1 : self.n + 1]) / counts.sum()).tolist())

    @property
    def planes(self) -> int:
        """Bits a value: 4 for 9 levels, up to 15."""
        return self.n.bit_length()

    def pack(self) -> dict[str, Tensor]:
        """Parameter name → [plane, bytes]: plane p has binary digit p of every value's level, packed as `Mask.pack` does."""
        return {
            name: torch.from_numpy(
                np.stack([np.packbits(at.numpy().reshape(-1) >> p & 1, bitorder="little") for p in range(self.planes)])
            )
            for name, at in self.pruned_at.items()
        }

    @staticmethod
    def unpack(packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], n: int) -> "Levels":
        """The levels that `pack` was called on. Raises: MaskError when bytes, shapes and n do not belong together."""
        if packed.keys() != shapes.keys() or not 1 <= n <= MOST:
            raise MaskError("level bytes and shapes name different parts", got=sorted(packed)[:6], expected=sorted(shapes)[:6])
        pruned_at = {}
        for name, shape in shapes.items():
            planes, size = packed[name].numpy(), math.prod(shape)
            if planes.dtype != np.uint8 or planes.shape != (n.bit_length(), -(-size // 8)):
                raise MaskError(
                    f"levels of {name} have the wrong number of bytes",
                    got=f"{planes.shape} × {planes.dtype}",
                    expected=f"{(n.bit_length(), -(-size // 8))} bytes for shape {tuple(shape)}",
                )
            bits = np.unpackbits(planes, axis=1, count=size, bitorder="little")
            level = np.zeros(size, dtype=np.uint8)
            for p, plane in enumerate(bits):
                level |= plane << p
            pruned_at[name] = torch.from_numpy(level).reshape(tuple(shape))
        return Levels(pruned_at, n)


# --------------------------------------------------------------------------------------------------- one mask within another


def pack_within(parent: Mask, child: Mask) -> dict[str, Tensor]:
    """Parameter name → bytes: which of the values that `parent` keeps `child` removes.

    One bit for each of them; or, where that is shorter, one bit for each block of a few, and the bits of those blocks that lose
    any. The first byte is the size of a block. A tenth removed takes 0.60 bits a value.
    Raises: MaskError when `child` keeps what `parent` removed, or is of other parameters.
    """
    _check_within(parent, child)
    packed = {}
    for name, kept in child.values.items():
        gone = ~kept.numpy().reshape(-1)[parent.values[name].numpy().reshape(-1)]
        options = [(_blocks(gone, size), size) for size in BLOCKS]
        best = min(options, key=lambda one: sum(x.size for x in one[0]))
        packed[name] = torch.from_numpy(np.concatenate([np.array([best[1]], dtype=np.uint8), *best[0]]))
    return packed


def unpack_within(parent: Mask, packed: Mapping[str, Tensor]) -> Mask:
    """The child that `pack_within(parent, child)` was called on. Raises: MaskError for bytes that do not fit the parent."""
    if packed.keys() != parent.values.keys():
        raise MaskError("these bytes are of other parameters than the mask they lie within", got=sorted(packed)[:6])
    values = {}
    for name, kept in parent.values.items():
        flat = kept.numpy().reshape(-1).copy()
        bits, n = packed[name].numpy(), int(np.count_nonzero(flat))
        try:
            gone = _unblocked(bits, n)
        except (IndexError, ValueError) as error:
            raise MaskError(
                f"the bytes of {name} do not fit the mask they lie within", got=f"{bits.size} bytes for {n}"
            ) from error
        flat[flat] = ~gone
        values[name] = torch.from_numpy(flat).reshape(kept.shape)
    return Mask(values=values)


def _check_within(parent: Mask, child: Mask) -> None:
    if list(parent.parts()) != list(child.parts()) or list(child.parts()) != list(child.values):
        raise MaskError("a mask lies within another of the values of the same parameters", got=list(child.parts())[:4])
    back = [name for name, kept in child.values.items() if bool((kept & ~parent.values[name]).any())]
    if back:
        raise MaskError(
            "the levels are not nested", got=f"values of {', '.join(back[:4])} come back", expected="one within the other"
        )


def _blocks(gone: "np.ndarray[tuple[int], np.dtype[np.bool_]]", size: int) -> list[np.ndarray]:
    """Bytes of `gone`: of size 1 its bits; else of which blocks hold any, and the bits of those."""
    if size == 1:
        return [np.packbits(gone, bitorder="little")]
    blocks = np.concatenate([gone, np.zeros(-len(gone) % size, dtype=bool)]).reshape(-1, size)
    hit = blocks.any(1)
    return [np.packbits(hit, bitorder="little"), np.packbits(blocks[hit].reshape(-1), bitorder="little")]


def _unblocked(packed: "np.ndarray[tuple[int], np.dtype[np.uint8]]", n: int) -> np.ndarray:
    """Which of `n` entries are gone. Raises: ValueError when these bytes are not of so many."""
    size, rest = int(packed[0]), packed[1:]
    if size == 1:
        if rest.size != -(-n // 8):
            raise ValueError
        return np.unpackbits(rest, count=n, bitorder="little").view(bool)
    n_blocks = -(-n // size) if size else 0
    split = -(-n_blocks // 8)
    hit = np.unpackbits(rest[:split], count=n_blocks, bitorder="little").view(bool)
    inside = int(np.count_nonzero(hit)) * size
    if size == 0 or rest.size != split + -(-inside // 8):
        raise ValueError
    blocks = np.zeros((n_blocks, size), dtype=bool)
    blocks[hit] = np.unpackbits(rest[split:], count=inside, bitorder="little").view(bool).reshape(-1, size)
    return blocks.reshape(-1)[:n]
