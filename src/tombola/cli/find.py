"""tombola demo, find, head: from a model and a task to tickets, tested when asked for; and to a base with a head for the task."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from tombola.cli.look import write_report
from tombola.cli.options import (
    LayoutOption,
    OwnRows,
    PresetOption,
    Running,
    SeedsOption,
    TrainingSettings,
    make_lab,
    numbers,
    refuse_filled,
    split_seeds,
    words,
)
from tombola.errors import TombolaError
from tombola.terminal import print_json, print_ladder, print_plan, print_scores, say, ticket_json

# Fixed by measurement, so that the whole demo takes a few minutes on two cores (see docs/lab-log.md).
DEMO_CONTROLS = ("random", "bad")
DEMO_SETTINGS: dict[str, Any] = {"train_rows": 800, "epochs": 1, "learning_rate": 1e-4, "batch_size": 16}


def demo(
    folder: Annotated[Path, typer.Option("--folder", help="Where results and page go.")] = Path("tombola-demo"),
    task: Annotated[
        str, typer.Option(help="A generated task; the others need data.")
    ] = "nli-overlap:train_rows=2000,report_rows=400,challenge_rows=300",
    seeds: SeedsOption = "0,1",
) -> None:
    """The main job in a few minutes, offline: tickets of a real 6-layer BERT against their controls, and a page to look at."""
    from tombola.study.results import collect
    from tombola.study.runs import plan_controls, plan_find, plan_test
    from tombola.study.settings import resolve

    run_seeds = numbers(seeds)
    settings = resolve(DEMO_SETTINGS, run_seeds)
    lab = make_lab(folder / "store")
    found = plan_find(lab, "demo", task, settings, run_seeds)
    cells = [cell for one in found for cell in one.cells]
    for one in found:
        tested = [plan_test(one.search, one.dense, retrain=True)]
        tested += plan_controls(one.search, one.dense, DEMO_CONTROLS, 1, settings, retrain=True)
        cells += [cell for each in tested for cell in each.cells]
    lab.run(cells)
    print_scores(lab, cells)
    page = write_report(collect(lab.store), folder / "page.html")
    say(f"\nThe page: {page.resolve()}\nThe same command again takes seconds: every result is kept in {folder / 'store'}.")
    say("Next: tombola find --help, and README.md for your own model and task.")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommonSettings:
    """The settings a search is most often given beside those of training, each by its own name; `--set` takes all the others."""

    floor: Annotated[
        float | None, typer.Option(help="Share of the full score a ticket must hold, in (0, 1].  [default: 0.9]")
    ] = None
    floor_rule: Annotated[str | None, typer.Option(help="fraction_of_full or fraction_above_baseline.")] = None
    procedure: Annotated[str | None, typer.Option(help="s-prune: joint, heads, mlps, neurons, heads+neurons or layers.")] = None
    sparsity: Annotated[
        float | None, typer.Option(help="one-shot, or s-prune without a floor: removed share of the maskable values, in [0, 1).")
    ] = None
    scope: Annotated[str | None, typer.Option(help="Which values are maskable, see `tombola inspect`; body:weights+pooler …")] = (
        None
    )
    criterion: Annotated[str | None, typer.Option(help="magnitude, random, taylor or taylor-signed.")] = None
    rewind: Annotated[str | None, typer.Option(help="imp: step_0, epoch_1, percent_5 …, none or learning_rate_only.")] = None
    granularity: Annotated[str | None, typer.Option(help="Values compete globally or per_matrix.")] = None

    def given(self) -> dict[str, Any]:
        """Setting → value, of those that were given."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def find(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name (pinned to a commit, recorded).")],
    task: Annotated[
        str,
        typer.Argument(
            help="One of GLUE (cola sst2 mrpc qqp stsb mnli qnli rte wnli, [:train=SPLIT,report=SPLIT]), acceptability, "
            "nli-overlap[:strength=0.9], squad, mlm-wikitext2, mlm (--train --validation), files (--train --validation --text "
            "--label), or hub:NAME[:CONFIG]."
        ),
    ],
    *,
    method: Annotated[
        str, typer.Option(help="s-prune (whole parts), m-prune (values), one-shot, imp (rounds), learned (scores).")
    ] = "s-prune",
    preset: PresetOption = None,
    layout: LayoutOption = None,
    common: CommonSettings,
    training: TrainingSettings,
    seeds: SeedsOption = "0",
    kinds: Annotated[str, typer.Option("--controls", help="Also draw controls of these kinds, separated by commas.")] = "",
    draws: Annotated[int | None, typer.Option(help="Independent draws of each kind of control.  [default: 1]")] = None,
    retrain: Annotated[bool, typer.Option("--retrain", help="Also train ticket and controls from the base.")] = False,
    ladder: Annotated[
        str | None, typer.Option(help="A:B, two presets: what each option in which they differ costs, one at a time.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Also write the ticket here (one folder per seed if several).")] = None,
    rows: OwnRows,
    run: Running,
) -> None:
    """Fine-tune MODEL on TASK, then search for a ticket: one for each seed. --controls and --retrain test it in the same run."""
    from tombola.anatomy import Layout
    from tombola.study.jobs import found_ticket
    from tombola.study.runs import implied, plan_controls, plan_find, plan_ladder, plan_test
    from tombola.study.settings import resolve
    from tombola.study.verdicts import score_of

    run_seeds, control_kinds = numbers(seeds), words(kinds)
    if draws is not None and not control_kinds:
        raise TombolaError("--draws is of controls, and none are asked for", got=draws, next="name their kinds with --controls")
    draws = 1 if draws is None else draws
    layouts = None if layout is None else Layout.from_yaml(layout)
    values, own = split_seeds(common.given() | training.given() | run.settings())
    asked = rows.task(task)
    if ladder is not None:
        _refuse_with_ladder(preset, out)
        lab = run.lab()
        rungs = plan_ladder(
            lab, model, asked, ladder, values, run_seeds, own,
            method=method, kinds=control_kinds, draws=draws, retrain=retrain, layout=layouts,
        )  # fmt: skip
        cells = [cell for rung in rungs for cell in rung.cells]
        if run.dry_run:
            print_plan(lab, cells, run.as_json)
            return
        lab.run(cells)
        print_ladder(lab, rungs, run.as_json)
        return
    preset = preset or "corrected"
    values = {**implied(asked, method, values, preset), **values}
    settings = resolve(values, run_seeds, own, method=method, preset=preset)
    targets = _targets(out, run_seeds)
    lab = run.lab()
    planned = plan_find(lab, model, asked, settings, run_seeds, layouts)
    cells = [cell for found in planned for cell in found.cells]
    for one in planned:
        again = retrain and one.chain is None  # the last round of a chain is just that
        tested = [plan_test(one.search, one.dense, settings.retrain, retrain=True)] if again else []
        tested += plan_controls(one.search, one.dense, control_kinds, draws, settings, retrain=retrain) if control_kinds else []
        cells += [cell for each in tested for cell in each.cells]
    if run.dry_run:
        print_plan(lab, cells, run.as_json)
        return
    lab.run(cells)
    for one, target in zip(planned, targets, strict=True):
        if target is not None:
            found_ticket(lab, one).save_pretrained(target)
    if run.as_json:
        said = [ticket_json(lab, one.search, (one.dense, one.pruned)) for one in planned]
        folders = [{"folder": None if target is None else str(target)} for target in targets]
        print_json({"tickets": [one | where for one, where in zip(said, folders, strict=True)]})
        return
    # of a chain the last level alone: others are other tickets, not to be averaged with it
    print_scores(lab, [cell for cell in cells if cell.step != "round" or cell.settings["cuts"] is None])
    for chain in (one.chain for one in planned if one.chain is not None):
        levels = (f"{at:.0%} {score_of(lab, chain.scored(k)).value:.3f}" for k, at in enumerate(chain.sparsities, start=1))
        dense = f"{score_of(lab, chain.dense).value:.3f}"
        say(f"seed {chain.seed}, level by level on the report rows: dense {dense}, {', '.join(levels)}")
    for one, target in zip(planned, targets, strict=True):
        say(f"seed {one.seed}: ticket {one.search.key[:12]}" + (f" in {target}" if target else ""))
    name = targets[0] or planned[0].search.key[:12]
    say(f"Next: tombola controls {name} --store {run.store}" + (f" --data {run.data}" if run.data else "") + rows.again())


