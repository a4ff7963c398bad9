"""A chain of nested masks of the demo model: what it weighs on disk, and the memory that training under a mask adds.

bits/value      of all nine rounds of a chain, each ticket folder as a store keeps it, over the maskable values
nested          of one ticket that carries all nine levels
memory          of training under a mask: bytes a maskable value above the peak of the same steps without one, each in a process
                of its own (the kernel's high-water mark)
without holes   the same where a freed tensor's pages go back at once (MALLOC_MMAP_THRESHOLD_): what the mask itself takes. The
                rest is the allocator's: a gradient and its masked copy live together for a moment, and leave holes in its heap

The masks are made by `cut` from pre-trained weights that are moved by a tenth of their spread before every level: what they
weigh depends on how many values go, and hardly on which. Asserted: the tickets are read back as they were written.
"""

import json
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch

from measure import Figure, Setup, fresh
from tombola.levels import Levels
from tombola.mask import Mask
from tombola.scope import scope_parameters
from tombola.search.imp import ImpSettings, cut, sparsities
from tombola.ticket import Ticket, Weights

_TRAIN = """
import ctypes, gc, json, sys, torch
sys.path.insert(0, sys.argv[2])
from training import random_values
from ways import adamw, training_step
from tombola.anatomy import read_anatomy
from tombola.held import HeldValues
from tombola.objective import load_weights
from tombola.source import resolve_model

def memory(name):
    lines = (line.split() for line in open("/proc/self/status"))
    return next(int(words[1]) * 1024 for words in lines if words and words[0] == name + ":")

torch.manual_seed(0)
model = load_weights(resolve_model("demo").folder, ("0", "1"), head_seed=0)
optimizer, values = adamw(model), random_values(read_anatomy(model), seed=0)
n = sum(part.numel() for part in values.values())
if sys.argv[1] == "dense":
    values = {}
holding = HeldValues(model, values, copy=False)
batch = {"input_ids": torch.randint(5, 999, (4, 16)), "labels": torch.zeros(4, dtype=torch.int64)}
batch["attention_mask"] = torch.ones_like(batch["input_ids"])
gc.collect()
for step in range(4):
    if step == 2:  # moments are there, and what the first steps left is free again
        ctypes.CDLL(None).malloc_trim(0)  # what setting up left behind is no part of a step
        open("/proc/self/clear_refs", "w").write("5")
    training_step(model, optimizer, batch)
    holding.enforce()
print(json.dumps({"peak": memory("VmHWM"), "values": n}))
"""


def chain(setup: Setup, task: str) -> list[Figure]:
    """Bits a maskable value of a chain of nine levels on disk, and bytes a value of memory while it trains."""
    setup, options = fresh(setup), ImpSettings()
    names = list(scope_parameters(setup.model, setup.anatomy, options.scope))
    kept = {name: torch.ones(setup.model.get_parameter(name).shape, dtype=torch.bool) for name in names}
    n, at, masks = sum(part.numel() for part in kept.values()), (0.0, *sparsities(options)), list[Mask]()
    rng = torch.Generator().manual_seed(0)
    for since, to in pairwise(at):
        with torch.no_grad():
            for name in names:
                p = setup.model.get_parameter(name)
                p.add_(0.1 * p.std() * torch.randn(p.shape, generator=rng))
        kept = cut(setup.model, kept, options, since=since, to=to)
        masks.append(Mask(values=kept))
    base = Weights("demo", "0" * 32)

    def ticket(mask: Mask, **more: object) -> Ticket:
        summary = setup.anatomy.summary()
        return Ticket(mask, base, base, summary, "good", options.scope, setup.anatomy.size(mask).sparsity, **more)  # type: ignore[arg-type]

    with tempfile.TemporaryDirectory() as folder:
        root, before = Path(folder), None
        for k, mask in enumerate(masks):
            one = ticket(mask)
            one.save_pretrained(root / str(k) / "ticket", within=before)
            before = (one, f"../../{k}/ticket")
        assert Ticket.from_pretrained(root / str(len(masks) - 1) / "ticket").mask == masks[-1]
        stored = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
        whole = ticket(masks[-1], levels=Levels.of(masks), level=len(masks)).save_pretrained(root / "nested")
        nested = sum(file.stat().st_size for file in whole.iterdir())
        assert Ticket.from_pretrained(whole).at_level(5).mask == masks[4]
    note = f"{len(masks)} levels to {at[-1]:.0%} of {n:,} values: {stored:,} bytes in a store, {nested:,} as one ticket"
    added = {
        "memory": _added(setup.rounds, {}),
        "without holes": _added(setup.rounds, {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}),
    }
    return [
        Figure("chain", task, "bits/value", [8 * stored / n], note),
        Figure("chain", task, "nested", [8 * nested / n], note),
        *(Figure("chain", task, way, of, "bytes a maskable value above dense training") for way, of in added.items()),
    ]


def _added(rounds: int, allocator: dict[str, str]) -> list[float]:
    """Bytes a maskable value that training under a mask takes more at its peak, under settings of the C allocator."""
    peaks = {way: [_peak(way, allocator) for _ in range(rounds)] for way in ("dense", "held")}
    dense = median(one["peak"] for one in peaks["dense"])
    return [(held["peak"] - dense) / held["values"] for held in peaks["held"]]


def _peak(way: str, allocator: dict[str, str]) -> dict[str, int]:
    here = str(Path(__file__).parent)
    ran = subprocess.run(
        [sys.executable, "-c", _TRAIN, way, here], check=True, capture_output=True, text=True, env=os.environ | allocator
    )
    found: dict[str, int] = json.loads(ran.stdout.splitlines()[-1])
    return found
