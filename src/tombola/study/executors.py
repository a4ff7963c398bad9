"""Where cells run: in this process, in worker processes, as Slurm jobs, on Ray. One class and one row of `EXECUTORS` each.

An executor takes orders for cells whose inputs are all in the store, and says which have ended. It knows nothing of what
stands on what (`tombola.study.engine.run_cells` does), and all of them call `run_one`. A scheduler that is not here can run
the command `tombola study run-one KEY --store S` for each key.

Nothing here imports torch: a worker process sets its threads before it does.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from tombola.errors import SettingsError, StoreError, TombolaError
from tombola.study.cells import Lab
from tombola.study.engine import Ended, Order, Relay, Watch, lab_of, note_failure, read_plan, run_one, title_of

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import SpawnProcess

POLL = 0.5  # seconds that `ended` may wait for somebody to end
LOOK = 10.0  # seconds between two looks into Slurm's queue
GRACE = 10.0  # seconds that a worker has to put its things away when it is told to stop


@runtime_checkable
class Executor(Protocol):
    """Runs cells somewhere."""

    def room(self) -> int:
        """How many more cells it would start now."""

    def start(self, orders: Sequence[Order]) -> None:
        """Begins these cells, at most `room()` of them; all their inputs are in the store."""

    def ended(self, watch: Watch) -> list[Ended]:
        """Those that ended since the last call; waits a moment for one. A process that died has ended with an error."""

    def close(self) -> None:
        """Stops what still runs, in a way that leaves nothing half-written. Called once, also after an interrupt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What executors are made with."""

    workers: int | None = None  # cells at a time; None: what the executor finds good
    threads: int = 1  # of each cell: those it was planned with
    device: str = "cpu"
    parameters: Mapping[str, Any] = field(default_factory=dict)  # Slurm's, by their names in submitit
    call: Callable[..., Ended] = run_one  # (order, lab=…) → how it ended; another one for tests of what becomes of a worker
    folder: Path = Path("tombola-store/jobs")  # of submitit's job files
    address: str | None = None  # of a Ray cluster; None: Ray on this computer


# -------------------------------------------------------------------------------------------------------------- serial


class Serial:
    """One cell after the other, in this process."""

    def __init__(self, options: Options | None = None, lab: Lab | None = None) -> None:
        self.lab, self.queue = lab, list[Order]()
        self.call = run_one if options is None else options.call

    def room(self) -> int:
        return 1 - len(self.queue)

    def start(self, orders: Sequence[Order]) -> None:
        self.queue += orders

    def ended(self, watch: Watch) -> list[Ended]:
        order = self.queue.pop()
        lab = self.lab or lab_of(order.store, order.data, order.budget)
        before, relay = lab.reporter, Relay(watch)
        relay.key, lab.reporter = order.key, relay
        try:
            return [self.call(order, lab=lab)]
        finally:
            lab.reporter = before

    def close(self) -> None:
        self.queue.clear()


# --------------------------------------------------------------------------------------------------------------- local


@dataclass(eq=False)
class _Worker:
    process: "SpawnProcess"
    pipe: "Connection[Any, Any]"
    order: Order | None = None


class Local:
    """Worker processes on this computer, each with the threads that cells were planned with; on GPUs one for each."""

    def __init__(self, options: Options) -> None:
        self.options, self.pool = options, list[_Worker]()
        self.gpus = _gpus() if options.device == "cuda" else 0
        self.workers = options.workers or self.gpus or max(1, _cores() // options.threads)

    def room(self) -> int:
        return self.workers - sum(1 for worker in self.pool if worker.order is not None)

    def start(self, orders: Sequence[Order]) -> None:
        for worker in [one for one in self.pool if one.order is None and not one.process.is_alive()]:
            worker.pipe.close()  # somebody killed it while it had nothing to do: no cell is lost
            self.pool.remove(worker)
        for order in orders:
            worker = next((one for one in self.pool if one.order is None), None) or self._hire()
            worker.order = order
            with suppress(OSError):  # it died while it was idle: `ended` finds that its pipe is closed
                worker.pipe.send(order)

    def ended(self, watch: Watch) -> list[Ended]:
        from multiprocessing.connection import wait

        busy, found = {worker.pipe: worker for worker in self.pool if worker.order is not None}, []
        for pipe in wait(list(busy), timeout=POLL):
            worker = busy[pipe]  # type: ignore[index]
            assert worker.order is not None
            try:
                kind, value = worker.pipe.recv()
            except (EOFError, OSError):
                found.append(self._buried(worker))
                continue
            if kind == "ended":
                worker.order = None
                found.append(value)
            elif kind == "share":
                watch.share(worker.order.key, value)
            else:
                watch.say(value)
        return found

    def close(self) -> None:
        for worker in self.pool:
            if worker.order is None:
                worker.pipe.close()  # it leaves by itself
            else:
                worker.process.terminate()
        deadline = time.monotonic() + GRACE
        for worker in self.pool:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
        self.pool.clear()

    def _hire(self) -> _Worker:
        from multiprocessing import get_context

        context = get_context("spawn")
        ours, theirs = context.Pipe()
        threads = str(self.options.threads)
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        if self.gpus:
            taken = {worker.process.name for worker in self.pool}
            slot = next(number for number in range(len(taken) + 1) if f"tombola-{number}" not in taken)
            environment["CUDA_VISIBLE_DEVICES"] = _visible(slot % self.gpus)
            name = f"tombola-{slot}"
        else:
            name = None
        process = context.Process(target=_work, args=(theirs, self.options.call), name=name, daemon=True)
        with _environment(environment):  # spawned processes have it from their start, before any library is loaded
            process.start()
        theirs.close()  # else the end of the process would not close the pipe
        worker = _Worker(process, ours)
        self.pool.append(worker)
        return worker

    def _buried(self, worker: _Worker) -> Ended:
        """The end of a worker that died: its cell failed, and the pool goes on without it."""
        assert worker.order is not None
        worker.process.join(GRACE)
        self.pool.remove(worker)
        worker.pipe.close()
        return lost(worker.order, f"its worker process {worker.process.pid} {_how(worker.process.exitcode)}")


def lost(order: Order, how: str) -> Ended:
    """The end of a cell whose process is gone, noted in the store: it could not do so itself."""
    reason = f"{how}; what it had computed until its last checkpoint is kept, and the next run goes on from there"
    lab = lab_of(order.store, order.data, order.budget)
    if not lab.store.has(order.key):
        title = order.key
        with suppress(StoreError):
            title = title_of(read_plan(lab, order.key))
        note_failure(lab.store, order.key, title, reason)
        return Ended(order.key, reason)
    return Ended(order.key)  # it died after it had published


def _how(exitcode: int | None) -> str:
    if exitcode is None or exitcode >= 0:
        return f"ended with exit code {exitcode}"
    name = signal.Signals(-exitcode).name
    return f"was killed by {name}" + (" (did the computer run out of memory?)" if name == "SIGKILL" else "")


def _work(pipe: "Connection[Any, Any]", call: Callable[..., Ended]) -> None:
    """A worker process: orders in, ends out, until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # leave through every `finally`: locks and attempts go
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    with suppress(EOFError, BrokenPipeError, ConnectionResetError):
        relay = Relay(_ToParent(pipe))
        _quiet()
        while True:
            order: Order = pipe.recv()
            lab = lab_of(order.store, order.data, order.budget)
            relay.key, lab.reporter = order.key, relay
            pipe.send(("ended", call(order, lab=lab)))


