"""Results → one page, and its score table in Markdown and LaTeX: the public face of the room.

Which file does what: `cases` groups rows and has all numbers, `words` makes sentences and writes numbers, `about_scores` and
`about_tickets` make tables and captions, `figures` draws, `layout` is what the template `page.html.j2` lays out. They import
one way only: build → about_scores, about_tickets → words → cases; `figures` and `layout` import none of them.
"""

import os
import tempfile
from base64 import b64encode
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path

from tombola.errors import StoreError
from tombola.report.about_scores import flat_table, glance_table, score_part
from tombola.report.about_tickets import overlap_part, search_part, size_part, survival_part
from tombola.report.cases import Case, Rows, cases_of
from tombola.report.layout import Section, Table
from tombola.report.words import case_verdict, count, listed, verdict, warnings
from tombola.study.results import Results

# What these languages would read as commands
MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|~&"})
LATEX = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "±": r"$\pm$",
        "−": "$-$",
        "×": r"$\times$",
        "·": r"$\cdot$",
        "–": "--",
        "—": "---",
    }
)


def build_page(results: Results, out: Path) -> Path:
    """The path of the page it wrote, `out`: one HTML file that needs nothing else, complete or not there at all.

    Raises: StoreError if `out` is a folder.
    """
    if out.is_dir():
        raise StoreError("the page is one file", got=f"the folder {out}", expected="a file name", next=f"use {out / 'page.html'}")
    text = render(results)
    out.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes private files; a page is made to be shared
        Path(name).replace(out)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return out


def render(results: Results) -> str:
    """The page as HTML. The same results give the same text: it holds no clock and no path of its own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tombola.report", "."),
        autoescape=True,  # names and labels may hold anything; only what `figures` drew passes as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["svg"] = Markup
    environment.filters["sha256"] = lambda text: b64encode(sha256(str(text).encode()).digest()).decode()
    cases = cases_of(results)
    rows: Rows = (*results.scores, *results.tickets)
    return environment.get_template("page.html.j2").render(
        title=listed([case.title for case in cases]),
        models=listed(list(dict.fromkeys(row.model for row in rows))),
        seeds=count(len({row.seed for row in rows}), "seed"),
        verdict=verdict(cases),
        glance=glance_table(cases) if len(cases) > 1 else None,
        warnings=warnings(results.warnings, cases),
        sections=[_section(f"task-{i}", case) for i, case in enumerate(cases, start=1)],
        settings=_mapping_table("Settings of this study, as resolved", results.settings),
        provenance=_mapping_table("What the numbers were made from", results.provenance),
    )


def markdown_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a Markdown table; empty if there are none."""
    table = flat_table(cases_of(results), role)
    if not table.rows:
        return ""
    rule = ["---"] * table.stubs + ["---:"] * (len(table.head) - table.stubs)
    head, *body = _escaped(table, MARKDOWN)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def latex_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a LaTeX tabular (package booktabs); empty if there are none."""
    table = flat_table(cases_of(results), role)
    if not table.rows:
        return ""
    columns = "l" * table.stubs + "r" * (len(table.head) - table.stubs)
    head, *body = (" & ".join(line) + r" \\" for line in _escaped(table, LATEX))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def _section(anchor: str, case: Case) -> Section:
    parts = [score_part(f"{anchor}-scores-{i}", case, split) for i, split in enumerate(case.splits, start=1)]
    if len(case.shapes) == 1:
        about_masks = (
            survival_part(f"{anchor}-survival", case),
            search_part(f"{anchor}-search", case),
            size_part(f"{anchor}-sizes", case),
            overlap_part(f"{anchor}-overlap", case),
        )
        parts += [part for part in about_masks if part]
    return Section(anchor, case.title, case_verdict(case), tuple(parts))


def _mapping_table(caption: str, values: Mapping[str, object]) -> Table | None:
    rows = tuple((str(name), str(value)) for name, value in values.items())
    return Table(caption, ("Name", "Value"), rows) if rows else None


def _escaped(table: Table, escapes: Mapping[int, str]) -> list[list[str]]:
    """The lines of a table, head first, each cell on one line."""
    return [[" ".join(cell.split()).translate(escapes) for cell in line] for line in (table.head, *table.rows)]
