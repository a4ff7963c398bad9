"""What the page shows of robustness: report against challenge scores over sparsity, bias gap, groups, start points, schedules.

Each function takes an anchor and the study and returns parts, none where the store has no rows for it: a row of `build.PARTS`.
The sums are those of `tombola.study.robust_rows`.
"""

from collections.abc import Callable, Mapping, Sequence
from statistics import fmean
from typing import Any

from tombola.report import charts
from tombola.report.cases import Study
from tombola.report.charts import Curve, Point
from tombola.report.figures import Line
from tombola.report.layout import Figure, Part, Table
from tombola.report.words import NONE, interval, listed, number, of_seeds, spread
from tombola.study.presets import DEFAULT
from tombola.study.robust_rows import (
    PIPELINES,
    Arm,
    Halved,
    RobustRow,
    Summary,
    dense_models,
    halved,
    scores_start,
    summaries,
    without,
)

CSS: Mapping[str, str] = {"ce": "full", "poe": "good", "reweight": "weights", "conf-reg": "strict-bad"}  # loss → colour
LOSSES: Mapping[str, str] = {
    "ce": "cross-entropy",
    "poe": "product of experts",
    "reweight": "reweighting",
    "conf-reg": "confidence regularisation",
    "marginal": "cross-entropy of merged classes",
    "": "the largest values, nothing learned",
    "none": "never trained",
}


Value = Callable[[RobustRow], float]


def robust_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Curves over sparsity of every pipeline, the bias gap, all numbers as a table, and whether the gap was halved."""
    rows = study.results.robust
    if not rows:
        return ()
    every = summaries(rows)
    lead = (
        "Solid: report rows, of the distribution that was trained on; dashed: challenge rows, where the shortcut is wrong. "
        "Lines: the dense model trained with cross-entropy. Bands: one std over seeds."
    )
    parts = [
        Part(
            f"{anchor}-curves",
            "In distribution and out of it",
            "What is left of the shortcut?",
            lead,
            legend=_legend(rows),
            figures=_by_task(rows, _scores_of),
            **_placed(_table(every, study)),
            cells=_cells(rows),
        ),
        Part(
            f"{anchor}-gap",
            "Bias gap",
            "How far apart are the two?",
            "Report score minus challenge score, within each seed. A mask that answers by chance has no gap either: read it "
            "beside the share of the dense model’s report score that is kept.",
            legend=_legend(rows),
            figures=_by_task(rows, _gaps_of),
            **_placed(*_verdicts(halved(rows), study)),
            cells=_cells(rows),
            all_seeds=True,
        ),
    ]
    if of_tokens := [row for row in rows if "perplexity" in row.scores["report"]]:
        parts.append(
            Part(
                f"{anchor}-perplexity",
                "Perplexity",
                "How sure is it of what comes next?",
                "Solid: report rows; dashed: challenge rows. Lower is better; 1 = sure of every token.",
                legend=_legend(of_tokens),
                figures=_by_task(of_tokens, _perplexities_of),
                cells=_cells(of_tokens),
            )
        )
    return tuple(parts)


def robust_verdict(study: Study) -> str:
    """Of the masks of fine-tuned models, by what they were learned against, how many halve the bias gap; "" of none."""
    mine = [
        one
        for one in halved(study.results.robust)
        if (one.arm.how, one.arm.pipeline, one.arm.begun_at, one.arm.oracle) == ("learned", "a", 1.0, False)
    ]
    by_loss: dict[str, list[Halved]] = {}
    for one in mine:
        if one.cut.value is not None:
            by_loss.setdefault(one.arm.mask_loss, []).append(one)
    if mine and not by_loss:
        return "The dense models have no bias gap here, or are not there: there is none to cut."
    said = [f"{sum(one.holds for one in of)} of {len(of)} against {LOSSES.get(loss, loss)}" for loss, of in by_loss.items()]
    text = "Masks learned on fine-tuned models that cut the bias gap by half or more, at no more than 5 % of the report score:"
    return f"{text} {listed(said)}." if said else ""


def group_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Subgroups of the challenge rows, an arm a line."""
    every = [one for one in summaries(study.results.robust) if one.groups]
    if not every:
        return ()
    names = list(dict.fromkeys(name for one in every for name in one.groups))
    common = _common(study.results.robust)
    table = Table(
        "Accuracy on groups of the challenge rows: mean ± std over seeds",
        ("Task", *_HEAD, *names, "Seeds"),
        tuple(
            (
                _title(study, one.arm),
                *_said(one.arm, common),
                *(spread(one.groups[name]) if name in one.groups else NONE for name in names),
                str(len(one.seeds)),
            )
            for one in every
        ),
        _told(common).strip(),
        stubs=5,
        tasks=tuple(_of_filter(study, one.arm) for one in every),
    )
    part = Part(
        f"{anchor}-groups", "Groups", "Which challenge rows are lost?", **_placed(table), cells=_cells(study.results.robust)
    )
    return (part,)


