"""The store keeps its two promises: whatever cells/ holds is finished, and the same key never means two results."""

import errno
import hashlib
import inspect
import json
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.canonical import fingerprint
from tombola.disk import hash_file
from tombola.errors import StoreError
from tombola.store import Entry, Problem, Store

KEY, OTHER = "0123456789abcdef" * 2, "f" * 32
DESCRIBE = {"step": "train", "version": 1, "settings": {"lr": 2e-5}, "inputs": ["a", "b"]}
FILES = {"weights.bin": bytes(range(256)) * 40, "log/rows.jsonl": b'{"value": 1}\n', "log/deep/empty": b""}


def work(folder: Path) -> None:
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def never(folder: Path) -> None:
    pytest.fail("computed a cell that was there")


def contents(folder: Path) -> dict[str, bytes]:
    """The cell's own files, without the two of the store."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return {name: content for name, content in found.items() if name not in ("cell.json", "done.json")}


def leftovers(root: Path) -> list[str]:
    return [f"{name}/{path.name}" for name in ("tmp", "locks") if (root / name).exists() for path in (root / name).iterdir()]


def snapshot(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every path below `root` with its time and bytes."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in root.rglob("*")}


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def store(tmp_path: Path, said: list[str]) -> Store:
    return Store(tmp_path / "store", on_message=said.append)


@pytest.fixture
def filled(store: Store) -> Store:
    """A store with one cell, opened anew: nothing of it has been verified in this process."""
    store.compute(KEY, DESCRIBE, work)
    return Store(store.root, on_message=store._say)


PREAMBLE = f"""
import os, signal, sys, time
from pathlib import Path
from tombola.store import Store
KEY, DESCRIBE, FILES = {KEY!r}, {DESCRIBE!r}, {FILES!r}
{inspect.getsource(work)}
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A real process that has this module's `work`, KEY, DESCRIBE and FILES at hand."""
    command = [sys.executable, "-c", PREAMBLE + code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=-1, stdout=-1, stderr=-1, text=True)


def died(process: subprocess.Popen[str]) -> int:
    out, err = process.communicate(timeout=30)
    assert process.returncode in (0, -signal.SIGKILL), out + err
    return process.returncode


def until(true: Callable[[], bool]) -> None:
    for _ in range(3000):
        if true():
            return
        time.sleep(0.005)
    pytest.fail("waited 15 s in vain")


# -- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_is_the_start_of_the_sha256_of_canonical_json() -> None:
    # printf '{"a":[1,2.5,true,null],"b":{"c":"\u00e9"}}' | sha256sum
    assert fingerprint({"b": {"c": "é"}, "a": (1, 2.5, True, None)}) == "9bf11828e4b96e0abc28d7467f066206"


def test_fingerprint_ignores_the_order_of_keys_and_the_kind_of_list_and_mapping() -> None:
    assert fingerprint({"x": [1, 2], "y": 3}) == fingerprint(MappingProxyType({"y": 3, "x": (1, 2)}))
    assert fingerprint([1, 2]) != fingerprint([2, 1])


def test_fingerprint_tells_one_from_one_point_zero_true_and_the_string() -> None:
    assert len({fingerprint([value]) for value in (1, 1.0, True, "1", None, 0.1, 0.1 + 1e-17, 0.1 + 2e-17)}) == 7


def test_fingerprint_names_everything_that_has_no_exact_json() -> None:
    value = {"lr": math.nan, "steps": [1, -math.inf], "seeds": {3: "x"}, "set": {1}, "path": Path("a")}
    with pytest.raises(StoreError) as caught:
        fingerprint(value)
    assert caught.value.got == (
        "value.lr is nan; value.steps[1] is -inf; value.seeds has the key 3; value.set is a set; "
        f"value.path is a {type(Path('a')).__name__}"
    )


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def shape(value: Any) -> Any:
    """What a JSON value is, types included, with no order among keys: an identity made without json or hashing."""
    if isinstance(value, dict):
        return ("dict", frozenset((name, shape(item)) for name, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(shape(item) for item in value))
    return (type(value).__name__, repr(value))


@given(json_values, json_values)
def test_fingerprints_are_equal_exactly_when_the_values_are(one: Any, two: Any) -> None:
    assert (fingerprint(one) == fingerprint(two)) == (shape(one) == shape(two))
    assert fingerprint(json.loads(json.dumps(one))) == fingerprint(one)


def test_hash_file_agrees_with_hashlib_over_many_pieces(tmp_path: Path) -> None:
    content = os.urandom(3_000_001)
    (tmp_path / "big").write_bytes(content)
    assert hash_file(tmp_path / "big") == hashlib.sha256(content).hexdigest()


# -- the round trip ---------------------------------------------------------------------------------------------------


def test_computed_cell_is_loaded_by_everybody_and_never_computed_again(store: Store) -> None:
    assert store.load(KEY) is None
    folder, was_computed = store.compute(KEY, DESCRIBE, work)
    assert was_computed
    assert folder == store.root / "cells" / KEY
    assert contents(folder) == FILES
    again = Store(store.root)
    assert again.load(KEY) == store.load(KEY) == folder
    assert again.compute(KEY, DESCRIBE, never) == (folder, False)
    assert leftovers(store.root) == []


def test_cell_says_what_it_is_and_what_it_holds(filled: Store) -> None:
    folder = filled.root / "cells" / KEY
    assert json.loads((folder / "cell.json").read_text()) == DESCRIBE
    done = json.loads((folder / "done.json").read_text())
    assert set(done["files"]) == {*FILES, "cell.json"}
    for name, content in FILES.items():
        assert done["files"][name] == {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
    (entry,) = filled.entries()
    size = sum(map(len, FILES.values())) + (folder / "cell.json").stat().st_size
    assert (entry.key, entry.step, entry.describe, entry.bytes, entry.folder) == (KEY, "train", DESCRIBE, size, folder)
    assert abs(entry.finished.timestamp() - time.time()) < 60
    assert filled.disk_usage() == sum(p.stat().st_size for p in filled.root.rglob("*") if p.is_file())
    assert filled.disk_usage() > size


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(st.text("ab/", min_size=1, max_size=5), st.binary(max_size=9), max_size=4))
def test_any_tree_of_files_comes_back(tmp_path_factory: pytest.TempPathFactory, tree: dict[str, bytes]) -> None:
    files: dict[str, bytes] = {}
    for number, (name, content) in enumerate(tree.items()):  # numbered, so that no file is another one's folder
        files["/".join([*(part for part in name.split("/") if part), f"{number}.bin"])] = content

    def write(folder: Path) -> None:
        for name, content in files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    store = Store(tmp_path_factory.mktemp("tree"))
    store.compute(KEY, DESCRIBE, write)
    loaded = Store(store.root).load(KEY)
    assert loaded is not None
    assert contents(loaded) == files
    assert store.verify() == []


def test_cell_may_compute_the_cells_it_needs(store: Store) -> None:
    def outer(folder: Path) -> None:
        inner, was_computed = store.compute(OTHER, {"step": "inner"}, work)
        assert was_computed
        (folder / "sum").write_text(str(len(contents(inner))))

    folder, _ = store.compute(KEY, DESCRIBE, outer)
    assert contents(folder) == {"sum": b"3"}
    assert [entry.step for entry in store.entries()] == ["train", "inner"]


def test_cell_that_needs_itself_is_refused_instead_of_waiting_for_ever(store: Store) -> None:
    with pytest.raises(StoreError, match=f"{KEY} needs itself"):
        store.compute(KEY, DESCRIBE, lambda _: Store(store.root).compute(KEY, DESCRIBE, work) and None)
    assert leftovers(store.root) == []


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), FileNotFoundError(2, "mine", "/elsewhere")])
def test_work_that_raises_leaves_nothing(store: Store, error: BaseException) -> None:
    def fails(folder: Path) -> None:
        work(folder)
        raise error

    with pytest.raises(type(error)) as caught:
        store.compute(KEY, DESCRIBE, fails)
    assert caught.value is error
    assert leftovers(store.root) == []
    assert store.load(KEY) is None
    assert list(store.entries()) == []


