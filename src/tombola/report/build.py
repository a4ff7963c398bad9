"""Results → one page, and its score table in Markdown and LaTeX: the public face of the room.

Which file does what: `cases` groups rows and has all numbers, `words` makes sentences and writes numbers, `about_scores` and
`about_tickets` make tables and captions, `figures` draws, `layout` is what the template `page.html.j2` lays out. They import
one way only: build → about_scores, about_tickets → words → cases; `figures` and `layout` import none of them.
"""

import os
import tempfile
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

from tombola.errors import StoreError
from tombola.report import about_masks, about_study
from tombola.report.about_conclusions import claims_table, overview_table, said_of
from tombola.report.about_scores import flat_table, glance_table, score_part
from tombola.report.about_tickets import overlap_part, search_part, size_part, survival_part
from tombola.report.cases import Case, Rows, Study, cases_of, study_of
from tombola.report.layout import Part, Section, Table
from tombola.report.words import case_verdict, count, listed, verdict, warnings
from tombola.stats.estimate import t_quantile
from tombola.study.results import Results

MANY_TASKS = 4  # are counted in the title
MANY_CASES = 6  # open on demand
MANY_WARNINGS = 24  # likewise

# Anchor, heading, and what stands under it; a part that these results have no rows for is left out.
PARTS: Sequence[tuple[str, str, Sequence[Callable[[str, Study], tuple[Part, ...]]]]] = (
    ("tickets", "Tickets and controls", (about_study.bar_parts, about_study.versus_parts, about_study.epoch_parts)),
    ("seeds", "Do seeds and tasks agree?", (
        about_masks.stability_parts, about_masks.task_overlap_parts, about_masks.task_survival_parts,
        about_masks.chosen_on_parts, about_study.super_parts,
    )),
    ("search", "What searches go by", (about_masks.importance_parts,)),
    ("sparsity", "How much can go", (about_study.sparsity_parts, about_study.joined_parts, about_study.matched_parts)),
    ("modes", "What training owes to what", (about_study.mode_parts,)),
    ("lesions", "What breaks the model", (about_study.lesion_parts,)),
    ("settings-compared", "What settings change", (about_study.setting_parts,)),
)  # fmt: skip

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


def build_page(results: Results, out: Path, extra: Sequence[Section] = ()) -> Path:
    """The path of the page it wrote, `out`: one HTML file that needs nothing else, complete or not there at all.

    Raises: StoreError if `out` is a folder.
    """
    if out.is_dir():
        raise StoreError("the page is one file", got=f"the folder {out}", expected="a file name", next=f"use {out / 'page.html'}")
    text = render(results, extra)
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


