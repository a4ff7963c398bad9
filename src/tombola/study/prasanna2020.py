"""Prasanna et al. 2020, "When BERT Plays the Lottery, All Tickets Are Winning": the study as tombola runs it.

Its experiments beyond the searches and controls that every study has (E1 to E5): one function (context, options) → cells and one
row of `EXPERIMENTS` each, with the row of the reproduction's list. Sizes are the paper's: BERT-base, the nine tasks of GLUE, five
seeds, three epochs, one draw of each control a seed. More draws (`--set controls.draws=5`) tell the spread over draws from that
over seeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len, Lt
from pydantic import StrictBool, StrictInt

from tombola.errors import SettingsError, TombolaError
from tombola.search.magnitude import CriterionName
from tombola.search.supers import SuperSettings
from tombola.study import beside
from tombola.study.beside import is_among
from tombola.study.cells import Cell
from tombola.study.context import SEARCHED, Context, Experiment, Nothing, found, methods_of, only, own_options
from tombola.study.data import check_parts, task_of
from tombola.study.lesions import ACTS, Cut
from tombola.study.runs import Tested, plan_controls, plan_derived, plan_lesion, plan_retrain, plan_test, plan_train_mode

STUDY: Mapping[str, Any] = {
    "name": "prasanna2020",
    "about": "Prasanna et al. 2020: m-pruning and s-pruning of BERT on GLUE, good tickets against random and bad ones",
    "model": "google-bert/bert-base-uncased",
    "tasks": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "seeds": [0, 1, 2, 3, 4],
    "preset": "corrected",
    "experiments": [
        *("m-prune", "s-prune", "s-prune-heads", "s-prune-mlps", "controls", "super-survivors"),
        *("redrawn", "zeroed", "reverted", "no-residual", "redrawn-heads", "longer", "train-modes", "mask-modes"),
        *("one-shot", "joined", "size-matched", "mask-on-train"),
        *("attention", "baselines", "hans", "crossed", "landscape"),
    ],
    "options": {
        "controls": {"of": ["s-prune", "m-prune"], "kinds": ["random", "bad"], "draws": 1, "retrain": True},
        # of small tasks: seven more fine-tunes each, and the weights of fifteen retrained tickets (0.4 GB each)
        "crossed": {"tasks": ["mrpc", "rte"]},
        "landscape": {"tasks": ["cola", "mrpc", "stsb", "rte"]},
    },
}


# Rows of the reproduction's list that are tables of what other experiments store, or live elsewhere: id → module and function.
TABLES: Mapping[str, tuple[str, ...]] = {
    "E6": ("tombola.study.reference:compare_with_reference",),  # Table 2, beside the experiment baselines
    "E9": ("tombola.study.survival:stability_rows", "tombola.study.overlap:values_rows"),
    "E10": ("tombola.study.heads:histogram_rows",),
    "E11": ("tombola.study.heads:pattern_rows",),
    "E12": ("tombola.study.heads:survivor_rows",),
    "E13": ("tombola.study.survival:overlap_rows",),
    "E14": ("tombola.study.survival:tasks_survived_rows", "tombola.study.survival:survival_rows"),
    "X10": ("tombola.study.survival:joint_rows",),  # beside the experiment joined
    "X13": (
        *("tombola.study.heads:order_rows", "tombola.study.heads:magnitude_rows", "tombola.study.heads:answers_rows"),
        "tombola.study.heads:pattern_rows",  # entropy among its means
    ),
    "X15": ("tombola.study.cost:total_cost",),
}
# Rows that tombola does not run here, and why.
ELSEWHERE: Mapping[str, str] = {
    "X14": "physical pruning: structured tickets are evaluated so; tombola ship, bench, frontier (docs/ship.md)"
}


class OneShotOptions(Nothing):
    """Which shares are removed in one step, and by what."""

    sparsities: Annotated[tuple[Annotated[float, Ge(0), Lt(1)], ...], Len(1)] = (0.2, 0.5, 0.7)
    criteria: Annotated[tuple[CriterionName, ...], Len(1)] = ("magnitude", "random")
    retrain: StrictBool = False


def one_shot(context: Context, options: OneShotOptions) -> list[Cell]:
    """X8: values removed in one step, by magnitude or at random, without a floor."""
    cells: list[Cell] = []
    for criterion in options.criteria:
        for sparsity in options.sparsities:
            for settings in context.settings("one-shot", {"criterion": criterion, "sparsity": sparsity}):
                for one in context.find(settings):
                    tested = plan_test(one.search, one.dense, settings.retrain, retrain=options.retrain)
                    cells += [*one.cells, *tested.cells]
    return cells


class MatchedOptions(Nothing):
    """Whose sizes are matched, and the controls of as many values."""

    of: tuple[str, ...] = ("s-prune",)
    scope: str = "prasanna2020"  # of the single values
    kinds: Annotated[tuple[str, ...], Len(1)] = ("random", "bad")
    draws: Annotated[StrictInt, Ge(1)] = 1
    retrain: StrictBool = True


def size_matched(context: Context, options: MatchedOptions) -> list[Cell]:
    """X11: magnitude, random and bad masks of single values that remove exactly the share an s-mask removes.

    Raises: MaskError for a scope that is unknown or matches nothing.
    """
    tested: list[Tested] = []
    for name in options.of:
        for settings, one in found(name, context):
            mask = plan_derived("size-matched", one.search, scope=options.scope)
            if context.lab.store.load(mask.key) is None:  # a scope that is none is refused before anything is trained
                data = one.dense.settings["data"]
                objective = task_of(context.lab, data["task"], data.get("source")).objective
                check_parts(context.lab, one.dense.settings["model"], objective, options.scope)
            tested.append(plan_test(mask, one.dense, settings.retrain, retrain=options.retrain))
            tested += plan_controls(mask, one.dense, options.kinds, options.draws, settings, retrain=options.retrain)
    return [cell for one in tested for cell in one.cells]


class RetrainOptions(Nothing):
    """Whether masks are also trained again from the base."""

    retrain: StrictBool = True


def joined(context: Context, options: RetrainOptions) -> list[Cell]:
    """X10: the heads-only and the MLPs-only mask of a seed applied together, beside the mask found on both at once."""
    heads, mlps, both = (found(name, context) for name in ("s-prune-heads", "s-prune-mlps", "s-prune"))
    tested = [plan_test(one.search, one.dense, settings.retrain, retrain=options.retrain) for settings, one in both]
    for (settings, of_heads), (_, of_mlps) in zip(heads, mlps, strict=True):
        mask = plan_derived("joined", of_heads.search, [of_mlps.search])
        tested.append(plan_test(mask, of_heads.dense, settings.retrain, retrain=options.retrain))
    return [cell for one in tested for cell in one.cells]


class SuperOptions(Nothing):
    """Of which searches, and the rules of the controls; a rule that is not given is the preset's."""

    of: tuple[str, ...] = ("s-prune",)
    super_bad_rule: Literal["least_surviving", "removed_in_all"] | None = None
    super_bad_draw: Literal["per_seed", "once"] | None = None
    draws: Annotated[StrictInt, Ge(1)] = 1
    retrain: StrictBool = True


