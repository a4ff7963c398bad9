"""Chen et al. 2020, "The Lottery Ticket Hypothesis for Pre-trained BERT Networks": the study as tombola runs it.

One function (context, options) → cells and one row of `EXPERIMENTS` each, with the row of the reproduction's list. What the
cells say is read by `tombola.study.verdicts`; the paper's numbers are in `tombola.study.reference`. Sizes are the paper's:
BERT-base, nine tasks of GLUE, SQuAD and masked language modelling, a round of a full run each, five seeds. Of the list, X7
(overlaps) and X8 (score against source size) need no cells of their own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import StrictBool, StrictInt

from tombola.criteria import CRITERIA
from tombola.errors import SettingsError, TombolaError
from tombola.study.cells import Cell
from tombola.study.chains import Chain
from tombola.study.context import Context, Experiment, Nothing, only
from tombola.study.joint import JointChain, plan_joint
from tombola.study.runs import plan_barrier, plan_base_mask, plan_controls, plan_derived, plan_retrain
from tombola.study.settings import Settings
from tombola.tasks import Task, bare_name

STUDY: Mapping[str, Any] = {
    "name": "chen2020",
    "about": "Chen et al. 2020: tickets of BERT by train, prune, rewind to pre-training; transfer; the MLM ticket",
    "model": "google-bert/bert-base-uncased",
    "tasks": ["mnli", "qqp", "stsb", "wnli", "qnli", "mrpc", "rte", "sst2", "cola", "squad", "mlm-wikitext2"],
    "seeds": [0, 1, 2, 3, 4],
    "preset": "corrected",
    "experiments": [
        *("imp", "existence", "imp-controls", "rewinding", "base-masks", "transfer", "transfer-start"),
        *("set-algebra", "perturbed", "noised", "small-data", "connectivity", "multi-task"),
    ],
    "settings": {"learning_rate": 2e-5, "epochs": 3, "batch_size": 32},
    "per_task": {
        "squad": {"learning_rate": 3e-5, "epochs": 2, "batch_size": 16, "max_length": 384, "stride": 128},
        "mlm-wikitext2": {"learning_rate": 5e-5, "steps": 10_000, "batch_size": 16, "max_length": 512},
    },
    "options": {"transfer": {"sparsities": [0.7], "mlm_sparsities": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]}},
}

Sparsity = Annotated[float, Gt(0), Lt(1)]
Sparsities = Annotated[tuple[Sparsity, ...], Len(1)]
SHARED_LEVEL = 0.7  # of the paper's transfer matrix


def chains_of(context: Context, own: Mapping[str, Any] | None = None) -> list[tuple[Settings, list[Chain]]]:
    """The chains of every preset or rung, one for each seed, with their settings; `own` are settings of the experiment's."""
    found = [(settings, context.find(settings)) for settings in context.settings("imp", own)]
    return [(settings, [one.chain for one in finds if one.chain is not None]) for settings, finds in found]


def imp(context: Context, options: Nothing) -> list[Cell]:
    """Rows 1 and 12: the nested tickets of a chain, and the score of every level."""
    return [cell for _, chains in chains_of(context) for chain in chains for cell in chain.cells]


class ExistenceOptions(Nothing):
    """Which levels, and whose mask the seeds train: each its own, or all that of the first seed."""

    sparsities: Sparsities | None = None  # None: all of the chain
    masks: Literal["own", "first"] = "first"


def existence(context: Context, options: ExistenceOptions) -> list[Cell]:
    """Row 2: every level trained again from the base with every seed, beside dense models of the same seeds."""
    cells: list[Cell] = []
    for settings, chains in chains_of(context):
        for sparsity in options.sparsities or chains[0].sparsities:
            if sparsity < 1:
                for chain in chains:
                    ticket = (chain if options.masks == "own" else chains[0]).at(sparsity)
                    cells += [chain.dense, plan_retrain(ticket, chain.dense, settings.retrain)]
    return cells


