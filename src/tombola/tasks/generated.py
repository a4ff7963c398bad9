"""Tasks that need no data files: sentences from grammars written here, so that everything runs offline and is known.

`acceptability` asks for the structure of a sentence: each row is one half of a minimal pair whose two halves use the
same words, or words that a bag of words cannot tell apart. `nli-overlap` plants a shortcut of known strength: in train
and report most entailed hypotheses repeat words of their premise and the others do not; in challenge it is reversed.

Read `write` first, then `PHENOMENA` and `CONSTRUCTIONS`, the two tables that hold the grammars. Any change that gives
other rows for the same options and seed must raise the `Grammar` version of its task. `agreement` is for language models, its
grammar in a file of its own.
"""

import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

from tombola.errors import DataError
from tombola.tasks import agreement
from tombola.tasks.base import REPLY_METRICS, Grammar, Role, Rows, Task

_OPTIONS: Mapping[str, tuple[int | float, int | float, int | float]] = {  # default, least, greatest
    "train_rows": (4000, 2, 100_000),
    "report_rows": (1000, 2, 100_000),
    "challenge_rows": (1000, 2, 100_000),
    "strength": (0.9, 0.5, 1.0),  # share of train and report rows on which the shortcut gives the right answer
    "challenge_strength": (0.1, 0.0, 1.0),  # of challenge rows
}

ACCEPTABILITY = Task(
    name="acceptability",
    text=("sentence",),
    labels=("unacceptable", "acceptable"),
    metric="matthews",
    splits={"train": "train", "report": "validation"},
    source=Grammar(version=1),
    options={name: _OPTIONS[name][0] for name in ("train_rows", "report_rows")},
)
NLI_OVERLAP = Task(
    name="nli-overlap",
    text=("premise", "hypothesis"),
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    splits={"train": "train", "report": "validation", "challenge": "challenge"},
    source=Grammar(version=1),
    options={name: _OPTIONS[name][0] for name in ("train_rows", "report_rows", "challenge_rows", "strength")},
)
AGREEMENT = Task(
    name="agreement",
    text=("prompt", "reply"),
    labels=(),
    metric=REPLY_METRICS[0],
    extra_metrics=REPLY_METRICS[1:],
    splits={"train": "train", "report": "validation", "challenge": "challenge"},
    source=Grammar(version=1),
    options={name: default for name, (default, *_) in _OPTIONS.items()},
)

_PATIENCE = 2_000  # candidates tried for one row; only a request near the size of the grammar needs as many


def parse_option(name: str, text: str) -> int | float | None:
    """The value of an option given as text; None if it is no number of its kind or out of range."""
    default, least, greatest = _OPTIONS[name]
    try:
        value = type(default)(text)
    except ValueError:
        return None
    return value if least <= value <= greatest else None


def option_range(name: str) -> str:
    """What an option takes, for people."""
    default, least, greatest = _OPTIONS[name]
    return f"{'a whole number' if isinstance(default, int) else 'a number'} from {least} to {greatest}"


class _Drawn(NamedTuple):
    texts: tuple[str, ...]
    shared: tuple[str, ...] = ()  # texts shown after these, that may turn up in every split: how a sentence goes on
    hidden: tuple[str, ...] = ()  # texts not shown that nevertheless may turn up nowhere else: the other half of a pair


class _Want(NamedTuple):
    """One row to be written."""

    label: int | None
    group: str
    draw: Callable[[random.Random], _Drawn]


def write(task: Task, role: Role, *, seed: int) -> Rows:
    """The rows of one generated split, fixed by task, role, the options that concern this split, and seed.

    Classes are balanced to within one row, and no text stands in two splits, whatever their seeds and sizes: every
    text belongs to one role by its hash.

    Raises: DataError if the grammar cannot give that many rows.
    """
    number = int(task.options[f"{role}_rows"])
    wants = list(_WANTED[task.name](number, _strength(task, role)))
    rng = random.Random(f"{task.name}/{role}/{seed}")
    rng.shuffle(wants)
    texts: list[tuple[str, ...]] = []
    used: set[str] = set()
    for want in wants:
        for _ in range(_PATIENCE):
            drawn = want.draw(rng)
            once = (drawn.texts[0], *drawn.hidden)  # a hypothesis may serve two premises of its split
            if used.isdisjoint(once) and all(_role(text) == role for text in drawn.texts + drawn.hidden):
                break
        else:
            raise DataError(
                f"the grammar of {task.name} has too few sentences of the kind {want.group!r}",
                got=f"{role}_rows={number}",
                next="ask for fewer rows",
            )
        used.update(once)
        texts.append(drawn.texts + drawn.shared)
    return Rows(
        ids=tuple(f"{task.splits[role]}:{i}" for i in range(number)),
        texts=tuple(texts),
        labels=tuple(want.label for want in wants),
        groups=tuple(want.group for want in wants),
    )