def super_survivors(context: Context, options: SuperOptions) -> list[Cell]:
    """E8: what the tickets of all seeds keep, with random and bad ones of that size, on the weights of each seed.

    Raises: SettingsError for a study of one seed, and for a search of single values.
    """
    problems = []
    if len(context.seeds) < 2:
        problems.append(
            TombolaError("super-survivors are what several seeds keep", got="one seed", expected="two seeds or more",
                         next="give more --seeds, or leave super-survivors out of the experiments")
        )  # fmt: skip
    wrong = [name for name in options.of if SEARCHED[name][0] != "s-prune"]
    if wrong:
        problems.append(TombolaError("super-survivors are whole parts", got=", ".join(wrong), expected="searches of s-prune"))
    if problems:
        raise SettingsError(problems)
    names = {one.name for one in fields(SuperSettings)}
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    tested: list[Tested] = []
    for name in options.of:
        method, own = SEARCHED[name]
        for rung, settings in context.on_rungs(method, own, names - given.keys()):
            rules = own_options(rung, names, given)
            finds = context.find(settings)
            for one in finds:
                others = [other.search for other in finds if other is not one]
                masks = [plan_derived("super-survivors", one.search, others)]
                for draw in range(options.draws):
                    drawn = rules | {"draw": draw}
                    masks += [plan_derived(rule, one.search, others, **drawn) for rule in ("super-random", "super-bad")]
                tested += [plan_test(mask, one.dense, settings.retrain, retrain=options.retrain) for mask in masks]
    return [cell for one in tested for cell in one.cells]


