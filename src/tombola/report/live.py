"""What the page's script can work out again when a reader chooses seeds: a number with the value of each seed behind it.

Python writes the number over all seeds and, beside it, what it was made of (`data-v`) and how (`data-f` for text, `data-b` for
a mark's place). The script knows the same few sums: mean, sample std, t interval. Of this room it imports nothing.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

BySeed = Mapping[int, float]


class Live(str):
    """Text of a number over seeds. `how`: s mean ± std, i interval, m mean, n how many; then decimals, then + for a sign."""

    by_seed: BySeed
    how: str

    def __new__(cls, text: str, by_seed: BySeed, how: str) -> "Live":
        made = super().__new__(cls, text)
        made.by_seed, made.how = by_seed, how
        return made

    @property
    def data(self) -> str:
        """The values as they stand in the page."""
        return values(self.by_seed)


def values(by_seed: BySeed) -> str:
    """As in "0:0.8125 1:0.79": the script reads it back."""
    return " ".join(f"{seed}:{value:.7g}" for seed, value in by_seed.items())


def over(by_seed: BySeed) -> str:
    """The attribute of a mark, or of a group of marks, that lies where its seeds put it; none where a value is broken."""
    return f' data-v="{escape(values(by_seed))}"' if by_seed and all(map(math.isfinite, by_seed.values())) else ""


def bound(*places: tuple[str, str, Callable[[float], float]], unit: str = "") -> str:
    """The attribute that says how: (attribute, statistic, its scale) of each. m mean, l and h one std below and above it."""
    said = []
    for name, statistic, scale in places:
        start = scale(0.0)
        said.append(f"{name},{statistic},{start:.6g},{scale(1.0) - start:.8g}{',' + unit if unit else ''}")
    return f' data-b="{" ".join(said)}"'


def grid(by_seed: Mapping[int, Sequence[float]]) -> str:
    """The values of all cells of a map, seed by seed: "0:1,0,.5;1:…"."""
    return ";".join(f"{seed}:{','.join(_short(value) for value in found)}" for seed, found in by_seed.items())


def _short(value: float) -> str:
    text = f"{value:.4g}"
    return text[1:] if text.startswith("0.") else text
