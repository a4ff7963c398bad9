"""What a written row is made of, and the small words that several grammars share."""

import random
from collections.abc import Callable, Mapping
from typing import NamedTuple


class Drawn(NamedTuple):
    texts: tuple[str, ...]
    shared: tuple[str, ...] = ()  # texts shown after these, that may turn up in every split: how a sentence goes on
    hidden: tuple[str, ...] = ()  # texts not shown that nevertheless may turn up nowhere else: the other half of a pair


class Want(NamedTuple):
    """One row to be written."""

    label: int | None
    group: str
    draw: Callable[[random.Random], Drawn]


def sentence(words: str, end: str = ".") -> str:
    return words[0].upper() + words[1:] + end


def word_list(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Times, places and what stands between nouns
FILLERS: Mapping[str, tuple[str, ...]] = {
    "time": (
        *("yesterday", "last week", "last summer", "on Monday", "on Friday", "this morning", "in March", "in October"),
        *("after lunch", "before sunrise", "at noon", "at midnight"),
    ),
    "place": (
        *("in the garden", "at the station", "near the lake", "behind the church", "in the kitchen", "at the market"),
        *("by the river", "at the airport", "in the library", "near the harbor", "outside the museum", "in the park"),
        *("at the theater", "on the bridge", "in the village", "behind the barn", "at the hotel", "in the office"),
        *("near the castle", "in the basement", "on the beach", "at the stadium", "in the hallway", "on the train"),
    ),
    "near": ("near", "behind", "beside", "next to", "in front of", "across from"),
    "knew": ("knew", "remembered", "realized", "noticed", "discovered", "learned", "forgot", "saw"),
    "claimed": ("claimed", "believed", "suspected", "hoped", "feared", "assumed", "imagined", "pretended", "guessed"),
    "because": ("because", "after", "although", "while", "when", "since"),
    "in_case": ("in case", "to find out whether", "without knowing whether", "without asking whether"),
}
