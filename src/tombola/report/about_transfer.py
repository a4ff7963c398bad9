"""What the page shows of masks trained on other tasks: matrices with both verdicts, where they start, and what tickets share.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from tombola.report import charts
from tombola.report.about_chains import filter_task, percent, verdict_cells
from tombola.report.cases import Study
from tombola.report.charts import Curve, Point, Tile
from tombola.report.figures import Line
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, count, listed, number, of_seeds, spread
from tombola.stats import over_seeds
from tombola.stats.matching import RULES
from tombola.study.chain_rows import SharedRow, TrainedRow
from tombola.study.reference.chen2020 import FIGURE_2, FIGURE_2_SPARSITY, TARGETS, published_name
from tombola.study.verdicts import Matrix, matrices_of


def transfer_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Rows 8 and 10: source × target at each sparsity, both verdicts, counts without the diagonal, Fig. 2 beside."""
    every = study.results.chains.trained
    chains = dict.fromkeys(row.chain for row in every if row.mask == "ticket" and row.source != row.task)
    parts = []
    for i, chain in enumerate(chains, start=1):
        # A mask of the base owes nothing to a chain: it stands in the matrices of each.
        mine = [row for row in every if row.chain == chain or (not row.chain and row.mask.startswith("base, "))]
        matrices = [one for one in matrices_of(mine) if _is_matrix(one)]
        if not matrices:
            continue
        dark, others = (
            tuple(_figure(one, against) for one in matrices) for against in ("same-task ticket", "dense")
        )  # fmt: skip
        tables = [_counts_table(matrices)]
        if (published := _published_table(matrices)) is not None:
            tables.append(published)
        parts.append(
            Part(
                f"{anchor}-{i}",
                f"Transfer{f', {chain}' if chain else ''}",
                f"Do tickets of one task serve another?{f' {chain}' if chain else ''}",
                "A mask of the source (row) trained on the target (column) from the base, with the target’s own head. Numbers: "
                "score "
                "minus that of the target’s own ticket, and below minus that of its dense model; strong shades gain, the other "
                "hue loses. "
                "“Universal” in the paper is the first of these and reads like the second: both are here.",
                figures=(dark, others),
                tables=tuple(tables),
                fold="Every cell, by every rule, against the dense model and the target’s own ticket",
                folded=tuple(_cells_table(one) for one in matrices),
                experiment="transfer",
                cells=tuple(sorted({row.cell for row in mine})),
                all_seeds=True,
            )
        )
        parts += _mlm_parts(f"{anchor}-{i}-mlm", mine)
    return tuple(parts)


def _is_transferred(row: TrainedRow) -> bool:
    """Whether it is a ticket of another task, of the same run seed, on the weights of the base."""
    return row.mask == "ticket" and row.start == "base" and row.source != row.task and row.mask_seed == row.seed


def _is_matrix(one: Matrix) -> bool:
    return any(
        cell.source != cell.target and cell.source not in ("random",) and "base, " not in cell.source for cell in one.cells
    )


def _figure(one: Matrix, against: str) -> Figure:
    sources, targets = (list(dict.fromkeys(getattr(cell, side) for cell in one.cells)) for side in ("source", "target"))
    sources = sorted(sources, key=lambda name: (name == "random", name.startswith("base, "), _order(name), name))
    targets = sorted(targets, key=lambda name: (_order(name), name))
    tiles = {}
    for cell in one.cells:
        match = cell.vs_dense if against == "dense" else cell.vs_same_task
        if match is not None and match.difference is not None:
            place = (sources.index(cell.source), targets.index(cell.target))
            shade = max(-1.0, min(1.0, match.difference / 0.1))
            title = f"{filter_task(cell.source)} on {filter_task(cell.target)}, {match.text}"
            tiles[place] = Tile(f"{100 * match.difference:+.1f}".replace("-", "−"), shade, title)
    svg = charts.matrix(
        [filter_task(name) for name in sources], tiles, columns=[filter_task(name) for name in targets],
        label=f"Transfer at {percent(one.sparsity)} against the {against}; the table has the numbers",
    )  # fmt: skip
    held = "the target’s own ticket" if against != "dense" else "the dense model"
    seeds = max((cell.vs_dense.ticket.n_seeds for cell in one.cells), default=0)
    return Figure(
        f"{percent(one.sparsity)}, minus {held}",
        svg,
        f"points; mean over {count(seeds, 'seed')}; full shade: 10 points",
        natural=True,
    )


