"""Tasks: what is read is what stands in the files, what is written is what was promised, and nothing leaks."""

import gzip
import hashlib
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

from tombola.errors import DataError
from tombola.tasks import (
    TASKS,
    Grammar,
    Role,
    Rows,
    bare_name,
    data_doubts,
    get_task,
    load_rows,
    shared_texts,
    split_selection,
)
from tombola.tasks.acceptability import PHENOMENA
from tombola.tasks.overlap import CONSTRUCTIONS, NOUN_PAIRS, VERB_PAIRS

# --- rows and selection ----------------------------------------------------------------------------------------------


def some_rows(number: int, text: Callable[[int], str] = str) -> Rows:
    at = range(number)
    return Rows(
        ids=tuple(f"train:{i}" for i in at),
        texts=tuple((text(i),) for i in at),
        labels=tuple(i % 2 for i in at),
        groups=tuple("ab"[i % 2] for i in at),
    )


def test_take_moves_all_columns_together() -> None:
    taken = some_rows(5).take([3, 0])
    assert taken == Rows(ids=("train:3", "train:0"), texts=(("3",), ("0",)), labels=(1, 0), groups=("b", "a"))
    assert len(taken) == 2
    assert Rows(ids=("a",), texts=(("x",),), labels=(0,)).take([0]).groups is None


def test_rows_of_unequal_columns_or_repeated_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"columns of Rows differ in length\n  got:      \[2, 1, 2\]"):
        Rows(ids=("a", "b"), texts=(("x",),), labels=(0, 1))
    with pytest.raises(DataError, match=r"row ids repeat.*\n.*2 rows with 1 different ids"):
        Rows(ids=("a", "a"), texts=(("x",), ("y",)), labels=(0, 1))


@settings(deadline=None, max_examples=60)
@given(
    number=st.integers(40, 120),
    texts=st.integers(20, 200),
    report_rows=st.integers(6, 40),
    max_train=st.none() | st.integers(15, 60),
    max_selection=st.none() | st.integers(6, 20),
    seed=st.integers(0, 10**6),
)
def test_selection_and_train_share_no_row_and_no_text(
    number: int, texts: int, report_rows: int, max_train: int | None, max_selection: int | None, seed: int
) -> None:
    rng = random.Random(seed)
    rows = some_rows(number, lambda _: str(rng.randrange(texts)))
    caps = {"seed": seed, "max_train": max_train, "max_selection": max_selection}
    try:
        train, selection = split_selection(rows, report_rows, **caps)  # type: ignore[arg-type]
    except DataError as error:
        assert "fewer than two classes" in str(error)  # small random parts may be of one class
        return
    assert len(selection) == min(report_rows, int(0.15 * number), max_selection or number)
    assert not set(train.ids) & set(selection.ids) and not set(train.texts) & set(selection.texts)
    position = {id: i for i, id in enumerate(rows.ids)}
    for part in (train, selection):
        at = [position[id] for id in part.ids]
        assert at == sorted(at) and part == rows.take(at)
    dropped = len(shared_texts(rows, selection)) - len(selection)
    assert len(train) == min(number - len(selection) - dropped, max_train or number)
    assert split_selection(rows, report_rows, **caps) == (train, selection)  # type: ignore[arg-type]