@pytest.mark.parametrize("key", ["", "abc", KEY.upper(), KEY + "\n", "../" + KEY[3:]])
def test_key_that_is_no_fingerprint_is_refused(store: Store, key: str) -> None:
    with pytest.raises(StoreError, match="not the key of a cell"):
        store.load(key)
    with pytest.raises(StoreError, match="not the key of a cell"):
        store.compute(key, DESCRIBE, never)


def test_result_with_our_names_or_with_links_is_refused_naming_all(store: Store) -> None:
    def bad(folder: Path) -> None:
        work(folder)
        (folder / "done.json").write_text("{}")
        (folder / "log" / "link").symlink_to("/etc")

    with pytest.raises(StoreError, match="cannot be kept") as caught:
        store.compute(KEY, DESCRIBE, bad)
    assert caught.value.got == "done.json, log/link"
    assert leftovers(store.root) == []


def test_describe_that_is_not_exact_json_is_refused_before_the_work(store: Store) -> None:
    with pytest.raises(StoreError, match=r"value.lr is nan"):
        store.compute(KEY, {"lr": math.nan}, never)


def test_big_files_are_hashed_once_per_process(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    monkeypatch.setattr("tombola.store.hash_file", lambda path: hashed.append(path.name) or hash_file(path))
    for _ in range(3):
        filled.load(KEY)
        filled.compute(KEY, DESCRIBE, never)
    assert sorted(hashed) == ["cell.json", "empty", "rows.jsonl", "weights.bin"]
    assert filled.verify() == []
    assert len(hashed) == 8  # verify trusts nothing


# -- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


def forge(folder: Path) -> None:
    """done.json vouches for a file outside of the cell, hash and all."""
    done = json.loads((folder / "done.json").read_text())
    name = "../../store.json"
    done["files"][name] = {"sha256": hash_file(folder / name), "bytes": (folder / name).stat().st_size}
    (folder / "done.json").write_text(json.dumps(done))


def swap_for_link(folder: Path) -> None:
    outside = folder.parents[2] / "outside"
    (folder / "weights.bin").rename(outside)
    (folder / "weights.bin").symlink_to(outside)


DAMAGE: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "bit flip": (lambda f: flip(f / "weights.bin"), "weights.bin", "changed: sha256"),
    "truncated": (lambda f: os.truncate(f / "weights.bin", 99), "weights.bin", "changed: 99 bytes, 10240 when finished"),
    "missing": (lambda f: (f / "log/rows.jsonl").unlink(), "log/rows.jsonl", "missing"),
    "extra": (lambda f: (f / "log/new").touch(), "log/new", "extra, not in done.json"),
    "settings": (lambda f: (f / "cell.json").write_text("{}"), "cell.json", "changed: 2 bytes"),
    "no done.json": (lambda f: (f / "done.json").unlink(), "done.json", "missing or unreadable"),
    "half done.json": (lambda f: os.truncate(f / "done.json", 50), "done.json", "missing or unreadable"),
    "odd done.json": (lambda f: (f / "done.json").write_text('{"files": [1]}'), "done.json", "missing or unreadable"),
    "outside": (forge, "../../store.json", "missing"),
    "link": (swap_for_link, "weights.bin", "not a plain file"),
}


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("seen_before", [False, True])
def test_damaged_cell_is_named_moved_aside_and_recomputed(filled: Store, said: list[str], kind: str, seen_before: bool) -> None:
    damage, file, trouble = DAMAGE[kind]
    folder = filled.root / "cells" / KEY
    if seen_before:
        assert filled.load(KEY) == folder
    time.sleep(0.01)  # clocks of file systems tick every 4 ms
    damage(folder)

    before = snapshot(filled.root)
    (problem,) = Store(filled.root).verify()
    assert (problem.key, problem.file) == (KEY, file)
    assert trouble in problem.trouble
    assert snapshot(filled.root) == before

    assert filled.load(KEY) is None
    assert [path.name.split(".")[0] for path in (filled.root / "damaged").iterdir()] == [KEY]
    assert len(said) == 1
    assert f"cells/{KEY}/{file}: {trouble}" in said[0]
    assert filled.compute(KEY, DESCRIBE, work) == (folder, True)
    assert contents(folder) == FILES
    assert filled.verify() == []
    assert leftovers(filled.root) == []


