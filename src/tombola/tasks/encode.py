"""Rows of text → token ids → batches without needless padding.

Padding is most of the work of a short-text task done the usual way, so rows of similar length share a batch. Results are
joined by row number afterwards; nothing may depend on which rows met in a batch.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from tombola.errors import DataError
from tombola.objective import Objective
from tombola.tasks.base import Answer, Rows
from tombola.tasks.mlm import Masking, blocks
from tombola.tasks.squad import Spans, windows

# Small enough that a batch holds rows of one length (4 to 6 % padding on GLUE's dev sets, 8 to 28 % at 4096), and still
# as fast a token as larger ones.
TOKENS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Encoded:
    """Tokenised rows, in the order of the rows they come from."""

    ids: tuple[str, ...]
    inputs: tuple[Mapping[str, tuple[int, ...]], ...]  # per row: input_ids and, where the model has them, token_type_ids
    labels: tuple[Answer, ...]  # of running text the log-likelihood per token of its unigram model, see `encode`
    truncated: int  # rows that were longer than max_length and lost their end
    pad: Mapping[str, int]  # the value each input is padded with
    pad_to: int | None = None  # every row is padded to so many tokens; None = to the longest of its batch
    tokens: bool = False  # every token but the first of a row is to be predicted from those before it
    masking: Masking | None = None  # rows are blocks of which some tokens are hidden, and asked for
    spans: Spans | None = None  # rows are windows on the contexts of questions
    # tokens at the end of each row that alone are to be predicted, the reply to what stands before; None: all but the first
    replies: tuple[int, ...] | None = None
    lines: tuple[tuple[float, float], ...] | None = None  # of replies: what one and the same answer would score, see `_replies`

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> list[int]:
        """Real tokens of each row."""
        return [len(row["input_ids"]) for row in self.inputs]

    @property
    def computed_lengths(self) -> list[int]:
        """Tokens of each row as batches are made of them: where all are padded to one length, no row is longer than another."""
        return self.lengths if self.pad_to is None else [self.pad_to] * len(self)


def encode(
    tokenizer: Any,
    rows: Rows,
    max_length: int,
    padding: str = "bucketed",
    objective: Objective = Objective(),
    *,
    mlm: Mapping[str, Any] = MappingProxyType({"eval_seed": 0, "weigh": "masked_tokens"}),
    stride: int = 128,
) -> Encoded:
    """Tokenised `rows`, cut to `max_length` tokens (of a pair, the longer text loses); padding = "max_length" pads all to that.

    For an objective of words each row becomes its prompt, of which the texts alone are cut. For one of tokens the label of a
    row is what the unigram model of these very rows gives it, in nats per predicted token: the best that an answer can do
    which looks at no context, as the majority line is for classes. There rows of two texts are a prompt and its reply.

    Rows of masked language modelling become blocks of `max_length` tokens, those of spans windows of at most so many: there may
    be more or fewer of them than rows. mlm: the seed of evaluation masks, and how blocks weigh (`Masking`). stride: of windows.

    Raises: DataError on an empty set, or when the question of a prompt leaves no room for a text; as `blocks` and `windows`.
    """
    if not len(rows):
        raise DataError("there are no rows to encode", expected="at least one row")
    if objective.kind == "masked":
        return _blocks(tokenizer, rows, max_length, mlm)
    if objective.kind == "span":
        return _windows(tokenizer, rows, max_length, stride, padding)
    if objective.tokens and len(rows.texts[0]) > 1:
        return _replies(tokenizer, rows, max_length, padding)
    question: list[int] = []
    columns = [list(column) for column in zip(*rows.texts, strict=True)]
    if objective.prompt is not None:
        question = tokenizer(objective.prompt.question, add_special_tokens=False)["input_ids"]
        columns = [[objective.prompt.body(texts) for texts in rows.texts]]
    if len(question) >= max_length - 1:
        raise DataError(
            "the question of the prompt leaves no room for a text",
            got=f"{len(question)} tokens, max_length {max_length}",
            next="raise --set max_length=…, or ask more shortly",
        )

    def tokenised(most: int) -> Any:
        return tokenizer(*columns, truncation=True, max_length=most - len(question), return_attention_mask=False)

    # One token more than allowed shows which rows were cut, without a warning per row.
    tokens, full = tokenised(max_length), tokenised(max_length + 1)
    names = [name for name in ("input_ids", "token_type_ids") if name in tokens]
    truncated = sum(len(a) != len(b) for a, b in zip(tokens["input_ids"], full["input_ids"], strict=True))
    asked = {"input_ids": tuple(question), "token_type_ids": (0,) * len(question)}
    inputs = tuple({name: tuple(tokens[name][i]) + asked[name] for name in names} for i in range(len(rows)))
    # A decoder's tokenizer may have no token for padding; whichever stands there, it is masked.
    padded_by = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    pad = {"input_ids": int(padded_by), "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0))}
    pad_to = max_length if padding == "max_length" else None
    labels = _unigram([row["input_ids"] for row in inputs], rows.ids) if objective.tokens else rows.labels
    return Encoded(rows.ids, inputs, labels, truncated, {name: pad[name] for name in names}, pad_to, objective.tokens)


def _replies(tokenizer: Any, rows: Rows, max_length: int, padding: str) -> Encoded:
    """Rows of a prompt and its reply, of which the reply alone is predicted; of one that is too long the prompt's beginning goes.

    The lines of a row are those of an answer that looks at no prompt: 1 where its reply is the most frequent one, else 0, and its
    log-likelihood under the frequencies of tokens in all replies. Raises: DataError when a prompt or a reply is empty, or a reply
    leaves no room for its prompt.
    """
    prompts = [list(tokenizer(prompt)["input_ids"]) for prompt, _ in rows.texts]
    replies = [tuple(tokenizer(f" {reply}", add_special_tokens=False)["input_ids"]) for _, reply in rows.texts]
    both = list(zip(rows.ids, prompts, replies, strict=True))
    if bad := [id for id, prompt, reply in both if not prompt or not 0 < len(reply) < max_length]:
        raise DataError(
            "rows whose prompt or reply is empty, or too long",
            got=", ".join(bad[:5]),
            expected=f"a prompt, and a reply of 1 to {max_length - 1} tokens",
            next="raise --set max_length=…, or leave these rows out",
        )
    inputs = tuple({"input_ids": tuple(prompt[-(max_length - len(reply)) :]) + reply} for _, prompt, reply in both)
    counts, most = Counter(token for reply in replies for token in reply), Counter(replies).most_common(1)[0][0]
    total = math.log(counts.total())
    likely = tuple(sum(math.log(counts[token]) - total for token in reply) / len(reply) for reply in replies)
    padded_by = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return Encoded(
        rows.ids,
        inputs,
        likely,
        truncated=sum(len(prompt) + len(reply) > max_length for _, prompt, reply in both),
        pad={"input_ids": int(padded_by)},
        pad_to=max_length if padding == "max_length" else None,
        tokens=True,
        replies=tuple(map(len, replies)),
        lines=tuple((float(reply == most), line) for reply, line in zip(replies, likely, strict=True)),
    )


def _pad(tokenizer: Any, names: Iterable[str]) -> dict[str, int]:
    pad = {"input_ids": int(tokenizer.pad_token_id), "token_type_ids": int(getattr(tokenizer, "pad_token_type_id", 0))}
    return {name: pad[name] for name in names}


def _blocks(tokenizer: Any, rows: Rows, max_length: int, mlm: Mapping[str, Any]) -> Encoded:
    found = blocks(tokenizer, rows, max_length)
    corpus = rows.ids[0].partition(":")[0]
    ids = tuple(f"{corpus}:block {number}" for number in range(1, len(found) + 1))
    masking = Masking(int(tokenizer.mask_token_id), len(tokenizer), mlm["eval_seed"], mlm["weigh"])
    inputs = tuple({"input_ids": block} for block in found)
    return Encoded(ids, inputs, (None,) * len(ids), 0, _pad(tokenizer, ["input_ids"]), masking=masking)


def _windows(tokenizer: Any, rows: Rows, max_length: int, stride: int, padding: str) -> Encoded:
    spans = windows(tokenizer, rows, max_length, stride)
    numbers: Counter[int] = Counter()
    ids = list[str]()
    for one in spans.windows:
        numbers[one.question] += 1
        ids.append(f"{rows.ids[one.question]}/{numbers[one.question]}")
    inputs = tuple(one.inputs for one in spans.windows)
    pad_to = max_length if padding == "max_length" else None
    several = sum(n > 1 for n in numbers.values())
    return Encoded(tuple(ids), inputs, (None,) * len(ids), several, _pad(tokenizer, inputs[0]), pad_to, spans=spans)


def _unigram(rows: Sequence[tuple[int, ...]], ids: Sequence[str]) -> tuple[float, ...]:
    """Mean log-likelihood of the predicted tokens (all but the first) of each row under their own frequencies in all rows."""
    if short := [id for id, row in zip(ids, rows, strict=True) if len(row) < 2]:
        raise DataError(
            "rows of a single token have nothing to predict", got=", ".join(short[:5]), expected="two tokens or more in each row"
        )
    counts = Counter(token for row in rows for token in row[1:])
    total = math.log(counts.total())
    return tuple(sum(math.log(counts[token]) - total for token in row[1:]) / (len(row) - 1) for row in rows)


def collate(encoded: Encoded, rows: Sequence[int], drawn: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """Model inputs of these rows, padded at the end to the longest of them (or to `pad_to`): [batch, seq], labels [batch].

    Labels are int64 for classes and float32 for a regression, which is how a model and `tombola.scores` tell the two apart; of
    running text they are its tokens, [batch, seq], with -100 for padding and for a prompt.

    Of hidden tokens and spans they are what is asked, [batch, 1 + n], after a first -100: hidden tokens as `drawn` = (seed,
    epoch) of training says, or as they are evaluated, with their places in `at`; the tokens where an answer begins and ends.
    """
    if encoded.masking is not None:
        return _collate_hidden(encoded, encoded.masking, rows, drawn)
    longest = encoded.pad_to or max(len(encoded.inputs[i]["input_ids"]) for i in rows)
    batch = {
        name: torch.tensor([encoded.inputs[i][name] + (pad,) * (longest - len(encoded.inputs[i][name])) for i in rows])
        for name, pad in encoded.pad.items()
    }
    lengths = torch.tensor([len(encoded.inputs[i]["input_ids"]) for i in rows])
    batch["attention_mask"] = (torch.arange(longest)[None, :] < lengths[:, None]).long()
    if encoded.spans is not None:
        batch["labels"] = torch.tensor([(-100, *encoded.spans.windows[i].label) for i in rows])
    elif encoded.tokens:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        if encoded.replies is not None:
            given = lengths - torch.tensor([encoded.replies[i] for i in rows])
            batch["labels"].masked_fill_(torch.arange(longest)[None, :] < given[:, None], -100)
    else:
        batch["labels"] = torch.tensor([encoded.labels[i] for i in rows])
    return batch


def _collate_hidden(encoded: Encoded, masking: Masking, rows: Sequence[int], drawn: tuple[int, int] | None) -> dict[str, Tensor]:
    hidden = []
    for i in rows:
        ids = encoded.inputs[i]["input_ids"]
        hidden.append(masking.fixed(encoded.ids[i], ids) if drawn is None else masking.drawn(i, ids, *drawn))
    return {  # all blocks are of one length, and as many tokens are hidden in each
        "input_ids": torch.tensor([one.inputs for one in hidden]),
        "attention_mask": torch.ones(len(rows), len(hidden[0].inputs), dtype=torch.int64),
        "at": torch.tensor([(*one.at, 0) for one in hidden]),
        "labels": torch.tensor([(-100, *one.targets) for one in hidden]),
    }


def by_length(encoded: Encoded, tokens_per_batch: int) -> list[list[int]]:
    """All rows in batches of similar length, each of at most `tokens_per_batch` tokens, padding included.

    Shortest first; equal lengths in row order, so that the batches are a function of the rows alone.
    """
    lengths = encoded.computed_lengths
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lengths.__getitem__):
        if batches and (len(batches[-1]) + 1) * lengths[row] <= tokens_per_batch:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def batches(
    encoded: Encoded, tokens_per_batch: int = TOKENS_PER_BATCH, device: str | torch.device = "cpu"
) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
    """(row numbers, model inputs with labels) until every row has come once, in batches of similar length."""
    for rows in by_length(encoded, tokens_per_batch):
        yield torch.tensor(rows), {name: value.to(device) for name, value in collate(encoded, rows).items()}
