"""Rows grouped into what the page compares: all of its numbers, and none of its text.

Order of reading: `Case` (one task on one model), `Split` (its scores on some rows), `Group` (the scores of one kind of
ticket there), `Comparison` (what the page is about: does it matter which parts are kept?), then numbers of tickets.
A control has several draws in a seed: `per_seed` averages them within the seed before anything is averaged over seeds.
The ground of the room: it imports no other file of it.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from operator import attrgetter
from statistics import fmean
from typing import Any, Literal

from tombola.stats import Estimate, Paired, difference_over_rows, over_seeds, paired_over_seeds, smallest_detectable_difference
from tombola.study import survival as tables
from tombola.study.results import KINDS, STAGES, Results, ScoreRow, TicketRow
from tombola.study.variants import Variant
from tombola.tasks.base import LOWER_IS_BETTER, REGRESSION_METRICS, SPAN_METRICS, TOKEN_METRICS

DRAWS = 1_999  # of permutation tests on the page: p is then a multiple of .0005
ROLES = ("report", "challenge", "selection")  # in the order of the page
PROPORTIONS = frozenset({"accuracy"})  # metrics that are a share of right answers: only there is the limit of n rows known
UNITS: Mapping[str, Callable[[TicketRow], tuple[bool, ...]]] = {
    "heads": lambda ticket: tuple(bool(kept) for layer in ticket.heads for kept in layer),
    "MLPs": lambda ticket: tuple(map(bool, ticket.mlps)),
    "neurons": lambda ticket: ticket.neurons,
    "layers": lambda ticket: tuple(map(bool, ticket.mlps)),
}
UNIT_NAMES: Mapping[str, str] = {"mlps": "MLPs"}  # part of a table of `tombola.study` → unit, where they differ
# Scope of tickets whose map has no heads → what its one cell a layer stands for.
COLUMNS: Mapping[str, str] = {"neurons": "neurons", "layers": "layer"}
SEED_AND_DRAW = attrgetter("seed", "draw")
AS_FOUND = "as found"
OF_SEARCH = {"method", "procedure", "criterion", "sparsity", "scope"}  # settings that the name of a search says
PROCEDURES: Mapping[str, str] = {"joint": "s-prune", "heads": "s-prune, heads only", "mlps": "s-prune, MLPs only"}

Rows = Sequence[ScoreRow | TicketRow]


@dataclass(frozen=True, slots=True)
class Group:
    """The scores of one kind at one stage on one split, by seed and draw."""

    kind: str
    stage: str
    rows: tuple[ScoreRow, ...]

    @property
    def by_seed(self) -> dict[int, float]:
        return per_seed((row.seed, row.value) for row in self.rows)

    @property
    def score(self) -> Estimate:
        return over_seeds(list(self.by_seed.values()))

    def minus(self, other: "Group") -> Estimate:
        """The difference within each seed that both have."""
        return over_seeds(list(self.less(other).values()))

    def less(self, other: "Group") -> dict[int, float]:
        """Seed → difference, for the seeds that both have."""
        own, others = self.by_seed, other.by_seed
        return {seed: own[seed] - others[seed] for seed in own if seed in others}

    def within(self, seeds: Collection[int]) -> "Group":
        return Group(self.kind, self.stage, tuple(row for row in self.rows if row.seed in seeds))


@dataclass(frozen=True, slots=True)
class Split:
    """All groups of one task on one split by one metric, in the order of STAGES and KINDS."""

    role: str
    name: str
    metric: str
    groups: tuple[Group, ...]

    @property
    def rows(self) -> tuple[ScoreRow, ...]:
        return tuple(row for group in self.groups for row in group.rows)

    @property
    def of_values(self) -> bool:
        """Whether the answers are numbers: then there are no classes, and a constant answer is the line to beat."""
        return self.metric in (*REGRESSION_METRICS, *TOKEN_METRICS)

    @property
    def line(self) -> str:
        """What the majority line of this metric answers, whatever the row."""
        if self.metric in TOKEN_METRICS:
            return "by the frequencies of the tokens alone"
        if self.metric in SPAN_METRICS:
            return "one and the same answer"
        return "one and the same value" if self.of_values else "the most frequent class"

    @property
    def majority(self) -> float:
        return fmean(row.majority for row in self.rows)

    @property
    def falls(self) -> bool:
        """Whether less of this metric is better."""
        return self.metric in LOWER_IS_BETTER

    def group(self, kind: str, stage: str) -> Group | None:
        return next((group for group in self.groups if (group.kind, group.stage) == (kind, stage)), None)

    @property
    def dense(self) -> Group | None:
        return self.group("full", "full")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Good against random at one stage, over the seeds that have both, beside what the split could show."""

    split: Split
    stage: str
    good: Group
    random: Group
    difference: Estimate  # good - random within each seed
    over_rows: Estimate | None  # the same with its interval over rows; None where the metric is no share of right answers
    detectable: float | None  # None: not known for this metric, or out of reach of these rows

    @property
    def paired(self) -> Paired:
        """`difference` with its sign-flip p, which fewer than six seeds cannot bring below .05."""
        good, random = self.good.by_seed, self.random.by_seed
        return paired_over_seeds(list(good.values()), [random[seed] for seed in good])

    @property
    def clear_over_seeds(self) -> bool | None:
        """Whether the interval over seeds leaves out zero; None with one seed."""
        return _clear(self.difference)

    @property
    def clear_over_rows(self) -> bool | None:
        """Whether the interval over rows leaves out zero; None where it is not known."""
        return _clear(self.over_rows)

    @property
    def leads(self) -> str:
        """Who scores higher, by however little."""
        return "good" if (self.difference.value or 0.0) > 0 else "random"

    @property
    def ahead(self) -> Literal["good", "random", "neither"] | None:
        """Who leads by more than chance: "neither" where it is too close to tell, None where nothing can be said.

        By the rule of every conclusion, `decide`: other seeds and other rows would have to show it too.
        """
        if self.difference.value is None or self.difference.low is None:
            return None
        said = decide(self.difference, 0.0, self.over_rows)
        return "good" if said == "holds" else "random" if said == "fails" else "neither"


