"""What a model is asked, and how it is loaded to be asked it.

    classes   a classification head, one output a class
    value     a head of a single output: a regression
    words     no head: a causal language model goes on with one of several words, one for each class
    tokens    language modelling itself: each token from those before it

The first three give a row of logits for a row of text, so that nothing above this file tells them apart; the last gives one
for each position, which `tombola.scores` knows by its shape.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tombola.anatomy import evaluating, probe_inputs
from tombola.errors import TombolaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["classes", "value", "words", "tokens"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """How a language model is asked for a class: what it reads, and what it would say for each class.

    template   the texts of a row stand for {0} and {1}; what follows the last of them is never cut off
    words      one for each class, in the order of the labels, with the blank it begins with; known by its first token
    """

    template: str
    words: tuple[str, ...]

    def __post_init__(self) -> None:
        """Raises: TombolaError saying all that is wrong."""
        wrong = [] if "{0}" in self.template else ["the template has no {0}, where the text goes"]
        wrong += [] if len(set(self.words)) == len(self.words) > 1 else ["the words are not two different ones or more"]
        if wrong:
            raise TombolaError(
                "this is no prompt",
                got=f"{self.template!r} with words {list(self.words)}: {'; '.join(wrong)}",
                expected='for example "{0}\\nSentiment:" with " negative" and " positive"',
            )

    @property
    def question(self) -> str:
        """What follows the last text."""
        return self.template[self.template.rindex("}") + 1 :]

    def body(self, texts: tuple[str, ...]) -> str:
        """What precedes the question, with the texts of a row. Texts are put in as they are: braces in them mean nothing."""
        body = self.template[: self.template.rindex("}") + 1]
        parts = body.split("{1}")
        return (texts[1] if len(texts) > 1 else "").join(part.replace("{0}", texts[0]) for part in parts)


@dataclass(frozen=True, slots=True)
class Objective:
    """What a model is asked; of `labels` alone, a head: of one output for one label, else one output a class."""

    labels: tuple[str, ...] = ()  # class names, in the order of outputs; none: as the model's own config says
    prompt: Prompt | None = None
    tokens: bool = False

    @property
    def kind(self) -> Kind:
        if self.tokens:
            return "tokens"
        return "words" if self.prompt is not None else "value" if len(self.labels) == 1 else "classes"

    @property
    def causal(self) -> bool:
        """Whether it asks a causal language model, without a head of its own."""
        return self.kind in ("words", "tokens")

    def describe(self) -> dict[str, Any]:
        """What is not said by the labels alone, as JSON; nothing for a head."""
        if self.tokens:
            return {"tokens": True}
        return {} if self.prompt is None else {"prompt": asdict(self.prompt)}

    @staticmethod
    def from_description(labels: tuple[str, ...], said: Mapping[str, Any]) -> "Objective":
        """The objective that `describe` was called on."""
        prompt = said.get("prompt")
        read = None if prompt is None else Prompt(prompt["template"], tuple(prompt["words"]))
        return Objective(labels, read, bool(said.get("tokens", False)))


def load_weights(source: Path, objective: Objective | tuple[str, ...], *, head_seed: int) -> "PreTrainedModel":
    """The model in a folder, in fp32 and eval mode, ready to be asked `objective` (of class names alone: by a head of these).

    A head it lacks is drawn from `head_seed`, and from nothing else. The names of the classes go into the config, so that
    labels are joined by name wherever the model goes; without any, the config of the folder decides. A single label is the
    name of a value: the model is a regression, its loss the squared error. Whatever a config said of the kind of problem
    before gives way. A model that answers by words is an ordinary causal language model whose output is turned into one of
    classes while `LabelWords` is on it.

    Raises: TombolaError when the folder holds no such model; for words and tokens also when the model sees what comes after
    a position, or its tokenizer begins two words alike.
    """
    import transformers
    from transformers.utils import logging

    objective = objective if isinstance(objective, Objective) else Objective(objective)
    named = dict[str, Any]()
    if objective.labels and not objective.causal:  # a config that was a regression before would train classes by squared error
        named = {"id2label": dict(enumerate(objective.labels)), "label2id": {x: i for i, x in enumerate(objective.labels)}}
        named["problem_type"] = "regression" if objective.kind == "value" else "single_label_classification"
    kind = transformers.AutoModelForCausalLM if objective.causal else transformers.AutoModelForSequenceClassification
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # "newly initialized" is what we asked for
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_seed)
        try:
            model: PreTrainedModel = kind.from_pretrained(source, dtype=torch.float32, **named)
        except (OSError, ValueError, RuntimeError) as error:
            names = f"a classifier of {len(objective.labels)} classes" if objective.labels else "a classifier"
            wanted = {"classes": names, "value": "a regression"}.get(objective.kind, "a causal language model")
            raise TombolaError(
                f"the model in {source} could not be loaded as {wanted}",
                got=str(error).partition("\n")[0][:200],
                next="check that the folder was written by save_pretrained for this task",
            ) from error
        finally:
            logging.set_verbosity(verbosity)
    model.eval()
    if getattr(model.config, "pad_token_id", None) is None:  # a decoder's head looks for the last token that is no padding
        ends = getattr(model.config, "eos_token_id", None)
        model.config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    if objective.causal:
        _prove_causal(model)
    if objective.prompt is not None:
        LabelWords(model, word_ids(transformers.AutoTokenizer.from_pretrained(source), objective.prompt.words))
    return model


def word_ids(tokenizer: Any, words: tuple[str, ...]) -> tuple[int, ...]:
    """The first token of each word. Raises: TombolaError when two words begin with the same token, or one has none."""
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"][:1] for word in words]
    found = [one[0] for one in ids if one]
    if len(set(found)) < len(words):
        raise TombolaError(
            "the words of the classes cannot be told apart by their first token",
            got=", ".join(f"{word!r}: {tokenizer.convert_ids_to_tokens(one)}" for word, one in zip(words, ids, strict=True)),
            expected="words that begin differently for this tokenizer",
            next="choose other words; most tokenizers want a blank before them",
        )
    return tuple(found)


class LabelWords:
    """Hooks that make a causal language model a classifier: logits [batch, class] of what it would say after each row.

    Only the last real position of a row goes through the output embeddings, so that a vocabulary is not paid for at each.
    With `labels` the output has the mean cross-entropy over the classes as its loss, as a classifier's has. Rows are padded
    at their end. `remove` gives the model back as it was.
    """

    def __init__(self, model: nn.Module, ids: tuple[int, ...]) -> None:
        out = model.get_output_embeddings()  # type: ignore[operator]
        self.ids = ids
        self._last: Tensor | None = None
        self._labels: Tensor | None = None
        # Bound methods and no closures: a deep copy of the model takes a copy of this along.
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            out.register_forward_pre_hook(self._at_last),
            model.register_forward_hook(self._after),
        ]
        model.tombola_words = self  # type: ignore[assignment]

    def remove(self) -> None:
        """Takes the hooks off: the model is a language model again."""
        while self._handles:
            self._handles.pop().remove()

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        self._labels = kwargs.pop("labels", None)
        kwargs.pop("num_items_in_batch", None)  # Trainer's, of a loss over tokens
        self._last = kwargs["attention_mask"].sum(1) - 1
        return args, kwargs

    def _at_last(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self._last][:, None], *args[1:])

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = output.logits[:, 0, list(self.ids)]
        loss = None if self._labels is None else nn.functional.cross_entropy(logits, self._labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def _prove_causal(model: nn.Module) -> None:
    """Raises: TombolaError when changing the last token moves what the model says before it: it would be asked what it sees."""
    inputs = probe_inputs(model, batch=2)
    ids = inputs["input_ids"].clone()
    ids[1, -1] = ids[1, 0]
    with evaluating(model), torch.no_grad():
        before = model(**{**inputs, "input_ids": ids}).logits[:, :-1].float()
    if float((before[0] - before[1]).abs().max()) > 1e-4 * float(before.abs().max()):
        raise TombolaError(
            f"this {type(model).__name__} sees the words it would be asked for",
            got="a position whose output changes with the token after it",
            expected="a causal model: a decoder such as Llama or GPT-2",
            next="ask an encoder by a head instead",
        )
