"""A base with a head of its own for a task, its body untouched: where a model was published without the head that a task needs.

Rewinding to pre-training (Chen et al. 2020) starts masked language modelling from the body and the head it was pre-trained with.
A model that has lost that head would start from a drawn one, and its first rounds would be of learning it. `train_head` trains
the head alone and writes a base that has it; everything else is the same bit for bit, so that tickets of other tasks fit it too.
"""

from pathlib import Path
from typing import Any

from tombola.anatomy import read_anatomy
from tombola.errors import TombolaError
from tombola.evaluate import predict, score
from tombola.objective import load_weights
from tombola.scope import SCOPES
from tombola.study.cells import Cell, Lab, write_json
from tombola.study.data import base_folder, encoded_rows, save_tokenizer, task_data, tokenizer_of
from tombola.study.runs import common_settings
from tombola.study.settings import Settings
from tombola.tasks import Task
from tombola.train import fine_tune

NOTE = "tombola-head.json"  # in the folder: what was trained, on what, and what it scores


def train_head(lab: Lab, model: str, task: str | Task, settings: Settings, out: Path) -> dict[str, Any]:
    """Trains the task's head of `model` with its body frozen and writes both to `out`, a model like any other. Returns what NOTE
    says.

    By the data and training settings of `settings` and its first seed. Raises: TombolaError for a model without such a head.
    """
    common, seeds = common_settings(lab, model, task, settings), settings.seeds[0]
    cell = Cell("head", 1, common)
    data = task_data(lab, common["data"]["task"], common["data"])
    loaded = load_weights(base_folder(lab, common["model"]), data.task.objective, head_seed=seeds.head)
    head = set(SCOPES["head"](loaded, read_anatomy(loaded)))
    if not head:
        raise TombolaError("this model has no head apart from its body", got=type(loaded).__name__, expected="an encoder")
    tied = [name for name, p in loaded.named_parameters() if name not in head]
    for name in tied:
        loaded.get_parameter(name).requires_grad_(False)
    loaded.to(common["machine"]["device"])
    before = score(predict(loaded, encoded_rows(lab, cell, "report", data.report)), data.task.metric)
    log = fine_tune(
        loaded, encoded_rows(lab, cell, "train", data.train), settings.train, seeds,
        device=common["machine"]["device"], progress=lab.reporter.share,
    )  # fmt: skip
    after = score(predict(loaded, encoded_rows(lab, cell, "report", data.report)), data.task.metric)
    for parameter in loaded.parameters():
        parameter.requires_grad_(True)
    loaded.save_pretrained(out)
    save_tokenizer(tokenizer_of(lab, cell), out)
    said = {
        "base": common["model"],
        "data": common["data"],
        "train": settings.train.plain(),
        "steps": log.steps,
        "trained": sorted(head),
        "metric": after.metric,
        "before": before.value,
        "after": after.value,
        "majority": after.majority,
        "n": after.n,
    }
    write_json(out / NOTE, said)
    return said
