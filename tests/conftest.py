"""Fixtures: tiny models of every supported family, a tiny learnable task on disk, the real demo model. No network, ever."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
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

Run = Callable[..., tuple[int, str, str]]

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


_IDS = {"vocab_size": 60, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_USUAL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 40, **_IDS}
_GROUPED = {**_USUAL, "num_key_value_heads": 2}
_DEBERTA = {**_USUAL, "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 8}
_GPT = {"n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40, "n_positions": 40, **_IDS}
_OPT = {**_USUAL, "ffn_dim": 40}
_FALCON = {**_USUAL, "hidden_size": 32, "ffn_hidden_size": 40}
_BART = {
    **{"d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "max_position_embeddings": 40, **_IDS},
    **{"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40},
    "id2label": {0: "bad", 1: "good"},  # of num_labels=2 its config, whose default is 3, says nothing when it is saved
}
_T5 = {
    **{"d_model": 24, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 8, "d_ff": 40},
    **{"vocab_size": 60, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0},
}
_IMAGE = {"image_size": 8, "patch_size": 4}

# Every other family that is read: its class of config, and what that takes for a tiny model of 4 heads.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "albert": ("Albert", {**_USUAL, "embedding_size": 16, "num_hidden_layers": 3}),
    "mpnet": ("MPNet", _USUAL),
    "deberta-v2": ("DebertaV2", {**_DEBERTA, "share_att_key": True, "norm_rel_ebd": "layer_norm"}),
    "deberta-v2-own": ("DebertaV2", {**_DEBERTA, "share_att_key": False}),  # positions have projections of their own
    "modernbert": ("ModernBert", {**_USUAL, "num_hidden_layers": 3, "local_attention": 4, "cls_token_id": 1, "sep_token_id": 2}),
    "gpt2": ("GPT2", _GPT),
    "gpt_neox": ("GPTNeoX", {**_USUAL, "hidden_size": 32}),
    "opt": ("OPT", {**_OPT, "word_embed_proj_dim": 24}),
    "opt-post": ("OPT", {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}),  # as the model of 350M has it
    "llama": ("Llama", _GROUPED),
    "mistral": ("Mistral", {**_GROUPED, "sliding_window": 3}),
    "qwen2": ("Qwen2", _GROUPED),
    "qwen3": ("Qwen3", {**_GROUPED, "head_dim": 8}),
    "gemma3": ("Gemma3Text", {**_GROUPED, "head_dim": 8, "sliding_window": 4}),
    "phi3": ("Phi3", {**_GROUPED, "hidden_size": 32}),
    "bart": ("Bart", _BART),
    "t5": ("T5", _T5),
    "t5-gated": ("T5", {**_T5, "feed_forward_proj": "gated-gelu"}),
    "vit": ("ViT", {**_USUAL, **_IMAGE}),
    "falcon": ("Falcon", {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True}),
    "falcon-mq": ("Falcon", {**_FALCON, "multi_query": True}),  # one kv-head for all
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4, **_IDS}),  # d_ffn is always four times as wide
    "gptj": ("GPTJ", {**_GPT, "n_embd": 32, "rotary_dim": 4}),
    "bigcode": ("GPTBigCode", {**_GPT, "multi_query": False}),  # fused head by head, which its names do not say
    "bigcode-mq": ("GPTBigCode", {**_GPT, "multi_query": True}),
}


def tiny_family(family: str, *, seed: int = 0, attention: str | None = None, **changed: Any) -> Any:
    """A randomly initialised classifier of one family of TINY or FAMILIES, in eval mode, all its parameters random.

    attention: "eager" or "sdpa"; None = what transformers takes. `changed` are fields of the config.
    """
    import transformers

    if family in FAMILIES:
        kind, sizes = FAMILIES[family]
        config = getattr(transformers, f"{kind}Config")(**{**sizes, **changed})
    else:
        config = tiny_model(family).config
        config.update(changed)
    images = isinstance(config, transformers.ViTConfig)
    classifier = transformers.AutoModelForImageClassification if images else transformers.AutoModelForSequenceClassification
    torch.manual_seed(seed)
    model = classifier.from_config(config, **({} if attention is None else {"attn_implementation": attention}))
    return _as_if_trained(model)


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
    return _as_if_trained(transformers.AutoModelForSequenceClassification.from_config(config))


def _as_if_trained(model: Any) -> Any:
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
    from tombola.source import resolve_model

    return resolve_model("demo").folder


@pytest.fixture
def make_tiny() -> Callable[..., Any]:
    """`tiny_model`, for tests that want other sizes."""
    return tiny_model


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs `tombola ARGS` in this process; exit code, stdout, stderr."""
    from tombola import cli

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["tombola", *map(str, arguments)])
        with pytest.raises(SystemExit) as left:
            cli.main()
            sys.exit(0)
        said = capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err

    return call


def sentiment(folder: Path, n: int, seed: int) -> Any:
    """`sentiment_rows` as the tokenizer of a folder encodes them."""
    import transformers

    from tombola.tasks import Rows
    from tombola.tasks.encode import encode

    said = sentiment_rows(n, seed)
    texts, labels = tuple((row["sentence"],) for row in said), tuple(row["label"] for row in said)
    rows = Rows(tuple(f"{seed}:{i}" for i in range(n)), texts, labels)
    return encode(transformers.AutoTokenizer.from_pretrained(folder), rows, 32)


def trained_on_sentiment(folder: Path) -> Any:
    """The model of a folder after 400 of these rows, which it then knows: for tests of searches. Seconds."""
    from tombola.objective import load_weights
    from tombola.train import RunSeeds, TrainSettings, fine_tune

    model = load_weights(folder, ("negative", "positive"), head_seed=0)
    settings = TrainSettings(learning_rate=5e-3, batch_size=16)
    fine_tune(model, sentiment(folder, 400, 1), settings, RunSeeds(head=0, data=0, dropout=0, mask=0))
    return model


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        missing = "chromium and chromedriver are not on the PATH: install the packages chromium and chromium-driver"
        if os.environ.get("TOMBOLA_BROWSER_REQUIRED"):
            pytest.fail(missing)
        pytest.skip(missing)
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
        *("disable-component-update", "disable-sync", f"user-data-dir={tmp_path_factory.mktemp('profile')}"),
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    session = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield session
    session.quit()