def _order(task: str) -> int:
    name = published_name(task)
    return TARGETS.index(name) if name else len(TARGETS)


def _counts_table(matrices: Sequence[Matrix]) -> Table:
    rows = []
    for one in matrices:
        for source in sorted(one.dark, key=lambda name: (name == "random", name.startswith("base, "), _order(name), name)):
            others = len({cell.target for cell in one.cells if cell.source == source} - {source})
            paper = FIGURE_2.get(published_name(source) or source)
            published = (
                f"{paper[1]} of {len(TARGETS) - (published_name(source) is not None)}" if paper and _is_of_figure(one) else NONE
            )
            said = (f"{one.matching_dense[source][rule]} of {others}" for rule in RULES)
            rows.append((percent(one.sparsity), filter_task(source), f"{one.dark[source]} of {others}", *said, published))
    return Table(
        "On how many other tasks a mask does as well: as their own ticket, and as their dense model",
        ("Sparsity", "Source", "≥ own ticket", *(f"dense, {rule.replace('_', '-')}" for rule in RULES), "Paper, ≥ own ticket"),
        tuple(rows),
        "Without the diagonal. ≥ own ticket: the mean is at least that of the ticket found on the target itself (dark cells of "
        "the paper’s "
        "Fig. 2). The paper counts its own targets, on BERT-base.",
        stubs=2,
    )


def _is_of_figure(one: Matrix) -> bool:
    return abs(one.sparsity - FIGURE_2_SPARSITY) < 1e-9


def _cells_table(one: Matrix) -> Table:
    rows, tasks = [], []
    for cell in one.cells:
        same = ("itself",) + (NONE,) * (len(RULES) + 1)
        if cell.source != cell.target:
            same = verdict_cells(cell.vs_same_task) if cell.vs_same_task else (NONE,) * (len(RULES) + 2)
        mine = cell.vs_dense.ticket
        names_of = (filter_task(cell.source), filter_task(cell.target))
        rows.append((*names_of, spread(mine), str(mine.n_seeds), *verdict_cells(cell.vs_dense), *same[:-1]))
        tasks.append((filter_task(cell.source), filter_task(cell.target)))
    names = [rule.replace("_", "-") for rule in RULES]
    notes = dict.fromkeys(f"{filter_task(cell.target)}: {cell.vs_dense.note}" for cell in one.cells if cell.vs_dense.note)
    return Table(
        f"Transfer at {percent(one.sparsity)}",
        (
            *("Source", "Target", "Score", "n", "Minus dense", *names, "Could be shown from"),
            *("Minus own ticket", *(f"{name}, own ticket" for name in names)),
        ),
        tuple(rows),
        " ".join(f"{note}." for note in notes),
        stubs=2,
        tasks=tuple(tasks),
    )


