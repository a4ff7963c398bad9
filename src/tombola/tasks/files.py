"""Your own data: a task made of files, or of any data set of the Hub.

`files_task` reads the files, `hub_task` a data set pinned to a commit; both give a `Task` that holds its rows. It is named
by what is in it (`spec_of`), never by a path: the same rows in another file are the same task, and a changed file is another.
"""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from tombola.errors import DataError, SettingsError, TombolaError
from tombola.tasks.base import CLASS_METRICS, REGRESSION_METRICS, Loaded, Role, Rows, Task, shared_texts
from tombola.tasks.checks import Problems, good_rows, near, told
from tombola.tasks.readers import kind_of, read_rows, shortest

MANY_CLASSES = 20  # more of them, and more than half as many as rows: that is no column of classes
HUB = re.compile(r"hub:(?P<repo>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^:@#]+))?(?:@(?P<revision>[^:@#]+))?")


@dataclass(frozen=True, slots=True)
class _Read:
    """The rows of one split as they came, with what is wrong so far."""

    where: str
    rows: Sequence[tuple[int, Mapping[str, object]]]
    problems: Problems


def files_task(
    *,
    train: Path | str,
    validation: Path | str,
    test: Path | str | None = None,
    text: str | Sequence[str],
    label: str,
    regression: bool = False,
    metric: str | None = None,
) -> Task:
    """The task of these files: CSV, TSV, JSON Lines or parquet, each also gzipped, UTF-8.

    text        one or two columns the model reads ("a" or "a,b", or a sequence)
    label       the column of the answer: class names or whole numbers, or numbers with `regression`
    test        with it, scores are reported on these rows and `selection_split="validation"` chooses masks on the
                validation rows; without, scores are reported on the validation rows
    metric      accuracy, matthews or f1 (of the second of two classes); with `regression` pearson or spearman

    Classes are named as they stand, sorted by name (whole numbers by value), the same for all files. Rows are named
    `split:number`, counted from 1 without a header.
    Raises: SettingsError with all wrong settings; DataError with everything that is wrong in the files.
    """
    columns = _words(text)
    given = {"train": train, "validation": validation} | ({} if test is None else {"test": test})
    paths = {split: Path(path) for split, path in given.items()}
    problems = _wrong_settings(columns, label, regression, metric)
    if len({path.resolve() for path in paths.values()}) < len(paths):
        problems.append(TombolaError("a file serves twice", got=_listed(paths), expected="a file of its own for each split"))
    if absent := {split: path for split, path in paths.items() if not path.is_file()}:
        problems.append(TombolaError("there are no such files", got=_listed(absent), expected="files that exist"))
    if problems:
        raise SettingsError(problems)
    for path in paths.values():
        kind_of(path)
    read = {}
    for split, path in paths.items():
        faults: Problems = {}
        read[split] = _Read(str(path), list(read_rows(path, (*columns, label), faults)), faults)
    roles: dict[Role, str] = {"train": "train", "report": "validation" if test is None else "test"}
    if test is not None:
        roles["selection"] = "validation"
    return _made("files", roles, read, columns, label, regression, metric, None, {}, ())


def hub_task(
    spec: str,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    regression: bool = False,
    metric: str | None = None,
    train: str | None = None,
    validation: str | None = None,
    test: str | None = None,
) -> Task:
    """The task of a Hub data set, "hub:<name>[:config][@revision]", pinned to the commit that the revision is now.

    `train`, `validation` and `test` name splits; without, those of these names (and "test" is reported where there is no
    "validation"). Columns that are not given are guessed where only one guess is possible; `Task.doubts` says so.
    Raises: SettingsError for wrong settings; DataError when the data set cannot be had, or for all that is wrong in it.
    """
    found = HUB.fullmatch(spec)
    if found is None:
        raise DataError("this names no Hub data set", got=repr(spec), expected="hub:<name>[:config][@revision]")
    repo, config = found["repo"], found["config"]
    revision = _pinned(spec, repo, found["revision"])
    data = _downloaded(spec, repo, config, revision)
    said: list[str] = []
    roles = _roles(spec, list(data), train, validation, test, said)
    features = data[roles["train"]].features
    columns, target = _columns(spec, features, _words(text or ()), label, said)
    if problems := _wrong_settings(columns, target, regression, metric):
        raise SettingsError(problems)
    feature = features.get(target)
    names = None if regression else getattr(feature, "names", None)
    read = {}
    for split in roles.values():
        there = [name for name in (*columns, target) if name in data[split].features]
        rows = enumerate(data[split].select_columns(there), start=1)
        numbered = [(n, dict(row) | ({target: _hub_label(row[target], feature)} if target in row else {})) for n, row in rows]
        read[split] = _Read(f"split {split!r} of {spec}", numbered, {})
    described = {"repo": repo, "config": config, "revision": revision}
    name = f"hub:{repo}" + (f":{config}" if config else "")
    return _made(name, roles, read, columns, target, regression, metric, names, described, said)