Outcome = Literal["holds", "fails", "undecided"]


def decide(over_seeds: Estimate, mark: float, over_rows: Estimate | None = None) -> Outcome:
    """Whether a difference passes a mark: where both intervals lie, that over rows where it is known.

    Over seeds alone, a model that is lucky on these rows would pass; over rows alone, one that is lucky in its seeds.
    """
    ends = [(one.low, one.high) for one in (over_seeds, over_rows) if one is not None]
    if all(low is not None and low > mark for low, _ in ends):
        return "holds"
    return "fails" if all(high is not None and high < mark for _, high in ends) else "undecided"


def _clear(found: Estimate | None) -> bool | None:
    return None if found is None or found.low is None or found.high is None else found.low > 0 or found.high < 0


@dataclass(frozen=True, slots=True)
class Case:
    """What is known of one task on one model."""

    title: str
    splits: tuple[Split, ...]  # in the order of ROLES
    tickets: tuple[TicketRow, ...]
    task: str = ""  # without what sets its runs apart
    settings: Mapping[str, Any] = field(default_factory=dict)
    differing: Mapping[str, str] = field(default_factory=dict)  # from other runs of the task
    unusual: Mapping[str, str] = field(default_factory=dict)  # those that most runs of the task have otherwise
    name: str = ""  # as its rows have it as `task`

    @property
    def search(self) -> str:
        """The search by the name that a reader knows it by."""
        return search_name(self.settings, self.tickets)

    @property
    def family(self) -> str:
        """What its tickets were made by, beside a search: "" as found, else joined, size-matched, super."""
        family = str(self.settings.get("mask", AS_FOUND))
        return "" if family == AS_FOUND else family

    @property
    def label(self) -> str:
        """What sets it apart from other runs of its task: search, family, then any other setting."""
        named = OF_SEARCH & self.differing.keys()
        other = [f"{name}={value}" for name, value in self.unusual.items()]
        return ", ".join([*([self.search] if named or self.family else []), *([self.family] if self.family else []), *other])

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({*(row.seed for row in self.scores), *(row.seed for row in self.tickets)}))

    @property
    def cells(self) -> tuple[str, ...]:
        """Keys of all its cells."""
        return tuple(sorted({*(row.cell for row in self.scores), *(row.cell for row in self.tickets)}))

    @property
    def scores(self) -> tuple[ScoreRow, ...]:
        return tuple(row for split in self.splits for row in split.rows)

    @property
    def report(self) -> Split | None:
        """The split that the verdict is about."""
        return next((split for split in self.splits if split.role == "report"), None)

    @property
    def reused(self) -> tuple[str, ...]:
        """Splits that served both to choose the mask and to report."""
        report, selection = ({split.name for split in self.splits if split.role == role} for role in ("report", "selection"))
        return tuple(sorted(report & selection))

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Good against random on the report split, retrained before pruned; only stages that have both."""
        found = (_compare(self.report, stage) for stage in ("retrained", "pruned")) if self.report else ()
        return tuple(comparison for comparison in found if comparison)

    @property
    def by_kind(self) -> dict[str, tuple[TicketRow, ...]]:
        """Kind → its tickets by seed and draw, in the order of KINDS."""
        found = sorted(dict.fromkeys(ticket.kind for ticket in self.tickets), key=lambda kind: _position(kind, KINDS))
        tickets = sorted(self.tickets, key=SEED_AND_DRAW)
        return {kind: tuple(ticket for ticket in tickets if ticket.kind == kind) for kind in found}

    @property
    def good(self) -> tuple[TicketRow, ...]:
        return self.by_kind.get("good", ())

    @property
    def controls(self) -> dict[str, tuple[TicketRow, ...]]:
        return {kind: tickets for kind, tickets in self.by_kind.items() if kind != "good"}

    @property
    def units(self) -> Mapping[str, Callable[[TicketRow], tuple[bool, ...]]]:
        """What the tickets keep or remove whole: nothing, where they remove single values."""
        return units_of(self.tickets[0]) if self.tickets and not any(ticket.values for ticket in self.tickets) else {}

    @property
    def column(self) -> str:
        """What each cell of a map's last column stands for."""
        return COLUMNS.get(self.tickets[0].scope, "MLP") if self.tickets else "MLP"

    @property
    def shapes(self) -> tuple[tuple[int, int, int], ...]:
        """Layers, heads in each, MLPs: one shape, unless tickets of different models were mixed."""
        return tuple(dict.fromkeys((len(it.heads), len(it.heads[0]), len(it.mlps)) for it in self.tickets))


