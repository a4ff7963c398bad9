"""Locks of a folder that processes on several computers share: folders with an owner in them and a heartbeat beside them.

    <root>/tmp/<key>.<host>.<pid>.<random>/     one attempt to work on `key`: owner.json, heartbeat, and an empty cell/
    <root>/locks/<key>/                         owner.json: which attempt has it, alive as long as its heartbeat is

An attempt is hung up as a lock by renaming the folder it brings along, with its owner inside: no lock is ever half made. Its
heartbeat has a name of its own, so that a stalled owner never keeps its successor's lock alive. A lock only saves work: a
stalled process may lose its lock and not know it, so what must be right may not hang on one. Whoever writes where a successor
may be at work asks `Locks.owner` just before.
"""

import errno
import json
import os
import secrets
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from tombola.errors import StoreError

OWNER, HEARTBEAT = "owner.json", "heartbeat"
TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # what renaming a folder onto a folder with something in it raises


class Locks:
    """The locks below one root. `explained(doing)` is entered around what the disk may refuse, and says what that means.

    `say` is told of waiting longer than `patience` seconds and of a lock taken over: its owner was a dead process of this
    computer, or gave no heartbeat for `stale_after` seconds of the file server's clock.
    """

    def __init__(
        self,
        root: Path,
        *,
        say: Callable[[str], None],
        stale_after: float,
        patience: float,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self.root, self._say, self._stale_after, self._patience, self._explained = root, say, stale_after, patience, explained

    def owner(self, key: str) -> "Owner | None":
        """Who holds the lock of `key`; None when nobody does."""
        return read_owner(self.root / "locks" / key)

    def is_held(self, key: str) -> bool:
        """Whether somebody who is neither dead nor stalled holds the lock of `key`."""
        lock = self.root / "locks" / key
        return lock.exists() and not self.abandoned(lock, spare_living=False)

    @contextmanager
    def hold(self, key: str, *, wait: bool) -> Iterator[Path | None]:
        """Hold the lock of `key`: gives the folder of this attempt, or None when it is held and we may not wait."""
        mine = Owner.here(key)
        attempt, lock, stop = self.root / "tmp" / mine.attempt, self.root / "locks" / key, threading.Event()
        try:
            with self._explained(f"locking {key}"):
                lock.parent.mkdir(exist_ok=True)
                for folder in (attempt, attempt / "lock", attempt / "cell"):
                    folder.mkdir(parents=True)
                (attempt / HEARTBEAT).touch()
                for folder in (attempt, attempt / "lock"):
                    (folder / OWNER).write_text(json.dumps(mine._asdict()), "utf-8")
                beating = (stop, self._stale_after / 5, attempt / HEARTBEAT)
                threading.Thread(target=_beat, args=beating, daemon=True).start()
                held = self._acquire(lock, mine, wait)
            yield attempt if held else None
        finally:
            stop.set()
            if read_owner(lock) == mine:  # else it was taken over
                with suppress(OSError):
                    lock.rename(attempt / "lock")
            shutil.rmtree(attempt, ignore_errors=True)

    def _acquire(self, lock: Path, mine: "Owner", wait: bool) -> bool:
        begin, said = time.monotonic(), False
        while not renamed(self.root / "tmp" / mine.attempt / "lock", lock):
            owner = read_owner(lock)
            if self.abandoned(lock, spare_living=False):
                if self.take_down(lock, owner) and owner is not None:
                    self._say(f"took over {lock.name} from pid {owner.pid} on {owner.host}, which is dead or stalled")
                continue
            if owner is not None and owner[:-1] == mine[:-1]:  # all but the attempt: this very thread
                raise StoreError(f"the cell {lock.name} needs itself", next="look for a cycle in what the cells need")
            if not wait:
                return False
            waited = time.monotonic() - begin
            if owner is not None and waited > self._patience and not said:
                self._say(f"waiting for pid {owner.pid} on {owner.host}, which is computing {lock.name}")
                said = True
            time.sleep(min(1.0, 0.02 + waited / 10))
        return True

    def take_down(self, lock: Path, judged: "Owner | None") -> bool:
        """Whether the lock was removed; it stays when it is no longer that of the owner `judged`."""
        grave = self.root / "tmp" / f"{lock.name}.{secrets.token_hex(4)}"
        grave.parent.mkdir(exist_ok=True)
        try:
            lock.rename(grave)
        except FileNotFoundError:
            return False
        same = read_owner(grave) == judged
        if not same:  # another waiter was faster and this is its fresh lock: back with it
            with suppress(OSError):
                grave.rename(lock)
        shutil.rmtree(grave, ignore_errors=True)
        return same

    def abandoned(self, folder: Path, *, spare_living: bool) -> bool:
        """Whether the owner of a lock or an attempt is dead or gave no heartbeat for too long.

        A stalled owner may lose its lock, which costs a computation; `spare_living` keeps what it has written as long
        as its process is seen to live.
        """
        owner = read_owner(folder)
        lives = None if owner is None else owner.lives()
        if lives is False or (lives and spare_living):
            return not lives
        try:
            # Opened because, unlike a bare stat, that makes a network file system ask its server.
            handle = os.open(folder if owner is None else self.root / "tmp" / owner.attempt / HEARTBEAT, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            beat = os.fstat(handle).st_mtime
        finally:
            os.close(handle)
        with tempfile.TemporaryFile(dir=self.root) as probe:  # what time it is there; nameless where the system can
            os.utime(probe.fileno())
            return os.fstat(probe.fileno()).st_mtime - beat >= self._stale_after


class Owner(NamedTuple):
    host: str
    namespace: str  # of process ids: containers of one name on one computer do not see each other
    pid: int
    started: str  # tells a process from a later one with its pid; "" where the system does not say
    thread: int
    attempt: str

    @classmethod
    def here(cls, key: str) -> "Owner":
        host, pid = socket.gethostname(), os.getpid()
        attempt = f"{key}.{host}.{pid}.{secrets.token_hex(4)}"
        return cls(host, _namespace(), pid, _process_start(pid) or "", threading.get_ident(), attempt)

    def lives(self) -> bool | None:
        """Whether the process still runs; None when this computer cannot know."""
        if (self.host, self.namespace) != (socket.gethostname(), _namespace()):
            return None
        started = _process_start(self.pid)
        if started is None:
            return False
        return started == self.started if started and self.started else None


def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _process_start(pid: int) -> str | None:
    """When a living process started, in the kernel's ticks; "" when that cannot be read; None for a dead one."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass  # it lives, as somebody else's
    try:
        # The second field, the program's name in brackets, may itself hold spaces and brackets.
        state, *fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except (OSError, ValueError):
        return ""
    return None if state in "ZX" else fields[18]


def _beat(stop: threading.Event, every: float, heart: Path) -> None:
    while not stop.wait(every):
        with suppress(OSError):
            os.utime(heart)


def read_owner(folder: Path) -> Owner | None:
    try:
        return Owner(**read_json(folder / OWNER))
    except (OSError, TypeError):
        return None


def renamed(folder: Path, target: Path) -> bool:
    """Whether a folder could take the name `target`; False when a folder with something in it has that name."""
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno not in TAKEN:
            raise
        return False
    return True


def read_json(path: Path) -> Any:
    """What a JSON file says; None when it is missing or is not JSON."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
