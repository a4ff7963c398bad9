"""A short forward pass of any model: its inputs, its mode, and its rows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tombola.errors import AnatomyError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; afterwards every module is in the mode it was in, a frozen one in a training model too."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def probe_inputs(model: nn.Module, batch: int, length: int = 6) -> dict[str, Tensor]:
    """One random row, repeated `batch` times: differences between rows are then the experiment's own.

    Token ids, for a decoder behind an encoder too; or an image, for a model whose main input is pixels.
    """
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    config: Any = model.config
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        side = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
        image = torch.rand(1, config.num_channels, side, side, generator=generator).to(next(model.parameters()))
        return {"pixel_values": image.expand(batch, -1, -1, -1)}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(text.vocab_size)
    # The first ids are specials in every tokenizer, and RoBERTa's positions depend on its pad id.
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (1, length), generator=generator)
    special = {one for name in ("pad_token_id", "eos_token_id") if isinstance(one := getattr(text, name, None), int)}
    while special & set(ids[0].tolist()):  # a pad would be masked, and an end in the middle is where some heads look
        ids = torch.where(torch.isin(ids, torch.tensor(list(special))), (ids + 1) % vocabulary, ids)
    encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    if encoder_decoder and isinstance(text.eos_token_id, int):
        ids[0, -1] = text.eos_token_id  # such a model classifies at the end of the text, and wants one
    ids = ids.expand(batch, length).to(device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return inputs | ({"decoder_input_ids": ids} if encoder_decoder else {})


def run_probe(model: nn.Module, batch: int) -> None:
    """One forward pass of `probe_inputs`. Raises: AnatomyError when the model does not take them."""
    try:
        with torch.no_grad():
            model(**probe_inputs(model, batch))
    except AnatomyError:
        raise
    except Exception as error:  # a model that is not of our kind may raise anything
        raise AnatomyError(
            f"this {type(model).__name__} did not run on a probe of token ids or pixels",
            got=f"{type(error).__name__}: {error}",
            expected="a model that takes input_ids and attention_mask (or pixel_values), and has a config with vocab_size "
            "(or image_size and num_channels)",
        ) from error


def by_row(x: Tensor, batch: int) -> Tensor | None:
    """`x` as [batch, position, channel]; None when it holds no rows of the batch.

    OPT flattens batch and positions before its MLP; DeBERTa's projections also see the table of relative positions, which has no
    batch at all.
    """
    if x.ndim == 3 and len(x) == batch:
        return x
    if x.ndim == 2 and len(x) % batch == 0:
        return x.reshape(batch, -1, x.shape[-1])
    return None