class LesionOptions(Nothing):
    """Fewer lesions than the whole list: of these parts, in these places."""

    what: Annotated[tuple[str, ...], Len(1)] | None = None  # as `Cut.what`; None: all of the list
    where: Annotated[tuple[Literal["all", "each", "pairs"], ...], Len(1)] = ("all", "each", "pairs")
    layers_of: tuple[str, ...] | None = None  # tasks where single layers and pairs are cut, too; None: every task
    draws: Annotated[StrictInt, Ge(1)] = 1  # of lesions that draw


_REDRAWN = ("q", "k", "v", "q+k+v", "o", "in", "out", "o+in+out", "layer")
# experiment → the lesions of its list, in every place.
CUTS: Mapping[str, tuple[Cut, ...]] = {
    "redrawn": (
        Cut("redraw", "words"),
        *(Cut("redraw", what, where) for what in _REDRAWN for where in ("all", "each", "pairs")),
    ),
    "zeroed": tuple(Cut("zero", what) for what in ("q", "k", "v", "q+k", "q+k+v")),
    "reverted": (
        *(Cut("revert", what) for what in ("q", "k", "v", "q+k", "q+v", "k+v", "o+in+out", "words")),
        Cut("revert-rotated", "words"),
    ),
    "no-residual": tuple(Cut(act, "mlp", where) for act in ("drop-residual", "double-branch") for where in ("all", "each")),
    "redrawn-heads": tuple(Cut("redraw-removed-heads", what) for what in ("all", "o", "o-rows")),
}


def _lesions(name: str) -> Callable[[Context, LesionOptions], list[Cell]]:
    """X4 to X7 and X9: a dense model with a part destroyed; of removed heads beside the score of the same mask.

    Raises: SettingsError when the options leave nothing of the list.
    """

    def cells(context: Context, options: LesionOptions) -> list[Cell]:
        cuts = [one for one in CUTS[name] if one.where in options.where and one.what in (options.what or [one.what])]
        absent = set(options.what or ()) - {one.what for one in CUTS[name]}
        if absent or not cuts:  # of the list, not of this task
            got = ", ".join(sorted(absent)) or ", ".join(options.where)
            expected = "; ".join(dict.fromkeys(f"{one.what} ({one.where})" for one in CUTS[name]))
            raise SettingsError([TombolaError(f"{name} has no such lesions", got=got, expected=expected)])
        if not is_among(context, options.layers_of):
            cuts = [one for one in cuts if one.where == "all"]
        planned: list[Cell] = []
        for _, one in found("s-prune", context):
            of_heads = [ACTS[cut.act].of_heads for cut in cuts]
            planned += one.cells if any(of_heads) else [one.dense]
            for cut, removed in zip(cuts, of_heads, strict=True):
                for draw in range(options.draws if ACTS[cut.act].draws else 1):
                    planned.append(plan_lesion(replace(cut, draw=draw), one.dense, one.search if removed else None))
        return planned

    return cells


class LongerOptions(Nothing):
    """Which controls of which searches, trained again for how long."""

    of: tuple[str, ...] = ("s-prune",)
    kinds: Annotated[tuple[str, ...], Len(1)] = ("bad",)
    draws: Annotated[StrictInt, Ge(1)] = 1
    epochs: Annotated[tuple[Annotated[StrictInt, Ge(1)], ...], Len(1)] = (3, 4, 5, 6)


def longer(context: Context, options: LongerOptions) -> list[Cell]:
    """E7: bad s-masks trained again with more epochs, each number of them with a schedule of its own."""
    cells: list[Cell] = []
    for name in options.of:
        for settings, one in found(name, context):
            for control in plan_controls(one.search, one.dense, options.kinds, options.draws, settings, retrain=False):
                cells += [plan_retrain(control.ticket, one.dense, settings.retrain, epochs=epochs) for epochs in options.epochs]
    return cells


class ModesOptions(Nothing):
    """Which train modes beside fine-tuning."""

    modes: Annotated[tuple[Literal["frozen", "random", "random_frozen"], ...], Len(1)] = ("frozen", "random", "random_frozen")


