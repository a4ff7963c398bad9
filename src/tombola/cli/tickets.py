"""What is done with a ticket: controls, retrain, evaluate, compare; and import, which makes one of another code's mask."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tombola.cli.options import (
    STORE,
    JsonOption,
    OtherTaskArgument,
    OwnRows,
    PresetOption,
    Running,
    StoreOption,
    TicketArgument,
    make_lab,
    quiet,
    refuse_filled,
    words,
)
from tombola.errors import TombolaError
from tombola.terminal import maybe, print_json, print_overlaps, print_plan, print_scores, print_table, say, ticket_json

if TYPE_CHECKING:
    from tombola.study.cells import Cell, Lab


def controls(
    ticket: TicketArgument,
    *,
    kinds: Annotated[
        str, typer.Option(help="Kinds of control, separated by commas; README.md lists them.")
    ] = "random,bad,strict-bad",
    draws: Annotated[int, typer.Option(help="Independent draws of each kind.")] = 3,
    retrain: Annotated[bool, typer.Option("--retrain", help="Also train the controls and the ticket from the base.")] = False,
    preset: PresetOption = None,
    rows: OwnRows,
    run: Running,
) -> None:
    """Draw control tickets of exactly the same size and score them beside the good one, with what they share with it."""
    from tombola.study.jobs import dense_of, read_ticket, refuse_unused, resolve_ticket, test_settings
    from tombola.study.runs import plan_controls, plan_test

    lab = run.lab()
    rows.bring(lab, ticket)
    taken, dense = resolve_ticket(lab, ticket), dense_of(lab, ticket)
    refuse_unused(lab, ticket, run.settings(), "controls", ("control", "retrain"))
    settings = test_settings(read_ticket(lab, ticket), run.settings(), preset)
    planned = [plan_test(taken, dense, settings.retrain, retrain=retrain)]
    planned += plan_controls(taken, dense, words(kinds), draws, settings, retrain=retrain)
    cells = [dense, *(cell for one in planned for cell in one.cells)]
    if run.dry_run:
        print_plan(lab, cells, run.as_json)
        return
    lab.run(cells)
    if run.as_json:
        print_json({"controls": [ticket_json(lab, one.ticket, (one.pruned, one.retrained)) for one in planned]})
        return
    print_scores(lab, cells)
    print_overlaps(lab, planned[1:])


def retrain(
    ticket: TicketArgument,
    task: OtherTaskArgument = None,
    *,
    out: Annotated[Path | None, typer.Option(help="Also write the retrained weights here.")] = None,
    rows: OwnRows,
    run: Running,
) -> None:
    """Train the ticket's subnetwork from the base on TASK, the mask held, exactly as the dense model was trained."""
    from tombola.study.jobs import plan_retrain_on

    refuse_filled(out)
    lab = run.lab()
    cell = plan_retrain_on(lab, ticket, rows.other_task(lab, ticket, task), run.settings())
    folder = _run_one(lab, cell, run)
    if folder is not None and out is not None:
        import shutil

        shutil.copytree(folder / "weights", out, dirs_exist_ok=True)
        say(f"weights in {out}")


def evaluate(
    ticket: TicketArgument,
    task: OtherTaskArgument = None,
    *,
    weights: Annotated[str, typer.Option(help="base, found_on, or a folder.")] = "found_on",
    rows: OwnRows,
    run: Running,
) -> None:
    """Score a ticket's mask on given weights, nothing trained, beside the dense model and the majority line."""
    from tombola.study.jobs import plan_evaluate

    lab = run.lab()
    cell = plan_evaluate(lab, ticket, rows.other_task(lab, ticket, task), weights, run.settings())
    if _run_one(lab, cell, run) is not None and not run.as_json:
        say(f"weights: {weights}")


