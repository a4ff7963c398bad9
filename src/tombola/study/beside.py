"""What Prasanna et al. 2020 measure beside tickets and their scores: attention, and what else their claims lean on.

One function (context, options) → cells and one row of `EXPERIMENTS` each, as in `tombola.study.prasanna2020`.
"""

from collections.abc import Collection, Mapping
from dataclasses import asdict, fields, replace
from itertools import product
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Len
from pydantic import StrictBool, StrictInt

from tombola.errors import SettingsError, TombolaError
from tombola.study.cells import Cell, Given
from tombola.study.context import SEARCHED, SEED_NAMES, Context, Experiment, Nothing, found, methods_of, only, own_options
from tombola.study.runs import plan_controls, plan_retrain, shared_settings, step_cell
from tombola.study.steps.attention import (
    AttentionSettings,
    MapInputs,
    MapPreprocess,
    NormMapWeight,
    PatternSplit,
)
from tombola.study.steps.landscape import LandscapeSettings
from tombola.tasks import TASKS, Folders

# ------------------------------------------------------------------------------------------------------------ attention


class AttentionOptions(Nothing):
    """Which models and maps; an option that is not given is the preset's."""

    weights: Annotated[tuple[Literal["fine_tuned", "pretrained"], ...], Len(1)] = ("fine_tuned", "pretrained")
    map_rows: Annotated[StrictInt, Ge(1)] = 100
    min_tokens: Annotated[StrictInt, Ge(4)] = 16
    norm_map_weight: NormMapWeight | None = None
    map_inputs: MapInputs | None = None
    map_preprocess: MapPreprocess | None = None
    pattern_split: PatternSplit | None = None


def attention(context: Context, options: AttentionOptions) -> list[Cell]:
    """E11, E12, X13: the maps of every head, fine-tuned for each seed and once as pre-trained, and the tickets of those seeds."""
    names = {one.name for one in fields(AttentionSettings)}
    given = {name: value for name in names if (value := getattr(options, name)) is not None}
    cells: list[Cell] = []
    for rung, settings in context.on_rungs("s-prune", {"procedure": "joint"}, names - given.keys()):
        asked = AttentionSettings(**own_options(rung, names, given))
        for one in context.find(settings):
            cells += [one.dense, one.search]
            cells += [plan_attention(one.dense, asked, pretrained=which == "pretrained") for which in options.weights]
    return cells


def plan_attention(dense: Cell, asked: AttentionSettings, *, pretrained: bool) -> Cell:
    """The cell of the maps of a dense model, or of the base it comes from: one for all seeds that share rows and base.

    Asks for a classifier of its own only where the one that comes with tombola is not meant.
    """
    settings = shared_settings(dense) | {"attention": asdict(asked)}
    trained = {"map_preprocess": asked.map_preprocess, "pattern_split": asked.pattern_split, "seed": 0}
    patterns = step_cell("patterns", {"patterns": trained, "machine": dense.settings["machine"]})
    taken = {} if asked.as_shipped else {"patterns": patterns}
    if pretrained:
        return step_cell("attention", {name: value for name, value in settings.items() if name != "seeds"}, **taken)
    return step_cell("attention", settings, weights=dense, **taken)


# ------------------------------------------------------------------------------------------------------------ baselines


class BaselinesOptions(Nothing):
    """Of which searches, and what stands beside their bad tickets."""

    of: tuple[str, ...] = ("s-prune",)
    kinds: Annotated[tuple[str, ...], Len(1)] = (
        *("bad", "random-init-random", "dense-random-init", "dense-shuffle-values", "dense-shuffle-layers"),
    )
    draws: Annotated[StrictInt, Ge(1)] = 1
    retrain: StrictBool = True
    words: StrictBool = True  # also a linear model of words


def baselines(context: Context, options: BaselinesOptions) -> list[Cell]:
    """E6: bad tickets beside full models with destroyed weights, a random mask on drawn weights, and a bag of words."""
    cells: list[Cell] = []
    for name in options.of:
        for settings, one in found(name, context):
            tested = plan_controls(one.search, one.dense, options.kinds, options.draws, settings, retrain=options.retrain)
            cells += [one.dense, *(cell for control in tested for cell in control.cells)]
            cells += [plan_bag_of_words(one.dense, context.seeds[0])] if options.words else []
    return cells


def plan_bag_of_words(dense: Cell, run: int) -> Cell:
    """The cell of the linear model of words on the rows of a dense model: one for all seeds, since nothing in it is drawn.

    Its scores say the run seed `run`.
    """
    return step_cell("bag_of_words", shared_settings(dense) | {"seeds": {"run": run}})


# -------------------------------------------------------------------------------------------------------------- crossed


class CrossedOptions(Nothing):
    """Of which searches, and how many levels each factor has: the first so many seeds of the study."""

    of: tuple[str, ...] = ("s-prune", "m-prune")
    tasks: tuple[str, ...] | None = None  # names of tasks; None: all of the study
    levels: Annotated[StrictInt, Ge(2)] = 2


