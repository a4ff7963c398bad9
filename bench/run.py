"""How fast tombola is beside the ways it replaces: one run, in turns (A B C, A B C, …), ratios and not seconds.

    ./dev bench --data DIR      CoLA, SST-2 and MRPC (DIR/<task>/<split>.jsonl.gz)
    ./dev bench --generated     sentences that tombola writes itself, without targets

    importance  a pass that scores dev rows and all heads and MLPs     held       what holding single values adds to a step
    step        a step of fine-tuning                                  selection  which 70 % of all values go, exactly
    search      a whole s-prune search                                 weight     what a mask weighs on disk
    m-search    a whole m-prune search                                 attention  norm-weighted maps of rows of 128 tokens
    ship        a shrunk model beside the dense one, and getting it
    ticket      memory that a ticket of a real decoder adds            import     the start of a process
    study       what a study takes beside what its cells compute       chain      nested masks on disk, memory of training them
    mask-step   a step of mask training beside one that trains the same matrices, selection, switching masks

A ratio is seconds a row over ours in the same round, as median and range over rounds; a line that is of something else
says below what. Asserted are counts and equal results, never seconds: a target that is missed is said, and no error.
Exit code 0; 2 for bad arguments.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from tombola.errors import TombolaError

if TYPE_CHECKING:
    from measure import Figure, Setup, Timed


@dataclass(frozen=True, slots=True)
class AtLeast:
    bound: float

    def __str__(self) -> str:
        return f"≥ {self.bound:g}"

    def met(self, value: float) -> bool:
        return value >= self.bound


@dataclass(frozen=True, slots=True)
class AtMost:
    bound: float

    def __str__(self) -> str:
        return f"≤ {self.bound:g}"

    def met(self, value: float) -> bool:
        return value <= self.bound


# benchmark → task → way → what its ratio, or whatever the line is of, should come to. A task of "" is none: no rows are read.
TARGETS: dict[str, dict[str, dict[str, AtLeast | AtMost]]] = {
    "importance": {
        "cola": {"published": AtLeast(10), "dynamic": AtLeast(2)},
        "sst2": {"published": AtLeast(7.5), "dynamic": AtLeast(2.5)},
        "mrpc": {"published": AtLeast(2.5), "dynamic": AtLeast(1.5)},
    },
    "step": {"sst2": {"published": AtLeast(8), "dynamic": AtLeast(2)}},
    "search": {"sst2": {"published": AtLeast(10)}},
    "import": {"": {}},
    "held": {"sst2": {"cost": AtMost(1.03), "bytes/value": AtMost(1)}},
    "m-search": {"cola": {"published": AtLeast(5)}},
    "selection": {"cola": {"training step": AtLeast(10)}},  # so that selecting takes at most 10 % of it
    "mask-step": {
        task: {"step": AtMost(1.1), "selection": AtMost(0.1), "floats/score": AtMost(2), "switch": AtMost(1)}
        for task in ("sst2", "mrpc")
    },
    "weight": {"": {"bits/value": AtMost(1.02)}},
    "chain": {"": {"bits/value": AtMost(5), "nested": AtMost(4.05), "memory": AtMost(1)}},
    "ticket": {"": {"pack, save": AtMost(1.2), "load, tensors": AtMost(1.2), "load, process": AtMost(1.2)}},
    "study": {"": {"CPU a cell": AtMost(0.05), "load 1,000": AtMost(5), "plan 9 × 5": AtMost(2)}},
    "attention": {"": {"explicit": AtLeast(5), "memory": AtMost(0.05)}},
    "ship": {
        "": {
            "time/operations 8x128": AtMost(1.15),
            "time/operations 16x128": AtMost(1.15),
            "Torch-Pruning 8x128": AtMost(1.05),
            "Torch-Pruning 16x128": AtMost(1.05),
            "apply, ms": AtMost(50),
            "find to save, s": AtMost(60),
        }
    },
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
    about, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="./dev bench", description=about, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", type=Path, metavar="DIR", help="folder with <task>/<split>.jsonl.gz")
    source.add_argument("--generated", action="store_true", help="run on sentences that tombola writes itself; no targets")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="how often each way is timed  [default: 5]")
    rows_help = "dev rows of importance, search and m-search, 0 = all  [default: %(default)s]"
    parser.add_argument("--rows", type=int, default=DEFAULT_ROWS, metavar="N", help=rows_help)
    only_help = "some of those below, as importance,step  [default: all]"
    parser.add_argument("--only", default=",".join(TARGETS), metavar="NAMES", help=only_help)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every raw number here")
    score_help = (
        "the rivals of importance and search score in a second forward pass; the released code takes the logits of the first"
    )
    parser.add_argument("--own-score-pass", action="store_true", help=score_help)
    given = parser.parse_args(arguments)
    only = tuple(given.only.split(","))
    if unknown := [name for name in only if name not in TARGETS]:
        raise TombolaError("--only has unknown benchmarks", got=", ".join(unknown), expected=f"some of {', '.join(TARGETS)}")
    if given.rounds < 1 or given.rows < 0:
        got = f"--rounds {given.rounds}, --rows {given.rows}"
        raise TombolaError("a number is out of range", got=got, expected="at least 1 round; 0 rows (all) or more")
    tasks = sorted({task for name in only for task in TARGETS[name] if task})
    if given.data is None and not given.generated and tasks:
        raise TombolaError(
            "there is nothing to measure on",
            expected=f"a folder with {', '.join(tasks)} in it, as <task>/<split>.jsonl.gz",
            next="pass --data DIR, or --generated for sentences that tombola writes itself",
        )
    if given.json is not None and not given.json.parent.is_dir():
        raise TombolaError("--json cannot be written", got=f"there is no folder {given.json.parent}")
    return Options(given.data, given.rounds, given.rows, only, given.json, given.own_score_pass)


def run(options: Options) -> dict[str, Any]:
    """Runs the benchmarks, in the order of `TARGETS`, and prints their lines as they come. Returns every raw number."""
    import torch

    from attention import attention
    from chain import chain
    from decoder import ticket_memory
    from engine import study
    from learned import mask_step
    from measure import Figure, Setup, Timed, prepare
    from shipping import ship
    from start_up import start_up
    from structured import importance, search
    from training import held, step
    from unstructured import m_search, selection, weight

    functions: dict[str, Callable[[Setup, str], Sequence[Timed | Figure]]] = {
        "importance": importance,
        "step": step,
        "search": search,
        "import": start_up,
        "held": held,
        "m-search": m_search,
        "selection": selection,
        "mask-step": mask_step,
        "weight": weight,
        "chain": chain,
        "ticket": ticket_memory,
        "study": study,
        "attention": attention,
        "ship": ship,
    }
    setup = prepare(options.data, options.rounds, options.rows or None, options.own_score_pass)
    print("\n".join(_preamble(setup)), "", COLUMNS.format(*HEADER), sep="\n")
    raw: dict[str, Any] = {
        "arguments": {name: str(value) for name, value in asdict(options).items()},
        "machine": {"torch": torch.__version__, "threads": torch.get_num_threads(), "load": os.getloadavg()[0]},
        "timed": [],
        "figures": [],
    }
    for name in (name for name in TARGETS if name in options.only):
        tasks = list(TARGETS[name])
        for task in tasks if options.data or tasks == [""] else (GENERATED,):
            found = functions[name](setup, task)
            timed, figures = [x for x in found if isinstance(x, Timed)], [x for x in found if isinstance(x, Figure)]
            targets = {} if options.data is None else TARGETS[name][task]
            print("\n".join([*_timed_lines(timed, targets), *_figure_lines(figures, targets)]), flush=True)
            raw["timed"] += [asdict(way) for way in timed]
            raw["figures"] += [asdict(figure) for figure in figures]
    if speeds := [speed for way in raw["timed"] for speed in way["gemm"]]:
        print(f"GEMM in between: {median(speeds):.0f} GFLOP/s ({min(speeds):.0f}–{max(speeds):.0f}); a wide range means company")
    return raw


HEADER = ("benchmark", "way", "time, × ours", "tokens/row", "of text", "MFLOP/row", "× ours", "of GEMM", "target", "")
COLUMNS = "{:<24} {:<14} {:>20} {:>10} {:>7} {:>9} {:>13} {:>7} {:>6} {}"


def _preamble(setup: "Setup") -> list[str]:
    """What the machine gives, and that the counts are right."""
    import torch

    from measure import check_formula, gemm_speed

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


def _timed_lines(ways: Sequence["Timed"], targets: dict[str, AtLeast | AtMost]) -> list[str]:
    """A line a way, the last of which is ours; then what else is to be said."""
    if not ways:
        return []
    ours, lines = ways[-1], []
    for way in ways:
        ratios = [theirs / mine for theirs, mine in zip(way.seconds_a_row, ours.seconds_a_row, strict=True)]
        flops = f"{way.a_row('flops') / ours.a_row('flops'):.2f}"
        if (whole := way.details.get("flops_of_split")) and way.details["rows"] < way.details["rows_of_split"]:
            flops += f" [{whole / ours.details['flops_of_split']:.2f}]"
        cells = (f"{way.benchmark} {way.task}", way.way, "1" if way is ours else _range(ratios, ".2f"))
        tokens = (f"{way.a_row('computed'):.1f}", f"{way.a_row('real'):.1f}")
        counts = (f"{way.a_row('flops') / 1e6:.0f}", flops, f"{way.share_of_gemm:.0%}")
        lines.append(COLUMNS.format(*cells, *tokens, *counts, *_judged(ratios, targets.get(way.way))).rstrip())
    if ours.benchmark == "step":
        mine = median(ours.details["steps"])
        told = ", ".join(f"{way.way} {median(way.details['steps']) / mine:.2f}" for way in ways[:-1])
        lines.append(f"  above: means over a round's steps, what an epoch costs; the median step, times ours: {told}")
    if "steps" in ours.details and "kept" in ours.details:
        whole = sum(ways[0].seconds_a_row) / sum(ours.seconds_a_row)
        flops = ", ".join(f"{way.way} {way.details['flops'] * way.details['steps'] / 1e12:.2f} TFLOP" for way in ways)
        told = f"{ours.details['steps']} steps (a ratio each, the whole search {whole:.2f}), {flops}"
        if "padding_factor" in ours.details:
            told += f", tokens scored × {ours.details['padding_factor']:.2f} by padding alone"
        kept, full = ours.details["kept"], ours.details["score_of_full"]
        lines.append(f"  {told}; {kept:.0%} of {ours.details['of']} kept at full score {full:.3f}")
    return lines


def _figure_lines(figures: Sequence["Figure"], targets: dict[str, AtLeast | AtMost]) -> list[str]:
    """A line a figure, and a line below those that have a note in common."""
    lines = []
    for i, one in enumerate(figures):
        cells = (f"{one.benchmark} {one.task}".strip(), one.way, _range(one.values, ".4g"), *([""] * 5))
        lines.append(COLUMNS.format(*cells, *_judged(one.values, targets.get(one.way))).rstrip())
        if one.note and [x.note for x in figures[i + 1 : i + 2]] != [one.note]:
            lines.append(f"  {one.note}")
    return lines


def _judged(values: Sequence[float], target: AtLeast | AtMost | None) -> tuple[str, str]:
    return ("", "") if target is None else (str(target), "met" if target.met(median(values)) else "MISSED")


def _range(values: Sequence[float], style: str) -> str:
    """Median and range."""
    middle, low, high = (format(x, style) for x in (median(values), min(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low}–{high})"


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
