"""What the page says: its verdict and its warnings in sentences, and how it writes numbers, samples and names.

Order of reading: `verdict`, `case_verdict` and `warnings`, then the small words, which the parts of the page use too.
Of this room it imports `cases` and `live`.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import and_

from tombola.report.cases import UNITS, Case, Comparison, Group, Rows, Split, estimate, per_seed, size, units_of
from tombola.report.live import Live
from tombola.stats import ALPHA, Estimate, fleiss_kappa, over_seeds, smallest_two_sided_p
from tombola.study.kinds import CONTROL_KINDS, TRAIN_MODES
from tombola.study.results import KINDS, TicketRow

NONE, GLUE = "—", "\N{NO-BREAK SPACE}"
MANY = 4  # runs are counted, not named


def verdict(cases: Sequence[Case]) -> str:
    """Whether it matters which parts are kept: in full for one case, counted by outcome for several."""
    if len(cases) == 1:
        return case_verdict(cases[0])
    plain = [case for case in cases if not case.family and not case.unusual] or list(cases)
    by_search: dict[str, list[Case]] = {}
    for case in plain:
        if case.comparisons:
            by_search.setdefault(case.search if case.label else "", []).append(case)
    if len(by_search) > 1 and all(len(found) > 1 for found in by_search.values()):
        return " ".join(
            f"{search}: {said[0].lower()}{said[1:]}"
            for search, found in by_search.items()
            for said in [_counted(found, brief=True)]
        )
    return _counted(plain)


def _counted(cases: Sequence[Case], *, brief: bool = False) -> str:
    """How many tasks, or searches on them, have which outcome; and, of few, the scores behind it."""
    compared = [(case.title, comparisons[0]) for case in cases if (comparisons := case.comparisons)]
    several = len({case.task for case in cases if case.comparisons}) < len(compared)
    of = f"{len(compared)}{GLUE}searches" if several else count(len(compared), "task")
    outcomes: Counter[str | None] = Counter(comparison.ahead for _, comparison in compared)
    words = {
        "good": "good tickets are ahead of random ones by more than chance in rows and seeds explains",
        "random": "random tickets are ahead of good ones by more than chance in rows and seeds explains",
        "neither": "the difference between good and random tickets is smaller than rows or seeds can show",
        None: "good and random tickets cannot be told apart, with one seed or none in common",
    }
    said = [f"In {outcomes[ahead]} of {of} {text}." for ahead, text in words.items() if outcomes[ahead]]
    if len(compared) <= 3 and not brief:  # more are better read in the table
        said += [
            f"{title}, {it.stage}: good {number(it.good.score.value)}, random {number(it.random.score.value)} "
            f"({it.split.metric.replace('_', '-')} on {it.split.name}, {rows_of(it.split)} rows, {sample(it.random.rows)})."
            for title, it in compared
        ]
    return " ".join(said)


def case_verdict(case: Case) -> str:
    """The comparisons of one case, and what they are to be held against."""
    comparisons = case.comparisons
    if not comparisons:
        missing = "good and random tickets of the same seeds" if case.report else "scores on report rows"
        return f"There is no verdict: it needs {missing}."
    split, dense = comparisons[0].split, comparisons[0].split.dense
    sentences = [_sentence(comparison) for comparison in comparisons]
    beside = f" and the dense model {spread(dense.score)} ({sample(dense.rows)})" if dense else ""
    sentences.append(f"Always answering {split.line} scores {number(split.majority)}{beside} on the same rows.")
    if (score := comparisons[0].good.score.value) is not None and score <= split.majority:
        sentences.append(f"Good does not beat {split.line}, so being ahead or behind means little.")
    if split.metric == "log_likelihood" and score is not None:
        sides = {"good": score, "random": comparisons[0].random.score.value, "dense": dense.score.value if dense else None}
        told = [f"{name} {math.exp(-value):,.1f}" for name, value in sides.items() if value is not None and value > -700]
        sentences.append(f"As perplexities: {listed(told)}.")
    if good := case.good:
        kept = [f"{spread(size(good, unit), 1)} of {span(len(of(it)) for it in good)} {unit}" for unit, of in case.units.items()]
        share = spread(estimate((ticket.seed, ticket.body_share) for ticket in good))
        sentences.append(f"Good keeps {listed(kept) or f'{share} of the values of {good[0].scope}'} ({sample(good)}).")
    return " ".join(sentences)


def warnings(said: Sequence[str], cases: Sequence[Case]) -> dict[str, tuple[str, ...]]:
    """Task or tasks → what is doubtful there: first what the cells said themselves, then what their rows show."""
    everywhere = list(told_once(said))
    if len({shape for case in cases for shape in case.shapes}) > 1:
        sizes = listed([f"{case.title} has {shape_name(shape)}" for case in cases for shape in case.shapes])
        everywhere.append(f"Models of different sizes are on this page ({sizes}): compare scores and sizes within a task only.")
    titles: dict[str, list[str]] = {}
    for case in cases:
        for text in (*_score_warnings(case), *_ticket_warnings(case)):
            titles.setdefault(text, []).append(case.title)
    found: dict[str, tuple[str, ...]] = {"": tuple(everywhere)} if everywhere else {}
    for text, where in titles.items():
        heading = _where(where, cases) if len(cases) > 1 else ""
        found[heading] = (*found.get(heading, ()), text)
    return found


def told_once(said: Sequence[str]) -> tuple[str, ...]:
    """What cells say of themselves, "TASK (SETTINGS), seed N: …", once for all seeds and settings of a task that say the same."""
    whose: dict[tuple[str, str], list[tuple[str, str]]] = {}  # (task, what) → (settings, seed)
    for text in said:
        found = re.fullmatch(r"(.*?)( \(.*\))?, seed (\d+): (.*)", text, re.DOTALL)
        task, settings, seed, what = found.groups("") if found else ("", "", "", text)
        whose.setdefault((task, what), []).append((settings, seed))
    told = []
    for (task, what), runs in whose.items():
        of, seeds = (list(dict.fromkeys(one)) for one in zip(*runs, strict=True))
        where = of[0] if len(of) == 1 else f" ({len(of)} settings)"
        told.append(
            f"{task}{where}, seed{'s' if len(seeds) > 1 else ''} {listed(sorted(seeds, key=int))}: {what}" if task else what
        )
    return tuple(told)


def _where(titles: Sequence[str], cases: Sequence[Case]) -> str:
    """Those titles, or how many runs of which tasks where they are many."""
    if len(titles) <= MANY:
        return listed(titles)
    tasks = list(dict.fromkeys(case.task for case in cases if case.title in titles))
    if len(titles) == len(cases):
        return "All runs"
    return f"{len(titles)} runs of {listed(tasks)}"


def _sentence(it: Comparison) -> str:
    stage, rows = it.stage.capitalize(), f"{rows_of(it.split)} rows"
    if it.difference.value is None:
        return f"{stage}, good and random cannot be compared: {it.difference.note}."
    seeds = f"95 % interval over seeds {interval(it.difference)}"
    if (paired := it.paired).p is not None and paired.can_reach:
        seeds += f", sign-flip p {probability(paired.p)}"
    if it.over_rows is not None:
        over = f"95 % interval over {rows} {interval(it.over_rows)}"
        power = "" if it.detectable is None else f"; they can show {number(it.detectable)} or more"
        holds = {
            True: f"and over seeds ({seeds}): {it.leads} is ahead",
            False: f"but another seed might turn it ({seeds})",
            None: f"in the one seed, where {it.leads} is ahead",
        }
        outcome = f"is not zero over rows ({over}), {holds[it.clear_over_seeds]}"
        if not it.clear_over_rows:
            outcome = f"may as well be zero on other rows ({over}{power})"
    elif it.ahead is None:
        outcome = "comes from one seed, and what these rows can show is not known for this metric"
    elif it.ahead == "neither":
        outcome = f"may as well be zero ({seeds})"
    else:
        outcome = f"is not zero ({seeds}): {it.ahead} is ahead"
    return (
        f"{stage}, the good ticket scores {number(it.good.score.value)} and its random controls {number(it.random.score.value)} "
        f"({it.split.metric.replace('_', '-')} on {it.split.name}, {rows}, {sample(it.random.rows)}): "
        f"the difference of {number(it.difference.value)} {outcome}."
    )


def _score_warnings(case: Case) -> Iterator[str]:
    if case.reused:
        yield f"The mask was chosen on the rows it is reported on ({listed(case.reused)}), so good looks better than it is."
    for split in case.splits:
        yield from _split_warnings(split)
    for it in case.comparisons:
        if it.ahead == "neither":
            limit = f"zero lies in its 95 % interval over seeds, {interval(it.difference)}"
            if it.over_rows is not None and not it.clear_over_rows:
                rows = f"{rows_of(it.split)} {it.split.name} rows"
                limit = f"zero lies in its 95 % interval over {rows}, {interval(it.over_rows)}"
            difference = number(it.difference.value, sign=True)
            yield f"{it.stage.capitalize()}, good minus random is {difference} ({sample(it.random.rows)}): {limit}."
    scores = case.scores
    seeds = len({row.seed for row in scores})
    if seeds and (p := smallest_two_sided_p(seeds)) >= ALPHA:
        yield (
            f"{count(seeds, 'seed')} cannot give p < {ALPHA} in a paired sign-flip or Wilcoxon test: the smallest two-sided p "
            f"is {number(p)} whatever the scores. It takes 6 seeds."
        )
    keys = Counter((row.seed, row.kind, row.stage, row.draw, row.split, row.role, row.metric) for row in scores)
    if repeated := sum(times > 1 for times in keys.values()):
        yield f"{count(repeated, 'score')} came more than once for one seed and draw: the means mix different settings."


def _split_warnings(split: Split) -> Iterator[str]:
    title = split_title(split)
    if len({row.n for row in split.rows}) > 1:
        yield f"{title}: the scores were not measured on the same number of rows."
    if broken := [group_name(group) for group in split.groups if group.score.value is None]:
        yield f"{title}: no mean where a seed has no finite score ({listed(broken)})."
    majority = per_seed((row.seed, row.majority) for row in split.rows)
    below = [
        (group, seeds)
        for group in split.groups
        if (seeds := [s for s, value in group.by_seed.items() if (value >= majority[s] if split.falls else value <= majority[s])])
    ]
    if below:
        where = f"at or {'above' if split.falls else 'below'} the majority line of {number(split.majority)}"
        yield f"{title}: {where}: {_at_the_line(split, below, len(majority))}."


def _at_the_line(split: Split, below: Sequence[tuple[Group, list[int]]], n_seeds: int) -> str:
    """Which groups score no more than one answer for all rows. Of many, controls that are made to be bad are counted."""
    if len(below) == len(split.groups) and all(len(seeds) == n_seeds for _, seeds in below):
        return "every model in every seed"
    named = [(group, seeds) for group, seeds in below if len(below) <= MANY or group.kind in ("full", "good", "random")]
    which = [f"{group_name(group)} ({_which_seeds(seeds, n_seeds)})" for group, seeds in named]
    if others := len(below) - len(named):
        which.append(f"{count(others, 'score')} of other controls")
    return "; ".join(which)


def _ticket_warnings(case: Case) -> Iterator[str]:
    if len(case.shapes) > 1:
        shapes = listed([shape_name(shape) for shape in case.shapes])
        yield f"Tickets of models of different sizes ({shapes}): their maps, sizes and overlaps are not shown."
        return
    for what in ("nothing", *(f"no {unit}" for unit in UNITS), "everything"):
        if found := [ticket_name(ticket) for ticket in case.tickets if _extreme(ticket) == what]:
            yield f"A mask that keeps {what}: {listed(found)}."
    good = {ticket.seed: ticket for ticket in case.good}
    for kind, tickets in case.controls.items():
        pairs = [(ticket, good[ticket.seed]) for ticket in tickets if ticket.seed in good]
        if uneven := sum(_sizes(case, a) != _sizes(case, b) for a, b in pairs if kind != "dense-random-init"):
            yield f"{uneven} of {len(pairs)} {kind} controls differ from good in size: that comparison is not one of equals."
        for ticket, its in pairs:
            for unit, of in case.units.items():
                stored, shared = ticket.shared_with_good.get(unit.lower()), sum(map(and_, of(ticket), of(its)))
                if stored not in (None, shared):
                    yield f"{ticket_name(ticket)} shares {shared} {unit} with good, stored as {stored}: two studies are mixed."
    undefined: dict[str, list[str]] = {}
    for unit, of in case.units.items():
        kappa = fleiss_kappa([of(ticket) for ticket in good.values()])
        if good and kappa.value is None:
            undefined.setdefault(kappa.note, []).append(unit)
    for why, units in undefined.items():
        yield f"Fleiss kappa over the seeds of good is undefined for {listed(units)}: {why}."


def _sizes(case: Case, ticket: TicketRow) -> tuple[int, ...]:
    """How many parts of each type a ticket keeps."""
    return tuple(sum(of(ticket)) for of in case.units.values()) + (ticket.values or ())


def _extreme(ticket: TicketRow) -> str | None:
    """What a mask keeps, where that is all or nothing."""
    if ticket.kind == "dense-random-init":  # which is to keep everything
        return None
    if ticket.values is not None:
        kept, of_all = ticket.values
        return "everything" if kept == of_all else "nothing" if not kept else None
    parts = {unit: of(ticket) for unit, of in units_of(ticket).items()}
    if all(map(all, parts.values())):
        return "everything"
    if not any(map(any, parts.values())):
        return "nothing"
    return next((f"no {unit}" for unit, kept in parts.items() if not any(kept)), None)


# Numbers


def number(value: float | None, decimals: int = 3, *, sign: bool = False) -> str:
    """A number with a true minus sign; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # no minus zero
    return text.replace("-", "−")


