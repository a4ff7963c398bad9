"""The page's tables as Markdown, LaTeX and CSV files, and its figures as SVG files that need no style sheet."""

import csv
import io
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Final

from tombola.report.layout import Figure, Section, Table

# What these languages would read as commands
MARKDOWN: Final = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|~&"})
LATEX: Final = str.maketrans(
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
        "Δ": r"$\Delta$",
    }
)


def markdown(table: Table) -> str:
    """The table as GitHub reads it; its head and rows, one line each."""
    rule = ["---"] * table.stubs + ["---:"] * (len(table.head) - table.stubs)
    head, *body = _escaped(table, MARKDOWN)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *body))


def latex(table: Table) -> str:
    """The table as a tabular of package booktabs."""
    columns = "l" * table.stubs + "r" * (len(table.head) - table.stubs)
    head, *body = (" & ".join(line) + r" \\" for line in _escaped(table, LATEX))
    lines = [rf"\begin{{tabular}}{{{columns}}}", r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
    return "\n".join(lines) + "\n"


def comma_separated(table: Table) -> str:
    """The table as CSV (RFC 4180)."""
    out = io.StringIO()
    csv.writer(out).writerows([[" ".join(cell.split()) for cell in line] for line in (table.head, *table.rows)])
    return out.getvalue()


FORMS: Mapping[str, Callable[[Table], str]] = {".md": markdown, ".tex": latex, ".csv": comma_separated}


def write_tables(sections: Iterable[Section], folder: Path) -> list[Path]:
    """The files it wrote, three for each table, named by section and caption."""
    tables = [(section, table) for section in sections for part in section.parts for table in (*part.tables, *part.folded)]
    names = _names(f"{section.title} {table.caption}" for section, table in tables)
    written = []
    for name, (_, table) in zip(names, tables, strict=True):
        for ending, form in FORMS.items():
            written.append(write_whole(folder / f"{name}{ending}", form(table)))
    return written


def write_figures(sections: Iterable[Section], folder: Path) -> list[Path]:
    """The files it wrote, one for each figure, named by part and figure."""
    figures = [(part, figure) for section in sections for part in section.parts for row in part.figures for figure in row]
    names = _names(f"{part.anchor if part.anchor.startswith('task-') else part.name} {figure.title}" for part, figure in figures)
    return [write_whole(folder / f"{name}.svg", standalone(figure)) for name, (_, figure) in zip(names, figures, strict=True)]


def standalone(figure: Figure) -> str:
    """The drawing with its colours (those of the light page) inside it, and nothing that only the page's script reads."""
    text = re.sub(r' data-[a-z]+="[^"]*"', "", figure.svg)
    text = text.replace('width="100%"', f'width="{WIDE}"', 1)
    size = 'xmlns="http://www.w3.org/2000/svg" font-family="Inter, Helvetica, Arial, sans-serif"'
    text = text.replace("<svg ", f"<svg {size} ", 1).replace(">", f"><style>{drawing_style()}</style>", 1)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{text}\n'


WIDE = 720  # pixels of a chart that fills the page's width


def drawing_style() -> str:
    """The page's rules for drawings with every variable replaced by its light colour: few readers of SVG know variables."""
    sheet = files("tombola.report").joinpath("page.css").read_text(encoding="utf-8")
    colours = dict(re.findall(r"--([\w-]+): (#\w{6})", sheet[: sheet.index("@media")]))
    hues = dict(re.findall(r"\.([\w-]+) \{ --hue: var\(--([\w-]+)\);? \}", re.sub(r"\.legend [^{]*\{[^}]*\}", "", sheet)))
    rules = []
    for selector, body in re.findall(r"(svg[^{}]*|svg\.[^{}]*) \{([^{}]*)\}", sheet):
        if ":hover" in selector or "paint-order" in body:
            continue
        if "var(--hue" not in body:
            rules.append(f"{selector} {{{_painted(body, colours)}}}")
            continue
        default = re.sub(r"var\(--hue(?:, var\(--([\w-]+)\))?\)", lambda found: colours[found[1] or "other"], body)
        rules.append(f"{selector} {{{_painted(default, colours)}}}")
        for css, colour in hues.items():
            mine = (
                selector.replace(".curve", f".curve.{css}")
                if ".curve" in selector
                else selector.replace("svg ", f"svg .{css} ", 1)
            )
            hued = re.sub(r"var\(--hue(?:, var\(--[\w-]+\))?\)", colours[colour], body)
            rules.append(f"{mine} {{{_painted(hued, colours)}}}")
    return " ".join(re.sub(r"\s+", " ", rule) for rule in rules)


def _painted(body: str, colours: Mapping[str, str]) -> str:
    return re.sub(r"var\(--([\w-]+)\)", lambda found: colours.get(found[1], colours["ink"]), body)


def write_whole(path: Path, text: str) -> Path:
    """The path it wrote, complete or not there at all. Raises: OSError where it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # mkstemp makes private files; these are made to be shared
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return path


def _names(titles: Iterable[str]) -> Iterator[str]:
    """A name for each title that any file system takes; equal ones are counted."""
    seen: dict[str, int] = {}
    for title in titles:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower().replace("−", "minus")).strip("-")[:100].strip("-") or "untitled"
        seen[name] = seen.get(name, 0) + 1
        yield name if seen[name] == 1 else f"{name}-{seen[name]}"


def _escaped(table: Table, escapes: Mapping[int, str]) -> list[Sequence[str]]:
    """The lines of a table, head first, each cell on one line."""
    return [[" ".join(cell.split()).translate(escapes) for cell in line] for line in (table.head, *table.rows)]
