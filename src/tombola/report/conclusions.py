"""What is concluded of each task and search, as a table of functions over its case, and how two studies differ in it.

A conclusion is a difference over seeds and a mark it has to pass: it holds where the whole 95 % interval lies above the mark,
fails where it lies below, and is undecided between; with one seed nothing is decided. Of shares of right answers the interval
over rows has to say the same. The page's "good or random?" is decided by the same rule.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from tombola.report.cases import PROPORTIONS, Case, Group, Outcome, Study, decide, difference_on, per_seed
from tombola.stats import ALPHA, Estimate, over_seeds, share_over_rows

MARGIN = 0.1  # of what the dense model scores above the majority line: what "matches" and "as good as" may lose


@dataclass(frozen=True, slots=True)
class Finding:
    """What one case says of one conclusion."""

    estimate: Estimate
    mark: float
    outcome: Outcome
    by_seed: Mapping[int, float] = field(default_factory=dict)  # behind the estimate, where it is a mean over seeds
    rows: Estimate | None = None  # the same with its interval over rows, where that is known


@dataclass(frozen=True, slots=True)
class Conclusion:
    """One row of `CONCLUSIONS`. `of(case, study)` is None where the case has no scores or tickets for it."""

    about: str
    of: Callable[[Case, Study], Finding | None]


def _over(by_seed: Mapping[int, float], mark: float = 0.0, rows: Estimate | None = None) -> Finding | None:
    if not by_seed:
        return None
    estimate = over_seeds(list(by_seed.values()))
    return Finding(estimate, mark, decide(estimate, mark, rows), by_seed, rows)


def _group(case: Case, kind: str, stage: str) -> Group | None:
    return case.report.group(kind, stage) if case.report else None


def _minus(a: str, b: str, stage: str) -> Callable[[Case, Study], Finding | None]:
    def of(case: Case, study: Study) -> Finding | None:
        one, other = _group(case, a, stage), _group(case, b, "full" if b == "full" else stage)
        return _over(one.less(other), 0.0, _rows(case, one, other)) if one and other else None

    return of


def _rows(case: Case, one: Group, other: Group) -> Estimate | None:
    """Over rows, of the seeds that both have."""
    seeds = one.by_seed.keys() & other.by_seed.keys()
    return difference_on(case.report, one.within(seeds), other.within(seeds)) if case.report and seeds else None


def _margin(case: Case) -> float | None:
    """What may be lost; None where the dense model is not above the majority line."""
    dense = case.report.dense if case.report else None
    if dense is None or case.report is None or (score := dense.score.value) is None or score <= case.report.majority:
        return None
    return MARGIN * (score - case.report.majority)


def _matches(kind: str, other: str) -> Callable[[Case, Study], Finding | None]:
    def of(case: Case, study: Study) -> Finding | None:
        one, against = _group(case, kind, "retrained"), _group(case, other, "full" if other == "full" else "retrained")
        margin = _margin(case)
        return _over(one.less(against), -margin, _rows(case, one, against)) if one and against and margin is not None else None

    return of


def _beats_majority(case: Case, study: Study) -> Finding | None:
    bad = _group(case, "bad", "retrained")
    if bad is None:
        return None
    majority = per_seed((row.seed, row.majority) for row in bad.rows)
    less, split = {seed: value - majority[seed] for seed, value in bad.by_seed.items()}, case.report
    share, line, rows = bad.score.value, sum(majority.values()) / len(majority), None
    if split and split.metric in PROPORTIONS and share is not None:  # the line is no model: it does not vary with rows
        rows = share_over_rows(share, min(row.n for row in bad.rows))
        rows = replace(rows, value=share - line, low=(rows.low or 0.0) - line, high=(rows.high or 0.0) - line)
    return _over(less, 0.0, rows)


def _seeds_agree(unit: str) -> Callable[[Case, Study], Finding | None]:
    def of(case: Case, study: Study) -> Finding | None:
        row = study.stability_of(case).get(unit)
        if row is None:
            return None
        found = row.found
        if found.kappa.value is None or found.p_at_least is None:
            return None
        beyond = found.p_at_least < ALPHA
        less = found.p_at_most is not None and found.p_at_most < ALPHA
        return Finding(found.kappa, found.expected_kappa or 0.0, "holds" if beyond else "fails" if less else "undecided")

    return of


def _smaller(case: Case, study: Study) -> Finding | None:
    """Share that s-pruning keeps minus share that m-pruning keeps, within seeds: of the case of s-prune."""
    if case.search != "s-prune" or case.family:
        return None
    other = next((c for c in study.cases if (c.task, c.search, c.family) == (case.task, "m-prune", "") and c.good), None)
    if other is None:
        return None
    kept = [{ticket.seed: ticket.body_share for ticket in one.good} for one in (case, other)]
    return _over({seed: kept[0][seed] - kept[1][seed] for seed in kept[0] if seed in kept[1]})


# The paper's claims (section 1 of its reproduction's list), each as a difference.
CONCLUSIONS: Mapping[str, Conclusion] = {
    "good > random, pruned": Conclusion("good beats random as pruned", _minus("good", "random", "pruned")),
    "good > random, retrained": Conclusion("good beats random when trained again", _minus("good", "random", "retrained")),
    "good > bad, retrained": Conclusion("good beats bad when trained again", _minus("good", "bad", "retrained")),
    "good matches full": Conclusion(
        "good, trained again, loses at most a tenth of what full has above majority", _matches("good", "full")
    ),
    "random as good as good": Conclusion("random, trained again, is at most as far behind good", _matches("random", "good")),
    "bad > majority": Conclusion("bad, trained again, beats the majority line", _beats_majority),
    "m smaller than s": Conclusion("m-pruning removes more than s-pruning", _smaller),
    "seeds agree on heads": Conclusion("seeds keep the same heads more than chance (kappa)", _seeds_agree("heads")),
    "seeds agree on MLPs": Conclusion("seeds keep the same MLPs more than chance (kappa)", _seeds_agree("MLPs")),
}


def findings(study: Study) -> dict[str, dict[tuple[str, str], Finding]]:
    """Conclusion → (task, search and whatever sets it apart) → what is found; those that no case can speak to are left out."""
    found: dict[str, dict[tuple[str, str], Finding]] = {}
    for name, one in CONCLUSIONS.items():
        for case in study.cases:
            if not case.family and case.good and (finding := one.of(case, study)) is not None:
                found.setdefault(name, {})[case.task, case.label or case.search] = finding
    return found


# ------------------------------------------------------------------------------------------------------------- two studies


@dataclass(frozen=True, slots=True)
class Change:
    """One conclusion on one task in two studies. `difference`: B − A of the estimate, within the seeds that both have."""

    conclusion: str
    task: str
    search: str
    a: Finding
    b: Finding
    difference: Estimate

    @property
    def changed(self) -> bool:
        return self.a.outcome != self.b.outcome

    @property
    def turned(self) -> bool:
        """Whether one holds what the other denies: more than a study of too few seeds."""
        return {self.a.outcome, self.b.outcome} == {"holds", "fails"}


def compare(a: Study, b: Study) -> tuple[Change, ...]:
    """Every conclusion that both studies speak to, on every task and search that both have, in the order of CONCLUSIONS."""
    named = [_aligned(study) for study in (a, b)]
    changes = []
    for name, one in CONCLUSIONS.items():
        for key, case in named[0].items():
            other = named[1].get(key)
            if other is None or (first := one.of(case, a)) is None or (second := one.of(other, b)) is None:
                continue
            changes.append(Change(name, key[0], key[1], first, second, _difference(first, second)))
    return tuple(changes)


def _aligned(study: Study) -> dict[tuple[str, str], Case]:
    """(task, search) → case; other settings are named only where one search was run under several."""
    cases = [case for case in study.cases if not case.family and (case.good or case.report)]
    found: dict[tuple[str, str], Case] = {}
    for case in cases:
        alone = [one for one in cases if (one.task, one.search) == (case.task, case.search) and one.good]
        found.setdefault((case.task, case.search if len(alone) < 2 else case.label), case)
        if len(alone) < 2 and case.good:
            found[case.task, case.search] = case
    return found


def _difference(a: Finding, b: Finding) -> Estimate:
    common = a.by_seed.keys() & b.by_seed.keys()
    if common:
        return over_seeds([b.by_seed[seed] - a.by_seed[seed] for seed in sorted(common)])
    if a.estimate.value is None or b.estimate.value is None:
        return Estimate(None, None, None, None, 0, "one of the two is undefined")
    return Estimate(b.estimate.value - a.estimate.value, None, None, None, 0, "no seeds in common: no interval")


def tally(found: Sequence[Finding]) -> dict[Outcome, int]:
    """How many hold, fail, and are undecided."""
    return {outcome: sum(one.outcome == outcome for one in found) for outcome in ("holds", "fails", "undecided")}
