"""SQuAD v1.1: the answer to a question is a span of a text, scored by the official normalisation.

A context that is longer than the model reads is cut into windows that overlap; each token is answered for by the window that
shows most around it. The best span over all windows of a question is the answer.
Source: Rajpurkar et al. 2016 and its official evaluation script (answers as sets of normalised words, the best of several gold
answers); windows after Devlin et al. 2019. Deviation: an answer is the text between the characters where its tokens begin and
end, and not rebuilt from word pieces.
"""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from tombola.errors import DataError
from tombola.tasks.base import Hub, Rows, Task
from tombola.tasks.checks import Numbered, Problems, told
from tombola.tasks.glue import find_file
from tombola.tasks.readers import read_rows

QUESTION_TOKENS = 64  # a longer question loses its end
ANSWER_TOKENS = 30  # the longest answer
BEST = 20  # beginnings and ends that are looked at in each window

SQUAD = Task(
    name="squad",
    text=("question", "context"),
    labels=(),
    metric="answer_f1",
    splits={"train": "train", "report": "validation"},
    source=Hub("rajpurkar/squad", "plain_text", "7b6d24c440a36b6815f21b70d25016731768db1f"),  # quoted from memory
    extra_metrics=("exact_match",),
    official={"train": 87599, "validation": 10570},
    id_column="id",
    form="span",
    doubts=("selection rows may share their paragraphs with train rows: questions are held out one by one",),
)


# --------------------------------------------------------------------------------------------------------------- scoring


def normalised(text: str) -> str:
    """An answer as it is compared: lower case, without punctuation, articles and needless blanks."""
    bare = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


def answer_f1(answer: str, gold: str) -> float:
    """F1 of the words of two normalised answers, each counted as often as it stands, in [0, 1]; two empty ones are right."""
    words, wanted = normalised(answer).split(), normalised(gold).split()
    if not words or not wanted:
        return float(words == wanted)
    common = (Counter(words) & Counter(wanted)).total()
    return 2 * common / (len(words) + len(wanted))


def exact_match(answer: str, gold: str) -> float:
    """1 where the normalised answers are the same text."""
    return float(normalised(answer) == normalised(gold))


def scored(answer: str, golds: Iterable[str]) -> tuple[float, float]:
    """(F1, exact match) of an answer, each of the gold answer that it is nearest to."""
    golds = list(golds)
    return max(answer_f1(answer, gold) for gold in golds), max(exact_match(answer, gold) for gold in golds)


# --------------------------------------------------------------------------------------------------------------- windows


@dataclass(frozen=True, slots=True)
class Window:
    """A question with a part of its context, as the model reads it."""

    question: int  # its number
    inputs: Mapping[str, tuple[int, ...]]
    spans: tuple[tuple[int, int] | None, ...]  # of each token of the context its characters; None for all others
    answers_for: tuple[bool, ...]  # whether this window is the one that answers for the token
    label: tuple[int, int]  # tokens where the first gold answer begins and ends; (0, 0) where it is not whole in here


@dataclass(frozen=True, slots=True)
class Spans:
    """What belongs to the windows of a set of questions."""

    windows: tuple[Window, ...]
    ids: tuple[str, ...]  # of the questions
    contexts: tuple[str, ...]
    golds: tuple[tuple[str, ...], ...]

    def answers(self, logits: Sequence[Float[np.ndarray, "end _"]]) -> tuple[str, ...]:
        """The best span of each question, by the sum of the logits of its beginning and end, from [2, position] of each window.

        Both ends within the context of one window, the beginning where that window answers for it, at most `ANSWER_TOKENS` long;
        of equal sums the first. Empty where there is no such span.
        """
        best: list[tuple[float, str]] = [(-float("inf"), "")] * len(self.ids)
        for window, (begins, ends) in zip(self.windows, logits, strict=True):
            there = np.array([span is not None for span in window.spans])
            first = _highest(begins[: len(there)], there & np.array(window.answers_for))
            last = _highest(ends[: len(there)], there)
            for a in first:
                for b in last:
                    if a <= b < a + ANSWER_TOKENS and (total := float(begins[a] + ends[b])) > best[window.question][0]:
                        begin, end = window.spans[a], window.spans[b]
                        assert begin is not None and end is not None
                        best[window.question] = (total, self.contexts[window.question][begin[0] : end[1]])
        return tuple(text for _, text in best)

    def lines(self) -> tuple[tuple[float, float], ...]:
        """(F1, exact match) of one and the same answer to all questions: the most frequent of the gold ones."""
        counts = Counter(normalised(gold) for golds in self.golds for gold in set(golds))
        constant = max(counts.items(), key=lambda one: (one[1], one[0]))[0]
        return tuple(scored(constant, golds) for golds in self.golds)


