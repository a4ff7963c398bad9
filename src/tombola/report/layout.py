"""What the template lays out: finished text and drawings, so that it decides nothing but their place.

`task` and `tasks` say what something is about, for the reader's filter; "" is about none alone, and always shown.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Finished text; the first `stubs` columns are row headers. Text that is `Live` follows the seeds that are chosen."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    stubs: int = 1
    tasks: tuple[str | tuple[str, ...], ...] = ()  # of each row: its task, or both of two; "*" of a mean over all

    def task(self, row: int) -> str | tuple[str, ...]:
        return self.tasks[row] if self.tasks else ""


@dataclass(frozen=True, slots=True)
class Figure:
    """Finished SVG with words around it; `ramp` says what its shades mean."""

    title: str
    svg: str
    caption: str
    ramp: tuple[str, str, str] | None = None  # css class, words at the pale end, words at the strong end
    natural: bool = False  # keeps its size; others share the width of their row
    task: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """One heading and what stands under it: rows of figures, tables, and tables that open on demand."""

    anchor: str
    name: str  # in the contents
    title: str
    lead: str = ""
    legend: tuple[tuple[str, str], ...] = ()  # css class, what it stands for
    slider: str = ""  # what a slider over the part's histograms chooses
    figures: tuple[tuple[Figure, ...], ...] = ()
    tables: tuple[Table, ...] = ()
    fold: str = ""  # what opens `folded`
    folded: tuple[Table, ...] = ()
    experiment: str = ""  # of a study, that computes it
    cells: tuple[str, ...] = ()  # keys of the cells that the numbers come from
    all_seeds: bool = False  # its numbers need all seeds: they stay when some are chosen


@dataclass(frozen=True, slots=True)
class Section:
    """All that is shown of one task, or of one question over all tasks."""

    anchor: str
    title: str
    verdict: str
    parts: tuple[Part, ...]
    task: str = ""
    folded: bool = False  # opens on demand
    case: bool = False  # is about one task and search
