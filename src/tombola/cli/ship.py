"""What a ticket becomes for others, and what that gains: ship, push, bench, frontier."""

from pathlib import Path
from typing import Annotated

import typer

from tombola.cli.options import (
    STORE,
    DataOption,
    JsonOption,
    OwnRows,
    Running,
    StoreOption,
    TicketArgument,
    make_lab,
    quiet,
    split_seeds,
    words,
)
from tombola.terminal import maybe, megabytes, print_json, print_plan, print_table, say


def ship(
    ticket: TicketArgument,
    out: Annotated[Path, typer.Argument(help="The folder to write: new, or empty.")],
    *,
    to: Annotated[str, typer.Option(help="hf, portable, onnx or peft; docs/ship.md says what each is good for.")] = "hf",
    weights: Annotated[str, typer.Option(help="found_on, base, or a folder, such as the retrained weights.")] = "found_on",
    groups: Annotated[
        str, typer.Option(help="refuse or fill: what to do where heads that share keys and values cannot be cut evenly.")
    ] = "refuse",
    with_code: Annotated[
        bool, typer.Option("--with-code", help="hf: also write the loader, for trust_remote_code without tombola.")
    ] = False,
    store: StoreOption = STORE,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a ticket's model as files for others, smaller where it can be, proved equal to the masked model, or not at all."""
    from tombola.errors import SettingsError, TombolaError
    from tombola.export import foretell, refuse
    from tombola.export import ship as write
    from tombola.study.jobs import read_ticket

    if groups not in ("refuse", "fill"):
        raise SettingsError([TombolaError("unknown way with groups", got=groups, expected="refuse or fill")])
    refuse(out, to, with_code)
    taken = read_ticket(make_lab(store, data), ticket)
    if (said := foretell(taken, to)) is not None:
        say(said)
    shipped = write(taken, out, to, weights, groups=groups, code=with_code)  # type: ignore[arg-type]
    if as_json:
        print_json(shipped.as_json())
        return
    rows = [
        (name, f"{one.parameters:,}", megabytes(one.bytes), f"{one.flops:,}")
        for name, one in (("dense", shipped.dense), (to, shipped.small))
    ]
    print_table(f"{out}", ("", "parameters", "weights on disk", "operations, a row"), rows)
    print(shipped.in_words())
    for note in shipped.notes:
        print(note)


def push(
    folder: Annotated[Path, typer.Argument(help="What tombola ship wrote, or a ticket's folder.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub: NAME/OF-IT.")],
    *,
    yes: Annotated[
        bool, typer.Option("--yes", help="Upload. Without it, what would be uploaded is said and nothing is sent.")
    ] = False,
    public: Annotated[bool, typer.Option("--public", help="Make the repository public; it is private otherwise.")] = False,
    dry_run: Annotated[Path | None, typer.Option("--dry-run", help="Write what would be uploaded into this new folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a shipped model or a ticket with its card to the Hub, when you say so."""
    from tombola.export import hub_files, push_to_hub

    files = [str(file) for file in hub_files(folder, repo)]
    done = None
    if dry_run is not None or yes:
        done = push_to_hub(folder, repo, private=not public, dry_run=dry_run)
    if as_json:
        print_json({"repo": repo, "files": files, "private": not public, "uploaded": yes and dry_run is None, "to": done})
        return
    rows = [(file, megabytes((folder / file).stat().st_size)) for file in files]
    print_table(f"{repo} ({'public' if public else 'private'})", ("file", "size"), rows)
    print(
        f"written to {done}"
        if dry_run is not None
        else done or "nothing was sent: --yes uploads it, --dry-run FOLDER writes it out"
    )


def bench(
    models: Annotated[
        list[str], typer.Argument(help="The dense model, then others: folders, demo, Hub names, folders with model.onnx.")
    ],
    *,
    shapes: Annotated[str, typer.Option(help="Batches as ROWSxTOKENS, separated by commas.")] = "1x16,1x128,8x128",
    rounds: Annotated[int, typer.Option(help="Rounds of turns; more of them narrow the noise.")] = 9,
    threads: Annotated[int, typer.Option(help="Threads of the CPU; 0: as many as torch takes.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Time models beside each other, in turns, with the noise of the machine; parameters, bytes, memory; and say it in words."""
    from tombola.errors import SettingsError, TombolaError

    try:
        asked = [(int(batch), int(length)) for batch, _, length in (one.strip().partition("x") for one in shapes.split(","))]
    except ValueError:
        problem = TombolaError("--shapes are not ROWSxTOKENS", got=shapes, expected="for example 1x16,8x128")
        raise SettingsError([problem]) from None
    import torch

    from tombola.timing import bench as measure

    quiet()
    if threads > 0:
        torch.set_num_threads(threads)
    found = measure(models, asked, rounds)
    if as_json:
        print_json(found.as_json())
        return
    rows = [
        (
            t.model, f"{t.batch}x{t.length}", f"{1e3 * t.seconds.median:.1f}", f"{t.tokens_a_second:,.0f}",
            f"{t.against_dense.median:.2f} ({t.against_dense.low:.2f} to {t.against_dense.high:.2f})", f"{t.noise:.2f}",
            f"{t.flops / 1e9:.2f}" if t.flops else "",
        )
        for t in found.timings
    ]  # fmt: skip
    columns = ("model", "rows x tokens", "ms", "tokens a second", "against the first", "noise", "GFLOPs")
    print_table(f"{found.rounds} rounds, {found.threads} threads", columns, rows)
    sizes = [(h.model, f"{h.parameters:,}", megabytes(h.bytes), megabytes(h.peak_bytes)) for h in found.held]
    print_table("what they hold", ("model", "parameters", "weights on disk", "memory of a pass"), sizes)
    print(found.in_words())


def frontier(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name.")],
    task: Annotated[str, typer.Argument(help="A task, as of tombola find.")],
    *,
    procedures: Annotated[str, typer.Option(help="Of s-prune, separated by commas.")] = "joint,neurons,layers",
    floors: Annotated[str, typer.Option(help="Shares of the full score to go down to.")] = "0.95,0.9,0.8,0.6",
    draws: Annotated[int, typer.Option(help="Random controls of each ticket.", min=0)] = 2,
    seed: Annotated[int, typer.Option(help="The run seed.")] = 0,
    shape: Annotated[str, typer.Option(help="What is timed: ROWSxTOKENS.")] = "8x128",
    rounds: Annotated[int, typer.Option(help="Rounds of turns of the clock.", min=1)] = 9,
    target: Annotated[str | None, typer.Option(help='Pick the ticket for it: "50 ms", or "1 point" lost.')] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the page here.")] = None,
    rows: OwnRows,
    run: Running,
) -> None:
    """Score against latency and size: tickets of several procedures and floors, shrunk and timed, with random controls beside."""
    from tombola.errors import SettingsError, TombolaError
    from tombola.study.frontier import measure_frontier, plan_frontier

    try:
        asked = [float(one) for one in words(floors)]
        batch, length = (int(one) for one in shape.split("x"))
    except ValueError:
        problem = TombolaError("--floors or --shape cannot be read", got=f"{floors}, {shape}", expected="0.9,0.8 and 8x128")
        raise SettingsError([problem]) from None
    values, _ = split_seeds(run.settings())
    lab = run.lab()
    planned = plan_frontier(lab, model, rows.task(task), values, seed, words(procedures), asked, draws)
    cells = [cell for one in planned for cell in one.cells]
    if run.dry_run:
        print_plan(lab, cells, run.as_json)
        return
    lab.run(cells)
    found = measure_frontier(lab, planned, batch, length, rounds)
    picked = None if target is None else found.pick(target)
    if out is not None:
        from tombola.report.frontier import frontier_page

        out.write_text(frontier_page(found), encoding="utf-8")
        say(f"The page: {out.resolve()}")
    if run.as_json:
        print_json(found.as_json() | {"picked": None if picked is None else picked.cell})
        return
    dense = found.points[0]
    table = [
        (
            one.procedure, f"{one.floor:g}", f"{one.sparsity:.3f}", f"{one.score:.3f}", maybe(one.random),
            f"{1e3 * one.seconds.median:.1f}", f"{one.against_dense.median:.2f}", f"{one.parameters / dense.parameters:.2f}",
            "dominated" if one.dominated else "", one.cell[:12],
        )
        for one in found.points
    ]  # fmt: skip
    columns = ("procedure", "floor", "sparsity", found.metric, "random", "ms", "time", "parameters", "", "cell")
    print_table(f"{found.model}, {found.task}: {batch}x{length}, noise {dense.noise:.2f}", columns, table)
    if picked is not None:
        print(f"{target}: {picked.procedure} at floor {picked.floor:g}, cell {picked.cell[:12]}")
        say(f"Next: tombola ship {picked.cell[:12]} OUT --store {run.store}")
