"""Calls that must be refused, generated from tables: verbs × faults, all in this process.

Whatever is wrong, a stranger meets the same thing: exit code 2, nothing on stdout, one message on stderr that names what is
wrong, and not a byte changed on the disk. Nothing here may train: computing a cell fails the test.
"""

import gzip
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import sentiment_rows, write_task
from tombola import cli
from tombola.legacy import import_ticket
from tombola.search import SEARCHES
from tombola.store import Store
from tombola.study.cells import Lab
from tombola.study.settings import GROUPS


@dataclass(frozen=True)
class Call:
    """One bad call. In its words {name} stands for a place of `world`; `named` are words its message must hold."""

    id: str
    words: tuple[str, ...]
    named: tuple[str, ...] = ()


def call(id: str, line: str, *named: str, more: tuple[str, ...] = ()) -> Call:
    """A call by its command line; `more` are words with spaces in them, or empty."""
    return Call(id, (*line.split(), *more), named)


# ------------------------------------------------------------------------------------------------------------ the world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> dict[str, Path]:
    """Good and bad places of every kind, by name."""
    root = tmp_path_factory.mktemp("world")
    places = {"root": root, "nowhere": root / "nowhere", "cwd": root / "cwd", "tiny": root / "models" / "good"}
    shutil.copytree(tiny_folder, places["tiny"])
    places["cwd"].mkdir()
    (root / "full").mkdir()
    (root / "full" / "mine").write_text("mine")
    (root / "file").write_text("a file")
    (root / "empty").mkdir()
    places |= {name: root / name for name in ("full", "file", "empty")}
    for make in (_data, _files, _models, _masks, _stores, _layouts, _tickets):
        places |= make(root, places)
    return places


def _data(root: Path, _: dict[str, Path]) -> dict[str, Path]:
    good = sentiment_rows(60, 1)
    bad: dict[str, list[Any]] = {
        "label9": [good[0] | {"label": 9}, *good[1:]],
        "oneclass": [row | {"label": 1} for row in good],
        "norows": [],
        "notext": [good[0] | {"sentence": None}, *good[1:]],
        "numbertext": [good[0] | {"sentence": 7}, *good[1:]],
        "nanlabel": [good[0] | {"label": float("nan")}, *good[1:]],
        "nocolumn": [{"text": row["sentence"], "label": row["label"], "idx": row["idx"]} for row in good],
        "noidx": [{"sentence": row["sentence"], "label": row["label"]} for row in good],
        "sameidx": [row | {"idx": 1} for row in good],
        "listlabel": [good[0] | {"label": [1]}, *good[1:]],
    }
    places = {"data": root / "data" / "good"} | {f"data_{name}": root / "data" / name for name in bad}
    for name, rows in {"good": good, **bad}.items():
        write_task(root / "data" / name, "sst2", "train", rows)
        write_task(root / "data" / name, "sst2", "validation", sentiment_rows(40, 2))
    for name, content in {"notjson": b"{", "binary": bytes(range(256)), "nogzip": b"plain"}.items():
        shutil.copytree(places["data"], root / "data" / name)
        places[f"data_{name}"] = root / "data" / name
        file = root / "data" / name / "sst2" / "train.jsonl"
        file.unlink() if name == "nogzip" else file.write_bytes(content)
    (root / "data" / "nogzip" / "sst2" / "train.jsonl.gz").write_bytes(b"plain")
    for name in ("novalidation", "both"):
        shutil.copytree(places["data"], root / "data" / name)
        places[f"data_{name}"] = root / "data" / name
    (root / "data" / "novalidation" / "sst2" / "validation.jsonl").unlink()
    (root / "data" / "both" / "sst2" / "train.jsonl.gz").write_bytes(gzip.compress(b""))
    return places