def _published_table(matrices: Sequence[Matrix]) -> Table | None:
    """Figure 2 beside what was obtained, for the pairs that both have."""
    rows, tasks = [], []
    for one in matrices:
        for cell in one.cells if _is_of_figure(one) else ():
            row, target = FIGURE_2.get(published_name(cell.source) or cell.source), published_name(cell.target)
            if row is None or target is None or cell.vs_dense.difference is None:
                continue
            paper, mine = row[0][TARGETS.index(target)], 100 * cell.vs_dense.difference
            said = (number(paper, 2, sign=True), number(mine, 2, sign=True), number(mine - paper, 2, sign=True))
            rows.append((filter_task(cell.source), filter_task(cell.target), *said))
            tasks.append((filter_task(cell.source), filter_task(cell.target)))
    if not rows:
        return None
    return Table(
        "Fig. 2 of the paper beside what was obtained: score minus dense score, in points",
        ("Source", "Target", "Published", "Obtained", "Difference"),
        tuple(rows),
        "Published: BERT-base, full data, mean of three runs. Nothing is judged here: other models and rows give other numbers.",
        stubs=2,
        tasks=tuple(tasks),
    )


def _mlm_parts(anchor: str, rows: Sequence[TrainedRow]) -> list[Part]:
    """The ticket of masked language modelling at every level it was transferred at."""
    found: dict[str, dict[float, dict[int, TrainedRow]]] = {}
    for row in rows:
        if _is_transferred(row) and published_name(row.source) == "mlm":
            found.setdefault(row.task, {}).setdefault(row.sparsity, {})[row.seed] = row
    if not found:
        return []
    figures, lines, tasks = [], [], []
    at = sorted({sparsity for by in found.values() for sparsity in by})
    for task, by in sorted(found.items(), key=lambda one: _order(one[0])):
        less = {s: {seed: row.value - row.dense for seed, row in of.items()} for s, of in sorted(by.items())}
        points = [Point(s, of, f"{percent(s)}: {spread(over_seeds(list(of.values())), sign=True)}") for s, of in less.items()]
        svg = charts.curve_chart(
            [Curve("good", points)], [Line("line-full", "dense", 0.0)], label=f"The MLM ticket on {task}", x_label="sparsity, %",
            percent=True,
        )  # fmt: skip
        figures.append(Figure(filter_task(task), svg, "score minus dense", natural=True, task=filter_task(task)))
        lines.append((filter_task(task), *(of_seeds(less[s], sign=True) if s in less else NONE for s in at)))
        tasks.append(filter_task(task))
    table = Table(
        "The MLM ticket on each task: score minus dense score, mean ± std over seeds",
        ("Task", *(percent(s) for s in at)),
        tuple(lines),
        tasks=tuple(tasks),
    )
    return [
        Part(
            anchor, "The MLM ticket", "Is the ticket of masked language modelling universal?",
            "Found on the task of pre-training. The paper claims 70 % for it, against the tickets of the tasks themselves; "
            "here it is held "
            "against the dense model.",
            figures=(tuple(figures),), tables=(table,), experiment="transfer",
            cells=tuple(sorted({row.cell for by in found.values() for of in by.values() for row in of.values()})), all_seeds=True,
        )
    ]  # fmt: skip


def start_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Row 11: the same transferred mask from the base, from early and from late weights of the source's own training."""
    found: dict[tuple[str, str, float], dict[str, dict[int, TrainedRow]]] = {}
    for row in study.results.chains.trained:
        if row.mask == "ticket" and row.mask_seed == row.seed:
            kind = row.start.partition(" on ")[0]
            found.setdefault((row.source, row.task, row.sparsity), {}).setdefault(kind, {})[row.seed] = row
    found = {key: by for key, by in found.items() if len(by) > 1}
    if not found:
        return ()
    kinds = [name for name in ("base", "early", "trained") if any(name in by for by in found.values())]
    heads = {"base": "From the base", "early": "From the source’s rewind step", "trained": "From the source’s trained weights"}
    rows = [
        (
            filter_task(source), filter_task(target), percent(sparsity),
            *(of_seeds({seed: row.value for seed, row in by[kind].items()}) if kind in by else NONE for kind in kinds),
        )
        for (source, target, sparsity), by in sorted(found.items())
    ]  # fmt: skip
    return (
        Part(
            anchor, "Where transfer starts", "Does a transferred mask want the source’s weights?",
            "The same mask of the source trained on the target, from three starts; the head is drawn anew in each.",
            tables=(
                Table(
                    "Scores by the weights a transferred mask starts from: mean ± std over seeds",
                    ("Source", "Target", "Sparsity", *(heads[kind] for kind in kinds)), tuple(rows), stubs=3,
                    tasks=tuple((filter_task(source), filter_task(target)) for source, target, _ in sorted(found)),
                ),
            ),
            experiment="transfer-start",
            cells=tuple(sorted({row.cell for by in found.values() for of in by.values() for row in of.values()})), all_seeds=True,
        ),
    )  # fmt: skip