def _highest(logits: Float[np.ndarray, " position"], among: np.ndarray) -> list[int]:
    """The positions of the `BEST` highest logits, highest first, of equal ones the first; only those of `among`."""
    order = np.argsort(-logits, kind="stable")
    return [int(i) for i in order if among[i]][:BEST]


def windows(tokenizer: Any, rows: Rows, max_length: int, stride: int) -> Spans:
    """The windows of every question, beginning `stride` tokens after each other.

    Raises: DataError when questions leave no room, or the tokenizer cannot say which characters a token is of.
    """
    if not getattr(tokenizer, "is_fast", False) or tokenizer.cls_token_id is None or tokenizer.sep_token_id is None:
        raise DataError("this tokenizer does not say which characters a token is of", expected="a fast tokenizer of an encoder")
    assert rows.answers is not None
    first, last, between = tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.num_special_tokens_to_add(pair=True) - 2
    questions = tokenizer([q for q, _ in rows.texts], add_special_tokens=False, return_attention_mask=False)["input_ids"]
    contexts = tokenizer(
        [c for _, c in rows.texts], add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False
    )
    typed = "token_type_ids" in tokenizer("a", return_attention_mask=False)
    found: list[Window] = []
    for number, question in enumerate(questions):
        head = [first, *question[:QUESTION_TOKENS], *[last] * between]
        room = max_length - len(head) - 1
        if room < 1 or not 1 <= stride <= room:
            raise DataError(
                "windows of a context leave gaps, or there is no room for one",
                got=f"{room} tokens of context beside a question of {len(question)}, stride {stride}",
                expected="1 ≤ stride ≤ that room",
                next="raise --set max_length=… (the paper has 384), or lower --set stride=…",
            )
        tokens, offsets = contexts["input_ids"][number], contexts["offset_mapping"][number]
        starts = list(range(0, max(1, len(tokens) - room + stride), stride))
        parts = [(at, min(at + room, len(tokens))) for at in starts]
        answers_for = _best_windows(parts, len(tokens))
        (start, answer), *_ = rows.answers[number]
        for w, (a, b) in enumerate(parts):
            ids = (*head, *tokens[a:b], last)
            inputs = {"input_ids": ids} | ({"token_type_ids": (0,) * len(head) + (1,) * (b - a + 1)} if typed else {})
            spans = (*[None] * len(head), *((int(x), int(y)) for x, y in offsets[a:b]), None)
            mine = (*[False] * len(head), *(answers_for[i] == w for i in range(a, b)), False)
            label = _label(spans, start, start + len(answer))
            found.append(Window(number, inputs, spans, mine, label))
    golds = tuple(tuple(text for _, text in golds) for golds in rows.answers)
    return Spans(tuple(found), rows.ids, tuple(c for _, c in rows.texts), golds)


def _best_windows(parts: Sequence[tuple[int, int]], n: int) -> list[int]:
    """For each token of a context the window that shows most around it on its poorer side; of equals the first."""
    best = [(-1.0, 0)] * n
    for w, (a, b) in enumerate(parts):
        for i in range(a, b):
            shown = min(i - a, b - 1 - i) + 0.01 * (b - a)
            if shown > best[i][0]:
                best[i] = (shown, w)
    return [w for _, w in best]