def render(results: Results, extra: Sequence[Section] = ()) -> str:
    """The page as HTML; `extra` sections come first. The same results give the same text: it holds no clock and no path of its own."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tombola.report", "."),
        autoescape=True,  # names and labels may hold anything; only what `figures` drew passes as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    study = study_of(results)
    cases, tasks = study.cases, study.tasks
    ids = {name: str(i) for i, name in enumerate(tasks)} | {"*": "*"}
    environment.filters["svg"] = Markup
    environment.filters["sha256"] = lambda text: b64encode(sha256(str(text).encode()).digest()).decode()
    environment.filters["task"] = lambda said: " ".join(ids.get(one, "") for one in ([said] if isinstance(said, str) else said))
    environment.filters["keys"] = lambda keys: " ".join(key[:8] for key in keys)
    style, script = (files("tombola.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    overview = [table for table in (overview_table(study) if len(cases) > 1 else None, claims_table(study)) if table]
    return environment.get_template("page.html.j2").render(
        style=f"\n{style}",
        script=f"\n{script}",
        quantiles=" ".join(f"{t_quantile(float(df)):.6f}" for df in range(1, 31)),
        title=listed(tasks) if len(tasks) <= MANY_TASKS else f"{len(tasks)} tasks",
        facts=_facts(study),
        tasks=tasks if cases else (),
        seeds=study.seeds,
        command=results.command,
        verdict=verdict(cases),
        overview=overview,
        glance=glance_table(cases) if len(cases) > 1 else None,
        warnings=_folded(warnings(results.warnings, cases)),
        sections=[*extra, *sections_of(study)],
        settings=_mapping_table("Settings of this study, as resolved", results.settings),
        provenance=_mapping_table("What the numbers were made from", results.provenance),
    )


def sections_of(study: Study) -> list[Section]:
    """The questions over all tasks that these results can answer, then each task and search by itself."""
    found = []
    for anchor, title, functions in PARTS:
        parts = tuple(part for i, function in enumerate(functions, 1) for part in function(f"{anchor}-{i}", study))
        if parts:
            found.append(Section(anchor, title, "", parts))
    alone = [case for case in study.cases if _stands_alone(case, study)]
    many = len(alone) > MANY_CASES
    return [*found, *(_section(f"task-{i}", case, len(alone), many) for i, case in enumerate(alone, start=1))]


def _stands_alone(case: Case, study: Study) -> bool:
    """Whether a case has a section of its own: not what a part over all tasks shows in full already."""
    if len(study.cases) <= MANY_CASES:
        return True
    shown_together = bool(case.family) or case.settings.get("method") == "one-shot"
    return bool(case.good) and not shown_together


def _folded(said: Mapping[str, tuple[str, ...]]) -> list[tuple[str, Mapping[str, tuple[str, ...]]]]:
    """Heading → warnings: all in sight where they are few, else what the cells said and what each task's rows show, on demand."""
    total = sum(len(texts) for texts in said.values())
    if total <= MANY_WARNINGS:
        return [("", said)] if said else []
    halves: Sequence[tuple[str, Mapping[str, tuple[str, ...]]]] = (
        ("Said by the cells", {where: texts for where, texts in said.items() if not where}),
        ("Seen in the rows, task by task", {where: texts for where, texts in said.items() if where}),
    )
    return [(f"{name}: {count(sum(map(len, half.values())), 'note')}", half) for name, half in halves if half]


def _facts(study: Study) -> str:
    rows: Rows = (*study.results.scores, *study.results.tickets)
    models = listed(list(dict.fromkeys(row.model for row in rows)))
    presets = sorted({str(case.settings["preset"]) for case in study.cases if "preset" in case.settings})
    searches = list(dict.fromkeys(case.search for case in study.cases if case.search and case.settings and not case.family))
    said = [models, count(len(study.tasks), "task"), count(len(study.seeds), "seed")]
    said += [f"preset{'s' if len(presets) > 1 else ''} {listed(presets)}"] if presets else []
    said += [listed(searches[:6]) + (" and others" if len(searches) > 6 else "")] if searches else []
    said += [str(study.results.provenance[name]) for name in ("cost",) if name in study.results.provenance]
    return " · ".join(said)


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


def _section(anchor: str, case: Case, n: int, many: bool) -> Section:
    parts = [score_part(f"{anchor}-scores-{i}", case, split) for i, split in enumerate(case.splits, start=1)]
    if len(case.shapes) == 1:
        about_masks = (
            survival_part(f"{anchor}-survival", case, lean=many),
            search_part(f"{anchor}-search", case),
            size_part(f"{anchor}-sizes", case),
            overlap_part(f"{anchor}-overlap", case),
        )
        parts += [part for part in about_masks if part]
    said = said_of(case) if many else case_verdict(case) if n > 1 else ""
    return Section(anchor, case.title, said, tuple(parts), case.task, folded=many, case=True)


def _mapping_table(caption: str, values: Mapping[str, object]) -> Table | None:
    rows = tuple((str(name), str(value)) for name, value in values.items())
    return Table(caption, ("Name", "Value"), rows) if rows else None


def _escaped(table: Table, escapes: Mapping[int, str]) -> list[list[str]]:
    """The lines of a table, head first, each cell on one line."""
    return [[" ".join(cell.split()).translate(escapes) for cell in line] for line in (table.head, *table.rows)]