def described_task(description: Mapping[str, Any]) -> Task:
    """The Hub data set that a cell or ticket describes, read again at its commit."""
    known = description
    name = f"hub:{known['repo']}" + (f":{known['config']}" if known["config"] else "") + f"@{known['revision']}"
    splits = {role: known["splits"][role] for role in known["splits"]}
    own = splits.get("selection")
    return hub_task(
        name, text=known["text"], label=known["label"], regression=len(known["labels"]) == 1, metric=known["metric"],
        train=splits["train"], validation=own or splits["report"], test=splits["report"] if own else None,
    )  # fmt: skip


def spec_of(task: Task) -> str:
    """What a cell calls a task that holds its rows: its name and a fingerprint of answers, metric and every row."""
    assert isinstance(task.source, Loaded)
    rows = {role: [one.ids, one.texts, one.labels] for role, split in task.splits.items() for one in (task.source.rows[split],)}
    said = [task.labels, task.metric, sorted(rows.items()), *([asdict(task.prompt)] if task.prompt else [])]
    content = json.dumps(said, separators=(",", ":"))
    return f"{task.name}#{sha256(content.encode()).hexdigest()[:12]}"


# ---------------------------------------------------------------------------------------------------------- from rows


def _made(
    name: str,
    roles: Mapping[Role, str],
    read: Mapping[str, _Read],
    columns: tuple[str, ...],
    label: str,
    regression: bool,
    metric: str | None,
    names: Sequence[str] | None,
    described: Mapping[str, Any],
    said: Sequence[str],
) -> Task:
    """The task of rows that were read; every row of every split is checked before anything is said."""
    read = {split: _Read(one.where, _as_answers(one.rows, label, regression), one.problems) for split, one in read.items()}
    train = read[roles["train"]]
    counts = Counter(str(row[label]) for _, row in train.rows if isinstance(row.get(label), str) and str(row[label]).strip())
    classes = (label,) if regression else tuple(names) if names is not None else tuple(sorted(counts, key=_by_number))
    metric = metric or ("pearson" if regression else "accuracy")
    extra = tuple(other for other in REGRESSION_METRICS[:2] if other != metric) if regression else ()
    task = Task(
        # a file without two classes is refused below; until then it must not look like a regression
        name=name, text=columns, labels=classes if regression else (*classes, *("\0", "\0\0")[: max(0, 2 - len(classes))]),
        metric=metric, splits=roles, source=Loaded({}, {}), extra_metrics=extra, label_column=label, id_column=None,
    )  # fmt: skip
    if not regression and not train.problems:
        _not_classes(train, counts, label)
    if not regression and (not counts or any(not at for at in train.problems.values())):
        read = {roles["train"]: train}  # without classes to go by, every row of the others would be wrong
    rows = {split: good_rows(task, split, one.rows, one.problems) for split, one in read.items()}
    if not any(one.problems for one in read.values()):
        if metric == "f1" and len(classes) > 2:
            train.problems[f"f1 is of two classes, these are {len(classes)}: take accuracy or matthews"] = []
        for split, one in read.items():
            if split != roles["train"] and len(shared_texts(rows[split], rows[roles["train"]])) == len(rows[split]):
                one.problems["every row has the texts of a row of train: nothing could be learnt from a score on it"] = []
    _refuse(read, columns, label, regression, counts)
    doubts = [*said, *_leaks(roles, rows), *_alike(classes)]
    description = {**described, "text": list(columns), "label": label, "labels": list(classes), "metric": metric}
    if described:
        description["splits"] = dict(roles)
    return Task(
        name=name, text=columns, labels=classes, metric=metric, splits=roles, source=Loaded(rows, description),
        extra_metrics=extra, label_column=label, id_column=None, doubts=tuple(doubts),
    )  # fmt: skip


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_WHOLE = re.compile(r"0|-?[1-9]\d*", re.ASCII)


