"""Whether a ticket matches: four rules on the same scores, side by side, and what the sample could have shown.

Chen et al. 2020: a subnetwork is *matching* when, trained by the same procedure, it scores what the full model does; a *winning*
ticket is a matching one trained from the pre-trained weights; a *universal* mask matches on every task of a set. What "scores
what the full model does" means is a rule, and rules differ in their answers: print all of them. `against` says what a ticket is
held to, the dense model or the ticket of the same task, since "universal" in the paper is the second and reads like the first.
Scores are higher = better, in any unit; one a seed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

import numpy as np

from tombola.errors import DataError
from tombola.stats.estimate import ALPHA, Estimate, over_seeds
from tombola.stats.power import smallest_difference_over_seeds, smallest_two_sided_p

SURE = 0.999  # of the interval by which a chain is given up
MARGIN = 0.01  # of non-inferiority: what a ticket may lose and still be called as good, in the unit of the scores


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one rule says. `matches` is None where it says nothing, and `why` gives the reason."""

    rule: str
    matches: bool | None
    why: str  # the comparison in numbers


@dataclass(frozen=True, slots=True)
class Match:
    """A ticket held against something, by every rule."""

    against: str  # "dense" | "same-task ticket"
    ticket: Estimate
    reference: Estimate
    difference: float | None  # ticket − reference, of the means
    verdicts: Mapping[str, Verdict]
    detectable: float | None  # smallest difference that so many seeds show four times out of five, at their spread; None: none
    note: str = ""

    @property
    def agreed(self) -> bool | None:
        """What all rules say that say anything; None where they differ or none does."""
        said = {one.matches for one in self.verdicts.values() if one.matches is not None}
        return said.pop() if len(said) == 1 else None

    @property
    def text(self) -> str:
        """As in "−0.012 against dense: literal_std no, max_std yes, strict no, non_inferiority undecided; …"."""
        if self.difference is None:
            return f"undefined against {self.against}: {self.note}"
        words = {True: "yes", False: "no", None: "undecided"}
        said = ", ".join(f"{name} {words[one.matches]}" for name, one in self.verdicts.items())
        shown = "" if self.detectable is None else f"; differences below {self.detectable:.3f} could not be shown"
        return f"{self.difference:+.3f} against {self.against}: {said}{shown}".replace("-", "−", 1 if self.difference < 0 else 0)


Rule = Callable[[Sequence[float], Sequence[float], float], Verdict]


def literal_std(ticket: Sequence[float], reference: Sequence[float], margin: float) -> Verdict:
    """The printed rule: the ticket's mean is within one standard deviation of the reference, over its seeds (n − 1)."""
    return _within("literal_std", ticket, reference, [over_seeds(reference).std])


def max_std(ticket: Sequence[float], reference: Sequence[float], margin: float) -> Verdict:
    """Within the larger of both standard deviations: the reading under which all of the paper's Table 2 passes."""
    return _within("max_std", ticket, reference, [over_seeds(reference).std, over_seeds(ticket).std])


def _within(rule: str, ticket: Sequence[float], reference: Sequence[float], stds: Sequence[float | None]) -> Verdict:
    known = [std for std in stds if std is not None]
    if len(known) < len(stds):
        return Verdict(rule, None, "one seed has no standard deviation")
    difference, std = fmean(ticket) - fmean(reference), max(known)
    return Verdict(rule, difference >= -std - 1e-12, f"{difference:+.4f} beside a standard deviation of {std:.4f}")


def strict(ticket: Sequence[float], reference: Sequence[float], margin: float) -> Verdict:
    """The ticket's mean is at least the reference's (appendix A of the paper). Of equals half the time no, by luck alone."""
    difference = fmean(ticket) - fmean(reference)
    return Verdict("strict", difference >= -1e-12, f"{difference:+.4f}")


