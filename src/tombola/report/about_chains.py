"""What the page shows of chains of rounds: scores over sparsity, which levels match by which rule, rewinding, lines between
levels, and what all of it took.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
Judged by `tombola.study.verdicts`; the paper's numbers stand beside, in other columns, since models and rows are others.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.cases import Study
from tombola.report.charts import Curve, Point
from tombola.report.figures import Line
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, number, of_seeds, significant
from tombola.stats import over_seeds
from tombola.stats.matching import MARGIN, RULES, Match
from tombola.study.chain_rows import BarrierRow, LevelRow, TrainedRow
from tombola.study.reference.chen2020 import TABLE_2, TABLE_3_RECALLED, TARGETS, published_name
from tombola.study.verdicts import Existence, existence_of

Key = tuple[str, str, str]  # model, task, what sets a chain apart
SAID = {True: "yes", False: "no", None: "?"}
RULES_SAID = (
    "literal-std: within one std of the dense model (as printed with the paper’s Table 2); max-std: within the larger of both; "
    "strict: at least the dense mean (its appendix A); non-inferiority: worse by less than "
    f"{MARGIN:g} by a one-sided 95 % interval over seeds, ? where that is undecided."
)
NO_SPEED = "Zeros among single values make nothing faster by themselves."


def chains_of(rows: Sequence[LevelRow]) -> dict[Key, list[LevelRow]]:
    """The rows of each chain over its seeds; those without a dense model and a level are left out."""
    found: dict[Key, list[LevelRow]] = {}
    for row in rows:
        found.setdefault((row.model, row.task, row.chain), []).append(row)
    return {key: of for key, of in found.items() if len({row.level for row in of}) > 1 and any(row.level == 0 for row in of)}


def filter_task(task: str) -> str:
    """The name by which a reader's filter knows a task of rows."""
    return task.partition(":")[0]


def percent(share: float) -> str:
    return f"{100 * share:.3g} %"


def chain_name(key: Key) -> str:
    return f"{filter_task(key[1])}, {key[2]}" if key[2] else filter_task(key[1])


def chain_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Rows 1, 2 and 12 of the paper's list: scores of every level, marked where they match, and Table 2 beside."""
    chains = chains_of(study.results.chains.levels)
    if not chains:
        return ()
    total = {ticket.cell: 1 - ticket.total_share for ticket in study.results.tickets}
    judged = {key: existence_of(rows, total) for key, rows in chains.items()}
    judged = {key: found for key, found in judged.items() if found.levels}
    cells = tuple(sorted({row.cell for rows in chains.values() for row in rows}))
    figures = tuple(figure for key, found in judged.items() if (figure := _curve(key, chains[key], found)))
    return (
        Part(
            f"{anchor}-levels",
            "Chains",
            "How far can a chain prune?",
            "Each level was trained from the weights of the rewind step under its mask. Line: mean over seeds; band: one std to "
            f"each side; solid grey: the dense model; dashed: majority. {NO_SPEED}",
            legend=(("good", "level of the chain"),),
            figures=(figures,),
            tables=(_highest_table(judged),),
            fold="Every level, by every rule",
            folded=tuple(_level_table(key, found) for key, found in judged.items()),
            experiment="imp",
            cells=cells,
            all_seeds=True,
        ),
        *_cost_parts(f"{anchor}-cost", judged, cells),
    )


def _curve(key: Key, rows: Sequence[LevelRow], found: Existence) -> Figure | None:
    by_level = {level.sparsity: level for level in found.levels}
    points = []
    for sparsity in sorted(by_level):
        by_seed = {row.seed: row.value for row in rows if row.level and row.sparsity == sparsity}
        points.append(Point(sparsity, by_seed, f"{percent(sparsity)}: {by_level[sparsity].match.text}"))
    dense = over_seeds(found.dense).value
    lines = [Line("majority", f"majority line {number(found.majority)}", found.majority)]
    lines += [] if dense is None else [Line("line-full", f"dense {number(dense)}", dense)]
    name = chain_name(key)
    svg = charts.curve_chart(
        [Curve("good", points)], lines, label=f"Scores over sparsity, {name}; the table has the numbers",
        x_label="sparsity of the scope, %", percent=True,
    )  # fmt: skip
    said = f"{found.metric.replace('_', '-')}, n = {found.rows}, {count(len(found.seeds), 'seed')}"
    return Figure(name, svg, said, natural=True, task=filter_task(key[1])) if svg else None


