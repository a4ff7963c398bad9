"""The command line: one verb per public function. Results on stdout, progress and messages on stderr.

Heavy libraries are imported inside the verbs, so that `--help` answers at once. A TombolaError ends a verb with one message
and exit code 2; an interrupted verb goes on where it was when the same command is given again.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tombola.cli_study import study_app
from tombola.errors import SettingsError, TombolaError
from tombola.terminal import (
    Progress,
    maybe,
    megabytes,
    print_json,
    print_ladder,
    print_overlaps,
    print_plan,
    print_scores,
    print_table,
    say,
)

if TYPE_CHECKING:
    from tombola.study.cells import Cell, Lab
    from tombola.tasks import Task

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    help="Lottery tickets for pre-trained transformers: find them, test them honestly, compare, retrain, keep every result.",
)
store_app = typer.Typer(no_args_is_help=True, help="Look after a folder of results.")
app.add_typer(store_app, name="store")
app.add_typer(study_app, name="study")

StoreOption = Annotated[Path, typer.Option("--store", help="Folder of results.")]
DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder with <task>/<split>.jsonl.gz; without it, the Hub is read.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Say what would run and about how long; compute nothing.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Any setting by name, NAME=VALUE; repeatable. `tombola find --help` has the common ones."),
]
PresetOption = Annotated[
    str | None, typer.Option("--preset", help="paper, released or corrected: all settings not given.  [default: corrected]")
]
BudgetOption = Annotated[
    float | None, typer.Option("--disk-budget", help="Start nothing more when the store holds so many GB.", min=0)
]
# Of the tasks `files` and `hub:<name>`; of a Hub data set the first three name splits.
TrainOption = Annotated[str | None, typer.Option("--train", help="files: rows to train on: csv, tsv, jsonl, parquet, or .gz.")]
ValidationOption = Annotated[str | None, typer.Option("--validation", help="files: rows to report on.")]
TestOption = Annotated[
    str | None, typer.Option("--test", help="files: report on these instead, and choose masks on the validation rows.")
]
TextOption = Annotated[str | None, typer.Option("--text", help="files: column the model reads, or two: a,b.")]
LabelOption = Annotated[str | None, typer.Option("--label", help="files: column of the answer.")]
RegressionOption = Annotated[bool, typer.Option("--regression", help="files: answers are numbers, not classes.")]
MetricOption = Annotated[
    str | None, typer.Option("--metric", help="files: accuracy, matthews, f1; with --regression pearson, spearman.")
]
STORE = Path("tombola-store")


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


# ---------------------------------------------------------------------------------------------------------------- verbs


@app.command()
def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where results and page go.")] = Path("tombola-demo"),
    task: Annotated[
        str, typer.Option(help="A generated task; the others need data.")
    ] = "nli-overlap:train_rows=2000,report_rows=400,challenge_rows=300",
    seeds: Annotated[str, typer.Option(help="Run seeds, separated by commas.")] = "0,1",
) -> None:
    """The main job in a few minutes, offline: tickets of a real 6-layer BERT against their controls, and a page to look at."""
    from tombola.study.jobs import plan_controls, plan_find, plan_test
    from tombola.study.settings import resolve

    run_seeds = _numbers(seeds)
    settings = resolve(DEMO_SETTINGS, run_seeds)
    lab = _open(folder / "store", None)
    found = plan_find(lab, "demo", task, settings, run_seeds)
    cells = [cell for one in found for cell in one.cells]
    for one in found:
        tested = [plan_test(one.search, one.dense, retrain=True)]
        tested += plan_controls(one.search, one.dense, DEMO_CONTROLS, 1, settings, retrain=True)
        cells += [cell for each in tested for cell in each.cells]
    lab.run(cells)
    print_scores(lab, cells)
    page = _page(lab, folder / "page.html")
    say(f"\nThe page: {page.resolve()}\nThe same command again takes seconds: every result is kept in {folder / 'store'}.")
    say("Next: tombola find --help, and README.md for your own model and task.")


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """What is installed, where it runs, and whether it works: versions, extras, devices, a self-test in seconds."""
    from dataclasses import asdict

    from tombola.doctor import diagnose

    findings = diagnose()
    if as_json:
        print_json([asdict(one) for one in findings])
    else:
        print_table("tombola doctor", ("", "what", "found"), [("ok" if f.good else "BAD", f.what, f.said) for f in findings])
    bad = [one for one in findings if not one.good]
    if bad:
        raise TombolaError(
            f"{len(bad)} of {len(findings)} findings are not good",
            got="; ".join(f"{one.what}: {one.said}" for one in bad),
            next="install what is missing; a failed self-test is worth an issue",
        )


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name.")],
    layout: Annotated[
        Path | None, typer.Option(help="YAML file that says where the parts of a layer are; proved like what is found.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """What a model is made of: layers, heads, kv-heads, MLP widths, and how many values a mask of each scope has."""
    from tombola.anatomy import Layout, read_anatomy
    from tombola.scope import scope_sizes
    from tombola.ticket import load_weights, resolve_model

    _quiet()
    source = resolve_model(model)
    loaded = load_weights(source.folder, ("0", "1"), head_seed=0)
    anatomy = read_anatomy(loaded, None if layout is None else Layout.from_yaml(layout))
    said = anatomy.summary()
    heads, mlps = anatomy.n_heads * sum(said["values_per_head"]), sum(said["values_per_mlp"])
    scopes = {"heads": heads, "mlps": mlps, "heads+mlps": heads + mlps} | scope_sizes(loaded, anatomy)
    if as_json:
        identity = {"model": source.name, "revision": source.revision, "fingerprint": source.fingerprint}
        print_json(identity | said | {"maskable_values": scopes})
        return
    print_table(
        f"{source.name}: {said['model_type']}, proved numerically",
        ("layers", "heads", "kv-heads", "d_head", "d_model", "d_ffn", "parameters*"),
        [[f"{said[name]:,}" for name in ("layers", "heads", "kv_heads", "d_head", "d_model", "d_ffn", "total_parameters")]],
    )
    shares = [(name, f"{n:,}", f"{n / said['total_parameters']:.3f}") for name, n in scopes.items()]
    print_table("maskable values", ("scope", "values", "share of all parameters*"), shares)
    print("* with a 2-class head")


@app.command()
def find(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name (pinned to a commit, recorded).")],
    task: Annotated[
        str,
        typer.Argument(
            help="One of GLUE (cola sst2 mrpc qqp stsb mnli qnli rte wnli, [:train=SPLIT,report=SPLIT]), acceptability, "
            "nli-overlap[:strength=0.9], files (--train --validation --text --label), or hub:NAME[:CONFIG]."
        ),
    ],
    method: Annotated[str, typer.Option(help="s-prune (heads, MLPs), m-prune (values, to a floor), one-shot.")] = "s-prune",
    preset: PresetOption = None,
    floor: Annotated[
        float | None, typer.Option(help="Share of the full score a ticket must hold, in (0, 1].  [default: 0.9]")
    ] = None,
    floor_rule: Annotated[str | None, typer.Option(help="fraction_of_full or fraction_above_baseline.")] = None,
    procedure: Annotated[str | None, typer.Option(help="s-prune: joint, heads or mlps.")] = None,
    sparsity: Annotated[float | None, typer.Option(help="one-shot: removed share of the maskable values, in [0, 1).")] = None,
    scope: Annotated[
        str | None, typer.Option(help="Which values are maskable, see `tombola inspect`; body:weights+pooler …")
    ] = None,
    criterion: Annotated[str | None, typer.Option(help="magnitude, random, taylor or taylor-signed.")] = None,
    granularity: Annotated[str | None, typer.Option(help="Values compete globally or per_matrix.")] = None,
    seeds: Annotated[str, typer.Option(help="Run seeds, separated by commas.")] = "0",
    train_rows: Annotated[int | None, typer.Option(help="Train on at most so many rows.")] = None,
    selection_rows: Annotated[int | None, typer.Option(help="Choose the mask on at most so many rows.")] = None,
    epochs: Annotated[int | None, typer.Option(help="[default: 3]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="[default: 2e-5]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="[default: 32]")] = None,
    setting: SetOption = None,
    kinds: Annotated[str, typer.Option("--controls", help="Also draw controls of these kinds, separated by commas.")] = "",
    draws: Annotated[int, typer.Option(help="Independent draws of each kind of control.")] = 1,
    retrain: Annotated[bool, typer.Option("--retrain", help="Also train ticket and controls from the base.")] = False,
    ladder: Annotated[
        str | None, typer.Option(help="A:B, two presets: what each option in which they differ costs, one at a time.")
    ] = None,
    data: DataOption = None,
    train: TrainOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    regression: RegressionOption = False,
    metric: MetricOption = None,
    store: StoreOption = STORE,
    budget: BudgetOption = None,
    out: Annotated[Path | None, typer.Option(help="Also write the ticket here (one folder per seed if several).")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune MODEL on TASK, then search for a ticket: one for each seed. --controls and --retrain test it in the same run."""
    from tombola.study.jobs import found_ticket, implied, plan_controls, plan_find, plan_ladder, plan_test
    from tombola.study.settings import resolve

    given = {
        "floor": floor, "floor_rule": floor_rule, "procedure": procedure, "sparsity": sparsity, "scope": scope,
        "criterion": criterion, "granularity": granularity, "train_rows": train_rows, "selection_rows": selection_rows,
        "epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size,
    }  # fmt: skip
    run_seeds, control_kinds = _numbers(seeds), _words(kinds)
    values, own = _split_seeds({name: value for name, value in given.items() if value is not None} | _assignments(setting))
    own_rows = _given(train, validation, test, text, label, regression, metric)
    asked = _task(task, own_rows)
    values = {**implied(asked), **values}
    if ladder is not None:
        _refuse_with_ladder(preset, out)
        lab = _open(store, data, budget=budget)
        rungs = plan_ladder(
            lab, model, asked, ladder, values, run_seeds, own, method=method, kinds=control_kinds, draws=draws, retrain=retrain
        )
        cells = [cell for rung in rungs for cell in rung.cells]
        if dry_run:
            print_plan(lab, cells, as_json)
            return
        lab.run(cells)
        print_ladder(lab, rungs, as_json)
        return
    settings = resolve(values, run_seeds, own, method=method, preset=preset or "corrected")
    targets = _targets(out, run_seeds)
    lab = _open(store, data, budget=budget)
    planned = plan_find(lab, model, asked, settings, run_seeds)
    cells = [cell for found in planned for cell in found.cells]
    for one in planned:
        tested = [plan_test(one.search, one.dense, settings.retrain, retrain=True)] if retrain else []
        tested += plan_controls(one.search, one.dense, control_kinds, draws, settings, retrain=retrain) if control_kinds else []
        cells += [cell for each in tested for cell in each.cells]
    if dry_run:
        print_plan(lab, cells, as_json)
        return
    lab.run(cells)
    for one, target in zip(planned, targets, strict=True):
        if target is not None:
            found_ticket(lab, one).save_pretrained(target)
    if as_json:
        said = [_ticket_json(lab, one.search, (one.dense, one.pruned)) for one in planned]
        folders = [{"folder": None if target is None else str(target)} for target in targets]
        print_json({"tickets": [one | where for one, where in zip(said, folders, strict=True)]})
        return
    print_scores(lab, cells)
    for one, target in zip(planned, targets, strict=True):
        say(f"seed {one.seed}: ticket {one.search.key[:12]}" + (f" in {target}" if target else ""))
    name = targets[0] or planned[0].search.key[:12]
    again = "".join(f" --{which} {own_rows[which]}" for which in ("train", "validation", "test") if which in own_rows)
    say(f"Next: tombola controls {name} --store {store}" + (f" --data {data}" if data else "") + again)


