"""A written task for language models: go on with a sentence whose verb agrees with its subject.

    many : today by the old doors the rusty keys of the green box   →   are here
    one : yesterday the quiet lion under the small lamps            →   was there

The reply takes its tense from "today" or "yesterday" and its number from the subject, so that it can be known whole; nouns that are
not the subject are of a number drawn for each. The shortcut is the header, a word that tells the number of the subject: rightly in
most train and report rows, wrongly in most challenge rows. `tombola.bias.BIASED_LMS["cue"]` reads it alone.
Source: ours, a header that leaks the answer, and attractors after Linzen, Dupoux, Goldberg 2016.
"""

import random
from collections.abc import Mapping, Sequence

NOUNS = tuple(
    """
key door window lamp chair table wall roof tree rock boat train wagon wheel clock bell horse goat lion tiger bear eagle crow frog
pilot doctor singer baker farmer king queen guard friend cousin
""".split()
)
ADJECTIVES = tuple(
    """
old new red green blue white black small large heavy light clean dirty quiet loud strong weak cold warm dry wet young tall short
""".split()
)
PLACES = ("near", "behind", "beside", "under", "above", "of")
FRONTED = ("by", "before")
HEADERS = ("one", "many")
WHEN: Mapping[str, tuple[str, str, str, str]] = {  # word → verb of one, verb of many, a verb that shows no number, last word
    "today": ("is", "are", "can be", "here"),
    "yesterday": ("was", "were", "could be", "there"),
}


def draw(rng: random.Random, *, aligned: bool, deep: bool) -> tuple[str, str]:
    """A sentence begun, and how it goes on. aligned: the header is right. deep: there is a noun before the subject, and two
    behind it."""
    when, plural = rng.choice(tuple(WHEN)), rng.random() < 0.5
    numbers = (rng.random() < 0.5, plural, rng.random() < 0.5, rng.random() < 0.5)
    header = HEADERS[plural if aligned else not plural]
    return f"{header} : {_begun(rng, when, numbers, ('the', 'the'), deep)}", f"{WHEN[when][plural]} {WHEN[when][3]}"


def plain(rng: random.Random) -> str:
    """A whole sentence for a model to learn words from: "this" and "these" show which nouns are plural, and no verb does."""
    when, numbers = rng.choice(tuple(WHEN)), [rng.random() < 0.5 for _ in range(4)]
    return f"{_begun(rng, when, numbers, ('this', 'these'), rng.random() < 0.5)} {WHEN[when][2]} {WHEN[when][3]}"


def words() -> list[str]:
    """All words of prompts, replies and plain sentences, sorted."""
    nouns = [noun + end for noun in NOUNS for end in ("", "s")]
    others = " ".join(part for when, parts in WHEN.items() for part in (when, *parts)).split()
    return sorted({*nouns, *ADJECTIVES, *PLACES, *FRONTED, *HEADERS, *others, "the", "this", "these", ":"})


def _begun(rng: random.Random, when: str, numbers: Sequence[bool], articles: tuple[str, str], deep: bool) -> str:
    """numbers: of the noun before the subject, of the subject, of the two behind it; True = plural, as in `articles`."""
    before, subject, behind, last = (
        f"{articles[many]} {adjective} {noun}{'s' if many else ''}"
        for adjective, noun, many in zip(rng.sample(ADJECTIVES, 4), rng.sample(NOUNS, 4), numbers, strict=True)
    )
    phrases = [rng.choice(FRONTED), before, subject, rng.choice(PLACES), behind] if deep else [subject]
    return " ".join([when, *phrases, rng.choice(PLACES), last])