def train_modes(context: Context, options: ModesOptions) -> list[Cell]:
    """X1: the base fine-tuned, its task head trained alone, and both from weights drawn again."""
    dense = [one.dense for _, one in found("s-prune", context)]
    return [cell for one in dense for cell in (one, *(plan_train_mode(mode, one) for mode in options.modes))]


class MaskModesOptions(Nothing):
    """Of which searches."""

    of: tuple[str, ...] = ("s-prune",)
    bad_draws: Annotated[StrictInt, Ge(1)] = 2
    retrain: StrictBool = True


def mask_modes(context: Context, options: MaskModesOptions) -> list[Cell]:
    """X2: a mask used, inverted (as it is, and with a head revived in each emptied layer), random, and bad drawn twice."""
    tested: list[Tested] = []
    for name in options.of:
        for settings, one in found(name, context):
            tested.append(plan_test(one.search, one.dense, settings.retrain, retrain=options.retrain))
            for kinds, draws in ((("inverted", "inverted-revived", "random"), 1), (("bad",), options.bad_draws)):
                tested += plan_controls(one.search, one.dense, kinds, draws, settings, retrain=options.retrain)
    return [cell for one in tested for cell in one.cells]


class MaskOnTrainOptions(Nothing):
    """Of which searches, and the rows that masks are chosen on, whatever the preset says."""

    of: tuple[str, ...] = ("s-prune",)
    splits: Annotated[tuple[Literal["train", "dev", "held_out_from_train"], ...], Len(1)] = ("train", "dev")


def mask_on_train(context: Context, options: MaskOnTrainOptions) -> list[Cell]:
    """X12: masks chosen on rows that were trained on, beside those chosen on dev rows; the models are the same, bit for bit."""
    cells: list[Cell] = []
    for name in options.of:
        method, own = SEARCHED[name]
        for split in options.splits:
            for settings in context.settings(method, {**own, "selection_split": split}):
                cells += [cell for one in context.find(settings) for cell in one.cells]
    return cells


EXPERIMENTS: Mapping[str, Experiment] = {
    "one-shot": Experiment(
        "X8: values removed in one step", one_shot, only("one-shot"), OneShotOptions, ("X8",), fixed=("sparsity",)
    ),
    "size-matched": Experiment(
        "X11: masks of values of the size of an s-mask", size_matched, methods_of, MatchedOptions, ("X11",)
    ),
    "joined": Experiment(
        "X10: heads-only and MLPs-only masks together, beside joint ones", joined, only("s-prune"), RetrainOptions, ("X10",)
    ),
    "super-survivors": Experiment(
        "E8: what all seeds keep, against random and bad", super_survivors, methods_of, SuperOptions, ("E8",)
    ),
    "redrawn": Experiment(
        "X4: words, projections, layers drawn again", _lesions("redrawn"), only("s-prune"), LesionOptions, ("X4",)
    ),
    "zeroed": Experiment("X5: q, k, v set to zero", _lesions("zeroed"), only("s-prune"), LesionOptions, ("X5",)),
    "reverted": Experiment(
        "X6: parts put back to the pre-trained values", _lesions("reverted"), only("s-prune"), LesionOptions, ("X6",)
    ),
    "no-residual": Experiment("X7: no residual around the MLP", _lesions("no-residual"), only("s-prune"), LesionOptions, ("X7",)),
    "redrawn-heads": Experiment(
        "X9: removed heads drawn again, not masked", _lesions("redrawn-heads"), only("s-prune"), LesionOptions, ("X9",)
    ),
    "longer": Experiment("E7: bad s-masks trained again for longer", longer, methods_of, LongerOptions, ("E7",)),
    "train-modes": Experiment(
        "X1: task head alone, and weights drawn again", train_modes, only("s-prune"), ModesOptions, ("X1",)
    ),
    "mask-modes": Experiment("X2: masks inverted, and bad ones drawn twice", mask_modes, methods_of, MaskModesOptions, ("X2",)),
    "mask-on-train": Experiment("X12: masks chosen on rows trained on", mask_on_train, methods_of, MaskOnTrainOptions, ("X12",)),
    **beside.EXPERIMENTS,
}
