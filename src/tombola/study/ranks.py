"""One large cell on several processes at once, started by torchrun: rank 0 keeps the store, all ranks compute.

    torchrun --nproc-per-node 2 -m tombola study run FILE --set ranks=2 --executor serial

Every rank runs every step. Training goes through Trainer's DDP, so that a step sees ranks × batch_size rows; a search runs
on each rank by itself, on all selection rows, and must come to the same mask: that is compared, not believed. The number of
ranks is part of a cell's key, since it changes what training gives.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from tombola.errors import SearchError, StoreError

MASK = "ticket/mask.safetensors"


def size() -> int:
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def rank() -> int:
    """Which of them this is; 0 without torchrun."""
    return int(os.environ.get("RANK", "0")) if size() > 1 else 0


def together(compute: Callable[[Callable[[Path], None]], bool], work: Callable[[Path], None]) -> bool:
    """What `compute(work)` says on rank 0, which alone publishes; the others do the same work and throw their files away.

    Raises: SearchError on every rank when they did not come to the same mask; what `work` raises.
    """
    _join()
    if rank() != 0:
        said = _from_first(None)
        if said == "failed":
            raise StoreError("rank 0 could not begin this cell", next="its own message says why")
        if said == "work":
            with tempfile.TemporaryDirectory() as folder:
                work(Path(folder))
                _compare(Path(folder))
        return said == "work"
    begun = False

    def announced(out: Path) -> None:
        nonlocal begun
        begun = True
        _from_first("work")
        work(out)
        _compare(out)

    try:
        ran = compute(announced)
    except BaseException:
        if not begun:
            _from_first("failed")
        raise
    if not ran:
        _from_first("there")
    return ran


def wait_for_all() -> None:
    """Until every rank is here: what rank 0 published is then there for all."""
    import torch.distributed as dist

    _join()
    dist.barrier()


def _join() -> None:
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")


def _from_first(value: str | None) -> str:
    """What rank 0 has to say."""
    import torch.distributed as dist

    box = [value]
    dist.broadcast_object_list(box, src=0)
    assert box[0] is not None
    return box[0]


def _compare(out: Path) -> None:
    """Raises: SearchError when the mask of a ticket is not the same on every rank."""
    import torch.distributed as dist

    mine = hashlib.sha256((out / MASK).read_bytes()).hexdigest()[:16] if (out / MASK).is_file() else ""
    all_of_them: list[str] = [""] * size()
    dist.all_gather_object(all_of_them, mine)
    if len(set(all_of_them)) > 1:
        raise SearchError("the ranks came to different masks", got=", ".join(all_of_them), expected="one mask on all of them")
