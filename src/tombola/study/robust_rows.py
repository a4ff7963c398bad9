"""What cells say of robustness: of each model its scores on report and challenge rows, and how it came to be.

`robust_row` reads one cell, `summaries` averages rows over seeds. Source: Liu et al. 2022, its figures 3 to 7 as tables.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from tombola import stats
from tombola.canonical import fingerprint
from tombola.stats.estimate import Estimate
from tombola.study.cells import Cell, read_json, read_rows
from tombola.study.presets import DEFAULT
from tombola.study.settings import resolve
from tombola.study.variants import bias_of, short_names

PIPELINES: Mapping[str, str] = {
    "full": "dense models",
    "a": "a: a fine-tuned model, masked",
    "b": "b: a subnetwork of the base, fine-tuned",
    "c": "c: the base, masked",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """How a model came to be: what rows must share to be seeds of one another."""

    model: str
    task: str
    pipeline: str  # of PIPELINES
    how: str  # what found the mask: learned | imp | a criterion (magnitude), with "global" where matrices compete; "" of dense
    mask_loss: str  # what the mask was found against; "" where nothing was learned
    weight_loss: str  # what the weights were trained against last; of c "none"
    sparsity: float  # asked for; 0 of dense models
    oracle: bool  # the mask saw challenge train rows
    begun_at: float  # share of fine-tuning after which the mask began; 1 of most, 0 of c
    schedule: str  # of the sparsity; "fixed" of most
    mask_epochs: int  # 0 where nothing was learned
    epochs: int  # of the weights, last; 0 of c
    options: str  # other settings that are not as the preset has them (of dense models: as `corrected`), "name=value, …"
    run: str  # of rows and of all other settings of training: a fingerprint; arms of different ones are never compared
    preset: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RobustRow:
    """One model: an arm and a seed, with all that is measured of it."""

    cell: str
    arm: Arm
    seed: int
    scores: Mapping[str, Mapping[str, float]]  # role → metric → value
    rows: Mapping[str, int]  # role → rows it was scored on
    splits: Mapping[str, str]  # role → name of its split
    majority: Mapping[str, float]  # role → what the most frequent class would score
    groups: Mapping[str, float]  # subgroup of challenge rows → accuracy, or exact match
    # likewise of all report and challenge rows where the shortcut is right, and where it is wrong; of rows that say which
    sides: Mapping[str, float]  # "aligned" and "conflicting" → score
    calibration: Mapping[str, float]  # role → expected calibration error, in [0, 1]
    agreement: Mapping[str, float]  # role → share of rows answered as the dense model does; empty of that
    answers: Mapping[str, float]  # class → share of challenge rows that get it
    steps: int  # optimizer steps that it took, of weights and of masks, all that it stands on included
    flops: float  # by formula, likewise

    @property
    def metric(self) -> str:
        return next(iter(self.scores["report"]))

    @property
    def gap(self) -> float:
        """Report minus challenge, of the first metric of each: the share of answers that are owed to the bias, about."""
        return self.scores["report"][self.metric] - next(iter(self.scores["challenge"].values()))

    @property
    def sides_apart(self) -> float | None:
        """Score where the shortcut is right minus score where it is wrong: the bias gap, whatever share of rows is which."""
        return self.sides["aligned"] - self.sides["conflicting"] if len(self.sides) == len(SIDES) else None


SIDES = ("aligned", "conflicting")  # as the groups of written and marked rows begin


def robust_rows(cells: Mapping[str, Cell], folders: Mapping[str, Path]) -> tuple[RobustRow, ...]:
    """The rows of finished cells, by key, where any of them was learned or trained against a bias; else none.

    Tasks have their short names where these tell them apart.
    """
    if not any(cell.settings.get("method") == "learned" or "loss" in cell.settings for cell in cells.values()):
        return ()
    found = [row for key in sorted(cells) if (row := robust_row(cells[key], folders[key], folders)) is not None]
    names = short_names(row.arm.task for row in found)
    found = [replace(row, arm=replace(row.arm, task=names[row.arm.task])) for row in found]
    return tuple(sorted(found, key=lambda row: (*_place(row.arm), row.seed)))


def robust_row(cell: Cell, folder: Path, folders: Mapping[str, Path]) -> RobustRow | None:
    """The row of one finished cell; None for one that scores no model of the paper's pipelines, or has no challenge rows.

    folders: key → folder of the cells that it stands on, as far as they are there; what is not there costs nothing.
    """
    arm = _arm(cell)
    if arm is None or not (folder / "scores.jsonl").is_file():
        return None
    lines = read_rows(folder / "scores.jsonl")
    by_role: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_role.setdefault(line["role"], []).append(line)
    if not {"report", "challenge"} <= by_role.keys():
        return None
    steps, flops = _cost(cell, {**folders, cell.key: folder})
    groups = read_rows(folder / "subgroups.jsonl")
    first = {role: of[0] for role, of in by_role.items()}
    agreed = {role: one["agreement"] for role, one in first.items() if one["agreement"] and one["agreement"]["flips"] is not None}
    counts = agreed["challenge"]["counts"] if "challenge" in agreed else {}
    return RobustRow(
        cell=cell.key,
        arm=arm,
        seed=cell.settings["seeds"]["run"],
        scores={role: {one["metric"]: one["value"] for one in of} for role, of in by_role.items()},
        rows={role: one["n"] for role, one in first.items()},
        splits={role: one["split"] for role, one in first.items()},
        majority={role: one["majority"] for role, one in first.items()},
        groups={one["group"]: one["value"] for one in groups if one["role"] == "challenge"},
        sides=_sides([one for one in groups if one["role"] != "selection"]),
        calibration=_calibration(folder),
        agreement={role: 1 - one["flips"] / one["n"] for role, one in agreed.items()},
        answers={name: n / sum(counts.values()) for name, n in counts.items()} if counts else {},
        steps=steps,
        flops=flops,
    )


def _sides(groups: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The score of each side over its groups, by their rows; nothing where a side has none."""
    found = {}
    for side in SIDES:
        mine = [one for one in groups if str(one["group"]).partition("/")[0] == side]
        if mine:
            found[side] = sum(one["value"] * one["n"] for one in mine) / sum(one["n"] for one in mine)
    return found if len(found) == len(SIDES) else {}


