"""Checkpoints of a training run that may be killed at any moment: Trainer writes them, a marker of ours vouches for them.

    <folder>/checkpoint-<step>/     weights, optimizer, schedule, random state and log, as Trainer writes them
                      tombola.json  the marker: the step, sha256 and size of every file, and which run this is

A checkpoint counts when it has its marker, which is written last, after everything it vouches for is on the disk; so a
kill inside a save leaves the checkpoint before. Older ones go only when a newer one is marked: there are one or two, never
none and never a pile. What a marker vouches for is checked before anything is read, since Trainer would go on without an
optimizer or a random state and say nothing.
"""

import json
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.disk import hash_file, sync
from tombola.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import TrainerCallback

FORMAT = 1
MARKER = "tombola.json"
NAME = re.compile(r"checkpoint-(\d+)")
FOREIGN = ("config.json", "training_args.bin")  # Trainer writes them for others; in ours there are none


def last_checkpoint(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """The last complete checkpoint of `run` below `folder`, every file checked; None when there is none to go on from.

    `run` is JSON, whatever the result depends on. All other checkpoints are removed: older ones, and those that a kill
    left without a marker. Raises: CheckpointError, with nothing removed, when the last one is of another run (naming each
    difference), of a newer tombola or damaged (naming each file), or when the folder holds checkpoints of somebody else.
    """
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := NAME.fullmatch(path.name))}
    marked = [step for step, path in found.items() if (path / MARKER).exists()]
    foreign = [path for step, path in found.items() if step not in marked and any((path / name).exists() for name in FOREIGN)]
    if foreign:
        raise CheckpointError(
            f"{folder} holds checkpoints that are not of tombola",
            got=", ".join(sorted(path.name for path in foreign)),
            expected="an empty folder, or one with the checkpoints of this run",
            next="name another folder",
        )
    last = found.pop(max(marked)) if marked else None
    if last is not None:
        _check(last, run)
    for path in found.values():
        _discard(path)
    return last


def seal(checkpoint: Path, run: Mapping[str, Any], ours: Callable[[], object] = lambda: None) -> None:
    """Makes a fully written checkpoint count, and then removes the others of its folder.

    `ours` raises when the folder belongs to somebody else by now; it is asked last, when all is hashed and on the disk. A
    process that is stopped between that and the next line can still put its marker into a successor's folder: that may cost
    what the successor had saved, never a result, since what is gone on from is checked file by file.
    Raises: OSError of the disk, and what `ours` raises.
    """
    files = {}
    for path in sorted(checkpoint.iterdir()):
        sync(path)
        files[path.name] = {"sha256": hash_file(path), "bytes": path.stat().st_size}
    step = int(checkpoint.name.partition("-")[2])
    draft = checkpoint / f"{MARKER}.draft"
    draft.write_text(json.dumps({"format": FORMAT, "step": step, "files": files, "run": run}, indent=1), "utf-8")
    sync(draft)
    ours()
    draft.rename(checkpoint / MARKER)  # never half a marker
    for folder in (checkpoint, checkpoint.parent):
        sync(folder)
    for other in checkpoint.parent.glob("checkpoint-*"):
        if other != checkpoint and NAME.fullmatch(other.name):
            _discard(other)


def keep_checkpoints(
    folder: Path, run: Mapping[str, Any], every_seconds: float, resumed: Path | None, ours: Callable[[], object] = lambda: None
) -> "TrainerCallback":
    """A callback that has Trainer save into `folder` right after a log, when `every_seconds` have passed since the last save.

    Only there: Trainer forgets the losses since its last log when it is resumed, and right after a log there are none.
    `ours` raises when the folder is no longer ours to write into: asked before Trainer writes anything, and before it is sealed.
    """
    from transformers import TrainerCallback

    class Keep(TrainerCallback):  # type: ignore[misc]
        def __init__(self) -> None:
            self.saved = time.monotonic()
            self.unread = resumed

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # The first step after a resume: all is read by now. Whoever removes a checkpoint takes its marker first, so a
            # marker that is still there says that nothing was missing, and silently left out, while it was read.
            if self.unread is not None and not (self.unread / MARKER).exists():
                raise CheckpointError(
                    f"{self.unread} was removed while it was being read",
                    expected="a folder in which nobody else is at work",
                    next="see whether the same run is at work elsewhere; if not, give the command again",
                )
            self.unread = None

        def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Not after the last step: by the one that is then left, a resumed model is as any training leaves it
            # (transformers notes the kind of problem in the config in the first forward pass, and config.json is stored).
            due = time.monotonic() - self.saved >= every_seconds
            control.should_save = due and state.global_step < state.max_steps
            if control.should_save:
                ours()

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seal(folder / f"checkpoint-{state.global_step}", run, ours)
            self.saved = time.monotonic()

    return Keep()


def _check(checkpoint: Path, run: Mapping[str, Any]) -> None:
    anew = f"remove {checkpoint.parent} to start anew"
    try:
        marker = json.loads((checkpoint / MARKER).read_text("utf-8"))
        version, files, was = marker["format"], marker["files"], _flat(marker["run"])
        known = {str(name): (str(file["sha256"]), int(file["bytes"])) for name, file in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        what, got = f"{checkpoint / MARKER} cannot be read", f"{type(error).__name__}: {error}"
        raise CheckpointError(what, got=got, expected="what tombola wrote there", next=anew) from error
    if version != FORMAT:
        raise CheckpointError(
            f"{checkpoint} cannot be read by this tombola",
            got=f"{MARKER} with format {version}",
            expected=f"format {FORMAT}",
            next=f"update tombola, or {anew}",
        )
    now = _flat(json.loads(json.dumps(run)))
    differing = [f"{x}: {was.get(x)} → {now.get(x)}" for x in sorted(was.keys() | now.keys()) if was.get(x) != now.get(x)]
    if differing:
        raise CheckpointError(
            f"the checkpoints in {checkpoint.parent} are of another run",
            got="; ".join(differing),
            expected="the run they were made by, so that it ends as if it had never been interrupted",
            next=f"set these back as they were, or {anew}",
        )
    troubles = [f"{name}: {trouble}" for name, done in sorted(known.items()) if (trouble := _trouble(checkpoint / name, *done))]
    if troubles:
        got, expected = "; ".join(troubles), f"the {len(known)} files as they were written"
        raise CheckpointError(f"the checkpoint {checkpoint} is damaged", got=got, expected=expected, next=anew)


def _trouble(path: Path, sha256: str, size: int) -> str | None:
    if not path.is_file():
        return "missing"
    if path.stat().st_size != size:
        return f"changed: {path.stat().st_size} bytes, {size} when written"
    found = hash_file(path)
    return None if found == sha256 else f"changed: sha256 {found[:12]}…, {sha256[:12]}… when written"


def _flat(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"seeds": {"data": 1}} as {"seeds.data": 1}."""
    flat: dict[str, Any] = {}
    for name, item in value.items():
        flat |= _flat(item, f"{prefix}{name}.") if isinstance(item, Mapping) else {prefix + name: item}
    return flat


def _discard(checkpoint: Path) -> None:
    (checkpoint / MARKER).unlink(missing_ok=True)  # first, so that what is half removed does not count
    shutil.rmtree(checkpoint, ignore_errors=True)