def _as_answers(
    rows: Sequence[tuple[int, Mapping[str, object]]], label: str, regression: bool
) -> list[tuple[int, Mapping[str, object]]]:
    """Rows with the answer as the checker takes it: classes by name, whole numbers too; values as numbers."""

    def answer(value: object) -> object:
        if regression:
            return float(value) if isinstance(value, str) and _NUMBER.fullmatch(value.strip()) else value
        # a number of thousands of digits has no text and is no class
        return str(value) if type(value) is int and abs(value) < 10**18 else value

    return [(number, {**row, label: answer(row[label])} if label in row else row) for number, row in rows]


def _not_classes(train: _Read, counts: Mapping[str, int], label: str) -> None:
    """Notes what shows that a column holds no classes."""
    if counts and all(_NUMBER.fullmatch(name) for name in counts) and not all(_WHOLE.fullmatch(name) for name in counts):
        train.problems[f"{label} holds numbers that are not all whole: a regression (--regression)?"] = []
    elif len(counts) > MANY_CLASSES and 2 * len(counts) > len(train.rows):
        what = f"{label} holds {len(counts)} different answers in {len(train.rows)} rows"
        train.problems[f"{what}: is it the column of classes?"] = []


def _by_number(name: str) -> tuple[int, int, str]:
    return (0, int(name), "") if _WHOLE.fullmatch(name) else (1, 0, name)


def _refuse(read: Mapping[str, _Read], columns: Sequence[str], label: str, regression: bool, counts: Counter[str]) -> None:
    """Raises: DataError with every problem of every split."""
    bad = [one for one in read.values() if one.problems]
    if not bad:
        return
    lines = [f"{one.where}: {line}" if len(bad) > 1 else line for one in bad for line in told(one.problems)]
    floats = any("is none of the classes" in what and re.search(r" -?\d+\.\d", what) for one in bad for what in one.problems)
    there = ", ".join(f"{name} ({n})" for name, n in sorted(counts.items(), key=lambda item: -item[1])[:10])
    classes = "a finite number" if regression else "the name or whole number of a class"
    raise DataError(
        f"bad data in {bad[0].where if len(bad) == 1 else f'{len(bad)} of {len(read)} splits'}",
        got="\n            ".join(lines),
        expected=f"text in {' and '.join(columns)} and {classes} in {label}, in every row"
        + ("" if regression or not there else f"; classes of train: {there}" + (", …" if len(counts) > 10 else "")),
        next="take --regression for values; " * floats + "repair or replace the data; rows are never dropped silently",
    )


def _leaks(roles: Mapping[Role, str], rows: Mapping[str, Rows]) -> list[str]:
    train = rows[roles["train"]]
    shared = {split: len(shared_texts(rows[split], train)) for role, split in roles.items() if role != "train"}
    return [f"{n} of {len(rows[split])} {split} rows have the texts of a train row" for split, n in shared.items() if n]


def _alike(classes: Sequence[str]) -> list[str]:
    folded: dict[str, list[str]] = {}
    for name in classes:
        folded.setdefault(" ".join(name.casefold().split()), []).append(name)
    return [f"classes that differ in case or blanks only: {', '.join(map(repr, s))}" for s in folded.values() if len(s) > 1]


# -------------------------------------------------------------------------------------------------------------- settings


def _words(text: str | Sequence[str]) -> tuple[str, ...]:
    return tuple(text.split(",") if isinstance(text, str) else text)


def _listed(paths: Mapping[str, Path]) -> str:
    return ", ".join(f"{split}: {path}" for split, path in paths.items())


def _wrong_settings(columns: Sequence[str], label: str, regression: bool, metric: str | None) -> list[TombolaError]:
    problems = []
    if not 1 <= len(columns) <= 2 or not all(columns) or not label:
        problems.append(
            TombolaError("these are no columns", got=f"text {','.join(columns)!r}, label {label!r}",
                         expected="one or two columns of text, as in --text a or --text a,b, and one of labels")
        )  # fmt: skip
    elif len({*columns, label}) < len(columns) + 1:
        problems.append(TombolaError("a column serves twice", got=f"text {','.join(columns)}, label {label}"))
    known = REGRESSION_METRICS if regression else CLASS_METRICS
    if metric is not None and metric not in known:
        other = "a metric of classes" if metric in CLASS_METRICS else "a metric of values, see --regression"
        why = f"it is {other}" if metric in CLASS_METRICS + REGRESSION_METRICS else near(metric, known).removeprefix("; ") or None
        problems.append(TombolaError(f"there is no metric {metric!r} for this task", expected=", ".join(known), next=why))
    return problems