def _strength(task: Task, role: Role) -> float:
    """The share of rows on which the shortcut is right: where nothing else is said none of the challenge."""
    return float(task.options.get("challenge_strength" if role == "challenge" else "strength", 0.0))


def _role(text: str) -> Role:
    """The one role a text may appear in: half of all texts train, a quarter each report and challenge."""
    roles: tuple[Role, ...] = ("train", "train", "report", "challenge")
    return roles[hashlib.sha256(text.encode()).digest()[0] % 4]


def _sentence(words: str, end: str = ".") -> str:
    return words[0].upper() + words[1:] + end


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# --- nli-overlap -----------------------------------------------------------------------------------------------------

# Synonyms in both directions, and no noun names a kind of another: swapping the two members never changes who did what
# to whom. Verbs have participle = past, and "A did it to B" never says that B did it to A (no "met", no "hugged").
NOUN_PAIRS = _words("""
doctor/physician lawyer/attorney author/writer singer/vocalist reporter/journalist postman/mailman
firefighter/fireman sailor/mariner pilot/aviator janitor/custodian shopkeeper/storekeeper hairdresser/hairstylist
undertaker/mortician prisoner/inmate tourist/sightseer spectator/onlooker novice/beginner coach/trainer
detective/sleuth teacher/educator hunter/huntsman magician/conjurer customer/patron lumberjack/logger
bartender/barkeeper carpenter/woodworker gambler/bettor monarch/sovereign teenager/adolescent beggar/panhandler
hermit/recluse cyclist/bicyclist driver/motorist swindler/fraudster rebel/insurgent fugitive/runaway
violinist/fiddler envoy/emissary aristocrat/nobleman pharmacist/druggist parachutist/skydiver
""")
VERB_PAIRS = _words("""
phoned/telephoned helped/assisted chased/pursued fooled/tricked mocked/ridiculed hired/employed fired/sacked
praised/commended rescued/saved scolded/reprimanded annoyed/irritated frightened/scared calmed/soothed
warned/cautioned persuaded/convinced arrested/apprehended supported/backed attacked/assaulted defeated/vanquished
found/located followed/trailed amazed/astonished confused/bewildered abandoned/deserted cured/healed
kidnapped/abducted captured/caught comforted/consoled pestered/bothered detested/loathed pushed/shoved freed/released
poked/prodded paid/remunerated taught/instructed hit/struck banished/exiled enraged/infuriated imitated/mimicked
hindered/impeded
""")
_FILLERS: Mapping[str, tuple[str, ...]] = {
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
# premise; what it says of who did what to whom; what it does not say. Each premise thus serves both classes equally,
# so that neither text alone tells the class.
CONSTRUCTIONS: Mapping[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "adjunct": ("{time} the {a} {v} the {b} {place}", ("a v b",), ("b v a",)),
    "passive": ("the {a} was {v} by the {b} {place}", ("b v a",), ("a v b",)),
    "conjunction": ("the {a} and the {b} {v} the {c}", ("a v c", "b v c"), ("a v b", "b v a", "c v a", "c v b")),
    "disjunction": ("the {a} {v} the {b} after the {c} or the {d} {w} the {a}", ("a v b",), ("c w a", "d w a")),
    "preposition": ("the {a} {near} the {b} {v} the {c}", ("a v c",), ("b v c",)),
    "subject-relative": ("the {a} who {v} the {b} {w} the {c}", ("a v b", "a w c"), ("b w c", "b v a")),
    "object-relative": ("the {a} who the {b} {v} {w} the {c}", ("b v a", "a w c"), ("a v b", "b w c")),
    "factive": (
        "the {a} {v} the {b} and {knew} that the {c} {w} the {d}",
        ("a v b", "c w d"),
        ("b v a", "d w c"),
    ),
    "non-factive": (
        "the {a} {v} the {b} and {claimed} that the {c} {w} the {d}",
        ("a v b",),
        ("c w d",),
    ),
    "stated-clause": ("the {a} {v} the {b} {because} the {c} {w} the {d}", ("a v b", "c w d"), ("b v a", "d w c")),
    "open-clause": ("the {a} {v} the {b} {in_case} the {c} {w} the {d}", ("a v b",), ("c w d",)),
}


def _nli_overlap(number: int, strength: float) -> Iterator[_Want]:
    """Groups are "aligned/<construction>" where overlap gives the right class, else "conflicting/<construction>"."""
    for i in range(number):
        label, nth = i % 2, i // 2
        of_label = (number + 1 - label) // 2
        aligned = nth < round(strength * of_label)  # quotas, not coin flips: the realised strength is the asked one
        construction = list(CONSTRUCTIONS)[nth % len(CONSTRUCTIONS)]
        group = f"{'aligned' if aligned else 'conflicting'}/{construction}"
        draw = partial(_premise_and_hypothesis, construction, label, repeats_words=aligned == (label == 0))
        yield _Want(label, group, draw)


def _premise_and_hypothesis(construction: str, label: int, rng: random.Random, *, repeats_words: bool) -> _Drawn:
    """Hypotheses name the same people and deeds either way: in words of the premise, or in none of them but "the"."""
    template, said, unsaid = CONSTRUCTIONS[construction]
    pairs = rng.sample(NOUN_PAIRS, 4) + rng.sample(VERB_PAIRS, 2)
    sided = {slot: pair.split("/")[:: rng.choice((1, -1))] for slot, pair in zip("abcdvw", pairs, strict=True)}
    fillers = {slot: rng.choice(words) for slot, words in _FILLERS.items()}
    premise = _sentence(template.format(**fillers, **{slot: words[0] for slot, words in sided.items()}))
    proposition = rng.choice(said if label == 0 else unsaid)
    who, deed, whom = (sided[slot][0 if repeats_words else 1] for slot in proposition.split())
    hypothesis = f"The {who} {deed} the {whom}."
    return _Drawn((premise, hypothesis))


# --- acceptability ---------------------------------------------------------------------------------------------------

_PEOPLE = _words("""
actor artist baker banker barber butcher captain carpenter chef child clerk coach cousin dancer dentist doctor driver
editor engineer farmer gardener guard guest hunter janitor journalist judge lawyer librarian manager mayor miner
minister musician neighbor nurse officer painter pianist pilot plumber poet professor sailor scientist senator singer
soldier student surgeon tailor teacher tourist visitor woman writer
""")
_MEN = _words("boy man king uncle monk waiter nephew father son brother prince duke grandfather")
_WOMEN = _words("girl woman queen aunt nun waitress niece mother daughter sister princess duchess grandmother")
_THINGS = _words("""
apple basket bell bicycle blanket book bottle box camera candle carpet chair clock coat cup curtain desk door drawing
drum envelope fence flute guitar hammer hat kettle key knife ladder lamp letter map mirror necklace notebook painting
pencil piano picture plate ring rope scarf shelf shirt spoon statue suitcase sword table ticket toy tractor trumpet
umbrella vase violin wagon watch window
""")
_ADJECTIVES = _words("""
old young tall short famous friendly nervous quiet clever lazy honest rude polite tired angry happy lonely brave shy
proud
""")
_ADVERBS = _words("often quickly secretly finally suddenly rarely slowly quietly carefully gladly")
_IRREGULAR_PLURALS = {
    **{"child": "children", "woman": "women", "man": "men"},
    **{"knife": "knives", "scarf": "scarves", "shelf": "shelves"},
}

# All verbs are regular and double no letter. To another person, and to oneself:
_SOCIAL = _words("""
admire praise thank greet help visit trust ignore follow invite notice warn blame comfort defend describe envy hire
insult interview mention photograph respect rescue scold tease watch welcome
""")
_REFLEXIVE = _words("admire praise blame comfort defend describe photograph amuse injure introduce scold watch warn")
# To a thing; those that cannot stand without an object; those that cannot have one
_HANDLE = _words("""
repair clean paint polish move carry open examine decorate wash borrow collect copy count measure inspect pack deliver
""")
_NEEDS_OBJECT = _words("""
damage purchase discover mention examine repair demolish acquire possess destroy conceal describe inspect obtain own
locate admire value remove ruin confiscate retrieve ignore
""")
_NO_OBJECT = _words("""
sneeze cough yawn arrive vanish smile laugh faint hesitate complain apologize disappear snore dine blush shiver tremble
frown stumble doze emigrate kneel
""")
_ACTS = _words("laugh cough dance wait smile sneeze yawn complain vote whistle shout snore hesitate apologize blush")
# What follows: "to repair it", "repairing it", both "that" and "what"
_TO = _words("hoped decided agreed refused pretended offered promised wished vowed volunteered expected hesitated")
_ING = _words("enjoyed avoided considered admitted resisted postponed resented imagined denied recalled risked anticipated")
_THAT_OR_WHAT = _words("knew remembered forgot discovered guessed explained revealed heard saw learned")
_ASKED = _words("asked wondered knew explained revealed remembered")
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
    return rng.choice(_FILLERS["place"])


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
    return _sentence(f"{subject} {forms[plural]}"), _sentence(f"{subject} {forms[not plural]}")


def _attractor(rng: random.Random) -> Pair:
    """A noun of the other number stands between subject and verb."""
    plural = rng.random() < 0.5
    between = f"{rng.choice(_FILLERS['near'])} {_someone(rng, not plural)}"
    if rng.random() < 0.5:
        between = f"who {_someone(rng, not plural)} {_past(rng.choice(_SOCIAL))}"
    subject, forms = f"{_someone(rng, plural)} {between}", _predicate(rng)
    return _sentence(f"{subject} {forms[plural]}"), _sentence(f"{subject} {forms[not plural]}")


def _determiner(rng: random.Random) -> Pair:
    plural = rng.random() < 0.5
    determiner = rng.choice(("these", "those", "several", "many", "both") if plural else ("this", "that", "every", "each"))
    if rng.random() < 0.5:
        noun, frame = rng.choice(_PEOPLE), f"{{}} {_past(rng.choice(_HANDLE))} {_something(rng)} {_where(rng)}"
    else:
        noun, frame = rng.choice(_THINGS), f"{_someone(rng)} {_past(rng.choice(_HANDLE))} {{}} {_where(rng)}"
    forms = (noun, _plural(noun))
    good, bad = f"{determiner} {forms[plural]}", f"{determiner} {forms[not plural]}"
    return _sentence(frame.format(good)), _sentence(frame.format(bad))


def _reflexive(rng: random.Random) -> Pair:
    """Half of the time a noun that would fit the wrong pronoun stands between."""
    nouns = {"himself": _MEN, "herself": _WOMEN, "themselves": rng.choice((_MEN, _WOMEN))}
    right, wrong = rng.sample(list(nouns), 2)
    who = f"the {_noun(rng, nouns[right], right == 'themselves')}"
    if rng.random() < 0.5:
        who += f" {rng.choice(_FILLERS['near'])} the {_noun(rng, nouns[wrong], wrong == 'themselves')}"
    frame = f"{who} {_past(rng.choice(_REFLEXIVE))} {{}} {_where(rng)}"
    return _sentence(frame.format(right)), _sentence(frame.format(wrong))


def _case(rng: random.Random) -> Pair:
    one, other = rng.choice([pair for pair in itertools.permutations(_CASES, 2) if {*pair} != {"I", "we"}])
    frame = f"{{}} {_past(rng.choice(_SOCIAL))} {{}} {_where(rng)}"
    wrong = rng.choice(((_CASES[one], other), (one, other), (_CASES[one], _CASES[other])))
    return _sentence(frame.format(one, _CASES[other])), _sentence(frame.format(*wrong))


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
    return _sentence(frame.format(forms[auxiliary])), _sentence(frame.format(forms[other]))


def _transitivity(rng: random.Random) -> Pair:
    takes = rng.random() < 0.5
    start = f"{_someone(rng)} {_past(rng.choice(_NEEDS_OBJECT if takes else _NO_OBJECT))}"
    ends = (_where(rng), f"{_something(rng)} {_where(rng)}")
    return _sentence(f"{start} {ends[takes]}"), _sentence(f"{start} {ends[not takes]}")


def _complement(rng: random.Random) -> Pair:
    gerund, verb = rng.random() < 0.5, rng.choice(_HANDLE)
    start, what = f"{_someone(rng)} {rng.choice(_ING if gerund else _TO)}", _something(rng)
    forms = (f"to {verb}", _ing(verb))
    return _sentence(f"{start} {forms[gerund]} {what}"), _sentence(f"{start} {forms[not gerund]} {what}")


def _gap(rng: random.Random) -> Pair:
    """After "what" an object is missing, after "that" none may be."""
    word = rng.choice(("what", "that"))
    start = f"{_someone(rng)} {rng.choice(_THAT_OR_WHAT)} {word} {_someone(rng)} {_past(rng.choice(_NEEDS_OBJECT))}"
    ends = (_where(rng), f"{_something(rng)} {_where(rng)}")
    return _sentence(f"{start} {ends[word == 'that']}"), _sentence(f"{start} {ends[word == 'what']}")


def _inversion(rng: random.Random) -> Pair:
    """Subject and auxiliary change places in a question, and stay in an embedded one."""
    thing, who, verb = rng.choice(_THINGS), _someone(rng), rng.choice(_HANDLE)
    if rng.random() < 0.5:
        auxiliary = rng.choice(("did", "will", "could", "should"))
        asked = f"which {thing} {auxiliary} {who} {verb}", f"which {thing} {who} {auxiliary} {verb}"
        return _sentence(asked[0], "?"), _sentence(asked[1], "?")
    start = f"{_someone(rng)} {rng.choice(_ASKED)} which {thing}"
    auxiliary = rng.choice(("would", "could", "should", "might"))
    return _sentence(f"{start} {who} {auxiliary} {verb}"), _sentence(f"{start} {auxiliary} {who} {verb}")


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
    return _sentence(right), _sentence(wrong)


def _polarity(rng: random.Random) -> Pair:
    """Words like "ever" and "any" need a negation over them, not merely before them."""
    who, others = rng.choice(_PEOPLE), _noun(rng, _PEOPLE, plural=True)
    liked, did, things = _past(rng.choice(_SOCIAL)), _past(rng.choice(_HANDLE)), _noun(rng, _THINGS, plural=True)
    did = rng.choice((f"has ever {did} {things}", f"{did} any {things}"))
    frame = f"{{}} {who} who {{}} {others} {liked} {did}"
    return _sentence(frame.format("no", "the")), _sentence(frame.format("the", "no"))


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


def _acceptability(number: int, strength: float) -> Iterator[_Want]:
    """Groups are the phenomena; each has its share of both classes."""
    for i in range(number):
        phenomenon = list(PHENOMENA)[i // 2 % len(PHENOMENA)]
        yield _Want(i % 2, phenomenon, partial(_half_of_pair, PHENOMENA[phenomenon], i % 2 == 1))


def _half_of_pair(pair: Callable[[random.Random], Pair], acceptable: bool, rng: random.Random) -> _Drawn:
    """One half only: with both, a model that has seen one would know the other."""
    good, bad = pair(rng)
    return _Drawn((good,), hidden=(bad,)) if acceptable else _Drawn((bad,), hidden=(good,))


# --- agreement -------------------------------------------------------------------------------------------------------


def _agreement_of_replies(number: int, strength: float) -> Iterator[_Want]:
    """Groups are "aligned" and "conflicting", each "/near" or "/deep": with nouns before the subject."""
    for i in range(number):
        aligned, deep = i < round(strength * number), i % 2 == 1
        group = f"{'aligned' if aligned else 'conflicting'}/{'deep' if deep else 'near'}"
        yield _Want(None, group, partial(_prompt_and_reply, aligned, deep))


def _prompt_and_reply(aligned: bool, deep: bool, rng: random.Random) -> _Drawn:
    prompt, reply = agreement.draw(rng, aligned=aligned, deep=deep)
    return _Drawn((prompt,), shared=(reply,))


_WANTED: Mapping[str, Callable[[int, float], Iterator[_Want]]] = {
    ACCEPTABILITY.name: _acceptability,
    NLI_OVERLAP.name: _nli_overlap,
    AGREEMENT.name: _agreement_of_replies,
}