class ControlsOptions(Nothing):
    """Of which levels, which controls."""

    sparsities: Sparsities = (0.5, SHARED_LEVEL)
    kinds: Annotated[tuple[str, ...], Len(1)] = (
        *("random", "random-per-layer", "random-same-share", "reinit-body", "reinit-body-embeddings"),
        *("shuffle-layers", "shuffle-values"),
    )
    draws: Annotated[StrictInt, Ge(1)] = 1


def controls(context: Context, options: ControlsOptions) -> list[Cell]:
    """Rows 3, 4 and 5: random masks, weights drawn anew, layers and values shuffled, each trained like the ticket."""
    cells: list[Cell] = []
    for settings, chains in chains_of(context):
        for chain in chains:
            for sparsity in options.sparsities:
                ticket = chain.at(sparsity)
                cells.append(plan_retrain(ticket, chain.dense, settings.retrain))
                for control in plan_controls(ticket, chain.dense, options.kinds, options.draws, settings, retrain=True):
                    assert control.retrained is not None
                    cells.append(control.retrained)  # what it scores untrained, on weights it was not found on, says nothing
    return cells


class RewindingOptions(Nothing):
    """Where rounds rewind to: as the setting `rewind`."""

    rewinds: Annotated[tuple[str, ...], Len(1)] = ("step_0", "percent_5", "percent_10", "percent_20", "percent_50", "none")


def rewinding(context: Context, options: RewindingOptions) -> list[Cell]:
    """Rows 6 and 7: chains that rewind to later steps, and one that never does."""
    planned = [chains_of(context, {"rewind": rewind}) for rewind in options.rewinds]
    return [cell for one in planned for _, chains in one for chain in chains for cell in chain.cells]


class BaseMaskOptions(Nothing):
    """Which masks of the pre-trained weights, by what."""

    criteria: Annotated[tuple[str, ...], Len(1)] = ("magnitude", "snip", "grasp")
    sparsities: Sparsities = (0.5, SHARED_LEVEL)
    rows: Annotated[StrictInt, Ge(1)] = 128  # of train, that snip and grasp look at


def base_masks(context: Context, options: BaseMaskOptions) -> list[Cell]:
    """Rows 9 and X2: one-shot masks of θ0, by magnitude, SNIP and GraSP, trained like a ticket.

    Raises: SettingsError for a criterion that is none.
    """
    _check_criteria(options.criteria)
    cells: list[Cell] = []
    for settings, chains in chains_of(context):
        for chain in chains:
            for criterion in options.criteria:
                for sparsity in options.sparsities:
                    mask = _base_mask(chain, settings, criterion, sparsity, options.rows)
                    cells.append(plan_retrain(mask, chain.dense, settings.retrain))
    return cells


def _base_mask(chain: Chain, settings: Settings, criterion: str, sparsity: float, rows: int = 128) -> Cell:
    search = settings.search
    return plan_base_mask(chain.dense, criterion, sparsity, scope=search.scope, granularity=search.granularity, rows=rows)


def _check_criteria(names: Sequence[str]) -> None:
    if wrong := [name for name in names if name not in CRITERIA]:
        raise SettingsError([TombolaError("there is no such criterion", got=", ".join(wrong), expected=", ".join(CRITERIA))])


# --------------------------------------------------------------------------------------------------------------- transfer


class TransferOptions(Nothing):
    """Which masks are trained on each task of the study."""

    sources: tuple[str, ...] | None = None  # tasks of the study; None: all of them
    sparsities: Sparsities = (SHARED_LEVEL,)
    mlm_sparsities: tuple[Sparsity, ...] = ()  # of masked language modelling besides
    criteria: tuple[str, ...] = ("magnitude",)  # one-shot masks of the base, rows of their own
    random: StrictBool = True  # a random mask of each size, the target's own


@dataclass(frozen=True, slots=True)
class Transferred:
    """One run of a transfer matrix: a mask of `source` trained on `target`."""

    source: str
    target: str
    sparsity: float
    seed: int
    cell: Cell
    dense: Cell  # of the target, of the same seed