def start_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Row 10 of the paper: masks that began after a part of fine-tuning, over that part and over all steps."""
    by_curve: dict[Arm, list[RobustRow]] = {}
    for row in study.results.robust:
        if row.arm.how == "learned" and row.arm.pipeline in ("a", "c") and not row.arm.oracle:
            whole = {"pipeline": "a", "weight_loss": "ce"}
            by_curve.setdefault(without(row.arm, "begun_at", "epochs", **whole), []).append(row)
    found = {arm: rows for arm, rows in by_curve.items() if len({row.arm.begun_at for row in rows}) > 2}
    if not found:
        return ()
    figures = []
    for arm, rows in found.items():
        for name, place, label in (("fine-tuning done", _begun, "% of fine-tuning"), ("all steps", _steps, "optimizer steps")):
            curves = _pair(rows, place, CSS.get(arm.mask_loss, "other"))
            percent = place is _begun
            said = f"{_title(study, arm)}, mask at {arm.sparsity:.0%} against {LOSSES.get(arm.mask_loss, arm.mask_loss)}: {name}"
            svg = charts.curve_chart(curves, [], label=said, x_label=label, percent=percent)
            figures.append(Figure(said, svg, "", natural=True, task=_of_filter(study, arm)))
    return (
        Part(
            f"{anchor}-start",
            "Start point",
            "When can mask training begin?",
            "Solid: report rows; dashed: challenge rows. At 0 the base with a head that was only drawn.",
            figures=(tuple(figures),),
            experiment="start-point",
            cells=tuple(row.cell for rows in found.values() for row in rows),
        ),
    )


def schedule_parts(anchor: str, study: Study) -> tuple[Part, ...]:
    """Row 11 of the paper: sparsity that rises against sparsity that is fixed, at what cost."""
    every = [one for one in summaries(study.results.robust) if one.arm.how == "learned" and one.arm.pipeline == "a"]

    def place(arm: Arm) -> Arm:
        return without(scores_start(arm)[1], "schedule", "mask_epochs")

    places = {place(one.arm) for one in every if one.arm.schedule != "fixed"}
    mine = [one for one in every if place(one.arm) in places]
    if not mine:
        return ()
    table = Table(
        "Schedules of sparsity: mean ± std over seeds",
        (
            *("Task", "Mask against", "Sparsity", "Schedule", "Scores start", "Mask epochs"),
            *("Report", "Challenge", "Steps", "TFLOPs", "Seeds"),
        ),
        tuple(
            (
                _title(study, one.arm),
                LOSSES.get(one.arm.mask_loss, one.arm.mask_loss),
                f"{one.arm.sparsity:.0%}",
                one.arm.schedule,
                scores_start(one.arm)[0],
                str(one.arm.mask_epochs),
                spread(one.report),
                spread(one.challenge),
                f"{one.steps:,}",
                number(one.flops / 1e12, 1),
                str(len(one.seeds)),
            )
            for one in mine
        ),
        stubs=5,
        tasks=tuple(_of_filter(study, one.arm) for one in mine),
    )
    part = Part(f"{anchor}-schedule", "Schedules", "Is it better to rise?", tables=(table,), experiment="gradual")
    return (part,)


# ---------------------------------------------------------------------------------------------------------------- drawing


def _by_task(
    rows: Sequence[RobustRow], curves: Callable[[Sequence[RobustRow], Sequence[RobustRow]], tuple[list[Curve], list[Line]]]
) -> tuple[tuple[Figure, ...], ...]:
    """A line of figures for each model and task, one figure a pipeline."""
    found = []
    for model, task in dict.fromkeys((row.arm.model, row.arm.task) for row in rows):
        here = [row for row in rows if (row.arm.model, row.arm.task) == (model, task)]
        dense = list(dense_models(here).values())
        drawn = []
        for pipeline, name in PIPELINES.items():
            mine = [row for row in here if row.arm.pipeline == pipeline and pipeline != "full" and _ordinary(row.arm)]
            if mine:
                made, lines = curves(mine, dense)
                said = f"{task}, {name}"
                svg = charts.curve_chart(
                    made, lines, label=f"{said}; the table has the numbers", x_label="% removed", percent=True
                )
                drawn.append(Figure(said, svg, "", natural=True, task=task))
        if drawn:
            found.append(tuple(drawn))
    return tuple(found)


def _ordinary(arm: Arm) -> bool:
    """Whether an arm is a point over sparsity, and not over start points or schedules."""
    return arm.schedule == "fixed" and arm.begun_at in (0.0, 1.0)


def _curves_of(rows: Sequence[RobustRow]) -> dict[Arm, list[RobustRow]]:
    found: dict[Arm, list[RobustRow]] = {}
    for row in rows:
        found.setdefault(without(row.arm, "sparsity", "mask_epochs"), []).append(row)
    return found


def _css(arm: Arm) -> str:
    if arm.oracle:
        return "bad"
    if arm.how not in ("learned", "imp"):
        return "random"
    return CSS.get(arm.weight_loss if arm.pipeline == "b" else arm.mask_loss, "other")


def _scores_of(rows: Sequence[RobustRow], dense: Sequence[RobustRow]) -> tuple[list[Curve], list[Line]]:
    return _both_of(rows, dense, _report, _challenge)


def _perplexities_of(rows: Sequence[RobustRow], dense: Sequence[RobustRow]) -> tuple[list[Curve], list[Line]]:
    report, challenge = (lambda row, role=role: row.scores[role]["perplexity"] for role in ("report", "challenge"))
    return _both_of(rows, dense, report, challenge)


def _both_of(
    rows: Sequence[RobustRow], dense: Sequence[RobustRow], report: Value, challenge: Value
) -> tuple[list[Curve], list[Line]]:
    """Curves over sparsity of two values of each row, solid and dashed, and lines of the dense models' means."""
    curves = [curve for arm, mine in _curves_of(rows).items() for curve in _pair(mine, _sparsity, _css(arm), report, challenge)]
    lines = []
    if dense:
        lines = [
            Line("full", "dense, report", fmean(report(row) for row in dense)),
            Line("full", "dense, challenge", fmean(challenge(row) for row in dense)),
        ]
    return curves, lines