def _arm(cell: Cell) -> Arm | None:
    settings = cell.settings
    if cell.step not in ("fine_tune", "evaluate", "retrain", "round") or "data" not in settings:
        return None
    below = {one.key: one for one in cell.needed()}.values()
    if any("design" in one.settings or one.step in ("control", "derive", "base_mask") for one in below):
        return None
    searches = [one for one in below if one.step == "search"]
    said: dict[str, Any] = {
        "model": settings["model"]["name"],
        "task": str(settings["data"]["task"]),
        "epochs": settings["train"]["epochs"] if "train" in settings else 0,
        "run": _run(cell),
    }
    nothing: dict[str, Any] = {
        **{"how": "", "mask_loss": "", "sparsity": 0.0, "oracle": False, "begun_at": 1.0, "schedule": "fixed", "mask_epochs": 0},
        "preset": "",
        "options": "",
    }
    if cell.step == "fine_tune":
        whole = settings["train"]["epochs"] > 0 and "stretch" not in settings
        own = {"pipeline": "full", "weight_loss": _loss(cell), "options": _options(cell, "learned", DEFAULT)}
        return Arm(**said, **nothing | own) if whole else None
    if cell.step == "round":
        return _imp_arm(cell, said, nothing)
    if len(searches) != 1 or searches[0].settings["method"] not in ("learned", "one-shot"):
        return None
    (search,) = searches
    dense, options = search.inputs["model"], search.settings["search"]
    if not isinstance(dense, Cell) or dense.settings["data"]["task"] != settings["data"]["task"]:
        return None
    at = _begun(dense)
    learned = search.settings["method"] == "learned"
    found: dict[str, Any] = nothing | {
        "how": "learned" if learned else options["criterion"] + (", global" if options["granularity"] == "global" else ""),
        "mask_loss": options["mask_loss"] if learned else "",
        "sparsity": options["sparsity"],
        "oracle": "learned_on" in search.settings,
        "begun_at": at,
        "schedule": options["schedule"] if learned else "fixed",
        "mask_epochs": options["mask_epochs"] if learned else 0,
        "preset": search.settings["preset"],
        "options": _options(cell, search.settings["method"], search.settings["preset"]),
    }
    if cell.step == "retrain":
        return Arm(**said, **found | {"pipeline": "b", "weight_loss": _loss(cell)})
    said["epochs"] = dense.settings["train"]["epochs"]
    return Arm(**said, **found | {"pipeline": "c" if at == 0 else "a", "weight_loss": "none" if at == 0 else _loss(dense)})