def test_damaged_cell_stays_in_place_while_another_holds_its_lock(filled: Store, said: list[str]) -> None:
    """It may be about to publish a sound one under the same name."""
    hang_up(filled.root, **ELSEWHERE["another computer"])
    folder = filled.root / "cells" / KEY
    flip(folder / "weights.bin")
    assert filled.load(KEY) is None
    assert folder.exists()
    assert len(said) == 1
    assert "somebody is at work on it" in said[0]
    assert "weights.bin: changed" in said[0]


def test_compute_alone_recomputes_what_is_damaged(filled: Store, said: list[str]) -> None:
    flip(filled.root / "cells" / KEY / "weights.bin")
    folder, was_computed = filled.compute(KEY, DESCRIBE, work)
    assert was_computed
    assert contents(folder) == FILES
    assert "weights.bin: changed" in said[0]


def test_cell_that_is_a_file_or_a_link_is_damaged(store: Store) -> None:
    (store.root / "cells").mkdir()
    (store.root / "cells" / KEY).touch()
    (store.root / "cells" / OTHER).symlink_to(store.root)
    assert store.verify() == [Problem(KEY, ".", "not a folder"), Problem(OTHER, ".", "not a folder")]
    assert store.compute(KEY, DESCRIBE, work)[1]
    assert store.load(OTHER) is None
    assert store.verify() == []


def test_verify_names_every_bad_file_and_what_is_no_cell(filled: Store) -> None:
    folder = filled.root / "cells" / KEY
    flip(folder / "weights.bin")
    (folder / "log/deep/empty").unlink()
    (filled.root / "cells" / "stray").mkdir()
    assert [(problem.key, problem.file) for problem in filled.verify()] == [
        (KEY, "log/deep/empty"),
        (KEY, "weights.bin"),
        ("stray", "."),
    ]


def test_unreadable_cell_is_said_and_left_out_of_the_list(filled: Store, said: list[str]) -> None:
    filled.compute(OTHER, DESCRIBE, work)
    (filled.root / "cells" / KEY / "done.json").write_text("{}")
    assert [entry.key for entry in filled.entries()] == [OTHER]
    assert said == [f"cells/{KEY} cannot be read and is left out; `tombola store verify` says why"]


# -- kills ------------------------------------------------------------------------------------------------------------

KILLED_AT = """
countdown = int(sys.argv[2])
def watch(event, arguments):
    global countdown
    changes = event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir") or event == "open" and arguments[1] in ("w", "wb")
    if changes and str(arguments[0]).startswith(sys.argv[1]):
        countdown -= 1
        if countdown < 0:
            os.kill(os.getpid(), signal.SIGKILL)
store = Store(sys.argv[1])
sys.addaudithook(watch)
store.compute(KEY, DESCRIBE, work)
"""


def test_kill_at_any_moment_leaves_nothing_or_all(tmp_path: Path) -> None:
    moments = range(60)  # before the n-th change that the protocol makes in the file system; it makes about 30
    published = []
    for first in moments[::4]:
        roots = {n: tmp_path / str(n) for n in moments[first : first + 4]}
        processes = {n: child(KILLED_AT, root, n) for n, root in roots.items()}
        codes = [died(process) for process in processes.values()]
        for n, root in roots.items():
            said: list[str] = []
            store = Store(root, on_message=said.append)
            found = store.load(KEY)
            published.append(found is not None)
            assert said == [], f"killed at {n}: something unfinished looks finished"
            begin = time.monotonic()
            folder, was_computed = store.compute(KEY, DESCRIBE, work)
            assert time.monotonic() - begin < 5, f"killed at {n}: waited for a dead process"
            assert was_computed == (found is None)
            assert contents(folder) == FILES
            # What a compute need not clear, gc does; an attempt killed before it could say whose it is has to age.
            Store(root, stale_after=1e-9).gc(dry_run=False)
            assert leftovers(root) == [], f"killed at {n}"
        if 0 in codes:
            break
    else:
        pytest.fail("60 moments were not enough")
    assert published == sorted(published)  # once published, it stays
    assert published.count(False) > 12
    assert published.count(True) > 3


def test_next_compute_clears_what_a_killed_one_left(store: Store, said: list[str]) -> None:
    stuck = "Store(sys.argv[1]).compute(KEY, DESCRIBE, lambda f: (work(f), print('in', flush=True), time.sleep(60)))"
    process = child(stuck, store.root)
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    assert store.load(KEY) is None
    living = store.gc(dry_run=True)
    process.kill()
    process.communicate()
    dead = store.gc(dry_run=True)
    assert living.garbage == ()
    assert [item.kind for item in dead.garbage] == ["leftover", "stale lock"]
    assert dead.bytes > 10240
    folder, was_computed = store.compute(KEY, DESCRIBE, work)
    assert was_computed
    assert contents(folder) == FILES
    assert leftovers(store.root) == []
    assert said == [f"took over {KEY} from pid {process.pid} on {socket.gethostname()}, which is dead or stalled"]