@app.command()
def controls(
    ticket: Annotated[str, typer.Argument(help="A ticket's folder, or the start of its cell's key.")],
    kinds: Annotated[
        str, typer.Option(help="Kinds of control, separated by commas; README.md lists them.")
    ] = "random,bad,strict-bad",
    draws: Annotated[int, typer.Option(help="Independent draws of each kind.")] = 3,
    retrain: Annotated[bool, typer.Option("--retrain", help="Also train the controls and the ticket from the base.")] = False,
    preset: PresetOption = None,
    setting: SetOption = None,
    data: DataOption = None,
    train: TrainOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    regression: RegressionOption = False,
    metric: MetricOption = None,
    store: StoreOption = STORE,
    budget: BudgetOption = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw control tickets of exactly the same size and score them beside the good one, with what they share with it."""
    from tombola.study.jobs import dense_of, plan_controls, plan_test, read_ticket, resolve_ticket, test_settings

    lab = _open(store, data, budget=budget)
    _bring_rows(lab, ticket, _given(train, validation, test, text, label, regression, metric))
    taken, dense = resolve_ticket(lab, ticket), dense_of(lab, ticket)
    settings = test_settings(read_ticket(lab, ticket), _assignments(setting), preset)
    planned = [plan_test(taken, dense, settings.retrain, retrain=retrain)]
    planned += plan_controls(taken, dense, _words(kinds), draws, settings, retrain=retrain)
    cells = [dense, *(cell for one in planned for cell in one.cells)]
    if dry_run:
        print_plan(lab, cells, as_json)
        return
    lab.run(cells)
    if as_json:
        print_json({"controls": [_ticket_json(lab, one.ticket, (one.pruned, one.retrained)) for one in planned]})
        return
    print_scores(lab, cells)
    print_overlaps(lab, planned[1:])


@app.command()
def retrain(
    ticket: Annotated[str, typer.Argument(help="A ticket's folder, or the start of its cell's key.")],
    task: Annotated[str | None, typer.Argument(help="The task; without it, the ticket's own.")] = None,
    setting: SetOption = None,
    data: DataOption = None,
    train: TrainOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    regression: RegressionOption = False,
    metric: MetricOption = None,
    store: StoreOption = STORE,
    out: Annotated[Path | None, typer.Option(help="Also write the retrained weights here.")] = None,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Train the ticket's subnetwork from the base on TASK, the mask held, exactly as the dense model was trained."""
    from tombola.study.jobs import plan_retrain_on

    _refuse_filled(out)
    lab = _open(store, data)
    asked = _other_task(lab, ticket, task, _given(train, validation, test, text, label, regression, metric))
    cell = plan_retrain_on(lab, ticket, asked, _assignments(setting))
    folder = _run_one(lab, cell, dry_run, as_json)
    if folder is not None and out is not None:
        import shutil

        shutil.copytree(folder / "weights", out, dirs_exist_ok=True)
        say(f"weights in {out}")


@app.command()
def evaluate(
    ticket: Annotated[str, typer.Argument(help="A ticket's folder, or the start of its cell's key.")],
    task: Annotated[str | None, typer.Argument(help="The task; without it, the ticket's own.")] = None,
    weights: Annotated[str, typer.Option(help="base, found_on, or a folder.")] = "found_on",
    setting: SetOption = None,
    data: DataOption = None,
    train: TrainOption = None,
    validation: ValidationOption = None,
    test: TestOption = None,
    text: TextOption = None,
    label: LabelOption = None,
    regression: RegressionOption = False,
    metric: MetricOption = None,
    store: StoreOption = STORE,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score a ticket's mask on given weights, nothing trained, beside the dense model and the majority line."""
    from tombola.study.jobs import plan_evaluate

    lab = _open(store, data)
    asked = _other_task(lab, ticket, task, _given(train, validation, test, text, label, regression, metric))
    _run_one(lab, plan_evaluate(lab, ticket, asked, weights, _assignments(setting)), dry_run, as_json)
    if not as_json and not dry_run:
        say(f"weights: {weights}")


@app.command()
def compare(
    tickets: Annotated[list[str], typer.Argument(help="Two or more tickets: folders or starts of keys.")],
    store: StoreOption = STORE,
    as_json: JsonOption = False,
) -> None:
    """Sizes of tickets, what they share, and what masks of these sizes would share by chance."""
    from tombola.study.jobs import compare as compare_tickets

    lab = _open(store, None)
    said = compare_tickets(lab, tickets)
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
        print(f"Fleiss kappa, {part}: {maybe(kappa['value'])} {kappa['note']}".rstrip())


@app.command("import")
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

    _refuse_filled(out)
    _quiet()
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


@app.command()
def report(
    store: Annotated[Path, typer.Argument(help="Folder of results.")] = STORE,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("page.html"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the score table as Markdown instead.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the score table as LaTeX instead.")] = False,
) -> None:
    """Everything a store holds as one offline HTML page."""
    from tombola.report.build import latex_table, markdown_table
    from tombola.study.results import collect

    lab = _open(store, None, reads=True)
    if markdown or latex:
        print((markdown_table if markdown else latex_table)(collect(lab.store)))
        return
    say(f"The page: {_page(lab, out).resolve()}")


@store_app.command("ls")
def store_ls(store: Annotated[Path, typer.Argument()] = STORE, as_json: JsonOption = False) -> None:
    """The finished cells: what each is, how large, when."""
    from tombola.study.cells import cell_of
    from tombola.study.steps import STEPS

    lab = _open(store, None, reads=True)
    entries = sorted(lab.store.entries(), key=lambda entry: entry.finished)
    if as_json:
        print_json([{"key": e.key, "cell": e.describe, "bytes": e.bytes, "finished": e.finished.isoformat()} for e in entries])
        return
    rows = [(e.key[:12], STEPS[e.step].title(cell_of(e)), megabytes(e.bytes), f"{e.finished:%Y-%m-%d %H:%M:%S}") for e in entries]
    print_table(f"{len(rows)} cells, {megabytes(sum(e.bytes for e in entries))}", ("key", "cell", "size", "finished"), rows)


@store_app.command("verify")
def store_verify(store: Annotated[Path, typer.Argument()] = STORE) -> None:
    """Hash every file again. Exit code 2 when something is not what it was; the next run computes it anew."""
    lab = _open(store, None, reads=True)
    problems = lab.store.verify()
    if problems:
        shown = "\n            ".join(map(str, problems))
        raise TombolaError(
            f"{len(problems)} files of {store} are damaged",
            got=shown,
            next="give the command that made them again: damaged cells are moved aside and recomputed",
        )
    print(f"{sum(1 for _ in lab.store.entries())} cells, every file as it was written")


@store_app.command("gc")
def store_gc(
    store: Annotated[Path, typer.Argument()] = STORE,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go; remove nothing.")] = False,
    unfinished: Annotated[bool, typer.Option("--unfinished", help="Also what killed runs could go on from.")] = False,
) -> None:
    """Remove what no command needs: attempts of dead processes, stale locks, damaged cells. Finished cells stay."""
    lab = _open(store, None, reads=True)
    plan = lab.store.gc(dry_run=dry_run, unfinished=unfinished)
    print_table(
        f"{'would free' if dry_run else 'freed'} {megabytes(plan.bytes)}",
        ("kind", "path", "size"),
        [(one.kind, str(one.path), megabytes(one.bytes)) for one in plan.garbage],
    )
    if plan.kept:
        held = sum(one.bytes for one in plan.kept)
        print(f"{megabytes(held)} of {len(plan.kept)} unfinished runs stay, to be gone on from; --unfinished removes them")


# -------------------------------------------------------------------------------------------------------------- reading

# Fixed by measurement, so that the whole demo takes a few minutes on two cores (see docs/lab-log.md).
DEMO_CONTROLS = ("random", "bad")
DEMO_SETTINGS: dict[str, Any] = {"train_rows": 800, "epochs": 1, "learning_rate": 1e-4, "batch_size": 16}


def _given(
    train: str | None, validation: str | None, test: str | None, text: str | None, label: str | None, regression: bool,
    metric: str | None,
) -> dict[str, Any]:  # fmt: skip
    """What was said of the user's own rows, by the name of each option."""
    said = {"train": train, "validation": validation, "test": test, "text": text, "label": label, "metric": metric}
    return {name: value for name, value in said.items() if value is not None} | ({"regression": True} if regression else {})


def _task(name: str, own_rows: Mapping[str, Any]) -> "str | Task":
    """The task a user names, its own rows read where it has such."""
    from tombola.tasks import files_task, hub_task

    if name.startswith("hub:") and "#" not in name:
        _quiet()
        task = hub_task(name, **own_rows)
    elif name == "files":
        lacking = [f"--{option}" for option in ("train", "validation", "text", "label") if option not in own_rows]
        if lacking:
            raise TombolaError(
                "the task `files` needs to know its files and columns",
                got=", ".join(f"--{option}" for option in own_rows) or "none of its options",
                expected="--train FILE --validation FILE [--test FILE] --text COLUMN[,COLUMN] --label COLUMN",
                next=f"add {' '.join(lacking)}",
            )
        task = files_task(**own_rows)
    elif own_rows:
        raise TombolaError(
            f"task {name} has rows and columns of its own",
            got=", ".join(f"--{option}" for option in own_rows),
            expected="these options with the task files or hub:NAME",
        )
    else:
        return name
    for doubt in task.doubts:
        say(doubt)
    return task


def _other_task(lab: "Lab", ticket: str, name: str | None, own_rows: Mapping[str, Any]) -> "str | Task | None":
    """The task named after a ticket; None for the ticket's own, its rows brought where they were given."""
    if name is not None:
        return _task(name, own_rows)
    _bring_rows(lab, ticket, own_rows)
    return None


def _bring_rows(lab: "Lab", ticket: str, own_rows: Mapping[str, Any]) -> None:
    """Reads the files of a ticket's own task, whose columns and metric the ticket remembers."""
    from tombola.study.data import named
    from tombola.study.jobs import read_ticket

    if own_rows:
        known = read_ticket(lab, ticket).settings.get("data", {}).get("source")
        if known is None or "repo" in known:
            raise TombolaError("this ticket is of no files of your own", got=ticket, next="leave --train, --validation … out")
        said = {"text": known["text"], "label": known["label"], "metric": known["metric"]}
        regression = {"regression": True} if len(known["labels"]) == 1 else {}
        named(lab, _task("files", {**said, **regression, **own_rows}))


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise SettingsError([TombolaError("seeds are not whole numbers", got=text, expected="for example 0,1,2")]) from None


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _refuse_with_ladder(preset: str | None, out: Path | None) -> None:
    given = [f"--{name}" for name, value in (("preset", preset), ("out", out)) if value is not None]
    if given:
        raise TombolaError(
            "a ladder has presets of its own and makes many tickets", got=" and ".join(given), expected="--ladder without them"
        )


def _assignments(given: Sequence[str] | None) -> dict[str, Any]:
    """NAME=VALUE as a mapping; a value that reads as JSON is taken as such, else as text."""
    values: dict[str, Any] = {}
    problems: list[TombolaError] = []
    for one in given or ():
        name, equals, text = one.partition("=")
        if not equals or not name:
            problems.append(TombolaError("--set takes NAME=VALUE", got=one, expected="for example --set epochs=2"))
            continue
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        values[name.strip().replace("-", "_")] = value
    if problems:
        raise SettingsError(problems)
    return values


def _split_seeds(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, int]]:
    """Settings, and the four own seeds (`--set head_seed=3`) apart from them."""
    four = {f"{name}_seed": name for name in ("head", "data", "dropout", "mask")}
    return {n: v for n, v in values.items() if n not in four}, {four[n]: v for n, v in values.items() if n in four}


def _targets(out: Path | None, seeds: Sequence[int]) -> list[Path | None]:
    """Where each seed's ticket is to be written. Refused before anything runs when something else lies there."""
    targets = [None if out is None else out if len(seeds) == 1 else out / f"seed-{seed}" for seed in seeds]
    for target in targets:
        _refuse_filled(target, but="ticket.json")
    return targets


def _refuse_filled(folder: Path | None, but: str = "") -> None:
    if folder is None or not folder.exists():
        return
    if not folder.is_dir() or (any(folder.iterdir()) and not (but and (folder / but).is_file())):
        raise TombolaError(f"{folder} is not empty", expected="a new or empty folder", next="name another folder with --out")


def _open(store: Path, data: Path | None, *, reads: bool = False, budget: float | None = None) -> "Lab":
    """The lab of one verb: a store, the data, progress on stderr. A verb that only reads refuses a store that is not there."""
    from tombola.store import Store
    from tombola.study.cells import Lab

    _quiet()
    if data is not None and not data.is_dir():
        raise TombolaError("there is no such data folder", got=str(data), expected="a folder with <task>/<split>.jsonl.gz")
    if reads and not store.is_dir():
        raise TombolaError(
            "there is no such store", got=str(store), expected="a folder of results", next="tombola find makes one"
        )
    progress = Progress()
    most = None if budget is None else round(budget * 1e9)
    return Lab(Store(store, on_message=progress.say, budget=most), data, progress)


def _quiet() -> None:
    """transformers' own bars and notes off: what matters is said here."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _page(lab: "Lab", out: Path) -> Path:
    from tombola.report.build import build_page
    from tombola.study.results import collect

    try:
        return build_page(collect(lab.store), out)
    except OSError as error:
        raise TombolaError(f"{out} cannot be written", got=error.strerror, next="name another file with --out") from error


def _run_one(lab: "Lab", cell: "Cell", dry_run: bool, as_json: bool) -> Path | None:
    """Runs one cell and prints its scores; its folder, or None on a dry run."""
    from tombola.study.cells import read_rows

    if dry_run:
        print_plan(lab, [cell], as_json)
        return None
    (folder,) = lab.run([cell])
    if as_json:
        print_json({"cell": cell.key, "scores": read_rows(folder / "scores.jsonl")})
    else:
        print_scores(lab, [cell])
    return folder


def _ticket_json(lab: "Lab", taken: "Cell | Given", scored: "Sequence[Cell | None]") -> dict[str, Any]:
    from tombola.study.cells import read_rows
    from tombola.study.jobs import ticket_of

    ticket = ticket_of(lab, taken)
    return {
        "seed": ticket.seeds["run"],
        "kind": ticket.kind,
        "draw": ticket.details.get("draw", 0),
        "cell": ticket.cell,
        "identity": ticket.identity,
        "kept": {name: kept for name, (kept, _) in ticket.mask.counts_by_type().items()},
        "shared_with_good": ticket.details.get("shared_with_good"),
        "sparsity": ticket.sparsity,
        "scores": [row for cell in scored if cell is not None for row in read_rows(lab.folder(cell) / "scores.jsonl")],
    }