def crossed(context: Context, options: CrossedOptions) -> list[Cell]:
    """Head init × data order × dropout, every combination, all else fixed: tickets to split the variance of masks by.

    The combination of the first seed throughout is the first run of the study. The others are no run of it: their dense cells
    say `design: crossed`, and results keep them apart.
    Raises: SettingsError for fewer seeds than levels.
    """
    if not is_among(context, options.tasks):
        return []
    if len(context.seeds) < options.levels:
        problem = TombolaError(
            "each factor of the crossed design takes its levels from the seeds",
            got=f"{len(context.seeds)} seeds",
            expected=f"{options.levels} seeds or more",
            next="give more --seeds, or leave crossed out of the experiments",
        )
        raise SettingsError([problem])
    first, levels = context.seeds[0], context.seeds[: options.levels]
    cells: list[Cell] = []
    for name in options.of:
        method, own_settings = SEARCHED[name]
        for head, data, dropout in product(levels, repeat=3):
            seeds = {"head_seed": head, "data_seed": data, "dropout_seed": dropout, "mask_seed": first}
            here = replace(context, seeds=(first,), values={**context.values, **seeds})
            design = None if (head, data, dropout) == (first, first, first) else "crossed"
            for settings in here.settings(method, own_settings):
                cells += [cell for one in here.find(settings, design) for cell in (one.dense, one.search)]
    return cells


# ----------------------------------------------------------------------------------------------------------------- HANS


class HansOptions(Nothing):
    """Of which searches, on what."""

    of: tuple[str, ...] = ("s-prune",)
    settings: Annotated[tuple[Literal["mnli2", "mnli2-half", "hans", "hans+mnli2"], ...], Len(1)] = (
        *("mnli2", "mnli2-half", "hans", "hans+mnli2"),
    )


def hans(context: Context, options: HansOptions) -> list[Cell]:
    """X3: masks found on MNLI of two classes, on half of it, on HANS and on both; full and masked, each heuristic by itself.

    Stands on the task mnli of a study, whose splits it takes; nothing on others. HANS is read from a folder of data alone: where
    there is none it is said, so that a study which asks for everything can be run without.
    """
    name, _, said = str(context.task).partition(":")
    if not isinstance(context.task, str) or name != "mnli":
        return []
    folder, known = context.lab.data_dir, TASKS["hans"].source
    assert isinstance(known, Folders)
    if folder is None or not any((folder / one).is_dir() for one in known.names):
        context.lab.reporter.say(f"no HANS: it is read from --data alone, a folder {' or '.join(known.names)} in it")
        return []
    splits = ",".join(one for one in said.split(",") if one.partition("=")[0] in ("train", "report"))
    cells: list[Cell] = []
    for task in options.settings:
        here = replace(context, task=f"{task}:{splits}" if splits and task != "hans" else task)
        cells += [cell for search in options.of for _, one in found(search, here) for cell in one.cells]
    return cells


# ------------------------------------------------------------------------------------------------------------ landscape


class LandscapeOptions(Nothing):
    """Which retrained tickets, and where the loss is measured."""

    of: tuple[str, ...] = ("s-prune",)
    tasks: tuple[str, ...] | None = None  # names of tasks; None: all of the study
    kinds: tuple[str, ...] = ("random", "bad")  # beside good
    draws: Annotated[StrictInt, Ge(1)] = 1
    points: Annotated[StrictInt, Ge(3)] = 11
    landscape_rows: Annotated[StrictInt, Ge(1)] = 512
    radius: Annotated[float, Gt(0)] = 0.1
    directions: Annotated[StrictInt, Ge(1)] = 5


def landscape(context: Context, options: LandscapeOptions) -> list[Cell]:
    """Whether good, random and bad tickets end in the valley of the dense model, and how flat it is where they end."""
    if not is_among(context, options.tasks):
        return []
    asked = LandscapeSettings(**{one.name: getattr(options, one.name) for one in fields(LandscapeSettings)})
    cells: list[Cell] = []
    for name in options.of:
        for settings, one in found(name, context):
            tickets: list[Cell | Given] = [one.search]
            if options.kinds:
                controls = plan_controls(one.search, one.dense, options.kinds, options.draws, settings, retrain=False)
                tickets += [control.ticket for control in controls]
            cells += [one.dense, one.search, plan_landscape(one.dense, asked)]
            for ticket in tickets:
                retrained = plan_retrain(ticket, one.dense, settings.retrain, keep_weights=True)
                cells += [retrained, plan_landscape(one.dense, asked, ticket, retrained)]
    return cells


def plan_landscape(
    dense: Cell, asked: LandscapeSettings, ticket: Cell | Given | None = None, retrained: Cell | None = None
) -> Cell:
    """The cell of the loss around a dense model; or around a retrained ticket (with its weights), and between the two."""
    taken = {} if ticket is None or retrained is None else {"ticket": ticket, "retrained": retrained}
    return step_cell("landscape", shared_settings(dense) | {"landscape": asdict(asked)}, dense=dense, **taken)


# -------------------------------------------------------------------------------------------------------------- options


def is_among(context: Context, tasks: Collection[str] | None) -> bool:
    """Whether an experiment that is asked for on these tasks alone is asked for on this one, whatever splits it is read from."""
    name = context.task if isinstance(context.task, str) else context.task.name
    return tasks is None or name.partition(":")[0] in tasks


EXPERIMENTS: Mapping[str, Experiment] = {
    "attention": Experiment(
        "E11, E12: maps of heads classified, raw and norm-weighted, fine-tuned and pre-trained",
        attention, only("s-prune"), AttentionOptions, ("E11", "E12"),
    ),
    "baselines": Experiment(
        "E6: bad tickets beside destroyed full models, a random mask on drawn weights, a bag of words",
        baselines, methods_of, BaselinesOptions, ("E6",),
    ),
    "hans": Experiment("X3: MNLI of two classes and HANS, alone and mixed", hans, methods_of, HansOptions, ("X3",)),
    "landscape": Experiment(
        "loss barrier and sharpness of good, random and bad tickets against the dense model",
        landscape, methods_of, LandscapeOptions,
    ),
    "crossed": Experiment(
        "head init × data order × dropout: what masks depend on", crossed, methods_of, CrossedOptions, fixed=tuple(SEED_NAMES)
    ),
}  # fmt: skip
