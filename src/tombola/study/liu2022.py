"""Liu et al. 2022, "A Win-win Deal: Towards Sparse and Robust Pre-trained Language Models": the study as tombola runs it.

One function (context, options) → cells and one row of `EXPERIMENTS` each, with the row of the reproduction's list.

    a   a fine-tuned model is pruned               its mask is learned on frozen weights (or train, prune, train on)
    b   a subnetwork of the base is fine-tuned     the mask of a or c, the base's weights, a new head
    c   the base is masked                         no weight is ever trained, the head is as it was drawn

Each has two losses to choose: that of the mask, and that of the weights where these are trained. A task needs challenge rows;
what the cells say is read by `tombola.study.robust_rows`. Sizes are the paper's: BERT-base, MNLI and QQP, the epochs of its
scripts; not its seeds, of which its scripts have one. Of the list, row 12 (other models) is the study's field `model`, and row 13
(planted marks) its tasks `syn-mnli` and `syn-qqp`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Len, Lt
from pydantic import StrictBool, StrictInt

from tombola.errors import SettingsError, TombolaError
from tombola.losses import LossName
from tombola.search.learned import ScoreInit
from tombola.study.cells import Cell
from tombola.study.chains import plan_chains
from tombola.study.context import Context, Experiment, Nothing, own_options
from tombola.study.runs import Found, plan_find, plan_probe, plan_retrain
from tombola.study.settings import Settings
from tombola.tasks import TASKS, Grammar, Marked, bare_name, get_task

STUDY: Mapping[str, Any] = {
    "name": "liu2022",
    "about": "Liu et al. 2022: sparse and robust subnetworks; masks learned against a bias, in three pipelines",
    "model": "google-bert/bert-base-uncased",
    "tasks": ["mnli-hans", "qqp-paws"],
    "seeds": [0, 1, 2, 3, 4],
    "preset": "corrected",
    "experiments": [
        *("full-models", "pipeline-a", "pipeline-b", "pipeline-c", "oracles", "start-point", "gradual", "robust-imp"),
    ],
    "settings": {"learning_rate": 5e-5, "epochs": 3, "batch_size": 32},
    "per_task": {
        "mnli-hans": {"bias_model": "nli-overlap", "bias_vectors": "model", "mask_epochs": 5, "warmup_steps": 3600},
        "qqp-paws": {
            **{"bias_model": "paraphrase-overlap", "bias_vectors": "model", "mask_epochs": 7, "warmup_steps": 3400},
            **{"learning_rate": 2e-5},
        },
    },
    "options": {
        "full-models": {"losses": ["ce", "poe", "reweight", "conf-reg"]},
        "pipeline-a": {"losses": ["ce", "poe"], "mask_losses": ["ce", "poe", "reweight", "conf-reg"]},
    },
}

Sparsity = Annotated[float, Gt(0), Lt(1)]
Sparsities = Annotated[tuple[Sparsity, ...], Len(1)]
Losses = Annotated[tuple[LossName, ...], Len(1)]
Share = Annotated[float, Ge(0), Le(1)]

# A task that has challenge train rows → the one whose train rows have them, too. Of rows that are written or marked, those where
# the shortcut says nothing: as many against it as for it.
ORACLES: Mapping[str, str] = {
    "mnli-hans": "mnli+hans",
    "qqp-paws": "qqp+paws",
    "qqp-paws-wiki": "qqp+paws-wiki",
    "fever-symmetric-v2": "fever+symmetric-v2",
    "mnli2": "hans+mnli2",
}


# A mask of the base is chosen from the whole of training, as published; others from its last part.
_ANY_TIME: Mapping[str, Any] = {"loss": "ce", "choice_from": 0.0}


def learned(context: Context, own: Mapping[str, Any], *, until: float = 1.0) -> list[tuple[Settings, list[Found]]]:
    """Masks learned under these settings of the experiment's own, a list of seeds for every preset or rung.

    Raises: SettingsError for a task without challenge rows.
    """
    _check_challenge(context)
    return [(settings, _learned_under(context, settings, None, until)) for settings in context.settings("learned", own)]


def _learned_under(context: Context, settings: Settings, learned_on: str | None, until: float) -> list[Found]:
    return plan_find(context.lab, context.model, context.task, settings, context.seeds, learned_on=learned_on, until=until)


def _check_challenge(context: Context) -> None:
    task = get_task(context.task) if isinstance(context.task, str) and not context.task.startswith("hub:") else context.task
    if not isinstance(task, str) and "challenge" not in task.splits:
        known = ", ".join(name for name, one in TASKS.items() if "challenge" in one.splits)
        raise SettingsError(
            [TombolaError("robustness is measured on challenge rows", got=f"{task.name}, which has none", expected=known)]
        )


def _cells(planned: Iterable[tuple[Settings, list[Found]]]) -> list[Cell]:
    return [cell for _, found in planned for one in found for cell in one.cells]


class FullOptions(Nothing):
    """What dense models are trained against, and for how long."""

    losses: Losses = ("ce", "poe")
    # beside each one that trains for as many epochs as a dense model and its mask together: what training alone would have done
    as_long: StrictBool = True


def full_models(context: Context, options: FullOptions) -> list[Cell]:
    """Row 0a: dense models, one for each loss; ours: and one of each that has the training of its masks, too.

    Raises: SettingsError where `as_long` meets a length in steps.
    """
    found = learned(context, {})
    lengths: list[Mapping[str, Any]] = [{}]
    if options.as_long:
        if any(settings.train.steps is not None for settings, _ in found):
            problem = TombolaError(
                "full-models adds the epochs of masks to those of dense models", got="a setting steps",
                expected="epochs", next="leave steps out, or set as_long = false in [options.full-models]",
            )  # fmt: skip
            raise SettingsError([problem])
        lengths += [{"epochs": n} for n in sorted({one.train.epochs + one.search.mask_epochs for one, _ in found})]
    return [
        one.dense
        for loss in options.losses
        for length in lengths
        for _, of_seeds in learned(context, {"loss": loss, **length})
        for one in of_seeds
    ]


class PipelineOptions(Nothing):
    """Masks of a fine-tuned model: what that was trained against, what the mask is, and how much is removed."""

    losses: Losses = ("ce",)
    mask_losses: Losses = ("ce", "poe")
    sparsities: Sparsities = (0.2, 0.5, 0.7, 0.9)
    magnitude: StrictBool = True  # beside them the mask that a hard start has: the largest values, nothing learned


def pipeline_a(context: Context, options: PipelineOptions) -> list[Cell]:
    """Rows 2 and 3: masks of fine-tuned models, which stand still; beside them those of the largest values."""
    cells: list[Cell] = []
    for loss in options.losses:
        for sparsity in options.sparsities:
            for mask_loss in options.mask_losses:
                cells += _cells(learned(context, {"loss": loss, "mask_loss": mask_loss, "sparsity": sparsity}))
            if options.magnitude:
                cells += _cells(_by_magnitude(context, loss, sparsity))
    return cells


def _by_magnitude(context: Context, loss: str, sparsity: float) -> list[tuple[Settings, list[Found]]]:
    own = {"criterion": "magnitude", "sparsity": sparsity, "scope": "liu2022", "granularity": "per_matrix", "loss": loss}
    return [(settings, context.find(settings)) for settings in context.settings("one-shot", own)]


class SubnetOptions(Nothing):
    """Which masks are trained again from the base, and against what."""

    mask_start: Literal["fine_tuned", "pretrained"] = "fine_tuned"  # the mask of pipeline a, or of c
    mask_losses: Losses = ("poe",)
    retrain_losses: Losses = ("ce", "poe")
    sparsities: Sparsities = (0.2, 0.5, 0.7, 0.9)


def pipeline_b(context: Context, options: SubnetOptions) -> list[Cell]:
    """Row 5: the mask on the base's weights, with a new head, trained."""
    cells: list[Cell] = []
    until, chosen = (1.0, {}) if options.mask_start == "fine_tuned" else (0.0, _ANY_TIME)
    for sparsity in options.sparsities:
        for mask_loss in options.mask_losses:
            own: dict[str, Any] = {"loss": "ce", "mask_loss": mask_loss, "sparsity": sparsity}
            for (settings, found), (_, full) in zip(
                learned(context, {**own, **chosen}, until=until), learned(context, own), strict=True
            ):
                for one, dense in zip(found, full, strict=True):
                    cells += [one.search, dense.dense]
                    for loss in options.retrain_losses:
                        against = replace(settings.loss, loss=loss)
                        cells.append(plan_retrain(one.search, dense.dense, settings.retrain, loss=against))
    return cells


