"""What a cell took: seconds, device-hours, FLOPs by formula, energy. Kept in its provenance.json, which is no part of its hash.

FLOPs of one pass forward over T tokens are 2·P·T, where P is the number of weights in the matrices of all layers (q, k, v,
o, MLP; no embeddings, no head, no products within attention, which at 128 tokens add a few percent). A step of training
counts three passes (forward, gradients of activations, gradients of weights), a pass that scores gates two.

Energy is `measured` where codecarbon (an extra, offline, asked for with --energy) reads the counters of the hardware, and
`estimated` everywhere else: by codecarbon's model of the processor, or without it by `WATTS` × device-hours.
"""

import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tombola.errors import TombolaError
from tombola.store import PROVENANCE
from tombola.study.cells import Cell, Lab, read_json
from tombola.study.kinds import TRAIN_MODES

if TYPE_CHECKING:
    from tombola.store import Store

# What a busy core (with its share of memory and board) and a busy accelerator take, about, whatever their make. To be
# read as an order of magnitude: nothing about the machine at hand goes into it.
WATTS: Mapping[str, float] = {"cpu": 10.0, "cuda": 300.0}

# Counters of the hardware, as codecarbon names its ways to know what a processor takes; the others are models of it.
COUNTERS = ("intel_rapl", "intel_power_gadget", "rapl", "powermetrics")

# Passes over the selection rows that one trial of a search takes, forward being one.
PASSES_PER_TRIAL: Mapping[str, int] = {"s-prune": 2, "m-prune": 1, "one-shot": 2}


@contextmanager
def metered(cell: Cell, lab: Lab, out: Path) -> Iterator[dict[str, Any]]:
    """What the work inside takes, filled in when it is done: seconds, cpu_seconds, device, device_hours, flops, energy."""
    cost: dict[str, Any] = {}
    device = device_of(cell)
    started, cpu = time.perf_counter(), _cpu_seconds()
    with _codecarbon(lab.energy) as read:
        yield cost
    seconds, cpu = time.perf_counter() - started, (_cpu_seconds() - cpu) * ranks_of(cell)  # of one rank, about, times all
    hours = seconds / 3600 * ranks_of(cell)
    watt_hours = WATTS["cpu"] * cpu / 3600 + (WATTS["cuda"] * hours if device == "cuda" else 0.0)
    estimated = {"kwh": watt_hours / 1000, "how": "estimated", "by": "watts × device-hours"}
    cost |= {
        "seconds": round(seconds, 3),
        "cpu_seconds": round(cpu, 3),
        "device": device,
        "device_hours": hours,
        "flops": flops(cell, lab, out),
        "energy": read or estimated,
    }


def device_of(cell: Cell) -> str:
    """The kind of device a cell is computed on; that of the cells it stands on where it does not say itself."""
    return str(_machine_of(cell).get("device", "cpu"))


def threads_of(cell: Cell) -> int | None:
    """The thread count a cell is computed with, on which its bits depend; None when neither it nor its inputs say."""
    threads: int | None = _machine_of(cell).get("threads")
    return threads


def ranks_of(cell: Cell) -> int:
    """How many processes compute a cell together."""
    return int(_machine_of(cell).get("ranks", 1))


def _machine_of(cell: Cell) -> Mapping[str, Any]:
    """What a cell says of its machine, or the last of those it stands on that do: the one it was made for."""
    said: Mapping[str, Any] = {}
    for one in cell.needed():
        said = one.settings.get("machine", said)
    return said


def flops(cell: Cell, lab: Lab, out: Path) -> float:
    """FLOPs of a cell that was just computed into `out`, by the formula above; 0 for one that runs no model."""
    base = cell.run
    if base is None or cell.step in ("control", "derive", "bag_of_words", "base_mask", "bias"):
        return 0.0
    forward = 2.0 * _matrix_weights(lab, base)
    if cell.step in ("round", "snapshot"):
        file = out / "train.json"  # none where nothing was trained
        scored = _tokens(lab, base, "selection", "report", "challenge") if (out / "scores.jsonl").is_file() else 0.0
        return forward * (3.0 * float(read_json(file)["padded_tokens"]) + scored) if file.is_file() else 0.0
    if cell.step in ("joint_round", "joint_snapshot"):
        from tombola.study.steps.joint import alone

        tasks = alone(cell) if cell.step == "joint_round" else []
        scored = sum(_tokens(lab, one, "selection", "report", "challenge") for one in tasks)
        return forward * (3.0 * float(read_json(out / "train.json")["padded_tokens"]) + scored)
    if cell.step in ("fine_tune", "retrain", "train_mode"):
        frozen = cell.step == "train_mode" and TRAIN_MODES[cell.settings["mode"]].frozen  # nothing goes back through the body
        trained = (1.0 if frozen else 3.0) * float(read_json(out / "train.json")["padded_tokens"])
        return forward * (trained + _tokens(lab, base, "selection", "report", "challenge"))
    if cell.step == "search" and cell.settings["method"] == "learned":
        trained = float(read_json(out / "result.json")["train"]["padded_tokens"])
        return forward * (
            3.0 * trained + 2.0 * _tokens(lab, base, "selection")
        )  # scores want what weights want: all three passes
    if cell.step == "search":
        path = read_json(out / "ticket" / "ticket.json")["details"]["path"]
        return forward * PASSES_PER_TRIAL.get(cell.settings["method"], 2) * max(len(path), 1) * _tokens(lab, base, "selection")
    if cell.step == "evaluate":
        return forward * _tokens(lab, base, "selection", "report", "challenge")
    # A step this file does not know: its own estimate in row passes, at the mean length of the rows it may have read.
    from tombola.study.steps import STEPS

    counts = base.settings["data"]["counts"]
    rows = sum(counts.get(role, 0) for role in ("selection", "report", "challenge"))
    mean = _tokens(lab, base, "selection", "report", "challenge") / max(rows, 1)
    return float(forward * STEPS[cell.step].work(cell) * mean)


