"""How fast tombola is beside the ways it replaces: one run, in turns (A B C, A B C, …), ratios and not seconds.

    ./dev bench --data DIR      CoLA, SST-2 and MRPC (DIR/<task>/<split>.jsonl.gz): some six minutes on two quiet cores
    ./dev bench --generated     sentences that tombola writes itself, without targets

`ways.py` has what is compared, `work.py` what is counted, `benchmarks.py` the measuring; here are arguments and tables. A
ratio is seconds a row over ours in the same round, as median and range over rounds. Asserted are counts and equal
results, never seconds. Exit code 0; 2 for bad arguments.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tombola.errors import TombolaError

if TYPE_CHECKING:
    from benchmarks import Setup, Started, Timed

# Where each benchmark runs, and how many times longer than ours a way should take there, at least.
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    "importance": {
        "cola": {"published": 10, "dynamic": 2},
        "sst2": {"published": 7.5, "dynamic": 2.5},
        "mrpc": {"published": 2.5, "dynamic": 1.5},
    },
    "step": {"sst2": {"published": 8, "dynamic": 2}},
    "search": {"sst2": {"published": 10}},
    "import": {},
}
GENERATED = "acceptability"
DEFAULT_ROWS = 256


@dataclass(frozen=True, slots=True)
class Options:
    data: Path | None  # None: generated sentences
    rounds: int
    rows: int  # 0 = all
    only: tuple[str, ...]
    json: Path | None
    own_score_pass: bool


def parse(arguments: Sequence[str]) -> Options:
    """The options. Raises: TombolaError for bad ones, SystemExit(2) for those argparse refuses."""
    parser = argparse.ArgumentParser(prog="./dev bench", description="How fast tombola is beside the ways it replaces.")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="DIR", help="folder with <task>/<split>.jsonl.gz")
    source.add_argument("--generated", action="store_true", help="run on sentences that tombola writes itself; no targets")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each way is timed  [default: 5]")
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, metavar="N", help="dev rows, 0 = all  [default: %(default)s]")
    parser.add_argument("--only", default=",".join(TARGETS), metavar="NAMES", help="[default: %(default)s]")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number here")
    score_help = "the rivals score in a second forward pass; the released code takes the logits of the first"
    parser.add_argument("--own-score-pass", action="store_true", help=score_help)
    given = parser.parse_args(arguments)
    only = tuple(given.only.split(","))
    if unknown := [name for name in only if name not in TARGETS]:
        raise TombolaError("--only has unknown benchmarks", got=", ".join(unknown), expected=f"some of {', '.join(TARGETS)}")
    if given.rounds < 1 or given.rows < 0:
        got = f"--rounds {given.rounds}, --rows {given.rows}"
        raise TombolaError("a number is out of range", got=got, expected="at least 1 round; 0 rows (all) or more")
    if given.data is None and not given.generated and only != ("import",):
        raise TombolaError(
            "there is nothing to measure on",
            expected=f"a folder with {', '.join(TARGETS['importance'])} in it, as <task>/<split>.jsonl.gz",
            next="pass --data DIR, or --generated for sentences that tombola writes itself",
        )
    if given.json is not None and not given.json.parent.is_dir():
        raise TombolaError("--json cannot be written", got=f"there is no folder {given.json.parent}")
    return Options(given.data, given.rounds, given.rows, only, given.json, given.own_score_pass)


def run(options: Options) -> dict[str, Any]:
    """Runs the benchmarks and prints a line a way as they come. Returns every raw number."""
    raw: dict[str, Any] = {"arguments": {name: str(value) for name, value in asdict(options).items()}, "timed": []}
    if set(options.only) - {"import"}:
        import torch

        import benchmarks

        raw["machine"] = {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
        setup = benchmarks.prepare(options.data, options.rounds, options.rows or None, options.own_score_pass)
        print("\n".join(_preamble(setup)), "", COLUMNS.format(*HEADER), sep="\n")
        functions = {"importance": benchmarks.importance, "step": benchmarks.step, "search": benchmarks.search}
        for name in (name for name in functions if name in options.only):
            for task in TARGETS[name] if options.data else (GENERATED,):
                found = functions[name](setup, task)
                print("\n".join(_lines(found)), flush=True)
                raw["timed"] += [asdict(way) for way in found]
        speeds = [speed for way in raw["timed"] for speed in way["gemm"]]
        print(f"GEMM in between: {median(speeds):.0f} GFLOP/s ({min(speeds):.0f}–{max(speeds):.0f}); a wide range means company")
    if "import" in options.only:
        from benchmarks import start_up

        started = start_up(options.rounds)
        print("\n" + "\n".join(_start_up_lines(started)))
        raw["start_up"] = [asdict(one) for one in started]
    return raw


HEADER = ("benchmark", "way", "time, × ours", "tokens/row", "of text", "MFLOP/row", "× ours", "of GEMM", "target", "")
COLUMNS = "{:<24} {:<9} {:>20} {:>10} {:>7} {:>9} {:>13} {:>7} {:>6} {}"


def _preamble(setup: "Setup") -> list[str]:
    """What the machine gives, and that the counts are right."""
    import torch

    from benchmarks import check_formula, gemm_speed

    load, missed = os.getloadavg()[0], check_formula(setup)
    speeds = ", ".join(f"{gemm_speed(tokens):.0f} at {tokens}" for tokens in (512, 2048, 8192))
    shares = ", ".join(f"{share:.1%} ({backward})" for backward, share in missed.items())
    lines = [
        f"torch {torch.__version__} on the CPU, {torch.get_num_threads()} threads, load {load:.1f} at the start",
        f"GEMM: GFLOP/s of an fp32 product tokens × 384 × 1536: {speeds} tokens; shares below are of the one at 2048",
        f"FLOPs: by formula, equal to torch's counter with the CPU's fused attention added, of which it misses {shares}",
    ]
    if setup.cap:
        lines.append(f"Rows: at most {setup.cap} a dev split, evenly spaced; [in brackets] FLOPs × ours on the whole split")
    return lines


def _lines(ways: Sequence["Timed"]) -> list[str]:
    """A line a way, the last of which is ours; then what else is to be said."""
    ours, lines = ways[-1], []
    for way in ways:
        ratios = [theirs / mine for theirs, mine in zip(way.seconds_a_row, ours.seconds_a_row, strict=True)]
        flops = f"{way.a_row('flops') / ours.a_row('flops'):.2f}"
        if (whole := way.details.get("flops_of_split")) and way.details["rows"] < way.details["rows_of_split"]:
            flops += f" [{whole / ours.details['flops_of_split']:.2f}]"
        target = TARGETS[way.benchmark].get(way.task, {}).get(way.way)
        met = "" if target is None else "met" if median(ratios) >= target else "MISSED"
        cells = (f"{way.benchmark} {way.task}", way.way, "1" if way is ours else _spread(ratios), f"{way.a_row('computed'):.1f}")
        counts = (f"{way.a_row('real'):.1f}", f"{way.a_row('flops') / 1e6:.0f}", flops, f"{way.share_of_gemm:.0%}")
        lines.append(COLUMNS.format(*cells, *counts, "" if target is None else f"≥ {target:g}", met).rstrip())
    if ours.benchmark == "step":
        mine = median(ours.details["steps"])
        told = ", ".join(f"{way.way} {median(way.details['steps']) / mine:.2f}" for way in ways[:-1])
        lines.append(f"  above: means over a round's steps, what an epoch costs; the median step, times ours: {told}")
    if ours.benchmark == "search":
        whole = sum(ways[0].seconds_a_row) / sum(ours.seconds_a_row)
        flops = ", ".join(f"{way.way} {way.details['flops'] * way.details['steps'] / 1e12:.2f} TFLOP" for way in ways)
        told = f"{ours.details['steps']} steps (a ratio each, the whole search {whole:.2f}), {flops}"
        lines.append(f"  {told}; {ours.details['kept']:.0%} of the body kept at full score {ours.details['score_of_full']:.3f}")
    return lines


def _start_up_lines(started: Sequence["Started"]) -> list[str]:
    """A line a process, the first of which is the bare interpreter."""
    bare = started[0]
    lines = [f"{'process':<17} {'times bare python':>20} {'median':>8} {'modules':>8}   torch, transformers"]
    for one in started:
        ratios = [theirs / mine for theirs, mine in zip(one.seconds, bare.seconds, strict=True)]
        lines.append(
            f"{one.command:<17} {_spread(ratios):>20} {median(one.seconds):>6.2f} s {len(one.modules):>8}   not imported"
        )
    return lines


def _spread(ratios: Sequence[float]) -> str:
    return f"{median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def main() -> int:
    try:
        options = parse(sys.argv[1:])
        raw = run(options)
    except TombolaError as error:
        print(f"bench: {error}", file=sys.stderr)
        return error.exit_code
    if options.json is not None:
        options.json.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
