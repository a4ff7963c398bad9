"""`tombola study …`: plan, run, status, report and compare of many cells at once, and run-one for any other scheduler."""

import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tombola.cli.look import Written, write_report
from tombola.cli.options import (
    STORE,
    BudgetOption,
    DataOption,
    JsonOption,
    StoreOption,
    assignments,
    make_lab,
    quiet,
)
from tombola.errors import SettingsError, TombolaError
from tombola.study.engine import Ended, Watch
from tombola.terminal import duration, megabytes, print_json, print_table, say

if TYPE_CHECKING:
    from tombola.report.cases import Study as Cases
    from tombola.study.cells import Lab
    from tombola.study.engine import Tally
    from tombola.study.plan import Plan, Study

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME|FILE", help="A study file (TOML), or prasanna2020, chen2020, liu2022.")
]
EnergyOption = Annotated[bool, typer.Option("--energy", help="Have codecarbon (an extra, offline) read what each cell takes.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Which:
    """Which study: what is given here stands in place of what the study says. And on which data, in which store."""

    model: Annotated[str | None, typer.Option(help="In place of the study's; several separated by commas.")] = None
    tasks: Annotated[str | None, typer.Option(help="In place of the study's, separated by spaces or ;")] = None
    seeds: Annotated[str | None, typer.Option(help="In place of the study's: 0,1,2 or 0-4.")] = None
    preset: Annotated[str | None, typer.Option(help="paper, released or corrected.")] = None
    ladder: Annotated[str | None, typer.Option(help="A:B, two presets: every experiment on every rung from A to B.")] = None
    setting: Annotated[
        list[str] | None,
        typer.Option("--set", help="epochs=1, controls.draws=3, per_task.rte.epochs=5, slurm.mem_gb=8; repeatable."),
    ] = None
    data: DataOption = None
    store: StoreOption = STORE

    def study(self, name: str) -> "Study":
        """The study of this name or file. Raises: SettingsError with everything that is wrong in it or here."""
        from tombola.study.plan import read_study

        given = {
            "model": None if self.model is None else [one for one in self.model.split(",") if one],
            "tasks": None if self.tasks is None else self.tasks.replace(";", " ").split(),  # commas stand within a task
            "seeds": None if self.seeds is None else _seeds(self.seeds),
            "preset": self.preset,
            "ladder": self.ladder,
        }
        return read_study(name, given, list(assignments(self.setting).items()))

    def planned(self, name: str, *, budget: float | None = None, there: bool = False) -> "tuple[Lab, Plan]":
        """A lab, and the cells of the study. With `there` the store has to exist."""
        from tombola.study.plan import plan_study

        study = self.study(name)
        lab = make_lab(
            _existing(self.store) if there else self.store, self.data, late=False, budget=budget
        )  # plans are written there
        return lab, plan_study(lab, study)


def plan(
    name: NameArgument,
    which: Which,
    workers: Annotated[int | None, typer.Option(help="Estimate for so many at a time.", min=1)] = None,
    no_estimate: Annotated[bool, typer.Option("--no-estimate", help="Do not time a few rows of each task.")] = False,
    as_json: JsonOption = False,
) -> None:
    """What a study asks for, what is shared, what is there already, and about how long the rest takes. Computes nothing."""
    from tombola.study.engine import write_plans
    from tombola.study.plan import estimate

    lab, plan = which.planned(name)
    study = plan.study
    missing = lab.missing(plan.cells.values())
    write_plans(lab, plan.cells.values())
    elsewhere = (lab.machine or _machine())["device"] != _machine()["device"]  # nothing can be timed for it here
    expected = None if no_estimate or elsewhere or not missing else estimate(lab, missing)
    at_once = workers or _workers(lab)
    if as_json:
        said = None if expected is None else {"seconds_of_one_worker": round(expected.seconds, 1)} | {
            "seconds": round(expected.wall(at_once), 1), "workers": at_once, "bytes": expected.bytes
        }  # fmt: skip
        print_json(
            {"study": study.name, "asked": plan.asked, "cells": len(plan.cells), "to_run": len(missing), "estimate": said}
            | {"missing": [{"key": cell.key, "title": _title(cell)} for cell in missing]}
        )
        return
    absent = {cell.key for cell in missing}
    rows = []
    for part in plan.parts:
        needed = part.needed()
        rows.append((part.experiment, part.model, part.task, len(needed), sum(key in absent for key in needed)))
    print_table(
        f"{study.name}: {study.about}", ("experiment", "model", "task", "asked", "to run*"), [[*map(str, r)] for r in rows]
    )
    print("* cells that several experiments share stand in the line of each, and run once")
    print(f"asked {plan.asked} runs, {len(plan.cells)} different; {len(plan.cells) - len(missing)} done, {len(missing)} to run")
    if elsewhere:
        print("no estimate: these cells are for another kind of device than this computer has")
    if expected is not None:
        wall, disk = duration(expected.wall(at_once)), megabytes(expected.bytes)
        print(
            f"about {wall} with {at_once} at a time ({duration(expected.seconds)} one after the other), {disk} more on the disk;"
        )
        print("(measured on a few rows of each task on this machine; nothing was computed)")


def run(
    name: NameArgument,
    which: Which,
    executor: Annotated[str, typer.Option(help="local (processes), serial, slurm, submitit (as slurm, here), ray.")] = "local",
    workers: Annotated[int | None, typer.Option(help="Cells at a time.  [default: cores // threads]")] = None,
    address: Annotated[str | None, typer.Option(help="ray: of a cluster; without it Ray runs here.")] = None,
    budget: BudgetOption = None,
    energy: EnergyOption = False,
    as_json: JsonOption = False,
) -> None:
    """Computes what is missing of a study. One failed cell never stops the others; the same command again goes on.

    Exit code 1 when cells failed, with the reason of each.
    """
    from tombola.study import ranks
    from tombola.study.cost import require_energy, total_cost
    from tombola.study.engine import run_cells
    from tombola.study.executors import Options, executor_of
    from tombola.study.stopping import why_stopped

    if energy:
        require_energy()
    most = None if budget is None else round(budget * 1e9)
    lab, plan = which.planned(name, budget=budget)
    study = plan.study
    lab.energy = energy
    machine = lab.machine or _machine()
    options = Options(
        workers=workers, threads=machine["threads"], device=machine["device"], parameters=study.slurm,
        folder=lab.store.root / "jobs", address=address,
    )  # fmt: skip
    if ranks.size() > 1 and executor != "serial":
        raise TombolaError("torchrun starts the processes itself", got=f"--executor {executor}", expected="--executor serial")
    watch = StudyProgress() if ranks.rank() == 0 else None
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as an interrupt: workers are told to stop, locks go
    stop = partial(why_stopped, lab) if study.stop_lost_chains else lambda cell: None
    tally = run_cells(lab, list(plan.cells.values()), executor_of(executor, options), watch, budget=most, stop=stop)
    if watch is None:  # rank 0 says the rest
        return
    spent = total_cost(lab.store, tally.computed)
    if as_json:
        print_json(
            {"asked": plan.asked, "cells": tally.asked, "computed": len(tally.computed), "cost": spent.lines()}
            | {"failed": dict(tally.failed), "blocked": dict(tally.blocked), "stopped": dict(tally.stopped)}
        )
    else:
        there = tally.asked - len(tally.failed) - len(tally.blocked) - len(tally.stopped)
        print(f"{study.name}: {there} of {tally.asked} cells there, {len(tally.computed)} computed now")
        for line in spent.lines() if tally.computed else ():
            print(line)
    if tally.failed:
        _say_failed(plan, tally)
        raise typer.Exit(1)
    say(f"Next: tombola study report {name} --store {which.store}" + (f" --data {which.data}" if which.data else ""))


def run_one(
    key: Annotated[str, typer.Argument(metavar="CELL", help="The key of a planned cell, or its start.")],
    data: DataOption = None,
    store: StoreOption = STORE,
    budget: BudgetOption = None,
    energy: EnergyOption = False,
) -> None:
    """Computes one cell that `study plan` wrote down, its inputs first if they are absent: for schedulers of your own.

    Refuses when another process is computing an input. Exit code 1 when it failed. Under torchrun all ranks share the cell.
    """
    from tombola.study.engine import Order, Relay, find_plan, lab_of, run_one

    folder = _existing(store)
    most = None if budget is None else round(budget * 1e9)
    lab = lab_of(str(folder), None if data is None else str(data.absolute()), most)
    lab.reporter = Relay(StudyProgress())
    quiet()
    found = find_plan(lab.store, key)
    ended = run_one(Order(found, str(folder), None if data is None else str(data), most, energy), lab=lab)
    if ended.error is not None:
        say(f"{found[:12]} failed: {ended.error}")
        raise typer.Exit(1)
    print(f"{found[:12]} done in {duration(ended.seconds)}: {lab.store.root / 'cells' / found}")


def status(
    name: NameArgument,
    which: Which,
    as_json: JsonOption = False,
) -> None:
    """How far a study is: done, running, failed (with the reason), to do; and what it took."""
    from tombola.study.cost import total_cost
    from tombola.study.engine import failures, states
    from tombola.study.stopping import by_reason, stopped

    lab, plan = which.planned(name, there=True)
    found, bad = states(lab.store, plan.cells), failures(lab.store, plan.cells)
    spent = total_cost(lab.store, plan.cells)
    counts = {state: sum(one == state for one in found.values()) for state in ("done", "running", "failed", "to do")}
    if as_json:
        print_json(
            counts
            | {"asked": plan.asked, "cells": [{"key": k, "title": _title(c), "state": found[k]} for k, c in plan.cells.items()]}
            | {"failures": {key: {"error": one.error, "traceback": one.traceback} for key, one in bad.items()}}
            | {"cost": spent.lines()}
        )
        return
    rows = []
    for part in plan.parts:
        mine = [found[key] for key in part.needed()]
        rows.append((part.experiment, part.task, *(str(mine.count(state)) for state in counts)))  # type: ignore[arg-type]
    print_table(f"{plan.study.name} in {which.store}", ("experiment", "task", *counts), rows)
    print(", ".join(f"{n} {state}" for state, n in counts.items()) + f", of {len(found)} cells")
    for reason, n in by_reason(stopped(lab, plan.cells.values()) if plan.study.stop_lost_chains else {}).items():
        print(f"of these {n} are left out: {reason}")
    for line in spent.lines():
        print(line)
    for key, one in bad.items():
        if found[key] == "failed":
            print(f"\nfailed: {one.title} ({key[:12]}), {one.attempts} times, last {one.when} by {one.where}")
            print(f"  {one.error}\n  traceback: {one.traceback or 'none: the process was killed'}")


def report(
    name: NameArgument,
    which: Which,
    written: Written,
    out: Annotated[Path, typer.Option(help="The page.")] = Path("study.html"),
) -> None:
    """One page of the study's finished cells, and of nothing else in the store. Says what is not there yet."""
    from dataclasses import replace

    from tombola.study.engine import states
    from tombola.study.overlap import with_shared
    from tombola.study.results import collect
    from tombola.study.stopping import by_reason, stopped

    written.check()
    lab, plan = which.planned(name, there=True)
    results = replace(with_shared(lab.store, collect(lab.store, plan.cells.keys())), command=_command(name, which))
    left_out = stopped(lab, plan.cells.values()) if plan.study.stop_lost_chains else {}
    absent = sum(state != "done" and key not in left_out for key, state in states(lab.store, plan.cells).items())
    said = tuple(f"{n} cells are left out: {reason}" for reason, n in by_reason(left_out).items())
    results = replace(results, warnings=(*said, *results.warnings))
    if absent == len(plan.cells):
        raise TombolaError(
            "nothing of this study is there yet", got=str(which.store), next=f"tombola study run {name} --store {which.store}"
        )
    if absent:
        unfinished = f"{absent} of the {len(plan.cells)} cells of study {plan.study.name} are not there: not all of it is here"
        results = replace(results, warnings=(unfinished, *results.warnings))
        say(unfinished)
    print(written.write(results, out, f"{plan.study.name}: {plan.study.about}").resolve())


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A store (folder), a study (name or file), a preset, or NAME=VALUE.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Likewise; studies, presets and settings are those of --store.")],
    which: Which,
    out: Annotated[Path | None, typer.Option(help="Also a page: of B, with what differs from A at its top.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also the conclusions that are the same.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Which conclusions differ between two studies, stores, presets or settings: good > random, good matches full, …

    Paired by task, search and seed. A conclusion holds or fails where its 95 % interval over seeds is clear of the mark.
    """
    from tombola.report.about_conclusions import compare_section, compare_sentence, compare_table
    from tombola.report.conclusions import compare as compared

    names = (_side_name(a), _side_name(b))
    sides = [_side(one, which) for one in (a, b)]
    changes = compared(*sides)
    if not changes:
        tasks = " and ".join(", ".join(one.tasks) for one in sides)
        raise TombolaError(
            "the two have nothing to compare", got=tasks, expected="scores of the same search on the same task in both"
        )
    if out is not None:
        write_report(sides[1].results, out, extra=(compare_section(changes, names),))
        say(f"The page: {out.resolve()}")
    if as_json:
        from dataclasses import asdict

        said = [asdict(one) | {"changed": one.changed, "turned": one.turned} for one in changes]
        print_json({"a": names[0], "b": names[1], "changed": sum(one.changed for one in changes), "conclusions": said})
        return
    table = compare_table([one for one in changes if every or one.changed], names)
    if table.rows:
        print_table(table.caption, table.head, table.rows)
    print(compare_sentence(changes, names))


# ------------------------------------------------------------------------------------------------------------- reading


def _seeds(text: str) -> list[int]:
    found: list[int] = []
    try:
        for part in filter(None, text.split(",")):
            first, dash, last = part.partition("-")
            found += range(int(first), int(last) + 1) if dash else [int(first)]
    except ValueError:
        raise SettingsError(
            [TombolaError("seeds are not whole numbers", got=text, expected="for example 0,1,2 or 0-4")]
        ) from None
    return found


def _command(name: str, which: Which) -> str:
    """What computes a study's cells again, as it may be typed."""
    given = {
        "--model": which.model,
        "--tasks": which.tasks,
        "--seeds": which.seeds,
        "--preset": which.preset,
        "--ladder": which.ladder,
    }
    options = [f"{option} {shlex.quote(value)}" for option, value in given.items() if value is not None]
    return " ".join(
        ["tombola study run", shlex.quote(name), *options, *(f"--set {shlex.quote(one)}" for one in which.setting or ())]
    )


def _side(text: str, which: Which) -> "Cases":
    """One side of a comparison: the cases of a store, of a study, or of those runs of a store that have these settings."""
    from dataclasses import replace

    from tombola.report.cases import study_of
    from tombola.study.presets import NAMES
    from tombola.study.results import collect

    wanted = {"preset": text} if text in NAMES else assignments([text]) if "=" in text else None
    if wanted is not None:
        every = study_of(collect(make_lab(_existing(which.store), which.data, reads=True).store))
        found = [
            case for case in every.cases if all(str(case.settings.get(name)) == str(value) for name, value in wanted.items())
        ]
        if not found:
            known = sorted({str(case.settings.get(name)) for case in every.cases for name in wanted})
            raise TombolaError(
                f"no run of {which.store} has {text}", got=", ".join(known), expected="a setting that some runs have"
            )
        return replace(every, cases=tuple(found))
    if Path(text).is_dir():
        return study_of(collect(make_lab(Path(text).absolute(), reads=True).store))
    lab, plan = which.planned(text, there=True)
    return study_of(collect(lab.store, plan.cells.keys()))


def _side_name(text: str) -> str:
    return Path(text).name if Path(text).exists() else text


def _existing(store: Path) -> Path:
    if not store.is_dir():
        next = "`tombola study plan` and `run` make one"
        raise TombolaError("there is no such store", got=str(store), expected="a folder of results", next=next)
    return store.absolute()


def _machine() -> Mapping[str, Any]:
    from tombola.study.runs import machine

    return machine()


def _workers(lab: "Lab") -> int:
    from tombola.study.executors import Local, Options

    machine = lab.machine or _machine()
    return Local(Options(threads=machine["threads"], device=machine["device"])).workers


def _title(cell: Any) -> str:
    from tombola.study.engine import title_of

    return title_of(cell)


# ------------------------------------------------------------------------------------------------------------- showing


def _say_failed(plan: "Plan", tally: "Tally") -> None:
    for key, reason in tally.failed.items():
        say(f"failed: {_title(plan.cells[key])} ({key[:12]})\n  " + reason.replace("\n", "\n  "))
        for other in (other for other, cause in tally.blocked.items() if cause == key):
            say(f"  so could not run: {_title(plan.cells[other])} ({other[:12]})")
    say(f"{len(tally.failed)} failed, {len(tally.blocked)} could not run because of them; the same command tries them again")


class StudyProgress(Watch):
    """A line for each cell that starts or ends, with remaining time; on a terminal a bar below them. Always on stderr."""

    def __init__(self) -> None:
        self.titles: Mapping[str, str] = {}
        self.work: Mapping[str, float] = {}
        self.shares: dict[str, float] = {}  # of cells at work
        self.done = self.total = 0.0
        self.ends = self.failed = 0
        self.since = time.monotonic()
        self.live = sys.stderr.isatty()

    def begin(self, titles: Mapping[str, str], work: Mapping[str, float], asked: int) -> None:
        self.titles, self.work, self.total, self.since = titles, work, sum(work.values()), time.monotonic()
        self._line(f"{len(titles)} of {asked} cells to compute")

    def started(self, key: str) -> None:
        self.shares[key] = 0.0
        if self.live:
            self._bar()

    def share(self, key: str, done: float) -> None:
        self.shares[key] = done
        if self.live:
            self._bar()

    def ended(self, ended: Ended) -> None:
        self.shares.pop(ended.key, None)
        self.done += self.work.get(ended.key, 0.0)
        self.ends, self.failed = self.ends + 1, self.failed + (ended.error is not None)
        how = f"done in {duration(ended.seconds)}" if ended.error is None else f"FAILED: {ended.error.splitlines()[0]}"
        self._line(f"[{self.ends}/{len(self.titles)}] {self.titles.get(ended.key, ended.key)}: {how}{self._left()}")

    def say(self, message: str) -> None:
        self._line(message)

    def end(self) -> None:
        if self.titles:
            bad = f", {self.failed} of them failed" if self.failed else ""
            self._line(f"{self.ends} of {len(self.titles)} cells ended in {duration(time.monotonic() - self.since)}{bad}")

    def _left(self) -> str:
        done = self.done + sum(share * self.work.get(key, 0.0) for key, share in self.shares.items())
        if not done or self.ends == len(self.titles):
            return ""
        return f", about {duration((time.monotonic() - self.since) * (self.total / done - 1))} left"

    def _bar(self) -> None:
        at_work = ", ".join(self.titles.get(key, key) for key in self.shares)
        print(f"\r\x1b[K[{self.ends}/{len(self.titles)}]{self._left()}  {at_work[:90]}", end="", file=sys.stderr, flush=True)

    def _line(self, text: str) -> None:
        print(("\r\x1b[K" if self.live else "") + text, file=sys.stderr, flush=True)