def _leave_with_parent() -> None:
    """Stops this worker when the process that hired it is gone, however that ended: nobody waits for its result."""
    from multiprocessing import parent_process
    from multiprocessing.connection import wait

    parent = parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os.kill(os.getpid(), signal.SIGTERM)


class _ToParent(Watch):
    def __init__(self, pipe: "Connection[Any, Any]") -> None:
        self.pipe = pipe

    def share(self, key: str, done: float) -> None:
        self.pipe.send(("share", done))

    def say(self, message: str) -> None:
        self.pipe.send(("say", message))


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _visible(number: int) -> str:
    known = [one for one in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if one]
    return known[number] if number < len(known) else str(number)


# --------------------------------------------------------------------------------------------------------------- Slurm


class RunOne:
    """`run_one` as submitit wants it: on a time-out the same order goes back to the queue, and its checkpoints make it go on."""

    def __call__(self, order: Order) -> Ended:
        _quiet()
        return run_one(order)

    def checkpoint(self, order: Order) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, order)


class Submitted:
    """Jobs of submitit: what becomes ready together is one Slurm array."""

    def __init__(self, options: Options, cluster: str = "slurm") -> None:
        submitit = _extra("submitit", "slurm")
        given = dict(options.parameters)
        requeues = int(given.pop("requeues", 3))
        known: dict[str, Any] = {"cpus_per_task": options.threads} | ({"gpus_per_node": 1} if options.device == "cuda" else {})
        known["slurm_signal_delay_s"] = 60  # before the end of a job it is told to go back to the queue
        if options.workers:
            known["slurm_array_parallelism"] = options.workers
        try:
            own = {f"{cluster}_max_num_timeout": requeues}
            self.executor = submitit.AutoExecutor(folder=str(options.folder / "%j"), cluster=cluster, **own)
            self.executor.update_parameters(name="tombola", **(known | given))
        except (NameError, TypeError, ValueError, RuntimeError, AssertionError) as error:
            raise SettingsError(
                [
                    TombolaError(
                        f"the {cluster} executor cannot be set up",
                        got=f"{type(error).__name__}: {error}",
                        expected="sbatch on this computer, and parameters by the names submitit gives them "
                        "(timeout_min, mem_gb, slurm_partition, …)",
                        next="docs/slurm.md sets up a one-node Slurm; --executor local needs none",
                    )
                ]
            ) from error
        self.jobs: dict[str, tuple[Order, Any]] = {}
        self.cluster, self.looked, self.absent = cluster, time.monotonic(), set[str]()

    def room(self) -> int:
        return sys.maxsize  # the queue is the scheduler's

    def start(self, orders: Sequence[Order]) -> None:
        call = RunOne()
        with self.executor.batch():
            jobs = [self.executor.submit(call, order) for order in orders]
        self.jobs |= {order.key: (order, job) for order, job in zip(orders, jobs, strict=True)}

    def ended(self, watch: Watch) -> list[Ended]:
        found, gone = [], self._gone()
        for key, (order, job) in list(self.jobs.items()):
            if job.paths.result_pickle.exists() or (self.cluster == "local" and job.done()):
                del self.jobs[key]
                trouble = job.exception()
                said = "" if trouble is None else f"job {job.job_id} did not finish: {_last(trouble)}"
                found.append(lost(order, said) if trouble else job.result())
            elif job.job_id in gone:
                del self.jobs[key]
                found.append(lost(order, f"job {job.job_id} left the queue without a result; its log is {job.paths.stderr}"))
        if not found:
            time.sleep(POLL)
        return found

    def _gone(self) -> set[str]:
        """Jobs of Slurm that are in its queue no more, seen twice: what dies there tells nobody.

        Asked of squeue, and not of sacct as submitit does: that needs an accounting data base, which a small Slurm has not.
        """
        if self.cluster == "local" or time.monotonic() - self.looked < LOOK or not self.jobs:
            return set()
        self.looked = time.monotonic()
        asked = ["squeue", "--noheader", "--array", "--format=%i", f"--user={os.getuid()}"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False)
        if said.returncode != 0:  # the controller is busy or away for a while
            return set()
        absent = {job.job_id for _, job in self.jobs.values()} - set(said.stdout.split())
        gone, self.absent = absent & self.absent, absent
        return gone

    def close(self) -> None:
        for _, job in self.jobs.values():
            job.cancel(check=False)
        self.jobs.clear()