def _gaps_of(rows: Sequence[RobustRow], dense: Sequence[RobustRow]) -> tuple[list[Curve], list[Line]]:
    curves = [Curve(_css(arm), _points(mine, _sparsity, lambda row: row.gap)) for arm, mine in _curves_of(rows).items()]
    return curves, [Line("full", "dense", fmean(row.gap for row in dense))] if dense else []


def _points(rows: Sequence[RobustRow], place: Callable[[RobustRow], float], value: Callable[[RobustRow], float]) -> list[Point]:
    by_place: dict[float, dict[int, float]] = {}
    for row in rows:
        by_place.setdefault(place(row), {})[row.seed] = value(row)
    return [
        Point(at, by_seed, f"{at:g}: {number(fmean(by_seed.values()))}, {len(by_seed)} seeds")
        for at, by_seed in sorted(by_place.items())
    ]


def _report(row: RobustRow) -> float:
    return row.scores["report"][row.metric]


def _challenge(row: RobustRow) -> float:
    return next(iter(row.scores["challenge"].values()))


def _pair(
    rows: Sequence[RobustRow],
    place: Value,
    css: str,
    report: Value = _report,
    challenge: Value = _challenge,
) -> list[Curve]:
    return [Curve(css, _points(rows, place, report)), Curve(css, _points(rows, place, challenge), dashed=True)]