def test_rows_with_the_texts_of_a_selection_row_leave_train_and_are_counted() -> None:
    rows = some_rows(200, lambda i: str(i // 2))  # every text twice
    train, selection = split_selection(rows, 30, seed=1)
    twice = sum(count == 2 for count in Counter(selection.texts).values())
    dropped = 30 - 2 * twice  # one partner for each selection row whose partner is not in the selection itself
    assert dropped > 10
    assert len(shared_texts(rows, selection)) - len(selection) == dropped
    assert len(train) == 170 - dropped
    assert shared_texts(train, selection) == ()


def test_selection_is_drawn_uniformly() -> None:
    rows, drawn = some_rows(100), Counter[str]()
    for seed in range(2000):
        drawn.update(split_selection(rows, 50, seed=seed)[1].ids)
    # 15 of 100 rows, 2000 times: mean 300, standard deviation 16; the largest of 100 deviations stays under 5 of them
    assert len(drawn) == 100 and all(220 < count < 380 for count in drawn.values())


def test_caps_are_nested_and_do_not_move_each_other() -> None:
    rows = some_rows(400)
    small, selection = split_selection(rows, 60, seed=7, max_train=50)
    large, same_selection = split_selection(rows, 60, seed=7, max_train=200)
    assert set(small.ids) < set(large.ids) and selection == same_selection
    same_train, fewer = split_selection(rows, 60, seed=7, max_train=50, max_selection=20)
    assert set(fewer.ids) < set(selection.ids) and same_train == small
    assert split_selection(rows, 60, seed=8, max_train=50)[0] != small


def test_parts_that_cannot_serve_are_refused() -> None:
    with pytest.raises(DataError, match="too few train rows to hold any out for selection\n  got:      6 rows"):
        split_selection(some_rows(6), 100, seed=0)
    with pytest.raises(DataError, match=r"(?s)not positive.*\{'max_train': 0, 'max_selection': -1\}"):
        split_selection(some_rows(100), 100, seed=0, max_train=0, max_selection=-1)
    with pytest.raises(DataError, match=r"(?s)^train and selection would hold fewer.*1 train rows, 1 selection rows"):
        split_selection(some_rows(100), 100, seed=0, max_train=1, max_selection=1)


# --- names and options -----------------------------------------------------------------------------------------------


def test_tasks_are_named_as_they_are_called() -> None:
    assert {name: task.name for name, task in TASKS.items()} == {name: name for name in TASKS}
    assert {name: (task.metric, task.extra_metrics, task.labels) for name, task in TASKS.items()} == {
        "cola": ("matthews", (), ("unacceptable", "acceptable")),
        "sst2": ("accuracy", (), ("negative", "positive")),
        "mrpc": ("accuracy", ("f1",), ("not_equivalent", "equivalent")),
        "qqp": ("accuracy", ("f1",), ("not_duplicate", "duplicate")),
        "stsb": ("pearson", ("spearman",), ("score",)),
        "mnli": ("accuracy", (), ("entailment", "neutral", "contradiction")),
        "qnli": ("accuracy", (), ("entailment", "not_entailment")),
        "rte": ("accuracy", (), ("entailment", "not_entailment")),
        "wnli": ("accuracy", (), ("not_entailment", "entailment")),
        "hans": ("accuracy", (), ("entailment", "non-entailment")),
        "mnli2": ("accuracy", (), ("entailment", "not_entailment")),
        "mnli2-half": ("accuracy", (), ("entailment", "not_entailment")),
        "hans+mnli2": ("accuracy", (), ("entailment", "not_entailment")),
        "hans-subcases": ("accuracy", (), ("entailment", "non-entailment")),
        "paws-qqp": ("accuracy", (), ("not_duplicate", "duplicate")),
        "paws-wiki": ("accuracy", (), ("not_duplicate", "duplicate")),
        "fever": ("accuracy", (), ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")),
        "fever-symmetric": ("accuracy", (), ("SUPPORTS", "REFUTES")),
        "fm2": ("accuracy", (), ("SUPPORTS", "REFUTES")),
        "mnli-hans": ("accuracy", (), ("entailment", "neutral", "contradiction")),
        "mnli+hans": ("accuracy", (), ("entailment", "neutral", "contradiction")),
        "qqp-paws": ("accuracy", ("f1", "f1_of_0", "f1_weighted"), ("not_duplicate", "duplicate")),
        "qqp+paws": ("accuracy", ("f1", "f1_of_0", "f1_weighted"), ("not_duplicate", "duplicate")),
        "qqp-paws-wiki": ("accuracy", ("f1", "f1_of_0", "f1_weighted"), ("not_duplicate", "duplicate")),
        "qqp+paws-wiki": ("accuracy", ("f1", "f1_of_0", "f1_weighted"), ("not_duplicate", "duplicate")),
        "fever-symmetric-v1": ("accuracy", (), ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")),
        "fever-symmetric-v2": ("accuracy", (), ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")),
        "fever+symmetric-v2": ("accuracy", (), ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO")),
        "syn-mnli": ("accuracy", (), ("entailment", "neutral", "contradiction")),
        "syn-qqp": ("accuracy", ("f1",), ("not_duplicate", "duplicate")),
        "syn-sst2": ("accuracy", (), ("negative", "positive")),
        "acceptability": ("matthews", (), ("unacceptable", "acceptable")),
        "nli-overlap": ("accuracy", (), ("entailment", "not_entailment")),
        "agreement": ("exact_match", ("log_likelihood", "perplexity"), ()),
        "wikitext2": ("log_likelihood", (), ()),
        "mlm-wikitext2": ("masked_accuracy", ("log_likelihood",), ()),
        "squad": ("answer_f1", ("exact_match",), ()),
    }


def test_options_are_read_and_the_rest_keeps_its_default() -> None:
    assert get_task("cola") is not None and get_task("cola").options == {}
    expected = {"train_rows": 2000, "report_rows": 1000, "challenge_rows": 1000, "strength": 0.8}
    assert get_task("nli-overlap:strength=0.8,train_rows=2000").options == expected
    assert TASKS["nli-overlap"].options == {**expected, "train_rows": 4000, "strength": 0.9}


def test_unknown_task_offers_the_nearest_and_the_list() -> None:
    with pytest.raises(DataError) as caught:
        get_task("sst-2")
    assert str(caught.value) == (
        "there is no task 'sst-2'\n"
        "  got:      'sst-2'\n"
        "  expected: cola, sst2, mrpc, qqp, stsb, mnli, qnli, rte, wnli, hans, mnli2, mnli2-half, hans+mnli2, hans-subcases, "
        "paws-qqp, paws-wiki, fever, fever-symmetric, fm2, mnli-hans, mnli+hans, qqp-paws, qqp+paws, qqp-paws-wiki, "
        "qqp+paws-wiki, fever-symmetric-v1, fever-symmetric-v2, fever+symmetric-v2, syn-mnli, syn-qqp, syn-sst2, acceptability, "
        "nli-overlap, agreement, wikitext2, mlm-wikitext2, squad, mlm, files, hub:<name>[:config]\n"
        "  next:     did you mean 'sst2'?"
    )


def test_all_wrong_options_are_said_at_once() -> None:
    with pytest.raises(DataError) as caught:
        get_task("nli-overlap:strenght=0.8,strength=0.3,train_rows=many,report_rows,challenge_rows=2,challenge_rows=4,")
    assert str(caught.value) == (
        "wrong options of task nli-overlap\n"
        "  got:      there is no option 'strenght'; did you mean 'strength'?\n"
        "            strength=0.3 is not a number from 0.5 to 1.0\n"
        "            train_rows=many is not a whole number from 2 to 100000\n"
        "            'report_rows' is not option=value\n"
        "            challenge_rows is given twice\n"
        "            '' is not option=value\n"
        "  expected: train_rows (a whole number from 2 to 100000, default 4000), "
        "report_rows (a whole number from 2 to 100000, default 1000), "
        "challenge_rows (a whole number from 2 to 100000, default 1000), "
        "strength (a number from 0.5 to 1.0, default 0.9), answer=words (of a language model, instead of a head)"
    )
    with pytest.raises(DataError, match=r"(?s)no option 'seed'.*train \(a split, default train\), selection \(a"):
        get_task("cola:seed=1")
    with pytest.raises(DataError, match=r"strength=nan is not a number from 0\.5 to 1\.0"):
        get_task("nli-overlap:strength=nan")


def test_a_task_is_read_from_the_splits_it_is_told_and_says_so_in_its_name() -> None:
    task = get_task("mnli:train=train_from_dev,challenge=none")
    assert task.splits == {"train": "train_from_dev", "report": "validation_matched"}
    assert get_task("sst2:selection=dev2,challenge=adv").splits == {
        **{"train": "train", "selection": "dev2", "report": "validation", "challenge": "adv"}
    }
    assert bare_name("qnli:train=train_from_dev") == "qnli:train=train_from_dev"
    assert bare_name("nli-overlap:strength=0.8") == "nli-overlap" and bare_name("files#0123abcd") == "files"
    assert bare_name("hub:a/b:c#0123abcd") == "hub:a/b:c"


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rte:train=validation", "the split validation serves twice"),
        ("rte:report=none", "report=none is not the name of a split"),
        ("rte:report=../secret", "report=../secret is not the name of a split"),
        ("rte:report=", "report= is not the name of a split"),
        ("rte:report=a,report=b", "report is given twice"),
        ("rte:reports=a", "there is no option 'reports'; did you mean 'report'?"),
        ("files", "the task `files` is made of files"),
    ],
)
def test_splits_that_cannot_be_are_refused(spec: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        get_task(spec)
    assert said in str(caught.value)


def test_what_is_not_official_is_said() -> None:
    task = get_task("wnli:train=train_from_dev")
    rows: dict[Role, Rows] = {"train": some_rows(635), "report": some_rows(70)}
    said = data_doubts(task, rows)
    assert said[0].startswith("WNLI is degenerate")
    assert said[1:] == (
        "the train rows are of 'train_from_dev', no official split of wnli: compare with no published score",
        "'validation' has 70 rows here, officially 71: compare with no published score",
    )
    assert data_doubts(get_task("rte"), {"train": some_rows(2490), "report": some_rows(277)}) == ()
    assert data_doubts(get_task("acceptability"), {"train": some_rows(3), "report": some_rows(3)}) == ()


def test_rows_of_a_selection_split_choose_the_mask_and_leave_train() -> None:
    train, own = some_rows(100), some_rows(30, lambda i: str(i + 90))  # rows 90 to 99 of train have the texts of own rows
    kept, selection = split_selection(train, 50, seed=3, own=own)
    assert selection == own and kept == train.take(range(90))
    capped, fewer = split_selection(train, 50, seed=3, own=own, max_train=20, max_selection=8)
    assert len(capped) == 20 and set(capped.ids) < {f"train:{i}" for i in range(100)} and len(fewer) == 8
    assert set(fewer.texts) < set(own.texts) and not shared_texts(capped, fewer)


def test_values_are_split_without_classes_but_never_all_the_same() -> None:
    rows = Rows(tuple(f"r{i}" for i in range(60)), tuple((str(i),) for i in range(60)), tuple(i / 7 for i in range(60)))
    train, selection = split_selection(rows, 9, seed=0)
    assert len(selection) == 9 and len(train) == 51
    same = Rows(rows.ids, rows.texts, (2.5,) * 60)
    with pytest.raises(DataError, match="train and selection would hold fewer than two different values"):
        split_selection(same, 9, seed=0)


def test_absent_role_is_said_with_those_there_are() -> None:
    with pytest.raises(
        DataError,
        match=r"task rte has no challenge split\n  expected: train \(train\), report \(validation\)",
    ):
        load_rows(TASKS["rte"], "challenge", data_dir=None)


# --- real data from files --------------------------------------------------------------------------------------------

GOOD = (
    {"sentence": "It rained.", "label": 1, "idx": 0},
    {"sentence": "Rained it. ", "label": 0, "idx": 7},
    {"sentence": "NA", "label": "acceptable", "idx": 2, "domain": "in"},
)


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def put(folder: Path, content: bytes, name: str = "cola/train.jsonl.gz") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return path


def said_of(folder: Path, task: str = "cola") -> str:
    with pytest.raises(DataError) as caught:
        load_rows(TASKS[task], "train", data_dir=folder)
    return str(caught.value)


@pytest.mark.parametrize("name", ["cola/train.jsonl.gz", "cola/train.jsonl"])
def test_rows_are_read_as_they_stand(tmp_path: Path, name: str) -> None:
    put(tmp_path, lines(*GOOD), name)
    assert load_rows(TASKS["cola"], "train", data_dir=tmp_path) == Rows(
        ids=("train:0", "train:7", "train:2"),
        texts=(("It rained.",), ("Rained it. ",), ("NA",)),
        labels=(1, 0, 1),
    )


def test_pairs_keep_their_order_and_unusual_texts_stay_whole(tmp_path: Path) -> None:
    odd = ("null", "None", "été\u2028naïve\x85end", 'a\tb\n"c"', "nan")
    rows = [{"idx": i, "label": i % 2, "sentence2": "second", "sentence1": text} for i, text in enumerate(odd)]
    put(tmp_path, lines(*rows).removesuffix(b"\n"), "mrpc/validation.jsonl.gz")
    read = load_rows(TASKS["mrpc"], "report", data_dir=tmp_path)
    assert read.texts == tuple((text, "second") for text in odd)
    assert read.ids[-1] == "validation:4"


def test_all_faults_of_a_file_are_said_at_once_with_five_rows_each(tmp_path: Path) -> None:
    path = put(
        tmp_path,
        lines(
            GOOD[0],
            {"sentence": None, "label": float("nan"), "idx": 1},
            {"sentence": "x", "label": 2, "idx": 2},
            {"sentence": "   ", "label": -1, "idx": 3},
            {"sentence": 4, "label": True, "idx": "4"},
            {"text": "x", "label": 0, "idx": 5},
            ["no", "object"],
            *({**GOOD[0], "sentence": "again"},) * 7,
        )
        + b'{"sentence": "cut\n\xff\n\n'
        + lines({"sentence": "y", "label": 1.0, "idx": [1]}),
    )
    assert said_of(tmp_path) == (
        f"bad data in {path}\n"
        "  got:      sentence is null or NaN: row 2\n"
        "            label is null or NaN: row 2\n"
        "            label 2 is none of the classes: row 3\n"
        "            sentence is empty: row 4\n"
        "            label -1 is none of the classes: row 4\n"
        "            sentence is no text but of type int: row 5\n"
        "            label True is none of the classes: row 5\n"
        "            idx is no integer but of type str: row 5\n"
        "            no column 'sentence' (columns there: text, label, idx): row 6\n"
        "            not a JSON object: row 7\n"
        "            idx repeats that of an earlier row: rows 8, 9, 10, 11, 12 and 2 more\n"
        "            not valid JSON (Unterminated string starting at): row 15\n"
        "            and 5 more kinds of problem\n"
        "  expected: columns sentence, label (0 = unacceptable, 1 = acceptable) and a unique integer idx in every row\n"
        "  next:     repair or replace the data; rows are never dropped silently"
    )


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "got:      no rows\n"),
        (lines(GOOD[0], GOOD[2]), "got:      every good row is of one class, acceptable\n"),
        (lines(*GOOD) + b"\xc3\x28\n", "got:      not UTF-8: row 4\n"),
        (lines(*GOOD) + b"\n", "got:      not valid JSON (Expecting value): row 4\n"),
        (lines(*GOOD, {"sentence": "x", "label": 1.0, "idx": 9}), "got:      label 1.0 is none of the classes: row 4\n"),
        (lines(*GOOD, {"sentence": "x", "label": "yes", "idx": 9}), "label 'yes' is none of the classes: row 4\n"),
        (lines(*GOOD, {"sentence": "x", "label": 1, "idx": True}), "idx is no integer but of type bool: row 4\n"),
        (lines({"idx": 1}), "no column 'sentence' (columns there: idx): row 1\n            no column 'label'"),
    ],
)
def test_each_fault_is_named(tmp_path: Path, content: bytes, fault: str) -> None:
    put(tmp_path, content)
    assert fault in said_of(tmp_path)


def test_scores_of_stsb_are_read_as_the_numbers_they_are(tmp_path: Path) -> None:
    pair = {"sentence1": "a", "sentence2": "b"}
    rows = [{**pair, "label": label, "idx": i} for i, label in enumerate((3.8, 0, 5))]
    put(tmp_path, lines(*rows), "stsb/train.jsonl")
    read = load_rows(TASKS["stsb"], "train", data_dir=tmp_path)
    assert read.labels == (3.8, 0.0, 5.0) and all(type(label) is float for label in read.labels)
    bad = [
        {**pair, "label": label, "idx": i}
        for i, label in enumerate(("3.8", True, float("inf"), float("nan"), None, 10**400, 1.0))
    ]
    put(tmp_path, lines(*bad), "stsb/train.jsonl")
    said = said_of(tmp_path, "stsb")
    for fault in ("label '3.8' is no number: row 1", "label True is no number: row 2", "label inf is no finite number: row 3"):
        assert fault in said
    assert "label is null or NaN: rows 4, 5" in said and "label 1000" in said and "label (a number)" in said
    put(tmp_path, lines(*[{**row, "label": 2} for row in rows]), "stsb/train.jsonl")
    assert "every good row has the same value, 2" in said_of(tmp_path, "stsb")


def test_damaged_compression_is_said(tmp_path: Path) -> None:
    path = put(tmp_path, lines(*GOOD))
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    assert said_of(tmp_path).startswith(f"{path} cannot be read: damaged, cut short or no gzip file\n  got:      EOFError")
    path.write_bytes(lines(*GOOD))
    assert "got:      BadGzipFile: Not a gzipped file" in said_of(tmp_path)
    path.write_bytes(whole[:12] + bytes(byte ^ 255 for byte in whole[12:]))
    assert "cannot be read" in said_of(tmp_path)


def test_missing_places_list_what_is_there(tmp_path: Path) -> None:
    put(tmp_path, lines(*GOOD), "cola/test.jsonl.gz")
    put(tmp_path, lines(*GOOD), "sst2/train.jsonl.gz")
    assert said_of(tmp_path) == (
        "no file for split 'train' of cola\n"
        f"  got:      {tmp_path / 'cola'} holds test.jsonl.gz\n"
        "  expected: either train.jsonl.gz or train.jsonl\n"
        f"  next:     put the file into {tmp_path / 'cola'}, or name a split that is there: cola:train=SPLIT,report=SPLIT"
    )
    assert said_of(tmp_path, "rte") == (
        f"there is no data folder {tmp_path / 'rte'}\n"
        f"  got:      {tmp_path} holds cola, sst2\n"
        "  expected: a folder with rte/train.jsonl.gz in it\n"
        "  next:     give --data the folder that holds one folder a task"
    )
    nowhere = tmp_path / "no" / "where"
    assert f"there is no data folder {nowhere}\n  got:      {nowhere.parent} holds nothing\n" in said_of(nowhere)


def test_two_files_for_one_split_are_refused(tmp_path: Path) -> None:
    put(tmp_path, lines(*GOOD))
    put(tmp_path, lines(*GOOD), "cola/train.jsonl")
    assert said_of(tmp_path).startswith("two files for split 'train' of cola\n")


# --- real data from the Hub ------------------------------------------------------------------------------------------


def hub_with(monkeypatch: pytest.MonkeyPatch, names: list[str], labels: list[int]) -> list[object]:
    """A Hub that knows one data set; the list it returns fills with what it is asked for."""
    import datasets

    columns = {"sentence1": ["a"] * len(labels), "sentence2": ["b"] * len(labels), "label": labels}
    features = datasets.Features(
        sentence1=datasets.Value("string"),
        sentence2=datasets.Value("string"),
        label=datasets.ClassLabel(names=names),
        idx=datasets.Value("int32"),
    )
    asked: list[object] = []

    def load_dataset(*args: object, **kwargs: object) -> object:
        asked.append((args, kwargs))
        return datasets.Dataset.from_dict({**columns, "idx": list(range(len(labels)))}, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def test_hub_labels_are_joined_by_name_at_the_pinned_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = hub_with(monkeypatch, ["not_entailment", "entailment"], [0, 0, 1])
    rows = load_rows(TASKS["rte"], "report", data_dir=None)
    assert rows == Rows(ids=("validation:0", "validation:1", "validation:2"), texts=(("a", "b"),) * 3, labels=(1, 1, 0))
    revision = "bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c"
    assert asked == [(("nyu-mll/glue", "rte"), {"split": "validation", "revision": revision})]


def test_hub_rows_without_a_label_or_with_other_classes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, ["entailment", "not_entailment"], [-1, -1])
    with pytest.raises(DataError, match=r"bad data in split 'train' of rte from the Hub\n.*label -1 .* rows 1, 2\n"):
        load_rows(TASKS["rte"], "train", data_dir=None)
    hub_with(monkeypatch, ["yes", "no"], [0, 1])
    with pytest.raises(DataError, match=r"other classes for rte\n.*yes, no\n.*entailment, not_entailment"):
        load_rows(TASKS["rte"], "train", data_dir=None)


def test_a_float_of_the_hub_is_the_number_that_was_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    columns = {"sentence1": ["a", "c"], "sentence2": ["b", "d"], "label": [3.8, 1.667], "idx": [0, 1]}
    kinds = {"sentence1": "string", "sentence2": "string", "label": "float32", "idx": "int32"}
    features = datasets.Features({name: datasets.Value(kind) for name, kind in kinds.items()})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_dict(columns, features=features))
    assert load_rows(TASKS["stsb"], "report", data_dir=None).labels == (3.8, 1.667)


@pytest.mark.parametrize("failure", [ConnectionError("Couldn't reach the Hub"), ValueError("Couldn't find cache")])
def test_unreachable_hub_points_to_the_data_option(monkeypatch: pytest.MonkeyPatch, failure: Exception) -> None:
    import datasets

    def load_dataset(*_: object, **__: object) -> object:
        raise failure

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        load_rows(TASKS["sst2"], "train", data_dir=None)
    assert str(caught.value) == (
        "sst2 could not be loaded from the Hub\n"
        f"  got:      {type(failure).__name__}: {failure}\n"
        "  expected: nyu-mll/glue, configuration sst2, commit bcdcba79d07bc864c1c254ccfcedcce55bcc9a8c\n"
        "  next:     pass --data DIR with sst2/train.jsonl.gz in it, or go online"
    )


# --- generated tasks -------------------------------------------------------------------------------------------------

GENERATED = [(name, role) for name, task in TASKS.items() if isinstance(task.source, Grammar) for role in task.splits]


@pytest.fixture(scope="module")
def written() -> Mapping[tuple[str, str], Rows]:
    return {(name, role): load_rows(TASKS[name], role, data_dir=None) for name, role in GENERATED}


def every_text(rows: Rows) -> set[str]:
    return {text for texts in rows.texts for text in texts}


GOLDEN = {
    ("acceptability", "train"): "208ed596cfe2502f",
    ("acceptability", "report"): "3c40c06458858b58",
    ("nli-overlap", "train"): "776dfe4f86d51863",
    ("nli-overlap", "report"): "4e2d3ae46f906319",
    ("nli-overlap", "challenge"): "3d8bfe1b551bbd5e",
    ("agreement", "train"): "ada19bc858d84baa",
    ("agreement", "report"): "76163347152e95db",
    ("agreement", "challenge"): "4af6222024beaee5",
}


@pytest.mark.parametrize(("name", "role"), GENERATED)
def test_generated_rows_are_those_of_their_grammar_version(written: Mapping[tuple[str, str], Rows], name: str, role: str) -> None:
    """If this fails, the grammar gives other rows than before: raise its version and set the new hashes."""
    first = written[name, role].take(range(50))
    columns = [first.ids, first.texts, first.labels, first.groups]
    assert TASKS[name].source == Grammar(version=1)
    assert hashlib.sha256(json.dumps(columns).encode()).hexdigest()[:16] == GOLDEN[name, role]


@pytest.mark.parametrize(("name", "role"), GENERATED)
def test_generated_rows_depend_on_seed_and_own_size_only(name: str, role: Role) -> None:
    others = "".join(f",{option}=7" for option in TASKS[name].options if option.endswith("_rows") and role not in option)
    one, other = get_task(f"{name}:{role}_rows=200"), get_task(f"{name}:{role}_rows=200{others}")
    rows = load_rows(one, role, data_dir=None)
    assert rows == load_rows(other, role, data_dir=Path("unused"), seed=0)
    assert len(shared_texts(rows, load_rows(one, role, data_dir=None, seed=1))) < 10  # of 200, by chance


@pytest.mark.parametrize(("name", "role"), [one for one in GENERATED if one[0] != "agreement"])  # that has no classes
def test_generated_splits_have_their_size_balance_and_no_repeats(
    written: Mapping[tuple[str, str], Rows], name: str, role: str
) -> None:
    rows = written[name, role]
    assert len(rows) == TASKS[name].options[f"{role}_rows"] == (4000 if role == "train" else 1000)
    assert rows.ids[0] == f"{TASKS[name].splits[role]}:0"  # type: ignore[index]
    assert Counter(rows.labels) == {0: len(rows) // 2, 1: len(rows) // 2}
    assert len({texts[0] for texts in rows.texts}) == len(rows)
    assert rows.groups is not None
    by_group = Counter(zip((group.split("/")[-1] for group in rows.groups), rows.labels, strict=True))
    kinds = {group for group, _ in by_group}
    assert kinds == set(PHENOMENA if name == "acceptability" else CONSTRUCTIONS)
    assert max(by_group.values()) - min(by_group.values()) <= 2  # each kind serves both classes alike
    assert len({word for text in every_text(rows) for word in re.findall("[a-z]+", text.lower())}) > 200
    assert all(re.fullmatch(r"[A-Z][A-Za-z ]+[.?]", text) for text in every_text(rows))
    first_half = sum(rows.labels[: len(rows) // 2]) / len(rows)
    assert 0.2 < first_half < 0.3  # shuffled


@pytest.mark.parametrize("name", ["acceptability", "nli-overlap"])
def test_no_text_stands_in_two_splits_whatever_the_seeds(written: Mapping[tuple[str, str], Rows], name: str) -> None:
    texts = {role: every_text(written[task, role]) for task, role in GENERATED if task == name}
    texts["train"] |= every_text(load_rows(TASKS[name], "train", data_dir=None, seed=5))
    assert sum(map(len, texts.values())) == len(set().union(*texts.values()))


def test_halves_of_pairs_are_kept_apart_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many acceptable sentences may share one unacceptable partner, which then must not return with another of them."""
    drawn: dict[str, str] = {}

    def pair(rng: random.Random) -> tuple[str, str]:
        good, bad = f"Good {rng.randrange(10**9)}.", f"Bad {rng.randrange(300)}."
        drawn[good] = bad
        return good, bad

    for phenomenon in PHENOMENA:
        monkeypatch.setitem(PHENOMENA, phenomenon, pair)
    task = get_task("acceptability:train_rows=96,report_rows=48")
    train, report = (load_rows(task, role, data_dir=None) for role in ("train", "report"))
    shown = [text for rows in (train, report) for (text,) in rows.texts]
    bad = [drawn.get(text, text) for text in shown]  # the unacceptable half of each row's pair, shown or not
    assert len(set(bad)) == len(bad) == 144


def test_exhausted_grammar_is_said_instead_of_repeating(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PHENOMENA, "agreement", lambda _: ("The only pair.", "The pair only."))
    with pytest.raises(DataError) as caught:
        load_rows(get_task("acceptability:train_rows=100"), "train", data_dir=None)
    assert str(caught.value) == (
        "the grammar of acceptability has too few sentences of the kind 'agreement'\n"
        "  got:      train_rows=100\n"
        "  next:     ask for fewer rows"
    )


def bag_of_words_accuracy(train: Rows, report: Rows, read: Callable[[tuple[str, ...]], str] = " ".join) -> float:
    words = CountVectorizer()
    model = LogisticRegression(max_iter=300).fit(words.fit_transform(map(read, train.texts)), train.labels)
    return float(model.score(words.transform(map(read, report.texts)), report.labels))


@pytest.mark.parametrize("seed", [0, 1])
def test_acceptability_is_no_matter_of_words(seed: int) -> None:
    train, report = (load_rows(TASKS["acceptability"], role, data_dir=None, seed=seed) for role in ("train", "report"))
    assert 0.42 < bag_of_words_accuracy(train, report) < 0.58


@pytest.mark.parametrize("phenomenon", PHENOMENA)
def test_pairs_differ_and_only_in_a_few_words(phenomenon: str) -> None:
    rng = random.Random(0)
    for _ in range(300):
        good, bad = (sentence.lower().rstrip(".?").split() for sentence in PHENOMENA[phenomenon](rng))
        assert good != bad
        if phenomenon in ("inversion", "word-order", "polarity"):
            assert Counter(good) == Counter(bad)
        elif phenomenon not in ("transitivity", "gap"):  # these add or remove an object
            assert sum((Counter(good) - Counter(bad)).values()) <= 2


MANY = re.compile(r"\w*[^s]s|children|women|men")
FORMS = {
    **{"will": "base", "must": "base", "could": "base"},
    **{"has": "participle", "have": "participle"},
    **{"is": "ing", "are": "ing"},
}
SUBJECTS, OBJECTS = {"i", "he", "she", "we", "they"}, {"me", "him", "her", "us", "them"}
BEFORE_TO = {
    *("hoped", "decided", "agreed", "refused", "pretended", "offered"),
    *("promised", "wished", "vowed", "volunteered", "expected", "hesitated"),
}


def is_right(phenomenon: str, words: list[str]) -> bool:
    """A second, cruder reading of some phenomena, by the forms of the words alone."""
    following = dict(itertools.pairwise(words))
    if phenomenon == "determiner":
        (determiner,) = {"this", "that", "every", "each", "these", "those", "several", "many", "both"} & {*words}
        some = determiner in {"these", "those", "several", "many", "both"}
        return some == bool(MANY.fullmatch(following[determiner]))
    if phenomenon == "verb-form":
        (auxiliary,) = {*FORMS} & {*words}
        verb = following[auxiliary]
        form = "participle" if verb.endswith("ed") else "ing" if verb.endswith("ing") else "base"
        return form == FORMS[auxiliary]
    if phenomenon == "case":
        return words[0] in SUBJECTS and words[2] in OBJECTS
    if phenomenon == "complement":
        return bool(BEFORE_TO & {*words}) == ("to" in words)
    assert phenomenon == "polarity"
    return words[0] == "no"


@pytest.mark.parametrize("phenomenon", ["determiner", "verb-form", "case", "polarity", "complement"])
def test_acceptability_labels_agree_with_a_second_reading(written: Mapping[tuple[str, str], Rows], phenomenon: str) -> None:
    rows = written["acceptability", "train"]
    assert rows.groups is not None
    mine = [(t[0], lb) for t, lb, group in zip(rows.texts, rows.labels, rows.groups, strict=True) if group == phenomenon]
    assert len(mine) > 300
    assert [text for text, label in mine if is_right(phenomenon, text.lower().rstrip(".").split()) != (label == 1)] == []


def overlaps(rows: Rows) -> list[float]:
    """Share of the words of each hypothesis that its premise has too."""
    bags = [[text.lower().rstrip(".").split() for text in texts] for texts in rows.texts]
    return [sum(word in premise for word in hypothesis) / len(hypothesis) for premise, hypothesis in bags]


@pytest.mark.parametrize("strength", [0.5, 0.75, 0.9, 1.0])
def test_overlap_alone_scores_the_planted_strength_and_nothing_on_challenge(strength: float) -> None:
    task = get_task(f"nli-overlap:strength={strength},train_rows=200,report_rows=80,challenge_rows=80")
    for role in task.splits:
        rows = load_rows(task, role, data_dir=None)
        assert rows.groups is not None
        measured = overlaps(rows)
        assert set(measured) == {0.4, 1.0}  # all five words, or the two "the" only
        right = [(share == 1.0) == (label == 0) for share, label in zip(measured, rows.labels, strict=True)]
        assert sum(right) / len(rows) == (0.0 if role == "challenge" else strength)
        assert [group.split("/")[0] for group in rows.groups] == ["aligned" if r else "conflicting" for r in right]


def test_a_trained_overlap_model_falls_under_chance_on_challenge(written: Mapping[tuple[str, str], Rows]) -> None:
    train, report, challenge = (written["nli-overlap", role] for role in ("train", "report", "challenge"))
    model = LogisticRegression().fit([[share] for share in overlaps(train)], train.labels)
    assert model.score([[share] for share in overlaps(report)], report.labels) == pytest.approx(0.9)
    assert model.score([[share] for share in overlaps(challenge)], challenge.labels) == 0.0


@pytest.mark.parametrize("read", [lambda t: t[0], lambda t: t[1], " ".join], ids=["premise", "hypothesis", "both"])
def test_neither_text_nor_their_words_tell_entailment(
    written: Mapping[tuple[str, str], Rows], read: Callable[[tuple[str, ...]], str]
) -> None:
    train, report, challenge = (written["nli-overlap", role] for role in ("train", "report", "challenge"))
    assert 0.42 < bag_of_words_accuracy(train, report, read) < 0.58
    assert 0.42 < bag_of_words_accuracy(train, challenge, read) < 0.58


# A second account of what each premise says: a pattern of the sentence, and the events in it as numbers of its groups.
READINGS = {
    "adjunct": (r".+? the (\w+) (\w+) the (\w+) .+", ("123",)),
    "passive": (r"the (\w+) was (\w+) by the (\w+) .+", ("321",)),
    "conjunction": (r"the (\w+) and the (\w+) (\w+) the (\w+)", ("134", "234")),
    "disjunction": (r"the (\w+) (\w+) the (\w+) after the \w+ or the \w+ \w+ the \w+", ("123",)),
    "preposition": (
        r"the (\w+) (?:near|behind|beside|next to|in front of|across from) the \w+ (\w+) the (\w+)",
        ("123",),
    ),
    "subject-relative": (r"the (\w+) who (\w+) the (\w+) (\w+) the (\w+)", ("123", "145")),
    "object-relative": (r"the (\w+) who the (\w+) (\w+) (\w+) the (\w+)", ("231", "145")),
    "factive": (
        r"the (\w+) (\w+) the (\w+) and (?:knew|remembered|realized|noticed|discovered|learned|forgot|saw) that"
        r" the (\w+) (\w+) the (\w+)",
        ("123", "456"),
    ),
    "non-factive": (
        r"the (\w+) (\w+) the (\w+) and (?:claimed|believed|suspected|hoped|feared|assumed|imagined|pretended|guessed)"
        r" that the \w+ \w+ the \w+",
        ("123",),
    ),
    "stated-clause": (
        r"the (\w+) (\w+) the (\w+) (?:because|after|although|while|when|since) the (\w+) (\w+) the (\w+)",
        ("123", "456"),
    ),
    "open-clause": (
        r"the (\w+) (\w+) the (\w+) (?:in case|to find out whether|without (?:knowing|asking) whether) the .+",
        ("123",),
    ),
}


def test_nli_labels_agree_with_a_second_reading(written: Mapping[tuple[str, str], Rows]) -> None:
    words = [tuple(pair.split("/")) for pair in NOUN_PAIRS + VERB_PAIRS]
    synonyms = {word: pair[0] for pair in words for word in pair}
    assert len(synonyms) == 2 * len(words) > 150  # no word stands in two pairs
    for role in ("train", "report", "challenge"):
        rows = written["nli-overlap", role]
        assert rows.groups is not None
        for (premise, hypothesis), label, group in zip(rows.texts, rows.labels, rows.groups, strict=True):
            pattern, events = READINGS[group.split("/")[1]]
            found = re.fullmatch(pattern, premise.lower().rstrip("."))
            assert found, premise
            said = {tuple(synonyms[found[int(number)]] for number in event) for event in events}
            _, who, deed, _, whom = hypothesis.lower().rstrip(".").split()
            assert ((synonyms[who], synonyms[deed], synonyms[whom]) in said) == (label == 0), (premise, hypothesis)


# --- the public data, where there is some ----------------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "role", "counts", "leaked"),
    [
        ("cola", "train", (2528, 6023), None),
        ("cola", "report", (322, 721), 16),
        ("sst2", "train", (29780, 37569), None),
        ("sst2", "report", (428, 444), 0),
        ("mrpc", "train", (1194, 2474), None),
        ("mrpc", "report", (129, 279), 0),
        ("qqp:report=validation_from_train", "train", (11619, 6878), None),
        ("qqp:report=validation_from_train", "report", (1874, 1126), None),
        ("qnli:train=train_from_dev", "train", (1452, 1511), None),
        ("qnli:train=train_from_dev", "report", (781, 719), 0),
        ("mnli:train=train_from_dev,challenge=validation_mismatched_hard", "train", (2328, 2066, 2119), None),
        ("mnli:train=train_from_dev,challenge=validation_mismatched_hard", "report", (794, 744, 764), 0),
        ("mnli:train=train_from_dev,challenge=validation_mismatched_hard", "challenge", (1710, 1400, 1420), None),
        ("rte", "train", (1249, 1241), None),
        ("rte", "report", (146, 131), 0),
        ("wnli", "train", (323, 312), None),
        ("wnli", "report", (40, 31), 0),
    ],
)
def test_public_data_has_its_known_rows(name: str, role: Role, counts: tuple[int, ...], leaked: int | None) -> None:
    """`leaked`: rows of the report split whose texts, letter for letter, are also in train."""
    rows, task = load_rows(get_task(name), role, data_dir=data_of_the_world()), get_task(name)
    assert tuple(rows.labels.count(i) for i in range(len(task.labels))) == counts
    if leaked is not None:
        assert len(shared_texts(rows, load_rows(task, "train", data_dir=data_of_the_world()))) == leaked


@pytest.mark.data
def test_public_scores_of_stsb_are_values_from_0_to_5() -> None:
    train, report = (load_rows(TASKS["stsb"], role, data_dir=data_of_the_world()) for role in ("train", "report"))  # type: ignore[arg-type]
    assert (len(train), len(report)) == (5749, 1500)
    assert {type(label) for label in train.labels} == {float} and (min(train.labels), max(train.labels)) == (0.0, 5.0)


def data_of_the_world() -> Path:
    folder = os.environ.get("TOMBOLA_DATA")
    if not folder:
        pytest.skip("TOMBOLA_DATA names no data folder")
    return Path(folder)