def _last(error: BaseException) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


# ----------------------------------------------------------------------------------------------------------------- Ray


class OnRay:
    """One remote function around `run_one`, on this computer or on a cluster that shares the store's folder."""

    def __init__(self, options: Options) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
        self.ray = _extra("ray", "ray")
        self.ours = not self.ray.is_initialized()
        if self.ours:
            where = {"address": options.address} if options.address else {"num_cpus": _cores(), "include_dashboard": False}
            self.ray.init(logging_level="error", log_to_driver=False, **where)
        self.workers = options.workers or sys.maxsize
        resources = {"num_cpus": options.threads} | ({"num_gpus": 1} if options.device == "cuda" else {})
        self.remote = self.ray.remote(max_retries=0, **resources)(_on_ray)
        self.threads, self.tasks = options.threads, dict[Any, Order]()

    def room(self) -> int:
        return self.workers - len(self.tasks)

    def start(self, orders: Sequence[Order]) -> None:
        self.tasks |= {self.remote.remote(order): order for order in orders}

    def ended(self, watch: Watch) -> list[Ended]:
        done, _ = self.ray.wait(list(self.tasks), num_returns=1, timeout=POLL)
        found = []
        for task in done:
            order = self.tasks.pop(task)
            try:
                found.append(self.ray.get(task))
            except self.ray.exceptions.RayError as error:
                found.append(lost(order, f"Ray lost it: {_last(error)}"))
        return found

    def close(self) -> None:
        for task in self.tasks:
            self.ray.cancel(task, force=True)
        self.tasks.clear()
        if self.ours:
            self.ray.shutdown()


def _on_ray(order: Order) -> Ended:
    _quiet()
    return run_one(order)


# --------------------------------------------------------------------------------------------------------------- table

# name → how it is made. "submitit" runs what Slurm would run as processes of this computer: for trying out and for tests.
EXECUTORS: Mapping[str, Callable[[Options], Executor]] = {
    "local": Local,
    "serial": Serial,
    "slurm": Submitted,
    "submitit": lambda options: Submitted(options, cluster="local"),
    "ray": OnRay,
}
DEFAULT = "local"


def executor_of(name: str, options: Options) -> Executor:
    """The executor of this name. Raises: SettingsError for an unknown one; TombolaError when its extra is not installed."""
    if name not in EXECUTORS:
        raise SettingsError([TombolaError(f"there is no executor {name!r}", expected=", ".join(EXECUTORS))])
    if options.workers is not None and options.workers < 1:
        raise SettingsError([TombolaError("too few workers", got=options.workers, expected="at least 1")])
    return EXECUTORS[name](options)


def _extra(module: str, extra: str) -> Any:
    from importlib import import_module

    try:
        return import_module(module)
    except ImportError as error:
        raise TombolaError(
            f"this executor needs {module}",
            got=str(error),
            expected=f"the extra `{extra}`",
            next=f"pip install 'tombola[{extra}]'",
        ) from error
