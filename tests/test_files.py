"""Your own data: what stands in a file is what is read, the same rows are the same task, and every bad file is one error."""

import csv
import gzip
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import Run, sentiment_rows
from tombola.errors import DataError, SettingsError, TombolaError
from tombola.study.jobs import dense_of, find, open_lab
from tombola.study.results import collect
from tombola.tasks import Loaded, Task, files_task, hub_task, load_rows, spec_of
from tombola.tasks.base import Rows

ROWS = (
    {"text": "NA", "label": "pos"},
    {"text": "null", "label": "neg"},
    {"text": 'he said "so", twice', "label": "pos"},
    {"text": "été\tnaïve", "label": "None"},
    {"text": " blanks kept ", "label": "neg"},
)
OTHER = ({"text": "other", "label": "neg"}, {"text": "more", "label": "pos"})


# writing files


def as_csv(rows: Sequence[Mapping[str, Any]], delimiter: str = ",") -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_jsonl(rows: Sequence[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_parquet(rows: Sequence[Mapping[str, Any]]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(list(rows)), out)
    return out.getvalue()


WRITERS: Mapping[str, Callable[[Sequence[Mapping[str, Any]]], bytes]] = {
    "rows.csv": as_csv,
    "rows.tsv": lambda rows: as_csv(rows, "\t"),
    "rows.jsonl": as_jsonl,
    "rows.parquet": as_parquet,
    "semicolons.csv": lambda rows: as_csv(rows, ";"),
    "marked.csv": lambda rows: b"\xef\xbb\xbf" + as_csv(rows),
    "marked.jsonl": lambda rows: b"\xef\xbb\xbf" + as_jsonl(rows),
}


def put(folder: Path, name: str, content: bytes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def read(folder: Path, train: bytes, name: str = "train.csv", validation: bytes | None = None, **asked: Any) -> Task:
    paths = {"train": put(folder, name, train), "validation": put(folder, "other.jsonl", validation or as_jsonl(OTHER))}
    return files_task(**{**paths, "text": "text", "label": "label", **asked})  # type: ignore[arg-type]


def rows_of(task: Task, split: str = "train") -> Rows:
    assert isinstance(task.source, Loaded)
    return task.source.rows[split]


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(TombolaError) as caught:
        call()
    return str(caught.value)


# reading


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_rows_and_the_same_task(tmp_path: Path, name: str, packed: str) -> None:
    task = read(tmp_path, WRITERS[name](ROWS), name + packed)
    assert rows_of(task) == Rows(
        ids=tuple(f"train:{i}" for i in range(1, 6)),
        texts=tuple((row["text"],) for row in ROWS),
        labels=(2, 1, 2, 0, 1),
    )
    assert task.labels == ("None", "neg", "pos") and not task.regression
    assert spec_of(task) == spec_of(read(tmp_path / "elsewhere", as_csv(ROWS), "another name.csv"))


texts = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1).filter(lambda x: x.strip())


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.tuples(texts, st.sampled_from("ab")), min_size=2, max_size=8), st.sampled_from(["csv", "jsonl", "parquet", "tsv"])
)
def test_any_text_comes_through_letter_for_letter(tmp_path: Path, rows: list[tuple[str, str]], kind: str) -> None:
    rows = [*rows, ("one more", "a"), ("and one", "b")]
    written = [{"text": text, "label": label} for text, label in rows]
    others = as_jsonl([{"text": "\0first", "label": "a"}, {"text": "\0second", "label": "b"}])
    task = read(tmp_path, WRITERS[f"rows.{kind}"](written), f"train.{kind}", others)
    assert [row for (row,) in rows_of(task).texts] == [text for text, _ in rows]


