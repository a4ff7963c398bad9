"""Chains of iterative magnitude pruning as cells: what each round is, which work it shares, and what comes of it.

    dense      the model fine-tuned as ever; where the first round would train just that, it is taken for it
    snapshot   the base trained up to the rewind step; none where that is the base itself
    levels     one cell a round: trains the mask of the level before, and holds the ticket of its own level
    last       trains and scores the last level

A round takes the ticket of the round before, so that a chain that is killed goes on in the round it was in.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from tombola.anatomy import Layout
from tombola.errors import SettingsError, TombolaError
from tombola.levels import Levels
from tombola.losses import LOSSES
from tombola.search.imp import Round, rounds, settings_for, sparsities
from tombola.study.cells import Cell, Lab
from tombola.study.data import task_of
from tombola.study.settings import Settings
from tombola.study.steps.shared import ticket_of
from tombola.tasks import Task
from tombola.ticket import Ticket

# Options of a chain that decide how many rounds there are, how long one is, what is done with their tickets, or how rows are
# read: no part of a round. What is reported is said by the cell itself, where it is not the last state.
NO_PART = (
    *("imp_last_level", "artefact_level", "mlm_eval_masks", "mlm_accuracy_weight", "pruned_weight_decay"),
    *("squad_epochs", "mlm_finetune_steps", "std_kind", "report_checkpoint"),
)


@dataclass(frozen=True, slots=True)
class Chain:
    """The cells of one seed of a chain; the ticket of level k is that of `levels[k - 1]`."""

    seed: int
    dense: Cell
    snapshot: Cell | None
    levels: tuple[Cell, ...]
    last: Cell
    sparsities: tuple[float, ...]  # asked for, of levels 1, 2, …
    plan: tuple[Round, ...]
    settings: Settings

    @property
    def cells(self) -> tuple[Cell, ...]:
        return (self.dense, *([] if self.snapshot is None else [self.snapshot]), *self.levels, self.last)

    def scored(self, level: int) -> Cell:
        """The cell that has the scores of a level, trained: the round that comes after it; of level 0 the dense model."""
        if level == 0:
            return self.dense
        return self.levels[level] if level < len(self.levels) else self.last

    def at(self, sparsity: float) -> Cell:
        """The cell with the ticket of a sparsity; under artefact_level = off_by_one that of the level that is filed there.

        Raises: SettingsError when the chain has no such level.
        """
        back = 0
        if self.settings.search.artefact_level == "off_by_one":  # the file is from before the cut; of MLM from before two
            back = 2 if "mlm" in self.dense.settings["data"] else 1
        return self.levels[at_sparsity(self.sparsities, sparsity, back)]


def at_sparsity(levels: Sequence[float], sparsity: float, back: int = 0) -> int:
    """Which of these levels, from 0, has the ticket of a sparsity; `back` levels before it where its file holds that.

    Raises: SettingsError when none has.
    """
    near = [k for k, one in enumerate(levels) if abs(one - sparsity) < 1e-9]
    if not near or near[0] < back:
        got = f"{sparsity:g}" + (f", whose file holds the mask {back} levels before" if back else "")
        expected = ", ".join(f"{one:g}" for one in levels[back:])
        raise SettingsError([TombolaError("the chain has no ticket of this sparsity", got=got, expected=expected)])
    return near[0] - back


def cuts_of(one: Round, after: Round | None, at: Sequence[float], said: Mapping[str, Any]) -> dict[str, Any]:
    """What the cell of a round says of the round: what it trains, cuts, and keeps for the one after it.

    at: sparsity of levels 0, 1, …; said: the options of the chain.
    """
    level = one.level
    return {
        "search": {**said, "sparsity": at[min(level + 1, len(at) - 1)]},
        "round": one.describe(),
        "cuts": None if after is None else {"level": level + 1, "since": at[level], "to": at[level + 1]},
        "keep_weights": after is not None and after.start == "carried",
        "keep_head": after is not None and after.head == "carried" and after.start == "snapshot",
    }


def plan_chains(
    lab: Lab,
    model: str,
    task: str | Task,
    settings: Settings,
    run_seeds: Sequence[int],
    layout: Sequence[Layout] | None = None,
) -> list[Chain]:
    """The cells of a chain for each run seed. Reads the data and, unless all is in the store, the model's parts; computes
    nothing.

    Raises: as `plan_find`; SettingsError for a rewind step that cannot be read or is past the end of a round.
    """
    from tombola.study.runs import check_base, check_losses, common_settings, of_seed, plan_bias, step_cell

    common = common_settings(lab, model, task, settings, layout)
    mlm = "mlm" in common["data"]
    options = settings_for(settings.search, mlm=mlm)
    objective = task_of(lab, common["data"]["task"], common["data"].get("source")).objective
    check_losses(objective, settings.loss, (settings.loss.loss,))
    rows = train_rows(lab, common, objective)
    train = settings.train
    plan = rounds(options, rows=rows, batch_size=train.batch_size, epochs=train.epochs, steps=train.steps)
    at = (0.0, *sparsities(options))
    first = plan[0].schedule_from  # the rewind step
    said = {name: value for name, value in asdict(options).items() if name not in NO_PART}
    chains = []
    for run, seeds in zip(run_seeds, settings.seeds, strict=True):
        own = of_seed(common, run, seeds)
        if mlm and settings.search.mlm_eval_masks == "redrawn":
            own |= {"data": own["data"] | {"mlm": own["data"]["mlm"] | {"eval_seed": 1 + run}}}
        shared = own | {"train": train.plain()}
        known = plan_bias(common, settings.loss, settings.loss.loss)
        if "teacher" in LOSSES[settings.loss.loss].needs:
            known["teacher"] = step_cell("fine_tune", shared | {"keep_weights": True})
        shared |= settings.loss.plain(settings.loss.loss)  # of the dense model and of every round
        unscored, shared = shared, shared | reported(settings)
        dense = step_cell("fine_tune", shared | {"keep_weights": True}, **known)
        snapshot = None
        if first:
            stretch = {"steps": first, "schedule_steps": plan[0].schedule_steps, "rows_from": 0, "schedule_from": 0}
            snapshot = step_cell("snapshot", unscored | {"stretch": stretch, "keep_weights": True}, **known)
        given: dict[str, Cell] = {} if snapshot is None else {"snapshot": snapshot}
        levels: list[Cell] = []
        for one, after in zip(plan, [*plan[1:], None], strict=True):
            described = {"method": "imp", "preset": settings.preset} | cuts_of(one, after, at, said)
            inputs: dict[str, Cell] = {"dense": dense} | known | given | ({"ticket": levels[-1]} if levels else {})
            if one.level == 0 and _is_dense(one, options.mlm_first_cut == "before_training", train.steps_of(rows)):
                described |= {"keep_weights": False, "keep_head": False}  # the dense model has both
                inputs = {"dense": dense, "model": dense} | known
            levels.append(step_cell("round", shared | described, **inputs))
        *of_levels, last = levels
        chains.append(Chain(run, dense, snapshot, tuple(of_levels), last, at[1:], plan, settings))
    check_base(lab, common, settings, [chain.levels[-1] for chain in chains])
    return chains


def _is_dense(one: Round, cuts_first: bool, steps: int) -> bool:
    """Whether the first round is the run that the dense model is."""
    whole = (one.steps, one.rows_from, one.schedule_from, one.schedule_steps) == (steps, 0, 0, steps)
    return whole and not cuts_first


def train_rows(lab: Lab, common: Mapping[str, Any], objective: Any) -> int:
    """How many rows an epoch has: of running text and of spans its blocks and windows, which are counted for it."""
    if not objective.form:
        return int(common["data"]["counts"]["train"])
    from tombola.study.data import encoded_rows, task_data

    cell = Cell("count", 1, common)
    return len(encoded_rows(lab, cell, "train", task_data(lab, common["data"]["task"], common["data"]).train))


def reported(settings: Settings) -> dict[str, str]:
    """What a cell says of the state that it reports: nothing of the last one."""
    which = settings.search.report_checkpoint
    return {} if which == "last" else {"report_checkpoint": which}


def nested(lab: Lab, chain: Chain) -> Ticket:
    """The ticket of the last level with all levels of the chain, which are finished."""
    tickets = [ticket_of(lab, cell) for cell in chain.levels]
    return replace(tickets[-1], levels=Levels.of([one.mask for one in tickets]), level=len(tickets))
