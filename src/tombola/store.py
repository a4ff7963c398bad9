"""Results on disk, named by what they were computed from: computed once, loaded ever after, safe against any kill.

A *cell* is one finished result, a folder of files. Its *key* is the fingerprint of everything it depends on.

    <root>/store.json                           the version of this layout
    <root>/cells/<key>/                         cell.json (what it is), done.json (sha256 and size of each file), its files
    <root>/tmp/<key>.<host>.<pid>.<random>/     one attempt (see `tombola.locks`), with cell/ (to become cells/<key>)
    <root>/locks/<key>/                         which attempt is at work on it
    <root>/unfinished/<key>/                    what a killed computation of the cell can go on from: outlives its attempt
    <root>/damaged/                             what failed verification or differed, to be looked at until `gc`

Two rules carry the rest. A cell appears by *one rename* of a complete, synced folder, so a kill at any moment leaves
either nothing or all of it. And *locks only save work*: should two processes both believe they hold one, the first to
publish wins and the second must have made the same bytes, so correctness never hangs on a clock or a process table.
What lies in unfinished/ may be half written at any moment: whoever uses it must know by itself what is whole.

Read `Store.compute` first, then `_publish` and `_examine`; locks are a module of their own. POSIX file systems; knows no models.
"""

import errno
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from tombola.canonical import JSON, exact_json
from tombola.disk import Stamp, children, hash_file, scan, size_of, sync
from tombola.errors import StoreError
from tombola.locks import Locks, Owner, read_json, read_owner, renamed

FORMAT = 1
MARKER, CELL, DONE = "store.json", "cell.json", "done.json"
PROVENANCE = "provenance.json"  # a cell's own note of when and where: the one file in which duplicates may differ
KEY = re.compile(r"[0-9a-f]{32}")
FULL = (errno.ENOSPC, errno.EDQUOT)
FULL_SAID = re.compile(r"no space left|disk quota|os error 28|file write failed|unexpected pos", re.IGNORECASE)
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)


@dataclass(frozen=True, slots=True)
class Entry:
    """One finished cell as `tombola store ls` shows it; its files were not hashed."""

    key: str
    step: str  # "step" of `describe`; "" when it has none
    describe: JSON
    bytes: int
    finished: datetime  # by the clock of the computer that made it; no part of its identity
    folder: Path


@dataclass(frozen=True, slots=True)
class Problem:
    """One file of one cell that is not what done.json says."""

    key: str
    file: str  # relative to the cell's folder
    trouble: str

    def __str__(self) -> str:
        return f"cells/{self.key}/{self.file}: {self.trouble}"


@dataclass(frozen=True, slots=True)
class Garbage:
    """One folder that `gc` removes."""

    # "leftover" (a dead process's attempt, or the unfinished work of a cell that is finished) | "stale lock" | "damaged" |
    # "unfinished" (what a killed computation could go on from) | "dropped" (a cell nobody wants)
    kind: str
    path: Path
    bytes: int