# settings that arms have fields for, or pipelines set
NAMED = ("sparsity", "mask_loss", "schedule", "mask_epochs", "choice_from")


def _options(cell: Cell, method: str, preset: str) -> str:
    """What the preset does not say: of the search, of a loss against a bias, and of the rows that presets choose."""
    said: dict[str, Any] = {}
    for one in cell.needed():
        said |= bias_of(one) | {name: one.settings["data"][name] for name in _OF_ROWS if name in one.settings.get("data", {})}
        said |= one.settings.get("search", {}) if method == "learned" else {}
    declared = _declared(method, preset)
    differing = (name for name in sorted(said) if name not in NAMED and said[name] != declared.get(name))
    return ", ".join(f"{name}={said[name]}" for name in differing)


_OF_ROWS = ("padding", "selection_split")


@cache
def _declared(method: str, preset: str) -> Mapping[str, Any]:
    """Every setting of a method by its name, as a preset has it."""
    groups = resolve({}, method=method, preset=preset).plain()
    return {name: value for group in groups.values() for name, value in group.items()}


def _run(cell: Cell) -> str:
    """Rows, and how weights were trained but for the epochs: of the cell, or of what it stands on."""
    train: Mapping[str, Any] = next(
        (one.settings["train"] for one in reversed(list(cell.needed())) if "train" in one.settings), {}
    )
    how = {name: value for name, value in train.items() if name not in ("epochs", "steps")}
    return fingerprint([how, dict(cell.settings["data"])])[:6]


def _imp_arm(cell: Cell, said: Mapping[str, Any], nothing: Mapping[str, Any]) -> Arm | None:
    trained = cell.inputs.get("ticket")
    if not isinstance(trained, Cell):
        return None
    options = trained.settings["search"]
    pipeline = "a" if options["rewind"] in ("none", "learning_rate_only") else "b"
    own = {"how": "imp", "mask_loss": _loss(cell), "weight_loss": _loss(cell), "sparsity": options["sparsity"]}
    return Arm(**said, **{**nothing, **own} | {"pipeline": pipeline, "preset": cell.settings["preset"]})


def _loss(cell: Cell) -> str:
    return str(cell.settings.get("loss", {}).get("loss", "ce"))


def _begun(dense: Cell) -> float:
    """The share of fine-tuning that a model has behind it."""
    if "stretch" in dense.settings:
        return float(dense.settings["stretch"]["steps"] / dense.settings["stretch"]["schedule_steps"])
    return 0.0 if dense.settings["train"]["epochs"] == 0 else 1.0


def _cost(cell: Cell, folders: Mapping[str, Path]) -> tuple[int, float]:
    from tombola.store import PROVENANCE

    steps, flops = 0, 0.0
    for key in {one.key for one in cell.needed()}:
        folder = folders.get(key)
        if folder is None:
            continue
        if (folder / "train.json").is_file():
            steps += read_json(folder / "train.json")["steps"]
        elif (folder / "result.json").is_file():
            steps += (read_json(folder / "result.json").get("train") or {}).get("steps", 0)
        if (folder / PROVENANCE).is_file():
            flops += read_json(folder / PROVENANCE).get("cost", {}).get("flops", 0.0)
    return steps, flops


