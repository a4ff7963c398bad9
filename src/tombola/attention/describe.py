"""Numbers that describe an attention map: how spread it is, how far it looks, and on which tokens it rests.

All are of rows brought to sum 1, so that raw and norm-weighted maps are described in the same units: what an average token does.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from tombola.errors import DataError

_MARKS = ("##", "Ġ", "▁")  # how tokenizers write that a token begins a word, or goes on with one


@dataclass(frozen=True, slots=True, eq=False)
class Descriptors:
    """Means over the queries of each map. NaN for a map with a row of zeros, as the weighted map of a removed head is."""

    entropy: Float[Tensor, "*head"]  # nats: 0 = one token, log(keys) = all alike
    distance: Float[Tensor, "*head"]  # mean of |query - key|, in tokens
    mass: Mapping[str, Float[Tensor, "*head"]]  # on each group of tokens: share in [0, 1]
    previous: Float[Tensor, "*head"]  # share on the token before, over the queries that have one
    self: Float[Tensor, "*head"]
    next: Float[Tensor, "*head"]


def describe(maps: Float[Tensor, "*head query key"], groups: Mapping[str, Bool[Tensor, " key"]]) -> Descriptors:
    """The descriptors of these maps, all of one row; `groups` from `token_groups`, or any others.

    Raises: DataError for maps that are not square, where positions of queries and keys mean different things.
    """
    n = maps.shape[-1]
    if maps.shape[-2] != n or n < 2:
        raise DataError("only square maps of two tokens or more can be described", got=f"shape {tuple(maps.shape)}")
    total = maps.sum(-1, keepdim=True)
    p = torch.where(total > 0, maps / total, torch.nan)
    position = torch.arange(n, device=maps.device)
    far = (position[:, None] - position[None, :]).abs().to(p)
    return Descriptors(
        entropy=-torch.xlogy(p, p).sum(-1).mean(-1),
        distance=(p * far).sum(-1).mean(-1),
        mass={name: p[..., of].sum(-1).mean(-1) for name, of in groups.items()},
        previous=p.diagonal(-1, -2, -1).mean(-1),
        self=p.diagonal(0, -2, -1).mean(-1),
        next=p.diagonal(1, -2, -1).mean(-1),
    )


def token_groups(tokenizer: Any, tokens: Sequence[int]) -> dict[str, Bool[Tensor, " key"]]:
    """Which tokens are [CLS], [SEP] (or what the model has instead of them: <s>, </s>) and punctuation.

    Punctuation: every character is of a Unicode category P, marks of word pieces aside. A decoder without [CLS] has none.
    """
    special = {name: getattr(tokenizer, f"{name}_token_id", None) for name in ("cls", "sep")}
    words = tokenizer.convert_ids_to_tokens(list(tokens))
    ids = torch.tensor(list(tokens))
    groups = {name: torch.zeros(len(ids), dtype=torch.bool) if one is None else ids == one for name, one in special.items()}
    apart = set(tokenizer.all_special_ids)
    marks = [token not in apart and _is_punctuation(word) for token, word in zip(tokens, words, strict=True)]
    return groups | {"punctuation": torch.tensor(marks)}


def _is_punctuation(word: str) -> bool:
    for mark in _MARKS:
        word = word.removeprefix(mark) if word != mark else word  # "##" may also be the text itself
    return bool(word) and all(unicodedata.category(character).startswith("P") for character in word)
