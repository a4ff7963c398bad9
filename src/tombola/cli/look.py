"""What changes nothing and is only looked at: doctor, inspect, report."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tombola.cli.options import (
    STORE,
    JsonOption,
    LayoutOption,
    StoreOption,
    make_lab,
    quiet,
)
from tombola.errors import TombolaError
from tombola.terminal import print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tombola.report.layout import Section
    from tombola.study.results import Results


@dataclass(frozen=True, slots=True, kw_only=True)
class Written:
    """What is written beside a page, or the folder to publish in its place."""

    tables: Annotated[Path | None, typer.Option(help="Also write each table there: Markdown, LaTeX, CSV.")] = None
    figures: Annotated[Path | None, typer.Option(help="Also write each figure there, as SVG.")] = None
    results: Annotated[
        Path | None,
        typer.Option(help="Write a folder to publish instead: page, tables, figures, and a README with commands and hours."),
    ] = None
    notes: Annotated[Path | None, typer.Option(help="Markdown to stand first in that README: what you make of it.")] = None
    ran: Annotated[list[str] | None, typer.Option(help="A command that computed cells, for that README; repeatable.")] = None
    hardware: Annotated[str, typer.Option(help="The machine in words, for that README.")] = ""

    def check(self) -> None:
        """Raises: TombolaError for options that --results leaves nothing to do for, or that want it; notes that are not there."""
        of_page = [f"--{name}" for name in ("tables", "figures") if getattr(self, name) is not None]
        of_readme = [f"--{name}" for name in ("notes", "ran", "hardware") if getattr(self, name)]
        if self.results is not None and of_page:
            got = f"--results and {' and '.join(of_page)}"
            raise TombolaError("a folder of results has its tables and figures in it", got=got, expected="--results alone")
        if self.results is None and of_readme:
            got = " and ".join(of_readme)
            raise TombolaError("these stand in the README of --results", got=got, next="give --results FOLDER too")
        if self.notes is not None and not self.notes.is_file():
            raise TombolaError("there are no such notes", got=str(self.notes), expected="a Markdown file")

    def write(self, found: "Results", page: Path, title: str) -> Path:
        """The folder or the page it wrote, complete. Raises: TombolaError if it cannot."""
        from tombola.report.folder import write_results

        if self.results is None:
            return write_report(found, page, self.tables, self.figures)
        notes = "" if self.notes is None else self.notes.read_text("utf-8")
        try:
            readme = write_results(found, self.results, title=title, notes=notes, ran=self.ran or (), hardware=self.hardware)
        except OSError as error:
            got = f"{error.strerror}: {error.filename}"
            raise TombolaError(f"{self.results} cannot be written", got=got, next="name another place") from error
        return readme.parent


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
    written: Written,
    folder: Annotated[Path | None, typer.Argument(help="Folder of results; the same as --store.", show_default=False)] = None,
    store: StoreOption = STORE,
    out: Annotated[Path, typer.Option(help="The page to write.")] = Path("page.html"),
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the score table as Markdown instead.")] = False,
    latex: Annotated[bool, typer.Option("--latex", help="Print the score table as LaTeX instead.")] = False,
) -> None:
    """Everything a store holds as one offline HTML page."""
    from tombola.report.build import latex_table, markdown_table
    from tombola.study.overlap import with_shared
    from tombola.study.results import collect

    written.check()
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
    place = written.write(results, out, f"Results of the store {lab.store.root.name}").resolve()
    say(f"The {'page' if written.results is None else 'results'}: {place}")


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