def non_inferiority(ticket: Sequence[float], reference: Sequence[float], margin: float) -> Verdict:
    """Whether the ticket is worse by less than `margin`, and whether that is shown: yes where the lower end of the one-sided 95 %
    interval of the difference is above −margin, no where the upper end is below it, else undecided.

    The interval is Welch's t. A bootstrap over seeds, which the paper's followers use, covers 83 % of five seeds and not 95.
    """
    if min(len(ticket), len(reference)) < 3:
        return Verdict("non_inferiority", None, f"{min(len(ticket), len(reference))} seeds: an interval takes three")
    low, high = _one_sided(np.asarray(ticket, dtype=np.float64), np.asarray(reference, dtype=np.float64))
    why = f"{fmean(ticket) - fmean(reference):+.4f} ({low:+.4f} to {high:+.4f}) beside a margin of {margin:g}"
    return Verdict("non_inferiority", True if low > -margin else False if high < -margin else None, why)


def _one_sided(a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """The ends of mean(a) − mean(b), each of 95 % to one side; both the difference itself where neither side varies."""
    from scipy.stats import t

    difference = float(a.mean() - b.mean())
    va, vb = a.var(ddof=1) / len(a), b.var(ddof=1) / len(b)
    if va + vb < 1e-24:
        return difference, difference
    df = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    half = float(t.ppf(1 - ALPHA, df)) * math.sqrt(va + vb)
    return difference - half, difference + half


RULES: Mapping[str, Rule] = {
    "literal_std": literal_std,
    "max_std": max_std,
    "strict": strict,
    "non_inferiority": non_inferiority,
}


def matching(
    ticket: Sequence[float],
    reference: Sequence[float],
    *,
    against: str = "dense",
    margin: float = MARGIN,
    majority: float | None = None,
    std_kind: Literal["sample", "none"] = "sample",
) -> Match:
    """A ticket's scores held against a reference's, by every rule of `RULES`. One score a seed; the two need not be of the same
    seeds.

    margin: of non-inferiority. majority: what an answer that looks at no row scores; where neither does better, matching means
    nothing, and the note says so. std_kind: sample, over n − 1; none, as where no code for one was released: the rules that need
    one then say nothing. Raises: DataError for a margin that is negative.
    """
    if not margin >= 0:
        raise DataError("a margin is what may be lost", got=margin, expected="0 or more")
    mine, theirs = over_seeds(ticket), over_seeds(reference)
    if mine.value is None or theirs.value is None:
        note = "; ".join(one.note for one in (mine, theirs) if one.value is None)
        return Match(against, mine, theirs, None, {name: Verdict(name, None, note) for name in RULES}, None, note)
    notes = []
    if majority is not None and max(mine.value, theirs.value) <= majority + 1e-12:
        notes.append(f"both are at or below the majority line ({majority:.3f}): this says nothing")
    elif majority is not None and theirs.value <= majority + 1e-12:
        notes.append(f"what it is held against is at or below the majority line ({majority:.3f})")
    n = min(len(ticket), len(reference))
    if n >= 2 and smallest_two_sided_p(n) >= ALPHA:
        notes.append(f"{n} seeds cannot give p < {ALPHA} in a paired test")
    verdicts = {name: rule(ticket, reference, margin) for name, rule in RULES.items()}
    if std_kind == "none":
        verdicts |= {name: Verdict(name, None, "no standard deviation is computed") for name in ("literal_std", "max_std")}
    return Match(against, mine, theirs, mine.value - theirs.value, verdicts, _detectable(ticket, reference), "; ".join(notes))


def _detectable(ticket: Sequence[float], reference: Sequence[float]) -> float | None:
    """What seeds as many as the fewer side has can show, of differences of which each side's spread has its part."""
    if min(len(ticket), len(reference)) < 2:
        return None
    std = float(np.sqrt(np.var(ticket, ddof=1) + np.var(reference, ddof=1)))
    return smallest_difference_over_seeds(min(len(ticket), len(reference)), std)


def highest_matching(
    levels: Mapping[float, Sequence[float]],
    dense: Sequence[float],
    *,
    margin: float = MARGIN,
    std_kind: Literal["sample", "none"] = "sample",
) -> dict[str, float | None]:
    """Rule → the highest sparsity of `levels` that matches the dense model by it; None where none does.

    levels: sparsity → scores. A level that matches above one that does not counts, as it does in the paper's Table 2.
    """
    found = {at: matching(scores, dense, margin=margin, std_kind=std_kind) for at, scores in levels.items()}
    return {rule: max((at for at, one in found.items() if one.verdicts[rule].matches), default=None) for rule in RULES}


@dataclass(frozen=True, slots=True)
class Universal:
    """On how many tasks one mask matches, by rule and against what."""

    tasks: int
    matching: Mapping[str, int]  # rule → tasks
    against: str
    failing: Mapping[str, tuple[str, ...]]  # rule → tasks where it does not, or where the rule says nothing

    def holds(self, rule: str) -> bool:
        """Whether the mask is universal on this set by this rule."""
        return self.matching[rule] == self.tasks > 0


def universal(by_task: Mapping[str, Match]) -> Universal:
    """One mask over a set of tasks. Raises: DataError when the tasks are held against different things."""
    against = {one.against for one in by_task.values()}
    if len(against) > 1:
        raise DataError(
            "one mask is held against one thing", got=", ".join(sorted(against)), expected="dense, or same-task ticket"
        )
    failing = {rule: tuple(task for task, one in by_task.items() if not one.verdicts[rule].matches) for rule in RULES}
    counts = {rule: len(by_task) - len(tasks) for rule, tasks in failing.items()}
    return Universal(len(by_task), counts, against.pop() if against else "", failing)


# -------------------------------------------------------------------------------------------------------- transfer matrices


@dataclass(frozen=True, slots=True)
class Transfer:
    """One cell of a transfer matrix: a source's mask trained on a target."""

    source: str
    target: str
    vs_dense: Match
    vs_same_task: Match | None  # None where the target has no ticket of its own


def transfers(
    scores: Mapping[tuple[str, str], Sequence[float]],
    dense: Mapping[str, Sequence[float]],
    *,
    margin: float = MARGIN,
    majority: Mapping[str, float] | None = None,
) -> list[Transfer]:
    """Every (source, target) → scores over seeds, with both verdicts: against the dense model and against the target's own
    ticket.

    The target's own ticket is the cell (target, target). Raises: DataError for a target without a dense model.
    """
    found = []
    for (source, target), mine in scores.items():
        if target not in dense:
            raise DataError("a target has no dense model to be held against", got=target, expected=", ".join(dense))
        line = (majority or {}).get(target)
        own = scores.get((target, target))
        same = None if own is None else matching(mine, own, against="same-task ticket", margin=margin, majority=line)
        found.append(Transfer(source, target, matching(mine, dense[target], margin=margin, majority=line), same))
    return found


def dark_counts(found: Sequence[Transfer]) -> dict[str, int]:
    """Source → targets other than itself where it scores at least what their own ticket does, as Figure 2 of the paper counts."""
    counts = dict.fromkeys((one.source for one in found), 0)
    for one in found:
        same = one.vs_same_task
        counts[one.source] += one.source != one.target and same is not None and bool(same.verdicts["strict"].matches)
    return counts


# ------------------------------------------------------------------------------------------------------------- early stop


def certainly_lost(
    level: Sequence[float], dense: Sequence[float], rows: int, *, margin: float = MARGIN, level_of: float = 0.999
) -> bool:
    """Whether a level of a chain is so far below the dense model that no rule will call it matching any more, nor the next
    levels.

    True when the upper end of a 99.9 % interval of the difference is below −max(margin, both stds). The spread of a difference
    is that over seeds, and never less than what `rows` rows give shares of right answers: 1 / sqrt(2 · rows). For scores in [0,
    1].
    """
    mine, theirs = over_seeds(level), over_seeds(dense)
    if mine.value is None or theirs.value is None:
        return False
    spread = [one.std for one in (mine, theirs) if one.std is not None]
    from scipy.stats import norm

    error = max([*(std / np.sqrt(min(len(level), len(dense))) for std in spread), 1 / np.sqrt(2 * max(rows, 1))])
    upper = mine.value - theirs.value + float(norm.ppf(1 - (1 - SURE) / 2)) * float(error)
    return upper < -max([margin, *spread])
