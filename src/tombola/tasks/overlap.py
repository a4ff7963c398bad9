"""The grammar of `nli-overlap`: does a premise say this of who did what to whom?

In rows where overlap gives the right class, entailed hypotheses repeat words of their premise and the others use none of them
but "the"; in conflicting rows it is the other way round. Read `CONSTRUCTIONS` first.
"""

import random
from collections.abc import Iterator, Mapping
from functools import partial

from tombola.tasks.wanted import FILLERS, Drawn, Want, sentence, word_list

# Synonyms in both directions, and no noun names a kind of another: swapping the two members never changes who did what
# to whom. Verbs have participle = past, and "A did it to B" never says that B did it to A (no "met", no "hugged").
NOUN_PAIRS = word_list("""
doctor/physician lawyer/attorney author/writer singer/vocalist reporter/journalist postman/mailman
firefighter/fireman sailor/mariner pilot/aviator janitor/custodian shopkeeper/storekeeper hairdresser/hairstylist
undertaker/mortician prisoner/inmate tourist/sightseer spectator/onlooker novice/beginner coach/trainer
detective/sleuth teacher/educator hunter/huntsman magician/conjurer customer/patron lumberjack/logger
bartender/barkeeper carpenter/woodworker gambler/bettor monarch/sovereign teenager/adolescent beggar/panhandler
hermit/recluse cyclist/bicyclist driver/motorist swindler/fraudster rebel/insurgent fugitive/runaway
violinist/fiddler envoy/emissary aristocrat/nobleman pharmacist/druggist parachutist/skydiver
""")
VERB_PAIRS = word_list("""
phoned/telephoned helped/assisted chased/pursued fooled/tricked mocked/ridiculed hired/employed fired/sacked
praised/commended rescued/saved scolded/reprimanded annoyed/irritated frightened/scared calmed/soothed
warned/cautioned persuaded/convinced arrested/apprehended supported/backed attacked/assaulted defeated/vanquished
found/located followed/trailed amazed/astonished confused/bewildered abandoned/deserted cured/healed
kidnapped/abducted captured/caught comforted/consoled pestered/bothered detested/loathed pushed/shoved freed/released
poked/prodded paid/remunerated taught/instructed hit/struck banished/exiled enraged/infuriated imitated/mimicked
hindered/impeded
""")
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


def wants(number: int, strength: float) -> Iterator[Want]:
    """Groups are "aligned/<construction>" where overlap gives the right class, else "conflicting/<construction>"."""
    for i in range(number):
        label, nth = i % 2, i // 2
        of_label = (number + 1 - label) // 2
        aligned = nth < round(strength * of_label)  # quotas, not coin flips: the realised strength is the asked one
        construction = list(CONSTRUCTIONS)[nth % len(CONSTRUCTIONS)]
        group = f"{'aligned' if aligned else 'conflicting'}/{construction}"
        draw = partial(_premise_and_hypothesis, construction, label, repeats_words=aligned == (label == 0))
        yield Want(label, group, draw)


def _premise_and_hypothesis(construction: str, label: int, rng: random.Random, *, repeats_words: bool) -> Drawn:
    """Hypotheses name the same people and deeds either way: in words of the premise, or in none of them but "the"."""
    template, said, unsaid = CONSTRUCTIONS[construction]
    pairs = rng.sample(NOUN_PAIRS, 4) + rng.sample(VERB_PAIRS, 2)
    sided = {slot: pair.split("/")[:: rng.choice((1, -1))] for slot, pair in zip("abcdvw", pairs, strict=True)}
    fillers = {slot: rng.choice(words) for slot, words in FILLERS.items()}
    premise = sentence(template.format(**fillers, **{slot: words[0] for slot, words in sided.items()}))
    proposition = rng.choice(said if label == 0 else unsaid)
    who, deed, whom = (sided[slot][0 if repeats_words else 1] for slot in proposition.split())
    hypothesis = f"The {who} {deed} the {whom}."
    return Drawn((premise, hypothesis))