def _run_one(lab: "Lab", cell: "Cell", run: Running) -> Path | None:
    """Runs one cell and prints its scores; its folder, or None on a dry run."""
    from tombola.study.cells import read_rows

    if run.dry_run:
        print_plan(lab, [cell], run.as_json)
        return None
    (folder,) = lab.run([cell])
    if run.as_json:
        print_json({"cell": cell.key, "scores": read_rows(folder / "scores.jsonl")})
    else:
        print_scores(lab, [cell])
    return folder


def compare(
    tickets: Annotated[list[str], typer.Argument(help="Two or more tickets: folders or starts of keys.")],
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Sizes of tickets, what they share, and what masks of these sizes would share by chance."""
    from tombola.study.jobs import compare as compare_tickets

    said = compare_tickets(make_lab(store), tickets)
    if as_json:
        print_json(said)
        return
    rows = [(t["ticket"], t["kind"], t["task"], f"{t['sparsity']:.3f}", str(t["kept"])) for t in said["tickets"]]
    print_table("tickets", ("ticket", "kind", "task", "sparsity", "kept"), rows)
    pairs = [
        (p["a"], p["b"], p["part"], f"{p['shared']} of {p['size_a']} and {p['size_b']}", maybe(p["expected_shared"], 1),
         maybe(p["jaccard"]), maybe(p["p_at_least"]), p["note"])
        for p in said["pairs"]
    ]  # fmt: skip
    print_table("overlap", ("a", "b", "part", "shared", "by chance", "Jaccard", "p(≥ shared)", ""), pairs)
    for part, kappa in said["fleiss_kappa"].items():
        ends = "" if kappa["low"] is None else f"({maybe(kappa['low'])} to {maybe(kappa['high'])}) "
        print(f"Fleiss kappa, {part}: {maybe(kappa['value'])} {ends}{kappa['note']}".rstrip())


def import_(
    model: Annotated[str, typer.Argument(help="The base the mask is for: demo, a local folder, or a Hub name.")],
    out: Annotated[Path, typer.Option(help="Where the ticket goes.")],
    heads: Annotated[Path | None, typer.Option(help="File with one array [layer, head] of 0 and 1.")] = None,
    mlps: Annotated[Path | None, typer.Option(help="File with one array [layer].")] = None,
    values: Annotated[Path | None, typer.Option(help="File with an array for each masked parameter.")] = None,
    layout: Annotated[
        str, typer.Option(help="names, torch-prune (…_mask entries), or a JSON file {their name: parameter or null}.")
    ] = "names",
    ones: Annotated[str, typer.Option(help="What a 1 means: kept or removed.")] = "kept",
    found_on: Annotated[Path | None, typer.Option(help="Folder of the weights the mask was found on.")] = None,
    task: Annotated[str | None, typer.Option(help="The task it was found for; its class names go into the ticket.")] = None,
    seed: Annotated[int, typer.Option(help="The run seed of what is trained with it.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Make a ticket of a mask that other code wrote: .npy, .npz, .pt, .safetensors, read as data and never run."""
    from tombola.legacy import import_ticket
    from tombola.tasks import get_task

    refuse_filled(out)
    quiet()
    absent = [str(path) for path in (heads, mlps, values, found_on) if path is not None and not path.exists()]
    if absent:
        raise TombolaError("there are no such files", got=", ".join(absent), expected="files that exist")
    ticket = import_ticket(
        model, heads=heads, mlps=mlps, values=values, layout=layout, ones=ones, found_on=found_on,
        task=task, labels=() if task is None else get_task(task).labels, seed=seed,
    )  # fmt: skip
    ticket.save_pretrained(out)
    kept = ticket.mask.counts_by_type()
    if as_json:
        print_json({"folder": str(out), "identity": ticket.identity, "kept": kept, "sparsity": ticket.sparsity})
        return
    print(f"{out}: keeps {', '.join(f'{k:,} of {n:,} {part}' for part, (k, n) in kept.items())}; sparsity {ticket.sparsity:.4f}")
