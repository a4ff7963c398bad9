"""Results as a folder to publish: the page, its tables and figures as files, and a README of what, how, on what and how long."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from tombola.errors import StoreError
from tombola.report.build import build_page, facts_of, overview_tables, verdict_of
from tombola.report.cases import study_of
from tombola.report.export import FORMS, markdown, write_whole
from tombola.report.layout import Table
from tombola.report.words import told_once
from tombola.study.results import Results

MANY_DOUBTS = 24  # in the README
ENDINGS = (*FORMS, ".svg")
PAGE, TABLES, FIGURES, README = "page.html", "tables", "figures", "README.md"


def write_results(
    results: Results, folder: Path, *, title: str, notes: str = "", ran: Sequence[str] = (), hardware: str = ""
) -> Path:
    """The README it wrote, last of all, with page.html, tables/ and figures/ beside it. Names no path of this machine.

    The files are of all tasks together, in place of those of an earlier run; what is of one task and search stands on the page.

    notes: Markdown, what somebody makes of it, to stand before the numbers. ran: what computed the cells, where no study did.
    hardware: in words, of what cells do not say themselves.
    Raises: StoreError if `folder` is a file.
    """
    if folder.is_file():
        raise StoreError("results are many files", got=f"the file {folder}", expected="a folder, or none yet")
    made_from = dict(results.provenance)
    if "store" in made_from:
        made_from["store"] = Path(str(made_from["store"])).name
    results = replace(results, provenance=made_from)
    for old in (one for name in (TABLES, FIGURES) for one in (folder / name).glob("*.*") if one.suffix in ENDINGS):
        old.unlink()  # of results that had other tables
    build_page(results, folder / PAGE, tables=folder / TABLES, figures=folder / FIGURES, each_task=False)
    study = study_of(results)
    overview = "\n".join(f"**{table.caption}**\n\n{markdown(table)}\n{table.note}\n" for table in overview_tables(study))
    commands = (
        "\n".join([results.command, *ran] if results.command else ran) or "(computed by commands that were not written down)"
    )
    doubts = told_once(results.warnings)
    machine = [f"Hardware: {hardware}.", ""] if hardware else []
    text = [
        f"# {title}",
        "",
        f"{facts_of(study)}.",
        "",
        verdict_of(study),
        "",
        f"[The page]({PAGE}) has all of it and needs no network: open it in a browser. Tables of all tasks together stand in "
        f"`{TABLES}` as Markdown, LaTeX and CSV, figures in `{FIGURES}` as SVG.",
        "",
        *(("## Notes", "", notes.strip(), "") if notes.strip() else ()),
        *(("## What was found", "", overview) if overview.strip() else ()),
        "## Before a number is quoted",
        "",
        *(f"- {said}" for said in doubts[:MANY_DOUBTS]),
        *([f"- and {len(doubts) - MANY_DOUBTS} more: the page has them all"] if len(doubts) > MANY_DOUBTS else ()),
        "" if doubts else "The cells have no warnings.",
        "## Commands",
        "",
        f"```\n{commands}\n```",
        "",
        "## Hardware and hours",
        "",
        *machine,
        _table("Made from", made_from),
        "## Settings",
        "",
        _table("Settings", results.settings),
    ]
    return write_whole(folder / README, "\n".join(text).rstrip("\n") + "\n")


def _table(caption: str, values: Mapping[str, object]) -> str:
    return markdown(Table(caption, ("Name", "Value"), tuple((str(name), str(value)) for name, value in values.items())))
