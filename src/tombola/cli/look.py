"""What changes nothing and is only looked at: doctor, inspect, report."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tombola.cli.options import (
    STORE,
    FiguresOption,
    HardwareOption,
    JsonOption,
    LayoutOption,
    RanOption,
    ResultsOption,
    StoreOption,
    TablesOption,
    make_lab,
    quiet,
)
from tombola.errors import TombolaError
from tombola.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tombola.report.layout import Section
    from tombola.study.results import Results


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


def inspect(
    model: Annotated[str, typer.Argument(help="demo, a local folder, or a Hub name.")],
    layout: LayoutOption = None,
    as_json: JsonOption = False,
) -> None:
    """What a model is made of: layers, heads, kv-heads, MLP widths, and how many values a mask of each scope has."""
    from tombola.anatomy import Layout, read_anatomy
    from tombola.objective import load_weights
    from tombola.scope import scope_sizes
    from tombola.source import resolve_model

    quiet()
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


def report(
    folder: Annotated[Path | None, typer.Argument(help="Folder of results; the same as --store.", show_default=False)] = None,
    store: StoreOption = STORE,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("page.html"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the score table as Markdown instead.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the score table as LaTeX instead.")] = False,
    tables: TablesOption = None,
    figures: FiguresOption = None,
    whole: ResultsOption = None,
    ran: RanOption = None,
    hardware: HardwareOption = "",
) -> None:
    """Everything a store holds as one offline HTML page."""
    from tombola.report.build import latex_table, markdown_table
    from tombola.study.overlap import with_shared
    from tombola.study.results import collect

    check_results(whole, tables, figures, ran, hardware)
    if markdown and latex:
        raise TombolaError("a table is printed in one form", got="--markdown and --latex", expected="one of them")
    if folder is not None and store not in (STORE, folder):
        raise TombolaError("two stores are named", got=f"{folder} and --store {store}", expected="one of them")
    lab = make_lab(folder or store, reads=True)
    results = collect(lab.store)
    if markdown or latex:
        print((markdown_table if markdown else latex_table)(results))
        return
    results = with_shared(lab.store, results)
    if whole is not None:
        title = f"Results of the store {lab.store.root.name}"
        say(f"The results: {write_folder(results, whole, title, ran or (), hardware).resolve()}")
        return
    say(f"The page: {write_report(results, out, tables, figures).resolve()}")


def check_results(
    whole: Path | None, tables: Path | None, figures: Path | None, ran: "Sequence[str] | None", hardware: str
) -> None:
    """Raises: TombolaError for options that --results leaves nothing to do for, or that want it."""
    files = [name for name, given in (("--tables", tables), ("--figures", figures)) if given is not None]
    said = [name for name, given in (("--ran", ran), ("--hardware", hardware)) if given]
    if whole is not None and files:
        got = f"--results and {' and '.join(files)}"
        raise TombolaError("a folder of results has its tables and figures in it", got=got, expected="--results alone")
    if whole is None and said:
        raise TombolaError("these stand in the README of --results", got=" and ".join(said), next="give --results FOLDER too")


def write_folder(results: "Results", folder: Path, title: str, ran: "Sequence[str]" = (), hardware: str = "") -> Path:
    """The folder it wrote, complete. Raises: TombolaError if it cannot."""
    from tombola.report.folder import write_results

    try:
        return write_results(results, folder, title=title, ran=ran, hardware=hardware).parent
    except OSError as error:
        got = f"{error.strerror}: {error.filename}"
        raise TombolaError(f"{folder} cannot be written", got=got, next="name another place") from error


def write_report(
    results: "Results", out: Path, tables: Path | None = None, figures: Path | None = None, extra: "Sequence[Section]" = ()
) -> Path:
    """Where the page was written; tables and figures as files, where folders are given. Raises: TombolaError if they cannot."""
    from tombola.report.build import build_page

    try:
        page = build_page(results, out, extra, tables, figures)
    except OSError as error:
        got = f"{error.strerror}: {error.filename}"
        raise TombolaError(f"{out} or what goes with it cannot be written", got=got, next="name another place") from error
    for what, folder in (("tables", tables), ("figures", figures)):
        if folder is not None:
            say(f"The {what}: {folder.resolve()}")
    return page
