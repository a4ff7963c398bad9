"""One body that several tasks share, and a head for each: what multi-task training trains, and a ticket of several tasks prunes.

The body is one module, the same object in the model of every task: what moves it for one task moves it for all. Heads stay with
their tasks. A step takes a batch of each task, and its loss is the sum of theirs.
Source: Chen et al. 2020, multi-task iterative magnitude pruning.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from tombola.errors import TombolaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Joint(nn.Module):
    """Models of several tasks with one body. Parameters: those of the body by the names that the models have for them, so that a
    mask of the body fits it as it fits them, and heads as `heads.0.…`, `heads.1.…` in the order of the tasks.

    The body is that of the first model that has all parts any of them has (a base without a pooler has one where a classifier
    drew it). `models` are ordinary models, to be asked one by one; a task named there is a key of the batches of `forward`.
    Raises: TombolaError when there are fewer than two, or their bodies are not of one kind.
    """

    def __init__(self, models: "Mapping[str, PreTrainedModel]") -> None:
        super().__init__()
        first, *others = models.values()
        prefix = str(first.base_model_prefix)
        shapes = {name: _shapes(model, prefix) for name, model in models.items()}
        largest = max(shapes, key=lambda name: len(shapes[name]))  # of as many the first
        wrong = [name for name, own in shapes.items() if not own or not own.items() <= shapes[largest].items()]
        if not others or wrong:
            raise TombolaError(
                "these tasks cannot share a body",
                got=f"{', '.join(models)}; {', '.join(wrong) or 'a single task'} with none that fits",
                expected="two tasks or more, of models whose bodies have the same parameters",
                next="ask all of them of one encoder",
            )
        body = getattr(models[largest], prefix)
        self.base_model_prefix, self.config = prefix, first.config
        self.models = dict(models)  # a plain dict: their parts are registered below, each once
        setattr(self, prefix, body)
        self.heads = nn.ModuleDict()
        for i, model in enumerate(models.values()):
            _retie(model, getattr(model, prefix), body)
            setattr(model, prefix, body)
            head = {part: module for part, module in model.named_children() if part != prefix}
            self.heads[str(i)] = nn.ModuleDict(head)
        self.eval()

    def train(self, mode: bool = True) -> "Joint":
        super().train(mode)
        for model in self.models.values():
            model.training = mode  # its parts are ours
        return self

    def forward(self, batches: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
        """{"loss": the sum over tasks of the loss each model has on its own batch, labels included}."""
        losses = [self.models[name](**batch).loss for name, batch in batches.items()]
        return {"loss": sum(losses[1:], losses[0])}


def _shapes(model: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    """Name → shape of the parameters of a model's body; none where it has no such body."""
    body = getattr(model, prefix, None)
    return {} if not isinstance(body, nn.Module) else {name: tuple(p.shape) for name, p in body.named_parameters()}


def _retie(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Where the head of a model has parameters of its body (output embeddings), it has those of the new body from now on."""
    known = dict(new.named_parameters())
    shared = {id(parameter): known[name] for name, parameter in old.named_parameters()}
    inside = {id(module) for module in old.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in shared:
                    module._parameters[name] = shared[id(parameter)]