def _calibration(folder: Path) -> dict[str, float]:
    """Of roles whose labels are classes of the model."""
    from tombola.evaluate import calibration_error
    from tombola.study.steps.shared import read_predictions

    found = read_predictions(folder)
    return {role: calibration_error(one) for role, one in found.items() if not one.regression and one.weights is None}


# ------------------------------------------------------------------------------------------------------------- over seeds


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """An arm over its seeds: means with their spread, and differences to the dense model of each seed."""

    arm: Arm
    seeds: tuple[int, ...]
    metric: str
    report: Estimate
    challenge: Estimate
    gap: Estimate  # report − challenge, within each seed
    gap_of_dense: Estimate  # that of the dense models of the same seeds, as `dense_models`
    gap_as_long: Estimate  # that of dense models which had as many steps, as `as_long`
    kept: Estimate  # report score as a share of that model's
    calibration: Estimate  # on the report rows
    agreement: Estimate  # with the dense model, on the challenge rows
    groups: Mapping[str, Estimate]
    sides_apart: Estimate  # score where the shortcut is right − score where it is wrong, of rows that say which
    others: Mapping[str, Estimate]  # "role, metric" → other metrics of the report and challenge rows
    n: Mapping[str, int]
    steps: int
    flops: float


def summaries(rows: Sequence[RobustRow]) -> list[Summary]:
    """One for each arm, in the order of pipelines, losses and sparsities."""
    dense, longer = dense_models(rows), as_long(rows)
    by_arm: dict[Arm, list[RobustRow]] = {}
    for row in rows:
        by_arm.setdefault(row.arm, []).append(row)
    return [_summary(arm, by_arm[arm], dense, longer) for arm in sorted(by_arm, key=_place)]


Run = tuple[str, str, str, int]  # (model, task, run, seed)


def dense_models(rows: Iterable[RobustRow]) -> dict[Run, RobustRow]:
    """The dense model trained with cross-entropy of each run: of several numbers of epochs the one that masks of pipeline a
    stand on, else the most."""
    rows = list(rows)
    stood_on = {(_of(row), row.arm.epochs) for row in rows if row.arm.pipeline == "a"}
    order = sorted(_full(rows), key=lambda row: ((_of(row), row.arm.epochs) in stood_on, row.arm.epochs))
    return {_of(row): row for row in order}


def as_long(rows: Iterable[RobustRow]) -> dict[str, RobustRow]:
    """Cell of a model with a mask → the dense model of its run, trained with cross-entropy, that had as many steps or, of those
    that had more, the fewest. Beside it a gap is the mask's own doing: the rest is what more training does."""
    rows = list(rows)
    full: dict[Run, list[RobustRow]] = {}
    for one in sorted(_full(rows), key=lambda row: row.steps):
        full.setdefault(_of(one), []).append(one)
    masked = (row for row in rows if row.arm.pipeline != "full")
    found = {row.cell: next((one for one in full.get(_of(row), ()) if one.steps >= row.steps), None) for row in masked}
    return {cell: one for cell, one in found.items() if one is not None}


def _full(rows: Iterable[RobustRow]) -> list[RobustRow]:
    return [row for row in rows if row.arm.pipeline == "full" and row.arm.weight_loss == "ce"]


def _of(row: RobustRow) -> Run:
    return (row.arm.model, row.arm.task, row.arm.run, row.seed)