def _sparsity(row: RobustRow) -> float:
    return row.arm.sparsity


def _begun(row: RobustRow) -> float:
    return row.arm.begun_at


def _steps(row: RobustRow) -> float:
    return float(row.steps)


def _legend(rows: Sequence[RobustRow]) -> tuple[tuple[str, str], ...]:
    """Colours of what is there: in pipeline b what weights were trained against, else masks."""
    found = dict.fromkeys(
        (_css(row.arm), "an oracle" if row.arm.oracle else LOSSES.get(_loss_of(row.arm), _loss_of(row.arm)))
        for row in rows
        if row.arm.pipeline != "full"
    )
    return tuple(found)


def _loss_of(arm: Arm) -> str:
    return arm.weight_loss if arm.pipeline == "b" else arm.mask_loss


# ----------------------------------------------------------------------------------------------------------------- tables

_HEAD = ("Pipeline", "Mask against", "Weights against", "Sparsity")
NAMES: Mapping[str, str] = {name: "dense" if name == "full" else name for name in PIPELINES}
_PIPELINES = "Pipelines: " + "; ".join(said for name, said in PIPELINES.items() if name != "full") + "."
LONG = 16  # lines: a longer table opens on demand


def _common(rows: Sequence[RobustRow]) -> frozenset[str]:
    """Settings that every mask here was learned with, and of bias-only models those that all of them share: told once, below."""
    every = [frozenset(row.arm.options.split(", ")) for row in rows if row.arm.how == "learned"]
    of_bias = {
        one for row in rows for one in row.arm.options.split(", ") if one.startswith(("bias_model", "bias_vec", "bias_pri"))
    }
    alike = {one for one in of_bias if sum(other.partition("=")[0] == one.partition("=")[0] for other in of_bias) == 1}
    epochs = {_mask_epochs(row.arm) for row in rows if row.arm.mask_epochs}
    return (frozenset.intersection(*every) - {""} if every else frozenset()) | alike | (epochs if len(epochs) == 1 else set())


def _mask_epochs(arm: Arm) -> str:
    return f"{arm.mask_epochs} epochs of the mask"


def _told(common: frozenset[str]) -> str:
    return f" Throughout: {', '.join(sorted(common))}." if common else ""


def _said(arm: Arm, common: frozenset[str]) -> tuple[str, str, str, str]:
    mask = LOSSES.get(arm.mask_loss, arm.mask_loss) if arm.pipeline != "full" else NONE
    mask += ", rounds" if arm.how == "imp" else ""
    mask += ", oracle" if arm.oracle else ""
    mask += f", {arm.schedule}" if arm.schedule != "fixed" else ""
    mask += f", {_mask_epochs(arm)}" if arm.mask_epochs and _mask_epochs(arm) not in common else ""
    mask += f", begun at {arm.begun_at:.0%}" if 0 < arm.begun_at < 1 else ""
    weights = LOSSES.get(arm.weight_loss, arm.weight_loss)
    weights += f", {arm.epochs} epochs" if arm.pipeline == "full" else ""
    own = "".join(f", {one}" for one in arm.options.split(", ") if one and one not in common)
    preset = f", {arm.preset}" if arm.preset not in ("", DEFAULT) else ""
    mask, weights = (mask, weights + own) if arm.pipeline == "full" else (mask + preset + own, weights)
    return NAMES[arm.pipeline], mask, weights, NONE if arm.pipeline == "full" else f"{arm.sparsity:.0%}"


