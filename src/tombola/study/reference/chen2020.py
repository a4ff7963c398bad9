"""The published numbers of Chen et al. 2020, in points; `chen2020.toml` has them and says where each is from."""

from collections.abc import Mapping
from dataclasses import dataclass

from tombola.study.reference import reference

_KNOWN = reference("chen2020")


@dataclass(frozen=True, slots=True)
class Published:
    """A row of the paper's Table 2, in points: means and standard deviations of five runs, controls of one."""

    sparsity: float
    full: tuple[float, float]
    ticket: tuple[float, float]
    random: float
    reinitialised: float
    shuffled: float
    strict: float  # the sparsity by the stricter rule of appendix A; from a public summary, not verified


def _published(row: Mapping[str, object]) -> Published:
    return Published(**{name: tuple(x) if isinstance(x, list) else x for name, x in row.items() if name != "task"})  # type: ignore[arg-type]


TARGETS: tuple[str, ...] = tuple(_KNOWN["tasks"])
TABLE_2: Mapping[str, Published] = {row["task"]: _published(row) for row in _KNOWN["table_2"]}
# At 70 %: source → score minus dense score on TARGETS, in points, and on how many targets but itself it does no worse than their
# own ticket.
FIGURE_2_SPARSITY: float = _KNOWN["figure_2_sparsity"]
FIGURE_2: Mapping[str, tuple[tuple[float, ...], int]] = {
    row["source"]: (tuple(row["minus_dense"]), row["dark"]) for row in _KNOWN["figure_2"]
}
# At the sparsities of Table 2: rewind → score on TARGETS, in points. Quoted from memory, not verified: for orientation only.
TABLE_3_RECALLED: Mapping[str, tuple[float, ...]] = {row["rewind"]: tuple(row["score"]) for row in _KNOWN["table_3"]}


def published_name(task: str) -> str | None:
    """The name the paper has for a task of rows, whatever splits it was read from; None for a task it does not have."""
    name = task.partition(":")[0].partition(" ")[0]
    name = "mlm" if name.startswith("mlm") else name
    return name if name in TABLE_2 else None
