"""Rows → tokens → batches, on a vocabulary small enough to write the numbers down."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import DataError
from tombola.tasks.base import Rows
from tombola.tasks.encode import Encoded, batches, by_length, collate, encode

# numbers of conftest's vocabulary
PAD, UNK, CLS, SEP, A, THE, FILM, WAS, GOOD = 0, 1, 2, 3, 5, 6, 7, 12, 19


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    import transformers

    return transformers.AutoTokenizer.from_pretrained(tiny_folder)


def rows_of(*texts: tuple[str, ...]) -> Rows:
    return Rows(tuple(f"dev:{i}" for i in range(len(texts))), texts, tuple(i % 2 for i in range(len(texts))))


def of_lengths(*lengths: int) -> Encoded:
    inputs = tuple({"input_ids": (A,) * length} for length in lengths)
    return Encoded(tuple(map(str, range(len(lengths)))), inputs, (0,) * len(lengths), 0, {"input_ids": PAD})


# encode


def test_single_texts_keep_order_ids_and_labels(tokenizer: Any) -> None:
    encoded = encode(tokenizer, rows_of(("the film was good",), ("good",), ("zebra",)), 16)
    assert [row["input_ids"] for row in encoded.inputs] == [(CLS, THE, FILM, WAS, GOOD, SEP), (CLS, GOOD, SEP), (CLS, UNK, SEP)]
    assert (encoded.ids, encoded.labels, encoded.truncated) == (("dev:0", "dev:1", "dev:2"), (0, 1, 0), 0)
    assert (encoded.lengths, len(encoded)) == ([6, 3, 3], 3)
    assert encoded.pad == {"input_ids": PAD, "token_type_ids": 0}


def test_the_second_text_of_a_pair_has_token_type_one(tokenizer: Any) -> None:
    (row,) = encode(tokenizer, rows_of(("the film", "good")), 16).inputs
    assert row["input_ids"] == (CLS, THE, FILM, SEP, GOOD, SEP)
    assert row["token_type_ids"] == (0, 0, 0, 0, 1, 1)


def test_of_a_pair_the_longer_text_loses_its_end(tokenizer: Any) -> None:
    encoded = encode(tokenizer, rows_of(("film a a a a good", "the was"), ("the was", "film a a a a good")), 8)
    assert [row["input_ids"] for row in encoded.inputs] == [
        (CLS, FILM, A, A, SEP, THE, WAS, SEP),
        (CLS, THE, WAS, SEP, FILM, A, A, SEP),
    ]
    assert encoded.truncated == 2


def test_only_rows_that_lost_something_count_as_truncated(tokenizer: Any) -> None:
    # 3, 4 and 9 words: 5, 6 and 11 tokens
    encoded = encode(tokenizer, rows_of(("a a a",), ("a a a a",), ("a " * 9,)), 5)
    assert (encoded.truncated, encoded.lengths) == (2, [5, 5, 5])
    assert encode(tokenizer, rows_of(("a a a",), ("a a a a",), ("a " * 9,)), 11).truncated == 0


def test_inputs_and_padding_are_those_of_the_tokenizer() -> None:
    class NoTypes:
        pad_token_id = 1

        def __call__(self, texts: list[str], *, max_length: int, **_: Any) -> dict[str, list[list[int]]]:
            return {"input_ids": [[len(word) for word in text.split()][:max_length] for text in texts]}

    encoded = encode(NoTypes(), rows_of(("aaa aa",), ("aaaa",)), 8)
    assert encoded.pad == {"input_ids": 1}
    assert collate(encoded, [0, 1])["input_ids"].tolist() == [[3, 2], [4, 1]]


def test_an_empty_set_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match="no rows to encode"):
        encode(tokenizer, rows_of(), 16)


# collate


def test_batches_are_padded_at_the_end_to_their_longest_row(tokenizer: Any) -> None:
    encoded = encode(tokenizer, rows_of(("the film", "good"), ("the film was good", "a"), ("a", "a")), 16)
    batch = {name: value.tolist() for name, value in collate(encoded, [2, 0]).items()}
    assert batch == {
        "input_ids": [[CLS, A, SEP, A, SEP, PAD], [CLS, THE, FILM, SEP, GOOD, SEP]],
        "token_type_ids": [[0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 1, 1]],
        "labels": [0, 0],
    }
    assert collate(encoded, [1])["labels"].tolist() == [1]
    assert all(value.dtype == torch.int64 for value in collate(encoded, [0, 1]).values())


# by_length, batches


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=60), st.integers(1, 200))
def test_every_row_comes_once_within_the_budget_shortest_first(lengths: list[int], budget: int) -> None:
    groups = by_length(of_lengths(*lengths), budget)
    order = [row for group in groups for row in group]
    assert sorted(order) == list(range(len(lengths)))
    assert order == [row for _, row in sorted((length, row) for row, length in enumerate(lengths))]
    for group in groups:
        tokens = len(group) * max(lengths[row] for row in group)
        assert tokens <= budget or len(group) == 1  # a row that is over the budget alone still comes, alone


def test_batches_are_as_full_as_the_budget_allows() -> None:
    assert by_length(of_lengths(5, 2, 3, 2, 5, 30), 10) == [[1, 3, 2], [0, 4], [5]]


def test_batches_name_their_rows_and_carry_their_inputs() -> None:
    encoded = of_lengths(5, 2, 3)
    found = [
        (rows.tolist(), inputs["input_ids"].shape, inputs["attention_mask"].sum(1).tolist())
        for rows, inputs in batches(encoded, 6)
    ]
    assert found == [([1, 2], (2, 3), [2, 3]), ([0], (1, 5), [5])]


def test_labels_of_a_regression_stay_the_numbers_they_are() -> None:
    encoded = Encoded(("a", "b"), ({"input_ids": (A,)},) * 2, (0.0, 3.8), 0, {"input_ids": PAD})
    labels = collate(encoded, [1, 0])["labels"]
    assert labels.dtype == torch.float32 and labels.tolist() == pytest.approx([3.8, 0.0])
