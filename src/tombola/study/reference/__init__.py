"""Published numbers as data, and what was obtained held beside them: obtained, reference, difference, and why they may differ.

`<name>.toml` says where each number is from. Nothing is judged here: a difference between other models, data or presets is no
failure, and the notes of a row say which of these differ.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from tombola import stats
from tombola.stats import Estimate
from tombola.study.heads import survivor_rows
from tombola.study.results import Results, ScoreRow
from tombola.study.survival import PARTS, bare, cases, is_whole, mask_of, metric_of, stability_rows
from tombola.tasks import TASKS

BASES = {"google-bert/bert-base-uncased": ("google-bert/bert-base-uncased", "bert-base-uncased")}  # the same model by other names
AVERAGE, WITHOUT_WNLI = "average", "average of 8 tasks, without WNLI"


@dataclass(frozen=True, slots=True)
class ReferenceRow:
    """One published number beside what was obtained."""

    table: str  # "scores" (5.1), "sizes" (5.2), "table2" (5.3), "longer" (5.4), "others" (5.5)
    what: str  # e.g. "good, retrained, s-prune"
    model: str
    task: str  # with its variant, as in the results; "average" over tasks
    metric: str  # of a size "share kept"
    obtained: Estimate | None  # over seeds; None: not in these results
    reference: float
    reference_std: float | None
    difference: float | None  # obtained − reference
    notes: tuple[str, ...]  # why the two need not be equal


def reference(name: str = "prasanna2020") -> Mapping[str, Any]:
    """The tables of a paper as its file has them; fractions and correlations, no percentages but where a name says so."""
    found: dict[str, Any] = tomllib.loads((files("tombola.study.reference") / f"{name}.toml").read_text(encoding="utf-8"))
    return found


def compare_with_reference(results: Results, name: str = "prasanna2020") -> list[ReferenceRow]:
    """Every published number of the tasks of these results, beside what was obtained; for each model and variant of settings.

    A task read from other splits is still held against the published one, and said to be. Averages are compared where all tasks
    of theirs are there, with settings that have no variants.
    """
    known = reference(name)
    rows: list[ReferenceRow] = []
    for model in dict.fromkeys([*(row.model for row in results.scores), *(one.model for one in results.tickets)]):
        tables = (_scores, _table2, _longer, _sizes)
        of_tasks = [row for table in tables for row in table(results, known, model)]
        rows += of_tasks + _averages(known, of_tasks) + list(_others(results, known, model))
    return rows


# --------------------------------------------------------------------------------------------------------------- tables


def _scores(results: Results, known: Mapping[str, Any], model: str) -> Iterator[ReferenceRow]:
    for entry in known["scores"]:
        for i, task in enumerate(known["tasks"] if "mean" in entry else ()):
            std = entry["std"][i] if "std" in entry else None
            yield from _scored(results, known, model, "scores", entry, task, entry["mean"][i], std)


def _table2(results: Results, known: Mapping[str, Any], model: str) -> Iterator[ReferenceRow]:
    for entry in known["table2"]:
        for task, mean in zip(known["tasks"], entry["mean"], strict=True):
            misprint = entry["row"] == "bad m" and task == "cola"
            more = ["a misprint of .025, which alone gives the printed average"] if misprint else []
            yield from _scored(results, known, model, "table2", entry, task, mean, None, what=entry["row"], more=more)


def _longer(results: Results, known: Mapping[str, Any], model: str) -> Iterator[ReferenceRow]:
    for entry in known["longer"]:
        for task, mean in zip(known["tasks"], entry["mean"], strict=True):
            wanted = {"kind": "bad", "stage": "retrained", "search": "s-prune"}
            what = f"bad, retrained, s-prune, {entry['epochs']} epochs"
            yield from _scored(results, known, model, "longer", wanted, task, mean, None, what=what, epochs=entry["epochs"])


def _scored(
    results: Results,
    known: Mapping[str, Any],
    model: str,
    table: str,
    entry: Mapping[str, Any],
    task: str,
    mean: float,
    std: float | None,
    *,
    what: str = "",
    epochs: int | None = None,
    more: Sequence[str] = (),
) -> Iterator[ReferenceRow]:
    """The rows of one published score: one for each variant that has it, one without a number where none has."""
    here = [row for row in results.scores if (row.model, _glue(row.task), row.role) == (model, task, "report")]
    here = [row for row in here if row.metric == metric_of(row.task)]
    if not here:
        return
    trained = {row.epochs for row in here if row.kind == "full"}
    kind, stage, search = entry["kind"], entry["stage"], entry["search"]
    wanted = "full" if kind == "majority" else kind
    found: dict[str, list[ScoreRow]] = {}
    for row in here:
        same = (row.kind, row.stage, row.search) == (wanted, stage, search) and row.family in ("", "as found")
        if same and (row.epochs == epochs if epochs is not None else not trained or row.epochs in trained):
            found.setdefault(row.task, []).append(row)
    what = what or _what(entry)
    metric = TASKS[task].metric
    if not found:
        yield _row(table, what, model, here[0].task if len({r.task for r in here}) == 1 else task, metric, None, mean, std, more)
    seen: set[frozenset[str]] = set()
    for name, rows in found.items():
        of_cells = frozenset(row.cell for row in rows)
        if of_cells in seen:
            continue  # a dense model belongs to several variants
        seen.add(of_cells)
        by_seed: dict[int, list[float]] = {}
        for row in rows:
            by_seed.setdefault(row.seed, []).append(row.majority if kind == "majority" else row.value)
        obtained = stats.over_seeds([sum(of) / len(of) for of in by_seed.values()])
        notes = [*more, *_notes(results, known, model, rows)]
        yield _row(table, what, model, name, metric, obtained, mean, std, notes)


def _what(entry: Mapping[str, Any]) -> str:
    return ", ".join(said for said in (entry["kind"], entry["stage"], entry["search"]) if said)


def _sizes(results: Results, known: Mapping[str, Any], model: str) -> Iterator[ReferenceRow]:
    """Shares that are kept, so that models of other sizes can be compared; figure_percent as the figures have it."""
    every = cases(one for one in results.tickets if one.model == model)
    for entry in known["sizes"]:
        for task, published in zip(known["tasks"], entry["mean"], strict=True):
            full = {"heads": 144, "mlps": 12}.get(entry["what"], 100)
            for case, of in every.items():
                if (_glue(case.task), case.search, case.family) != (task, entry["search"], "as found"):
                    continue
                if entry["what"] in ("heads", "mlps"):
                    masks = [mask_of(one, entry["what"]) for one in of.values()]
                    kept = [sum(mask) / len(mask) for mask in masks]
                elif entry["what"] == "body_percent":
                    kept = [one.body_share for one in of.values()]
                else:
                    kept = [one.total_share - 0.21 for one in of.values()]
                notes = _notes(results, known, model, [], case.preset, case.task, len(of))
                what, name = f"{entry['what'].replace('_percent', '')} kept, {case.search}", f"{case.task} {case.variant}".strip()
                yield _row("sizes", what, model, name, "share kept", stats.over_seeds(kept), published / full, None, notes)


def _averages(known: Mapping[str, Any], rows: Sequence[ReferenceRow]) -> list[ReferenceRow]:
    """Over the nine tasks, of the mean over seeds of each; the std over seeds of an average of tasks is not known here."""
    published = {("scores", _what(entry)): entry["average"] for entry in known["scores"]}
    published |= {("table2", e["row"]): e["average"] for e in known["table2"]}
    published |= {("longer", f"bad, retrained, s-prune, {e['epochs']} epochs"): e["average"] for e in known["longer"]}
    found = []
    for (table, what), mean in published.items():
        own = [row for row in rows if (row.table, row.what) == (table, what) and row.obtained is not None]
        values = {_glue(row.task): row.obtained.value for row in own if row.obtained is not None}
        if len(own) == len(values) == len(known["tasks"]) and None not in values.values():
            average = sum(value for value in values.values() if value is not None) / len(values)
            notes = tuple(dict.fromkeys(note for row in own for note in row.notes))
            estimate = Estimate(average, None, None, None, min(row.obtained.n_seeds for row in own if row.obtained), "of 9 tasks")
            found.append(_row(table, what, own[0].model, AVERAGE, "each task's", estimate, mean, None, notes))
    return found


def _others(results: Results, known: Mapping[str, Any], model: str) -> Iterator[ReferenceRow]:
    obtained = _other_numbers(results, model)
    for entry in known["others"]:
        for where, estimate, more in obtained.get((entry["what"], entry["of"]), ()):
            notes = [f"the reference is {entry['source']}", *more, *_notes(results, known, model, [])]
            what = f"{entry['what']}, {entry['of']}"
            yield _row("others", what, model, where, entry["what"], estimate, entry["value"], None, notes)


def _other_numbers(results: Results, model: str) -> dict[tuple[str, str], list[tuple[str, Estimate, list[str]]]]:
    """(what, of) → (where, obtained, notes) of the numbers that are no scores or sizes of one task."""
    found: dict[tuple[str, str], list[tuple[str, Estimate, list[str]]]] = {}
    worth = {(row.kind, row.f1, row.pattern_split) for row in results.attention if row.model == model}
    for kind, f1, split in sorted(worth):
        note = f"on our labelled maps of the demo model, {split}; theirs are others"
        found.setdefault(("pattern_f1", kind), []).append(("labelled maps", Estimate(f1, None, None, None, 1, note), [note]))
    for row in survivor_rows(results):
        if row.maps.model == model and row.maps.weights == "fine_tuned":
            pair = ("survivor_correlation", row.maps.kind)
            found.setdefault(pair, []).append((row.maps.task, row.clustered, ["the interval is drawn by head; theirs has none"]))
    for one in stability_rows(results):
        if (one.case.model, one.case.search, one.part) == (model, "s-prune", "heads"):
            undecided = one.found.undecided
            found.setdefault(("undecided_heads", "s-prune"), []).append((one.case.task, undecided.share, [undecided.note]))
    every = {case: list(of.values()) for case, of in cases(one for one in results.tickets if one.model == model).items()}
    for search in ("s-prune", "s-prune-heads", "s-prune-mlps"):
        own = {_glue(case.task): of for case, of in every.items() if (case.search, case.family) == (search, "as found")}
        n = len([case for case in every if (case.search, case.family) == (search, "as found") and _glue(case.task) != "wnli"])
        own.pop("wnli", None)
        if len(own) == n == 8 and all(is_whole(one) for of in own.values() for one in of):
            for part in PARTS:
                kept = [sum(sum(mask_of(one, part)) / len(mask_of(one, part)) for one in of) / len(of) for of in own.values()]
                mean = Estimate(sum(kept) / 8, None, None, None, min(map(len, own.values())), "of 8 tasks")
                found.setdefault((f"kept_{part}", search), []).append((WITHOUT_WNLI, mean, []))
    return found


# ---------------------------------------------------------------------------------------------------------------- notes


def _row(
    table: str,
    what: str,
    model: str,
    task: str,
    metric: str,
    obtained: Estimate | None,
    published: float,
    std: float | None,
    notes: Iterable[str],
) -> ReferenceRow:
    value = None if obtained is None else obtained.value
    said = [note for note in notes if note] + (["not in these results"] if obtained is None else [])
    difference = None if value is None else value - published
    return ReferenceRow(table, what, model, task, metric, obtained, published, std, difference, tuple(dict.fromkeys(said)))


def _notes(
    results: Results,
    known: Mapping[str, Any],
    model: str,
    rows: Sequence[ScoreRow],
    preset: str = "",
    task: str = "",
    n_seeds: int | None = None,
) -> list[str]:
    """What differs between theirs and ours: model, data, preset, number of seeds."""
    notes = [] if model in BASES.get(known["model"], (known["model"],)) else [f"another model: theirs is {known['model']}"]
    presets = sorted({row.preset for row in rows if row.preset} | ({preset} if preset else set()))
    notes += [f"preset {one}; theirs is {known['preset']}" for one in presets if one != known["preset"]]
    task = bare(rows[0].task) if rows else task
    if task:
        own = (said.removeprefix(f"{task}: ") for said in results.warnings if said.startswith(f"{task}: "))
        notes += [said for said in own if "published score" in said]
        notes += [f"read from other splits: {task}"] if ":" in task else []
    caps = {name: results.settings.get(name) for name in ("train_rows", "report_rows")}
    notes += [f"{name} {value}" for name, value in caps.items() if value not in (None, "all")]
    n = len({row.seed for row in rows}) if rows else n_seeds
    return notes + ([f"{n} seed{'s' if n > 1 else ''}; theirs are {known['seeds']}"] if n and n != known["seeds"] else [])


def _glue(task: str) -> str:
    """The task of GLUE that a row's task is, whatever splits it is read from."""
    return bare(task).partition(":")[0]
