"""Masked language modelling: a corpus cut into blocks of tokens, of which some are hidden and asked for.

Rows are the passages of `tombola.tasks.text`, the same for every model; a model's tokenizer puts them back together and cuts
blocks of `max_length` tokens, the last that is not full dropped. Of each block 15 % are hidden: while training drawn anew by
(data seed, epoch, block), for evaluation once for all by seed and block, so that two models are asked the same. A corpus is
known by what is in it: its rows are hashed into every cell.
Source: Devlin et al. 2019, and the settings of Chen et al. 2020. Deviation: as many tokens are hidden in every block (their code
draws each token by itself), so that no block is left without any and blocks weigh alike.
"""

import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tombola.errors import DataError
from tombola.tasks import text
from tombola.tasks.base import Loaded, Rows, Task
from tombola.tasks.checks import Problems, told
from tombola.tasks.readers import read_rows

SHARE = 0.15  # of the tokens of a block, special ones not counted
REPLACED, KEPT = 0.8, 0.9  # of the hidden: up to here by the mask token, up to here by any token, the rest as they are

MLM_WIKITEXT2 = replace(
    text.WIKITEXT2,
    name="mlm-wikitext2",
    folder="wikitext2",
    metric="masked_accuracy",
    extra_metrics=("log_likelihood",),
    form="masked",
    doubts=("accuracy is over hidden tokens of this model's tokenizer: compare with no model of another",),
)


@dataclass(frozen=True, slots=True)
class Hidden:
    """A block with tokens hidden: what the model reads, where they are, what they were."""

    inputs: tuple[int, ...]
    at: tuple[int, ...]  # positions in the block, ascending
    targets: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Masking:
    """How tokens of blocks are hidden."""

    mask: int  # the id of the mask token
    vocabulary: int  # random tokens are drawn from so many
    seed: int  # of evaluation masks
    weigh: str = "masked_tokens"  # in a mean over blocks; padded_tokens: all alike

    def fixed(self, block: str, ids: Sequence[int]) -> Hidden:
        """The block as it is evaluated: the same in every process, whatever other blocks there are."""
        return self._hide(ids, [self.seed, _number(block)])

    def drawn(self, block: int, ids: Sequence[int], seed: int, epoch: int) -> Hidden:
        """The block as an epoch of training sees it."""
        return self._hide(ids, [seed, epoch, block, 1])

    def _hide(self, ids: Sequence[int], key: list[int]) -> Hidden:
        rng = np.random.default_rng(key)
        places = np.arange(1, len(ids) - 1)  # neither the token that begins a block nor the one that ends it
        at = np.sort(rng.permutation(places)[: max(1, round(SHARE * len(places)))])
        kind, drawn, inputs = rng.random(len(at)), rng.integers(self.vocabulary, size=len(at)), list(ids)
        for place, share, other in zip(at.tolist(), kind.tolist(), drawn.tolist(), strict=True):
            inputs[place] = self.mask if share < REPLACED else other if share < KEPT else inputs[place]
        return Hidden(tuple(inputs), tuple(at.tolist()), tuple(ids[place] for place in at.tolist()))


def _number(block: str) -> int:
    return int.from_bytes(hashlib.sha256(block.encode()).digest()[:8], "big")


def blocks(tokenizer: Any, rows: Rows, max_length: int) -> list[tuple[int, ...]]:
    """Token ids of the blocks of a corpus, special tokens included: all of `max_length`, in the order of the rows.

    Raises: DataError when the tokenizer has no token to hide others by, or the corpus does not fill a single block.
    """
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    if tokenizer.mask_token_id is None or first is None or last is None:
        raise DataError(
            "this tokenizer is of no masked language model",
            got=", ".join(f"{name} {getattr(tokenizer, name)}" for name in ("mask_token", "cls_token", "sep_token")),
            expected="tokens that hide, begin and end a text, as BERT's has them",
            next="take an encoder such as BERT or RoBERTa",
        )
    encoded = tokenizer([texts[0] for texts in rows.texts], add_special_tokens=False, return_attention_mask=False)
    tokens = [token for row in encoded["input_ids"] for token in row]
    room = max_length - 2
    if len(tokens) < room or room < 2:
        raise DataError(
            "the corpus is too short for a single block",
            got=f"{len(tokens)} tokens in {len(rows)} passages, blocks of {max_length}",
            expected=f"at least {room} tokens beside the two that begin and end a block",
            next="take more text, or a smaller --set max_length=…",
        )
    return [(first, *tokens[at : at + room], last) for at in range(0, len(tokens) - room + 1, room)]


def lines_of(hidden: Sequence[Hidden]) -> tuple[tuple[float, float], ...]:
    """For each block what answers that look at no context score: (share of hidden tokens that are the most frequent of all hidden
    ones, mean log-likelihood of hidden tokens by their own frequencies in nats)."""
    counts = Counter(token for one in hidden for token in one.targets)
    total, (most, _) = math.log(counts.total()), max(counts.items(), key=lambda one: (one[1], -one[0]))
    return tuple(
        (
            sum(token == most for token in one.targets) / len(one.targets),
            sum(math.log(counts[token]) - total for token in one.targets) / len(one.targets),
        )
        for one in hidden
    )


def corpus_task(*, train: Path | str, validation: Path | str, text: str = "text") -> Task:
    """Masked language modelling on files of one's own: plain text (.txt, one line a row), or a column of CSV, TSV, JSON Lines,
    parquet.

    Named by what is in the files, never by where they lie. Raises: DataError for files that are absent, the same, or hold no
    words.
    """
    paths = {"train": Path(train), "validation": Path(validation)}
    absent = [str(path) for path in paths.values() if not path.is_file()]
    if absent or paths["train"].resolve() == paths["validation"].resolve():
        what = "there are no such files" if absent else "a file serves twice"
        raise DataError(what, got=", ".join(absent) or str(train), expected="a file to train on and another to report on")
    rows = {split: _rows_of(path, split, text) for split, path in paths.items()}
    return replace(
        MLM_WIKITEXT2,
        name="mlm",
        folder="",
        splits={"train": "train", "report": "validation"},
        source=Loaded(rows, {"text": [text], "label": None, "metric": "masked_accuracy", "labels": [], "form": "masked"}),
        text=(text,),
    )


def _rows_of(path: Path, split: str, column: str) -> Rows:
    problems: Problems = {}
    if path.suffix == ".txt":
        try:
            found = path.read_text("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise DataError(f"{path} is not UTF-8", got=str(error)) from error
    else:
        found = []
        for number, row in read_rows(path, (column,), problems):
            value = row.get(column)
            if isinstance(value, str):
                found.append(value)
            else:
                problems.setdefault(f"{column} is no text", []).append(number)
    passages = text.cut(found)
    if not passages and not problems:
        problems["no words"] = []
    if problems:
        raise DataError(f"bad data in {path}", got="\n            ".join(told(problems)), expected="text in every row")
    ids = tuple(f"{split}:{number}" for number in range(1, len(passages) + 1))
    return Rows(ids, tuple((passage,) for passage in passages), (None,) * len(passages))
