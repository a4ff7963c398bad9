"""Files as bytes on a disk: what is there, what is in it, and that it stays there. Knows nothing of what the files mean."""

import errno
import hashlib
import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple


def hash_file(path: Path | str) -> str:
    """The sha256 of a file's bytes in 64 hex characters, read in pieces."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class Stamp(NamedTuple):
    """What tells that a file was changed without reading it."""

    mode: int
    size: int
    mtime_ns: int
    inode: int


def scan(folder: Path, prefix: str = "") -> dict[str, Stamp]:
    """What is below a folder and is no folder, by its name relative to it; links are seen, not followed."""
    found: dict[str, Stamp] = {}
    with suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                found |= scan(Path(entry.path), f"{prefix}{entry.name}/")
                continue
            with suppress(FileNotFoundError):  # gone since it was listed
                info = entry.stat(follow_symlinks=False)
                found[prefix + entry.name] = Stamp(info.st_mode, info.st_size, info.st_mtime_ns, info.st_ino)
    return found


def size_of(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(file.size for file in scan(folder).values())


def children(folder: Path) -> list[Path]:
    """What is in a folder, by name; nothing where there is no folder."""
    return sorted(folder.iterdir()) if folder.exists() else []


def sync(path: Path) -> None:
    """Returns when a file, or the names in a folder, would survive the power going out."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot sync folders
            raise
    finally:
        os.close(handle)