def _highest_table(judged: Mapping[Key, Existence]) -> Table:
    rows, notes = [], dict[str, None]()
    for key, found in judged.items():
        paper = TABLE_2.get(published_name(key[1]) or "")
        dense = over_seeds(found.dense)
        flagged = dense.value is not None and dense.value <= found.majority + 1e-12
        rows.append(
            (
                chain_name(key),
                of_seeds(dict(zip(found.seeds, found.dense, strict=True))) + ("*" if flagged else ""),
                number(found.majority),
                *(_at(found.highest[rule]) for rule in RULES),
                *(_at(found.chosen[rule]) for rule in RULES),
                percent(paper.sparsity) if paper else NONE,
                percent(paper.strict) if paper else NONE,
            )
        )
        if flagged:
            notes["* the dense model is at or below the majority line: matching it means nothing."] = None
    return Table(
        "The highest level that matches the dense model, by each rule",
        (
            *("Chain", "Dense", "Majority"),
            *(f"{_rule(rule)}, report rows" for rule in RULES),
            *(f"{_rule(rule)}, selection rows" for rule in RULES),
            *("Paper, Table 2", "Paper, strict (second-hand)"),
        ),
        tuple(rows),
        " ".join(
            [
                RULES_SAID,
                "Report rows: chosen on the rows that are reported, as the paper does; selection rows: chosen on others, so "
                "that the "
                "score of that level on the report rows is honest. The paper: BERT-base, full data, dev rows.",
                *notes,
            ]
        ),
        tasks=tuple(filter_task(key[1]) for key in judged),
    )


def _rule(rule: str) -> str:
    return rule.replace("_", "-")


def _at(sparsity: float | None) -> str:
    return "none" if sparsity is None else percent(sparsity)


def _level_table(key: Key, found: Existence) -> Table:
    rows = [
        (
            percent(level.sparsity),
            NONE if level.total_sparsity is None else percent(level.total_sparsity),
            of_seeds(dict(zip(level.seeds, level.scores, strict=True))),
            str(len(level.seeds)),
            *verdict_cells(level.match),
            f"{level.steps:,}",
            significant(level.flops),
        )
        for level in found.levels
    ]
    notes = dict.fromkeys(level.match.note for level in found.levels if level.match.note)
    if any(len(level.seeds) < len(found.seeds) for level in found.levels):
        notes["levels of fewer seeds are of the chains that were not given up, or go on: a level of all would score less"] = None
    return Table(
        f"Levels of {chain_name(key)}: {found.metric.replace('_', '-')}, mean ± std over seeds",
        (
            *(
                "Sparsity",
                "Of the whole model",
                "Score",
                "Seeds",
                "Minus dense",
                *(_rule(rule) for rule in RULES),
                "Could be shown from",
            ),
            *("Steps to here", "FLOPs to here"),
        ),
        tuple(rows),
        f"n = {found.rows} rows. Could be shown from: the smallest difference that so many seeds show four times out of five."
        + "".join(f" Note: {note}." for note in notes),
        tasks=(filter_task(key[1]),) * len(rows),
    )


def verdict_cells(match: Match) -> tuple[str, ...]:
    """Difference, what each rule says, and the difference that so many seeds could show."""
    said = (SAID[match.verdicts[rule].matches] for rule in RULES)
    return (number(match.difference, sign=True), *said, number(match.detectable))


def _cost_parts(anchor: str, judged: Mapping[Key, Existence], cells: tuple[str, ...]) -> tuple[Part, ...]:
    """Training cost as the axis: what it takes to reach a level, in runs of the dense model."""
    figures = []
    for key, found in judged.items():
        one = found.levels[0].flops / max(found.levels[0].steps, 1)
        if not one:
            continue
        points = [
            Point(level.flops / 1e12, dict(zip(level.seeds, level.scores, strict=True)), f"{percent(level.sparsity)}: "
                  f"{level.steps:,} steps, {significant(level.flops)} FLOPs")
            for level in found.levels
        ]  # fmt: skip
        dense = over_seeds(found.dense).value
        lines = [] if dense is None else [Line("line-full", f"dense {number(dense)}", dense)]
        svg = charts.curve_chart(
            [Curve("good", points)],
            lines,
            label=f"Scores over training cost, {chain_name(key)}",
            x_label="10¹² FLOPs to find and train",
        )
        if svg:
            figures.append(Figure(chain_name(key), svg, found.metric.replace("_", "-"), natural=True, task=filter_task(key[1])))
    if not figures:
        return ()
    return (
        Part(
            anchor,
            "Cost of a chain",
            "What did finding each level take?",
            "The same scores over the FLOPs (by formula) of all training up to them, the dense model’s included: each level "
            "costs one more "
            "full run. A mask of the pre-trained weights costs a single run at any sparsity.",
            figures=(tuple(figures),),
            experiment="imp",
            cells=cells,
            all_seeds=True,
        ),
    )


# --------------------------------------------------------------------------------------------------------------- rewinding