def units_of(ticket: TicketRow) -> dict[str, Callable[[TicketRow], tuple[bool, ...]]]:
    """The kinds of part that a ticket keeps or removes whole, by its scope."""
    terms = ticket.scope.lower().split("+")
    return {unit: of for unit, of in UNITS.items() if unit.lower() in terms}


def cases_of(results: Results) -> tuple[Case, ...]:
    """A case for each task and model, in the order of their rows."""
    rows: Rows = (*results.scores, *results.tickets)
    several = len({row.model for row in rows}) > 1
    names = dict.fromkeys((row.model, row.task) for row in rows)
    known = {task: results.variants.get(task, Variant(task, {}, {})) for _, task in names}
    cases = [
        Case(
            "",
            _splits([row for row in results.scores if (row.model, row.task) == (model, task)]),
            tuple(ticket for ticket in results.tickets if (ticket.model, ticket.task) == (model, task)),
            known[task].task,
            known[task].settings,
            known[task].differing,
            name=task,
        )
        for model, task in names
    ]
    short = {task: task.partition(":")[0] for task in {case.task for case in cases}}
    if len(set(short.values())) == len(short):  # the options of a task are said in its warnings and settings
        cases = [replace(case, task=short[case.task]) for case in cases]
    cases = [replace(case, unusual=_unusual(case, [one for one in cases if one.task == case.task])) for case in cases]
    titles = [
        " · ".join([case.task, *([model] if several else []), *([case.label] if case.label else [])])
        for case, (model, _) in zip(cases, names, strict=True)
    ]
    return tuple(replace(case, title=title) for case, title in zip(cases, titles, strict=True))


