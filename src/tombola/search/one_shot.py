"""One-shot pruning: the mask of a given sparsity, in one step and without a floor.

Source: Prasanna et al. 2020, released code (X8 of the reproduction's list: global magnitude and random at 0.2, 0.5, 0.7).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Lt
from torch import nn

from tombola.criteria import CRITERIA, Given, parameters_of
from tombola.evaluate import Score, predict, score
from tombola.gates import restored
from tombola.mask import Mask
from tombola.prune import Granularity, prune
from tombola.search.magnitude import CriterionName, multiply
from tombola.tasks.encode import Encoded, batches


@dataclass(frozen=True, slots=True, kw_only=True)
class OneShotSettings:
    """Options of one-shot pruning, by the names that they have in m-pruning."""

    sparsity: Annotated[float, Ge(0), Lt(1)] = 0.5  # removed share of the maskable values, in [0, 1)
    criterion: CriterionName = "magnitude"
    scope: str = "prasanna2020"
    granularity: Granularity = "global"


@dataclass(frozen=True, slots=True)
class OneShotResult:
    mask: Mask
    score: Score | None  # under the mask, on the selection rows; None without rows


def one_shot(
    model: nn.Module,
    names: Sequence[str],
    selection: Encoded | None,
    metric: str,
    settings: OneShotSettings,
    *,
    seed: int = 0,
) -> OneShotResult:
    """The mask that removes exactly round(sparsity · n) values, lowest score first, and what the model scores under it.

    Arguments are those of `m_prune`; without `selection` nothing is scored, and `metric` plays no part. The weights are put
    back bit for bit.
    Raises: MaskError for names that the model does not have; DataError for a criterion that needs rows when there are none.
    """
    parameters, criterion = parameters_of(model, names), CRITERIA[settings.criterion]
    device = next(model.parameters()).device
    rows = batches(selection, device=device) if criterion.needs_rows and selection is not None else None
    of = criterion.scores(Given(model=model, names=names, batches=rows, seed=seed))
    kept = prune(of, settings.sparsity, granularity=settings.granularity)
    if selection is None:
        return OneShotResult(Mask(values=kept), None)
    with restored(parameters.values()):
        multiply(parameters, kept)
        return OneShotResult(Mask(values=kept), score(predict(model, selection), metric))
