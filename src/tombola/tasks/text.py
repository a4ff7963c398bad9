"""Running text: corpora cut into passages, each a row that is its own answer.

A passage never crosses from one article into the next, and is known by its number in the split. Passages are counted in words
and not in tokens, so that rows are the same for every model; each model then predicts all tokens of a passage but the first.
Published perplexities are of other cuts (whole articles, long blocks, a moving window) and are no measure for these.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from tombola.errors import DataError
from tombola.tasks.base import Hub, Rows, Task
from tombola.tasks.checks import Problems, told
from tombola.tasks.glue import find_file
from tombola.tasks.readers import read_rows

PASSAGE_WORDS = 96  # about 128 tokens
SHORTEST = 16  # words; what is left of an article and shorter goes to the passage before it

WIKITEXT2 = Task(
    name="wikitext2",
    text=("text",),
    labels=(),
    metric="log_likelihood",
    splits={"train": "train", "report": "validation"},
    source=Hub("Salesforce/wikitext", "wikitext-2-v1", "b08601e04326c79dfdd32d625aee71d232d685c3"),
    id_column=None,
    doubts=(f"perplexity is per token of this model's tokenizer, over passages of about {PASSAGE_WORDS} words whose first token "
            "is not predicted: compare with no published perplexity",),
)  # fmt: skip

_ARTICLE = re.compile(r"\s*= [^=].*[^=] =\s*")  # "= Title ="; sections have more signs


def load(task: Task, split: str, *, data_dir: Path | None) -> Rows:
    """The passages of one split, from `data_dir` or, without it, from the Hub. Raises: DataError when it is absent or bad."""
    problems: Problems = {}
    if data_dir is None:
        lines = _from_hub(task, split)
        where = f"split {split!r} of {task.name} from the Hub"
    else:
        path = find_file(data_dir, task.folder or task.name, split)
        where, lines = str(path), []
        for number, row in read_rows(path, task.text, problems):
            text = row.get(task.text[0])
            if isinstance(text, str):
                lines.append(text)
            else:
                problems.setdefault(f"{task.text[0]} is no text", []).append(number)
    passages = cut(lines)
    if not passages and not problems:
        problems["no words"] = []
    if problems:
        raise DataError(f"bad data in {where}", got="\n            ".join(told(problems)), expected="text in every row")
    ids = tuple(f"{split}:{number}" for number in range(1, len(passages) + 1))
    return Rows(ids, tuple((passage,) for passage in passages), (None,) * len(passages))


def cut(lines: Iterable[str]) -> list[str]:
    """Passages of `PASSAGE_WORDS` words, blanks and line ends between them kept; an article's last may be shorter or longer."""
    articles: list[list[str]] = [[]]
    for line in lines:
        if _ARTICLE.fullmatch(line):
            articles.append([])
        articles[-1].append(line.rstrip("\n"))
    passages: list[str] = []
    for article in articles:
        words = re.findall(r"\S+\s*", "\n".join(article))
        if not words:
            continue
        cuts = list(range(0, len(words), PASSAGE_WORDS))
        if len(cuts) > 1 and len(words) - cuts[-1] < SHORTEST:
            cuts.pop()
        passages += ["".join(words[a:b]).strip() for a, b in zip(cuts, [*cuts[1:], len(words)], strict=True)]
    return passages


def _from_hub(task: Task, split: str) -> list[str]:
    from datasets import load_dataset

    assert isinstance(task.source, Hub)
    try:
        data = load_dataset(task.source.repo, task.source.config, split=split, revision=task.source.revision)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{task.name} could not be loaded from the Hub",
            got=f"{type(error).__name__}: {error}",
            expected=f"{task.source.repo}, configuration {task.source.config}",
            next=f"pass --data DIR with {task.folder or task.name}/{split}.jsonl.gz in it, or go online",
        ) from error
    return [str(row[task.text[0]]) for row in data]