def _files(root: Path, _: dict[str, Path]) -> dict[str, Path]:
    folder = root / "files"
    folder.mkdir()
    rows = [f"{row['sentence']},{'good' if row['label'] else 'bad'},{row['idx']}\n" for row in sentiment_rows(40, 3)]
    lines = {
        "train.csv": "text,label,n\n" + "".join(rows),
        "valid.csv": "text,label,n\n" + "".join(rows[:20]).replace("the", "a"),
        "blank.csv": "",
        "header.csv": "text,label,n\n",
        "oneclass.csv": "text,label,n\n" + "".join(row for row in rows if ",good," in row),
        "ragged.csv": "text,label,n\nonly this\n",
        "twice.csv": "text,text,label\na,b,c\n",
        "nolabel.csv": "text,label,n\nhello,,1\nyou,good,2\n",
        "numbers.csv": "text,label,n\nhello,1e999,1\nyou,nan,2\n",
        "broken.jsonl": '{"text": "a", "label": 1}\n{"text": \n',
        "list.jsonl": "[1, 2]\n",
        "words.txt": "text\n",
    }
    for name, content in lines.items():
        (folder / name).write_text(content)
    (folder / "binary.csv").write_bytes(b"\xff\xfe\x00\x01" * 30)
    (folder / "broken.parquet").write_bytes(b"PAR1 nothing PAR1")
    (folder / "broken.csv.gz").write_bytes(b"plain text")
    return {"files": folder}


