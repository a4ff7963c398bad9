"""The grammar of `acceptability`: minimal pairs whose halves use the same words, or words that a bag of words cannot tell apart.

A row is one half of a pair. Read `PHENOMENA` first, the table near the end.
"""

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial

from tombola.tasks.wanted import FILLERS, Drawn, Want, sentence, word_list

_PEOPLE = word_list("""
actor artist baker banker barber butcher captain carpenter chef child clerk coach cousin dancer dentist doctor driver
editor engineer farmer gardener guard guest hunter janitor journalist judge lawyer librarian manager mayor miner
minister musician neighbor nurse officer painter pianist pilot plumber poet professor sailor scientist senator singer
soldier student surgeon tailor teacher tourist visitor woman writer
""")
_MEN = word_list("boy man king uncle monk waiter nephew father son brother prince duke grandfather")
_WOMEN = word_list("girl woman queen aunt nun waitress niece mother daughter sister princess duchess grandmother")
_THINGS = word_list("""
apple basket bell bicycle blanket book bottle box camera candle carpet chair clock coat cup curtain desk door drawing
drum envelope fence flute guitar hammer hat kettle key knife ladder lamp letter map mirror necklace notebook painting
pencil piano picture plate ring rope scarf shelf shirt spoon statue suitcase sword table ticket toy tractor trumpet
umbrella vase violin wagon watch window
""")
_ADJECTIVES = word_list("""
old young tall short famous friendly nervous quiet clever lazy honest rude polite tired angry happy lonely brave shy
proud
""")
_ADVERBS = word_list("often quickly secretly finally suddenly rarely slowly quietly carefully gladly")
_IRREGULAR_PLURALS = {
    **{"child": "children", "woman": "women", "man": "men"},
    **{"knife": "knives", "scarf": "scarves", "shelf": "shelves"},
}

# All verbs are regular and double no letter. To another person, and to oneself:
_SOCIAL = word_list("""
admire praise thank greet help visit trust ignore follow invite notice warn blame comfort defend describe envy hire
insult interview mention photograph respect rescue scold tease watch welcome
""")
_REFLEXIVE = word_list("admire praise blame comfort defend describe photograph amuse injure introduce scold watch warn")
# To a thing; those that cannot stand without an object; those that cannot have one
_HANDLE = word_list("""
repair clean paint polish move carry open examine decorate wash borrow collect copy count measure inspect pack deliver
""")
_NEEDS_OBJECT = word_list("""
damage purchase discover mention examine repair demolish acquire possess destroy conceal describe inspect obtain own
locate admire value remove ruin confiscate retrieve ignore
""")
_NO_OBJECT = word_list("""
sneeze cough yawn arrive vanish smile laugh faint hesitate complain apologize disappear snore dine blush shiver tremble
frown stumble doze emigrate kneel
""")
_ACTS = word_list("laugh cough dance wait smile sneeze yawn complain vote whistle shout snore hesitate apologize blush")
# What follows: "to repair it", "repairing it", both "that" and "what"
_TO = word_list("hoped decided agreed refused pretended offered promised wished vowed volunteered expected hesitated")
_ING = word_list("enjoyed avoided considered admitted resisted postponed resented imagined denied recalled risked anticipated")
_THAT_OR_WHAT = word_list("knew remembered forgot discovered guessed explained revealed heard saw learned")
_ASKED = word_list("asked wondered knew explained revealed remembered")
_CASES = {"I": "me", "he": "him", "she": "her", "we": "us", "they": "them"}

Pair = tuple[str, str]  # acceptable, unacceptable


def _plural(noun: str) -> str:
    return _IRREGULAR_PLURALS.get(noun) or _with_s(noun)


def _with_s(word: str) -> str:
    """Plural of a noun, third person of a verb."""
    if word.endswith("y") and word[-2] not in "aeiou":
        return word[:-1] + "ies"
    return word + ("es" if word.endswith(("s", "x", "ch", "sh")) else "s")


def _past(verb: str) -> str:
    """Past and participle."""
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return verb[:-1] + "ied"
    return verb + ("d" if verb.endswith("e") else "ed")


def _ing(verb: str) -> str:
    return verb.removesuffix("e") + "ing"


def _noun(rng: random.Random, nouns: tuple[str, ...], plural: bool) -> str:
    noun = rng.choice(nouns)
    return _plural(noun) if plural else noun


def _someone(rng: random.Random, plural: bool | None = None) -> str:
    """As in "the old guest" or "the guests"."""
    adjective = rng.choice(_ADJECTIVES) + " " if rng.random() < 0.3 else ""
    return f"the {adjective}{_noun(rng, _PEOPLE, rng.random() < 0.5 if plural is None else plural)}"


