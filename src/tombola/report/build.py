"""Results → one page, and its score table in Markdown and LaTeX: every sentence and every cell is made here.

Order of reading: `Case` (the rows of one task), `Comparison` (what the page is about: does it matter which parts are
kept?), `_section`, then the parts from `_score_part` down. The template only lays out, the figures only draw.
A control has several draws in a seed: `_per_seed` averages them within the seed before anything is averaged over seeds.
"""

import math
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter, itemgetter
from pathlib import Path
from statistics import fmean
from typing import TypeVar

from tombola.errors import StoreError
from tombola.report import figures
from tombola.stats import (
    ALPHA,
    Estimate,
    Overlap,
    fleiss_kappa,
    over_seeds,
    overlap,
    smallest_detectable_difference,
    smallest_two_sided_p,
)
from tombola.study.results import KINDS, STAGES, Agreement, Results, ScoreRow, TicketRow

ROLES = {  # in the order of the page
    "report": "These rows had no part in choosing the mask.",
    "challenge": "Rows of another distribution than the training data; they have no part in the verdict.",
    "selection": "The mask was chosen on these rows: good looks better here than it is.",
}
PROPORTIONS = frozenset({"accuracy"})  # metrics that are a share of right answers: only there is the limit of n rows known
UNITS: Mapping[str, Callable[[TicketRow], tuple[bool, ...]]] = {
    "heads": lambda ticket: tuple(kept for layer in ticket.heads for kept in layer),
    "MLPs": lambda ticket: ticket.mlps,
}
Rows = Sequence[ScoreRow | TicketRow]
MAX_CLASSES = 6  # columns of the agreement table
LARGE, SMALL = 348, 216  # width of a heat map, in pixels
NONE, GLUE = "—", "\N{NO-BREAK SPACE}"

Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)
Row = TypeVar("Row", ScoreRow, TicketRow)


# What the template lays out


@dataclass(frozen=True, slots=True)
class Table:
    """Finished text; the first `stubs` columns are row headers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    stubs: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """Finished SVG with words around it; `ramp` says what its shades mean."""

    title: str
    svg: str
    caption: str
    ramp: tuple[str, str, str] | None = None  # css class, words at the pale end, words at the strong end
    natural: bool = False  # keeps its size; others share the width of their row


@dataclass(frozen=True, slots=True)
class Part:
    """One heading and what stands under it: rows of figures, tables, and tables that open on demand."""

    anchor: str
    name: str  # in the contents
    title: str
    lead: str
    figures: tuple[tuple[Figure, ...], ...] = ()
    tables: tuple[Table, ...] = ()
    fold: str = ""  # what opens `folded`
    folded: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """All that is shown of one task."""

    anchor: str
    title: str
    verdict: str
    parts: tuple[Part, ...]


# What is compared


@dataclass(frozen=True, slots=True)
class Group:
    """The scores of one kind at one stage on one split."""

    kind: str
    stage: str
    rows: tuple[ScoreRow, ...]

    @property
    def name(self) -> str:
        return "dense" if self.kind == "full" else f"{self.stage} {self.kind}"

    @property
    def by_seed(self) -> dict[int, float]:
        return _per_seed(self.rows, lambda row: row.value)

    @property
    def score(self) -> Estimate:
        return over_seeds(list(self.by_seed.values()))


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
    def n(self) -> str:
        return _span(row.n for row in self.rows)

    @property
    def majority(self) -> float:
        return fmean(row.majority for row in self.rows)

    @property
    def title(self) -> str:
        return f"{self.metric[:1].upper()}{self.metric[1:]} on {self.name} ({self.role} rows, n = {self.n})"

    def group(self, kind: str, stage: str) -> Group | None:
        return next((group for group in self.groups if (group.kind, group.stage) == (kind, stage)), None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Good against random at one stage, over the seeds that have both, beside what the split could show."""

    split: Split
    stage: str
    good: Estimate
    random: Estimate
    difference: Estimate  # good - random within each seed
    sample: str
    detectable: float | None  # None: not known for this metric, or out of reach of these rows

    @property
    def over_seeds(self) -> bool | None:
        """Whether the interval over seeds leaves out zero; None with one seed."""
        low, high = self.difference.low, self.difference.high
        return None if low is None or high is None else low > 0 or high < 0

    @property
    def ahead(self) -> str | None:
        """Who leads: "good", "random", "neither" where the difference is too small to tell, None where nothing can be said."""
        difference, clear = self.difference.value, self.over_seeds
        if difference is not None and self.split.metric in PROPORTIONS:
            clear = self.detectable is not None and abs(difference) >= self.detectable
        if difference is None or clear is None:
            return None
        return ("good" if difference > 0 else "random") if clear else "neither"

    @property
    def sentence(self) -> str:
        rows = f"{self.split.n} rows"
        if self.difference.value is None:
            return f"{self.stage.capitalize()}, good and random cannot be compared: {self.difference.note}."
        start = (
            f"{self.stage.capitalize()}, the good ticket scores {_number(self.good.value)} and its random controls "
            f"{_number(self.random.value)} ({self.split.metric} on {self.split.name}, {rows}, {self.sample}): "
            f"the difference of {_number(self.difference.value)} "
        )
        seeds = f"95 % interval over seeds {_interval(self.difference)}"
        if self.split.metric in PROPORTIONS:
            if self.detectable is None:
                return f"{start}says nothing, as {rows} can show no difference at all."
            if self.ahead == "neither":
                return f"{start}is smaller than the {_number(self.detectable)} that {rows} can show."
            holds = {
                True: f"and over seeds ({seeds})",
                False: f"but another seed might turn it ({seeds})",
                None: "in the one seed",
            }
            larger = f"is larger than the {_number(self.detectable)} that {rows} can show"
            return f"{start}{larger}: {self.ahead} is ahead on these rows, {holds[self.over_seeds]}."
        if self.ahead is None:
            return f"{start}comes from one seed, and what these rows can show is not known for this metric."
        if self.ahead == "neither":
            return f"{start}may as well be zero ({seeds})."
        return f"{start}is not zero ({seeds}): {self.ahead} is ahead."


