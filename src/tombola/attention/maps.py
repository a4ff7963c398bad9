"""Attention maps of any model whose anatomy is known: raw (α) and norm-weighted (α_ij · ‖f(x_j)‖), row by row.

f(x_j) is what a head would add to the residual stream if it attended to token j alone: its value, through its slice of the
output projection. A head may attend strongly to [SEP] and copy next to nothing from there; only the second kind of map shows
that (Kobayashi et al. 2020). Σ_j α_ij f(x_j), plus the bias of the output projection, is the output of the attention block: on
the first batch of every pass this is checked, up to that projection, on the live model.

Order of reading: `AttentionMap`, `attention_maps`, `batch_maps`, `norm_factors`.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from tombola.anatomy import Anatomy, Attention, by_row, evaluating
from tombola.errors import AnatomyError, DataError, SettingsError, TombolaError
from tombola.tasks.encode import Encoded, collate

# What the norm is taken of. The released code views the weight of the output projection as (head, d_head, out) without
# transposing it; nn.Linear keeps [out, in], so what it reads are no columns of any head. Conv1D keeps [in, out], and there both
# are the same.
NORM_MAP_WEIGHTS: dict[str, str] = {
    "out_projection": "the head's own columns of the output projection",
    "untransposed": "the stored weight viewed as (head, d_head, out): the fault of the released code",
}
# What the model is given, and what of it stays in a map: (segment ids passed, pad tokens kept).
MAP_INPUTS: dict[str, tuple[bool, bool]] = {
    "full_real_tokens": (True, False),
    "full": (True, True),
    "no_segment_ids_with_pad": (False, True),
}
# Entries of all maps of one batch: 16 MiB in fp32. A single longer row is a batch of its own.
ENTRIES_PER_BATCH = 2**22


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMap:
    """The maps of all heads of one attention block in one pass through it; the leading axes are [head] or [batch, head]."""

    block: int  # row of a mask's `heads`
    run: int  # 0, or more where one block runs several times (ALBERT)
    kind: Literal["self", "cross"]
    raw: Float[Tensor, "*head query key"]  # α: rows sum to 1
    norms: Float[Tensor, "*head key"]  # ‖f(x_j)‖

    @property
    def weighted(self) -> Float[Tensor, "*head query key"]:
        """α_ij · ‖f(x_j)‖, made anew at each call: what is kept is one map and one row."""
        return self.raw * self.norms[..., None, :]


@dataclass(frozen=True, slots=True, eq=False)
class _Run:
    """What one pass through one attention block showed besides its map."""

    block: int
    norms: Float[Tensor, "batch head key"]
    values: Float[Tensor, "batch kv_head key d_head"] | None  # these two where the maps are to be proved
    fed: Float[Tensor, "batch head query d_head"] | None  # the input of the output projection


@dataclass(frozen=True, slots=True, eq=False)
class RowMaps:
    """All maps of one row, on the CPU, in the order in which the blocks ran."""

    id: str
    row: int  # position in the `Encoded`
    tokens: tuple[int, ...]  # token ids of the keys of self-attention; with pad tokens where these are kept
    maps: tuple[AttentionMap, ...]


def attention_maps(
    model: nn.Module,
    anatomy: Anatomy,
    encoded: Encoded,
    *,
    norm_map_weight: str = "out_projection",
    map_inputs: str = "full_real_tokens",
    entries_per_batch: int = ENTRIES_PER_BATCH,
) -> Iterator[RowMaps]:
    """The maps of every row, one row after the other, short rows first; in eval mode, without gradients.

    In memory are the maps of one batch of at most `entries_per_batch` entries (or of one row), never [head, query, key, d].
    A head that is closed by gates still has its maps; one whose weights are held at zero has a weighted map of zeros.

    map_inputs: "full_real_tokens" passes segment ids and leaves pad tokens out of the maps; "full" keeps them, every row being
    padded to the longest (or to `encoded.pad_to`); "no_segment_ids_with_pad" also drops segment ids, as the released code did.
    With the last two a map does not depend on which rows met in a batch either.

    Raises: SettingsError for unknown options; AnatomyError when the model gives no maps, or when they are not what its output
    projection is fed with.
    Source: Kobayashi et al. 2020, eq. 6; Prasanna et al. 2020, sec. 6.
    """
    _check_options(norm_map_weight, map_inputs, entries_per_batch)
    factors = norm_factors(model, anatomy, norm_map_weight)
    return _stream(model, anatomy, encoded, factors, *MAP_INPUTS[map_inputs], entries_per_batch)


def _stream(
    model: nn.Module,
    anatomy: Anatomy,
    encoded: Encoded,
    factors: Sequence[Tensor],
    segments: bool,
    keep_pads: bool,
    entries_per_batch: int,
) -> Iterator[RowMaps]:
    widest = encoded.pad_to or max(encoded.lengths)
    n_maps = anatomy.n_attentions * anatomy.n_heads
    device = next(model.parameters()).device
    sizes = [widest] * len(encoded) if keep_pads else encoded.lengths
    for number, rows in enumerate(_by_entries(sizes, n_maps, entries_per_batch)):
        inputs = {name: value.to(device) for name, value in collate(encoded, rows).items() if name != "labels"}
        if not segments:
            inputs.pop("token_type_ids", None)
        if keep_pads:
            inputs = {name: _padded(value, widest, encoded.pad.get(name, 0)) for name, value in inputs.items()}
        maps = batch_maps(model, anatomy, inputs, factors=factors, prove=number == 0)
        ids = inputs["input_ids"].cpu()
        for at, row in enumerate(rows):
            yield _row(encoded, row, ids[at], maps, at, sizes[row])
        del maps  # or two batches would be held while the next is computed


def batch_maps(
    model: nn.Module,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    *,
    factors: Sequence[Tensor] | None = None,
    norm_map_weight: str = "out_projection",
    prove: bool = True,
) -> tuple[AttentionMap, ...]:
    """The maps [batch, head, query, key] of one batch of model inputs, pad tokens included, on the device of the model.

    Takes whatever the model takes: token ids or pixels. `factors` spares computing `norm_factors` for every batch. The
    implementation of attention is eager for this pass, since no other returns maps, and afterwards what it was.
    Raises: AnatomyError as `attention_maps`.
    """
    factors = norm_factors(model, anatomy, norm_map_weight) if factors is None else factors
    batch = len(next(iter(inputs.values())))
    values: dict[int, Tensor] = {}  # of each block the latest output of v
    runs: list[_Run] = []

    def by_head(x: Tensor, n_heads: int) -> Tensor:
        """[batch, head, position, d_head]"""
        return x.reshape(*x.shape[:2], n_heads, -1).transpose(1, 2)

    def note_values(block: int, attention: Attention, _: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
        rows = by_row(output, batch)
        if rows is not None:
            values[block] = by_head(rows[..., attention.v.channels().to(rows.device)], attention.n_kv_heads)

    def note_run(block: int, attention: Attention, _: nn.Module, args: tuple[Any, ...]) -> None:
        value, rows = values.pop(block), by_row(args[0], batch)
        assert rows is not None  # the anatomy is proved
        norms = _norms(value, factors[block])
        runs.append(_Run(block, norms, *((value, by_head(rows, attention.n_heads)) if prove else (None, None))))

    handles = []
    for block, attention in enumerate(anatomy.attentions):
        v, o = model.get_submodule(attention.v.path), model.get_submodule(attention.o.path)
        handles.append(v.register_forward_hook(partial(note_values, block, attention)))
        handles.append(o.register_forward_pre_hook(partial(note_run, block, attention), prepend=True))  # before any gate
    try:
        with evaluating(model), eager(model), torch.no_grad():
            output = model(**inputs, output_attentions=True)
    finally:
        for handle in handles:
            handle.remove()
    maps, counts = [], dict[int, int]()
    for raw, run in zip(_in_order(model, anatomy, output, [run.block for run in runs]), runs, strict=True):
        attention = anatomy.attentions[run.block]
        if run.values is not None and run.fed is not None:
            _prove(attention, raw, run.values, run.fed)
        counts[run.block] = counts.get(run.block, -1) + 1
        maps.append(AttentionMap(run.block, counts[run.block], attention.kind, raw, run.norms))
    return tuple(maps)


def norm_factors(model: nn.Module, anatomy: Anatomy, norm_map_weight: str = "out_projection") -> tuple[Tensor, ...]:
    """For each attention block R [head, row, d_head] with ‖R_h v‖ = ‖v W_h‖; W_h [d_head, out] is the head's slice of the output
    projection.

    R is the triangle of a QR decomposition of W_hᵀ, at most [d_head, d_head]: the norm needs no [head, key, out] tensor. R is a
    square root of the Gram matrix W_h W_hᵀ, but small norms do not drown in the rounding of squares.
    """
    return tuple(_factor(model.get_submodule(one.o.path), one, norm_map_weight) for one in anatomy.attentions)


@torch.no_grad()
def _factor(module: nn.Module, attention: Attention, norm_map_weight: str) -> Tensor:
    weight, o = module.get_parameter("weight").detach(), attention.o
    if norm_map_weight == "untransposed":
        slices = weight.reshape(attention.n_heads, attention.d_head, o.n_out)
    else:
        slices = o.rows(weight).T.reshape(attention.n_heads, attention.d_head, o.n_out)
    slices = slices.to(torch.promote_types(weight.dtype, torch.float32))
    triangle: Tensor = torch.linalg.qr(slices.mT, mode="r").R
    return triangle


def _norms(values: Tensor, factor: Tensor) -> Tensor:
    """‖f(x_j)‖ [batch, head, key] from values [batch, kv-head, key, d_head]."""
    n_kv, of_group = values.shape[1], len(factor) // values.shape[1]
    through = torch.einsum("bgkd,gprd->bgpkr", values.to(factor), factor.reshape(n_kv, of_group, *factor.shape[1:]))
    norms: Tensor = torch.linalg.vector_norm(through, dim=-1)
    return norms.flatten(1, 2)


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """The model with eager attention, the only one that returns maps; afterwards each part has the one it had.

    Models that choose their attention when they are built are left alone: whether they give maps shows in what they return.
    """
    every = [getattr(module, "config", None) for module in model.modules()]
    configs: dict[int, Any] = {id(config): config for config in every if hasattr(config, "_attn_implementation")}
    before = [(config, config._attn_implementation) for config in configs.values()]
    switch: Any = getattr(model, "set_attn_implementation", lambda _: None)
    # A model that cannot be switched says so in a warning; what matters is the maps, and these are checked.
    speaker = logging.getLogger("transformers.modeling_utils")
    level = speaker.level
    speaker.setLevel(logging.ERROR)
    try:
        switch("eager")
        yield
    finally:
        speaker.setLevel(level)
        for config, was in before:  # parents first: a config hands its own on to its parts
            if config._attn_implementation != was:
                config._attn_implementation = was


def _in_order(model: nn.Module, anatomy: Anatomy, output: Any, blocks: Sequence[int]) -> list[Tensor]:
    """The maps that the model returned, in the order in which the blocks ran. Raises: AnatomyError when there are none."""

    def returned(name: str) -> list[Tensor]:
        return [one for one in (getattr(output, name, None) or ()) if isinstance(one, Tensor)]

    self_maps = returned("encoder_attentions") + returned("decoder_attentions") or returned("attentions")
    of_kind = {"self": iter(self_maps), "cross": iter(returned("cross_attentions"))}
    kinds = [anatomy.attentions[block].kind for block in blocks]
    found = {"self": len(self_maps), "cross": len(returned("cross_attentions"))}
    if not blocks or any(kinds.count(kind) != found[kind] for kind in ("self", "cross")):
        implementation = getattr(getattr(model, "config", None), "_attn_implementation", "unknown")
        raise AnatomyError(
            "this model has no maps",
            got=f"{type(model).__name__} with {implementation} attention returned {found['self']} maps of self- and "
            f"{found['cross']} of cross-attention for {kinds.count('self')} and {kinds.count('cross')} runs of its blocks",
            expected="a map for each run of an attention block, with output_attentions=True",
            next='load it with attn_implementation="eager", uncompiled',
        )
    return [next(of_kind[kind]) for kind in kinds]


def _prove(attention: Attention, raw: Tensor, values: Tensor, fed: Tensor) -> None:
    """Raises: AnatomyError unless the map, times the values, is what the output projection is fed with."""
    per_kv = attention.n_heads // attention.n_kv_heads
    shape = (fed.shape[0], attention.n_heads, fed.shape[2], values.shape[2])
    tolerance = max(torch.finfo(x.dtype).eps for x in (raw, values, fed)) ** 0.5 * float(fed.abs().amax())
    if raw.shape == shape:
        off = float((raw.to(values) @ values.repeat_interleave(per_kv, 1) - fed).abs().amax())
        if off <= tolerance:
            return
        got = f"{off:.2g} apart, where the largest value is {float(fed.abs().amax()):.2g}"
    else:
        got = f"maps of shape {tuple(raw.shape)}"
    raise AnatomyError(
        f"the maps of {attention.o.path} are not what the model computes with",
        got=got,
        expected=f"maps {shape} which, times the values, are the input of the output projection",
        next="load the model in eval mode, uncompiled and with eager attention",
    )


def _row(encoded: Encoded, row: int, ids: Tensor, maps: Sequence[AttentionMap], at: int, size: int) -> RowMaps:
    """One row of a batch, cut to its first `size` tokens: rows are padded at the end."""

    def cut(x: Tensor) -> Tensor:
        x = x.cpu()
        whole = x.untyped_storage().nbytes() == x.numel() * x.element_size()
        return x if whole else x.clone()  # a view would keep the whole batch

    own = (
        AttentionMap(one.block, one.run, one.kind, cut(one.raw[at, :, :size, :size]), cut(one.norms[at, :, :size]))
        for one in maps
    )
    return RowMaps(encoded.ids[row], row, tuple(ids[:size].tolist()), tuple(own))


def _by_entries(sizes: Sequence[int], n_maps: int, most: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar size, of at most `most` map entries each; a row is never split."""
    batch: list[int] = []
    for row in sorted(range(len(sizes)), key=sizes.__getitem__):
        if batch and (len(batch) + 1) * n_maps * sizes[row] ** 2 > most:
            yield batch
            batch = []
        batch.append(row)
    yield batch


def _padded(x: Tensor, width: int, value: int) -> Tensor:
    return nn.functional.pad(x, (0, width - x.shape[1]), value=value)


def _check_options(norm_map_weight: str, map_inputs: str, entries_per_batch: int) -> None:
    wrong: list[TombolaError] = []
    if norm_map_weight not in NORM_MAP_WEIGHTS:
        wrong.append(DataError("unknown norm_map_weight", got=norm_map_weight, expected=", ".join(NORM_MAP_WEIGHTS)))
    if map_inputs not in MAP_INPUTS:
        wrong.append(DataError("unknown map_inputs", got=map_inputs, expected=", ".join(MAP_INPUTS)))
    if entries_per_batch < 1:
        wrong.append(DataError("entries_per_batch is no number of entries", got=entries_per_batch, expected="1 or more"))
    if wrong:
        raise SettingsError(wrong)
