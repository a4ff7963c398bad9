"""tombola store: what a folder of results holds, whether it is sound, and what can go."""

from pathlib import Path
from typing import Annotated

import typer

from tombola.cli.options import STORE, JsonOption, make_lab
from tombola.errors import TombolaError
from tombola.terminal import megabytes, print_json, print_table

StoreArgument = Annotated[Path, typer.Argument(help="Folder of results.")]


def ls(store: StoreArgument = STORE, as_json: JsonOption = False) -> None:
    """The finished cells: what each is, how large, when."""
    from tombola.study.cells import cell_of
    from tombola.study.steps import STEPS

    entries = sorted(make_lab(store, reads=True).store.entries(), key=lambda entry: entry.finished)
    if as_json:
        print_json([{"key": e.key, "cell": e.describe, "bytes": e.bytes, "finished": e.finished.isoformat()} for e in entries])
        return
    rows = [(e.key[:12], STEPS[e.step].title(cell_of(e)), megabytes(e.bytes), f"{e.finished:%Y-%m-%d %H:%M:%S}") for e in entries]
    print_table(f"{len(rows)} cells, {megabytes(sum(e.bytes for e in entries))}", ("key", "cell", "size", "finished"), rows)


def verify(store: StoreArgument = STORE) -> None:
    """Hash every file again. Exit code 2 when something is not what it was; the next run computes it anew."""
    lab = make_lab(store, reads=True)
    problems = lab.store.verify()
    if problems:
        shown = "\n            ".join(map(str, problems))
        raise TombolaError(
            f"{len(problems)} files of {store} are damaged",
            got=shown,
            next="give the command that made them again: damaged cells are moved aside and recomputed",
        )
    print(f"{sum(1 for _ in lab.store.entries())} cells, every file as it was written")


def gc(
    store: StoreArgument = STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also what killed runs could go on from.")] = False,
) -> None:
    """Remove what no command needs: attempts of dead processes, stale locks, damaged cells. Finished cells stay."""
    plan = make_lab(store, reads=True).store.gc(dry_run=dry_run, unfinished=unfinished)
    print_table(
        f"{'would free' if dry_run else 'freed'} {megabytes(plan.bytes)}",
        ("kind", "path", "size"),
        [(one.kind, str(one.path), megabytes(one.bytes)) for one in plan.garbage],
    )
    if plan.kept:
        held = sum(one.bytes for one in plan.kept)
        print(f"{megabytes(held)} of {len(plan.kept)} unfinished runs stay, to be gone on from; --unfinished removes them")
