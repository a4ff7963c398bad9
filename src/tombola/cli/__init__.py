"""The command line: one verb per public function. Results on stdout, progress and messages on stderr.

Heavy libraries are imported inside the verbs, so that `--help` answers at once. A TombolaError ends a verb with one message
and exit code 2; an interrupted verb goes on where it was when the same command is given again.

    options   the options, each written once, in groups; how what was given is read
    find      demo, find, head
    tickets   controls, retrain, evaluate, compare, import
    ship      ship, push, bench, frontier
    look      doctor, inspect, report
    stored    store ls, verify, gc
    study     study plan, run, run-one, status, report, compare
"""

import sys
from collections.abc import Callable

import typer

from tombola.cli import find, look, ship, stored, study, tickets
from tombola.cli.options import grouped
from tombola.errors import TombolaError

# Verb → what it runs. In this order they stand in the help.
VERBS: dict[str, Callable[..., None]] = {
    "demo": find.demo,
    "doctor": look.doctor,
    "inspect": look.inspect,
    "find": find.find,
    "head": find.head,
    "controls": tickets.controls,
    "retrain": tickets.retrain,
    "evaluate": tickets.evaluate,
    "compare": tickets.compare,
    "import": tickets.import_,
    "ship": ship.ship,
    "push": ship.push,
    "bench": ship.bench,
    "frontier": ship.frontier,
    "report": look.report,
}
# Verb with verbs of its own → (what they run, help).
FAMILIES: dict[str, tuple[dict[str, Callable[..., None]], str]] = {
    "store": ({"ls": stored.ls, "verify": stored.verify, "gc": stored.gc}, "Look after a folder of results."),
    "study": (
        {
            "plan": study.plan,
            "run": study.run,
            "run-one": study.run_one,
            "status": study.status,
            "report": study.report,
            "compare": study.compare,
        },
        "Many runs at once: what to run, running it, how far it is, what came out.",
    ),
}

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Lottery tickets for pre-trained transformers: find them, test them honestly, compare, retrain, keep every result.",
)
for name, verb in VERBS.items():
    app.command(name)(grouped(verb))
for name, (verbs, about) in FAMILIES.items():
    family = typer.Typer(no_args_is_help=True, help=about)
    for one, verb in verbs.items():
        family.command(one)(grouped(verb))
    app.add_typer(family, name=name)


def main() -> None:
    """Runs the command line; the entry point of the `tombola` script."""
    try:
        app()
    except TombolaError as error:
        print(f"tombola: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except SystemExit as left:
        if left.code == 130:  # typer has caught the interrupt
            print("tombola: interrupted; the same command goes on from the last finished cell", file=sys.stderr)
        raise