def _something(rng: random.Random) -> str:
    return f"the {_noun(rng, _THINGS, rng.random() < 0.5)}"


def _where(rng: random.Random) -> str:
    return rng.choice(FILLERS["place"])


def _predicate(rng: random.Random) -> tuple[str, str]:
    """What one does, and what several do."""
    adjective, verb = rng.choice(_ADJECTIVES), rng.choice(_SOCIAL)
    whom, handled = _someone(rng), f"{_past(rng.choice(_HANDLE))} {_something(rng)}"
    return rng.choice(
        (
            (f"is {adjective}", f"are {adjective}"),
            (f"was {adjective}", f"were {adjective}"),
            (f"has {handled}", f"have {handled}"),
            (f"{_with_s(verb)} {whom}", f"{verb} {whom}"),
        )
    )


def _agreement(rng: random.Random) -> Pair:
    plural = rng.random() < 0.5
    subject, forms = _someone(rng, plural), _predicate(rng)
    return sentence(f"{subject} {forms[plural]}"), sentence(f"{subject} {forms[not plural]}")


def _attractor(rng: random.Random) -> Pair:
    """A noun of the other number stands between subject and verb."""
    plural = rng.random() < 0.5
    between = f"{rng.choice(FILLERS['near'])} {_someone(rng, not plural)}"
    if rng.random() < 0.5:
        between = f"who {_someone(rng, not plural)} {_past(rng.choice(_SOCIAL))}"
    subject, forms = f"{_someone(rng, plural)} {between}", _predicate(rng)
    return sentence(f"{subject} {forms[plural]}"), sentence(f"{subject} {forms[not plural]}")


def _determiner(rng: random.Random) -> Pair:
    plural = rng.random() < 0.5
    determiner = rng.choice(("these", "those", "several", "many", "both") if plural else ("this", "that", "every", "each"))
    if rng.random() < 0.5:
        noun, frame = rng.choice(_PEOPLE), f"{{}} {_past(rng.choice(_HANDLE))} {_something(rng)} {_where(rng)}"
    else:
        noun, frame = rng.choice(_THINGS), f"{_someone(rng)} {_past(rng.choice(_HANDLE))} {{}} {_where(rng)}"
    forms = (noun, _plural(noun))
    good, bad = f"{determiner} {forms[plural]}", f"{determiner} {forms[not plural]}"
    return sentence(frame.format(good)), sentence(frame.format(bad))


def _reflexive(rng: random.Random) -> Pair:
    """Half of the time a noun that would fit the wrong pronoun stands between."""
    nouns = {"himself": _MEN, "herself": _WOMEN, "themselves": rng.choice((_MEN, _WOMEN))}
    right, wrong = rng.sample(list(nouns), 2)
    who = f"the {_noun(rng, nouns[right], right == 'themselves')}"
    if rng.random() < 0.5:
        who += f" {rng.choice(FILLERS['near'])} the {_noun(rng, nouns[wrong], wrong == 'themselves')}"
    frame = f"{who} {_past(rng.choice(_REFLEXIVE))} {{}} {_where(rng)}"
    return sentence(frame.format(right)), sentence(frame.format(wrong))


def _case(rng: random.Random) -> Pair:
    one, other = rng.choice([pair for pair in itertools.permutations(_CASES, 2) if {*pair} != {"I", "we"}])
    frame = f"{{}} {_past(rng.choice(_SOCIAL))} {{}} {_where(rng)}"
    wrong = rng.choice(((_CASES[one], other), (one, other), (_CASES[one], _CASES[other])))
    return sentence(frame.format(one, _CASES[other])), sentence(frame.format(*wrong))


def _verb_form(rng: random.Random) -> Pair:
    plural = rng.random() < 0.5
    verb = rng.choice(_ACTS)
    forms = {
        rng.choice(("will", "must", "could")): verb,
        "have" if plural else "has": _past(verb),
        "are" if plural else "is": _ing(verb),
    }
    auxiliary, other = rng.sample(list(forms), 2)
    frame = f"{_someone(rng, plural)} {auxiliary} {{}} {_where(rng)}"
    return sentence(frame.format(forms[auxiliary])), sentence(frame.format(forms[other]))


def _transitivity(rng: random.Random) -> Pair:
    takes = rng.random() < 0.5
    start = f"{_someone(rng)} {_past(rng.choice(_NEEDS_OBJECT if takes else _NO_OBJECT))}"
    ends = (_where(rng), f"{_something(rng)} {_where(rng)}")
    return sentence(f"{start} {ends[takes]}"), sentence(f"{start} {ends[not takes]}")