def _matrix_weights(lab: Lab, base: Cell) -> int:
    """P of the formula, read once a run from the base itself."""
    known = ("matrix weights", base.settings["model"]["fingerprint"])
    if known not in lab.cache:
        from tombola.anatomy import read_anatomy
        from tombola.objective import load_weights
        from tombola.study.data import base_folder, layout_of

        model = load_weights(base_folder(lab, base.settings["model"]), ("0", "1"), head_seed=0)
        anatomy = read_anatomy(model, layout_of(base.settings["model"]))
        parts = [p for a in anatomy.attentions for p in (a.q, a.k, a.v, a.o)]
        parts += [p for mlp in anatomy.mlps for p in (*mlp.ins, mlp.out)]
        lab.cache[known] = sum(p.n_in * p.n_out for p in parts)
    return int(lab.cache[known])


def _tokens(lab: Lab, base: Cell, *roles: str) -> float:
    """Tokens of the rows that play these roles, as they are computed (padded only where all rows are padded to one length)."""
    from tombola.study.data import encoded_rows, task_data

    data = task_data(lab, base.settings["data"]["task"], base.settings["data"])
    sets = {role: rows for role, (_, rows) in data.evaluated().items() if role in roles}
    return float(sum(sum(encoded_rows(lab, base, role, rows).computed_lengths) for role, rows in sets.items()))


def _cpu_seconds() -> float:
    used = os.times()
    return used.user + used.system


@contextmanager
def _codecarbon(asked: bool) -> Iterator[dict[str, Any]]:
    """What codecarbon says the work inside took: {"kwh", "how", "by"}; stays empty when it was not asked."""
    read: dict[str, Any] = {}
    if not asked:
        yield read
        return
    import logging

    require_energy()
    from codecarbon import OfflineEmissionsTracker

    logging.getLogger("codecarbon").setLevel(logging.CRITICAL)
    # The country turns energy into CO2 only, which is not asked for here; without one it would look up where we are.
    tracker = OfflineEmissionsTracker(
        country_iso_code="DEU", save_to_file=False, log_level="critical", tracking_mode="process", measure_power_secs=5,
        allow_multiple_runs=True,
    )  # fmt: skip
    tracker.start()
    try:
        yield read
    finally:
        tracker.stop()
    said = tracker.final_emissions_data
    modes = [str(getattr(one, "_mode", "")) for one in tracker._hardware if type(one).__name__ in ("CPU", "AppleSiliconChip")]
    counted = bool(modes) and all(mode in COUNTERS for mode in modes)
    read |= {
        "kwh": float(said.energy_consumed),
        "how": "measured" if counted else "estimated",
        "by": f"codecarbon {said.codecarbon_version} ({', '.join(modes) or 'no processor it knows'})",
    }


def require_energy() -> None:
    """Raises: TombolaError when codecarbon is not installed."""
    from importlib.util import find_spec

    if find_spec("codecarbon") is None:
        raise TombolaError(
            "energy cannot be read here", got="no codecarbon", expected="the extra `energy`", next="pip install 'tombola[energy]'"
        )


@dataclass(frozen=True, slots=True)
class Total:
    """The cost of several cells together."""

    cells: int  # that say what they took
    device_hours: Mapping[str, float]  # by kind of device
    cpu_hours: float
    flops: float
    kwh: Mapping[str, float]  # by how it is known: measured, estimated

    def lines(self) -> list[str]:
        """The same in words, a line each."""
        hours = ", ".join(f"{hours:.3g} {device}" for device, hours in self.device_hours.items()) or "0"
        energy = ", ".join(f"{kwh:.3g} kWh {how}" for how, kwh in self.kwh.items()) or "not known"
        return [
            f"{self.cells} cells took {hours} device-hours ({self.cpu_hours:.3g} CPU-hours), {self.flops:.3g} FLOPs by formula",
            f"energy: {energy}",
        ]


def total_cost(store: "Store", keys: Iterable[str]) -> Total:
    """The cost of those of these cells that are finished; cells older than this account of cost are left out."""
    hours: dict[str, float] = {}
    kwh: dict[str, float] = {}
    cells, cpu, done = 0, 0.0, 0.0
    for key in keys:
        file = store.root / "cells" / key / PROVENANCE
        said = read_json(file).get("cost") if file.is_file() else None
        if said is None:
            continue
        cells, cpu, done = cells + 1, cpu + said["cpu_seconds"] / 3600, done + said["flops"]
        hours[said["device"]] = hours.get(said["device"], 0.0) + said["device_hours"]
        kwh[said["energy"]["how"]] = kwh.get(said["energy"]["how"], 0.0) + said["energy"]["kwh"]
    return Total(cells, hours, cpu, done, kwh)
