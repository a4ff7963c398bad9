"""tombola: lottery tickets for pre-trained transformers. Find them, test them honestly, compare, retrain and keep them.

    tickets = tombola.find("demo", "acceptability", seeds=(0, 1), train_rows=1000)
    ticket = tombola.Ticket.from_pretrained("my-ticket")
    model = tombola.load(ticket, weights="base")       # an ordinary PreTrainedModel, the mask held
    with tombola.ablate(model, layer=3, head=5): ...   # a head away, proved to act

Importing this module is cheap: torch and transformers are loaded with the first name that needs them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from tombola._version import __version__
from tombola.autoload import teach

if TYPE_CHECKING:
    from tombola.adapter import Adapters
    from tombola.anatomy import Anatomy, Layout, read_anatomy
    from tombola.callback import HoldMask
    from tombola.cut import shrink
    from tombola.errors import TombolaError
    from tombola.evaluate import predict, score
    from tombola.export import ship
    from tombola.gates import Gates, ablate, hold, load, masked, prove_acts
    from tombola.held import HeldValues
    from tombola.hub import push_to_hub
    from tombola.legacy import import_mask, import_ticket
    from tombola.levels import Levels
    from tombola.mask import Mask
    from tombola.objective import Objective, Prompt
    from tombola.pruned4 import load_pruned_heads
    from tombola.report.build import build_page
    from tombola.scope import scope_parameters
    from tombola.search.controls import ControlSettings, control
    from tombola.search.imp import ImpSettings, imp
    from tombola.search.magnitude import MPruneSettings, m_prune
    from tombola.search.one_shot import OneShotSettings, one_shot
    from tombola.search.structured import SPruneSettings, s_prune
    from tombola.study.jobs import find
    from tombola.study.reference import compare_with_reference
    from tombola.study.results import collect
    from tombola.tasks import Rows, Task, asked_in_words, corpus_task, files_task, hub_task
    from tombola.ticket import Ticket
    from tombola.timing import bench
    from tombola.train import RunSeeds, TrainSettings, fine_tune

# Every public name, and the room it lives in.
_ROOMS = {
    "Adapters": "adapter",
    "Anatomy": "anatomy",
    "ControlSettings": "search.controls",
    "Gates": "gates",
    "HeldValues": "held",
    "HoldMask": "callback",
    "ImpSettings": "search.imp",
    "Layout": "anatomy",
    "Levels": "levels",
    "MPruneSettings": "search.magnitude",
    "Mask": "mask",
    "OneShotSettings": "search.one_shot",
    "Objective": "objective",
    "Prompt": "objective",
    "Rows": "tasks",
    "RunSeeds": "train",
    "SPruneSettings": "search.structured",
    "Task": "tasks",
    "Ticket": "ticket",
    "TombolaError": "errors",
    "TrainSettings": "train",
    "ablate": "gates",
    "asked_in_words": "tasks",
    "bench": "timing",
    "build_page": "report.build",
    "collect": "study.results",
    "compare_with_reference": "study.reference",
    "control": "search.controls",
    "corpus_task": "tasks",
    "find": "study.jobs",
    "files_task": "tasks",
    "fine_tune": "train",
    "hold": "gates",
    "hub_task": "tasks",
    "imp": "search.imp",
    "import_mask": "legacy",
    "import_ticket": "legacy",
    "load": "gates",
    "load_pruned_heads": "pruned4",
    "m_prune": "search.magnitude",
    "masked": "gates",
    "one_shot": "search.one_shot",
    "predict": "evaluate",
    "prove_acts": "gates",
    "push_to_hub": "hub",
    "read_anatomy": "anatomy",
    "s_prune": "search.structured",
    "scope_parameters": "scope",
    "score": "evaluate",
    "ship": "export",
    "shrink": "cut",
}

__all__ = [
    "Adapters",
    "Anatomy",
    "ControlSettings",
    "Gates",
    "HeldValues",
    "HoldMask",
    "ImpSettings",
    "Layout",
    "Levels",
    "MPruneSettings",
    "Mask",
    "Objective",
    "OneShotSettings",
    "Prompt",
    "Rows",
    "RunSeeds",
    "SPruneSettings",
    "Task",
    "Ticket",
    "TombolaError",
    "TrainSettings",
    "__version__",
    "ablate",
    "asked_in_words",
    "bench",
    "build_page",
    "collect",
    "compare_with_reference",
    "control",
    "corpus_task",
    "files_task",
    "find",
    "fine_tune",
    "hold",
    "hub_task",
    "imp",
    "import_mask",
    "import_ticket",
    "load",
    "load_pruned_heads",
    "m_prune",
    "masked",
    "one_shot",
    "predict",
    "prove_acts",
    "push_to_hub",
    "read_anatomy",
    "s_prune",
    "scope_parameters",
    "score",
    "ship",
    "shrink",
]

teach()  # transformers, to load shrunk models


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module 'tombola' has no attribute {name!r}")
    return getattr(import_module(f"tombola.{_ROOMS[name]}"), name)


def __dir__() -> list[str]:
    return __all__