def rewinding_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Rows 6 and 7: the same levels by where a round rewinds to, with the paper's Table 3 beside."""
    found: dict[tuple[str, float], dict[str, dict[int, LevelRow]]] = {}
    for row in study.results.chains.levels:
        if row.level and row.sparsity < 1 and is_of_rewinding(row.chain):
            found.setdefault((row.task, row.sparsity), {}).setdefault(row.rewind, {})[row.seed] = row
    found = {key: by for key, by in found.items() if len(by) > 1}
    if not found:
        return ()
    dense = {(row.task, row.seed): row.value for row in study.results.chains.levels if row.level == 0 and not row.body_of}
    rewinds = sorted({name for by in found.values() for name in by}, key=_when)
    rows, tasks = [], []
    for (task, sparsity), by in sorted(found.items()):
        full = {seed: dense[task, seed] for of in by.values() for seed in of if (task, seed) in dense}
        rows.append(
            (
                filter_task(task), percent(sparsity), of_seeds(full) if full else NONE,
                *(of_seeds({seed: row.value for seed, row in by[name].items()}) if name in by else NONE for name in rewinds),
            )
        )  # fmt: skip
        tasks.append(filter_task(task))
    cells = tuple(sorted({row.cell for by in found.values() for of in by.values() for row in of.values()}))
    tables = [
        Table(
            "Scores by where a round rewinds to: mean ± std over seeds",
            ("Task", "Sparsity", "Dense", *(_rewind_name(name) for name in rewinds)),
            tuple(rows),
            "never: standard pruning, which trains on from where it is. Each column is a chain with masks of its own.",
            stubs=2,
            tasks=tuple(tasks),
        )
    ]
    known = [(name, of) for task in dict.fromkeys(task for task, _ in found) if (name := published_name(task)) for of in [name]]
    if known:
        shown = [name for name in TABLE_3_RECALLED if name != "full"]
        tables.append(
            Table(
                "The paper’s Table 3, recalled and not verified: points, at the sparsities of its Table 2",
                ("Task", "Sparsity", "Dense", *(_rewind_name(name) for name in shown)),
                tuple(
                    (
                        task, percent(TABLE_2[task].sparsity), f"{TABLE_3_RECALLED['full'][TARGETS.index(task)]:.2f}",
                        *(f"{TABLE_3_RECALLED[name][TARGETS.index(task)]:.2f}" for name in shown),
                    )
                    for task, _ in known
                ),
                "For orientation: BERT-base, full data. Its row of step 0 does not equal its Table 2.",
                stubs=2,
            )
        )  # fmt: skip
    return (
        Part(
            anchor, "Rewinding", "Does it matter where a round rewinds to?",
            "Table 3 of the paper, which finds no consistent gain from rewinding to a later step than 0.",
            tables=tuple(tables), experiment="rewinding", cells=cells, all_seeds=True,
        ),
    )  # fmt: skip


def is_of_rewinding(chain: str) -> bool:
    """Whether a chain differs from its peers in nothing but where it rewinds to."""
    return not chain or all(one.startswith("rewind=") for one in chain.split(", "))


def _when(rewind: str) -> tuple[int, str, float]:
    kind, _, amount = rewind.partition("_")
    order = ("step", "epoch", "percent", "none", "learning")
    return (order.index(kind), kind, float(amount)) if kind in order[:3] else (order.index(kind), kind, 0.0)


def _rewind_name(rewind: str) -> str:
    if rewind == "none":
        return "never"
    kind, _, amount = rewind.partition("_")
    return {"percent": f"{amount} % of a run", "learning": "learning rate alone"}.get(kind, f"{kind} {amount}")


# ------------------------------------------------------------------------------------------------------------ connectivity