def _summary(arm: Arm, unsorted: Iterable[RobustRow], dense: Mapping[Run, RobustRow], longer: Mapping[str, RobustRow]) -> Summary:
    rows = sorted({row.seed: row for row in unsorted}.values(), key=lambda row: row.seed)
    full = [dense.get(_of(row)) for row in rows]
    there = [(row, one) for row, one in zip(rows, full, strict=True) if one is not None]
    metric = rows[0].metric

    def over(values: Iterable[float]) -> Estimate:
        return stats.over_seeds(list(values))

    return Summary(
        arm=arm,
        seeds=tuple(row.seed for row in rows),
        metric=metric,
        report=over(row.scores["report"][metric] for row in rows),
        challenge=over(next(iter(row.scores["challenge"].values())) for row in rows),
        gap=over(row.gap for row in rows),
        gap_of_dense=over(one.gap for _, one in there),
        gap_as_long=over(longer[row.cell].gap for row in rows if row.cell in longer),
        kept=over(
            row.scores["report"][metric] / one.scores["report"][metric] for row, one in there if one.scores["report"][metric]
        ),
        calibration=over(row.calibration["report"] for row in rows if "report" in row.calibration),
        agreement=over(row.agreement["challenge"] for row in rows if "challenge" in row.agreement),
        groups={name: over(row.groups[name] for row in rows if name in row.groups) for name in rows[0].groups},
        sides_apart=over(row.sides_apart for row in rows if row.sides_apart is not None),
        others={
            f"{role}, {name}": over(row.scores[role][name] for row in rows)
            for role in ("report", "challenge")
            for name in list(rows[0].scores[role])[1:]
        },
        n=rows[0].rows,
        steps=max(row.steps for row in rows),
        flops=max(row.flops for row in rows),
    )


def _place(arm: Arm) -> tuple[Any, ...]:
    order = list(PIPELINES).index(arm.pipeline)
    return (arm.model, arm.task, order, arm.oracle, arm.how, arm.weight_loss, arm.mask_loss, arm.begun_at, arm.schedule,
            arm.mask_epochs, arm.epochs, arm.sparsity, arm.preset, arm.options, arm.run)  # fmt: skip


def without(arm: Arm, *names: str, **others: Any) -> Arm:
    """The same arm with the fields named as in an ordinary run, and others set so: what shares a curve."""
    usual: dict[str, Any] = {"sparsity": 0.0, "begun_at": 1.0, "schedule": "fixed", "mask_epochs": 0, "epochs": 0}
    return replace(arm, **{name: usual[name] for name in names}, **others)


def scores_start(arm: Arm) -> tuple[str, Arm]:
    """Where the scores of a learned mask start ("hard", "soft", …), and the arm as it is whatever they start at."""
    said = [one for one in arm.options.split(", ") if one]
    own = [one.partition("=")[2] for one in said if one.startswith("score_init=")]
    rest = ", ".join(one for one in said if not one.startswith("score_init="))
    return (own or [str(_declared("learned", arm.preset)["score_init"])])[0], replace(arm, options=rest)


# ------------------------------------------------------------------------------------------------- the verdict asked for


@dataclass(frozen=True, slots=True)
class Halved:
    """Whether masks of an arm cut the bias gap of the dense model by half, at no more than 5 % of its report score."""

    arm: Arm
    seeds: int
    cut: Estimate  # share of the dense model's gap that is gone, within each seed
    cut_as_long: Estimate  # the same of a dense model that had as many steps, as `as_long`
    kept: Estimate  # report score as a share of the dense model's
    holds: bool  # of cut and kept


def halved(rows: Sequence[RobustRow], *, cut: float = 0.5, kept: float = 0.95) -> list[Halved]:
    """The criterion of the reproduction's list (8.1), for all arms with a mask: by their means, however few the seeds.

    Seeds whose dense model has no gap say nothing, and are left out.
    """
    found, dense, longer = list[Halved](), dense_models(rows), as_long(rows)
    for one in summaries(rows):
        if one.arm.pipeline == "full":
            continue
        mine = [row for row in rows if row.arm == one.arm]
        share = _cut((row.gap, dense[_of(row)].gap) for row in mine if _of(row) in dense)
        share_as_long = _cut((row.gap, longer[row.cell].gap) for row in mine if row.cell in longer)
        holds = share.value is not None and one.kept.value is not None and share.value >= cut and one.kept.value >= kept
        found.append(Halved(one.arm, share.n_seeds, share, share_as_long, one.kept, holds))
    return found


def _cut(gaps: Iterable[tuple[float, float]]) -> Estimate:
    return stats.over_seeds([1 - mine / of_dense for mine, of_dense in gaps if of_dense > 0])


def as_records(rows: Sequence[RobustRow]) -> list[dict[str, Any]]:
    """The rows as JSON, an object each."""
    return [asdict(row) for row in rows]