def test_bare_quotation_marks_of_a_published_tsv_make_no_two_rows_one(tmp_path: Path) -> None:
    plain = b'text\tlabel\n"Hello" he said\tpos\n"open\tneg\nclose"\tpos\nlast\tneg\n'
    assert rows_of(read(tmp_path, plain, "train.tsv")).texts == (('"Hello" he said',), ('"open',), ('close"',), ("last",))
    merging = b'text\tlabel\n"open\tneg\nclose"\tpos\nlast\tneg\n'  # read as quoted this is one field over two lines
    assert len(rows_of(read(tmp_path, merging, "train.tsv"))) == 3
    quoted = b'text\tlabel\n"a ""b"""\tpos\n"two\nlines"\tneg\n'
    assert rows_of(read(tmp_path, quoted, "train.tsv")).texts == (('a "b"',), ("two\nlines",))


def test_pairs_classes_by_number_and_a_test_file(tmp_path: Path) -> None:
    rows = [{"b": f"b{i}", "a": f"a{i}", "y": (10, 2, -1)[i % 3], "more": None} for i in range(6)]
    other = [{"a": f"v{i}", "b": "x", "y": (2, 10)[i % 2]} for i in range(3)]
    test = put(tmp_path, "t.csv", as_csv([{"a": f"t{i}", "b": "x", "y": (2, 10)[i % 2]} for i in range(4)]))
    task = read(tmp_path, as_jsonl(rows), "a.jsonl", as_jsonl(other), text="a,b", label="y", test=test)
    assert task.labels == ("-1", "2", "10"), "whole numbers by value, not by their digits"
    assert rows_of(task).texts[0] == ("a0", "b0") and rows_of(task).labels == (2, 1, 0, 2, 1, 0)
    assert task.splits == {"train": "train", "report": "test", "selection": "validation"}
    assert [load_rows(task, role, data_dir=None).ids[0] for role in ("selection", "report")] == ["validation:1", "test:1"]  # type: ignore[arg-type]
    assert load_rows(task, "report", data_dir=None).labels == (1, 2, 1, 2)


@pytest.mark.parametrize("name", ["rows.csv", "rows.jsonl", "rows.parquet"])
def test_a_regression_reads_numbers(tmp_path: Path, name: str) -> None:
    rows = [{"text": f"t{i}", "label": value} for i, value in enumerate((3.8, -1.0, 2.5e-3))]
    task = read(
        tmp_path, WRITERS[name](rows), name, as_jsonl([{**row, "text": row["text"] + "!"} for row in rows]), regression=True
    )
    assert rows_of(task).labels == (3.8, -1.0, 0.0025) and task.regression
    assert (task.labels, task.metric, task.extra_metrics) == (("label",), "pearson", ("spearman",))


def test_32_bits_of_parquet_are_the_number_that_was_meant(tmp_path: Path) -> None:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.table({"text": ["a", "b"], "label": pyarrow.array([3.8, 0.1], pyarrow.float32())})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert rows_of(read(tmp_path, (tmp_path / "x.parquet").read_bytes(), "x.parquet", regression=True, validation=as_jsonl(
        [{"text": "c", "label": 1}, {"text": "d", "label": 2.5}])
    )).labels == (3.8, 0.1)  # fmt: skip


def test_a_task_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    specs = {
        "same": spec_of(read(tmp_path / "a", as_csv(ROWS))),
        "text": spec_of(read(tmp_path / "b", as_csv([{**ROWS[0], "text": "NB"}, *ROWS[1:]]))),
        "label": spec_of(read(tmp_path / "c", as_csv([{**ROWS[0], "label": "neg"}, *ROWS[1:]]))),
        "order": spec_of(read(tmp_path / "d", as_csv(ROWS[::-1]))),
        "validation": spec_of(read(tmp_path / "e", as_csv(ROWS), validation=as_jsonl(OTHER[::-1]))),
        "metric": spec_of(read(tmp_path / "f", as_csv(ROWS), metric="matthews")),
    }
    assert len(set(specs.values())) == len(specs)
    assert all(spec.startswith("files#") and str(tmp_path) not in spec for spec in specs.values())


