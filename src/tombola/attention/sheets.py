"""Contact sheets of attention maps as PNG pictures, to be labelled by eye: maps side by side, each with its number on the sheet.

The pictures need no plotting library, and say nothing of a map but its place on the sheet: who labels them is to be blind.
"""

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

# 3 × 5 dots for each digit, row by row.
DIGITS = {
    "0": (7, 5, 5, 5, 7), "1": (2, 6, 2, 2, 7), "2": (7, 1, 7, 4, 7), "3": (7, 1, 7, 1, 7), "4": (5, 5, 7, 1, 1),
    "5": (7, 4, 7, 1, 7), "6": (7, 4, 7, 5, 7), "7": (7, 1, 1, 1, 1), "8": (7, 5, 7, 5, 7), "9": (7, 5, 7, 1, 7),
}  # fmt: skip
FRAME, LABEL, DOT, INK = 6, 18, 3, (0.75, 0.1, 0.1)  # pixels; numbers are dark red, since maps are grey


def contact_sheet(maps: Sequence[Tensor], columns: int = 5, side: int = 180) -> bytes:
    """A PNG of these maps [query, key] in reading order, numbered from 1; at most `side` pixels wide, the largest entry black."""
    rows = -(-len(maps) // columns)
    cell = side + FRAME
    picture = np.ones((rows * (cell + LABEL) + FRAME, columns * cell + FRAME, 3))
    for i, one in enumerate(maps):
        top, left = i // columns * (cell + LABEL) + FRAME, i % columns * cell + FRAME
        _write(picture, str(i + 1), top, left)
        n = max(one.shape)
        grey = 1 - (one / one.max().clamp_min(1e-30)).double().numpy()
        drawn = np.kron(grey, np.ones((side // n, side // n)))
        top += LABEL
        height, width = drawn.shape
        picture[top - 1 : top + height + 1, left - 1 : left + width + 1] = (0.4, 0.6, 0.9)
        picture[top : top + height, left : left + width] = drawn[..., None]
    return png(np.round(picture * 255).astype(np.uint8))


def png(picture: NDArray[np.uint8]) -> bytes:
    """An RGB picture [height, width, 3] as a PNG file."""
    height, width, _ = picture.shape
    lines = b"".join(b"\0" + line.tobytes() for line in picture)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines, 9)) + chunk(b"IEND", b"")


def _write(picture: NDArray[np.float64], digits: str, top: int, left: int) -> None:
    for at, digit in enumerate(digits):
        for y, bits in enumerate(DIGITS[digit]):
            for x in range(3):
                if bits >> (2 - x) & 1:
                    y0, x0 = top + y * DOT, left + (at * 4 + x) * DOT
                    picture[y0 : y0 + DOT, x0 : x0 + DOT] = INK