# -- several at once --------------------------------------------------------------------------------------------------

RACE = """
root, log = sys.argv[1:]
def slow(folder):
    work(folder)
    time.sleep(0.3)
    with open(log, "a") as file:
        file.write(f"{os.getpid()}\\n")
store = Store(root)
print("ready", flush=True)
sys.stdin.read()
print(*store.compute(KEY, DESCRIBE, slow))
"""


def test_processes_that_race_end_with_one_folder_and_one_run(tmp_path: Path) -> None:
    root, log = tmp_path / "store", tmp_path / "log"
    racers = [child(RACE, root, log) for _ in range(3)]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    outputs = [racer.communicate(timeout=30) for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0, 0], outputs
    assert sorted(out for out, _ in outputs) == [f"{root / 'cells' / KEY} {b}\n" for b in (False, False, True)]
    assert len(log.read_text().splitlines()) == 1
    assert Store(root).verify() == []
    assert leftovers(root) == []


def test_living_lock_is_waited_for_and_said_once(store: Store) -> None:
    inside, go = threading.Event(), threading.Event()

    def slow(folder: Path) -> None:
        inside.set()
        assert go.wait(10)
        work(folder)

    first = threading.Thread(target=store.compute, args=(KEY, DESCRIBE, slow))
    first.start()
    assert inside.wait(10)
    said: list[str] = []
    waiter = Store(store.root, on_message=said.append, patience=0.05)
    results: list[tuple[Path, bool]] = []
    second = threading.Thread(target=lambda: results.append(waiter.compute(KEY, DESCRIBE, never)))
    second.start()
    until(lambda: said != [])
    assert waiter.load(KEY) is None  # does not wait
    assert second.is_alive()
    go.set()
    first.join()
    second.join()
    assert results == [(store.root / "cells" / KEY, False)]
    assert said == [f"waiting for pid {os.getpid()} on {socket.gethostname()}, which is computing {KEY}"]
    assert leftovers(store.root) == []


def hang_up(root: Path, **changes: object) -> Path:
    """A lock of our own process, with some of its owner's facts changed; its heart beats no more."""
    held: list[dict[str, Any]] = []
    store = Store(root)
    store.compute("a" * 32, {}, lambda _: held.append(json.loads((root / "locks" / ("a" * 32) / "owner.json").read_text())))
    owner = {**held[0], "thread": 0, "attempt": f"{KEY}.host.1.abc", **changes}
    attempt = root / "tmp" / str(owner["attempt"])
    for folder in (root / "locks" / KEY, attempt):
        folder.mkdir()
        (folder / "owner.json").write_text(json.dumps(owner))
    (attempt / "heartbeat").touch()
    (attempt / "cell").mkdir()
    (attempt / "cell" / "half").write_bytes(b"x" * 1000)
    return attempt


def dead_pid() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


DEAD: dict[str, Callable[[], dict[str, object]]] = {
    "no such process": lambda: {"pid": dead_pid()},
    "its pid was given to another": lambda: {"started": "1"},
}


@pytest.mark.parametrize("why", DEAD)
def test_lock_of_a_dead_process_here_is_taken_over_at_once(store: Store, said: list[str], why: str) -> None:
    attempt = hang_up(store.root, **DEAD[why]())
    assert store.compute(KEY, DESCRIBE, work)[1]
    assert not attempt.exists()
    assert leftovers(store.root) == []
    assert len(said) == 1
    assert "dead or stalled" in said[0]