def test_what_is_doubtful_is_said(tmp_path: Path) -> None:
    rows = [*ROWS, {"text": "x", "label": "Pos"}]
    shared = as_jsonl([{"text": "NA", "label": "pos"}, {"text": "new", "label": "neg"}])
    assert read(tmp_path, as_csv(rows), validation=shared).doubts == (
        "1 of 2 validation rows have the texts of a train row",
        "classes that differ in case or blanks only: 'Pos', 'pos'",
    )


# every bad file is one error

CSV = as_csv(ROWS)
# what is wrong → (name of the train file, its content, what is asked, a part of what is said)
BAD: dict[str, tuple[str, bytes, dict[str, Any], str]] = {
    "empty csv": ("a.csv", b"", {}, "no header line"),
    "empty tsv": ("a.tsv", b"", {}, "no header line"),
    "empty jsonl": ("a.jsonl", b"", {}, "no rows"),
    "empty parquet": ("a.parquet", b"", {}, "not readable as parquet"),
    "header only": ("a.csv", b"text,label\n", {}, "no rows"),
    "blank first line": ("a.csv", b"\n" + CSV, {}, "no header line"),
    "blank line": ("a.csv", b"text,label\na,pos\n\nb,neg\n", {}, "other than 2 fields, as the header has: row 2"),
    "ragged": ("a.csv", b"text,label\na,pos\nb,neg,more\nc\nd,pos\n", {}, "other than 2 fields, as the header has: rows 2, 3"),
    "ragged tsv": ("a.tsv", b"text\tlabel\na\tpos\nb\n", {}, "other than 2 fields, as the header has: row 2"),
    "column twice": ("a.csv", b"text,text,label\na,b,pos\n", {}, "the header names 'text' twice"),
    "open quote": (
        "a.csv",
        b'text,label\na,pos\n"b,neg\n',
        {},
        "not readable as CSV from here on (unexpected end of data): row 2",
    ),
    "text after quote": ("a.csv", b'text,label\n"a" b,pos\nb,neg\n', {}, "not readable as CSV from here on"),
    "a field of a megabyte": ("a.csv", b"text,label\n" + b"x" * 200_000 + b",pos\nb,neg\n", {}, "field larger than field limit"),
    "utf-16": ("a.csv", CSV.decode().encode("utf-16"), {}, "not UTF-8 (line 1)"),
    "latin-1": ("a.csv", CSV.decode().encode("latin-1"), {}, "not UTF-8 (line 5)"),
    "latin-1 jsonl": ("a.jsonl", as_jsonl(ROWS).decode().encode("latin-1"), {}, "not UTF-8: row 4"),
    "no gzip": ("a.csv.gz!", CSV, {}, "damaged, cut short or no gzip file"),
    "cut gzip": ("a.csv.gz!", gzip.compress(CSV)[:-9], {}, "damaged, cut short or no gzip file"),
    "parquet that is none": ("a.parquet", CSV, {}, "not readable as parquet"),
    "cut parquet": ("a.parquet", as_parquet(ROWS)[:-20], {}, "not readable as parquet"),
    "json array": ("a.jsonl", json.dumps(ROWS).encode(), {}, "not a JSON object: row 1"),
    "cut json": ("a.jsonl", as_jsonl(ROWS)[:-5], {}, "not valid JSON"),
    "deep json": ("a.jsonl", b"[" * 100_000, {}, "nested too deep"),
    "long number": ("a.jsonl", b'{"text": "a", "label": ' + b"1" * 5000 + b"}\n", {}, "a number too long"),
    "blank json line": ("a.jsonl", as_jsonl(ROWS) + b"\n", {}, "not valid JSON (Expecting value): row 6"),
    "ending .json": ("a.json", as_jsonl(ROWS), {}, "one JSON object a line is .jsonl"),
    "ending .txt": ("a.txt", CSV, {}, "of no kind that can be read"),
    "no ending": ("a", CSV, {}, "of no kind that can be read"),
    "no such text": ("a.csv", CSV, {"text": "txet"}, "no column 'txet' (columns there: text, label); did you mean 'text'?"),
    "no such label": ("a.csv", CSV, {"label": "Label"}, "no column 'Label' (columns there: text, label); did you mean 'label'?"),
    "no such text jsonl": ("a.jsonl", as_jsonl(ROWS), {"text": "txt"}, "did you mean 'text'?: rows 1, 2, 3, 4, 5"),
    "no such parquet": ("a.parquet", as_parquet(ROWS), {"text": "texts"}, "columns there: text, label); did you mean 'text'?"),
    "null text": ("a.jsonl", as_jsonl([*ROWS, {"text": None, "label": "pos"}]), {}, "text is null or NaN: row 6"),
    "null label": ("a.jsonl", as_jsonl([*ROWS, {"text": "x", "label": None}]), {}, "label is null or NaN: row 6"),
    "NaN label": ("a.jsonl", as_jsonl([*ROWS, {"text": "x", "label": float("nan")}]), {}, "label is null or NaN: row 6"),
    "null parquet": ("a.parquet", as_parquet([*ROWS, {"text": None, "label": "pos"}]), {}, "text is null or NaN: row 6"),
    "empty text": ("a.csv", CSV + b",pos\n", {}, "text is empty: row 6"),
    "blank text": ("a.csv", CSV + b"  ,pos\n", {}, "text is empty: row 6"),
    "empty label": ("a.csv", CSV + b"x,\n", {}, "label is empty: row 6"),
    "number as text": ("a.jsonl", as_jsonl([*ROWS, {"text": 4, "label": "pos"}]), {}, "text is no text but of type int: row 6"),
    "bytes as text": ("a.parquet", as_parquet([{"text": b"x", "label": "a"}, {"text": b"y", "label": "b"}]), {}, "of type bytes"),
    "half a character": ("a.jsonl", b'{"text": "\\ud800", "label": "pos"}\n' + as_jsonl(ROWS), {}, "half a character"),
    "half a character in a label": ("a.jsonl", b'{"text": "x", "label": "\\ud800"}\n' + as_jsonl(ROWS), {}, "half a character"),
    "true and false": (
        "a.jsonl",
        as_jsonl([{"text": str(i), "label": i > 1} for i in range(4)]),
        {},
        "label True is none of the",
    ),
    "fractions as classes": ("a.jsonl", as_jsonl([{"text": str(i), "label": i / 2} for i in range(4)]), {}, "take --regression"),
    "fractions in csv": ("a.csv", b"text,label\na,0.5\nb,1\nc,2.25\n", {}, "not all whole: a regression (--regression)?"),
    "tokens": ("a.jsonl", as_jsonl([{"text": ["a", "b"], "label": "x"}]), {}, "text is a list: token-level and multi"),
    "tags": ("a.jsonl", as_jsonl([{"text": "a b", "label": ["N", "V"]}]), {}, "label is a list: token-level and multi"),
    "many labels": (
        "a.parquet",
        as_parquet([{"text": "a", "label": [0, 1]}, {"text": "b", "label": [1]}]),
        {},
        "not supported yet",
    ),
    "one class": ("a.csv", b"text,label\na,pos\nb,pos\n", {}, "every good row is of one class, pos"),
    "free text as label": ("a.csv", as_csv([{"text": f"t{i}", "label": f"l{i}"} for i in range(40)]), {}, "40 different answers"),
    "label is the text": ("a.csv", CSV, {"label": "text"}, "a column serves twice"),
    "text twice": ("a.csv", CSV, {"text": "text,text"}, "a column serves twice"),
    "three texts": ("a.csv", CSV, {"text": "a,b,c"}, "these are no columns"),
    "no text": ("a.csv", CSV, {"text": ""}, "these are no columns"),
    "no label": ("a.csv", CSV, {"label": ""}, "these are no columns"),
    "trailing comma": ("a.csv", CSV, {"text": "text,"}, "these are no columns"),
    "unknown metric": ("a.csv", CSV, {"metric": "acuracy"}, "did you mean 'accuracy'?"),
    "metric of values": ("a.csv", CSV, {"metric": "pearson"}, "it is a metric of values, see --regression"),
    "metric of classes": ("a.csv", CSV, {"metric": "f1", "regression": True}, "it is a metric of classes"),
    "f1 of three": ("a.csv", CSV, {"metric": "f1"}, "f1 is of two classes, these are 3"),
    "words as values": ("a.csv", CSV, {"regression": True}, "label 'pos' is no number: rows 1, 3"),
    "decimal comma": ("a.csv", b'text,label\na,"3,8"\nb,2\n', {"regression": True}, "label '3,8' is no number: row 1"),
    "infinite value": ("a.csv", b"text,label\na,inf\nb,2\nc,3\n", {"regression": True}, "label 'inf' is no number: row 1"),
    "value too large": ("a.csv", b"text,label\na,1e39\nb,2\nc,3\n", {"regression": True}, "is no finite number: row 1"),
    "digits of Python": ("a.csv", b"text,label\na,1_0\nb,2\nc,3\n", {"regression": True}, "label '1_0' is no number: row 1"),
    "true as value": ("a.jsonl", as_jsonl([{"text": "a", "label": True}]), {"regression": True}, "label True is no number"),
    "the same value": ("a.csv", b"text,label\na,2\nb,2.0\n", {"regression": True}, "every good row has the same value, 2"),
    "no such test": ("a.csv", CSV, {"test": "nowhere.csv"}, "there are no such files"),
    "a folder": ("a.csv", CSV, {"validation": "."}, "there are no such files"),
}


