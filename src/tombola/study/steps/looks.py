"""Which state of a run is reported: the last, or the best of looks at the ends of its epochs (`report_checkpoint`).

The state that a run ends with is what is kept, cut and gone on from, whichever is reported. The best look is chosen on the
selection rows; where these are the rows that are reported (`selection_split=dev`), its score flatters.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tombola.evaluate import Predictions, score
from tombola.study import ranks
from tombola.study.cells import Cell, Lab, write_rows
from tombola.study.data import TaskData
from tombola.study.steps.shared import as_labelled, prediction_rows, read_predictions
from tombola.train import Recipe

BEST = "scores are of the best look on the selection rows, at the end of an epoch, and not of the state that training ended with"
Answers = Mapping[str, Predictions]  # by role


@dataclass(frozen=True, slots=True)
class Looks:
    """Looks at a model while it trains. What it answers is written where a run that is killed finds it when it goes on."""

    folder: Path
    at: frozenset[int]  # steps of the run, from 0: a look comes before each of them
    ask: Callable[[], Answers]

    def before_step(self, step: int, share: float) -> None:
        """To be called before every step of the run."""
        if step in self.at:
            place = self.folder / f"step-{step}"
            place.mkdir(parents=True, exist_ok=True)
            draft = place / "draft.jsonl"
            write_rows(draft, prediction_rows(self.ask()))
            draft.rename(place / "predictions.jsonl")  # never half a look

    def best(self, data: TaskData, last: Answers, steps: int) -> tuple[Answers, dict[str, Any]]:
        """The answers of the best look, the state after all `steps` included, and what is said of all: [step, selection score].

        Of equal ones the latest.
        """
        every: dict[int, Answers] = {step: read_predictions(self.folder / f"step-{step}") for step in sorted(self.at)}
        every[steps] = last
        scores = {
            step: score(as_labelled(data, "selection", of["selection"]), data.task.metric).value for step, of in every.items()
        }
        chosen = max(scores, key=lambda step: (scores[step], step))
        return every[chosen], {"reported_step": chosen, "looks": [[step, value] for step, value in scores.items()]}


def looks_folder(cell: Cell, lab: Lab) -> Path:
    """Where looks lie until the cell is done, a rank's own."""
    return lab.store.scratch(cell.key) / f"looks-{ranks.rank()}"


def epoch_ends(rows: int, batch_size: int, steps: int, rows_from: int = 0) -> frozenset[int]:
    """The steps of a run, or of a stretch that begins `rows_from` steps into the order of rows, that an epoch ends before."""
    per_epoch = -(-rows // batch_size)
    return frozenset(step for step in range(1, steps) if (rows_from + step) % per_epoch == 0)


def looking(recipe: Recipe | None, *looks: Looks) -> Recipe | None:
    """The recipe with these looks."""
    if not looks:
        return recipe
    known = recipe or Recipe()

    def before_step(step: int, share: float) -> None:
        for one in looks:
            one.before_step(step, share)
        known.before_step(step, share)

    said = dict(known.said) | {"looks": [sorted(one.at) for one in looks]}
    return replace(known, before_step=before_step, said=said)