def planned_transfers(context: Context, options: TransferOptions) -> list[Transferred]:
    """All masks that are trained on the task of this context; its own ticket is the diagonal.

    Raises: SettingsError for sources that are no tasks of the study, and for criteria that are none.
    """
    _check_criteria(options.criteria)
    target = context.task.name if isinstance(context.task, Task) else bare_name(context.task)
    found: list[Transferred] = []
    own = chains_of(context)
    for name in _sources(context, options.sources):
        for (settings, into), (_, chains) in zip(own, chains_of(_of_task(context, name)), strict=True):
            for chain, home in zip(chains, into, strict=True):
                more = options.mlm_sparsities if "mlm" in chain.dense.settings["data"] else ()
                for sparsity in dict.fromkeys((*options.sparsities, *more)):
                    cell = plan_retrain(chain.at(sparsity), home.dense, settings.retrain)
                    found.append(Transferred(bare_name(name), target, sparsity, chain.seed, cell, home.dense))
    for settings, into in own:
        for home in into:
            for sparsity in options.sparsities:
                masks = {f"base, {one}": _base_mask(home, settings, one, sparsity) for one in options.criteria}
                if options.random:
                    (drawn,) = plan_controls(home.at(sparsity), home.dense, ("random",), 1, settings, retrain=False)
                    assert isinstance(drawn.ticket, Cell)
                    masks["random"] = drawn.ticket
                for name, mask in masks.items():
                    cell = plan_retrain(mask, home.dense, settings.retrain)
                    found.append(Transferred(name, target, sparsity, home.seed, cell, home.dense))
    return found


def transfer(context: Context, options: TransferOptions) -> list[Cell]:
    """Rows 8 and 10: masks of every task trained on this one, one-shot masks of the base and random ones beside."""
    return [cell for one in planned_transfers(context, options) for cell in (one.dense, one.cell)]


def _sources(context: Context, names: Sequence[str] | None) -> list[str]:
    known = [str(name) for name in context.tasks] or [str(context.task)]
    if wrong := [name for name in names or () if name not in known]:
        raise SettingsError([TombolaError("a source is no task of the study", got=", ".join(wrong), expected=", ".join(known))])
    return list(names) if names is not None else known


def _of_task(context: Context, name: str) -> Context:
    """The same study on another of its tasks."""
    if name not in context.tasks:
        return context
    task, values = context.tasks[name]
    return replace(context, task=task, values=values)


class StartOptions(Nothing):
    """From which sources, and where their own training was rewound to for `rewound`."""

    sources: tuple[str, ...] | None = None
    sparsity: Sparsity = SHARED_LEVEL
    rewind: str = "percent_5"


def transfer_start(context: Context, options: StartOptions) -> list[Cell]:
    """Row 11: a source's mask trained on this task from θ0, and from early and late weights of the source's own training."""
    cells: list[Cell] = []
    for name in _sources(context, options.sources):
        source = _of_task(context, name)
        own, at_zero, later = chains_of(context), chains_of(source), chains_of(source, {"rewind": options.rewind})
        for (settings, into), (_, chains), (_, rewound) in zip(own, at_zero, later, strict=True):
            for home, chain, other in zip(into, chains, rewound, strict=True):
                ticket = chain.at(options.sparsity)
                cells.append(plan_retrain(ticket, home.dense, settings.retrain))
                starts = [chain.dense, *([] if other.snapshot is None else [other.snapshot])]
                cells += [plan_retrain(ticket, home.dense, settings.retrain, start=start) for start in starts]
    return cells


# ----------------------------------------------------------------------------------------------------------------- extras


class AlgebraOptions(Nothing):
    """Of which tasks of the study the tickets are joined, at which levels; where fewer are in the study, those."""

    joins: tuple[tuple[str, ...], ...] = (("cola", "sst2"), ("cola", "squad"), ("cola", "sst2", "squad"))
    sparsities: Sparsities = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def set_algebra(context: Context, options: AlgebraOptions) -> list[Cell]:
    """X3: what all, and what any, of the tickets of several tasks keep, trained on each of these tasks."""
    cells: list[Cell] = []
    here = str(context.task)
    for names in options.joins:
        if here not in names or not set(names) <= context.tasks.keys():
            continue
        by_task = {name: chains_of(_of_task(context, name)) for name in names}
        for i, (settings, into) in enumerate(by_task[here]):
            for j, home in enumerate(into):
                for sparsity in options.sparsities:
                    first, *others = (by_task[name][i][1][j].at(sparsity) for name in names)
                    masks = [plan_derived(rule, first, others) for rule in ("intersection", "union")]
                    cells += [plan_retrain(mask, home.dense, settings.retrain) for mask in masks]
    return cells


