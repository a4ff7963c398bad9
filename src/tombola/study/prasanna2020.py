"""Prasanna et al. 2020, "When BERT Plays the Lottery, All Tickets Are Winning": the study as tombola runs it.

Its experiments beyond the searches and controls that every study has (E1 to E5): one function (context, options) → cells and one
row of `EXPERIMENTS` each, with the row of the reproduction's list. Sizes are the paper's: BERT-base, the nine tasks of GLUE, five
seeds, three epochs, one draw of each control a seed. More draws (`--set controls.draws=5`) tell the spread over draws from that
over seeds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Len, Lt
from pydantic import StrictBool, StrictInt

from tombola.errors import SettingsError, TombolaError
from tombola.search.magnitude import CriterionName
from tombola.search.supers import SuperSettings
from tombola.study.cells import Cell
from tombola.study.context import SEARCHED, Context, Experiment, Nothing, found, only
from tombola.study.jobs import Tested, plan_controls, plan_derived, plan_test
from tombola.study.presets import preset_values

STUDY: Mapping[str, Any] = {
    "name": "prasanna2020",
    "about": "Prasanna et al. 2020: m-pruning and s-pruning of BERT on GLUE, good tickets against random and bad ones",
    "model": "google-bert/bert-base-uncased",
    "tasks": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "seeds": [0, 1, 2, 3, 4],
    "preset": "corrected",
    "experiments": [
        *("m-prune", "s-prune", "s-prune-heads", "s-prune-mlps", "controls", "super-survivors"),
        *("one-shot", "joined", "size-matched"),
    ],
    "options": {"controls": {"of": ["s-prune", "m-prune"], "kinds": ["random", "bad"], "draws": 1, "retrain": True}},
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
    """X11: magnitude, random and bad masks of single values that remove exactly the share an s-mask removes."""
    tested: list[Tested] = []
    for name in options.of:
        for settings, one in found(name, context):
            mask = plan_derived("size-matched", one.search, scope=options.scope)
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
            changed = {option: value for option, value in rung.values.items() if option in names}
            rules = preset_values(rung.preset, names) | changed | given
            finds = context.find(settings)
            for one in finds:
                others = [other.search for other in finds if other is not one]
                masks = [plan_derived("super-survivors", one.search, others)]
                for draw in range(options.draws):
                    drawn = rules | {"draw": draw}
                    masks += [plan_derived(rule, one.search, others, **drawn) for rule in ("super-random", "super-bad")]
                tested += [plan_test(mask, one.dense, settings.retrain, retrain=options.retrain) for mask in masks]
    return [cell for one in tested for cell in one.cells]


def _methods_of(options: Any) -> Sequence[str]:
    return [SEARCHED[name][0] for name in options.of if name in SEARCHED]


EXPERIMENTS: Mapping[str, Experiment] = {
    "one-shot": Experiment(
        "X8: values removed in one step", one_shot, only("one-shot"), OneShotOptions, ("X8",), fixed=("sparsity",)
    ),
    "size-matched": Experiment(
        "X11: masks of values of the size of an s-mask", size_matched, _methods_of, MatchedOptions, ("X11",)
    ),
    "joined": Experiment(
        "X10: heads-only and MLPs-only masks together, beside joint ones", joined, only("s-prune"), RetrainOptions, ("X10",)
    ),
    "super-survivors": Experiment(
        "E8: what all seeds keep, against random and bad", super_survivors, _methods_of, SuperOptions, ("E8",)
    ),
}
