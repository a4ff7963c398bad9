"""GGUF files as models: a single file of quantised weights becomes the ordinary folder that everything else here reads."""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from tombola.errors import TombolaError

VERSION = 1  # rises whenever the same file gives another folder


def folder_of_gguf(file: Path) -> Path:
    """A folder with the de-quantised model (fp32) and tokenizer of a GGUF file; written once, kept in the user's cache.

    The cache is `$XDG_CACHE_HOME/tombola` (`~/.cache/tombola`), the folder named by the content of the file. Weights are what
    the quantised file says, exactly; whoever made that file has rounded them.

    Raises: TombolaError when gguf is not installed, or transformers cannot read the file.
    """
    digest = hashlib.sha256(f"{VERSION}".encode())
    with file.open("rb") as content:
        while block := content.read(1 << 22):
            digest.update(block)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tombola"
    folder = cache / f"gguf-{digest.hexdigest()[:32]}"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix=".gguf-", dir=cache))
    try:
        _convert(file, written)
        try:
            written.rename(folder)  # whole or not at all
        except OSError:
            if not folder.is_dir():  # another process was first: the same bytes
                raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
    return folder


def _convert(file: Path, out: Path) -> None:
    import torch
    import transformers
    from transformers.utils import logging

    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise TombolaError(
            "GGUF files need a package that is not installed", got=str(file), expected="gguf", next="pip install 'tombola[gguf]'"
        ) from error
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        config = type(read.config).from_dict(
            {name: value for name, value in read.config.to_dict().items() if name != "quantization_config"}
        )
        # transformers does not save what it read from a GGUF file: a model of the same config takes the weights over.
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(read.state_dict())
        model.save_pretrained(out)
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    except Exception as error:  # a damaged file, or one of an unknown kind, may make the reader raise anything
        raise TombolaError(
            f"{file} could not be read as a language model",
            got=f"{type(error).__name__}: " + str(error).partition("\n")[0][:200],
            expected="a GGUF file of an architecture that transformers reads",
        ) from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
