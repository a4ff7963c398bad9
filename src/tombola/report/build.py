"""Results → one page, and its score table in Markdown and LaTeX: the public face of the room.

Which file does what: `cases` groups rows and has all numbers of scores and masks, `conclusions` what is concluded of them,
`words` makes sentences and writes numbers. The `about_*` make parts of tables and figures: `about_scores` and
`about_tickets` of one case, the others over all tasks of a study; `bars` is what several of those share. `figures` and
`charts` draw; `layout` is what the template `page.html.j2` lays out, with `page.css` and `page.js`; `live` says what that
script can work out again; `export` writes files, `folder` all of them with a README. They import one way only: folder → build →
about_* → bars, conclusions → words → cases; `figures`, `charts`, `layout`, `live` and `export` import none of these.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from zlib import compress

from tombola.errors import StoreError
from tombola.report import (
    about_begin,
    about_beside,
    about_chains,
    about_frontier,
    about_heads,
    about_joint,
    about_masks,
    about_removal,
    about_robust,
    about_study,
    about_transfer,
    about_values,
    about_variants,
)
from tombola.report.about_conclusions import claims_table, overview_table, said_of
from tombola.report.about_scores import flat_table, glance_table, score_part
from tombola.report.about_tickets import overlap_part, search_part, size_part, survival_part
from tombola.report.cases import Case, Rows, Study, cases_of, study_of
from tombola.report.export import latex, markdown, write_figures, write_tables, write_whole
from tombola.report.layout import Part, Section, Table
from tombola.report.words import case_verdict, count, listed, verdict, warnings
from tombola.stats.estimate import t_quantile
from tombola.study.results import Results

MANY_TASKS = 4  # are counted in the title
MANY_CASES = 6  # open on demand
OWN = "task-"  # anchors of the sections of one task and search
FEW_ALIKE = 3  # of one task: of more the parts that hold them side by side say it in less room
MANY_WARNINGS = 24  # likewise
LARGE = 1_200_000  # characters: a page that would be larger has its sections packed

# Anchor, heading, and what stands under it; a part that these results have no rows for is left out.
PARTS: Sequence[tuple[str, str, Sequence[Callable[[str, Study], tuple[Part, ...]]]]] = (
    ("tickets", "Tickets and controls", (
        about_study.bar_parts, about_study.versus_parts, about_study.epoch_parts, about_study.answer_parts,
    )),
    ("seeds", "Do seeds and tasks agree?", (
        about_masks.stability_parts, about_masks.task_overlap_parts, about_masks.task_survival_parts,
        about_masks.chosen_on_parts, about_variants.super_parts, about_beside.crossed_parts, about_values.kept_parts,
        about_values.value_parts, about_values.error_parts, about_values.transfer_parts,
    )),
    ("search", "What searches go by", (about_heads.importance_parts, about_heads.order_parts, about_heads.magnitude_parts)),
    ("sparsity", "How much can go", (about_removal.sparsity_parts, about_variants.joined_parts, about_variants.matched_parts)),
    ("frontier", "What sparsity buys", (about_frontier.frontier_parts,)),
    ("modes", "What training owes to what", (about_variants.mode_parts,)),
    ("attention", "What heads look at", (about_heads.attention_parts,)),
    ("landscape", "The loss around tickets", (about_beside.landscape_parts,)),
    ("groups", "Shortcuts", (
        about_robust.robust_parts, about_robust.group_parts, about_robust.start_parts, about_begin.begin_parts,
        about_robust.schedule_parts, about_beside.subgroup_parts,
    )),
    ("lesions", "What breaks the model", (about_removal.lesion_parts,)),
    ("chains", "Chains of train, prune, rewind", (
        about_chains.chain_parts, about_joint.joint_parts, about_chains.beside_parts, about_chains.rewinding_parts,
        about_chains.connectivity_parts,
    )),
    ("transfer", "Tickets on other tasks", (
        about_transfer.transfer_parts, about_transfer.start_parts, about_transfer.size_parts, about_transfer.share_parts,
    )),
    ("settings-compared", "What settings change", (about_variants.setting_parts,)),
    ("reference", "Beside published numbers", (about_beside.reference_parts,)),
)  # fmt: skip


def build_page(
    results: Results,
    out: Path,
    extra: Sequence[Section] = (),
    tables: Path | None = None,
    figures: Path | None = None,
    each_task: bool = True,
) -> Path:
    """The path of the page it wrote, `out`: one HTML file that needs nothing else, complete or not there at all.

    `extra` sections come first. tables, figures: folders for what stands on the page, as files of its own; each_task=False leaves
    out what is of one task and search alone, unless there is but one.
    Raises: StoreError if `out` is a folder, or one of the folders a file.
    """
    if out.is_dir():
        raise StoreError("the page is one file", got=f"the folder {out}", expected="a file name", next=f"use {out / 'page.html'}")
    for folder in (tables, figures):
        if folder is not None and folder.is_file():
            raise StoreError("tables and figures are many files", got=f"the file {folder}", expected="a folder, or none yet")
    study = study_of(results)
    sections = [*extra, *sections_of(study)]
    apart = [one for one in sections if each_task or len(study.cases) == 1 or not one.anchor.startswith(OWN)]
    if tables is not None:
        overview = Part("overview", "Overview", "Overview", tables=tuple(overview_tables(study)))
        write_tables([Section("overview", "Overview", "", (overview,)), *apart], tables)
    if figures is not None:
        write_figures(apart, figures)
    return write_whole(out, _page(study, sections))


def render(results: Results, extra: Sequence[Section] = ()) -> str:
    """The page as HTML; `extra` sections come first. The same results give the same text: it holds no clock and no path."""
    study = study_of(results)
    return _page(study, [*extra, *sections_of(study)])


def _page(study: Study, sections: Sequence[Section]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("tombola.report", "."),
        autoescape=True,  # names and labels may hold anything; only what `figures` drew passes as it is
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results, cases, tasks = study.results, study.cases, study.tasks
    ids = {name: str(i) for i, name in enumerate(tasks)} | {"*": "*"}
    environment.filters["svg"] = Markup
    environment.filters["sha256"] = lambda text: b64encode(sha256(str(text).encode()).digest()).decode()
    environment.filters["task"] = lambda said: " ".join(ids.get(one, "") for one in ([said] if isinstance(said, str) else said))
    environment.filters["pack"] = lambda text: b64encode(compress(str(text).encode(), 9)).decode()
    environment.filters["keys"] = lambda keys: " ".join(key[:8] for key in keys)
    style, script = (files("tombola.report").joinpath(name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    page = partial(
        environment.get_template("page.html.j2").render,
        style=f"\n{style}",
        script=f"\n{script}",
        quantiles=" ".join(f"{t_quantile(float(df)):.6f}" for df in range(1, 31)),
        title=listed(tasks) if len(tasks) <= MANY_TASKS else f"{len(tasks)} tasks",
        facts=facts_of(study),
        tasks=tasks if cases else (),
        seeds=study.seeds,
        command=results.command,
        verdict=verdict_of(study),
        overview=overview_tables(study),
        glance=glance_table(cases) if len(cases) > 1 else None,
        warnings=_folded(warnings(results.warnings, cases)),
        sections=sections,
        settings=_mapping_table("Settings of this study, as resolved", results.settings),
        provenance=_mapping_table("What the numbers were made from", results.provenance),
    )
    plain: str = page(pack=False)
    return plain if len(plain) <= LARGE else page(pack=True)


def sections_of(study: Study) -> list[Section]:
    """The questions over all tasks that these results can answer, then each task and search by itself; a lone one comes first."""
    found = []
    for anchor, title, functions in PARTS:
        parts = tuple(part for i, function in enumerate(functions, 1) for part in function(f"{anchor}-{i}", study))
        if parts:
            found.append(Section(anchor, title, "", parts))
    subject = ("groups",) if study.results.robust else ("chains", "transfer") if study.results.chains.levels else ()
    found.sort(key=lambda section: section.anchor not in subject)  # what a study is about comes first
    alone = [case for case in study.cases if _stands_alone(case, study)]
    many = len(alone) > MANY_CASES
    own = [_section(f"{OWN}{i}", study, case, len(alone), many) for i, case in enumerate(alone, start=1)]
    return [*own, *found] if len(study.cases) == 1 else [*found, *own]


def _stands_alone(case: Case, study: Study) -> bool:
    """Whether a case has a section of its own: not what a part over all tasks shows in full already."""
    alike = sum(one.task == case.task for one in study.cases)
    if len(study.cases) <= MANY_CASES and alike <= FEW_ALIKE:
        return True
    levels = case.settings.get("method") == "imp" and bool(study.results.chains.levels)
    robust = case.settings.get("method") == "learned" and bool(study.results.robust)
    shown_together = bool(case.family) or case.settings.get("method") == "one-shot" or levels or robust
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


def overview_tables(study: Study) -> list[Table]:
    """What stands above all parts: a line a task and search, and which claims hold."""
    found = (overview_table(study) if len(study.cases) > 1 else None, claims_table(study))
    return [table for table in found if table]


def verdict_of(study: Study) -> str:
    """What the page says first: of robustness, and of good against random tickets."""
    return " ".join(said for said in (about_robust.robust_verdict(study), verdict(study.cases)) if said)


def facts_of(study: Study) -> str:
    """Models, tasks, seeds, presets, searches and cost, in one line."""
    rows: Rows = (*study.results.scores, *study.results.tickets)
    models = listed(list(dict.fromkeys(row.model for row in rows)))
    presets = sorted({str(case.settings["preset"]) for case in study.cases if "preset" in case.settings})
    searches = list(dict.fromkeys(case.search for case in study.cases if case.search and case.settings and not case.family))
    said = [models, count(len(study.tasks), "task"), count(len(study.seeds), "seed")]
    said += [f"preset{'s' if len(presets) > 1 else ''} {listed(presets)}"] if presets else []
    said += (
        ["; ".join(dict.fromkeys("one-shot" if name.startswith("one-shot") else name for name in searches))] if searches else []
    )
    said += [str(study.results.provenance[name]) for name in ("cost",) if name in study.results.provenance]
    return " · ".join(said)


def markdown_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a Markdown table; empty if there are none."""
    table = flat_table(cases_of(results), role)
    return markdown(table) if table.rows else ""


def latex_table(results: Results, role: str = "report") -> str:
    """The scores on the splits of one role as a LaTeX tabular (package booktabs); empty if there are none."""
    table = flat_table(cases_of(results), role)
    return latex(table) if table.rows else ""


def _section(anchor: str, study: Study, case: Case, n: int, many: bool) -> Section:
    parts = [score_part(f"{anchor}-scores-{i}", case, split) for i, split in enumerate(case.splits, start=1)]
    if len(case.shapes) == 1:
        about_masks = (
            survival_part(f"{anchor}-survival", case, lean=many),
            search_part(f"{anchor}-search", case),
            size_part(f"{anchor}-sizes", case),
            overlap_part(f"{anchor}-overlap", case, study.stability_of(case)),
        )
        parts += [part for part in about_masks if part]
    said = said_of(case) if many else case_verdict(case) if n > 1 else ""
    return Section(anchor, case.title, said, tuple(parts), case.task, folded=many, case=True)


def _mapping_table(caption: str, values: Mapping[str, object]) -> Table | None:
    rows = tuple((str(name), str(value)) for name, value in values.items())
    return Table(caption, ("Name", "Value"), rows) if rows else None
