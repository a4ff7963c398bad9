"""What the page shows of tickets: which parts survive, how the good one was found, how large they are, what they share.

All of it takes a case whose tickets have one shape (see `Case.shapes`). Of this room it imports `words`, `cases`, `figures`
and `layout`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import TypeVar

from tombola.report import figures
from tombola.report.cases import COLUMNS, UNITS, Case, estimate, size, survival
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import (
    NONE,
    count,
    draws,
    interval,
    kind_name,
    listed,
    number,
    sample,
    shape_name,
    significant,
    span,
    spread,
)
from tombola.stats import ALPHA, Overlap, Stability, overlap, overlap_of_counts
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.results import TicketRow
from tombola.study.survival import StabilityRow

LARGE, SMALL = 348, 216  # width of a heat map, in pixels
BY_CHANCE: Mapping[str, tuple[Callable[[Overlap], float | None], int]] = {  # column → value, decimals
    "Shared by chance": (lambda it: it.expected_shared, 1),
    "Ratio": (lambda it: it.ratio, 3),
    "Jaccard": (lambda it: it.jaccard, 3),
    "Jaccard by chance": (lambda it: it.expected_jaccard, 3),
}

PART_NAMES: Mapping[str, str] = {"heads": "heads", "mlps": "MLPs", "neurons": "neurons", "layers": "layers"} | {
    "values": "values"
}

Item = TypeVar("Item")


# Survival and importance


def survival_part(anchor: str, case: Case, *, lean: bool = False) -> Part:
    """A map and a table of survival for each kind, and beside good the importance that chose it; `lean`: of good alone."""
    # A control of weights has the good ticket's mask: nothing to see that is not seen there.
    drawn = [kind for kind in case.by_kind if kind not in CONTROL_KINDS or CONTROL_KINDS[kind].has_own_mask]
    drawn = [kind for kind in drawn if not lean or kind == "good"]
    maps = {kind: _survival_map(case, kind) for kind in drawn}
    large = tuple(figure for figure in (maps.pop("good", None), _importance_map(case)) if figure)
    return Part(
        anchor,
        "Survival",
        f"Which {listed(list(case.units)) or 'heads and MLPs'} survive",
        f"{shape_name(case.shapes[0])}; "
        + ("layers down, counted from 0. " if case.column in COLUMNS.values() else _ACROSS)
        + f"Shade is the share of {_SHADES.get(case.column, _KEPT if case.units else _SHADES['values'])}; "
        + "point at one for its numbers.",
        figures=tuple(row for row in (large, tuple(maps.values())) if row),
        fold="Survival in numbers",
        folded=tuple(_survival_table(kind, case.by_kind[kind]) for kind in drawn),
    )


_ACROSS = "layers down and heads across, both counted from 0. "
_KEPT = "seeds, and of draws within a seed, that keep a component"
_SHADES: Mapping[str, str] = {  # by what is not kept or removed whole
    "neurons": "a layer's neurons that is kept, mean over seeds",
    "values": "a component's values that is kept, mean over seeds",
}


def _survival_map(case: Case, kind: str) -> Figure:
    tickets = case.by_kind[kind]
    whole = bool(case.units) and case.column != "neurons"
    seeds = dict.fromkeys(ticket.seed for ticket in tickets)
    by_seed = {
        seed: [fmean(votes) for votes in zip(*(_flat(ticket) for ticket in tickets if ticket.seed == seed), strict=True)]
        for seed in seeds
    }
    heat = figures.Heat(len(tickets[0].mlps), _columns(tickets[0]), by_seed, "kept" if whole else "share", case.column)
    return Figure(
        f"Survival: {kind_name(kind)}",
        figures.heat_map(
            heat,
            css="survival",
            width=LARGE if kind == "good" else SMALL,
            label=f"Heat map of survival, {kind} tickets, {sample(tickets)}; the tables below have its numbers",
            name=kind_name(kind),
        ),
        sample(tickets),
        ("survival", *(("kept in no seed", "in all") if whole else ("none kept", "all")))
        if kind == next(iter(case.by_kind))
        else None,
        natural=True,
    )


def _importance_map(case: Case) -> Figure | None:
    stored, column = [ticket for ticket in case.good if ticket.mlp_importance is not None], case.column
    if not stored:
        return None
    columns = _columns(stored[0])
    raw = {
        ticket.seed: [*(v for row in ticket.head_importance or () if columns for v in row), *(ticket.mlp_importance or ())]
        for ticket in stored
    }
    split = len(stored[0].mlps) * columns
    means = [[value for value in values if math.isfinite(value)] for values in zip(*raw.values(), strict=True)]
    top_head, top_mlp = (max([0.0, *(fmean(found) for found in part if found)]) for part in (means[:split], means[split:]))
    tops = [top_head] * split + [top_mlp] * (len(means) - split)  # each has a scale of its own
    shades = {
        seed: [value / top if top > 0 else 0.0 for value, top in zip(values, tops, strict=True)] for seed, values in raw.items()
    }
    seeds = count(len(stored), "seed")
    return Figure(
        "Importance in the dense model",
        figures.heat_map(
            figures.Heat(len(stored[0].mlps), columns, shades, "importance", column, raw),
            css="importance",
            width=LARGE,
            label=f"Heat map of importance, mean of {seeds}; point at a cell",
        ),
        f"mean of {seeds}; heads to {significant(top_head)}, MLPs (own scale) to {significant(top_mlp)}"
        if column == "MLP"
        else f"mean of {seeds}{' and over the neurons of a layer' * (column == 'neurons')}; to {significant(top_mlp)}",
        ("importance", "0", "largest"),
        natural=True,
    )


def _columns(ticket: TicketRow) -> int:
    """Heads of a layer in maps; 0 where there are none to see."""
    return 0 if ticket.scope in COLUMNS else len(ticket.heads[0])


def _flat(ticket: TicketRow) -> list[float]:
    """What it keeps of every head, layer by layer, and then of every MLP."""
    return [*(share for row in ticket.heads if _columns(ticket) for share in row), *ticket.mlps]


def _survival_table(kind: str, tickets: Sequence[TicketRow]) -> Table:
    heads, mlps = _grid(tickets[0], lambda layer, head: number(survival(tickets, layer, head)))
    share = "share of a layer's neurons" if tickets[0].scope == "neurons" else "share of seeds"
    return Table(
        f"Survival of {kind_name(kind)}, {share} ({sample(tickets)})",
        ("Layer", *(f"H{head}" for head in range(len(heads[0]))), COLUMNS.get(tickets[0].scope, "MLP").replace("layer", "Whole")),
        tuple((str(layer), *row, mlp) for layer, (row, mlp) in enumerate(zip(heads, mlps, strict=True))),
    )


def _grid(ticket: TicketRow, cell: Callable[[int, int | None], Item]) -> tuple[list[list[Item]], list[Item]]:
    """`cell(layer, head)` for every head, where there are heads to see, and `cell(layer, None)` for every MLP."""
    if ticket.scope in COLUMNS:
        heads: list[list[Item]] = [[] for _ in ticket.mlps]
    else:
        heads = [[cell(layer, head) for head in range(len(row))] for layer, row in enumerate(ticket.heads)]
    return heads, [cell(layer, None) for layer in range(len(ticket.mlps))]


# Search


def search_part(anchor: str, case: Case) -> Part | None:
    """The path of each search; None if no path was stored."""
    charts = []
    for ticket in case.good:
        if ticket.path:
            label = f"Search path of seed {ticket.seed}, {len(ticket.path)} trials"
            rows = {row.n for row in case.scores if row.role == "selection" and row.seed == ticket.seed}
            caption = f"{count(len(ticket.path), 'trial')} on {f'{span(rows)} ' if rows else ''}selection rows"
            chart = figures.path_chart(_path_dots(ticket), ticket.floor_score, label=label)
            charts.append(Figure(f"Seed {ticket.seed}", chart, caption, natural=True))
    if not charts:
        return None
    return Part(
        anchor,
        "Search",
        "How the good ticket was found",
        "The score after each trial; below it, what is left. Hollow trials fell under the floor and were rolled back.",
        figures=(tuple(charts),),
    )


def _path_dots(ticket: TicketRow) -> list[figures.PathDot]:
    dots = []
    for step in ticket.path:
        left = {PART_NAMES[part]: kept for part, kept in step.kept.items()}
        outcome = "kept" if step.passed else "below the floor, rolled back"
        at = f"trial {step.step}, {step.phase}" if step.step else "dense model"
        title = f"{at}: {number(step.score)}\n" + ", ".join(f"{kept:,} {name}" for name, kept in left.items()) + f"\n{outcome}"
        counts = {name: _short(kept, ticket.values) for name, kept in left.items()}
        phase = step.phase if step.step or len(ticket.path) < 2 else ticket.path[1].phase  # the dense model starts the first
        dots.append(figures.PathDot(step.score, step.passed, phase, counts, title))
    return dots


def _short(kept: int, values: tuple[int, int] | None) -> str:
    """A count of heads as it is, of values as a share of all."""
    return str(kept) if values is None else f"{100 * kept / values[1]:.0f} %"


# Sizes


def size_part(anchor: str, case: Case) -> Part:
    """How much each kind of ticket keeps."""
    of_all = (f"{unit[0].upper()}{unit[1:]} of {len(of(case.tickets[0]))}" for unit, of in case.units.items())
    of_body = bool(case.units) and "neurons" not in case.units
    share = f"Share of {'body' if of_body else listed(sorted({ticket.scope for ticket in case.tickets}))}"
    table = Table(
        "What the tickets keep, mean ± std over seeds",
        ("Ticket", *of_all, share, "Share of all parameters", "Seeds", "Draws per seed"),
        tuple(
            (
                kind_name(kind),
                *(spread(size(tickets, unit), 1) for unit in case.units),
                spread(estimate((ticket.seed, ticket.body_share) for ticket in tickets)),
                spread(estimate((ticket.seed, ticket.total_share) for ticket in tickets)),
                str(len({ticket.seed for ticket in tickets})),
                draws(tickets),
            )
            for kind, tickets in case.by_kind.items()
        ),
        ("Body: the values of all heads and MLPs. " if of_body else "") + "Shares are of parameters that survive, in [0, 1].",
    )
    return Part(anchor, "Sizes", "How large the tickets are", tables=(table,))


# Overlap


def overlap_part(anchor: str, case: Case, stable: Mapping[str, StabilityRow]) -> Part | None:
    """What controls share with good, and good with itself over seeds; None where there is nothing to compare.

    stable: unit → how far the seeds agree on it, see `Study.stability_of`.
    """
    good = {ticket.seed: ticket for ticket in case.good}
    pairs = {
        unit: {f"{a} and {b}": overlap(of(good[a]), of(good[b])) for a, b in combinations(good, 2)}
        for unit, of in case.units.items()
    }
    several = len(good) > 1 and bool(pairs)
    tables = [_control_table(case, good), _stability_table(stable, pairs) if several and stable else None]
    if not any(tables):
        return None
    return Part(
        anchor,
        "Overlap",
        "How much the tickets overlap",
        "Controls against good, and good against itself over seeds, beside what random masks of these sizes would share.",
        tables=tuple(table for table in tables if table),
        fold="All pairs of seeds",
        folded=(_pairs_table(pairs),) if several else (),
    )


def _control_table(case: Case, good: Mapping[int, TicketRow]) -> Table | None:
    """What each kind of control shares with good; None where no control has a good ticket of its seed."""
    rows = []
    for kind, every in case.controls.items():
        tickets = [ticket for ticket in every if ticket.seed in good]
        if kind in CONTROL_KINDS and not CONTROL_KINDS[kind].has_own_mask:
            continue
        if not tickets:
            continue
        for unit in case.units or ("values",):
            found = [(ticket.seed, shared_settings(ticket, good[ticket.seed], unit)) for ticket in tickets]
            shared = _mean(found, lambda it: float(it.shared), 1)
            by_chance = (_mean(found, value, decimals) for value, decimals in BY_CHANCE.values())
            seeds = str(len({seed for seed, _ in found}))
            rows.append((kind_name(kind), unit, shared, *by_chance, seeds, draws(tickets)))
    if not rows:
        return None
    return Table(
        "What controls share with the good ticket of their seed, mean ± std over seeds",
        ("Ticket", "Unit", "Shared", *BY_CHANCE, "Seeds", "Draws per seed"),
        tuple(rows),
        "By chance: the mean for random masks of the same two sizes. One that shares most of good is hardly a control.",
        stubs=2,
    )


def shared_settings(ticket: TicketRow, good: TicketRow, unit: str) -> Overlap:
    """What a ticket shares with good: of whole parts by their masks, of single values by the counts that were stored."""
    if unit in UNITS:
        return overlap(UNITS[unit](ticket), UNITS[unit](good))
    assert ticket.values is not None and good.values is not None
    return overlap_of_counts(good.values[1], ticket.values[0], good.values[0], ticket.shared_with_good["values"])


def _stability_table(stable: Mapping[str, StabilityRow], pairs: Mapping[str, Mapping[str, Overlap]]) -> Table:
    rows = []
    for unit in (one for one in pairs if one in stable):
        found = list(enumerate(pairs[unit].values()))  # each pair by itself; they share seeds: a std would pretend more
        shared = _mean(found, lambda it: float(it.shared), 1, std=False)
        by_chance = (_mean(found, value, decimals, std=False) for value, decimals in BY_CHANCE.values())
        known = [it.p_at_least for it in pairs[unit].values() if it.p_at_least is not None]
        unlikely = f"{sum(p < ALPHA for p in known)} of {len(known)}"
        found_of = stable[unit].found
        seeds = str(len(found_of.sizes))
        rows.append(
            (unit, shared, *by_chance, unlikely, kappa_text(found_of), number(found_of.p_at_least), rates_text(found_of), seeds)
        )
    return Table(
        f"Good tickets of different seeds: mean over {count(len(next(iter(pairs.values()))), 'pair')} of seeds",
        ("Unit", "Shared", *BY_CHANCE, f"Pairs with p < {ALPHA}", "Fleiss kappa", "p, given sizes", "Sizes", "Seeds"),
        tuple(rows),
        "p: chance of sharing this much or more (hypergeometric). Kappa: 1 = one mask in all seeds, 0 = chance, below 0 = less; "
        "in brackets its 95 % interval over seeds (jackknife). p, given sizes: chance that masks of these sizes agree as "
        "much over all seeds. Sizes: whether the shares that seeds keep differ (Cochran's Q); it says nothing of which parts "
        "they keep.",
    )


def kappa_text(found: Stability) -> str:
    """Kappa with its interval."""
    ends = interval(found.kappa)
    return "undefined" if found.kappa.value is None else number(found.kappa.value) + (f" ({ends})" if ends != NONE else "")


def rates_text(found: Stability) -> str:
    """What Cochran's Q says, in few words."""
    return found.cochran.text.removeprefix("survival rates ").removeprefix("are ").split(",")[0]


def _pairs_table(pairs: Mapping[str, Mapping[str, Overlap]]) -> Table:
    return Table(
        "Good tickets of two seeds",
        ("Seeds", "Unit", "Shared", *BY_CHANCE, "p, this much or more", "Note"),
        tuple(
            (
                seeds,
                unit,
                str(it.shared),
                *(number(value(it), decimals) for value, decimals in BY_CHANCE.values()),
                number(it.p_at_least),
                it.note,
            )
            for unit, found in pairs.items()
            for seeds, it in found.items()
        ),
        stubs=2,
    )


def _mean(found: Sequence[tuple[int, Overlap]], of: Callable[[Overlap], float | None], decimals: int, *, std: bool = True) -> str:
    """Mean over the seeds where it is defined; how many are undefined stands beside it."""
    values = [(seed, value) for seed, it in found if (value := of(it)) is not None]
    if not values:
        return "undefined"
    lost = f" ({len(found) - len(values)} of {len(found)} undefined)" if len(values) < len(found) else ""
    mean = estimate(values)
    return (spread(mean, decimals) if std else number(mean.value, decimals)) + lost