class MaskedBaseOptions(Nothing):
    """Masks of the base, whose head is as it was drawn."""

    mask_losses: Losses = ("ce", "poe")
    sparsities: Sparsities = (0.2, 0.5, 0.7, 0.9)


def pipeline_c(context: Context, options: MaskedBaseOptions) -> list[Cell]:
    """Row 6: masks of the base; no weight is trained. Masks are chosen from the whole of training, as published."""
    cells: list[Cell] = []
    for sparsity in options.sparsities:
        for mask_loss in options.mask_losses:
            cells += _cells(learned(context, {**_ANY_TIME, "mask_loss": mask_loss, "sparsity": sparsity}, until=0.0))
    return cells


class OracleOptions(Nothing):
    """Masks learned with rows of the challenge's own train split."""

    pipelines: Annotated[tuple[Literal["a", "b", "c"], ...], Len(1)] = ("a", "b", "c")
    sparsities: Sparsities = (0.2, 0.5, 0.7, 0.9)
    # what "non-entailment" is to a model of three classes: one of the others, or either
    hans_train_label: Literal["contradiction", "marginal"] | None = None  # None: the preset's, where the question arises


def oracles(context: Context, options: OracleOptions) -> list[Cell]:
    """Rows 7, 8 and 9: cross-entropy masks that were learned on challenge train rows, too; what could be reached.

    Raises: SettingsError for a task whose challenge has no train rows.
    """
    cells: list[Cell] = []
    rows, given = oracle_of(str(context.task)), options.hans_train_label
    by_preset = {"hans_train_label"} if given is None and get_task(rows).merges else set[str]()

    def masks(own: Mapping[str, Any], until: float = 1.0) -> Iterator[tuple[Settings, list[Found]]]:
        for rung, settings in context.on_rungs("learned", {"loss": "ce", "mask_loss": "ce", **own}, by_preset):
            said = own_options(rung, by_preset, {} if given is None else {"hans_train_label": given})
            if said.get("hans_train_label") == "marginal":
                settings = replace(settings, search=replace(settings.search, mask_loss="marginal"))
            yield settings, _learned_under(context, settings, rows, until)

    for sparsity in options.sparsities:
        own: dict[str, Any] = {"sparsity": sparsity}
        if {"a", "b"} & set(options.pipelines):
            for settings, found in masks(own):
                for one in found:
                    cells += one.cells if "a" in options.pipelines else (one.search,)
                    if "b" in options.pipelines:
                        cells.append(plan_retrain(one.search, one.dense, settings.retrain))
        if "c" in options.pipelines:
            cells += _cells(masks({**own, **_ANY_TIME}, until=0.0))
    return cells


