"""Fixtures: tiny models of every supported family, a tiny learnable task on disk, the real demo model. No network, ever."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything of Hugging Face is imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads only wait for each other, and badly so on a shared machine

import hypothesis
import pytest
import torch

hypothesis.settings.register_profile("tombola", deadline=None)  # the machine is shared: time proves nothing
hypothesis.settings.load_profile("tombola")

WORDS = [
    *("a", "the", "film", "plot", "actor", "scene", "music", "was", "felt", "looked", "rather", "very", "quite", "truly"),
    *("good", "great", "superb", "lovely", "bad", "awful", "dull", "poor", "and", "but", "so"),
]

TINY: dict[str, dict[str, Any]] = {
    "bert": {},
    "roberta": {"pad_token_id": 1},
    "electra": {"embedding_size": 16},
    "distilbert": {},
}


def tiny_model(family: str, *, layers: int = 2, heads: int = 4, width: int = 24, d_ffn: int = 40, seed: int = 0) -> Any:
    """A randomly initialised classifier of one family, in eval mode; biases and LayerNorms are random too, as if trained."""
    import transformers

    config = transformers.AutoConfig.for_model(
        family,
        **{
            "vocab_size": 60,
            "hidden_size": width,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "intermediate_size": d_ffn,
            "max_position_embeddings": 40,
            **TINY[family],
        },
    )
    if family == "distilbert":
        config = transformers.DistilBertConfig(
            vocab_size=60, dim=width, n_layers=layers, n_heads=heads, hidden_dim=d_ffn, max_position_embeddings=40
        )
    torch.manual_seed(seed)
    model = transformers.AutoModelForSequenceClassification.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(params=sorted(TINY))
def family(request: pytest.FixtureRequest) -> str:
    """Each family of the anatomy in turn."""
    return str(request.param)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local model folder: a 2-layer, 4-head BERT with a word-level vocabulary, as save_pretrained writes it."""
    import transformers

    folder = tmp_path_factory.mktemp("tiny-bert")
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]) + "\n")
    tokenizer = transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    config = transformers.BertConfig(
        vocab_size=5 + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=32,
    )
    torch.manual_seed(0)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def write_task(folder: Path, task: str, split: str, rows: list[dict[str, Any]]) -> Path:
    """Writes <folder>/<task>/<split>.jsonl, the layout of --data."""
    file = folder / task / f"{split}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def sentiment_rows(n: int, seed: int) -> list[dict[str, Any]]:
    """Balanced rows for the columns of SST-2, decided by one word, with noise in the rest: learnable in seconds."""
    import random

    rng = random.Random(seed)
    kinds = (("bad", "awful", "dull", "poor"), ("good", "great", "superb", "lovely"))
    rows = []
    for i in range(n):
        label = i % 2
        adverb = rng.choice(["rather", "very", "quite", "truly", "so"])
        noun, verb = rng.choice(WORDS[2:7]), rng.choice(WORDS[7:10])
        tail = " ".join(rng.sample(WORDS[:14], rng.randint(0, 6)))
        rows.append(
            {"sentence": f"the {noun} {verb} {adverb} {rng.choice(kinds[label])} {tail}".strip(), "label": label, "idx": i}
        )
    return rows


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A --data folder with a small, easy sst2."""
    folder = tmp_path_factory.mktemp("data")
    write_task(folder, "sst2", "train", sentiment_rows(400, seed=1))
    write_task(folder, "sst2", "validation", sentiment_rows(80, seed=2))
    return folder


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The folder of the real demo model; tests that need it fail without it, since ./dev installs it."""
    from tombola.ticket import resolve_model

    return resolve_model("demo").folder


@pytest.fixture
def make_tiny() -> Callable[..., Any]:
    """`tiny_model`, for tests that want other sizes."""
    return tiny_model
