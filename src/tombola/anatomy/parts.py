"""The parts of a transformer as plain values: projections, attention blocks, MLPs, layers, and what a mask keeps of them.

Nothing here looks at a live model. Rows of a mask are owners of parameters: a layer that a model runs twelve times (ALBERT) is
one row, and a decoder layer that attends to itself and to an encoder has two rows of heads.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from tombola.errors import AnatomyError, MaskError
from tombola.mask import Mask


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map inside a layer: a module, or, where several are fused into one module, some of its output channels.

    Channel c of this projection is channel `start + (c // block) · stride + c % block` of the module: q, k and v may lie one
    after the other, or head by head (GPT-NeoX), or group by group.
    """

    path: str
    n_in: int
    n_out: int
    has_bias: bool
    transposed: bool = False  # the weight is [in, out], as GPT-2's Conv1D has it
    start: int = 0
    block: int = 0  # 0: all of its channels lie together
    stride: int = 0

    def channels(self) -> Int[Tensor, " n_out"]:
        """For each channel of this projection, the channel of its module's output."""
        own, block = torch.arange(self.n_out), self.block or self.n_out
        return self.start + own // block * self.stride + own % block

    def rows(self, weight: Tensor) -> Tensor:
        """Its own rows [n_out, n_in] of a weight of the module, whichever way that is stored."""
        return (weight.T if self.transposed else weight)[self.channels()]