def _label(spans: Sequence[tuple[int, int] | None], begin: int, end: int) -> tuple[int, int]:
    """The tokens in which characters `begin` … `end` − 1 begin and end; (0, 0) where one of them is not in this window."""
    first = [i for i, span in enumerate(spans) if span is not None and span[0] <= begin < span[1]]
    last = [i for i, span in enumerate(spans) if span is not None and span[0] < end <= span[1]]
    return (first[0], last[0]) if first and last else (0, 0)


# --------------------------------------------------------------------------------------------------------------- reading


def load(task: Task, split: str, *, data_dir: Path | None) -> Rows:
    """The questions of one split, from `data_dir` or, without it, from the Hub.

    Raises: DataError when it is absent, or saying every kind of problem with its rows: an answer that does not stand where it is
    said to stand in its context is one of them.
    """
    problems: Problems = {}
    if data_dir is None:
        where = f"split {split!r} of {task.name} from the Hub"
        numbered: Numbered = enumerate(_from_hub(task, split), start=1)
    else:
        path = find_file(data_dir, task.folder or task.name, split)
        where, numbered = str(path), read_rows(path, ("id", *task.text, "answers"), problems)
    ids: dict[str, None] = {}
    texts, answers = list[tuple[str, str]](), list[tuple[tuple[int, str], ...]]()
    for number, row in numbered:
        faults, found = _checked(row, ids)
        for fault in faults:
            problems.setdefault(fault, []).append(number)
        if not faults:
            ids[str(row["id"])] = None
            texts.append((str(row["question"]), str(row["context"])))
            answers.append(found)
    if not ids and not problems:
        problems["no rows"] = []
    if problems:
        raise DataError(
            f"bad data in {where}",
            got="\n            ".join(told(problems)),
            expected="columns id, question, context, and answers (text, answer_start), each answer at its place in the context",
            next="repair or replace the data; rows are never dropped silently",
        )
    return Rows(tuple(f"{split}:{one}" for one in ids), tuple(texts), (None,) * len(ids), answers=tuple(answers))


def _checked(row: Mapping[str, object], ids: Mapping[str, None]) -> tuple[list[str], tuple[tuple[int, str], ...]]:
    faults = [f"{name} is no text" for name in ("id", "question", "context") if not isinstance(row.get(name), str)]
    faults += [] if faults or str(row["question"]).strip() else ["question is empty"]
    answers = row.get("answers")
    if not isinstance(answers, Mapping) or not isinstance(answers.get("text"), list | tuple):
        return [*faults, "answers have no text"], ()
    texts, starts = list(answers["text"]), list(answers.get("answer_start") or ())
    if not texts or len(texts) != len(starts):
        return [*faults, "answers are none, or not each with a start"], ()
    if faults:
        return faults, ()
    found = []
    for text, start in zip(texts, starts, strict=True):
        if not isinstance(text, str) or not text or type(start) is not int or start < 0:
            faults.append("an answer is no text, or its start no number")
        elif str(row["context"])[start : start + len(text)] != text:
            faults.append("an answer does not stand in its context where it is said to")
        else:
            found.append((start, text))
    if row["id"] in ids:
        faults.append("id repeats that of an earlier row")
    return list(dict.fromkeys(faults)), tuple(found)


def _from_hub(task: Task, split: str) -> Iterable[Mapping[str, object]]:
    from datasets import load_dataset

    assert isinstance(task.source, Hub)
    try:
        data: Iterable[Mapping[str, object]] = load_dataset(
            task.source.repo, task.source.config, split=split, revision=task.source.revision
        )
        return data
    except (OSError, ValueError) as error:
        raise DataError(
            f"{task.name} could not be loaded from the Hub",
            got=f"{type(error).__name__}: {error}",
            expected=f"{task.source.repo}, configuration {task.source.config}, commit {task.source.revision}",
            next=f"pass --data DIR with {task.name}/{split}.jsonl.gz in it, or go online",
        ) from error