def oracle_of(spec: str) -> str:
    """The task whose train rows include challenge train rows of `spec`, with the same classes and options."""
    name, colon, rest = spec.partition(":")
    if name in ORACLES:
        return ORACLES[name] + colon + rest
    task = TASKS.get(name)
    if task is None or not isinstance(task.source, Grammar | Marked) or "challenge" not in task.splits:
        raise SettingsError(
            [
                TombolaError(
                    "there are no train rows of this task's challenge",
                    got=bare_name(spec),
                    expected=", ".join([*ORACLES, *(n for n, t in TASKS.items() if "strength" in t.options)]),
                )
            ]
        )
    others = [part for part in rest.split(",") if part and not part.startswith("strength=")]
    # of replies the planted shortcut tells one of two
    return f"{name}:{','.join([*others, f'strength={_even(len(task.labels) or 2)}'])}"


def _even(classes: int) -> str:
    """How often a shortcut that says nothing is right."""
    return f"{1 / classes:.3g}"


class StartOptions(Nothing):
    """After which shares of fine-tuning mask training begins."""

    shares: Annotated[tuple[Share, ...], Len(1)] = (0.0, 0.15, 0.3, 0.45, 0.55, 1.0)
    sparsity: Sparsity = 0.7
    mask_loss: LossName = "poe"
    probes: StrictBool = True  # what can be seen at each of them, for a rule on when to begin: `tombola.study.begin`