@dataclass(frozen=True, slots=True)
class Case:
    """The rows of one task on one model."""

    title: str
    scores: tuple[ScoreRow, ...]
    tickets: tuple[TicketRow, ...]

    @property
    def splits(self) -> tuple[Split, ...]:
        rows: dict[tuple[str, str, str], dict[tuple[str, str], list[ScoreRow]]] = {}
        for row in self.scores:
            rows.setdefault((row.role, row.split, row.metric), {}).setdefault((row.stage, row.kind), []).append(row)
        return tuple(
            Split(
                *key, tuple(Group(kind, stage, _in_order(rows[key][stage, kind])) for stage, kind in sorted(rows[key], key=_rank))
            )
            for key in sorted(rows, key=lambda key: _position(key[0], ROLES))
        )

    @property
    def reused(self) -> tuple[str, ...]:
        """Splits that served both to choose the mask and to report."""
        used = {(row.split, row.role) for row in self.scores}
        return tuple(split for split, role in sorted(used) if role == "report" and (split, "selection") in used)

    @property
    def shapes(self) -> tuple[str, ...]:
        return _unique(_shape(ticket) for ticket in self.tickets)

    @property
    def kinds(self) -> tuple[str, ...]:
        return tuple(sorted(_unique(ticket.kind for ticket in self.tickets), key=lambda kind: _position(kind, KINDS)))

    def of(self, kind: str) -> tuple[TicketRow, ...]:
        return _in_order(ticket for ticket in self.tickets if ticket.kind == kind)

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Good against random on the first report split, retrained before pruned; only stages that have both."""
        report = next((split for split in self.splits if split.role == "report"), None)
        found = (_compare(report, stage) for stage in ("retrained", "pruned")) if report else ()
        return tuple(comparison for comparison in found if comparison)


def build_page(results: Results, out: Path) -> Path:
    """The path of the page it wrote, `out`: one HTML file that needs nothing else, complete or not there at all.

    Raises: StoreError if `out` is a folder.
    """
    if out.is_dir():
        raise StoreError("the page is one file", got=f"the folder {out}", expected="a file name", next=f"use {out / 'page.html'}")
    text = render(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes private files; a page is made to be shared
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return out


def render(results: Results) -> str:
    """The page as HTML. The same results give the same text: it holds no clock and no path of its own."""
    from base64 import b64encode
    from hashlib import sha256

    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tombola.report", "."),
        autoescape=True,  # names and labels may hold anything; only what `figures` drew passes as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["sha256"] = lambda text: b64encode(sha256(str(text).encode()).digest()).decode()
    cases = _cases(results)
    rows: Rows = (*results.scores, *results.tickets)
    return environment.get_template("page.html.j2").render(
        title=_listed([case.title for case in cases]),
        models=_listed(_unique(row.model for row in rows)),
        seeds=_count(len({row.seed for row in rows}), "seed"),
        verdict=_verdict(cases),
        glance=_glance_table(cases) if len(cases) > 1 else None,
        warnings=_warnings(results.warnings, cases),
        sections=[_section(f"task-{i}", case) for i, case in enumerate(cases, start=1)],
        settings=_mapping_table("Settings of this study, as resolved", results.settings),
        provenance=_mapping_table("What the numbers were made from", results.provenance),
    )


def markdown_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a Markdown table; empty if there are none."""
    if not (rows := _flat_scores(results, role)):
        return ""
    rule = ("---",) * FLAT_TEXT + ("---:",) * (len(FLAT_HEAD) - FLAT_TEXT)
    body = (tuple(_markdown(cell) for cell in row) for row in rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in (FLAT_HEAD, rule, *body))