def test_there_are_many_bad_inputs() -> None:
    assert len(BAD) >= 60


@pytest.mark.parametrize("what", BAD)
def test_a_bad_file_is_one_error_that_says_what_is_wrong(tmp_path: Path, what: str) -> None:
    name, content, asked, said = BAD[what]
    if name.endswith("!"):  # written as it is, whatever its ending says
        name = name.removesuffix("!")
        (tmp_path / name).write_bytes(content)
    else:
        put(tmp_path, name, content)
    other = put(tmp_path, "validation.jsonl", as_jsonl(OTHER))
    call = {"train": tmp_path / name, "validation": other, "text": "text", "label": "label", **asked}
    assert said in refused(lambda: files_task(**call))


@settings(max_examples=120, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60), st.integers(0, 200), st.sampled_from(list(WRITERS)))
def test_no_damage_to_a_file_is_anything_but_rows_or_one_error(tmp_path: Path, noise: bytes, at: int, name: str) -> None:
    whole = WRITERS[name](ROWS)
    try:
        task = read(tmp_path, whole[:at] + noise + whole[at + len(noise) :], name)
    except TombolaError:
        return
    assert len(rows_of(task)) >= 2 and len(task.labels) >= 2


def test_all_wrong_settings_and_all_bad_files_are_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        files_task(train="no.csv", validation="no.csv", text="a,b,c", label="", metric="bleu")
    assert len(caught.value.problems) == 4
    said = refused(lambda: read(tmp_path, as_csv([*ROWS, {"text": "", "label": "pos"}]), validation=as_jsonl(
        [*OTHER, {"text": "y", "label": "posi"}, {"text": "z", "label": "neutral"}])
    ))  # fmt: skip
    assert said == (
        "bad data in 2 of 2 splits\n"
        f"  got:      {tmp_path / 'train.csv'}: text is empty: row 6\n"
        f"            {tmp_path / 'other.jsonl'}: label 'posi' is none of the classes; did you mean 'pos'?: row 3\n"
        f"            {tmp_path / 'other.jsonl'}: label 'neutral' is none of the classes: row 4\n"
        "  expected: text in text and the name or whole number of a class in label, in every row; "
        "classes of train: pos (3), neg (2), None (1)\n"
        "  next:     repair or replace the data; rows are never dropped silently"
    )