def significant(value: float) -> str:
    """Three significant digits, for numbers of any size."""
    return f"{value:.3g}".replace("-", "−")


def probability(p: float | None) -> str:
    """As in "= 0.031" and "< 0.001"; a dash where there is none."""
    return NONE if p is None else "< 0.001" if p < 0.001 else f"= {number(p)}"


def spread(estimate: Estimate, decimals: int = 3, *, sign: bool = False) -> str:
    """Mean ± std; the mean alone where there is no std."""
    text = number(estimate.value, decimals, sign=sign)
    return text if estimate.std is None else f"{text}{GLUE}±{GLUE}{number(estimate.std, decimals)}"


def interval(estimate: Estimate) -> str:
    """Both ends; a dash where there are none, and words where seeds do not differ: that is no certainty."""
    if estimate.low is None:
        return NONE
    return "seeds equal" if estimate.std == 0 else f"{number(estimate.low)} to {number(estimate.high)}"


def of_seeds(by_seed: Mapping[int, float], how: str = "s", decimals: int = 3, *, sign: bool = False) -> str:
    """A number over seeds that the page's script can work out again for some of them; `how` as in `Live`."""
    found = over_seeds(list(by_seed.values()))
    if how == "n":
        return Live(str(len(by_seed)), by_seed, "n") if found.value is not None else str(len(by_seed))
    text = {
        "s": lambda: spread(found, decimals, sign=sign),
        "i": lambda: interval(found),
        "m": lambda: number(found.value, decimals, sign=sign),
    }[how]()
    return text if found.value is None else Live(text, by_seed, f"{how}{decimals}{'+' if sign else ''}")