# -------------------------------------------------------------------------------------------------------------- the Hub


def _pinned(spec: str, repo: str, revision: str | None) -> str:
    """The commit a revision is now."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    try:
        return str(HfApi().dataset_info(repo, revision=revision).sha)
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise DataError(
            f"{spec} could not be pinned to a commit",
            got=f"{type(error).__name__}: " + str(error).partition("\n")[0][:160],
            expected="a Hub data set that can be reached",
            next="check the spelling and the network; offline, name the commit of a data set that is cached: hub:NAME@COMMIT",
        ) from error


def _downloaded(spec: str, repo: str, config: str | None, revision: str) -> Any:
    from datasets import load_dataset

    try:
        return load_dataset(repo, config, revision=revision)
    except (OSError, ValueError, RuntimeError) as error:  # unreachable, gated, a script, or a configuration that is unknown
        raise DataError(
            f"{spec} could not be loaded from the Hub",
            got=f"{type(error).__name__}: " + " ".join(str(error).split())[:400],
            expected=f"{repo}, configuration {config or 'by default'}, commit {revision}",
            next="name a configuration: hub:NAME:CONFIG, or download files and take the task `files`",
        ) from error


def _roles(
    spec: str, there: Sequence[str], train: str | None, validation: str | None, test: str | None, said: list[str]
) -> dict[Role, str]:
    """Role → split of a Hub data set."""
    report = validation or next((split for split in ("validation", "test") if split in there), "validation")
    if validation is None and report == "test":
        said.append(f"{spec} has no split named validation: scores are reported on its test split")
    roles: dict[Role, str] = {"train": train or "train", "report": test or report}
    if test is not None:
        roles["selection"] = report
    lacking = [split for split in roles.values() if split not in there]
    if lacking or len(set(roles.values())) < len(roles):
        raise DataError(
            f"{spec} has no split {lacking[0]!r}" if lacking else "a split serves twice",
            got=", ".join(f"{role}: {split}" for role, split in roles.items()),
            expected=f"different splits out of {', '.join(there)}",
            next="name them: --train SPLIT --validation SPLIT [--test SPLIT]",
        )
    return roles


def _columns(
    spec: str, features: Mapping[str, Any], text: tuple[str, ...], label: str | None, said: list[str]
) -> tuple[tuple[str, ...], str]:
    """Text columns and label column; those not given are guessed where only one guess is possible."""
    classes = [name for name, feature in features.items() if hasattr(feature, "names")]
    named = [name for name in features if name in ("label", "labels")]
    target = label or (classes[0] if len(classes) == 1 else named[0] if len(named) == 1 else "")
    types = {name: getattr(one, "dtype", type(one).__name__) for name, one in features.items()}
    strings = [name for name, kind in types.items() if kind in ("string", "large_string") and name != target]
    columns = text or (tuple(strings) if len(strings) == 1 else ())
    if not columns or not target:
        lacking = " and ".join(name for name, known in (("--text", columns), ("--label", target)) if not known)
        raise DataError(
            f"the columns of {spec} cannot be guessed",
            got=", ".join(f"{name} ({kind})" for name, kind in types.items()),
            expected="one column of text and one of labels to choose from",
            next=f"name them: {lacking}",
        )
    guessed = [f"{what} = {which}" for what, which, own in (("text", columns[0], text), ("label", target, label)) if not own]
    if guessed:
        said.append(f"columns of {spec} were guessed, as the only ones of their kind: {', '.join(guessed)}")
    return columns, target


def _hub_label(value: object, feature: Any) -> object:
    """The class name where the set has names; -1, its sign for "no label", has none and stays. A float of 32 bits as meant."""
    names = getattr(feature, "names", None)
    if names is not None and type(value) is int and 0 <= value < len(names):
        return names[value]
    return shortest(value) if getattr(feature, "dtype", None) == "float32" else value