def start_point(context: Context, options: StartOptions) -> list[Cell]:
    """Row 10: masks of models that were fine-tuned for a part of their steps, and probes of these."""
    own = {"loss": "ce", "mask_loss": options.mask_loss, "sparsity": options.sparsity}
    points = [learned(context, own, until=share) for share in sorted(set(options.shares))]
    cells = [cell for point in points for cell in _cells(point)]
    before: dict[tuple[int, int], Cell] = {}  # (preset or rung, seed) → the probe of the point before
    for point in points if options.probes else ():
        for rung, (_, found) in enumerate(point):
            for one in found:
                before[rung, one.seed] = plan_probe(one, before.get((rung, one.seed)))
                cells.append(before[rung, one.seed])
    return cells


class GradualOptions(Nothing):
    """Three ways to a high sparsity."""

    sparsity: Sparsity = 0.9
    start: Sparsity = 0.7
    longer: Annotated[StrictInt, Ge(2)] = 2  # times the epochs, of the third
    # of the arms that stay fixed; what rises must start soft. In few steps a hard start fails whatever the schedule
    fixed_inits: Annotated[tuple[ScoreInit, ...], Len(1)] = ("hard",)
    mask_loss: LossName = "poe"


def gradual(context: Context, options: GradualOptions) -> list[Cell]:
    """Row 11: the sparsity rises; it is fixed, at the same cost; it is fixed, and the mask trained for longer."""
    own = {"loss": "ce", "mask_loss": options.mask_loss, "sparsity": options.sparsity}
    rising = {"schedule": "cubic", "start_sparsity": options.start, "score_init": "soft"}
    epochs = {settings.search.mask_epochs for settings in context.settings("learned", own)}
    arms: list[Mapping[str, Any]] = [rising]
    for init in options.fixed_inits:
        arms += [{"score_init": init}, *({"score_init": init, "mask_epochs": options.longer * n} for n in sorted(epochs))]
    return [cell for arm in arms for cell in _cells(learned(context, own | dict(arm)))]


class ImpOptions(Nothing):
    """Chains of train, prune, rewind: against what, and where they go back to."""

    losses: Losses = ("ce", "poe")
    rewinds: Annotated[tuple[Literal["step_0", "none"], ...], Len(1)] = ("none", "step_0")  # none: pipeline a; step_0: b


def robust_imp(context: Context, options: ImpOptions) -> list[Cell]:
    """Rows 1, 3 and 4: iterative magnitude pruning; a chain's dense model and all its rounds have one loss."""
    _check_challenge(context)
    cells: list[Cell] = []
    for loss in options.losses:
        for rewind in options.rewinds:
            for settings in context.settings("imp", {"loss": loss, "rewind": rewind}):
                chains = plan_chains(context.lab, context.model, context.task, settings, context.seeds)
                cells += [cell for chain in chains for cell in chain.cells]
    return cells


def _methods(*names: str) -> Callable[[Any], Sequence[str]]:
    return lambda options: names


_LOSSES = ("loss", "mask_loss")
_MASKS = (*_LOSSES, "sparsity")
EXPERIMENTS: Mapping[str, Experiment] = {
    "full-models": Experiment("row 0a: dense models", full_models, _methods("learned"), FullOptions, ("0a",), ("loss",)),
    "pipeline-a": Experiment(
        "rows 2, 3: masks of fine-tuned models", pipeline_a, _methods("learned", "one-shot"), PipelineOptions, ("2", "3"), _MASKS
    ),
    "pipeline-b": Experiment(
        "row 5: subnetworks of the base, fine-tuned", pipeline_b, _methods("learned"), SubnetOptions, ("5",), _MASKS
    ),
    "pipeline-c": Experiment("row 6: masks of the base", pipeline_c, _methods("learned"), MaskedBaseOptions, ("6",), _MASKS),
    "oracles": Experiment(
        "rows 7, 8, 9: masks that saw challenge train rows", oracles, _methods("learned"), OracleOptions, ("7", "8", "9"), _MASKS
    ),
    "start-point": Experiment("row 10: when masks begin", start_point, _methods("learned"), StartOptions, ("10",), _MASKS),
    "gradual": Experiment(
        "row 11: rising sparsity against fixed",
        gradual,
        _methods("learned"),
        GradualOptions,
        ("11",),
        (*_MASKS, "schedule", "start_sparsity", "score_init"),
    ),
    "robust-imp": Experiment(
        "rows 1, 3, 4: train, prune, rewind", robust_imp, _methods("imp"), ImpOptions, ("1", "3", "4"), ("loss", "rewind")
    ),
}
