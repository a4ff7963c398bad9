"""How a language model without a head is asked for the class of a row: one row a task, and one for all others.

Read zero-shot or after fine-tuning, the words are what counts: a template that a model was not trained on costs it much
before, and little after. Templates are plain questions of our own, of no paper.
"""

from collections.abc import Sequence
from dataclasses import replace

from tombola.errors import DataError
from tombola.objective import Prompt
from tombola.tasks.base import Loaded, Task

_ONE, _TWO = "{0}\n", "{0}\n{1}\n"
_PARAPHRASE = Prompt(_TWO + "Do the two sentences mean the same, yes or no? Answer:", (" no", " yes"))
_ENTAILMENT = Prompt(_TWO + "Does the second follow from the first, yes or no? Answer:", (" yes", " no"))
_QUESTIONS = replace(_PARAPHRASE, template=_TWO + "Do the two questions ask the same, yes or no? Answer:")
_INFERENCE = Prompt(_TWO + "Is the second true, given the first: yes, maybe or no? Answer:", (" yes", " maybe", " no"))
_SENTIMENT = Prompt(_ONE + "Sentiment of this review:", (" negative", " positive"))
_CLAIM = Prompt(_TWO + "Is the first true, given the second, yes or no? Answer:", (" yes", " no"))
_FACT = Prompt(_TWO + "Is the first true, given the second: yes, no or unknown? Answer:", (" yes", " no", " unknown"))

PROMPTS: dict[str, Prompt] = {
    "cola": Prompt(_ONE + "Is this sentence grammatical, yes or no? Answer:", (" no", " yes")),
    "sst2": _SENTIMENT,
    "mrpc": _PARAPHRASE,
    "qqp": _QUESTIONS,
    "mnli": _INFERENCE,
    "qnli": replace(_ENTAILMENT, template=_TWO + "Does the second answer the first, yes or no? Answer:"),
    "rte": _ENTAILMENT,
    "wnli": replace(_ENTAILMENT, words=(" no", " yes")),
    "hans": _ENTAILMENT,
    "mnli2": _ENTAILMENT,
    "mnli2-half": _ENTAILMENT,
    "hans+mnli2": _ENTAILMENT,
    "hans-subcases": _ENTAILMENT,
    **dict.fromkeys(("mnli-hans", "mnli+hans", "syn-mnli"), _INFERENCE),
    **dict.fromkeys(("qqp-paws", "qqp+paws", "qqp-paws-wiki", "qqp+paws-wiki", "syn-qqp"), _QUESTIONS),
    **dict.fromkeys(("paws-qqp", "paws-wiki"), _PARAPHRASE),
    **dict.fromkeys(("fever", "fever-symmetric-v1", "fever-symmetric-v2", "fever+symmetric-v2"), _FACT),
    **dict.fromkeys(("fever-symmetric", "fm2"), _CLAIM),
    "syn-sst2": _SENTIMENT,
    "acceptability": Prompt(_ONE + "Is this sentence grammatical, yes or no? Answer:", (" no", " yes")),
    "nli-overlap": _ENTAILMENT,
}


def asked_in_words(task: Task, template: str | None = None, words: Sequence[str] | None = None) -> Task:
    """`task`, its classes asked of a language model in words; by its row of `PROMPTS` where nothing is given.

    Without a row there the template is the texts and "Answer:", and the words are the names of the classes, each with a blank
    before it. Raises: DataError for a task without classes, or when there is not one word for each class; TombolaError as
    `Prompt` does.
    """
    if task.regression or not task.labels:
        raise DataError(
            f"{task.name} has no classes to ask for in words",
            got="a regression" if task.regression else "running text",
            expected="a task with classes",
            next="take a head (no answer=words)" if task.regression else "running text needs no question",
        )
    known = PROMPTS.get(
        task.name, Prompt(("{0}\n{1}\n" if len(task.text) > 1 else "{0}\n") + "Answer:", tuple(f" {x}" for x in task.labels))
    )
    prompt = Prompt(template or known.template, tuple(words or known.words))
    if len(prompt.words) != len(task.labels):
        raise DataError(
            "there is not one word for each class",
            got=", ".join(map(repr, prompt.words)),
            expected=f"{len(task.labels)} words, for {', '.join(task.labels)}",
        )
    asked = replace(task, prompt=prompt)
    if isinstance(task.source, Loaded):
        description = {**task.source.description, **asked.objective.describe()}
        return replace(asked, source=replace(task.source, description=description))
    return asked
