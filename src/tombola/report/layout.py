"""What the template lays out: finished text and drawings, so that it decides nothing but their place."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Table:
    """Finished text; the first `stubs` columns are row headers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    stubs: int = 1


@dataclass(frozen=True, slots=True)
class Figure:
    """Finished SVG with words around it; `ramp` says what its shades mean."""

    title: str
    svg: str
    caption: str
    ramp: tuple[str, str, str] | None = None  # css class, words at the pale end, words at the strong end
    natural: bool = False  # keeps its size; others share the width of their row


@dataclass(frozen=True, slots=True)
class Part:
    """One heading and what stands under it: rows of figures, tables, and tables that open on demand."""

    anchor: str
    name: str  # in the contents
    title: str
    lead: str = ""
    figures: tuple[tuple[Figure, ...], ...] = ()
    tables: tuple[Table, ...] = ()
    fold: str = ""  # what opens `folded`
    folded: tuple[Table, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """All that is shown of one task."""

    anchor: str
    title: str
    verdict: str
    parts: tuple[Part, ...]
