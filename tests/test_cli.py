"""The command line as a stranger uses it: what it prints, its exit codes, and that bad input leaves nothing behind."""

import inspect
import json
import os
import resource
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from conftest import Run, sentiment_rows, write_task
from tombola import cli
from tombola.cli.options import OwnRows, Running, grouped
from tombola.ticket import Ticket

FAST = ["--epochs", "4", "--learning-rate", "3e-3", "--batch-size", "16", "--train-rows", "160", "--selection-rows", "60"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, data_folder: Path) -> dict[str, Any]:
    """One `find` through the real command, in a process of its own: two seeds, JSON on stdout."""
    folder = tmp_path_factory.mktemp("cli")
    command = ["find", tiny_folder, "sst2", "--data", data_folder, "--store", folder / "store", "--seeds", "0,1", *FAST]
    ran = subprocess.run(
        [sys.executable, "-m", "tombola", *map(str, command), "--out", str(folder / "tickets"), "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return {"folder": folder, "store": folder / "store", "out": ran.stdout, "err": ran.stderr, "command": command}


def test_find_prints_json_on_stdout_and_progress_on_stderr(found: dict[str, Any]) -> None:
    said = json.loads(found["out"])
    assert [one["seed"] for one in said["tickets"]] == [0, 1]
    assert "[1/6] fine-tune · sst2 · seed 0" in found["err"] and "left" in found["err"]
    for one in said["tickets"]:
        ticket = Ticket.from_pretrained(one["folder"])
        assert ticket.identity == one["identity"]
        assert {m["split"] for m in ticket.metrics} == {"selection", "validation"}, "an exported ticket carries its report score"
        assert all({"value", "n", "split"} <= m.keys() for m in ticket.metrics)


def test_the_same_find_again_computes_nothing_and_is_quick(found: dict[str, Any], run: Run) -> None:
    started = time.monotonic()
    code, out, err = run(*found["command"])
    assert code == 0 and "cells computed" not in err
    assert "good" in out and "pruned" in out and "majority" in out
    assert time.monotonic() - started < 30


def test_dry_run_says_what_would_run_and_computes_nothing(found: dict[str, Any], run: Run, tmp_path: Path) -> None:
    arguments = [str(x) for x in found["command"]]
    arguments[arguments.index("--store") + 1] = str(tmp_path / "new")
    code, out, _ = run(*arguments, "--dry-run")
    assert code == 0 and "6 of 6 cells to run" in out and "nothing was computed" in out
    assert not list((tmp_path / "new" / "cells").glob("*"))
    code, out, _ = run(*found["command"], "--dry-run", "--json")
    assert json.loads(out) == {"asked": 6, "estimated_seconds": 0.0, "to_run": []}


def test_controls_retrain_evaluate_compare_report_and_store(found: dict[str, Any], run: Run, data_folder: Path) -> None:
    ticket, common = found["folder"] / "tickets" / "seed-0", ("--data", data_folder, "--store", found["store"])
    code, out, _ = run("controls", ticket, "--kinds", "random,bad,strict-bad", "--draws", "2", *common)
    assert (
        code == 0 and "strict-bad" in out and "1 × 2" in out and "controls: what they keep that the good ticket keeps too" in out
    )
    code, out, _ = run("controls", ticket, "--kinds", "random,bad,strict-bad", "--draws", "2", *common, "--json")
    said = json.loads(out)["controls"]
    assert [one["kind"] for one in said] == ["good", "random", "random", "bad", "bad", "strict-bad", "strict-bad"]
    assert all(one["kept"] == said[0]["kept"] for one in said[:5])
    code, out, _ = run("retrain", ticket, "sst2", *common, "--out", found["folder"] / "weights")
    assert code == 0 and "retrained" in out and (found["folder"] / "weights" / "model.safetensors").is_file()
    code, out, _ = run("evaluate", ticket, "sst2", "--weights", found["folder"] / "weights", *common, "--json")
    retrained = json.loads(out)["scores"]
    assert code == 0 and {row["split"] for row in retrained} == {"selection", "validation"}
    code, out, _ = run("evaluate", ticket, "sst2", "--weights", "found_on", *common)
    assert code == 0 and "pruned" in out
    code, out, _ = run("compare", ticket, found["folder"] / "tickets" / "seed-1", "--store", found["store"])
    assert code == 0 and "Jaccard" in out and "Fleiss kappa, heads" in out
    code, out, _ = run("store", "ls", found["store"])
    assert code == 0 and "search" in out and "control" in out
    code, out, _ = run("store", "verify", found["store"])
    assert code == 0 and "every file as it was written" in out
    code, out, _ = run("store", "gc", found["store"], "--dry-run")
    assert code == 0 and "would free" in out
    page = found["folder"] / "page.html"
    code, _, err = run("report", found["store"], "--out", page)
    assert code == 0 and str(page) in err and "<svg" in page.read_text()
    code, out, _ = run("report", found["store"], "--markdown")
    assert code == 0 and out.startswith("|")


def test_store_verify_names_the_damaged_file(found: dict[str, Any], run: Run, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(found["store"], tmp_path / "store")
    (weights,) = list((tmp_path / "store" / "cells").glob("*/weights/model.safetensors"))[:1]
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    code, _, err = run("store", "verify", tmp_path / "store")
    assert code == 2 and "weights/model.safetensors" in err


def test_inspect_json_has_the_true_numbers_of_the_demo_model(run: Run, demo_folder: Path) -> None:
    code, out, _ = run("inspect", "demo", "--json")
    said = json.loads(out)
    assert code == 0
    assert (said["layers"], said["heads"], said["kv_heads"], said["d_head"], said["d_ffn"]) == (6, 12, 12, 32, 1536)
    # worked by hand: a head is 3·(384·32 + 32) + 32·384, an MLP 384·1536 + 1536 + 1536·384 + 384
    whole = {"heads": 72 * 49248, "mlps": 6 * 1181568, "heads+mlps": 72 * 49248 + 6 * 1181568}
    # single values of the body: four projections 384·384 + 384, and the MLP, in each of 6 layers
    body = 6 * (4 * (384 * 384 + 384) + 1181568)
    scopes = said["maskable_values"]
    assert {name: scopes[name] for name in whole} == whole
    assert (scopes["body"], scopes["prasanna2020"]) == (body, body - 6 * 384)
    assert scopes["body:weights"] + scopes["body:biases"] == body
    assert scopes["chen2020"] == scopes["body:weights"] + 384 * 384
    code, out, _ = run("inspect", "demo")
    assert code == 0 and "3,545,856" in out


def test_options_written_once_are_options_of_every_verb_that_takes_the_group() -> None:
    verbs = {verb: inspect.signature(grouped(function)).parameters for verb, function in cli.VERBS.items()}
    for verb in ("find", "controls", "retrain", "evaluate"):
        for group in (OwnRows, Running):
            for field in fields(group):
                assert verbs[verb][field.name].default == field.default, (verb, field.name)
    assert not {"rows", "run", "common"} & {name for verb in verbs.values() for name in verb}

    def twice(metric: str, *, rows: OwnRows) -> None: ...

    with pytest.raises(ValueError, match="metric"):
        grouped(twice)


def test_help_answers_quickly() -> None:
    best = min(_seconds("--help") for _ in range(3))
    assert best < 1.0, f"{best:.2f} s of the processor; less than half a second on a quiet machine (bench/ measures it)"


def _seconds(*arguments: str) -> float:
    """Of the processor: what else the machine is doing does not count."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "tombola", *arguments], check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_an_interrupt_leaves_with_130_and_says_how_to_go_on(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("tombola.study.runs.plan_find", interrupted)
    code, _, err = run("find", "demo", "sst2", "--store", tmp_path)
    assert code == 130 and "the same command goes on" in err


# ------------------------------------------------------------------------------------------------------------ bad input


def bad(run: Run, *arguments: object) -> str:
    """The message of a call that must fail as every bad input does: exit code 2, one message, no traceback, empty stdout."""
    code, out, err = run(*arguments)
    assert code == 2, err
    assert "Traceback" not in err and out == ""
    return err


def test_bad_input_of_find(run: Run, tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    store, common = tmp_path / "store", ("--data", data_folder, "--store", tmp_path / "store")
    assert "unknown model 'no/such-model'" in bad(run, "find", "no/such-model", "sst2", *common)
    assert "not a model" in bad(run, "find", tmp_path, "sst2", *common)
    assert (
        "there is no task 'sst3'" in (said := bad(run, "find", tiny_folder, "sst3", *common)) and "did you mean 'sst2'?" in said
    )
    assert "cola" in bad(run, "find", tiny_folder, "cola", *common)
    assert "a seed is given twice" in bad(run, "find", tiny_folder, "sst2", *common, "--seeds", "1,1")
    assert "whole numbers" in bad(run, "find", tiny_folder, "sst2", *common, "--seeds", "a,b")
    for floor in ("0", "-1", "1.01", "nan"):
        assert "floor is not valid" in bad(run, "find", tiny_folder, "sst2", *common, "--floor", floor)
    assert "unknown method" in bad(run, "find", tiny_folder, "sst2", *common, "--method", "guess")
    assert "did you mean 'learning_rate'?" in bad(run, "find", tiny_folder, "sst2", *common, "--set", "learning_rat=1")
    assert "NAME=VALUE" in bad(run, "find", tiny_folder, "sst2", *common, "--set", "epochs")
    assert "head_mask" in bad(run, "find", tiny_folder, "sst2", *common, "--set", "head_mask=[[1]]")
    assert "no such data folder" in bad(run, "find", tiny_folder, "sst2", "--data", tmp_path / "nowhere", "--store", store)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    assert "is not empty" in bad(run, "find", tiny_folder, "sst2", *common, "--out", tmp_path / "full")
    assert not list(store.glob("cells/*")), "nothing half-written"


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ([{"sentence": "good film", "label": 2, "idx": 0}, *sentiment_rows(60, 1)[1:]], "label"),
        ([dict(row, label=1) for row in sentiment_rows(60, 1)], "one class"),
        ([], "no rows"),
        ([{"sentence": None, "label": 0, "idx": 0}, *sentiment_rows(60, 1)[1:]], "sentence"),
        ([{"sentence": "x", "label": float("nan"), "idx": 0}, *sentiment_rows(60, 1)[1:]], "label"),
        ([{"text": row["sentence"], "label": row["label"], "idx": row["idx"]} for row in sentiment_rows(60, 1)], "sentence"),
    ],
    ids=["label outside the classes", "one class only", "empty split", "no text", "NaN label", "no such column"],
)
def test_bad_rows_are_refused(run: Run, tmp_path: Path, tiny_folder: Path, rows: list[dict[str, Any]], expected: str) -> None:
    write_task(tmp_path / "data", "sst2", "train", rows)
    write_task(tmp_path / "data", "sst2", "validation", sentiment_rows(40, 2))
    said = bad(run, "find", tiny_folder, "sst2", "--data", tmp_path / "data", "--store", tmp_path / "store")
    assert expected in said and "train" in said
    assert not list((tmp_path / "store").glob("cells/*"))


def test_bad_tickets_are_refused(found: dict[str, Any], run: Run, tmp_path: Path, data_folder: Path) -> None:
    import shutil

    good, common = found["folder"] / "tickets" / "seed-0", ("--data", data_folder, "--store", found["store"])
    assert "is not a ticket" in bad(run, "controls", tmp_path, *common)
    assert "no ticket" in bad(run, "controls", "no/such-ticket", *common)
    cut = tmp_path / "cut"
    shutil.copytree(good, cut)
    (cut / "mask.safetensors").write_bytes((good / "mask.safetensors").read_bytes()[:-1])
    assert "truncated" in bad(run, "controls", cut, *common)
    newer = tmp_path / "newer"
    shutil.copytree(good, newer)
    body = json.loads((good / "ticket.json").read_text())
    (newer / "ticket.json").write_text(json.dumps(body | {"format_version": 99}))
    assert "newer format" in bad(run, "controls", newer, *common)
    (newer / "ticket.json").write_text(json.dumps(body | {"sparsity": 0.1}))
    assert "changed after it was written" in bad(run, "controls", newer, *common)
    assert "unknown kind of control 'worse'" in bad(run, "controls", good, "--kinds", "worse", *common)
    assert "nothing is asked for" in bad(run, "controls", good, "--draws", "0", *common)
    assert "there are no such weights" in bad(run, "evaluate", good, "sst2", "--weights", tmp_path / "none", *common)
    assert "nothing to compare" in bad(run, "compare", good, "--store", found["store"])


def test_a_store_that_cannot_be_written_is_refused(run: Run, tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    said = bad(run, "find", tiny_folder, "sst2", "--data", data_folder, "--store", tmp_path / "file", *FAST)
    assert "store" in said.lower()


def test_reading_a_store_that_is_not_there_is_refused(run: Run, tmp_path: Path) -> None:
    for verb in (("store", "ls"), ("store", "verify"), ("store", "gc"), ("report",)):
        assert "no such store" in bad(run, *verb, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_page_that_cannot_be_written_is_refused(found: dict[str, Any], run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "page.html" in bad(run, "report", found["store"], "--out", tmp_path / "file" / "page.html")


@pytest.mark.slow
def test_the_demo_ends_with_a_table_and_a_page(tmp_path: Path, demo_folder: Path) -> None:
    """The main job on the real model, smaller than `tombola demo` in nothing but rows; then again in seconds."""
    command = [sys.executable, "-m", "tombola", "demo", "--folder", str(tmp_path), "--seeds", "0"]
    command += ["--task", "nli-overlap:train_rows=2000,report_rows=60,challenge_rows=60"]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}  # the thread count is part of a cell's key
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "retrained" in ran.stdout and "random" in ran.stdout and "challenge" in ran.stdout
    assert (tmp_path / "page.html").is_file() and str(tmp_path / "page.html") in ran.stderr
    started = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert again.stdout == ran.stdout and "computed" not in again.stderr
    assert time.monotonic() - started < 60