def connectivity_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X9: the rise of the loss on the line from each level to the next, beside whether the next level matches."""
    lines: dict[Key, dict[tuple[float, float], dict[int, BarrierRow]]] = {}
    for row in study.results.chains.barriers:
        lines.setdefault((row.model, row.task, row.chain), {}).setdefault((row.lower, row.upper), {})[row.seed] = row
    if not lines:
        return ()
    chains = chains_of(study.results.chains.levels)
    rows, tasks, by_verdict = [], [], {True: list[float](), False: list[float]()}
    for key, by_pair in lines.items():
        judged = existence_of(chains[key]).levels if key in chains else ()
        for (lower, upper), by_seed in sorted(by_pair.items()):
            match = next((level.match for level in judged if abs(level.sparsity - upper) < 1e-9), None)
            said = verdict_cells(match) if match else (NONE,) * (len(RULES) + 2)
            values = {seed: row.barrier for seed, row in by_seed.items()}
            rows.append((chain_name(key), f"{percent(lower)} to {percent(upper)}", of_seeds(values), *said[:-1]))
            tasks.append(filter_task(key[1]))
            if match and (matches := match.verdicts["max_std"].matches) is not None:
                by_verdict[matches].append(fmean(values.values()))
    told = [
        f"Mean barrier before a level that {'matches' if matches else 'does not match'} (max-std): {number(fmean(of))} nats, of "
        f"{count(len(of), 'pair')}."
        for matches, of in by_verdict.items()
        if of
    ]
    return (
        Part(
            anchor, "Lines between levels", "Are neighbouring levels connected, and does matching go with it?",
            "The loss on the straight line between the trained models of two levels: how far it rises above the line between "
            "its ends.",
            tables=(
                Table(
                    "Barrier between each level and the next, and whether the next matches the dense model",
                    ("Chain", "From, to", "Barrier, nats a row", "Minus dense", *(_rule(rule) for rule in RULES)),
                    tuple(rows), " ".join([*told, "A correlation over few levels, of one chain each: no proof of a cause."]),
                    stubs=2, tasks=tuple(tasks),
                ),
            ),
            experiment="connectivity",
            cells=tuple(sorted({row.cell for by in lines.values() for of in by.values() for row in of.values()})),
            all_seeds=True,
        ),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- masks beside a level's


def beside_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Rows 3, 4, 5 and 9, X2 to X6: what stands beside a ticket of the same task, trained as it is."""
    found: dict[tuple[str, float, str], dict[str, dict[int, list[TrainedRow]]]] = {}
    for row in study.results.chains.trained:
        home = row.source in ("", row.task) or row.task in row.source.split(" + ")
        if home and row.start == "base":
            mask = row.mask if " + " not in row.source else f"{row.mask} of {row.source}"
            mask = "ticket, trained by other seeds" if mask == "ticket" and row.mask_seed != row.seed else mask
            found.setdefault((row.task, row.sparsity, row.chain), {}).setdefault(mask, {}).setdefault(row.seed, []).append(row)
    for (task, sparsity, chain), by_mask in list(found.items()):  # a mask of the base is of no chain: it stands beside each
        if not chain:
            for other, into in found.items():
                if other[2] and other[:2] == (task, sparsity):
                    into.update({mask: of for mask, of in by_mask.items() if mask.startswith("base, ")})
    wanted = {key: by_mask for key, by_mask in found.items() if len(by_mask) > 1}
    if not wanted:
        return ()
    rows, tasks, cells = [], [], set[str]()
    for (task, sparsity, chain), by_mask in sorted(wanted.items()):
        own = {seed: fmean(one.value for one in of) for seed, of in by_mask.get("ticket", {}).items()}
        paper = TABLE_2.get(published_name(task) or "")
        for mask, by_seed in sorted(by_mask.items(), key=lambda one: (one[0] != "ticket", one[0])):
            values = {seed: fmean(one.value for one in of) for seed, of in by_seed.items()}
            dense = {seed: of[0].dense for seed, of in by_seed.items()}
            less = {seed: value - own[seed] for seed, value in values.items() if seed in own}
            majority = fmean(one.majority for of in by_seed.values() for one in of)
            low = fmean(values.values()) <= majority + 1e-12
            draws = len({one.draw for of in by_seed.values() for one in of})
            cells |= {one.cell for of in by_seed.values() for one in of}
            rows.append(
                (
                    filter_task(task), percent(sparsity) + (f", {chain}" if chain else ""), mask,
                    of_seeds(values) + ("*" if low else ""),
                    of_seeds({seed: value - dense[seed] for seed, value in values.items()}, sign=True),
                    of_seeds(less, sign=True) if less and mask != "ticket" else NONE,
                    f"{count(len(values), 'seed')} × {draws}",
                    _published_control(paper, mask),
                )
            )  # fmt: skip
            tasks.append(filter_task(task))
    return (
        Part(
            anchor, "Beside tickets", "Is it the mask, or the weights?",
            "Masks that are no ticket, and tickets on other weights, each trained from the base as the ticket is.",
            tables=(
                Table(
                    "Scores beside those of the ticket of the same level: mean ± std over seeds",
                    ("Task", "Sparsity", "Mask", "Score", "Minus dense", "Minus ticket", "Seeds × draws", "Paper, points"),
                    tuple(rows),
                    "* at or below the majority line: no information. Unions and intersections are of another size than the "
                    "level they are "
                    "made of. The paper’s controls are of one run, at the sparsity of its Table 2.",
                    stubs=3, tasks=tuple(tasks),
                ),
            ),
            experiment="imp-controls",
            cells=tuple(sorted(cells)),
            all_seeds=True,
        ),
    )  # fmt: skip


def _published_control(paper: object, mask: str) -> str:
    fields = {
        "ticket": "ticket", "random": "random", "reinit-body-embeddings": "reinitialised", "shuffle-layers": "shuffled",
    }  # fmt: skip
    value = getattr(paper, fields[mask], None) if paper is not None and mask in fields else None
    value = value[0] if isinstance(value, tuple) else value
    return NONE if value is None else f"{value:.1f} at {percent(getattr(paper, 'sparsity', 0.0))}"