def test_process_hidden_from_us_is_judged_by_its_heartbeat(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hang_up(store.root)
    monkeypatch.setattr("tombola.locks._process_start", lambda pid: "")
    assert store.gc(dry_run=True).garbage == ()
    kinds = [item.kind for item in Store(store.root, stale_after=1e-9).gc(dry_run=True).garbage]
    assert kinds == ["leftover", "stale lock"]


ELSEWHERE: dict[str, dict[str, object]] = {
    "another computer": {"host": "elsewhere", "pid": 1, "started": "1"},
    "another container": {"namespace": "pid:[1]", "pid": 1, "started": "1"},
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_lock_from_elsewhere_is_taken_over_when_its_heartbeat_is_old(store: Store, said: list[str], where: str) -> None:
    attempt = hang_up(store.root, **ELSEWHERE[where])
    before = time.monotonic()
    patient = Store(store.root, on_message=said.append, stale_after=0.5)
    assert patient.compute(KEY, DESCRIBE, work)[1]
    assert time.monotonic() - before > 0.4
    assert not attempt.exists()
    assert leftovers(store.root) == []
    assert len(said) == 1


def test_heartbeat_keeps_a_lock_from_elsewhere_alive(store: Store) -> None:
    attempt = hang_up(store.root, **ELSEWHERE["another computer"])
    waiter = Store(store.root, stale_after=0.4, on_message=lambda _: None)
    thread = threading.Thread(target=waiter.compute, args=(KEY, DESCRIBE, work))
    thread.start()
    for _ in range(12):
        time.sleep(0.1)
        os.utime(attempt / "heartbeat")
        assert thread.is_alive()
    assert (attempt / "cell" / "half").exists()
    thread.join()  # the heart has stopped
    assert not attempt.exists()


def test_heart_beats_while_the_work_runs_and_stops_after_it(store: Store) -> None:
    beats: set[int] = set()

    def watched(folder: Path) -> None:
        until(lambda: beats.add((folder.parent / "heartbeat").stat().st_mtime_ns) or len(beats) > 3)

    threads = threading.active_count()
    Store(store.root, stale_after=0.1).compute(KEY, DESCRIBE, watched)
    assert len(beats) > 3
    until(lambda: threading.active_count() == threads)


def test_clock_of_this_computer_does_not_matter(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    hang_up(store.root, **ELSEWHERE["another computer"])
    monkeypatch.setattr("time.time", lambda: 4e9)
    assert store.gc(dry_run=True).garbage == ()


def test_lock_that_was_renewed_meanwhile_is_put_back(store: Store) -> None:
    """Two waiters judged one dead owner; the slower one must not take the lock from the faster one."""
    hang_up(store.root, pid=dead_pid())
    from tombola.locks import read_owner

    lock = store.root / "locks" / KEY
    judged = read_owner(lock)
    fresh = json.loads((lock / "owner.json").read_text()) | {"pid": os.getpid()}
    (lock / "owner.json").write_text(json.dumps(fresh))
    assert store._locks.take_down(lock, judged) is False
    assert json.loads((lock / "owner.json").read_text()) == fresh
    assert store._locks.take_down(lock, read_owner(lock)) is True
    assert not lock.exists()


def test_gc_judges_a_lock_again_before_it_removes_it(filled: Store) -> None:
    hang_up(filled.root, pid=dead_pid())
    owner = filled.root / "locks" / KEY / "owner.json"

    def renews(entry: Entry) -> bool:  # asked after the lock was found stale
        if entry.key != KEY:
            return False
        (filled.root / "tmp" / "new").mkdir()
        (filled.root / "tmp" / "new" / "heartbeat").touch()
        successor = {**ELSEWHERE["another computer"], "attempt": "new"}
        owner.write_text(json.dumps(json.loads(owner.read_text()) | successor))
        return False

    assert [item.kind for item in filled.gc(dry_run=False, drop=renews).garbage] == ["leftover"]
    assert owner.exists()


def test_stalled_owner_leaves_the_lock_of_its_successor_alone(store: Store) -> None:
    inside, go = threading.Event(), threading.Event()

    def successor(folder: Path) -> None:
        inside.set()
        assert go.wait(10)
        work(folder)

    quick = Store(store.root, stale_after=0.2, on_message=lambda _: None)
    thread = threading.Thread(target=quick.compute, args=(KEY, DESCRIBE, successor))

    def stalled(folder: Path) -> None:
        time.sleep(0.3)
        thread.start()
        assert inside.wait(10)
        work(folder)

    assert store.compute(KEY, DESCRIBE, stalled)[1]  # first to publish, though it lost its lock
    assert (store.root / "locks" / KEY).exists()
    go.set()
    thread.join()
    assert leftovers(store.root) == []
    assert store.verify() == []


def overtaken(root: Path, ours: dict[str, bytes], theirs: dict[str, bytes]) -> tuple[Path, bool]:
    """Compute `ours` with a heart that never beats, while another thread takes the lock over and publishes `theirs`."""

    def put(files: dict[str, bytes], folder: Path) -> None:
        for name, content in files.items():
            (folder / name).write_bytes(content)

    def stalled(folder: Path) -> None:
        time.sleep(0.3)
        quick = Store(root, stale_after=0.2, on_message=lambda _: None)
        thread = threading.Thread(target=quick.compute, args=(KEY, DESCRIBE, lambda other: put(theirs, other)))
        thread.start()
        thread.join()
        put(ours, folder)

    return Store(root).compute(KEY, DESCRIBE, stalled)


def test_identical_duplicate_is_dropped_quietly(tmp_path: Path) -> None:
    folder, was_computed = overtaken(tmp_path / "s", {"a": b"1"}, {"a": b"1"})
    assert was_computed
    assert contents(folder) == {"a": b"1"}
    assert leftovers(tmp_path / "s") == []
    assert not (tmp_path / "s" / "damaged").exists()


def test_differing_duplicate_is_refused_naming_the_files_and_kept_aside(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"two computations of .* gave different results") as caught:
        overtaken(tmp_path / "s", {"a": b"1", "b": b"2", "c": b"3"}, {"a": b"1", "b": b"?", "d": b"4"})
    assert str(caught.value.got).startswith("b, c, d differ between ")
    assert contents(tmp_path / "s" / "cells" / KEY) == {"a": b"1", "b": b"?", "d": b"4"}
    (aside,) = (tmp_path / "s" / "damaged").iterdir()
    assert str(aside) in str(caught.value)
    assert contents(aside) == {"a": b"1", "b": b"2", "c": b"3"}
    assert leftovers(tmp_path / "s") == []


# -- disks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "at_least", "number", "words"),
    [
        ("mkdir", 3, errno.ENOSPC, "the disk is full"),
        ("mkdir", 3, errno.EROFS, "no permission"),
        ("fsync", 6, errno.ENOSPC, "the disk is full"),
        ("rename", 2, errno.EDQUOT, "the disk is full"),
        ("rename", 2, errno.EIO, "failed while"),
    ],
)
def test_failing_disk_is_explained_and_leaves_the_store_intact(
    filled: Store, monkeypatch: pytest.MonkeyPatch, name: str, at_least: int, number: int, words: str
) -> None:
    real, explained = getattr(os, name), 0
    for failing_call in range(20):
        key, calls = f"{failing_call:032x}", iter(range(99))

        def fails(*arguments: Any, calls: Any = calls, failing_call: int = failing_call, **named: Any) -> Any:
            if next(calls) == failing_call:
                raise OSError(number, os.strerror(number), str(filled.root))
            return real(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(os, name, fails)
            try:
                filled.compute(key, DESCRIBE, lambda folder: (folder / "a").write_bytes(b"1") and None)
            except StoreError as error:
                explained += 1
                assert words in str(error)
                assert f"[Errno {number}]" in str(error.got)
                assert error.next
        if next(calls) <= failing_call:
            break  # so many calls there are not
        fresh = Store(filled.root, on_message=pytest.fail)
        assert contents(filled.root / "cells" / KEY) == FILES
        assert fresh.verify() == []
        assert fresh.compute(key, DESCRIBE, lambda folder: (folder / "a").write_bytes(b"1") and None)[0].exists()
        filled.gc(dry_run=False)  # when it is the lock that could not be taken down
        assert leftovers(filled.root) == []
    assert explained >= at_least


def test_disk_that_fills_up_inside_the_work_is_explained(store: Store) -> None:
    def fills(folder: Path) -> None:
        work(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match="the disk is full") as caught:
        store.compute(KEY, DESCRIBE, fills)
    assert "bytes are free where the store is" in str(caught.value.got)
    assert "gc" in str(caught.value.next)
    assert leftovers(store.root) == []


def test_attempt_removed_under_a_stalled_process_is_explained(store: Store) -> None:
    def removed(folder: Path) -> None:
        folder.parent.rename(store.root / "gone")
        (folder / "late").touch()

    with pytest.raises(StoreError, match=f"failed while computing {KEY}"):
        store.compute(KEY, DESCRIBE, removed)
    with pytest.raises(StoreError, match=f"failed while publishing {KEY}"):
        store.compute(KEY, DESCRIBE, lambda folder: folder.rmdir())
    assert leftovers(store.root) == []


def no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(path: Any, *_: Any, **__: Any) -> Any:
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    for name in ("mkdir", "rename", "remove", "unlink", "rmdir", "utime"):
        monkeypatch.setattr(os, name, refuses)


def test_read_only_store_is_read_and_says_so_when_written(
    filled: Store, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    filled.compute(OTHER, DESCRIBE, work)
    flip(filled.root / "cells" / OTHER / "weights.bin")
    no_writing(monkeypatch)
    store = Store(filled.root, on_message=said.append)
    folder = filled.root / "cells" / KEY
    assert store.compute(KEY, DESCRIBE, never) == (store.load(KEY), False) == (folder, False)
    assert len(store.verify()) == 1
    assert [entry.key for entry in store.entries()] == [KEY, OTHER]
    assert store.load(OTHER) is None  # damaged, but it cannot be moved
    assert "damaged, and cannot be moved aside" in said[0]
    assert "weights.bin: changed" in said[0]
    with pytest.raises(StoreError, match=r"no permission: the store .* failed while locking") as caught:
        store.compute("a" * 32, DESCRIBE, never)
    assert "Read-only file system" in str(caught.value.got)


def test_store_that_cannot_be_made_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match="failed while opening it"):
        Store(tmp_path / "file")
    no_writing(monkeypatch)
    with pytest.raises(StoreError, match="no permission"):
        Store(tmp_path / "new")


def test_late_store_is_made_with_its_first_result(tmp_path: Path) -> None:
    late = Store(tmp_path / "deep" / "store", late=True)
    assert late.load(KEY) is None and list(late.entries()) == [] and late.verify() == []
    assert late.gc(dry_run=False).garbage == () and late.disk_usage() == 0
    assert not (tmp_path / "deep").exists()
    other = Store(tmp_path / "deep" / "store")  # somebody else is faster
    other.compute(OTHER, DESCRIBE, work)
    folder, computed = late.compute(KEY, DESCRIBE, work)
    assert computed and contents(folder) == FILES
    assert Store(tmp_path / "deep" / "store", late=True).compute(KEY, DESCRIBE, never) == (folder, False)


def test_late_store_is_refused_at_once_where_it_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "full"):
        with pytest.raises(StoreError, match=place.name):
            Store(place, late=True)


# -- opening, finding, tidying ----------------------------------------------------------------------------------------


def test_folder_of_other_things_is_not_taken_for_a_store(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(StoreError, match="is not a store") as caught:
        Store(tmp_path)
    assert caught.value.got == "no store.json but thesis.tex"
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(StoreError, match="is not a store"):
        Store(tmp_path / "absent", create=False)
    assert not (tmp_path / "absent").exists()


@pytest.mark.parametrize("marker", ['{"format": 2}', "", "[]", '{"format": "1"}'])
def test_store_of_a_newer_or_unknown_format_is_refused(filled: Store, marker: str) -> None:
    (filled.root / "store.json").write_text(marker)
    with pytest.raises(StoreError, match="cannot be read by this tombola") as caught:
        Store(filled.root)
    assert caught.value.expected == "format 1"
    assert (filled.root / "store.json").read_text() == marker


def test_making_of_a_store_that_was_killed_is_finished(tmp_path: Path) -> None:
    (tmp_path / "store.json.1a2b3c4d").write_text("{")
    assert Store(tmp_path).compute(KEY, DESCRIBE, work)[1]
    assert json.loads((tmp_path / "store.json").read_text()) == {"format": 1}


def test_relative_root_means_the_same_folder_after_a_change_of_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = Store("here")
    monkeypatch.chdir("/")
    assert store.compute(KEY, DESCRIBE, work)[0] == tmp_path / "here" / "cells" / KEY


def test_prefix_finds_its_one_key_or_lists_the_candidates(store: Store) -> None:
    with pytest.raises(StoreError, match="an empty store"):
        store.find("a")
    keys = ["aa" + "0" * 30, "ab" + "0" * 30, "b" * 32]
    for key in keys:
        store.compute(key, DESCRIBE, work)
    assert store.find("b") == keys[2]
    assert store.find(keys[0]) == keys[0]
    with pytest.raises(StoreError, match="2 cells start with 'a'") as caught:
        store.find("a")
    assert caught.value.got == ", ".join(keys[:2])
    with pytest.raises(StoreError, match="no cells start with 'c'") as caught:
        store.find("c")
    assert caught.value.got == ", ".join(keys)


def test_gc_removes_exactly_what_its_dry_run_names(filled: Store) -> None:
    root = filled.root
    filled.compute(OTHER, {"step": "old"}, work)
    hang_up(root, pid=dead_pid())
    (root / "damaged" / "x").mkdir(parents=True)
    (root / "damaged" / "x" / "file").write_bytes(b"1" * 77)

    before, usage = snapshot(root), filled.disk_usage()
    plan = filled.gc(dry_run=True, drop=lambda entry: entry.step == "old")
    assert snapshot(root) == before
    assert [(item.kind, item.path.relative_to(root).as_posix()) for item in plan.garbage] == [
        ("leftover", f"tmp/{KEY}.host.1.abc"),
        ("stale lock", f"locks/{KEY}"),
        ("damaged", "damaged/x"),
        ("dropped", f"cells/{OTHER}"),
    ]
    assert plan.garbage[2].bytes == 77
    assert plan.bytes == sum(item.bytes for item in plan.garbage) > 12_000

    assert filled.gc(dry_run=False, drop=lambda entry: entry.step == "old") == plan
    assert filled.disk_usage() == usage - plan.bytes
    assert leftovers(root) == []
    assert filled.load(OTHER) is None
    assert filled.load(KEY) is not None
    assert filled.gc(dry_run=True).garbage == filled.gc(dry_run=False).garbage == ()


def test_gc_spares_what_living_processes_are_at(filled: Store) -> None:
    def inside(folder: Path) -> None:
        work(folder)
        assert filled.gc(dry_run=False).garbage == ()
        impatient = Store(filled.root, stale_after=1e-9, on_message=lambda _: None)
        assert [item.kind for item in impatient.gc(dry_run=True).garbage] == ["stale lock"]  # never what was written
        assert contents(folder) == FILES

    assert filled.compute(OTHER, DESCRIBE, inside)[1]


def test_gc_does_not_drop_a_cell_that_somebody_is_at(filled: Store) -> None:
    hang_up(filled.root, **ELSEWHERE["another computer"])
    assert filled.gc(dry_run=False, drop=lambda entry: entry.key == KEY).garbage == ()
    assert filled.load(KEY) is not None


# -- unfinished work --------------------------------------------------------------------------------------------------


def leave_unfinished(store: Store, key: str = KEY, size: int = 500) -> Path:
    """What a computation that failed half-way leaves."""
    kept: list[Path] = []

    def fails(folder: Path) -> None:
        kept.append(store.scratch(key))
        (kept[0] / "checkpoint").mkdir()
        (kept[0] / "checkpoint" / "part").write_bytes(b"x" * size)
        raise ValueError("half-way")

    with pytest.raises(ValueError, match="half-way"):
        store.compute(key, DESCRIBE, fails)
    return kept[0]


def test_scratch_outlives_a_failed_attempt_and_goes_with_the_publishing(store: Store) -> None:
    usage = store.disk_usage()
    kept = leave_unfinished(store)
    assert kept == store.root / "unfinished" / KEY
    assert store.disk_usage() == usage + 500
    assert leftovers(store.root) == []

    def goes_on(folder: Path) -> None:
        assert (store.scratch(KEY) / "checkpoint" / "part").read_bytes() == b"x" * 500
        work(folder)

    assert store.compute(KEY, DESCRIBE, goes_on) == (store.root / "cells" / KEY, True)
    assert contents(store.root / "cells" / KEY) == FILES
    assert not kept.exists()
    assert leftovers(store.root) == []


def test_scratch_is_found_again_after_a_kill(store: Store) -> None:
    code = """
def half(folder):
    (store.scratch(KEY) / "part").write_text("so far")
    os.kill(os.getpid(), signal.SIGKILL)
store = Store(sys.argv[1])
store.compute(KEY, DESCRIBE, half)
"""
    assert died(child(code, store.root)) == -signal.SIGKILL
    found: list[str] = []

    def goes_on(folder: Path) -> None:
        found.append((store.scratch(KEY) / "part").read_text())
        work(folder)

    assert store.compute(KEY, DESCRIBE, goes_on)[1]
    assert found == ["so far"]
    assert list((store.root / "unfinished").iterdir()) == leftovers(store.root) == []


def test_scratch_is_for_who_computes_the_cell(store: Store) -> None:
    with pytest.raises(StoreError, match="belongs to whoever computes it") as caught:
        store.scratch(KEY)
    assert caught.value.got == "nobody"
    hang_up(store.root, **ELSEWHERE["another computer"])
    with pytest.raises(StoreError, match="belongs to whoever computes it") as caught:
        store.scratch(KEY)
    assert caught.value.got == "pid 1 on elsewhere"
    with pytest.raises(StoreError, match="not the key of a cell"):
        store.scratch("../cells")
    assert not (store.root / "unfinished").exists()

    def asks_in_a_thread(folder: Path) -> None:
        made: list[Path] = []
        thread = threading.Thread(target=lambda: made.append(store.scratch(OTHER)))
        thread.start()
        thread.join()
        assert made == [store.root / "unfinished" / OTHER]
        with pytest.raises(StoreError, match="belongs to whoever computes it"):
            store.scratch("a" * 32)
        work(folder)

    assert store.compute(OTHER, DESCRIBE, asks_in_a_thread)[1]


def test_gc_keeps_unfinished_work_unless_asked(filled: Store) -> None:
    kept = leave_unfinished(filled, OTHER)
    for dry_run in (True, False):
        plan = filled.gc(dry_run=dry_run)
        assert (plan.garbage, plan.bytes) == ((), 0)
        assert [(item.kind, item.path, item.bytes) for item in plan.kept] == [("unfinished", kept, 500)]
        assert (kept / "checkpoint" / "part").exists()
    before, usage = snapshot(filled.root), filled.disk_usage()
    plan = filled.gc(dry_run=True, unfinished=True)
    assert [(item.kind, item.path, item.bytes) for item in plan.garbage] == [("unfinished", kept, 500)]
    assert plan.kept == ()
    assert snapshot(filled.root) == before
    assert filled.gc(dry_run=False, unfinished=True) == plan
    assert not kept.exists()
    assert filled.disk_usage() == usage - 500
    assert leftovers(filled.root) == []
    assert filled.load(KEY) is not None


def test_gc_spares_unfinished_work_that_somebody_is_at(store: Store) -> None:
    def inside(folder: Path) -> None:
        (store.scratch(KEY) / "part").touch()
        plan = Store(store.root).gc(dry_run=False, unfinished=True)
        assert plan.garbage == plan.kept == ()
        assert (store.scratch(KEY) / "part").exists()
        work(folder)

    assert store.compute(KEY, DESCRIBE, inside)[1]


@pytest.mark.parametrize("by", ["compute", "gc"])
def test_unfinished_work_of_a_finished_cell_is_removed(filled: Store, by: str) -> None:
    """Left by a kill between publishing and removing."""
    kept = filled.root / "unfinished" / KEY
    kept.mkdir(parents=True)
    (kept / "part").write_bytes(b"x" * 9)
    if by == "compute":
        assert filled.compute(KEY, DESCRIBE, never)[1] is False
    else:
        plan = filled.gc(dry_run=False)
        assert [(item.kind, item.path, item.bytes) for item in plan.garbage] == [("leftover", kept, 9)]
    assert not kept.exists()
    assert leftovers(filled.root) == []


def test_unfinished_work_of_a_finished_cell_is_left_to_who_is_at_it(filled: Store) -> None:
    kept = filled.root / "unfinished" / KEY
    kept.mkdir(parents=True)
    hang_up(filled.root, **ELSEWHERE["another computer"])
    assert filled.compute(KEY, DESCRIBE, never)[1] is False
    assert filled.gc(dry_run=False).garbage == ()
    assert kept.exists()


def test_read_only_store_with_unfinished_work_is_read(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    (filled.root / "unfinished" / KEY).mkdir(parents=True)
    no_writing(monkeypatch)
    assert filled.compute(KEY, DESCRIBE, never) == (filled.root / "cells" / KEY, False)


def test_stalled_process_leaves_the_unfinished_work_to_its_successor(store: Store) -> None:
    inside, go, kept = threading.Event(), threading.Event(), store.root / "unfinished" / KEY
    quick = Store(store.root, stale_after=0.2, on_message=lambda _: None)

    def successor(folder: Path) -> None:
        (quick.scratch(KEY) / "mine").touch()
        inside.set()
        assert go.wait(10)
        assert (kept / "mine").exists()
        work(folder)

    thread = threading.Thread(target=quick.compute, args=(KEY, DESCRIBE, successor))

    def stalled(folder: Path) -> None:
        time.sleep(0.3)
        thread.start()
        assert inside.wait(10)
        work(folder)

    assert store.compute(KEY, DESCRIBE, stalled)[1]  # first to publish, though it lost its lock
    assert (kept / "mine").exists()
    go.set()
    thread.join()
    assert not kept.exists()  # removed by the second, which found it published
    assert leftovers(store.root) == []


def test_unfinished_work_that_cannot_be_removed_costs_no_result(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_unfinished(store)
    real = os.rename

    def refuses(source: Any, target: Any, **named: Any) -> None:
        if Path(source).parent.name == "unfinished":
            raise OSError(errno.EIO, "broken", str(source))
        real(source, target, **named)

    monkeypatch.setattr(os, "rename", refuses)
    assert store.compute(KEY, DESCRIBE, work)[1]
    assert contents(store.root / "cells" / KEY) == FILES
    monkeypatch.undo()
    assert [item.kind for item in store.gc(dry_run=False).garbage] == ["leftover"]


# -- budget -----------------------------------------------------------------------------------------------------------


def test_no_cell_is_started_over_budget_and_what_is_there_is_read(filled: Store) -> None:
    usage = filled.disk_usage()
    tight = Store(filled.root, budget=usage - 1)
    with pytest.raises(StoreError, match=f"over its budget, so {OTHER} was not started") as caught:
        tight.compute(OTHER, {"step": "late"}, never)
    (entry,) = filled.entries()
    assert f"{KEY[:12]} train {entry.bytes:,}" in str(caught.value.got)
    assert caught.value.expected == f"at most {usage - 1:,} bytes"
    assert "gc" in str(caught.value.next)
    assert leftovers(filled.root) == []
    assert tight.compute(KEY, DESCRIBE, never)[1] is False
    assert tight.load(KEY) is not None


def test_cell_is_started_within_budget_and_may_fill_it(store: Store) -> None:
    roomy = Store(store.root, budget=10_000)  # what is there decides, and not what the cell will need
    assert roomy.compute(KEY, DESCRIBE, work)[1]
    with pytest.raises(StoreError, match="over its budget") as caught:
        roomy.compute(OTHER, DESCRIBE, never)
    used = int(str(caught.value.got).split(" bytes")[0].replace(",", ""))
    assert abs(used - roomy.disk_usage()) < 1500  # its own attempt: three small files, while it looked


def test_largest_cells_are_named_first_and_unfinished_work_counts(store: Store) -> None:
    for n in range(7):
        store.compute(f"{n:032x}", {"step": f"s{n}"}, lambda folder, n=n: (folder / "a").write_bytes(b"1" * 100 * n) and None)
    leave_unfinished(store, size=5000)
    with pytest.raises(StoreError) as caught:
        Store(store.root, budget=5000).compute(OTHER, DESCRIBE, never)
    named = [part.split()[1] for part in str(caught.value.got).partition("largest cells: ")[2].split(", ")]
    assert named == ["s6", "s5", "s4", "s3", "s2"]


def test_store_without_a_budget_is_not_walked(filled: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "disk_usage", lambda self: pytest.fail("walked the store"))
    assert filled.compute(OTHER, DESCRIBE, work)[1]