def count(n: int, noun: str) -> str:
    """As in "1 seed" and "2 seeds", never broken at the end of a line."""
    return f"{n}{GLUE}{noun}" if n == 1 else f"{n}{GLUE}{noun}s"


def span(values: Iterable[int]) -> str:
    """One number, or the two ends where they differ; a dash for no numbers."""
    found = sorted(set(values))
    return "–".join(str(value) for value in dict.fromkeys((found[0], found[-1]))) if found else NONE


def listed(names: Sequence[str]) -> str:
    """As in "a, b and c"."""
    return ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else "".join(names)


# Samples


def sample(rows: Rows) -> str:
    """The sample behind a number, as in "3 seeds × 4 draws"."""
    seeds = count(len({row.seed for row in rows}), "seed")
    each = draws(rows)
    return seeds if each == "1" else f"{seeds} × {each}{GLUE}draws"


def draws(rows: Rows) -> str:
    """How many draws a seed has, as in "4" or "3–4"."""
    return span(Counter(row.seed for row in rows).values())


def rows_of(split: Split) -> str:
    """How many rows the scores of a split were measured on."""
    return span(row.n for row in split.rows)


def _which_seeds(seeds: Sequence[int], n: int) -> str:
    """Which of n seeds."""
    if n > 1 and len(seeds) == n:
        return "both seeds" if n == 2 else f"all {count(n, 'seed')}"
    return f"seed{'s' if len(seeds) > 1 else ''} {listed([str(seed) for seed in seeds])}"


