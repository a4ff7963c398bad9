"""A written task for language models: go on with a sentence whose verb agrees with its subject.

    many : today by the old doors the rusty keys of the green box   →   are here
    one : yesterday the quiet lion under the small lamps            →   was there

The reply takes its tense from "today" or "yesterday" and its number from the subject, so that it can be known whole; nouns that
are not the subject are of a number drawn for each. The shortcut is the header, a word that tells the number of the subject:
rightly in most train and report rows, wrongly in most challenge rows. `tombola.bias.BIASED_LMS["cue"]` reads it alone.
Source: ours, a header that leaks the answer, and attractors after Linzen, Dupoux, Goldberg 2016.
"""

import random
from collections.abc import Iterator, Mapping
from functools import partial

from tombola.tasks.wanted import Drawn, Want, word_list

NOUNS = word_list("""
key door window lamp chair table wall roof tree rock boat train wagon wheel clock bell horse goat lion tiger bear eagle crow frog
pilot doctor singer baker farmer king queen guard friend cousin
""")
ADJECTIVES = word_list("""
old new red green blue white black small large heavy light clean dirty quiet loud strong weak cold warm dry wet young tall short
""")
PLACES = ("near", "behind", "beside", "under", "above", "of")
FRONTED = ("by", "before")
HEADERS = ("one", "many")
WHEN: Mapping[str, tuple[str, str, str, str]] = {  # word → verb of one, verb of many, a verb that shows no number, last word
    "today": ("is", "are", "can be", "here"),
    "yesterday": ("was", "were", "could be", "there"),
}


def draw(rng: random.Random, *, aligned: bool, deep: bool) -> tuple[str, str]:
    """A sentence begun, and how it goes on. aligned: the header is right. deep: one or two nouns stand before the subject."""
    when, plural = rng.choice(tuple(WHEN)), rng.random() < 0.5
    header = HEADERS[plural if aligned else not plural]
    return f"{header} : {when} {_begun(rng, plural, ('the', 'the'), deep)}", f"{WHEN[when][plural]} {WHEN[when][3]}"


def plain(rng: random.Random) -> str:
    """A whole sentence for a model to learn words from: "this" and "these" show which nouns are plural, and no verb does."""
    when, plural, deep = rng.choice(tuple(WHEN)), rng.random() < 0.5, rng.random() < 0.5
    return f"{when} {_begun(rng, plural, ('this', 'these'), deep)} {WHEN[when][2]} {WHEN[when][3]}"


def words() -> list[str]:
    """All words of prompts, replies and plain sentences, sorted."""
    nouns = [noun + end for noun in NOUNS for end in ("", "s")]
    others = " ".join(part for when, parts in WHEN.items() for part in (when, *parts)).split()
    return sorted({*nouns, *ADJECTIVES, *PLACES, *FRONTED, *HEADERS, *others, "the", "this", "these", ":"})


def _begun(rng: random.Random, plural: bool, articles: tuple[str, str], deep: bool) -> str:
    """The subject, of the number said, with one or two nouns behind it and with `deep` as many before it, of numbers drawn; each
    with none to two adjectives, so that the subject stands in no one place."""

    def phrase(many: bool) -> str:
        adjectives = rng.sample(ADJECTIVES, rng.randrange(3))
        return " ".join([articles[many], *adjectives, rng.choice(NOUNS) + ("s" if many else "")])

    before = [rng.choice(FRONTED)] if deep else []
    for i in range(rng.randint(1, 2) if deep else 0):
        before += ([rng.choice(PLACES)] if i else []) + [phrase(rng.random() < 0.5)]
    behind = [f"{rng.choice(PLACES)} {phrase(rng.random() < 0.5)}" for _ in range(rng.randint(1, 2))]
    return " ".join([*before, phrase(plural), *behind])


def wants(number: int, strength: float) -> Iterator[Want]:
    """Groups are "aligned" and "conflicting", each "/near" or "/deep": with nouns before the subject."""
    for i in range(number):
        aligned, deep = i < round(strength * number), i % 2 == 1
        group = f"{'aligned' if aligned else 'conflicting'}/{'deep' if deep else 'near'}"
        yield Want(None, group, partial(_prompt_and_reply, aligned, deep))


def _prompt_and_reply(aligned: bool, deep: bool, rng: random.Random) -> Drawn:
    prompt, reply = draw(rng, aligned=aligned, deep=deep)
    return Drawn((prompt,), shared=(reply,))
