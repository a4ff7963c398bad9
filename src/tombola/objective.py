"""What a model is asked, and how it is loaded to be asked it.

    classes   a classification head, one output a class
    value     a head of a single output: a regression
    words     no head: a causal language model goes on with one of several words, one for each class
    tokens    language modelling itself: each token from those before it
    masked    masked language modelling: tokens that are hidden, from all others
    span      an answer within a text: where it begins and where it ends

The first three give a row of logits for a row of text, so that nothing above this file tells them apart. The others give one for
each of several things that are asked in turn, with the label of the next: what `tombola.scores` knows by its shape, and all that
it can do with one of them it can do with all. Masked models and models of spans have hooks that bring them into this shape.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from tombola.anatomy import evaluating, probe_inputs
from tombola.errors import TombolaError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Kind = Literal["classes", "value", "words", "tokens", "masked", "span"]
Form = Literal["", "masked", "span"]  # of what is asked without class names, where it is not the next token


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
    form: Form = ""

    @property
    def kind(self) -> Kind:
        if self.form:
            return self.form
        if self.tokens:
            return "tokens"
        return "words" if self.prompt is not None else "value" if len(self.labels) == 1 else "classes"

    @property
    def causal(self) -> bool:
        """Whether it asks a causal language model, without a head of its own."""
        return self.kind in ("words", "tokens")

    def describe(self) -> dict[str, Any]:
        """What is not said by the labels alone, as JSON; nothing for a head."""
        if self.form:
            return {"form": self.form}
        if self.tokens:
            return {"tokens": True}
        return {} if self.prompt is None else {"prompt": asdict(self.prompt)}

    @staticmethod
    def from_description(labels: tuple[str, ...], said: Mapping[str, Any]) -> "Objective":
        """The objective that `describe` was called on."""
        prompt = said.get("prompt")
        read = None if prompt is None else Prompt(prompt["template"], tuple(prompt["words"]))
        return Objective(labels, read, bool(said.get("tokens", False)), said.get("form", ""))


def load_weights(source: Path, objective: Objective | tuple[str, ...], *, head_seed: int) -> "PreTrainedModel":
    """The model in a folder, in fp32 and eval mode, ready to be asked `objective` (of class names alone: by a head of these).

    A head it lacks is drawn from `head_seed`, and from nothing else. The names of the classes go into the config, so that
    labels are joined by name wherever the model goes; without any, the config of the folder decides. A single label is the
    name of a value: the model is a regression, its loss the squared error. Whatever a config said of the kind of problem
    before gives way. A model that answers by words is an ordinary causal language model whose output is turned into one of
    classes while `LabelWords` is on it. Masked models and models of spans are given the pooler of the base, which they do not
    read, so that all models of a base have the same maskable values; `model.tombola_idle` names its parameters.

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
    kind = getattr(transformers, AUTO.get(objective.kind, "AutoModelForSequenceClassification"))
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # "newly initialized" is what we asked for
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(head_seed)
        try:
            model: PreTrainedModel = kind.from_pretrained(source, dtype=torch.float32, **named)
        except (OSError, ValueError, RuntimeError) as error:
            names = f"a classifier of {len(objective.labels)} classes" if objective.labels else "a classifier"
            others = {"value": "a regression", "masked": "a masked language model", "span": "a model that answers by spans"}
            wanted = ({"classes": names} | others).get(objective.kind, "a causal language model")
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
    if objective.form:
        _give_pooler(model, source)
        (HiddenTokens if objective.form == "masked" else AnswerSpans)(model)
    if objective.prompt is not None:
        LabelWords(model, word_ids(transformers.AutoTokenizer.from_pretrained(source), objective.prompt.words))
    return model


AUTO = {  # kind → the class that loads such a model; all others have a head of classes
    **dict.fromkeys(("words", "tokens"), "AutoModelForCausalLM"),
    "masked": "AutoModelForMaskedLM",
    "span": "AutoModelForQuestionAnswering",
}


def _give_pooler(model: "PreTrainedModel", source: Path) -> None:
    """The pooler of the base, where this model was built without one and a classifier of the same base has it."""
    import transformers
    from transformers.utils import logging

    body = getattr(model, model.base_model_prefix, None)
    if body is None or getattr(body, "pooler", ...) is not None:
        return
    with torch.device("meta"):
        classifier = transformers.AutoModelForSequenceClassification.from_config(model.config)
    if getattr(getattr(classifier, model.base_model_prefix, None), "pooler", None) is None:
        return
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.random.fork_rng(devices=[]):
            base, read = transformers.AutoModel.from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    finally:
        logging.set_verbosity(verbosity)
    if getattr(base, "pooler", None) is None or any("pooler" in name for name in read["missing_keys"]):
        return
    body.pooler = base.pooler
    prefix = f"{model.base_model_prefix}.pooler."
    model.tombola_idle = tuple(name for name, _ in model.named_parameters() if name.startswith(prefix))


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