def _refuse_with_ladder(preset: str | None, out: Path | None) -> None:
    given = [f"--{name}" for name, value in (("preset", preset), ("out", out)) if value is not None]
    if given:
        raise TombolaError(
            "a ladder has presets of its own and makes many tickets", got=" and ".join(given), expected="--ladder without them"
        )


def _targets(out: Path | None, seeds: Sequence[int]) -> list[Path | None]:
    """Where each seed's ticket is to be written. Refused before anything runs when something else lies there."""
    targets = [None if out is None else out if len(seeds) == 1 else out / f"seed-{seed}" for seed in seeds]
    for target in targets:
        refuse_filled(target, but="ticket.json")
    return targets


def head(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name.")],
    task: Annotated[str, typer.Argument(help="mlm-wikitext2, or mlm (--train --validation).")],
    *,
    out: Annotated[Path, typer.Option(help="Folder to write the model to.")],
    seeds: SeedsOption = "0",
    rows: OwnRows,
    run: Running,
) -> None:
    """Give MODEL a head for TASK, trained alone, its body as it is: for chains on models published without theirs."""
    from tombola.study.settings import resolve
    from tombola.study.task_head import train_head

    refuse_filled(out)
    run_seeds = numbers(seeds)
    values, own = split_seeds(run.settings())
    settings = resolve(values, run_seeds[:1], own, method="imp")
    said = train_head(run.lab(), model, rows.task(task), settings, out)
    if run.as_json:
        print_json(said)
        return
    scores = f"{said['metric']} {said['before']:.3f} → {said['after']:.3f} (line {said['majority']:.3f}, n = {said['n']})"
    say(f"{scores}, {said['steps']} steps")
    say(f"Next: tombola find {out} {task} --method imp")
