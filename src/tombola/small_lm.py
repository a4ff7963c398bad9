"""A small causal language model that is drawn and trained here, so that generation can be studied without a download.

    tombola.small_lm.write_small_lm("out/small-lm")            # a Llama of 0.1 M parameters, some ten seconds of one core

It reads sentences in the words of the task `agreement`, from which it can learn which nouns are plural but not that verbs agree.
Any causal model does in its place (SmolLM2, `demo-decoder`); a vocabulary of a hundred words is what makes this one small.
"""

import random
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from tombola.errors import TombolaError
from tombola.objective import Objective
from tombola.tasks import Rows, agreement
from tombola.tasks.encode import encode
from tombola.train import RunSeeds, TrainSettings, fine_tune

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

SPECIAL = ("<end>", "<unknown>")  # ends and pads; stands for what it has not read
USUAL = TrainSettings(learning_rate=2e-3, epochs=2, batch_size=32, warmup_steps=50)


def write_small_lm(
    folder: Path | str,
    *,
    family: Literal["llama", "gpt2"] = "llama",
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    sentences: int = 6000,
    settings: TrainSettings = USUAL,
    seed: int = 0,
) -> Path:
    """Trains such a model and writes it and its tokenizer, a word a token, into `folder`, which it returns.

    Of every sentence all words but the first are predicted. With `epochs=0` in `settings` its weights are as they were drawn.
    Raises: TombolaError when the folder is there and not empty.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise TombolaError(f"{folder} is not empty", expected="a new folder", next="remove it, or name another")
    rng = random.Random(f"plain/{seed}")
    texts = [agreement.plain(rng) for _ in range(sentences)]
    rows = Rows(tuple(f"plain:{i}" for i in range(sentences)), tuple((text,) for text in texts), (None,) * sentences)
    tokenizer = word_tokenizer(agreement.words())
    encoded = encode(tokenizer, rows, 64, objective=Objective(tokens=True))
    model = _drawn(family, len(tokenizer), width, layers, heads, positions=64, seed=seed)
    fine_tune(model, encoded, settings, RunSeeds(head=seed, data=seed, dropout=seed, mask=seed))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def word_tokenizer(words: list[str]) -> "PreTrainedTokenizerFast":
    """A tokenizer of which each of these words is a token; blanks separate."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[1]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=SPECIAL[0], pad_token=SPECIAL[0], unk_token=SPECIAL[1], bos_token=None
    )


def _drawn(family: str, vocabulary: int, width: int, layers: int, heads: int, *, positions: int, seed: int) -> "PreTrainedModel":
    import transformers

    ids = {"vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 0, "bos_token_id": 0}
    if family == "gpt2":
        sizes = {"n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": positions}
        config: transformers.PretrainedConfig = transformers.GPT2Config(**sizes, **ids)
    else:
        config = transformers.LlamaConfig(
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            intermediate_size=3 * width,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            **ids,
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = transformers.AutoModelForCausalLM.from_config(config)
    return model
