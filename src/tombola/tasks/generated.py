"""Tasks that need no data files: sentences from grammars written here, so that everything runs offline and is known.

`acceptability` asks for the structure of a sentence. `nli-overlap` plants a shortcut of known strength: right in most train and
report rows, wrong in challenge rows. `agreement` is for language models, with a shortcut likewise.

Read `write` first, then the grammar of a task, in a file of its name. Any change that gives other rows for the same options and
seed must raise the `Grammar` version of its task.
"""

import hashlib
import random
from collections.abc import Callable, Iterator, Mapping

from tombola.errors import DataError
from tombola.tasks import acceptability, agreement, overlap
from tombola.tasks.base import REPLY_METRICS, Grammar, Role, Rows, Task
from tombola.tasks.wanted import Want

_OPTIONS: Mapping[str, tuple[int | float, int | float, int | float]] = {  # default, least, greatest
    "train_rows": (4000, 2, 100_000),
    "report_rows": (1000, 2, 100_000),
    "challenge_rows": (1000, 2, 100_000),
    "strength": (0.9, 0.5, 1.0),  # share of train and report rows on which the shortcut gives the right answer
    "challenge_strength": (0.1, 0.0, 1.0),  # of challenge rows
}

ACCEPTABILITY = Task(
    name="acceptability",
    text=("sentence",),
    labels=("unacceptable", "acceptable"),
    metric="matthews",
    splits={"train": "train", "report": "validation"},
    source=Grammar(version=1),
    options={name: _OPTIONS[name][0] for name in ("train_rows", "report_rows")},
)
NLI_OVERLAP = Task(
    name="nli-overlap",
    text=("premise", "hypothesis"),
    labels=("entailment", "not_entailment"),
    metric="accuracy",
    splits={"train": "train", "report": "validation", "challenge": "challenge"},
    source=Grammar(version=1),
    options={name: _OPTIONS[name][0] for name in ("train_rows", "report_rows", "challenge_rows", "strength")},
)
AGREEMENT = Task(
    name="agreement",
    text=("prompt", "reply"),
    labels=(),
    metric=REPLY_METRICS[0],
    extra_metrics=REPLY_METRICS[1:],
    splits={"train": "train", "report": "validation", "challenge": "challenge"},
    source=Grammar(version=1),
    options={name: default for name, (default, *_) in _OPTIONS.items()},
)

GRAMMARS: Mapping[str, Callable[[int, float], Iterator[Want]]] = {  # (rows, share on which the shortcut is right) → what they are
    ACCEPTABILITY.name: acceptability.wants,
    NLI_OVERLAP.name: overlap.wants,
    AGREEMENT.name: agreement.wants,
}

_PATIENCE = 2_000  # candidates tried for one row; only a request near the size of the grammar needs as many


def parse_option(name: str, text: str) -> int | float | None:
    """The value of an option given as text; None if it is no number of its kind or out of range."""
    default, least, greatest = _OPTIONS[name]
    try:
        value = type(default)(text)
    except ValueError:
        return None
    return value if least <= value <= greatest else None


def option_range(name: str) -> str:
    """What an option takes, for people."""
    default, least, greatest = _OPTIONS[name]
    return f"{'a whole number' if isinstance(default, int) else 'a number'} from {least} to {greatest}"


def write(task: Task, role: Role, *, seed: int) -> Rows:
    """The rows of one generated split, fixed by task, role, the options that concern this split, and seed.

    Classes are balanced to within one row, and no text stands in two splits, whatever their seeds and sizes: every
    text belongs to one role by its hash.

    Raises: DataError if the grammar cannot give that many rows.
    """
    number = int(task.options[f"{role}_rows"])
    wants = list(GRAMMARS[task.name](number, _strength(task, role)))
    rng = random.Random(f"{task.name}/{role}/{seed}")
    rng.shuffle(wants)
    texts: list[tuple[str, ...]] = []
    used: set[str] = set()
    for want in wants:
        for _ in range(_PATIENCE):
            drawn = want.draw(rng)
            once = (drawn.texts[0], *drawn.hidden)  # a hypothesis may serve two premises of its split
            if used.isdisjoint(once) and all(_role(text) == role for text in drawn.texts + drawn.hidden):
                break
        else:
            raise DataError(
                f"the grammar of {task.name} has too few sentences of the kind {want.group!r}",
                got=f"{role}_rows={number}",
                next="ask for fewer rows",
            )
        used.update(once)
        texts.append(drawn.texts + drawn.shared)
    return Rows(
        ids=tuple(f"{task.splits[role]}:{i}" for i in range(number)),
        texts=tuple(texts),
        labels=tuple(want.label for want in wants),
        groups=tuple(want.group for want in wants),
    )


def _strength(task: Task, role: Role) -> float:
    """The share of rows on which the shortcut is right: where nothing else is said none of the challenge."""
    return float(task.options.get("challenge_strength" if role == "challenge" else "strength", 0.0))


def _role(text: str) -> Role:
    """The one role a text may appear in: half of all texts train, a quarter each report and challenge."""
    roles: tuple[Role, ...] = ("train", "train", "report", "challenge")
    return roles[hashlib.sha256(text.encode()).digest()[0] % 4]