class _Hooks(ABC):
    """Hooks around a model's forward pass, and where it has one before the output embeddings; `remove` takes them off.

    Bound methods and no closures: a deep copy of the model takes a copy of this along. A kind of asking says what happens
    before and after, and perhaps which positions go through the output embeddings.
    """

    _labels: Tensor | None = None

    def __init__(self, model: nn.Module, name: str) -> None:
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after),
        ]
        setattr(model, name, self)

    def remove(self) -> None:
        """Takes the hooks off: the model answers as it did before."""
        while self._handles:
            self._handles.pop().remove()

    def _choose(self, model: nn.Module, chosen: Callable[..., Any]) -> None:
        self._handles.append(model.get_output_embeddings().register_forward_pre_hook(chosen))  # type: ignore[operator]

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        self._labels = kwargs.pop("labels", None)
        kwargs.pop("num_items_in_batch", None)  # Trainer's, of a loss over tokens
        self._read(kwargs)
        return args, kwargs

    def _read(self, kwargs: dict[str, Any]) -> None:  # noqa: B027 (most kinds remember nothing)
        """What this kind remembers of the inputs."""

    @abstractmethod
    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        """What the model answers, in the shape of this kind of asking."""


class LabelWords(_Hooks):
    """Hooks that make a causal language model a classifier: logits [batch, class] of what it would say after each row.

    Only the last real position of a row goes through the output embeddings, so that a vocabulary is not paid for at each.
    With `labels` the output has the mean cross-entropy over the classes as its loss, as a classifier's has. Rows are padded
    at their end.
    """

    def __init__(self, model: nn.Module, ids: tuple[int, ...]) -> None:
        self.ids = ids
        self._last: Tensor | None = None
        super().__init__(model, "tombola_words")
        self._choose(model, self._at_last)

    def _read(self, kwargs: dict[str, Any]) -> None:
        self._last = kwargs["attention_mask"].sum(1) - 1

    def _at_last(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden = args[0]
        return (hidden[torch.arange(len(hidden), device=hidden.device), self._last][:, None], *args[1:])

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        from transformers.modeling_outputs import SequenceClassifierOutput

        logits = output.logits[:, 0, list(self.ids)]
        loss = None if self._labels is None else nn.functional.cross_entropy(logits, self._labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class HiddenTokens(_Hooks):
    """Hooks that ask a masked language model for hidden tokens alone: logits [batch, 1 + hidden, vocabulary].

    The batch says in `at` [batch, 1 + hidden] where they are, then a place that is not read; entry j answers for label j + 1, as
    in language modelling, so that label 0 is none (-100). Only these positions go through the output embeddings: of a vocabulary
    of 30,000 the others would take most of a step. With `labels` the output has the mean cross-entropy over hidden tokens as its
    loss. Without `at` the model answers as ever.
    """

    def __init__(self, model: nn.Module) -> None:
        self._at: Tensor | None = None
        super().__init__(model, "tombola_asked")
        self._choose(model, self._at_hidden)

    def _before(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(kwargs)
        self._at = kwargs.pop("at", None)
        return (args, kwargs) if self._at is None else super()._before(_, args, kwargs)

    def _at_hidden(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._at is None:
            return args
        hidden = args[0]
        return (hidden.gather(1, self._at[..., None].expand(-1, -1, hidden.shape[-1])), *args[1:])

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        if self._at is None:
            return output
        from transformers.modeling_outputs import MaskedLMOutput

        return MaskedLMOutput(loss=_loss_of_next(output.logits, self._labels), logits=output.logits)


class AnswerSpans(_Hooks):
    """Hooks that ask a model of spans for beginning and end in turn: logits [batch, 3, position].

    Entry 0 is the beginning and entry 1 the end, for labels 1 and 2 (label 0 is none, and entry 2 is not read), as in language
    modelling. Padding cannot be chosen: without that a row's loss would depend on the rows it is padded with, as it does in
    transformers. With `labels` the output has the mean of both cross-entropies as its loss.
    """

    def __init__(self, model: nn.Module) -> None:
        self._real: Tensor | None = None
        super().__init__(model, "tombola_asked")

    def _read(self, kwargs: dict[str, Any]) -> None:
        self._real = kwargs.get("attention_mask")

    def _after(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        from transformers.modeling_outputs import TokenClassifierOutput

        logits = torch.stack([output.start_logits, output.end_logits, torch.zeros_like(output.end_logits)], 1)
        if self._real is not None:
            logits = logits.masked_fill((self._real == 0)[:, None], torch.finfo(logits.dtype).min)
        return TokenClassifierOutput(loss=_loss_of_next(logits, self._labels), logits=logits)


def _loss_of_next(logits: Tensor, labels: Tensor | None) -> Tensor | None:
    """The mean cross-entropy of labels [batch, 1 + n] of which entry j + 1 is answered by entry j of the logits."""
    if labels is None:
        return None
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


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