class PerturbedOptions(Nothing):
    """How much of a ticket is exchanged."""

    sparsity: Sparsity = 0.6
    shares: Annotated[tuple[Annotated[float, Gt(0), Lt(1)], ...], Len(1)] = (0.001, 0.01, 0.02, 0.03, 0.05, 0.1)
    draws: Annotated[StrictInt, Ge(1)] = 1


def perturbed(context: Context, options: PerturbedOptions) -> list[Cell]:
    """X4: in each matrix some removed values revived and as many kept ones removed."""
    return _derived(context, options.sparsity, "perturbed", "share", options.shares, options.draws)


class NoisedOptions(Nothing):
    """How much noise is added to the weights a ticket is trained from, in standard deviations of BERT's matrices."""

    sparsity: Sparsity = SHARED_LEVEL
    times: Annotated[tuple[Annotated[float, Gt(0), Le(10)], ...], Len(1)] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
    draws: Annotated[StrictInt, Ge(1)] = 1


def noised(context: Context, options: NoisedOptions) -> list[Cell]:
    """X5: the ticket trained from pre-trained weights with noise added."""
    return _derived(context, options.sparsity, "noised", "times", options.times, options.draws)


def _derived(context: Context, sparsity: float, rule: str, name: str, values: Sequence[float], draws: int) -> list[Cell]:
    cells: list[Cell] = []
    for settings, chains in chains_of(context):
        for chain in chains:
            ticket = chain.at(sparsity)
            cells.append(plan_retrain(ticket, chain.dense, settings.retrain))
            for value in values:
                for draw in range(draws):
                    options: dict[str, Any] = {name: value, "draw": draw}
                    mask = plan_derived(rule, ticket, **options)
                    cells.append(plan_retrain(mask, chain.dense, settings.retrain))
    return cells


class SmallDataOptions(Nothing):
    """On how many rows a ticket is found that is then trained on all."""

    train_rows: Annotated[tuple[Annotated[StrictInt, Ge(2)], ...], Len(1)] = (1000,)
    sparsity: Sparsity = SHARED_LEVEL
    times: tuple[float, ...] = (0.01,)  # with noise besides, as `noised`


def small_data(context: Context, options: SmallDataOptions) -> list[Cell]:
    """X6: tickets found on part of the rows, trained on all of them; from θ0 and from θ0 with noise."""
    cells: list[Cell] = []
    for rows in options.train_rows:
        for (settings, into), (_, small) in zip(chains_of(context), chains_of(context, {"train_rows": rows}), strict=True):
            for home, chain in zip(into, small, strict=True):
                ticket = chain.at(options.sparsity)
                masks = [ticket, *(plan_derived("noised", ticket, times=times, draw=0) for times in options.times)]
                cells += [plan_retrain(mask, home.dense, settings.retrain) for mask in masks]
    return cells


class ConnectivityOptions(Nothing):
    """At how many points of the line between two neighbouring levels."""

    points: Annotated[StrictInt, Ge(3)] = 11
    sparsities: Sparsities | None = None  # the lower of each pair; None: all


def connectivity(context: Context, options: ConnectivityOptions) -> list[Cell]:
    """X9: each level and the next, both trained from θ0 with one seed, and the loss on the straight line between them."""
    cells: list[Cell] = []
    for settings, chains in chains_of(context):
        for chain in chains:
            at = [one for one in chain.sparsities if one < 1]
            trained = {0.0: chain.dense} | {
                one: plan_retrain(chain.at(one), chain.dense, settings.retrain, keep_weights=True) for one in at
            }
            pairs = list(zip((0.0, *at), at, strict=False))
            wanted = [pair for pair in pairs if options.sparsities is None or pair[0] in options.sparsities]
            cells += [plan_barrier(trained[a], trained[b], options.points) for a, b in wanted]
    return cells