def _table(every: Sequence[Summary], study: Study) -> Table:
    rows = study.results.robust
    by_arm: dict[Arm, list[RobustRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    others, common = list(dict.fromkeys(name for one in every for name in one.others)), _common(rows)
    apart = any(one.sides_apart.value is not None for one in every)
    n = {role: sorted({one.n[role] for one in every}) for role in ("report", "challenge")}
    return Table(
        "Report and challenge scores: mean ± std over seeds, 95 % interval of the mean",
        (
            *("Task", *_HEAD, "Report", "95 %", "Challenge", "95 %", "Bias gap", "Report kept", "Calibration error", "As dense"),
            *(("Aligned − conflicting",) if apart else ()),
            *(name.capitalize().replace("_", " ") for name in others),
            *("Steps", "TFLOPs", "Seeds"),
        ),
        tuple(
            (
                _title(study, one.arm),
                *_said(one.arm, common),
                of_seeds({row.seed: _report(row) for row in by_arm[one.arm]}),
                interval(one.report),
                of_seeds({row.seed: _challenge(row) for row in by_arm[one.arm]}),
                interval(one.challenge),
                spread(one.gap),
                number(one.kept.value, 2),
                spread(one.calibration),
                spread(one.agreement),
                *((spread(one.sides_apart),) if apart else ()),
                *(spread(one.others[name]) if name in one.others else NONE for name in others),
                f"{one.steps:,}",
                number(one.flops / 1e12, 1),
                str(len(one.seeds)),
            )
            for one in every
        ),
        f"{_PIPELINES} Report rows: {_sizes(n['report'])}; challenge rows: {_sizes(n['challenge'])}. "
        "Report kept: share of the dense model’s. As dense: share of challenge rows answered as the dense model of the seed does "
        "(of pipeline c: the base with a drawn head). Aligned − conflicting: score where the shortcut is right minus score "
        "where it is wrong, of report and challenge rows together. Calibration error: on report rows, 15 bins. Steps and FLOPs: "
        "of all that the model stands on." + _told(common),
        stubs=5,
        tasks=tuple(_of_filter(study, one.arm) for one in every),
    )


def _sizes(found: Sequence[int]) -> str:
    return ", ".join(f"{n:,}" for n in found)


def _verdicts(found: Sequence[Halved], study: Study) -> list[Table]:
    """One table of the masks that do it, and one of the others."""
    common = _common(study.results.robust)
    tables = []
    for holds, caption in (
        (True, "These cut the bias gap of the dense model by half or more, at no more than 5 % of its report score"),
        (False, "These do not"),
    ):
        mine = [one for one in found if one.holds == holds]
        table = Table(
            caption,
            ("Task", *_HEAD, "Gap cut by", "95 %", "Report kept", "Cut, of dense as long", "95 %", "Seeds"),
            tuple(
                (
                    _title(study, one.arm),
                    *_said(one.arm, common),
                    spread(one.cut, 2),
                    interval(one.cut),
                    spread(one.kept, 2),
                    spread(one.cut_as_long, 2),
                    interval(one.cut_as_long),
                    str(one.seeds),
                )
                for one in mine
            ),
            "By the means over seeds. Cut by: share of the gap that the dense model of the same seed has; 1 = no gap left, more "
            "= reversed. Of dense as long: of the gap that a dense model has which trained for as many steps as dense model and "
            "mask together (experiment full-models): what more training does by itself is not counted." + _told(common),
            stubs=5,
            tasks=tuple(_of_filter(study, one.arm) for one in mine),
        )
        tables += [table] if mine else []
    return tables


def _placed(*tables: Table) -> dict[str, Any]:
    """Fields of a part: short tables in sight, long ones on demand."""
    return {
        "tables": tuple(one for one in tables if len(one.rows) <= LONG),
        "fold": "The numbers",
        "folded": tuple(one for one in tables if len(one.rows) > LONG),
    }


def _title(study: Study, arm: Arm) -> str:
    models = {row.arm.model for row in study.results.robust}
    return arm.task if len(models) == 1 else f"{arm.task}, {arm.model}"


def _of_filter(study: Study, arm: Arm) -> str:
    """The task of an arm as the page's filter knows it."""
    short = arm.task.partition(":")[0]
    return arm.task if arm.task in study.tasks else short if short in study.tasks else ""


def _cells(rows: Sequence[RobustRow]) -> tuple[str, ...]:
    return tuple(sorted({row.cell for row in rows}))