def latex_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a LaTeX tabular (package booktabs); empty if there are none."""
    if not (rows := _flat_scores(results, role)):
        return ""
    head, *body = (" & ".join(_latex(cell) for cell in row) + r" \\" for row in (FLAT_HEAD, *rows))
    columns = "l" * FLAT_TEXT + "r" * (len(FLAT_HEAD) - FLAT_TEXT)
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


FLAT_HEAD = (
    *("Task", "Split", "Metric", "Stage", "Ticket"),
    *("Score", "95 % interval", "Majority", "Seeds", "Draws per seed", "Rows"),
)
FLAT_TEXT = 5  # columns of words, at the left


def _flat_scores(results: Results, role: str) -> list[tuple[str, ...]]:
    return [
        (case.title, f"{split.name} ({role})", split.metric, *_score_cells(group))
        for case in _cases(results)
        for split in case.splits
        if split.role == role
        for group in split.groups
    ]


# Words


def _cases(results: Results) -> tuple[Case, ...]:
    rows: Rows = (*results.scores, *results.tickets)
    models = _unique(row.model for row in rows)
    return tuple(
        Case(
            task if len(models) == 1 else f"{task} · {model}",
            tuple(row for row in results.scores if (row.model, row.task) == (model, task)),
            tuple(row for row in results.tickets if (row.model, row.task) == (model, task)),
        )
        for model, task in _unique((row.model, row.task) for row in rows)
    )


def _compare(split: Split, stage: str) -> Comparison | None:
    good, random = split.group("good", stage), split.group("random", stage)
    seeds = [seed for seed in good.by_seed if seed in random.by_seed] if good and random else []
    if not (good and random and seeds):
        return None
    own, other = ([group.by_seed[seed] for seed in seeds] for group in (good, random))
    mean = over_seeds(own).value
    known = split.metric in PROPORTIONS and mean is not None and 0 <= mean <= 1
    return Comparison(
        split,
        stage,
        over_seeds(own),
        over_seeds(other),
        over_seeds([a - b for a, b in zip(own, other, strict=True)]),
        _sample([row for row in random.rows if row.seed in seeds]),
        smallest_detectable_difference(mean, min(row.n for row in split.rows)) if known and mean is not None else None,
    )


def _verdict(cases: Sequence[Case]) -> str:
    if len(cases) == 1:
        return _case_verdict(cases[0])
    compared = {case.title: case.comparisons[0] for case in cases if case.comparisons}
    outcomes = Counter(comparison.ahead for comparison in compared.values())
    words = {
        "good": "good tickets are ahead of random ones by more than chance in rows or seeds explains",
        "random": "random tickets are ahead of good ones by more than chance in rows or seeds explains",
        "neither": "the difference between good and random tickets is smaller than rows or seeds can show",
        None: "good and random tickets cannot be compared",
    }
    said = [
        f"In {outcomes[ahead]} of {_count(len(compared), 'task')} {text}." for ahead, text in words.items() if outcomes[ahead]
    ]
    if len(compared) <= 3:  # more are better read in the table
        said += [
            f"{title}, {it.stage}: good {_number(it.good.value)}, random {_number(it.random.value)} "
            f"({it.split.metric} on {it.split.name}, {it.split.n} rows, {it.sample})."
            for title, it in compared.items()
        ]
    return " ".join(said)


def _case_verdict(case: Case) -> str:
    if not case.comparisons:
        has_report = any(row.role == "report" for row in case.scores)
        missing = "good and random tickets of the same seeds" if has_report else "scores on report rows"
        return f"There is no verdict: it needs {missing}."
    split = case.comparisons[0].split
    sentences = [comparison.sentence for comparison in case.comparisons]
    dense = split.group("full", "full")
    beside = f" and the dense model {_spread(dense.score)} ({_sample(dense.rows)})" if dense else ""
    sentences.append(f"Always answering the most frequent class scores {_number(split.majority)}{beside} on the same rows.")
    if (score := case.comparisons[0].good.value) is not None and score <= split.majority:
        sentences.append("Good does not beat the most frequent class, so being ahead or behind means little.")
    if good := case.of("good"):
        kept = [
            f"{_spread(_kept_estimate(good, unit), 1)} of {_span(len(of(t)) for t in good)} {unit}" for unit, of in UNITS.items()
        ]
        sentences.append(f"Good keeps {_listed(kept)} ({_sample(good)}).")
    return " ".join(sentences)


def _warnings(said: Sequence[str], cases: Sequence[Case]) -> dict[str, tuple[str, ...]]:
    """Task or tasks → what is doubtful there: first what the cells said themselves, then what their rows show."""
    everywhere = list(said)
    shapes = _unique((case.title, shape) for case in cases for shape in case.shapes)
    if len({shape for _, shape in shapes}) > 1:
        sizes = _listed([f"{title} has {shape}" for title, shape in shapes])
        everywhere.append(f"Models of different sizes are on this page ({sizes}): compare scores and sizes within a task only.")
    titles: dict[str, list[str]] = {}
    for case in cases:
        for text in (*_score_warnings(case), *_ticket_warnings(case)):
            titles.setdefault(text, []).append(case.title)
    found: dict[str, tuple[str, ...]] = {"": tuple(everywhere)} if everywhere else {}
    for text, where in titles.items():
        heading = _listed(where) if len(cases) > 1 else ""
        found[heading] = (*found.get(heading, ()), text)
    return found


def _score_warnings(case: Case) -> Iterator[str]:
    if case.reused:
        yield f"The mask was chosen on the rows it is reported on ({_listed(case.reused)}), so good looks better than it is."
    for split in case.splits:
        if len({row.n for row in split.rows}) > 1:
            yield f"{split.title}: the scores were not measured on the same number of rows."
        if broken := [group.name for group in split.groups if group.score.value is None]:
            yield f"{split.title}: no mean where a seed has no finite score ({_listed(broken)})."
        majority = _per_seed(split.rows, lambda row: row.majority)
        below = {g.name: [seed for seed, value in g.by_seed.items() if value <= majority[seed]] for g in split.groups}
        if any(below.values()):
            everything = all(len(seeds) == len(majority) for seeds in below.values())
            which = (f"{name} ({_some(seeds, len(majority))})" for name, seeds in below.items() if seeds)
            said = "every model in every seed" if everything else "; ".join(which)
            yield f"{split.title}: at or below the majority line of {_number(split.majority)}: {said}."
    for comparison in case.comparisons:
        if comparison.ahead == "neither":
            rows = f"{comparison.split.n} {comparison.split.name} rows"
            limit = f"smaller than the {_number(comparison.detectable)} that {rows} can show"
            if comparison.split.metric not in PROPORTIONS:
                limit = f"zero lies in its 95 % interval over seeds, {_interval(comparison.difference)}"
            elif comparison.detectable is None:
                limit = f"{rows} can show no difference at all"
            difference = _number(comparison.difference.value, sign=True)
            yield f"{comparison.stage.capitalize()}, good minus random is {difference} ({comparison.sample}): {limit}."
    seeds = len({row.seed for row in case.scores})
    if seeds and smallest_two_sided_p(seeds) >= ALPHA:
        yield (
            f"{_count(seeds, 'seed')} cannot give p < {ALPHA} in a paired sign-flip or Wilcoxon test: the smallest two-sided p "
            f"is {_number(smallest_two_sided_p(seeds))} whatever the scores. It takes 6 seeds."
        )
    keys = Counter((row.seed, row.kind, row.stage, row.draw, row.split, row.role, row.metric) for row in case.scores)
    if repeated := sum(count > 1 for count in keys.values()):
        yield f"{_count(repeated, 'score')} came more than once for one seed and draw: the means mix different settings."


def _ticket_warnings(case: Case) -> Iterator[str]:
    if len(case.shapes) > 1:
        yield f"Tickets of models of different sizes ({_listed(case.shapes)}): their maps, sizes and overlaps are not shown."
        return
    kept = [({unit: sum(of(ticket)) for unit, of in UNITS.items()}, ticket) for ticket in case.tickets]
    for what, found in (
        ("nothing", [t for k, t in kept if not k["heads"] and not k["MLPs"]]),
        ("no heads", [t for k, t in kept if not k["heads"] and k["MLPs"]]),
        ("no MLPs", [t for k, t in kept if k["heads"] and not k["MLPs"]]),
        ("everything", [t for k, t in kept if all(k[unit] == len(of(t)) for unit, of in UNITS.items())]),
    ):
        if found:
            yield f"A mask that keeps {what}: {_listed([_ticket(ticket) for ticket in found])}."
    good = {ticket.seed: ticket for ticket in case.of("good")}
    for kind in (kind for kind in case.kinds if kind != "good"):
        pairs = [(ticket, good[ticket.seed]) for ticket in case.of(kind) if ticket.seed in good]
        other = [a for a, b in pairs if any(sum(of(a)) != sum(of(b)) for of in UNITS.values())]
        if other:
            yield f"{len(other)} of {len(pairs)} {kind} controls differ from good in size: that comparison is not one of equals."
        for ticket, its in pairs:
            for unit, stored in (("heads", ticket.heads_shared_with_good), ("MLPs", ticket.mlps_shared_with_good)):
                shared = overlap(UNITS[unit](ticket), UNITS[unit](its)).shared
                if stored not in (None, shared):
                    yield f"{_ticket(ticket)} shares {shared} {unit} with good, stored as {stored}: two studies are mixed."
    undefined: dict[str, list[str]] = {}
    for unit, of in UNITS.items():
        kappa = fleiss_kappa([of(ticket) for ticket in good.values()])
        if good and kappa.value is None:
            undefined.setdefault(kappa.note, []).append(unit)
    for why, units in undefined.items():
        yield f"Fleiss kappa over the seeds of good is undefined for {_listed(units)}: {why}."


# Parts


def _section(anchor: str, case: Case) -> Section:
    parts: list[Part | None] = [_score_part(f"{anchor}-scores-{i}", case, split) for i, split in enumerate(case.splits, start=1)]
    if len(case.shapes) == 1:
        parts.append(_survival_part(f"{anchor}-survival", case))
        parts.append(_search_part(f"{anchor}-search", case))
        parts.append(_size_part(f"{anchor}-sizes", case))
        parts.append(_overlap_part(f"{anchor}-overlap", case))
    return Section(anchor, case.title, _case_verdict(case), tuple(part for part in parts if part))


def _glance_table(cases: Sequence[Case]) -> Table:
    words = {"good": "good", "random": "random", "neither": "too close", None: "unknown"}
    return Table(
        "Good against random on report rows: mean ± std over seeds",
        ("Task", "Stage", "Good", "Random", "Difference", "Can be shown", "Ahead", "Metric, split", "Rows", "Sample"),
        tuple(
            (
                case.title,
                comparison.stage,
                _spread(comparison.good),
                _spread(comparison.random),
                _spread(comparison.difference, sign=True),
                _number(comparison.detectable),
                words[comparison.ahead],
                f"{comparison.split.metric}, {comparison.split.name}",
                comparison.split.n,
                comparison.sample,
            )
            for case in cases
            for comparison in case.comparisons
        ),
        "Difference: good minus random within each seed. Can be shown: see “How to read the numbers”.",
        stubs=2,
    )


def _score_part(anchor: str, case: Case, split: Split) -> Part:
    reused = split.role == "report" and split.name in case.reused
    full = split.group("full", "full")
    lines = [figures.Line("majority", f"majority {_number(split.majority)}", split.majority)]
    if full and full.score.value is not None:
        lines.append(figures.Line("line-full", f"dense {_number(full.score.value)}", full.score.value))
    chart = Figure(
        "",
        figures.dot_chart(
            [_dot_row(group) for group in split.groups], lines, label=f"Dot chart of {split.title}; the table has its numbers"
        ),
        f"{split.title}. Large dots: seeds. Small dots: draws of a control. Bar: mean over seeds; line: one std to each side.",
    )
    cells = [(group, _score_cells(group)) for group in split.groups]
    scores = Table(
        f"{split.title}: mean ± std over seeds",
        ("Stage", "Ticket", "Score", "95 % interval", "Majority", "Seeds", "Draws per seed", "Rows", "Minus dense"),
        tuple((*texts, _difference(group, full)) for group, texts in cells),
        "Draws of a control are averaged within their seed first. Minus dense: within each seed.",
        stubs=2,
    )
    agreement = _agreement_table(split)
    return Part(
        anchor,
        "Scores" if split.role == "report" else split.role.capitalize(),
        f"Scores on {split.role} rows: {split.name}",
        ROLES["selection"] if reused else ROLES.get(split.role, ""),
        ((chart,),) if chart.svg and split.role != "selection" else (),
        (scores, *([agreement] if agreement and split.role == "report" else [])),
        "Agreement with the dense model",
        (agreement,) if agreement and split.role != "report" else (),
    )


def _score_cells(group: Group) -> tuple[str, ...]:
    score = group.score
    return (
        group.stage,
        _kind(group.kind),
        _spread(score),
        _interval(score),
        _number(fmean(row.majority for row in group.rows)),
        str(score.n_seeds),
        _draws(group.rows),
        _span(row.n for row in group.rows),
    )


def _difference(group: Group, full: Group | None) -> str:
    if full is None or group is full:
        return NONE
    own, dense = group.by_seed, full.by_seed
    return _spread(over_seeds([own[seed] - dense[seed] for seed in own if seed in dense]), sign=True)


def _dot_row(group: Group) -> figures.DotRow:
    dots = []
    for seed, mean in group.by_seed.items():
        rows = [row for row in group.rows if row.seed == seed]
        draws = f"\nmean of {len(rows)} draws: {', '.join(_number(row.value) for row in rows)}" if len(rows) > 1 else ""
        title = f"{group.name}\nseed {seed}: {_number(mean)}{draws}\n{rows[0].split}, {_span(row.n for row in rows)} rows"
        dots.append(figures.Dot(mean, tuple(row.value for row in rows), title))
    heading = {"pruned": "Pruned, not trained again", "retrained": "Retrained from the base"}.get(group.stage, "")
    score = group.score
    text = f"{_spread(score)} · {_sample(group.rows)}"
    return figures.DotRow(heading, _kind(group.kind), _css(group.kind), text, score.value, score.std, tuple(dots))


def _agreement_table(split: Split) -> Table | None:
    known = [
        (group, [(row.seed, row.agreement) for row in group.rows if row.agreement and row.agreement.n]) for group in split.groups
    ]
    groups = [(group, pairs) for group, pairs in known if pairs]
    if not groups:
        return None

    def over(pairs: list[tuple[int, Agreement]], of: Callable[[Agreement], float]) -> Estimate:
        return over_seeds(list(_per_seed(pairs, lambda pair: of(pair[1]), lambda pair: pair[0]).values()))

    def change(pairs: list[tuple[int, Agreement]], name: str) -> Estimate:
        return over(pairs, lambda it: (it.counts.get(name, 0) - it.dense_counts.get(name, 0)) / it.n)

    names = _unique(name for _, pairs in groups for _, it in pairs for name in (*it.dense_counts, *it.counts))
    largest = sorted(names, key=lambda name: -max(abs(change(pairs, name).value or 0) for _, pairs in groups))[:MAX_CLASSES]
    shown = [name for name in names if name in largest]
    cut = f" The {len(shown)} of {len(names)} classes that change most." if len(shown) < len(names) else ""
    return Table(
        f"{split.title}: how the predictions differ from those of the dense model of the same seed",
        ("Stage", "Ticket", "Rows that flip", "Lost", "Gained", *(f"Δ {name}" for name in shown), "Seeds", "Draws per seed", "Rows"),
        tuple(
            (
                group.stage,
                _kind(group.kind),
                _spread(over(pairs, lambda it: it.flips / it.n)),
                _spread(over(pairs, lambda it: it.lost / it.n)),
                _spread(over(pairs, lambda it: it.gained / it.n)),
                *(_spread(change(pairs, name), sign=True) for name in shown),
                str(len({seed for seed, _ in pairs})),
                _draws(group.rows),
                _span(it.n for _, it in pairs),
            )
            for group, pairs in groups
        ),
        f"As shares of all rows, mean ± std over seeds. Lost: right in the dense model, wrong here; gained: the other way round. Δ: share of rows given this class, minus that of the dense model.{cut}",
        stubs=2,
    )


def _survival_part(anchor: str, case: Case) -> Part:
    maps = {kind: _survival_map(case, kind) for kind in case.kinds}
    first = [figure for figure in (maps.pop("good", None), _importance_map(case)) if figure]
    return Part(
        anchor,
        "Survival",
        "Which heads and MLPs survive",
        f"{case.shapes[0]}; layers down and heads across, both counted from 0. "
        "Shade is the share of seeds, and of draws within a seed, that keep a component; point at one for its numbers.",
        tuple(row for row in (tuple(first), tuple(maps.values())) if row),
        fold="Survival in numbers",
        folded=tuple(_survival_table(case, kind) for kind in case.kinds),
    )


def _survival_map(case: Case, kind: str) -> Figure:
    tickets = case.of(kind)

    def cell(layer: int, head: int | None) -> figures.HeatCell:
        share = _survival(tickets, layer, head)
        lines = [f"{_component(layer, head)} · {_kind(kind)}", f"survival {_number(share)} ({_sample(tickets)})"]
        for seed in _unique(ticket.seed for ticket in tickets):
            votes = [_keeps(ticket, layer, head) for ticket in tickets if ticket.seed == seed]
            alone = "kept" if votes[0] else "removed"
            lines.append(f"seed {seed}: {alone if len(votes) == 1 else f'kept in {sum(votes)} of {len(votes)} draws'}")
        if raw := _importances(case, layer, head):
            lines.append(f"importance {_significant(fmean(raw.values()))} (mean of {_count(len(raw), 'seed')})")
        return figures.HeatCell(share, "\n".join(lines))

    return Figure(
        f"Survival: {_kind(kind)}",
        figures.heat_map(
            *_grid(tickets[0], cell),
            css="survival",
            width=LARGE if kind == "good" else SMALL,
            label=f"Heat map of survival, {kind} tickets, {_sample(tickets)}; the tables below have its numbers",
        ),
        _sample(tickets),
        ("survival", "kept in no seed", "in all") if kind == case.kinds[0] else None,
        natural=True,
    )


def _importance_map(case: Case) -> Figure | None:
    tickets = [ticket for ticket in case.of("good") if ticket.head_importance is not None]
    if not tickets:
        return None
    means: dict[bool, list[float]] = {True: [0.0], False: [0.0]}  # heads, MLPs: each has a scale of its own

    def collect(layer: int, head: int | None) -> None:
        if raw := _importances(case, layer, head):
            means[head is not None].append(fmean(raw.values()))

    def cell(layer: int, head: int | None) -> figures.HeatCell:
        if not (raw := _importances(case, layer, head)):
            return figures.HeatCell(None, f"{_component(layer, head)}\nno importance stored")
        mean, top = fmean(raw.values()), max(means[head is not None])
        title = [_component(layer, head), f"importance {_significant(mean)} (mean of {_count(len(raw), 'seed')})"]
        title += [f"seed {seed}: {_significant(value)}" for seed, value in raw.items()]
        title.append(f"survival in good {_number(_survival(case.of('good'), layer, head))} ({_sample(case.of('good'))})")
        return figures.HeatCell(mean / top if top > 0 else 0.0, "\n".join(title))

    _grid(tickets[0], collect)
    heads, mlps = _grid(tickets[0], cell)
    seeds = _count(len(tickets), "seed")
    return Figure(
        "Importance in the dense model",
        figures.heat_map(
            heads, mlps, css="importance", width=LARGE, label=f"Heat map of importance, mean of {seeds}; point at a cell"
        ),
        f"mean of {seeds}; heads to {_significant(max(means[True]))}, MLPs (own scale) to {_significant(max(means[False]))}",
        ("importance", "0", "largest"),
        natural=True,
    )


def _survival_table(case: Case, kind: str) -> Table:
    tickets = case.of(kind)
    heads, mlps = _grid(tickets[0], lambda layer, head: _number(_survival(tickets, layer, head)))
    columns = max((len(row) for row in heads), default=0)
    rows = range(max(len(heads), len(mlps)))
    return Table(
        f"Survival of {_kind(kind)}, share of seeds ({_sample(tickets)})",
        ("Layer", *(f"H{head}" for head in range(columns)), "MLP"),
        tuple(
            (str(i), *(heads[i] if i < len(heads) else ()), *("" for _ in range(columns - len(heads[i]))), *mlps[i : i + 1])
            for i in rows
        ),
    )


def _search_part(anchor: str, case: Case) -> Part | None:
    charts = []
    for ticket in case.of("good"):
        if not ticket.path:
            continue
        heads, mlps = (len(of(ticket)) for of in UNITS.values())
        dots = []
        if ticket.full_score is not None:
            title = f"dense model: {_number(ticket.full_score)}\nall {heads} heads, all {mlps} MLPs"
            dots.append(figures.PathDot(ticket.full_score, True, ticket.path[0].phase, heads, mlps, title))
        for step in ticket.path:
            fate = "kept" if step.passed else "below the floor, rolled back"
            title = (
                f"trial {step.step}, {step.phase}: {_number(step.score)}\n{step.heads_kept} heads, {step.mlps_kept} MLPs\n{fate}"
            )
            dots.append(figures.PathDot(step.score, step.passed, step.phase, step.heads_kept, step.mlps_kept, title))
        rows = _span(row.n for row in case.scores if row.role == "selection" and row.seed == ticket.seed)
        chart = figures.path_chart(
            dots, ticket.floor_score, label=f"Search path of seed {ticket.seed}, {len(ticket.path)} trials"
        )
        caption = f"{_count(len(ticket.path), 'trial')} on {f'{rows} ' if rows != NONE else ''}selection rows"
        charts.append(Figure(f"Seed {ticket.seed}", chart, caption))
    if not charts:
        return None
    return Part(
        anchor,
        "Search",
        "How the good ticket was found",
        "The score after each trial; below it, the heads and MLPs left. Hollow trials fell under the floor and were rolled back.",
        (tuple(charts),),
    )


def _size_part(anchor: str, case: Case) -> Part:
    head = (f"{unit[0].upper()}{unit[1:]} of {_span(len(of(ticket)) for ticket in case.tickets)}" for unit, of in UNITS.items())
    return Part(
        anchor,
        "Sizes",
        "How large the tickets are",
        "",
        tables=(
            Table(
                "What the tickets keep, mean ± std over seeds",
                ("Ticket", *head, "Share of body", "Share of all parameters", "Seeds", "Draws per seed"),
                tuple(
                    (
                        _kind(kind),
                        *(_spread(_kept_estimate(tickets, unit), 1) for unit in UNITS),
                        _spread(_estimate(tickets, lambda ticket: ticket.body_share)),
                        _spread(_estimate(tickets, lambda ticket: ticket.total_share)),
                        str(len({ticket.seed for ticket in tickets})),
                        _draws(tickets),
                    )
                    for kind in case.kinds
                    for tickets in [case.of(kind)]
                ),
                "Body: the values of all heads and MLPs. Shares are of parameters that survive, in [0, 1].",
            ),
        ),
    )


def _overlap_part(anchor: str, case: Case) -> Part | None:
    good = {ticket.seed: ticket for ticket in case.of("good")}
    controls = [(kind, [t for t in case.of(kind) if t.seed in good]) for kind in case.kinds if kind != "good"]
    with_good = [
        (kind, unit, tickets, [(t.seed, overlap(of(t), of(good[t.seed]))) for t in tickets])
        for kind, tickets in controls
        for unit, of in UNITS.items()
        if tickets
    ]
    pairs = [
        (f"{a} and {b}", unit, overlap(of(good[a]), of(good[b]))) for unit, of in UNITS.items() for a, b in combinations(good, 2)
    ]
    tables = []
    if with_good:
        tables.append(
            Table(
                "What controls share with the good ticket of their seed, mean ± std over seeds",
                (
                    "Ticket",
                    "Unit",
                    "Shared",
                    "Shared by chance",
                    "Ratio",
                    "Jaccard",
                    "Jaccard by chance",
                    "Seeds",
                    "Draws per seed",
                ),
                tuple(
                    (
                        _kind(kind),
                        unit,
                        _spread_defined(found, lambda it: float(it.shared), 1),
                        _spread_defined(found, lambda it: it.expected_shared, 1),
                        _spread_defined(found, lambda it: it.ratio),
                        _spread_defined(found, lambda it: it.jaccard),
                        _spread_defined(found, lambda it: it.expected_jaccard),
                        str(len({seed for seed, _ in found})),
                        _draws(tickets),
                    )
                    for kind, unit, tickets, found in with_good
                ),
                "By chance: the mean for random masks of the same two sizes. One that shares most of good is hardly a control.",
                stubs=2,
            )
        )
    if pairs:
        tables.append(_stability_table(good, pairs))
    if not tables:
        return None
    every = Table(
        "Good tickets of two seeds",
        ("Seeds", "Unit", "Shared", "Shared by chance", "Ratio", "Jaccard", "Jaccard by chance", "p, this much or more", "Note"),
        tuple(
            (
                seeds,
                unit,
                str(it.shared),
                _number(it.expected_shared, 1),
                _number(it.ratio),
                _number(it.jaccard),
                _number(it.expected_jaccard),
                _number(it.p_at_least),
                it.note,
            )
            for seeds, unit, it in pairs
        ),
        stubs=2,
    )
    lead = "Controls against good, and good against itself over seeds, beside what random masks of these sizes would share."
    title = "How much the tickets overlap"
    return Part(anchor, "Overlap", title, lead, tables=tuple(tables), fold="All pairs of seeds", folded=(every,) if pairs else ())


def _stability_table(good: Mapping[int, TicketRow], pairs: Sequence[tuple[str, str, Overlap]]) -> Table:
    def mean(unit: str, of: Callable[[Overlap], float | None], decimals: int = 3) -> str:
        values = [(i, it) for i, (_, its, it) in enumerate(pairs) if its == unit]
        return _spread_defined(values, of, decimals, std=False)  # pairs share seeds: a std over pairs would pretend more

    rows = []
    for unit, of in UNITS.items():
        kappa = fleiss_kappa([of(ticket) for ticket in good.values()])
        known = [it.p_at_least for _, its, it in pairs if its == unit and it.p_at_least is not None]
        rows.append(
            (
                unit,
                mean(unit, lambda it: float(it.shared), 1),
                mean(unit, lambda it: it.expected_shared, 1),
                mean(unit, lambda it: it.ratio),
                mean(unit, lambda it: it.jaccard),
                mean(unit, lambda it: it.expected_jaccard),
                f"{sum(p < ALPHA for p in known)} of {len(known)}",
                _number(kappa.value) if kappa.value is not None else "undefined",
                str(len(good)),
            )
        )
    return Table(
        f"Good tickets of different seeds: mean over {_count(len(pairs) // len(UNITS), 'pair')} of seeds",
        (
            "Unit",
            "Shared",
            "Shared by chance",
            "Ratio",
            "Jaccard",
            "Jaccard by chance",
            f"Pairs with p < {ALPHA}",
            "Fleiss kappa",
            "Seeds",
        ),
        tuple(rows),
        "p: chance of sharing this much or more (hypergeometric). Kappa: 1 = one mask in all seeds, 0 = chance, below 0 = less.",
    )


def _mapping_table(caption: str, values: Mapping[str, object]) -> Table | None:
    rows = tuple((str(name), str(value)) for name, value in values.items())
    return Table(caption, ("Name", "Value"), rows) if rows else None


# Numbers of rows, and their words


def _per_seed(
    items: Iterable[Item], of: Callable[[Item], float], seed: Callable[[Item], int] = attrgetter("seed")
) -> dict[int, float]:
    """Seed → mean over its draws."""
    values: dict[int, list[float]] = {}
    for item in items:
        values.setdefault(seed(item), []).append(of(item))
    return {seed: fmean(draws) for seed, draws in values.items()}


def _estimate(items: Iterable[Item], of: Callable[[Item], float]) -> Estimate:
    return over_seeds(list(_per_seed(items, of).values()))


def _kept_estimate(tickets: Sequence[TicketRow], unit: str) -> Estimate:
    return _estimate(tickets, lambda ticket: float(sum(UNITS[unit](ticket))))


def _spread_defined(
    found: Sequence[tuple[int, Overlap]], of: Callable[[Overlap], float | None], decimals: int = 3, *, std: bool = True
) -> str:
    """Mean over the defined ones; how many are undefined stands beside it."""
    values = [(seed, value) for seed, it in found if (value := of(it)) is not None]
    lost = f" ({len(found) - len(values)} of {len(found)} undefined)" if len(values) < len(found) else ""
    if not values:
        return "undefined"
    estimate = over_seeds(list(_per_seed(values, itemgetter(1), itemgetter(0)).values()))
    return (_spread(estimate, decimals) if std else _number(estimate.value, decimals)) + lost


def _grid(ticket: TicketRow, cell: Callable[[int, int | None], Item]) -> tuple[list[list[Item]], list[Item]]:
    """`cell(layer, head)` for every head, and `cell(layer, None)` for every MLP."""
    heads = [[cell(layer, head) for head in range(len(row))] for layer, row in enumerate(ticket.heads)]
    return heads, [cell(layer, None) for layer in range(len(ticket.mlps))]


def _keeps(ticket: TicketRow, layer: int, head: int | None) -> bool:
    return ticket.mlps[layer] if head is None else ticket.heads[layer][head]


def _survival(tickets: Sequence[TicketRow], layer: int, head: int | None) -> float:
    return fmean(_per_seed(tickets, lambda ticket: float(_keeps(ticket, layer, head))).values())


def _importances(case: Case, layer: int, head: int | None) -> dict[int, float]:
    """Seed → raw importance of one component, where one is stored."""
    found = {}
    for ticket in case.of("good"):
        if head is not None and ticket.head_importance is not None:
            found[ticket.seed] = ticket.head_importance[layer][head]
        elif head is None and ticket.mlp_importance is not None:
            found[ticket.seed] = ticket.mlp_importance[layer]
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def _shape(ticket: TicketRow) -> str:
    heads = [str(len(row)) for row in ticket.heads]
    each = heads[0] if len(set(heads)) == 1 else f"({', '.join(heads)})"
    return f"{_count(len(heads), 'layer')} × {each} heads, {_count(len(ticket.mlps), 'MLP')}"


def _sample(rows: Rows) -> str:
    """The sample behind a number, as in "3 seeds × 4 draws"."""
    seeds = _count(len({row.seed for row in rows}), "seed")
    draws = _draws(rows)
    return seeds if draws == "1" else f"{seeds} × {draws}{GLUE}draws"


def _draws(rows: Rows) -> str:
    return _span(Counter(row.seed for row in rows).values())


def _in_order(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(sorted(rows, key=lambda row: (row.seed, row.draw)))


def _rank(stage_and_kind: tuple[str, str]) -> tuple[int, int]:
    return _position(stage_and_kind[0], STAGES), _position(stage_and_kind[1], KINDS)


def _position(name: str, order: Collection[str]) -> int:
    return list(order).index(name) if name in order else len(order)


def _kind(kind: str) -> str:
    return "full (dense)" if kind == "full" else kind


def _css(kind: str) -> str:
    return kind if kind in KINDS else "other"


def _component(layer: int, head: int | None) -> str:
    return f"layer {layer} · MLP" if head is None else f"layer {layer} · head {head}"


def _ticket(ticket: TicketRow) -> str:
    return f"{ticket.kind} of seed {ticket.seed}" + ("" if ticket.kind == "good" else f", draw {ticket.draw}")


def _number(value: float | None, decimals: int = 3, *, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return NONE
    text = f"{value:{'+' if sign else ''}.{decimals}f}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")  # no minus zero
    return text.replace("-", "−")


def _significant(value: float) -> str:
    return f"{value:.3g}".replace("-", "−")


def _spread(estimate: Estimate, decimals: int = 3, *, sign: bool = False) -> str:
    text = _number(estimate.value, decimals, sign=sign)
    return text if estimate.std is None else f"{text}{GLUE}±{GLUE}{_number(estimate.std, decimals)}"


def _interval(estimate: Estimate) -> str:
    if estimate.low is None:
        return NONE
    return "seeds equal" if estimate.std == 0 else f"{_number(estimate.low)} to {_number(estimate.high)}"


def _some(seeds: Sequence[int], n: int) -> str:
    """Which of n seeds."""
    if n > 1 and len(seeds) == n:
        return "both seeds" if n == 2 else f"all {_count(n, 'seed')}"
    return f"seed{'s' if len(seeds) > 1 else ''} {_listed([str(seed) for seed in seeds])}"


def _count(n: int, noun: str) -> str:
    return f"{n}{GLUE}{noun}" if n == 1 else f"{n}{GLUE}{noun}s"


def _span(values: Iterable[int]) -> str:
    """One number, or the two ends where they differ."""
    found = sorted(set(values))
    return "–".join(str(value) for value in _unique((found[0], found[-1]))) if found else NONE


def _listed(parts: Sequence[str]) -> str:
    return ", ".join(parts[:-1]) + f" and {parts[-1]}" if len(parts) > 1 else "".join(parts)


def _unique(values: Iterable[Key]) -> tuple[Key, ...]:
    return tuple(dict.fromkeys(values))


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_\[\]<>|~&])", r"\\\1", " ".join(text.split()))


def _latex(text: str) -> str:
    return "".join(LATEX.get(character, character) for character in " ".join(text.split()))


LATEX = {
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "±": r"$\pm$",
    "−": "$-$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "–": "--",
    "—": "---",
}