@dataclass(frozen=True, slots=True)
class GcPlan:
    """What `gc` removed, or would remove on a dry run; and the unfinished work that it was not asked to remove."""

    garbage: tuple[Garbage, ...]
    kept: tuple[Garbage, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(item.bytes for item in self.garbage)


class Store:
    """A folder of cells, shared by any number of threads, processes and computers.

    `create` makes the folder when it is missing; with `late` only when the first result is computed, until when the store
    is empty. Nothing else is written before a result is, so a read-only store can be read. `on_message` gets what a user
    should know: damage, waiting longer than `patience` seconds, a lock taken over. That happens when its owner is a dead
    process of this computer, or gave no heartbeat for `stale_after` seconds of the file server's clock. `budget` is how
    many bytes the store may hold when a cell is started; None is no limit.
    Raises: StoreError when the folder is no store, is of a newer format, or cannot be made.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        create: bool = True,
        late: bool = False,
        on_message: Callable[[str], None] = logging.getLogger("tombola.store").warning,
        stale_after: float = 30.0,
        patience: float = 5.0,
        budget: int | None = None,
    ) -> None:
        self.root = Path(root).absolute()
        self._say, self._budget = on_message, budget
        self._locks = Locks(self.root, say=on_message, stale_after=stale_after, patience=patience, explained=self._explained)
        self._verified: dict[str, dict[str, Stamp]] = {}  # key -> its files when their hashes were last found right
        self._late = create and late and self._can_be_made()
        if not self._late:
            self._open(create)

    @property
    def is_there(self) -> bool:
        """Whether its folder is made already, see `late`."""
        return not self._late

    def _can_be_made(self) -> bool:
        """Whether nothing is there yet, and nothing is known that would keep the folder from being made."""
        above = next(folder for folder in self.root.parents if os.path.lexists(folder))
        return not os.path.lexists(self.root) and above.is_dir() and os.access(above, os.W_OK)

    def _open(self, create: bool) -> None:
        with self._explained("opening it"):
            if create:
                self.root.mkdir(parents=True, exist_ok=True)
            # Listed before the marker is read: a store being made beside us has its marker before anything else.
            others = [path.name for path in children(self.root) if not path.name.startswith(MARKER)]
            marker = self.root / MARKER
            if not marker.exists():
                if others or not create:
                    got = f"no {MARKER} but {', '.join(others[:5])}" if others else "nothing there"
                    next = "name the folder of a store, or a new one that tombola may make"
                    raise StoreError(f"{self.root} is not a store", got=got, expected=MARKER, next=next)
                draft = self.root / f"{MARKER}.{secrets.token_hex(4)}"
                draft.write_text(json.dumps({"format": FORMAT}), "utf-8")
                sync(draft)
                draft.rename(marker)
            found = read_json(marker)
        version = found.get("format") if isinstance(found, dict) else None
        if not isinstance(version, int) or version > FORMAT:
            raise StoreError(
                f"the store {self.root} cannot be read by this tombola",
                got=f"{MARKER} with format {version}",
                expected=f"format {FORMAT}",
                next=f'update tombola; or, if that file was damaged, write {{"format": {FORMAT}}} into it',
            )

    def compute(self, key: str, describe: JSON, work: Callable[[Path], None]) -> tuple[Path, bool]:
        """The folder of the finished cell, and whether `work` ran to make it.

        `work` fills the empty folder it is given, in any depth; the names cell.json (`describe`) and done.json are
        ours. When it raises, nothing is published. It may compute other cells, but not its own.
        Raises: StoreError when the store cannot be written or is over its budget, or when another process published
        other bytes for `key`.
        """
        text = exact_json(describe, indent=2) + "\n"
        if self._late:
            self._open(create=True)
            self._late = False
        if self._examine(key) == []:
            self._tidy(key)
            return self._folder(key), False
        with self._locks.hold(key, wait=True) as attempt:
            assert attempt is not None
            for other in (self.root / "tmp").glob(f"{key}.*"):
                if other != attempt and self._locks.abandoned(other, spare_living=True):
                    shutil.rmtree(other, ignore_errors=True)
            if self._sound_or_aside(key):
                self._drop_unfinished(key, attempt)
                return self._folder(key), False
            self._check_budget(key)
            cell = attempt / "cell"
            try:
                work(cell)
            except OSError as error:  # that of `work` itself passes; what is wrong with our folder is ours to explain
                ours = error.errno in READ_ONLY and str(error.filename).startswith(str(self.root))
                if ours or error.errno in FULL or not cell.is_dir():
                    raise self._trouble(error, f"computing {key}") from error
                raise
            except Exception as error:  # libraries that write tensors say in their own way that the disk is full
                if FULL_SAID.search(str(error)):
                    raise self._trouble(OSError(errno.ENOSPC, str(error)), f"computing {key}") from error
                raise
            with self._explained(f"publishing {key}"):
                self._publish(key, text, cell)
            self._drop_unfinished(key, attempt)
        return self._folder(key), True

    def scratch(self, key: str) -> Path:
        """The folder of what a killed computation of this cell can go on from; empty at first, gone with the publishing.

        To be called inside the `work` of `compute(key, …)`, from any thread of it. It stays when the work raises or is
        killed, and the next attempt finds it as it was left, half written files and all.
        Raises: StoreError anywhere else, also when the lock was lost to a successor, which is in there by now.
        """
        folder, owner, here = self._unfinished(key), self._locks.owner(key), Owner.here(key)
        if owner is None or owner[:4] != here[:4]:
            raise StoreError(
                f"the unfinished work of {key} belongs to whoever computes it",
                got="nobody" if owner is None else f"pid {owner.pid} on {owner.host}",
                expected=f"this process, inside compute({key!r}, …)",
                next="give the same command again if this process was stopped for a while",
            )
        with self._explained(f"making room for the unfinished {key}"):
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def load(self, key: str) -> Path | None:
        """The folder of the finished, verified cell; None when it is absent or was damaged.

        A damaged cell is said and moved to damaged/. A file is hashed once per Store, until its time or size changes.
        """
        problems = self._examine(key)
        if problems:
            # Only under the lock, and looked at again there: a process that found the same damage may just have
            # published a sound cell, which must not be moved away.
            try:
                with self._locks.hold(key, wait=False) as attempt:
                    if attempt is None:
                        self._say(f"damaged, and somebody is at work on it: {'; '.join(map(str, problems))}")
                    elif self._sound_or_aside(key):
                        return self._folder(key)
            except StoreError as error:
                self._say(f"damaged, and cannot be moved aside: {'; '.join(map(str, problems))}\n{error}")
        if problems == []:
            self._tidy(key)
            return self._folder(key)
        return None

    def has(self, key: str) -> bool:
        """Whether the cell is finished, by its done.json alone: for a glance at many cells. `load` looks at every file."""
        return self._is_finished(self._folder(key).name)

    def running(self, key: str) -> str | None:
        """Who computes this cell now ("pid 12 on host"); None when nobody does, or nobody that is alive."""
        name = self._folder(key).name
        owner = self._locks.owner(name) if self._locks.is_held(name) else None
        return None if owner is None else f"pid {owner.pid} on {owner.host}"

    def entries(self) -> Iterator[Entry]:
        """Every finished cell, by key. Cells that cannot be read are said, not returned."""
        for folder in children(self.root / "cells"):
            try:
                done, describe = _read_done(folder), read_json(folder / CELL)
            except OSError:
                done = None
            if done is None:
                self._say(f"cells/{folder.name} cannot be read and is left out; `tombola store verify` says why")
                continue
            step = str(describe.get("step", "")) if isinstance(describe, dict) else ""
            size = sum(size for _, size in done.files.values())
            yield Entry(folder.name, step, describe, size, done.finished, folder)

    def find(self, prefix: str) -> str:
        """The one key that starts with `prefix`. Raises: StoreError listing the candidates when there is not one."""
        keys = [folder.name for folder in children(self.root / "cells")]
        matches = [key for key in keys if key.startswith(prefix)]
        if len(matches) == 1:
            return matches[0]
        shown = matches or keys
        got = ", ".join(shown[:10]) + (f" and {len(shown) - 10} more" if len(shown) > 10 else "")
        what = f"{len(matches) or 'no'} cells start with {prefix!r}"
        raise StoreError(what, got=got or "an empty store", expected="the start of exactly one key")

    def disk_usage(self) -> int:
        """Bytes of all files in the store: cells, attempts, unfinished, damaged."""
        return size_of(self.root)

    def verify(self) -> list[Problem]:
        """Each file that is not what its cell's done.json says, all hashed anew. Changes nothing."""
        problems: list[Problem] = []
        for folder in children(self.root / "cells"):
            try:
                problems += self._examine(folder.name, rehash=True) or []
            except StoreError as error:  # not a key, or not readable
                problems.append(Problem(folder.name, ".", f"{error.what}: {error.got}"))
        return problems

    def gc(self, *, dry_run: bool, drop: Callable[[Entry], bool] | None = None, unfinished: bool = False) -> GcPlan:
        """What was removed, with its bytes; on a dry run what would be, and nothing is touched.

        Attempts and locks of the dead, damaged/, and the cells `drop` says yes to, unless somebody is at work on them.
        `unfinished` removes what killed computations could go on from as well; else it is listed under `kept`.
        """
        tmp, locks, damaged, parts = (children(self.root / name) for name in ("tmp", "locks", "damaged", "unfinished"))
        with self._explained("looking for garbage"):
            found = [("leftover", path) for path in tmp if self._locks.abandoned(path, spare_living=True)]
            found += [("stale lock", path) for path in locks if self._locks.abandoned(path, spare_living=False)]
            found += [("damaged", path) for path in damaged]
            idle = [path for path in parts if not self._locks.is_held(path.name)]
        found += [("leftover" if self._is_finished(path.name) else "unfinished", path) for path in idle]
        found += [("dropped", entry.folder) for entry in self.entries() if drop is not None and drop(entry)]
        garbage = [Garbage(kind, path, size_of(path)) for kind, path in found]
        kept = () if unfinished else tuple(item for item in garbage if item.kind == "unfinished")
        garbage = [item for item in garbage if item not in kept]
        if not dry_run:
            with self._explained("removing garbage"):
                garbage = [item for item in garbage if self._remove(item)]
        return GcPlan(tuple(garbage), kept)

    def _remove(self, item: Garbage) -> bool:
        if item.kind == "stale lock":
            owner = read_owner(item.path)
            return self._locks.abandoned(item.path, spare_living=False) and self._locks.take_down(item.path, owner)
        if item.path.parent.name in ("cells", "unfinished"):
            with self._locks.hold(item.path.name, wait=False) as attempt:
                if attempt is None:
                    return False
                self._discard(item.path, attempt)
        else:
            shutil.rmtree(item.path, ignore_errors=True)
        return not item.path.exists()

    def _discard(self, folder: Path, attempt: Path) -> None:
        """Removes a folder, which need not be there, together with our attempt: a kill never leaves half of it in place."""
        with suppress(FileNotFoundError):
            folder.rename(attempt / f"gone.{folder.parent.name}")

    def _tidy(self, key: str) -> None:
        """Removes what a kill just after publishing left. A store that cannot be written is read all the same."""
        if os.path.lexists(self._unfinished(key)):
            with suppress(StoreError), self._locks.hold(key, wait=False) as attempt:
                if attempt is not None:
                    self._drop_unfinished(key, attempt)

    def _drop_unfinished(self, key: str, attempt: Path) -> None:
        """Removes what a finished cell needs no more; a successor that took the lock from us is still at work in it."""
        owner = self._locks.owner(key)
        if owner is not None and owner.attempt == attempt.name:
            with suppress(OSError):  # the result is safe, and `gc` finds the rest
                self._discard(self._unfinished(key), attempt)

    def _is_finished(self, name: str) -> bool:
        try:
            return _read_done(self.root / "cells" / name) is not None
        except OSError:  # a file where a cell should be
            return False

    def _unfinished(self, key: str) -> Path:
        return self.root / "unfinished" / self._folder(key).name

    def _check_budget(self, key: str) -> None:
        if self._budget is None or (used := self.disk_usage()) <= self._budget:
            return
        largest = sorted(self.entries(), key=lambda entry: -entry.bytes)[:5]
        listed = ", ".join(f"{entry.key[:12]} {entry.step} {entry.bytes:,}" for entry in largest) or "no cell"
        raise StoreError(
            f"the store {self.root} is over its budget, so {key} was not started",
            got=f"{used:,} bytes; the largest cells: {listed}",
            expected=f"at most {self._budget:,} bytes",
            next="free some room (`tombola store gc`; removing a cell's folder drops that cell), or raise the budget",
        )

    def _publish(self, key: str, text: str, cell: Path) -> None:
        made = scan(cell)
        wrong = sorted(name for name, file in made.items() if name in (CELL, DONE) or not stat.S_ISREG(file.mode))
        if wrong:
            expected = f"plain files, none of them named {CELL} or {DONE}"
            raise StoreError(f"the result of {key} cannot be kept", got=", ".join(wrong), expected=expected)
        (cell / CELL).write_text(text, "utf-8")
        files = {name: {"sha256": hash_file(cell / name), "bytes": file.size} for name, file in scan(cell).items()}
        done = {"finished": datetime.now(UTC).isoformat(timespec="seconds"), "files": files}
        (cell / DONE).write_text(json.dumps(done, indent=1, sort_keys=True) + "\n", "utf-8")
        for inside, _, names in os.walk(cell, topdown=False):
            for name in (*names, "."):
                sync(Path(inside, name))
        target = self._folder(key)
        target.parent.mkdir(exist_ok=True)
        while not renamed(cell, target):
            if self._sound_or_aside(key):
                self._compare(key, cell, target)
                return
        for folder in (target.parent, self.root):
            sync(folder)
        self._verified[key] = scan(target)

    def _compare(self, key: str, cell: Path, target: Path) -> None:
        ours, theirs = _read_done(cell), _read_done(target)
        assert ours is not None and theirs is not None
        differing = sorted({name for name, _ in ours.files.items() ^ theirs.files.items()} - {PROVENANCE})
        if differing:
            aside = self._aside(key, cell)
            raise StoreError(
                f"two computations of {key} gave different results",
                got=f"{', '.join(differing)} differ between {target} (published first) and {aside} (ours)",
                expected="the same bytes, since a key names one result",
                next="compare the two folders; a seed, a thread count or a device may be missing from the key",
            )

    def _examine(self, key: str, *, rehash: bool = False) -> list[Problem] | None:
        """What is wrong with a cell: nothing ([]), or each file; None when there is no such cell."""
        folder = self._folder(key)
        with self._explained(f"reading {key}"):
            if not os.path.lexists(folder):
                return None
            if folder.is_symlink() or not folder.is_dir():
                return [Problem(key, ".", "not a folder")]
            found = scan(folder)
            if not rehash and self._verified.get(key) == found:
                return []
            self._verified.pop(key, None)
            done = _read_done(folder)
            if done is None:
                return [Problem(key, DONE, "missing or unreadable")]
            # Only names found by walking the folder are ever opened, so a forged "../name" is merely missing.
            names = sorted((done.files.keys() | found.keys()) - {DONE})
            troubles = {name: _compared(folder / name, found.get(name), done.files.get(name)) for name in names}
            problems = [Problem(key, name, trouble) for name, trouble in troubles.items() if trouble]
            if not problems:
                self._verified[key] = found
            return problems

    def _sound_or_aside(self, key: str) -> bool:
        """Whether the cell is there and sound; a damaged one is moved aside. To be called under its lock."""
        problems = self._examine(key)
        if problems:
            with self._explained(f"moving the damaged {key} aside"):
                aside = self._aside(key, self._folder(key))
            self._say(f"damaged, moved to {aside}: {'; '.join(map(str, problems))}")
        return problems == []

    def _aside(self, key: str, folder: Path) -> Path:
        aside = self.root / "damaged" / f"{key}.{secrets.token_hex(4)}"
        aside.parent.mkdir(exist_ok=True)
        return folder.rename(aside)

    def _folder(self, key: str) -> Path:
        if not KEY.fullmatch(key):
            raise StoreError("not the key of a cell", got=repr(key), expected="32 characters of 0-9 and a-f")
        return self.root / "cells" / key

    @contextmanager
    def _explained(self, doing: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise self._trouble(error, doing) from error

    def _trouble(self, error: OSError, doing: str) -> StoreError:
        what, got = f"the store {self.root} failed while {doing}", str(error)
        if error.errno in FULL:
            got += f"; {shutil.disk_usage(self.root).free:,} bytes are free where the store is"
            next = "free some room (`tombola store gc` helps) and run the same command again; finished cells are kept"
            return StoreError(f"the disk is full: {what}", got=got, expected="room for the result", next=next)
        if error.errno in READ_ONLY:
            next = "change its permissions, or name another store with --store"
            return StoreError(f"no permission: {what}", got=got, expected="a folder you may read and write", next=next)
        next = "check the disk and run the same command again; finished cells are kept"
        return StoreError(what, got=got, expected="a working folder", next=next)


class _Done(NamedTuple):
    finished: datetime
    files: dict[str, tuple[str, int]]  # name -> sha256, bytes


def _read_done(folder: Path) -> _Done | None:
    try:
        raw = read_json(folder / DONE)
        files = {name: (str(file["sha256"]), int(file["bytes"])) for name, file in raw["files"].items()}
        return _Done(datetime.fromisoformat(raw["finished"]), files)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _compared(path: Path, found: Stamp | None, done: tuple[str, int] | None) -> str | None:
    if found is None:
        return "missing"
    if done is None:
        return "extra, not in done.json"
    if not stat.S_ISREG(found.mode):
        return "not a plain file"
    if found.size != done[1]:
        return f"changed: {found.size} bytes, {done[1]} when finished"
    sha256 = hash_file(path)
    return None if sha256 == done[0] else f"changed: sha256 {sha256[:12]}…, {done[0][:12]}… when finished"
