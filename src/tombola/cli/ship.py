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
    SeedsOption,
    StoreOption,
    TicketArgument,
    TrainingSettings,
    make_lab,
    numbers,
    quiet,
    split_seeds,
    words,
)
from tombola.terminal import megabytes, print_json, print_plan, print_table, say


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
    tune_masks: Annotated[
        bool, typer.Option("--tune-masks", help="Scale what is kept by least squares on the selection rows (Kwon et al. 2022).")
    ] = False,
    store: StoreOption = STORE,
    data: DataOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a ticket's model as files for others, smaller where it can be, proved equal to the masked model, or not at all."""
    from tombola.errors import SettingsError, TombolaError
    from tombola.export import foretell, refuse
    from tombola.export import ship as write
    from tombola.study.jobs import tested_ticket, tuned_factors

    if groups not in ("refuse", "fill"):
        raise SettingsError([TombolaError("unknown way with groups", got=groups, expected="refuse or fill")])
    if tune_masks and weights != "found_on":
        problem = TombolaError("masks are tuned on the weights they were found on", got=weights, expected="--weights found_on")
        raise SettingsError([problem])
    refuse(out, to, with_code)
    lab = make_lab(store, data)
    taken = tested_ticket(lab, ticket)
    if (said := foretell(taken, to)) is not None:
        say(said)
    factors = tuned_factors(lab, ticket) if tune_masks else None
    shipped = write(taken, out, to, weights, groups=groups, code=with_code, factors=factors)  # type: ignore[arg-type]
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
    from tombola.hub import hub_files, push_to_hub

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
            t.against_dense.text, f"{t.noise:.2f}",
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
    procedures: Annotated[str, typer.Option(help="Of s-prune, separated by commas.")] = "joint,heads+neurons,layers",
    floors: Annotated[
        str | None, typer.Option(help="Shares of the full score to go down to.  [default: 0.95,0.9,0.8,0.6]")
    ] = None,
    sparsities: Annotated[str | None, typer.Option(help="Removed shares to go down to, whatever the score.")] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train tickets and controls again from the base; that score counts.")
    ] = False,
    tune_masks: Annotated[
        bool, typer.Option("--tune-masks", help="Scale what they keep by least squares instead; that score counts.")
    ] = False,
    draws: Annotated[int, typer.Option(help="Random controls of each ticket.", min=0)] = 2,
    seeds: SeedsOption = "0",
    shape: Annotated[str, typer.Option(help="What is timed: ROWSxTOKENS.")] = "8x128",
    rounds: Annotated[int, typer.Option(help="Rounds of turns of the clock.", min=1)] = 9,
    target: Annotated[str | None, typer.Option(help='Pick the ticket for it: "50 ms", or "1 point" lost.')] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the page of its cells here.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table as Markdown.")] = False,
    training: TrainingSettings,
    rows: OwnRows,
    run: Running,
) -> None:
    """Score against latency and size: tickets of several procedures, shrunk and timed, with random controls of their sizes."""
    from tombola.errors import SettingsError, TombolaError
    from tombola.study.frontier import read_target
    from tombola.study.frontier_cells import FLOORS, measure_frontier, plan_frontier

    try:
        shares = [float(one) for one in words(sparsities or "")]
        asked = [float(one) for one in words(floors or "")] or ([] if shares else list(FLOORS))
        batch, length = (int(one) for one in shape.split("x"))
    except ValueError:
        got = f"{floors}, {sparsities}, {shape}"
        problem = TombolaError("--floors, --sparsities or --shape cannot be read", got=got, expected="0.9,0.8 and 8x128")
        raise SettingsError([problem]) from None
    if target is not None:
        read_target(target)  # what is no target is said before anything runs
    values, own = split_seeds(training.given() | run.settings())
    lab = run.lab()
    planned = plan_frontier(
        lab, model, rows.task(task), values, numbers(seeds), words(procedures), asked, shares, draws, retrain, tune_masks, own
    )
    cells = [cell for one in planned for cell in one.cells]
    if run.dry_run:
        print_plan(lab, cells, run.as_json)
        return
    lab.run(cells)
    found = measure_frontier(lab, planned, batch, length, rounds)
    if out is not None:
        from tombola.report import build_page
        from tombola.study.results import collect

        say(f"The page: {build_page(collect(lab.store, {cell.key for cell in cells}), out).resolve()}")
    picked = None if target is None else found.pick(target)
    if run.as_json:
        print_json(found.as_json() | {"picked": None if picked is None else picked.cells[0]})
        return
    dense = found.points[0]
    if markdown:
        from tombola.report.about_frontier import frontier_table
        from tombola.report.export import markdown as written

        print(written(frontier_table([found])), end="")
    table = [
        (
            one.goal, f"{one.sparsity:.3f}", one.score.text, "" if one.random is None else one.random.text,
            f"{1e3 * one.seconds.median:.1f}", one.against_dense.text, f"{one.flops / dense.flops:.2f}",
            f"{one.parameters / dense.parameters:.2f}", "dominated" if one.dominated else "", one.cells[0][:12],
        )
        for one in found.points
    ]  # fmt: skip
    columns = ("ticket", "sparsity", found.metric, "random", "ms", "time", "operations", "parameters", "", "cell")
    if not markdown:
        print_table(f"{found.model}, {found.task}: {batch}x{length}, noise {dense.noise:.2f}", columns, table)
    if picked is not None:
        print(f"{target}: {picked.goal}, cell {picked.cells[0][:12]}")
        if picked is not dense:
            say(f"Next: tombola ship {picked.cells[0][:12]} OUT --store {run.store}")