def size_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X8: how a source's tickets do on other tasks, by how many rows its chain was trained on."""
    rows_of: dict[str, int] = {}
    for case in study.cases:
        if (n := case.settings.get("train_rows")) is not None:
            rows_of[case.name] = rows_of[case.task] = int(n)
    found: dict[tuple[float, str], list[float]] = {}
    for row in study.results.chains.trained:
        if _is_transferred(row):
            found.setdefault((row.sparsity, row.source), []).append(row.value - row.dense)
    if len({source for _, source in found}) < 2:
        return ()
    table = Table(
        "Transfer by the size of the source: score minus dense score, mean over other targets and seeds",
        ("Sparsity", "Source", "Train rows, at most", "Minus dense", "Runs"),
        tuple(
            (
                percent(sparsity), filter_task(source), f"{rows_of[source]:,}" if source in rows_of else NONE,
                number(fmean(values), sign=True), str(len(values)),
            )
            for (sparsity, source), values in sorted(found.items())
        ),
        "Metrics of different tasks are averaged here: an order at most.",
        stubs=2,
        tasks=tuple(filter_task(source) for _, source in sorted(found)),
    )  # fmt: skip
    return (
        Part(
            anchor, "Size of the source", "Do tickets of larger tasks transfer better?", tables=(table,), experiment="transfer",
            all_seeds=True,
        ),
    )  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------- overlaps


def share_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """X7: what tickets of two tasks share at each level, beside what masks of these sizes share by chance."""
    found: dict[tuple[str, str, str], dict[float, dict[int, SharedRow]]] = {}
    for row in study.results.chains.shared:
        found.setdefault((row.a, row.b, row.chain), {}).setdefault(row.sparsity, {})[row.seed] = row
    if not found:
        return ()
    at = sorted({sparsity for by in found.values() for sparsity in by})
    rows, tasks = [], []
    for (a, b, chain), by in sorted(found.items()):
        cells = [jaccards(by[sparsity]) if sparsity in by else NONE for sparsity in at]
        rows.append((f"{listed([filter_task(a), filter_task(b)])}{f', {chain}' if chain else ''}", *cells))
        tasks.append((filter_task(a), filter_task(b)))
    return (
        Part(
            anchor, "What tickets share", "Do tickets of two tasks keep the same values?",
            "Of the values that either keeps, the share that both keep (Jaccard), and after the stroke what masks of exactly "
            "these sizes "
            "share by chance. All tickets are of one base by magnitude, so that much is shared before any training.",
            tables=(
                Table(
                    "Jaccard of tickets of the same seed at each level, mean over seeds / by chance",
                    ("Tasks", *(percent(sparsity) for sparsity in at)), tuple(rows), tasks=tuple(tasks),
                ),
            ),
            experiment="imp", all_seeds=True,
        ),
    )  # fmt: skip


def jaccards(by_seed: Mapping[int, SharedRow]) -> str:
    """The mean over seeds, and what is shared by chance; nothing for no rows."""
    known = [
        row.overlap for row in by_seed.values() if row.overlap.jaccard is not None and row.overlap.expected_jaccard is not None
    ]
    if not known:
        return NONE
    own, chance = (fmean(getattr(one, name) for one in known) for name in ("jaccard", "expected_jaccard"))
    return f"{number(own)} / {number(chance)}"