@dataclass(frozen=True, slots=True)
class Attention:
    """An attention block. Head h owns rows h·d_head … (h+1)·d_head of q (of k and v: its kv-head's) and those columns of o."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    n_heads: int
    n_kv_heads: int
    d_head: int
    kind: Literal["self", "cross"] = "self"  # cross: keys and values are those of an encoder

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (self.q, self.k, self.v, self.o)

    @property
    def values_per_head(self) -> int:
        """Parameters that go when a head goes: its q, k, v rows with biases and its columns of o; the bias of o stays.

        With grouped kv-heads each head counts its share of k and v. BERT-base: 196,800.
        """
        q = self.d_head * (self.q.n_in + self.q.has_bias)
        kv = self.d_head * (self.k.n_in + self.k.has_bias + self.v.n_in + self.v.has_bias)
        return q + kv * self.n_kv_heads // self.n_heads + self.d_head * self.o.n_out


@dataclass(frozen=True, slots=True)
class MLP:
    """Feed-forward block: `ins` (one projection, or two when it is gated), a non-linearity, `out`."""

    ins: tuple[Projection, ...]
    out: Projection
    d_ffn: int

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*self.ins, self.out)

    @property
    def values(self) -> int:
        """Parameters that go when the MLP goes, the bias of `out` included. BERT-base: 4,722,432."""
        return sum((p.n_in + p.has_bias) * p.n_out for p in self.projections)

    @property
    def values_per_neuron(self) -> int:
        """Parameters that go when a neuron goes: its rows of `ins` with biases and its column of `out`, whose bias stays.

        BERT-base: 1,537.
        """
        return sum(p.n_in + p.has_bias for p in self.ins) + self.out.n_out


@dataclass(frozen=True, slots=True)
class Layer:
    path: str
    attention: Attention
    mlp: MLP
    cross: Attention | None = None  # in a decoder that reads an encoder

    @property
    def attentions(self) -> tuple[Attention, ...]:
        return (self.attention,) if self.cross is None else (self.attention, self.cross)

    @property
    def projections(self) -> tuple[Projection, ...]:
        return (*(one for attention in self.attentions for one in attention.projections), *self.mlp.projections)


@dataclass(frozen=True, slots=True)
class Size:
    """What a mask keeps, in parameters. Shares are fractions in [0, 1]."""

    kept_values: int  # of the maskable ones
    maskable_values: int  # heads + MLPs (the "body"), all neurons, or the values of an unstructured mask's scope
    total_parameters: int  # of the whole model, embeddings and head included

    @property
    def sparsity(self) -> float:
        """Removed share of the maskable values."""
        return 1.0 - self.kept_values / self.maskable_values

    @property
    def body_share(self) -> float:
        return self.kept_values / self.maskable_values

    @property
    def total_share(self) -> float:
        return 1.0 - (self.maskable_values - self.kept_values) / self.total_parameters


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The layers of one model, in forward order; an encoder's before its decoder's. All have the same number of heads."""

    model_type: str
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by name

    @property
    def attentions(self) -> tuple[Attention, ...]:
        """The rows of a mask's `heads`: of each layer its self-attention, then its cross-attention if it has one."""
        return tuple(one for layer in self.layers for one in layer.attentions)

    @property
    def mlps(self) -> tuple[MLP, ...]:
        """The rows of a mask's `mlps`."""
        return tuple(layer.mlp for layer in self.layers)

    @property
    def total_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_attentions(self) -> int:
        return len(self.attentions)

    @property
    def n_heads(self) -> int:
        """Heads of each attention block."""
        return self.layers[0].attention.n_heads

    @property
    def layer_of_attention(self) -> Int[Tensor, " attention"]:
        """For each row of a mask's `heads`, the layer it is in: that of its MLP."""
        return torch.tensor([i for i, layer in enumerate(self.layers) for _ in layer.attentions])

    @property
    def d_ffn(self) -> int | None:
        """Neurons of each MLP; None where layers differ. A mask of neurons has one width, so there such a model has none."""
        widths = {mlp.d_ffn for mlp in self.mlps}
        return widths.pop() if len(widths) == 1 else None

    def full_mask(self, *units: str) -> Mask:
        """The mask that keeps everything, over these kinds of part ("heads", "mlps", "neurons"); over heads and MLPs without any.

        Raises: MaskError for neurons of a model whose MLPs differ in width.
        """
        shapes = self._shapes_of_units()
        missing = [unit for unit in units if unit not in shapes]
        if missing:
            widths = [mlp.d_ffn for mlp in self.mlps]
            raise MaskError(
                f"this {self.model_type} has no mask of {', '.join(missing)}",
                got=f"MLPs of {min(widths)} to {max(widths)} neurons" if missing == ["neurons"] else missing,
                expected="MLPs of one width" if missing == ["neurons"] else ", ".join(shapes),
                next="take heads, MLPs or layers, or single values (m-prune)" if missing == ["neurons"] else None,
            )
        return Mask(**{unit: torch.ones(shapes[unit], dtype=torch.bool) for unit in units or ("heads", "mlps")}, values={})

    def whole_layers(self, kept: Bool[Tensor, " layer"]) -> Mask:
        """The mask over heads and MLPs that keeps these layers whole, and nothing of the others. The bias of each o stays."""
        heads = kept[self.layer_of_attention][:, None].expand(-1, self.n_heads)
        return Mask(heads=heads, mlps=kept)

    def _shapes_of_units(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"heads": (self.n_attentions, self.n_heads), "mlps": (self.n_layers,)}
        return shapes | ({} if self.d_ffn is None else {"neurons": (self.n_layers, self.d_ffn)})

    def size(self, mask: Mask) -> Size:
        """What `mask` keeps, see `size_of`. Raises: MaskError when it does not fit."""
        self.check(mask)
        return size_of(self.summary(), mask)

    def as_values(self, mask: Mask) -> dict[str, Tensor]:
        """What the heads, MLPs and neurons of `mask` are in single values: parameter name -> mask of its shape, True = kept.

        Of a removed head the q, k, v rows and the columns of o, whose bias stays (a kv-head's rows go when every head that reads
        it is gone); of a removed neuron the rows of `ins` and the column of `out`, whose bias stays; of a removed MLP everything,
        the bias of `out` included. Parameters that lose nothing are left out.
        """
        full = self.full_mask() & mask
        assert full.heads is not None and full.mlps is not None
        kept: dict[str, Tensor] = {}

        def keep(name: str, part: Tensor) -> None:
            kept[name] = kept[name] & part if name in kept else part  # fused projections share a parameter

        def keep_columns(projection: Projection, of: Bool[Tensor, " n_in"]) -> None:
            weight = self.shapes[f"{projection.path}.weight"]
            keep(f"{projection.path}.weight", (of[:, None] if projection.transposed else of).expand(weight))

        def keep_rows(projection: Projection, of: Bool[Tensor, " n_out"]) -> None:
            weight = self.shapes[f"{projection.path}.weight"]
            whole = torch.ones(weight[1] if projection.transposed else weight[0], dtype=torch.bool)
            whole[projection.channels()] = of
            keep(f"{projection.path}.weight", (whole if projection.transposed else whole[:, None]).expand(weight))
            if projection.has_bias:
                keep(f"{projection.path}.bias", whole)

        for attention, heads in zip(self.attentions, full.heads, strict=True):
            rows = heads.repeat_interleave(attention.d_head)
            kv_rows = heads.view(attention.n_kv_heads, -1).any(1).repeat_interleave(attention.d_head)
            for projection, of in ((attention.q, rows), (attention.k, kv_rows), (attention.v, kv_rows)):
                keep_rows(projection, of)
            keep_columns(attention.o, rows)
        for i, (mlp, is_kept) in enumerate(zip(self.mlps, full.mlps, strict=True)):
            neurons = is_kept.expand(mlp.d_ffn) if full.neurons is None else full.neurons[i] & is_kept
            for projection in mlp.ins:
                keep_rows(projection, neurons)
            keep_columns(mlp.out, neurons)
            keep_rows(mlp.out, is_kept.expand(mlp.out.n_out))
        return {name: part for name, part in kept.items() if not bool(part.all())}

    def survival(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """What `mask` keeps of each head [layer, head] and of each MLP [layer], as a share in [0, 1]: 1 or 0 for whole parts.

        Of neurons: the share of them that an MLP keeps.
        Of single values: the share kept among the values of a part that the mask names (of a head its rows of q, k, v and its
        columns of o; of a grouped kv-head the same for each head that reads it); 1 where it names none.
        """
        self.check(mask)
        full, values = self.full_mask() & mask.structured(), mask.values
        assert full.heads is not None and full.mlps is not None
        heads, mlps = full.heads.double(), full.mlps.double()
        if full.neurons is not None:
            mlps *= full.neurons.double().mean(1)

        def counts(projection: Projection, n: int) -> Tensor:
            """[n, 2]: kept and all values of each of n equal slices of its output channels, bias included."""
            found = torch.zeros(n, 2, dtype=torch.float64)
            for name, of in (("weight", projection.rows), ("bias", lambda bias: bias[projection.channels()])):
                if f"{projection.path}.{name}" in values:
                    found += _kept_of(of(values[f"{projection.path}.{name}"]).reshape(n, -1))
            return found

        for i, a in enumerate(self.attentions):
            of_head = counts(a.q, a.n_heads)
            for projection in (a.k, a.v):
                of_head += counts(projection, a.n_kv_heads).repeat_interleave(a.n_heads // a.n_kv_heads, 0)
            if f"{a.o.path}.weight" in values:
                of_head += _kept_of(a.o.rows(values[f"{a.o.path}.weight"]).T.reshape(a.n_heads, -1))
            heads[i] *= _share(of_head)
        for i, mlp in enumerate(self.mlps):
            of_mlp = torch.stack([counts(projection, 1) for projection in mlp.projections]).sum(0)
            mlps[i] *= _share(of_mlp)[0]
        return heads, mlps

    def check(self, mask: Mask) -> None:
        """Raises: MaskError naming every part of `mask` that does not fit this model."""
        shapes = self._shapes_of_units() | dict(self.shapes)
        wrong = {n: tuple(p.shape) for n, p in mask.parts().items() if shapes.get(n) != tuple(p.shape)}
        if wrong:
            few = list(wrong)[:6]
            uneven = "neurons" in wrong and self.d_ffn is None
            raise MaskError(
                f"the mask does not fit this {self.model_type}",
                got="; ".join(f"{name} {wrong[name]}" for name in few)
                + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""),
                expected="; ".join(f"{name} {shapes.get(name, 'is no part of this model')}" for name in few),
                next="its MLPs differ in width, which a mask of neurons cannot say: take heads, MLPs or single values"
                if uneven
                else "use the ticket on the base it was found on",
            )

    def summary(self) -> dict[str, Any]:
        """The numbers by which two models can be told apart and masks be sized, as JSON: for tickets and `inspect`."""
        first = self.layers[0]
        names = [f"{one.o.path} ({one.kind})" for one in self.attentions]
        crossed = {"attentions": names} if self.n_attentions > self.n_layers else {}
        return {
            "model_type": self.model_type,
            "layers": self.n_layers,
            "heads": self.n_heads,
            "kv_heads": first.attention.n_kv_heads,
            "d_head": first.attention.d_head,
            "d_model": first.attention.o.n_out,
            "d_ffn": first.mlp.d_ffn,
            "values_per_head": [attention.values_per_head for attention in self.attentions],
            "values_per_mlp": [mlp.values for mlp in self.mlps],
            "values_per_neuron": [mlp.values_per_neuron for mlp in self.mlps],
            "total_parameters": self.total_parameters,
        } | crossed


def _kept_of(slices: Tensor) -> Tensor:
    """[n, 2]: kept and all entries of each row."""
    return torch.stack([slices.sum(1).double(), torch.full((len(slices),), float(slices.shape[1]), dtype=torch.float64)], dim=1)


def _share(counts: Tensor) -> Tensor:
    """Kept of all, 1 where there is nothing."""
    return torch.where(counts[:, 1] > 0, counts[:, 0] / counts[:, 1].clamp_min(1), 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where the parts of a layer are, by hand: the list of layers, and paths inside one layer. One for each list of layers.

    Either q, k, v or, fused into one module, qkv, whose channels lie "concat" (all of q, then k, then v) or "grouped" (each group
    of heads with its k and v; with as many kv-heads as heads: head by head). `cross_…` are those of a decoder's cross-attention.
    """

    layers: str
    o: str
    mlp_in: tuple[str, ...]  # one; two where the MLP is gated
    mlp_out: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    fused: Literal["concat", "grouped"] | None = None  # None: whichever can be proved
    cross_q: str | None = None
    cross_k: str | None = None
    cross_v: str | None = None
    cross_o: str | None = None

    def __post_init__(self) -> None:
        """Raises: AnatomyError saying all that is wrong."""
        wrong = _wrong_in({field.name: getattr(self, field.name) for field in fields(self)})
        if wrong:
            raise AnatomyError("this is no layout", got="; ".join(wrong), expected=_EXPECTED)

    @staticmethod
    def from_yaml(file: Path | str) -> "tuple[Layout, ...]":
        """The layouts in a YAML file: one mapping of these fields, or a list of them; one way into the MLP may be plain text.

        Raises: AnatomyError saying all that is wrong.
        """
        import yaml  # type: ignore[import-untyped]

        try:
            said = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise AnatomyError(f"{file} is no YAML file that can be read", got=f"{type(error).__name__}: {error}") from error
        return Layout.from_plain(said, str(file))

    @staticmethod
    def from_plain(said: object, source: str = "this") -> "tuple[Layout, ...]":
        """The layouts in plain data, as YAML or JSON reads it and as `plain` gives it; `source` says whose it is.

        Raises: AnatomyError saying all that is wrong.
        """
        listed: list[Any] = said if isinstance(said, list) else [said]
        layouts = [
            {**one, "mlp_in": (one["mlp_in"],)} if isinstance(one, dict) and isinstance(one.get("mlp_in"), str) else one
            for one in listed
        ]
        wrong = [problem for one in layouts for problem in _wrong_in(one)] if layouts else ["an empty list"]
        if wrong:
            raise AnatomyError(f"{source} does not describe a layout", got="; ".join(wrong), expected=_EXPECTED)
        return tuple(Layout(**{**one, "mlp_in": tuple(one["mlp_in"])}) for one in layouts)

    def plain(self) -> dict[str, Any]:
        """The fields that are given, as JSON: for cells and tickets."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: list(value) if name == "mlp_in" else value for name, value in said.items() if value is not None}


_EXPECTED = (
    "layers, o, mlp_in, mlp_out, and q, k, v or else qkv (with fused: concat or grouped, where that is known); "
    "of cross-attention cross_q, cross_k, cross_v, cross_o"
)


def _wrong_in(said: object) -> list[str]:
    """Why these fields are no layout, all of it; null is not given."""
    if not isinstance(said, Mapping):
        return [f"{said!r} is not a mapping"]
    known = {field.name for field in fields(Layout)}
    given = {name: value for name, value in said.items() if value is not None}
    wrong = [f"there is no field {name!r}" for name in said if name not in known]
    wrong += [f"{name} is missing" for name in ("layers", "o", "mlp_in", "mlp_out") if name not in given]
    if "qkv" in given:
        wrong += [f"{name} is given, and qkv" for name in ("q", "k", "v") if name in given]
    else:
        wrong += [f"{name} is missing, and there is no qkv" for name in ("q", "k", "v") if name not in given]
        wrong += ["fused is given, and there is no qkv"] if "fused" in given else []
    if any(name.startswith("cross_") for name in given if name in known):
        wrong += [f"{name} is missing" for name in ("cross_q", "cross_k", "cross_v", "cross_o") if name not in given]
    if given.get("fused", "concat") not in ("concat", "grouped"):
        wrong += [f"fused is {given['fused']!r}, neither concat nor grouped"]
    for name in sorted(known & given.keys() - {"fused"}):
        paths = given[name] if name == "mlp_in" else [given[name]]
        if not isinstance(paths, list | tuple) or not all(isinstance(path, str) for path in paths):
            wrong.append(f"{name} is {given[name]!r}, which is not {'a list of paths' if name == 'mlp_in' else 'a path'}")
    return wrong


def size_of(summary: Mapping[str, Any], mask: Mask) -> Size:
    """What a mask keeps in a model with this `Anatomy.summary()`: of heads and MLPs, of neurons, or of the parameters it names.

    Of a mask of neurons alone their values are all that is maskable, and the bias of each `out` is not. Beside heads or MLPs
    neurons are a part of these: those of a removed MLP count once, as removed, whatever the mask says of them.
    Raises: MaskError for a mask that has units and single values, of which the same value could be counted twice.
    """
    counts = mask.counts()
    if mask.values:
        if len(mask.values) < len(counts):
            raise MaskError(
                "a mask of heads or MLPs and of single values at once has no one size",
                got=list(counts)[:6],
                expected="one of the two",
                next="Anatomy.as_values says what its heads and MLPs are in single values",
            )
        kept, maskable = (sum(count[i] for count in counts.values()) for i in (0, 1))
        return Size(kept, maskable, summary["total_parameters"])
    per_head, per_mlp = torch.tensor(summary["values_per_head"]), torch.tensor(summary["values_per_mlp"])
    no_mlp = torch.zeros(len(per_mlp), dtype=torch.bool) if mask.mlps is None else ~mask.mlps
    removed = int((no_mlp * per_mlp).sum())
    removed += 0 if mask.heads is None else int(((~mask.heads).sum(1) * per_head).sum())
    maskable = int(per_head.sum() * summary["heads"] + per_mlp.sum())
    if mask.neurons is not None:
        per_neuron = torch.tensor(summary["values_per_neuron"])
        removed += int(((~mask.neurons).sum(1) * per_neuron * ~no_mlp).sum())
        maskable = maskable if counts.keys() > {"neurons"} else int(per_neuron.sum()) * mask.neurons.shape[1]
    return Size(maskable - removed, maskable, summary["total_parameters"])


def layers_of_heads(summary: Mapping[str, Any]) -> Int[Tensor, " attention"]:
    """`Anatomy.layer_of_attention` of a model with this summary: the layer of each row of heads."""
    rows = summary.get("attentions", range(summary["layers"]))
    return torch.tensor([not str(row).endswith("(cross)") for row in rows]).cumsum(0) - 1


def same_anatomy(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Names of the summary numbers (see `Anatomy.summary`) in which two models differ; parameters of heads may differ."""
    return [name for name in a if name != "total_parameters" and a[name] != b.get(name)]