class MultiTaskOptions(Nothing):
    """Which tasks of the study share a body: three of GLUE, and variants with SQuAD and with masked language modelling. Of the
    defaults those whose tasks are all in the study.
    """

    tasks: Annotated[tuple[Annotated[tuple[str, ...], Len(2)], ...], Len(1)] = (
        ("cola", "mrpc", "sst2"),
        ("cola", "sst2", "squad"),
        ("cola", "sst2", "mlm-wikitext2"),
    )


def joint_chains(context: Context, names: Sequence[str]) -> list[list[JointChain]]:
    """The chains over tasks of the study with one body: for every preset or rung that concerns any of them, one a seed."""
    start = context.presets[0].name
    by_task = {}
    for name in names:
        on_rungs = _of_task(context, name).on_rungs("imp")
        by_task[name] = {rung.name: settings for rung, settings in on_rungs}
    found = []
    for rung in context.presets:
        if any(rung.name in known for known in by_task.values()):
            tasks = [(context.tasks[name][0], known.get(rung.name, known[start])) for name, known in by_task.items()]
            found.append(plan_joint(context.lab, context.model, tasks, context.seeds))
    return found


def multi_task(context: Context, options: MultiTaskOptions) -> list[Cell]:
    """X1: several tasks train one body under one mask. Asked for where the first of them is the task.

    Raises: SettingsError for tasks asked for that are none of the study; as `plan_joint`.
    """
    asked = "tasks" in options.model_fields_set
    absent = sorted({name for names in options.tasks for name in names} - context.tasks.keys())
    if asked and absent:
        got, expected = ", ".join(absent), ", ".join(map(str, context.tasks))
        raise SettingsError([TombolaError("tasks with one body are tasks of the study", got=got, expected=expected)])
    here = next((name for name, (task, _) in context.tasks.items() if task == context.task), "")
    wanted = [names for names in options.tasks if names[0] == here and set(names) <= context.tasks.keys()]
    return [cell for names in wanted for chains in joint_chains(context, names) for chain in chains for cell in chain.cells]


_ROWS: Mapping[str, tuple[str, Any, type[Nothing], tuple[str, ...], tuple[str, ...]]] = {
    "imp": ("rows 1, 12: train, prune, rewind, level by level", imp, Nothing, ("1", "12"), ()),
    "existence": ("row 2: each level trained from the base by every seed", existence, ExistenceOptions, ("2",), ()),
    "imp-controls": ("rows 3, 4, 5: random, re-initialised, shuffled", controls, ControlsOptions, ("3", "4", "5"), ()),
    "rewinding": ("rows 6, 7: later rewind steps, and none", rewinding, RewindingOptions, ("6", "7"), ("rewind",)),
    "transfer": ("rows 8, 10: masks of every task on every task", transfer, TransferOptions, ("8", "10"), ()),
    "base-masks": ("rows 9, X2: one-shot masks of the base", base_masks, BaseMaskOptions, ("9", "X2"), ()),
    "transfer-start": ("row 11: where a transferred mask starts", transfer_start, StartOptions, ("11",), ()),
    "set-algebra": ("X3: unions and intersections", set_algebra, AlgebraOptions, ("X3",), ()),
    "perturbed": ("X4: some values of a mask exchanged", perturbed, PerturbedOptions, ("X4",), ()),
    "noised": ("X5: noise on the weights a ticket starts from", noised, NoisedOptions, ("X5",), ()),
    "small-data": ("X6: tickets found on part of the rows", small_data, SmallDataOptions, ("X6",), ()),
    "multi-task": ("X1: one body and one mask for several tasks", multi_task, MultiTaskOptions, ("X1",), ()),
    "connectivity": ("X9: loss on the line between neighbouring levels", connectivity, ConnectivityOptions, ("X9",), ()),
}
EXPERIMENTS: Mapping[str, Experiment] = {
    name: Experiment(about, cells, only("imp"), options, rows, fixed)
    for name, (about, cells, options, rows, fixed) in _ROWS.items()
}