def _models(root: Path, places: dict[str, Path]) -> dict[str, Path]:
    def damaged(name: str) -> Path:
        shutil.copytree(places["tiny"], root / "models" / name)
        return root / "models" / name

    config = json.loads((places["tiny"] / "config.json").read_text())
    weights = (places["tiny"] / "model.safetensors").read_bytes()
    (damaged("badjson") / "config.json").write_text("{")
    (damaged("listconfig") / "config.json").write_text("[]")
    (damaged("notype") / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "model_type"}))
    (damaged("unknowntype") / "config.json").write_text(json.dumps(config | {"model_type": "bortle"}))
    (damaged("otherwidth") / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    (damaged("heads5") / "config.json").write_text(json.dumps(config | {"num_attention_heads": 5}))
    (damaged("cutweights") / "model.safetensors").write_bytes(weights[:-100])
    (damaged("noweights") / "model.safetensors").unlink()
    (damaged("emptyweights") / "model.safetensors").write_bytes(b"")
    (damaged("noconfig") / "config.json").unlink()
    names = ("badjson", "listconfig", "notype", "unknowntype", "otherwidth", "heads5", "cutweights", "noweights", "emptyweights")
    no_words = damaged("notokenizer")
    for file in no_words.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    return {f"model_{name}": root / "models" / name for name in (*names, "noconfig", "notokenizer")}


def _masks(root: Path, _: dict[str, Path]) -> dict[str, Path]:
    folder = root / "masks"
    folder.mkdir()
    arrays: dict[str, Any] = {
        "good": [[1, 0, 1, 1], [1, 1, 0, 1]],
        "wide": np.ones((2, 5)),
        "flat": np.ones(8),
        "half": np.full((2, 4), 0.5),
        "nan": np.full((2, 4), np.nan),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", np.asarray(array))
    np.save(folder / "objects.npy", np.asarray([{"a": 1}], dtype=object), allow_pickle=True)
    (folder / "cut.npy").write_bytes((folder / "good.npy").read_bytes()[:-8])
    (folder / "nothing.npy").write_bytes(b"")
    (folder / "words.csv").write_text("1,0")
    (folder / "broken.safetensors").write_bytes(b"\x00" * 20)
    (folder / "broken.pt").write_bytes(b"\x80\x04N.")
    (folder / "layout.json").write_text("[1]")
    return {"masks": folder}


def _stores(root: Path, _: dict[str, Path]) -> dict[str, Path]:
    folder = root / "stores"
    for name in ("good", "newer", "badmarker", "foreign", "damaged"):
        (folder / name).mkdir(parents=True)
    (folder / "newer" / "store.json").write_text('{"format": 99}')
    (folder / "badmarker" / "store.json").write_text("{")
    (folder / "foreign" / "thesis.tex").write_text("mine")

    def write(out: Path) -> None:
        (out / "rows").write_text("1")

    for name in ("good", "damaged"):
        Store(folder / name).compute("ab" * 16, {"step": "none"}, write)
        Store(folder / name).compute("ac" * 16, {"step": "none"}, write)
    (folder / "damaged" / "cells" / ("ab" * 16) / "rows").write_text("2")
    Store(folder / "empty")
    names = ("newer", "badmarker", "foreign", "damaged", "empty")
    return {"store": folder / "good"} | {f"store_{name}": folder / name for name in names}


def _layouts(root: Path, _: dict[str, Path]) -> dict[str, Path]:
    folder = root / "layouts"
    folder.mkdir()
    attention = {f"{x}": f"attention.self.{name}" for x, name in (("q", "query"), ("k", "key"), ("v", "value"))}
    good = {"layers": "bert.encoder.layer", "o": "attention.output.dense", "mlp_in": "intermediate.dense"}
    good |= {"mlp_out": "output.dense"} | attention
    said: dict[str, str] = {
        "absent": json.dumps(good | {"q": "attention.self.kwery"}),
        "swapped": json.dumps(good | {"q": good["v"], "v": good["q"]}),
        "lacking": json.dumps({"layers": "bert.encoder.layer"}),
        "unknown": json.dumps(good | {"colour": "red"}),
        "fused": json.dumps(good | {"qkv": "attention.self.qkv"}),
        "number": json.dumps(good | {"o": 7}),
        "nothing": "",
        "emptylist": "[]",
        "noyaml": "a: [b",
    }
    for name, text in said.items():
        (folder / f"{name}.yaml").write_text(text)
    return {"layouts": folder}


def _tickets(root: Path, places: dict[str, Path]) -> dict[str, Path]:
    folder = root / "tickets"
    ticket = import_ticket(
        str(places["tiny"]), heads=places["masks"] / "good.npy", task="sst2", labels=("negative", "positive"), seed=0
    )
    ticket.save_pretrained(folder / "good")
    taskless = import_ticket(str(places["tiny"]), heads=places["masks"] / "good.npy")
    taskless.save_pretrained(folder / "taskless")
    body = json.loads((folder / "good" / "ticket.json").read_text())
    mask = (folder / "good" / "mask.safetensors").read_bytes()
    changed: dict[str, str] = {
        "newer": json.dumps(body | {"format_version": 99}),
        "tampered": json.dumps(body | {"sparsity": 0.123}),
        "nojson": "{",
        "listed": "[]",
        "lacking": json.dumps({"format_version": 1}),
        "othertypes": json.dumps(body | {"labels": "both"}),
        "noversion": json.dumps({k: v for k, v in body.items() if k != "format_version"}),
    }
    for name, text in changed.items():
        shutil.copytree(folder / "good", folder / name)
        (folder / name / "ticket.json").write_text(text)
    for name, content in {"cutmask": mask[:-1], "nomask": None, "othermask": mask[:-1] + bytes([mask[-1] ^ 1])}.items():
        shutil.copytree(folder / "good", folder / name)
        file = folder / name / "mask.safetensors"
        file.unlink() if content is None else file.write_bytes(content)
    names = (*changed, "cutmask", "nomask", "othermask")
    return {"ticket": folder / "good", "ticket_taskless": folder / "taskless"} | {f"ticket_{n}": folder / n for n in names}


# ----------------------------------------------------------------------------------------------------------- the tables

FIND = "find {tiny} sst2 --data {data} --store {store}"
ON_TICKET = {  # verbs that take a ticket and compute → the call that would be good
    "controls": "controls {ticket} --data {data} --store {store}",
    "retrain": "retrain {ticket} --data {data} --store {store}",
    "evaluate": "evaluate {ticket} --data {data} --store {store}",
}
WITH_MODEL = {
    "find": "find MODEL sst2 --data {data} --store {store}",
    "inspect": "inspect MODEL",
    "import": "import MODEL --out {nowhere} --heads {masks}/good.npy",
}
WITH_TASK = {
    "find": "find {tiny} TASK --data {data} --store {store}",
    "retrain": "retrain {ticket} TASK --data {data} --store {store}",
    "evaluate": "evaluate {ticket} TASK --data {data} --store {store}",
}
WITH_STORE = {
    "find": "find {tiny} sst2 --data {data} --store STORE",
    **{name: good.replace("{store}", "STORE") for name, good in ON_TICKET.items()},
    "compare": "compare {ticket} {ticket} --store STORE",
    "report": "report STORE --out {nowhere}",
    "ls": "store ls STORE",
    "verify": "store verify STORE",
    "gc": "store gc STORE",
}
ALL_VERBS = ("", "demo", "doctor", "inspect", "find", "controls", "retrain", "evaluate", "compare", "import", "report", "store")
WRONG_VALUES = ('{"a":1}', "[1]", '"so-so"', "true", "-1")


def settings_of(method: str) -> dict[str, list[Any]]:
    """Setting → the values it takes by its own annotation that are in WRONG_VALUES."""
    kinds = (*GROUPS.values(), SEARCHES[method][1])
    good = {"importance_minmax": [True], "retrain_shrunk": [True], "scope": ["so-so"]}
    return {field.name: good.get(field.name, []) for kind in kinds for field in fields(kind)}


def bad_settings() -> Iterator[Call]:
    """Every setting of every method × values of a type, or beyond the range, that it does not take."""
    seen = set[str]()
    for method in SEARCHES:
        for name, allowed in settings_of(method).items():
            if name in seen:
                continue
            seen.add(name)
            for text in WRONG_VALUES:
                if json.loads(text) not in allowed:
                    yield call(f"find --set {name}={text}", f"{FIND} --method {method}", name, more=("--set", f"{name}={text}"))


def bad_settings_of_tickets() -> Iterator[Call]:
    """Settings that a verb on a ticket takes, wrong; settings that it does not take, said and not passed over."""
    data_and_training = ("train_rows", "selection_rows", "selection_split", "split_seed", "max_length", "padding")
    data_and_training += ("learning_rate", "epochs", "batch_size", "warmup_steps", "weight_decay", "adam_epsilon", "clip_norm")
    takes = {
        "controls": ("random_size", "control_draws", "bad_s_rule", "bad_m_rule", "retrain_start", "empty_layer_bias"),
        "retrain": (*data_and_training, "retrain_start", "empty_layer_bias"),
        "evaluate": data_and_training,
    }
    others = ("floor", "procedure", "s_head_step", "random_size", "retrain_start", "epochs", "train_rows")
    for verb, good in ON_TICKET.items():
        for name in takes[verb]:
            for text in ("[1]", '"so-so"', "-1"):
                yield call(f"{verb} --set {name}={text}", good, name, more=("--set", f"{name}={text}"))
        for name in others:
            if name not in takes[verb]:
                yield call(f"{verb} takes no {name}", f"{good} --set {name}=1", name)
        for text in ("epochs", "=3", "", "epoch=3", "head_mask=1"):
            yield call(f"{verb} --set {text or 'nothing'}", good, text.rpartition("=")[0], more=("--set", text))


def bad_numbers() -> Iterator[Call]:
    """Options of find with a value of the wrong type, or out of range."""
    beyond = {
        "floor": ("0", "-1", "1.01", "nan", "inf"),
        "train-rows": ("0", "1", "-5"),
        "selection-rows": ("0", "1", "-5"),
        "epochs": ("-1", "-2"),
        "learning-rate": ("0", "-1", "nan", "inf"),
        "batch-size": ("0", "-1"),
        "draws": ("0", "-3"),
        "disk-budget": ("-1", "nan", "inf"),
    }
    for option, values in beyond.items():
        with_controls = " --controls random" if option == "draws" else ""
        for value in values:
            named = "--disk-budget" if option == "disk-budget" and value != "inf" else value  # typer does not say the value
            yield call(f"find --{option} {value}", f"{FIND} --{option} {value}{with_controls}", named)
        if option not in ("floor",):
            yield call(f"find --{option} some", f"{FIND} --{option} some", f"--{option}")
    for value in ("-0.1", "1", "1.5", "nan"):
        yield call(f"find --sparsity {value}", f"{FIND} --method one-shot --sparsity {value}", value)
    for value in ("a", "1,1", "-1", "1.5", "4294967296", "0,x"):
        yield call(f"find --seeds {value}", f"{FIND} --seeds {value}", *value.split(",")[-1:])
        yield call(f"demo --seeds {value}", f"demo --folder {{nowhere}} --seeds {value}", *value.split(",")[-1:])
    yield call("find --seeds empty", FIND, "seeds", more=("--seeds", ""))
    for name in ("head", "data", "dropout", "mask"):
        for value in ("-1", "1.5", "one", "4294967296"):
            yield call(f"find {name}_seed={value}", f"{FIND} --set {name}_seed={value}", name, value)
    for verb in ("retrain", "evaluate"):
        yield call(f"{verb} --disk-budget nan", f"{ON_TICKET[verb]} --disk-budget nan", "--disk-budget")
    yield call("controls --draws x", f"{ON_TICKET['controls']} --draws x", "--draws")
    for value in ("0", "-1"):
        yield call(f"controls --draws {value}", f"{ON_TICKET['controls']} --draws {value}", value)


def bad_names() -> Iterator[Call]:
    """Words of which only some are known."""
    for option, value in {
        "method": "guess", "preset": "perfect", "floor-rule": "any", "procedure": "both", "criterion": "luck",
        "granularity": "local", "controls": "worse", "ladder": "up:down",
    }.items():  # fmt: skip
        more = " --method m-prune" if option in ("criterion", "granularity") else ""
        yield call(f"find --{option} {value}", f"{FIND}{more} --{option} {value}", value.partition(":")[0])
    for value in ("paper", "paper:", ":paper", "paper:paper", "paper:released:corrected"):
        yield call(f"find --ladder {value}", f"{FIND} --ladder {value}", value)
    for value in (
        "nothing.*",
        "bort",
        "body:colour",
        "body+",
        "pooler+bort",
        "bert.encoder.layer.0.nothing",
        "classifier:biases+x",
    ):
        yield call(f"find --scope {value}", f"{FIND} --method m-prune --scope {value}", value)
        yield call(f"one-shot --scope {value}", f"{FIND} --method one-shot --scope {value}", value)
    for kinds in ("worse", "random,worse", "random,random", ",", "randon"):
        yield call(f"controls --kinds {kinds}", f"{ON_TICKET['controls']} --kinds {kinds}", *kinds.split(",")[-1:])
    yield call("controls --preset perfect", f"{ON_TICKET['controls']} --preset perfect", "perfect")
    for value in ("bass", "{nowhere}", "{full}", "{tiny}/config.json"):
        yield call(f"evaluate --weights {value}", f"{ON_TICKET['evaluate']} --weights {value}", value)


def bad_models() -> Iterator[Call]:
    said = {"no/such-model": "no/such-model", "such-model": "such-model", "{empty}": "{empty}", "{full}": "{full}"}
    said |= {"{file}": "{file}", "{nowhere}": "{nowhere}", "{model_noconfig}": "{model_noconfig}", "a:b:c": "a:b:c"}
    said |= {f"{{model_{name}}}": f"{{model_{name}}}" for name in ("cutweights", "noweights", "emptyweights")}
    said |= {f"{{model_{name}}}": f"{{model_{name}}}" for name in ("badjson", "listconfig", "notype")}
    said |= {"{model_unknowntype}": "bortle", "{model_otherwidth}": "{model_otherwidth}", "{model_heads5}": "5"}
    for verb, good in WITH_MODEL.items():
        for model, named in said.items():
            yield call(f"{verb} {model}", good.replace("MODEL", model), named)
        yield Call(f"{verb} without a name", tuple("" if word == "MODEL" else word for word in good.split()))
    yield call("find {model_notokenizer}", WITH_MODEL["find"].replace("MODEL", "{model_notokenizer}"), "{model_notokenizer}")


def bad_tasks() -> Iterator[Call]:
    said = {
        "sst3": "sst3", "cola": "cola", "sst2:": "sst2", "sst2:train": "train", "sst2:train=nothing": "nothing",
        "sst2:what=train": "what", "sst2:train=validation": "validation", "sst2:train=a/b": "a/b", "SST2": "SST2",
        "acceptability:train_rows=-1": "train_rows", "acceptability:train_rows=many": "many", "acceptability:x=1": "x",
        "nli-overlap:strength=2": "strength", "nli-overlap:strength=x": "strength",
        "nli-overlap:strength=0.5,strength=1": "strength", "files": "--train", "files#abc": "files",
        "hub:": "hub:", "hub:no/such-data": "no/such-data", "hub:a:b:c:d": "hub:a:b:c:d",
        "hub:#": "hub:#", "nli-overlap:train_rows=100000000": "100000000",
    }  # fmt: skip
    for verb, good in WITH_TASK.items():
        for task, named in said.items():
            yield call(f"{verb} {task}", good.replace("TASK", task), named)
        yield Call(f"{verb} a task without a name", tuple("" if word == "TASK" else word for word in good.split()))
    for task in ("sst3", "files", "nli-overlap:strength=2"):
        yield call(f"demo {task}", f"demo --folder {{nowhere}} --task {task}", said[task])
        yield call(f"import {task}", f"import {{tiny}} --out {{nowhere}} --heads {{masks}}/good.npy --task {task}", said[task])


def bad_data() -> Iterator[Call]:
    said = {
        "label9": "9", "oneclass": "one class", "norows": "no rows", "notext": "sentence", "numbertext": "sentence",
        "nanlabel": "label", "nocolumn": "sentence", "noidx": "idx", "sameidx": "idx", "listlabel": "label", "notjson": "train",
        "binary": "train", "nogzip": "train", "novalidation": "validation", "both": "train",
    }  # fmt: skip
    for name, named in said.items():
        yield call(f"find on {name}", FIND.replace("{data}", f"{{data_{name}}}"), named)
        yield call(f"evaluate on {name}", ON_TICKET["evaluate"].replace("{data}", f"{{data_{name}}}"), named)
    for verb, good in {"find": FIND, **ON_TICKET}.items():
        for place in ("{nowhere}", "{file}", "{empty}"):
            yield call(f"{verb} --data {place}", good.replace("{data}", place), place)


def bad_files() -> Iterator[Call]:
    start = "find {tiny} files --store {store} --validation {files}/valid.csv"
    good = f"{start} --train {{files}}/train.csv --text text --label label"
    for name, named in {
        "blank.csv": "blank.csv", "header.csv": "header.csv", "oneclass.csv": "one class", "ragged.csv": "ragged.csv",
        "twice.csv": "twice.csv", "nolabel.csv": "nolabel.csv", "broken.jsonl": "broken.jsonl", "list.jsonl": "list.jsonl",
        "words.txt": "words.txt", "binary.csv": "binary.csv", "broken.parquet": "broken.parquet",
        "broken.csv.gz": "broken.csv.gz",
        "none.csv": "none.csv", "valid.csv": "valid.csv",
    }.items():  # fmt: skip
        yield call(f"files --train {name}", good.replace("train.csv", name), named)
        yield call(f"files --test {name}", f"{good} --test {{files}}/{name}", named)
    for name, line, named in (
        ("numbers", f"{good} --regression".replace("train.csv", "numbers.csv"), "numbers.csv"),
        ("words as numbers", f"{good} --regression", "label"),
        ("no such text", good.replace("--text text", "--text words"), "words"),
        ("no such label", good.replace("--label label", "--label answer"), "answer"),
        ("text is label", good.replace("--text text", "--text label"), "label"),
        ("three texts", good.replace("--text text", "--text text,n,label"), "text,n,label"),
        ("metric", f"{good} --metric wit", "wit"),
        ("pearson of classes", f"{good} --metric pearson", "pearson"),
        ("f1 of numbers", f"{good} --metric f1 --regression".replace("--label label", "--label n"), "f1"),
        ("no train", f"{start} --text text --label label", "--train"),
        ("no text", f"{start} --train {{files}}/train.csv --label label", "--text"),
        ("no label", f"{start} --train {{files}}/train.csv --text text", "--label"),
        ("with a folder", good.replace("{files}/train.csv", "{files}"), "{files}"),
        ("own rows of a named task", f"{FIND} --train {{files}}/train.csv", "--train"),
        ("own metric of a named task", f"{FIND} --metric f1", "--metric"),
        ("regression of a named task", f"{FIND} --regression", "--regression"),
        ("selection_split without test", f"{good} --set selection_split=validation", "selection_split"),
    ):
        yield call(f"files {name}", line, named)
    for verb, of_ticket in ON_TICKET.items():
        yield call(f"{verb} rows for a ticket of none", f"{of_ticket} --train {{files}}/train.csv", "{ticket}")
    for verb in ("retrain", "evaluate"):
        line = WITH_TASK[verb].replace("TASK", "files")
        yield call(f"{verb} files without label", f"{line} --train {{files}}/train.csv --text text", "--label")
        yield call(f"{verb} files absent", f"{line} --train a.csv --validation b.csv --text text --label label", "a.csv")
        yield call(f"{verb} sst2 with rows", f"{WITH_TASK[verb].replace('TASK', 'sst2')} --train {{files}}/train.csv", "--train")


def bad_tickets() -> Iterator[Call]:
    names = ("newer", "tampered", "nojson", "listed", "lacking", "othertypes", "noversion", "cutmask", "nomask", "othermask")
    places = [f"{{ticket_{name}}}" for name in names]
    places += [
        "{nowhere}",
        "{empty}",
        "{full}",
        "{tiny}",
        "{file}",
        "no/such-ticket",
        "no-such-ticket",
        "dead",
        "a",
        "abab",
        "abacad",
    ]
    goods = {
        **ON_TICKET,
        "compare": "compare {ticket} {ticket} --store {store}",
        "compare with": "compare {ticket} OTHER --store {store}",
    }
    for verb, good in goods.items():
        for place in places:
            line = good.replace("OTHER", place) if "OTHER" in good else good.replace("{ticket}", place, 1)
            yield call(f"{verb} {place}", line, place)
        if verb == "compare with":
            continue
        line = good.replace("OTHER", "") if "OTHER" in good else good.replace(" {ticket}", "", 1)
        yield call(f"{verb} {'one' if 'OTHER' in good else 'none'}", line, "ticket")
    for verb, good in ON_TICKET.items():
        if verb != "controls":
            yield call(f"{verb} without a task", good.replace("{ticket}", "{ticket_taskless}"), "{ticket_taskless}")
    yield call("controls of a ticket without a task", ON_TICKET["controls"].replace("{ticket}", "{ticket_taskless}"), "task")
    yield call("evaluate on weights nobody knows", ON_TICKET["evaluate"], "{ticket}")


def bad_stores() -> Iterator[Call]:
    for verb, good in WITH_STORE.items():
        for place in ("{file}", "{full}", "{store_newer}", "{store_badmarker}", "{store_foreign}", "{file}/below"):
            yield call(f"{verb} in {place}", good.replace("STORE", place), place)
        if verb in ("report", "ls", "verify", "gc"):
            yield call(f"{verb} in nowhere", good.replace("STORE", "{nowhere}"), "{nowhere}")
    yield call("store verify finds damage", "store verify {store_damaged}", "rows")


def bad_outs() -> Iterator[Call]:
    for verb, good in {
        "find": FIND, "retrain": ON_TICKET["retrain"], "import": "import {tiny} --heads {masks}/good.npy"
    }.items():  # fmt: skip
        for place in ("{full}", "{file}", "{tiny}"):
            yield call(f"{verb} --out {place}", f"{good} --out {place}", place)
    for place in ("{file}/page.html", "{full}"):
        yield call(f"report --out {place}", f"report {{store_empty}} --out {place}", place)
    yield call("find --ladder --out", f"{FIND} --ladder released:corrected --out {{nowhere}}", "--out")
    yield call("find --ladder --preset", f"{FIND} --ladder released:corrected --preset paper", "--preset")
    yield call("find --sparsity of m-prune", f"{FIND} --method m-prune --sparsity 0.5", "sparsity")
    yield call("find --sparsity of s-prune", f"{FIND} --sparsity 1.0", "sparsity")
    yield call("find --scope of s-prune", f"{FIND} --scope body", "scope")
    yield call("find --procedure of m-prune", f"{FIND} --method m-prune --procedure heads", "procedure")
    yield call("find --floor of one-shot", f"{FIND} --method one-shot --floor 0.9", "floor")
    yield call("find --draws without --controls", f"{FIND} --draws 3", "--draws")
    yield call("report as two things", "report {store_empty} --markdown --latex", "--latex")


def bad_imports() -> Iterator[Call]:
    good = "import {tiny} --out {nowhere}"
    for name in ("wide", "flat", "half", "nan", "objects", "cut", "nothing", "none"):
        yield call(f"import --heads {name}.npy", f"{good} --heads {{masks}}/{name}.npy", f"{name}.npy")
    for name in ("words.csv", "broken.safetensors", "broken.pt"):
        for option in ("heads", "mlps", "values"):
            yield call(f"import --{option} {name}", f"{good} --{option} {{masks}}/{name}", name)
    of_heads = f"{good} --heads {{masks}}/good.npy"
    for name, line, named in (
        ("nothing", good, "heads"),
        ("mlps of heads", f"{good} --mlps {{masks}}/good.npy", "good.npy"),
        ("ones", f"{of_heads} --ones lost", "lost"),
        ("found_on nowhere", f"{of_heads} --found-on {{nowhere}}", "{nowhere}"),
        ("found_on empty", f"{of_heads} --found-on {{empty}}", "{empty}"),
        ("found_on damaged", f"{of_heads} --found-on {{model_cutweights}}", "{model_cutweights}"),
        ("values", f"{good} --values {{masks}}/good.npy", "good.npy"),
        ("layout", f"{good} --values {{masks}}/good.npy --layout nonsense", "nonsense"),
        ("layout list", f"{good} --values {{masks}}/good.npy --layout {{masks}}/layout.json", "layout.json"),
        ("seed text", f"{of_heads} --seed one", "--seed"),
        ("seed below", f"{of_heads} --seed -1", "-1"),
        ("seed beyond", f"{of_heads} --seed 4294967296", "4294967296"),
    ):
        yield call(f"import {name}", line, named)


def bad_layouts() -> Iterator[Call]:
    said = {
        "absent": "attention.self.kwery", "swapped": "bert.encoder.layer.0", "lacking": "mlp_in", "unknown": "colour",
        "fused": "qkv",
        "number": "7", "nothing": "nothing.yaml", "emptylist": "emptylist.yaml", "noyaml": "noyaml.yaml", "none": "none.yaml",
    }  # fmt: skip
    for verb, good in {"find": FIND, "inspect": "inspect {tiny}"}.items():
        for name, named in said.items():
            yield call(f"{verb} --layout {name}", f"{good} --layout {{layouts}}/{name}.yaml", named)


def bad_usage() -> Iterator[Call]:
    """What typer itself refuses."""
    for verb in ALL_VERBS:
        yield call(f"{verb or 'tombola'} --colour", f"{verb} --colour", "--colour")
    for line in (
        "colour",
        "store colour",
        "find",
        "find {tiny}",
        "controls",
        "retrain",
        "evaluate",
        "compare",
        "inspect",
        "import {tiny}",
    ):
        yield call(f"{line} alone", line)
    for verb, good in {"find": FIND, **ON_TICKET}.items():
        yield call(f"{verb} one word more", f"{good} three four five", "five" if verb in ("find", "controls") else "four")
        yield call(f"{verb} --store without a value", f"{good} --store", "--store")


TABLES = (
    bad_settings, bad_settings_of_tickets, bad_numbers, bad_names, bad_models, bad_tasks, bad_data, bad_files, bad_tickets,
    bad_stores, bad_outs, bad_imports, bad_layouts, bad_usage,
)  # fmt: skip
CALLS = [one for table in TABLES for one in table()]


# ------------------------------------------------------------------------------------------------------------- the test


@pytest.fixture(autouse=True)
def nothing_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Lab, cell: Any) -> None:
        raise AssertionError(f"a {cell.step} cell was computed")

    monkeypatch.setattr(Lab, "compute", refuse)


def disk(root: Path) -> dict[str, tuple[int, int]]:
    """Every path with its size and time."""
    stats = {str(path.relative_to(root)): path.lstat() for path in root.rglob("*")}
    return {name: (found.st_size, found.st_mtime_ns) for name, found in stats.items()}


def squeezed(text: str) -> str:
    """Without white space and the frames that typer draws, either of which may cut a long word."""
    return re.sub(r"[\s│╭╮╰╯─]", "", text)


@pytest.mark.parametrize("bad", CALLS, ids=lambda bad: bad.id)
def test_bad_call(bad: Call, world: dict[str, Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def meant(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda found: str(world[found[1]]), text)

    monkeypatch.chdir(world["cwd"])
    monkeypatch.setattr(sys, "argv", ["tombola", *map(meant, bad.words)])
    before = disk(world["root"])
    with pytest.raises(SystemExit) as left:
        cli.main()
        sys.exit(0)
    out, err = capsys.readouterr()
    assert left.value.code == 2, err
    assert out == "" and "Traceback" not in err
    messages = [line for line in err.splitlines() if line.startswith("tombola: ")]
    by_typer = "─ Error ─" in err
    assert len(messages) == (0 if by_typer else 1), err
    for word in bad.named:
        assert squeezed(meant(word)) in squeezed(err), err
    assert disk(world["root"]) == before


def test_there_are_hundreds_and_no_two_are_the_same() -> None:
    assert len(CALLS) >= 300
    assert len({one.words for one in CALLS}) == len(CALLS)
    assert len({one.id for one in CALLS}) == len(CALLS)