# Names


def kind_name(kind: str) -> str:
    """As it stands in tables and beside marks."""
    return "full (dense)" if kind == "full" else kind


def group_name(group: Group) -> str:
    """As in "retrained good"."""
    return "dense" if group.kind == "full" else f"{group.stage} {group.kind}"


def ticket_name(ticket: TicketRow) -> str:
    """As in "random of seed 1, draw 0"."""
    return f"{ticket.kind} of seed {ticket.seed}" + ("" if ticket.kind == "good" else f", draw {ticket.draw}")


def kind_css(kind: str) -> str:
    """The class that colours a kind."""
    lesioned = kind in CONTROL_KINDS and CONTROL_KINDS[kind].lesion is not None
    return "weights" if lesioned or kind in _TRAINED else kind if kind in KINDS else "other"


_TRAINED = {mode.kind for mode in TRAIN_MODES.values()}


def shape_name(shape: tuple[int, int, int]) -> str:
    """As in "6 layers × 12 heads, 6 MLPs"."""
    layers, heads, mlps = shape
    return f"{count(layers, 'layer')} × {heads} heads, {count(mlps, 'MLP')}"


def split_title(split: Split) -> str:
    """As in "Accuracy on validation (report rows, n = 400)"."""
    metric = split.metric.replace("_", "-")
    return f"{metric[:1].upper()}{metric[1:]} on {split.name} ({split.role} rows, n = {rows_of(split)})"