def _complement(rng: random.Random) -> Pair:
    gerund, verb = rng.random() < 0.5, rng.choice(_HANDLE)
    start, what = f"{_someone(rng)} {rng.choice(_ING if gerund else _TO)}", _something(rng)
    forms = (f"to {verb}", _ing(verb))
    return sentence(f"{start} {forms[gerund]} {what}"), sentence(f"{start} {forms[not gerund]} {what}")


def _gap(rng: random.Random) -> Pair:
    """After "what" an object is missing, after "that" none may be."""
    word = rng.choice(("what", "that"))
    start = f"{_someone(rng)} {rng.choice(_THAT_OR_WHAT)} {word} {_someone(rng)} {_past(rng.choice(_NEEDS_OBJECT))}"
    ends = (_where(rng), f"{_something(rng)} {_where(rng)}")
    return sentence(f"{start} {ends[word == 'that']}"), sentence(f"{start} {ends[word == 'what']}")


def _inversion(rng: random.Random) -> Pair:
    """Subject and auxiliary change places in a question, and stay in an embedded one."""
    thing, who, verb = rng.choice(_THINGS), _someone(rng), rng.choice(_HANDLE)
    if rng.random() < 0.5:
        auxiliary = rng.choice(("did", "will", "could", "should"))
        asked = f"which {thing} {auxiliary} {who} {verb}", f"which {thing} {who} {auxiliary} {verb}"
        return sentence(asked[0], "?"), sentence(asked[1], "?")
    start = f"{_someone(rng)} {rng.choice(_ASKED)} which {thing}"
    auxiliary = rng.choice(("would", "could", "should", "might"))
    return sentence(f"{start} {who} {auxiliary} {verb}"), sentence(f"{start} {auxiliary} {who} {verb}")


def _word_order(rng: random.Random) -> Pair:
    adjective, adverb, who = rng.choice(_ADJECTIVES), rng.choice(_ADVERBS), rng.choice(_PEOPLE)
    verb, thing = _past(rng.choice(_HANDLE)), rng.choice(_THINGS)
    preposition, place = _where(rng).split(" ", 1)
    wrong = rng.choice(
        (
            f"the {who} {adjective} {adverb} {verb} the {thing} {preposition} {place}",
            f"the {adjective} {adverb} {who} {verb} the {thing} {preposition} {place}",
            f"the {adjective} {who} {adverb} the {thing} {verb} {preposition} {place}",
            f"the {adjective} {who} {adverb} {verb} {thing} the {preposition} {place}",
            f"the {adjective} {who} {adverb} {verb} the {thing} {place} {preposition}",
            f"{adjective} the {who} {adverb} {verb} the {thing} {preposition} {place}",
        )
    )
    right = f"the {adjective} {who} {adverb} {verb} the {thing} {preposition} {place}"
    return sentence(right), sentence(wrong)


def _polarity(rng: random.Random) -> Pair:
    """Words like "ever" and "any" need a negation over them, not merely before them."""
    who, others = rng.choice(_PEOPLE), _noun(rng, _PEOPLE, plural=True)
    liked, did, things = _past(rng.choice(_SOCIAL)), _past(rng.choice(_HANDLE)), _noun(rng, _THINGS, plural=True)
    did = rng.choice((f"has ever {did} {things}", f"{did} any {things}"))
    frame = f"{{}} {who} who {{}} {others} {liked} {did}"
    return sentence(frame.format("no", "the")), sentence(frame.format("the", "no"))


PHENOMENA: Mapping[str, Callable[[random.Random], Pair]] = {
    "agreement": _agreement,
    "attractor": _attractor,
    "determiner": _determiner,
    "reflexive": _reflexive,
    "case": _case,
    "verb-form": _verb_form,
    "transitivity": _transitivity,
    "complement": _complement,
    "gap": _gap,
    "inversion": _inversion,
    "word-order": _word_order,
    "polarity": _polarity,
}


def wants(number: int, strength: float) -> Iterator[Want]:
    """Groups are the phenomena; each has its share of both classes."""
    for i in range(number):
        phenomenon = list(PHENOMENA)[i // 2 % len(PHENOMENA)]
        yield Want(i % 2, phenomenon, partial(_half_of_pair, PHENOMENA[phenomenon], i % 2 == 1))


def _half_of_pair(pair: Callable[[random.Random], Pair], acceptable: bool, rng: random.Random) -> Drawn:
    """One half only: with both, a model that has seen one would know the other."""
    good, bad = pair(rng)
    return Drawn((good,), hidden=(bad,)) if acceptable else Drawn((bad,), hidden=(good,))