def _unusual(case: Case, peers: Sequence[Case]) -> dict[str, str]:
    """The settings of a case that are not those of more than half of the runs of its task that have them."""
    found = {}
    for name, value in case.differing.items():
        if name in OF_SEARCH or name == "mask":
            continue
        every = [one.differing[name] for one in peers if name in one.differing]
        if every.count(value) * 2 <= len(every):
            found[name] = value
    return found


def search_name(settings: Mapping[str, Any], tickets: Sequence[TicketRow] = ()) -> str:
    """As in "s-prune, heads only" and "one-shot magnitude, 50 %"; without settings by what the tickets remove."""
    method = settings.get("method")
    share = "" if settings.get("sparsity") is None else f"{100 * float(settings['sparsity']):.3g} %"
    if method == "s-prune":
        procedure = str(settings.get("procedure", "joint"))
        return PROCEDURES.get(procedure, f"s-prune, {procedure}") + (f" to {share}" if share else "")
    if method == "one-shot":
        return f"one-shot {settings.get('criterion', '')}, {share}"
    if method == "learned":
        return f"learned, {share}"
    if method is not None:
        criterion = settings.get("criterion", "magnitude")
        return str(method) if criterion == "magnitude" else f"{method} by {criterion}"
    return "" if not tickets else "m-prune" if any(ticket.values for ticket in tickets) else "s-prune"


def per_seed(values: Iterable[tuple[int, float]]) -> dict[int, float]:
    """Seed → mean over its draws, from (seed, value) of each draw."""
    draws: dict[int, list[float]] = {}
    for seed, value in values:
        draws.setdefault(seed, []).append(value)
    return {seed: fmean(found) for seed, found in draws.items()}


def estimate(values: Iterable[tuple[int, float]]) -> Estimate:
    """Mean over seeds, of the means over draws, from (seed, value) of each draw."""
    return over_seeds(list(per_seed(values).values()))


def size(tickets: Sequence[TicketRow], unit: str) -> Estimate:
    """How many heads or MLPs the tickets keep."""
    return estimate((ticket.seed, float(sum(UNITS[unit](ticket)))) for ticket in tickets)


def keeps(ticket: TicketRow, layer: int, head: int | None) -> float:
    """The share of this head that the ticket keeps, in [0, 1]; without a head, of the MLP, neurons or whole of the layer."""
    return ticket.mlps[layer] if head is None else ticket.heads[layer][head]


def survival(tickets: Sequence[TicketRow], layer: int, head: int | None) -> float:
    """Share of seeds, and of draws within a seed, that keep this head or MLP; where single values go, the mean share kept."""
    return fmean(per_seed((ticket.seed, (keeps(ticket, layer, head))) for ticket in tickets).values())


def _splits(scores: Sequence[ScoreRow]) -> tuple[Split, ...]:
    found: dict[tuple[str, str, str], list[ScoreRow]] = {}
    for row in sorted(scores, key=lambda row: _position(row.role, ROLES)):
        found.setdefault((row.role, row.split, row.metric), []).append(row)
    return tuple(Split(*key, _groups(rows)) for key, rows in found.items())


def _groups(scores: Sequence[ScoreRow]) -> tuple[Group, ...]:
    found: dict[tuple[str, str], list[ScoreRow]] = {}
    for row in scores:
        found.setdefault((row.kind, row.stage), []).append(row)
    order = sorted(found, key=lambda key: (_position(key[1], STAGES), _position(key[0], KINDS)))
    return tuple(Group(*key, tuple(sorted(found[key], key=SEED_AND_DRAW))) for key in order)