def test_rows_that_are_all_known_from_train_measure_nothing(tmp_path: Path) -> None:
    assert "every row has the texts of a row of train" in refused(lambda: read(tmp_path, as_csv(ROWS), validation=as_jsonl(ROWS)))


# the Hub, without it

COMMIT = "a" * 40


def hub_with(monkeypatch: pytest.MonkeyPatch, **splits: Any) -> list[Any]:
    """A Hub that has one data set; the list fills with what is asked of it."""
    import datasets
    import huggingface_hub

    asked: list[Any] = []

    class Api:
        def dataset_info(self, repo: str, revision: str | None = None) -> Any:
            asked.append(("pin", repo, revision))
            return type("Info", (), {"sha": COMMIT})

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((*args, kwargs))
        return splits

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def reviews(n: int, start: int = 0, **more: Any) -> Any:
    import datasets

    columns = {"review": [f"text {i}" for i in range(start, start + n)], "stars": [i % 2 for i in range(n)], **more}
    features = datasets.Features(
        {"review": datasets.Value("string"), "stars": datasets.ClassLabel(names=["zero", "one"])}
        | {name: datasets.Value("string") for name in more}
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_a_data_set_of_the_hub_is_pinned_guessed_where_one_guess_is_possible_and_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = hub_with(monkeypatch, train=reviews(20), test=reviews(6, start=100))
    task = hub_task("hub:someone/reviews:plain")
    assert asked == [("pin", "someone/reviews", None), ("someone/reviews", "plain", {"revision": COMMIT})]
    assert (task.text, task.label_column, task.labels) == (("review",), "stars", ("zero", "one"))
    assert task.doubts == (
        "hub:someone/reviews:plain has no split named validation: scores are reported on its test split",
        "columns of hub:someone/reviews:plain were guessed, as the only ones of their kind: text = review, label = stars",
    )
    assert task.splits == {"train": "train", "report": "test"}
    assert rows_of(task).labels[:3] == (0, 1, 0) and rows_of(task, "test").ids[0] == "test:1"
    assert spec_of(task).startswith("hub:someone/reviews:plain#")
    from tombola.tasks import described_task

    assert isinstance(task.source, Loaded) and task.source.description["revision"] == COMMIT
    again = described_task(json.loads(json.dumps(task.source.description)))
    assert spec_of(again) == spec_of(task) and len(asked) == 3, "a commit needs no pinning"


def test_what_cannot_be_guessed_or_had_from_the_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_with(monkeypatch, train=reviews(4, title=["t"] * 4), validation=reviews(4, start=9, title=["t"] * 4))
    said = refused(lambda: hub_task("hub:x"))
    assert "cannot be guessed" in said and "review (string)" in said and "name them: --text" in said
    assert rows_of(hub_task("hub:x", text="title,review")).texts[1] == ("t", "text 1")
    assert "has no split 'dev'" in refused(lambda: hub_task("hub:x", text="review", validation="dev"))
    assert "no column 'body'" in refused(lambda: hub_task("hub:x", text="body"))
    assert "names no Hub data set" in refused(lambda: hub_task("hub:"))
    assert "names no Hub data set" in refused(lambda: hub_task("hub:a/b/c"))
    unlabelled = reviews(4).map(lambda row: {"stars": -1})
    hub_with(monkeypatch, train=unlabelled, validation=reviews(4, start=9))
    assert "stars '-1' is none of the classes: rows 1, 2, 3, 4" in refused(lambda: hub_task("hub:x"))


def test_an_unreachable_hub_says_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "could not be pinned to a commit" in refused(lambda: hub_task("hub:someone/reviews"))

    def load_dataset(*_: object, **__: object) -> object:
        raise ValueError("Config name is missing.\nPlease pick one among ['a', 'b']")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert "pick one among ['a', 'b']" in refused(lambda: hub_task(f"hub:someone/reviews@{COMMIT}"))


# end to end, on a tiny model

FAST = {"epochs": 4, "learning_rate": 3e-3, "batch_size": 16, "train_rows": 160, "selection_rows": 60}


@pytest.fixture
def own(tmp_path: Path) -> dict[str, Path]:
    rows = [{"review": row["sentence"], "kind": ("bad", "good")[row["label"]]} for row in sentiment_rows(360, seed=1)]
    return {
        "train": put(tmp_path, "train.csv", as_csv(rows)),
        "validation": put(
            tmp_path, "dev.tsv.gz", as_csv([{**row, "review": row["review"] + " film"} for row in rows[:70]], "\t")
        ),
        "test": put(tmp_path, "t.jsonl", as_jsonl([{**row, "review": row["review"] + " so"} for row in rows[70:150]])),
    }


def test_a_ticket_of_own_files_remembers_all_but_the_paths(own: dict[str, Path], tiny_folder: Path, tmp_path: Path) -> None:
    task = files_task(**own, text="review", label="kind")
    (ticket,) = find(str(tiny_folder), task, store=tmp_path / "store", **FAST)
    assert ticket.task == spec_of(task) and ticket.labels == ("bad", "good")
    assert ticket.settings["data"]["selection_split"] == "validation"
    assert ticket.settings["data"]["source"] == {
        "text": ["review"],
        "label": "kind",
        "labels": ["bad", "good"],
        "metric": "accuracy",
    }
    everything = "".join(file.read_text() for file in (tmp_path / "store").rglob("*.json*") if file.name != "provenance.json")
    assert "train.csv" not in everything and "dev.tsv" not in everything
    splits = {m["split"] for m in ticket.metrics}
    assert splits == {"selection", "test"}
    lab = open_lab(tmp_path / "store")
    results = collect(lab.store)
    assert {row.task for row in results.scores} == {"files"} and {row.split for row in results.scores} == {"validation", "test"}
    with pytest.raises(DataError) as caught:  # another training of the ticket's own task needs its rows again
        dense_of(lab, str(ticket.cell), None, {"epochs": 1})
    assert caught.value.next == "give them again: --train FILE --validation FILE [--test FILE] --text review --label kind"


def test_the_command_line_takes_files_and_a_ticket_knows_its_columns(
    own: dict[str, Path], tiny_folder: Path, tmp_path: Path, run: Run
) -> None:
    rows = [
        {"review": row["sentence"], "mark": 2.0 * row["label"] - i / 400} for i, row in enumerate(sentiment_rows(300, seed=1))
    ]
    train, other = put(tmp_path, "v.csv", as_csv(rows[:240])), put(tmp_path, "w.jsonl", as_jsonl(rows[240:]))
    files, store = ("--train", train, "--validation", other), ("--store", tmp_path / "store")
    columns = ("--text", "review", "--label", "mark", "--regression")
    fast = ("--epochs", 4, "--learning-rate", "3e-3", "--batch-size", 16, "--train-rows", 160, "--out", tmp_path / "ticket")
    code, out, err = run("find", tiny_folder, "files", *files, *columns, *fast, *store)
    assert code == 0, err
    assert (
        "pearson" in out and "spearman" in out and "mean |difference|" in out and f"--train {train} --validation {other}" in err
    )
    code, out, err = run("controls", tmp_path / "ticket", "--kinds", "random", "--draws", 1, *files, *store)
    assert code == 0 and "random" in out, err
    code, _, err = run("controls", tmp_path / "ticket", "--kinds", "bad", "--draws", 1, *store)
    assert code == 2 and "the rows of files#" in err and "--text review --label mark" in err
    code, _, err = run(
        "controls", tmp_path / "ticket", "--kinds", "bad", "--draws", 1, "--train", other, "--validation", train, *store
    )
    assert code == 2 and "rows that are others: files#" in err
    code, _, err = run("report", tmp_path / "store", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert code == 0 and "Pearson on validation" in page and "how far the predictions are from those of the dense model" in page
    code, _, err = run("find", tiny_folder, "files", "--train", train, *store)
    assert code == 2 and "add --validation --text --label" in err
    code, _, err = run("find", tiny_folder, "sst2", *files, *store)
    assert code == 2 and "task sst2 has rows and columns of its own" in err