def _compare(split: Split, stage: str) -> Comparison | None:
    good, random = split.group("good", stage), split.group("random", stage)
    if not good or not random or not (seeds := good.by_seed.keys() & random.by_seed.keys()):
        return None
    good, random = good.within(seeds), random.within(seeds)
    mean, detectable = good.score.value, None
    if split.metric in PROPORTIONS and mean is not None and 0 <= mean <= 1:
        detectable = smallest_detectable_difference(mean, min(row.n for row in split.rows))
    return Comparison(split, stage, good, random, good.minus(random), difference_on(split, good, random), detectable)


def difference_on(split: Split, one: Group, other: Group) -> Estimate | None:
    """The difference of two groups with its interval over rows; None where the metric is no share of right answers."""
    a, b = one.score.value, other.score.value
    if split.metric not in PROPORTIONS or a is None or b is None:
        return None
    return difference_over_rows(a, b, min(row.n for row in split.rows))


def _position(name: str, order: Sequence[str]) -> int:
    return order.index(name) if name in order else len(order)


@dataclass(frozen=True)
class Study:
    """All cases of a page, and what several of them are asked together: the tables of `tombola.study`, each worked out once."""

    results: Results
    cases: tuple[Case, ...]

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(case.task for case in self.cases))

    def title_of(self, task: str) -> str:
        """What the page calls the runs whose rows have this `task`."""
        return next((case.title for case in self.cases if case.name == task), task)

    def case_of(self, found: tables.Case) -> Case | None:
        """The page's case of a row of these tables; where it is part of several, one that was run as most are."""
        mine = [case for case in self.cases if case.name in found.names and case.good]
        return min(mine, key=lambda case: len(case.unusual), default=None)

    def task_of(self, name: str) -> str:
        """The task of a row as the page's filter knows it; "" of what is no task of it."""
        plain = tables.bare(name)
        short = plain.partition(":")[0]
        return plain if plain in self.tasks else short if short in self.tasks else ""

    @cached_property
    def stability(self) -> Mapping[tables.Case, Mapping[str, tables.StabilityRow]]:
        """E9: case → part → how far its seeds agree."""
        found: dict[tables.Case, dict[str, tables.StabilityRow]] = {}
        for row in tables.stability_rows(self.results, draws=DRAWS):
            found.setdefault(row.case, {})[row.part] = row
        return found

    def stability_of(self, case: Case) -> Mapping[str, tables.StabilityRow]:
        """Unit, as the page names it → how far the seeds of one case agree."""
        mine = next((of for found, of in self.stability.items() if case.name in found.names), {})
        return {UNIT_NAMES.get(part, part): row for part, row in mine.items()}

    @cached_property
    def overlaps(self) -> Sequence[tables.OverlapRow]:
        """E13: what two tasks share."""
        return tables.overlap_rows(self.results, draws=DRAWS)

    @property
    def seeds(self) -> tuple[int, ...]:
        return tuple(sorted({seed for case in self.cases for seed in case.seeds}))

    def by_search(self, wanted: Callable[[Case], object]) -> dict[str, tuple[Case, ...]]:
        """What sets them apart → cases of all tasks that were run alike, in the order of SEARCH_ORDER; those that are wanted.

        Where some were run as most are, those that were not are left out: `about_variants.setting_parts` has them.
        """
        found: dict[str, list[Case]] = {}
        fit = [case for case in self.cases if wanted(case)]
        usual = {case.task for case in fit if not case.unusual}
        for case in fit:
            if not case.unusual or case.task not in usual:
                found.setdefault(case.label or case.search, []).append(case)
        order = sorted(found, key=lambda label: (_search_place(found[label][0].search), label))
        return {label: tuple(found[label]) for label in order}


SEARCH_ORDER = ("s-prune", "m-prune", *list(PROCEDURES.values())[1:])


def study_of(results: Results) -> Study:
    """The cases of results."""
    return Study(results, cases_of(results))


def _search_place(search: str) -> int:
    return _position(search, SEARCH_ORDER)
