"""What a transformer is made of: layers, each with an attention block and an MLP.

`read_anatomy` finds the parts by structure, without asking for a model's name: one traced forward pass shows in which
order the projections of a repeated block run and which of them share an input, and that tells their roles. A second
pass then *proves* the reading with numbers: one channel of a projection is perturbed, and only the slice that the
reading predicts may move. What cannot be proved is refused. A reading can also be given by hand (`Layout`); it is
proved in the same way.

Order of reading: the data classes, `read_anatomy`, `_roles` (structure), `prove` (numbers).
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tombola.errors import AnatomyError, MaskError
from tombola.mask import Mask


@dataclass(frozen=True, slots=True)
class Projection:
    """A linear map inside a layer: the path of its module in the model, and its widths."""

    path: str
    n_in: int
    n_out: int
    has_bias: bool


@dataclass(frozen=True, slots=True)
class Attention:
    """Self-attention. Head h owns rows h·d_head … (h+1)·d_head of q (of k and v: its kv-head's) and those columns of o."""

    q: Projection
    k: Projection
    v: Projection
    o: Projection
    n_heads: int
    n_kv_heads: int
    d_head: int

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


@dataclass(frozen=True, slots=True)
class Layer:
    path: str
    attention: Attention
    mlp: MLP


@dataclass(frozen=True, slots=True)
class Size:
    """What a mask keeps, in parameters. Shares are fractions in [0, 1]."""

    kept_values: int  # of the maskable ones
    maskable_values: int  # heads + MLPs (the "body"), or the values of an unstructured mask's scope
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
    """The layers of one model, in forward order. Every layer has the same number of heads."""

    model_type: str
    layers: tuple[Layer, ...]
    shapes: Mapping[str, tuple[int, ...]]  # of every parameter, by name

    @property
    def total_parameters(self) -> int:
        return sum(map(math.prod, self.shapes.values()))

    @property
    def n_layers(self) -> int:
        return len(self.layers)

    @property
    def n_heads(self) -> int:
        """Heads per layer."""
        return self.layers[0].attention.n_heads

    def full_mask(self) -> Mask:
        """The mask over heads and MLPs that keeps everything."""
        return Mask(
            heads=torch.ones(self.n_layers, self.n_heads, dtype=torch.bool),
            mlps=torch.ones(self.n_layers, dtype=torch.bool),
        )

    def size(self, mask: Mask) -> Size:
        """What `mask` keeps, see `size_of`. Raises: MaskError when it does not fit."""
        self.check(mask)
        return size_of(self.summary(), mask)

    def as_values(self, mask: Mask) -> dict[str, Tensor]:
        """What the heads and MLPs of `mask` are in single values: parameter name -> mask of its shape, True = kept.

        Of a removed head the q, k, v rows and the columns of o, whose bias stays (a kv-head's rows go when every head that reads
        it is gone); of a removed MLP everything, the bias of `out` included. Parameters that lose nothing are left out.
        """
        full = self.full_mask() & mask
        assert full.heads is not None and full.mlps is not None
        kept: dict[str, Tensor] = {}
        for layer, heads, mlp in zip(self.layers, full.heads, full.mlps, strict=True):
            attention = layer.attention
            rows = heads.repeat_interleave(attention.d_head)
            kv_rows = heads.view(attention.n_kv_heads, -1).any(1).repeat_interleave(attention.d_head)
            for projection, of in ((attention.q, rows), (attention.k, kv_rows), (attention.v, kv_rows)):
                kept[f"{projection.path}.weight"] = of[:, None].expand(projection.n_out, projection.n_in)
                if projection.has_bias:
                    kept[f"{projection.path}.bias"] = of
            kept[f"{attention.o.path}.weight"] = rows.expand(attention.o.n_out, attention.o.n_in)
            for projection in layer.mlp.projections:
                for name in ("weight", "bias") if projection.has_bias else ("weight",):
                    kept[f"{projection.path}.{name}"] = mlp.expand(self.shapes[f"{projection.path}.{name}"])
        return {name: part for name, part in kept.items() if not bool(part.all())}

    def survival(self, mask: Mask) -> tuple[Tensor, Tensor]:
        """What `mask` keeps of each head [layer, head] and of each MLP [layer], as a share in [0, 1]: 1 or 0 for whole parts.

        Of single values: the share kept among the values of a part that the mask names (of a head its rows of q, k, v and its
        columns of o; of a grouped kv-head the same for each head that reads it); 1 where it names none.
        """
        self.check(mask)
        full, values = self.full_mask() & mask.structured(), mask.values
        assert full.heads is not None and full.mlps is not None
        heads, mlps = full.heads.double(), full.mlps.double()

        def counts(name: str, n: int, axis: int = 0) -> Tensor:
            """[n, 2]: kept and all values of each of n equal slices along `axis`."""
            if name not in values:
                return torch.zeros(n, 2, dtype=torch.float64)
            slices = values[name].movedim(axis, 0).reshape(n, -1).double()
            return torch.stack([slices.sum(1), torch.full((n,), float(slices.shape[1]), dtype=torch.float64)], dim=1)

        for i, layer in enumerate(self.layers):
            a = layer.attention
            of_head = sum(
                counts(f"{p.path}.{name}", n).repeat_interleave(a.n_heads // n, 0)
                for p, n in ((a.q, a.n_heads), (a.k, a.n_kv_heads), (a.v, a.n_kv_heads))
                for name in ("weight", "bias")
            ) + counts(f"{a.o.path}.weight", a.n_heads, axis=1)
            of_mlp = sum(counts(f"{p.path}.{name}", 1) for p in layer.mlp.projections for name in ("weight", "bias"))
            assert isinstance(of_mlp, Tensor)
            heads[i] *= torch.where(of_head[:, 1] > 0, of_head[:, 0] / of_head[:, 1].clamp_min(1), 1.0)
            mlps[i] *= torch.where(of_mlp[:, 1] > 0, of_mlp[:, 0] / of_mlp[:, 1].clamp_min(1), 1.0)[0]
        return heads, mlps

    def check(self, mask: Mask) -> None:
        """Raises: MaskError naming every part of `mask` that does not fit this model."""
        shapes = {"heads": (self.n_layers, self.n_heads), "mlps": (self.n_layers,)} | dict(self.shapes)
        wrong = {n: tuple(p.shape) for n, p in mask.parts().items() if shapes.get(n) != tuple(p.shape)}
        if wrong:
            few = list(wrong)[:6]
            raise MaskError(
                f"the mask does not fit this {self.model_type}",
                got="; ".join(f"{name} {wrong[name]}" for name in few)
                + (f" and {len(wrong) - 6} more" if len(wrong) > 6 else ""),
                expected="; ".join(f"{name} {shapes.get(name, 'is no part of this model')}" for name in few),
                next="use the ticket on the base it was found on",
            )

    def summary(self) -> dict[str, Any]:
        """The numbers by which two models can be told apart and masks be sized, as JSON: for tickets and `inspect`."""
        first = self.layers[0]
        return {
            "model_type": self.model_type,
            "layers": self.n_layers,
            "heads": self.n_heads,
            "kv_heads": first.attention.n_kv_heads,
            "d_head": first.attention.d_head,
            "d_model": first.attention.o.n_out,
            "d_ffn": first.mlp.d_ffn,
            "values_per_head": [layer.attention.values_per_head for layer in self.layers],
            "values_per_mlp": [layer.mlp.values for layer in self.layers],
            "total_parameters": self.total_parameters,
        }


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the parts of a layer are, by hand: the list of layers, and paths inside one layer."""

    layers: str
    q: str
    k: str
    v: str
    o: str
    mlp_in: tuple[str, ...]
    mlp_out: str


# ---------------------------------------------------------------------------------------------------------- reading


def read_anatomy(model: nn.Module, layout: Layout | None = None) -> Anatomy:
    """The anatomy of `model`, found by structure (or taken from `layout`) and proved numerically.

    Costs two forward passes of a short batch (one with a layout); weights, modes and hooks of the model, and the caller's
    random state, are left as they were. The model may be under gates, and may hold a mask.
    Raises: AnatomyError saying what was looked for, what was found, and how to pass a layout by hand.
    """
    kinds = {p.dtype for p in model.parameters() if p.is_floating_point() and torch.finfo(p.dtype).bits < 32}
    if kinds:
        raise AnatomyError(
            f"the structure of this {type(model).__name__} cannot be proved in half precision",
            got=", ".join(map(str, kinds)),
            expected="torch.float32 or torch.float64, in which small movements can be told from rounding",
            next="read the anatomy of the model in float32, and pass it on: tombola.Gates(model, anatomy)",
        )
    with evaluating(model):
        roles = _by_structure(model) if layout is None else _by_hand(model, layout)
        layers = tuple(_layer(model, path, role) for path, role in roles.items())
        if len({layer.attention.n_kv_heads for layer in layers}) > 1:
            raise AnatomyError("layers have different numbers of kv-heads", got=[x.attention.n_kv_heads for x in layers])
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        anatomy = Anatomy(getattr(model.config, "model_type", type(model).__name__), layers, shapes)
        prove(model, anatomy)
    return anatomy


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


@dataclass(frozen=True, slots=True)
class _Roles:
    q: str
    k: str
    v: str
    o: str
    ins: tuple[str, ...]
    out: str


def _by_structure(model: nn.Module) -> dict[str, _Roles]:
    blocks = _repeated_blocks(model)
    if not blocks:
        raise _unreadable(model, "a list of repeated blocks with linear projections", [n for n, _ in model.named_children()])
    calls: dict[str, list[tuple[str, Tensor]]] = {}
    handles = []
    for block in blocks:
        for path, module in model.get_submodule(block).named_modules():
            if _is_projection(module):
                record = calls.setdefault(block, [])
                # The inputs are kept alive until the pass is over: "same input" is "same object", and ids are reused.
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _, args, record=record, path=f"{block}.{path}": record.append((path, args[0]))
                    )
                )
    try:
        _run(model, batch=1)
    finally:
        for handle in handles:
            handle.remove()
    return {block: _roles(model, block, record) for block, record in calls.items()}


def _roles(model: nn.Module, block: str, calls: Sequence[tuple[str, Tensor]]) -> _Roles:
    """Roles from the order of calls: q, k, v read the block's input; o comes next; the MLP is what follows, `out` last."""
    names = [path for path, _ in calls]
    head = [path for path, seen in calls if seen is calls[0][1]]
    if len(head) != 3 or names[:3] != head or len(names) not in (6, 7):
        looked_for = f"{block}: three projections of one input (q, k, v), then o, MLP in (one, or two when gated), MLP out"
        raise _unreadable(model, looked_for, names)
    q, k, v, o, *ins, out = names
    return _Roles(q, k, v, o, tuple(ins), out)


def _by_hand(model: nn.Module, layout: Layout) -> dict[str, _Roles]:
    found = dict(model.named_modules())
    listed = found.get(layout.layers)
    blocks = [f"{layout.layers}.{i}" for i in range(len(listed))] if isinstance(listed, nn.ModuleList) else []
    roles = {
        block: _Roles(
            q=f"{block}.{layout.q}",
            k=f"{block}.{layout.k}",
            v=f"{block}.{layout.v}",
            o=f"{block}.{layout.o}",
            ins=tuple(f"{block}.{part}" for part in layout.mlp_in),
            out=f"{block}.{layout.mlp_out}",
        )
        for block in blocks
    }
    wanted = [p for r in roles.values() for p in (r.q, r.k, r.v, r.o, *r.ins, r.out)]
    missing = [layout.layers] if not blocks else [path for path in wanted if not _is_projection(found.get(path))]
    if missing:
        raise AnatomyError(
            "the layout names modules that this model does not have, or not as a list of layers with linear projections",
            got=missing[:6],
            expected=[name for name in found if name][:12],
            next="compare with `model.named_modules()`",
        )
    return roles


def _layer(model: nn.Module, path: str, role: _Roles) -> Layer:
    q, k, v, o, out = (_projection(model, name) for name in (role.q, role.k, role.v, role.o, role.out))
    ins = tuple(_projection(model, name) for name in role.ins)
    n_heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not isinstance(n_heads, int) or o.n_in % n_heads:
        raise AnatomyError(
            f"{role.o}: its input does not divide into heads",
            got=f"{o.n_in} channels, {n_heads} heads",
            expected="a multiple of config.num_attention_heads",
        )
    d_head = o.n_in // n_heads
    attention_fits = q.n_out == o.n_in and k.n_out == v.n_out and k.n_out % d_head == 0 and q.n_out % k.n_out == 0
    if not (attention_fits and ins and out.n_out == o.n_out and all(part.n_out == out.n_in for part in ins)):
        raise AnatomyError(
            f"{path}: the widths of its projections do not fit together",
            got=", ".join(f"{part.path} {part.n_in} → {part.n_out}" for part in (q, k, v, o, *ins, out)),
            expected="q as wide as the input of o, k and v a whole share of it in heads; MLP in as wide as the input of MLP out",
            next="check the number of heads in the config, or pass a layout by hand",
        )
    return Layer(path, Attention(q, k, v, o, n_heads, k.n_out // d_head, d_head), MLP(ins, out, out.n_in))


def _repeated_blocks(model: nn.Module) -> list[str]:
    """Paths of the items of every outermost list of modules that hold at least four projections each."""
    blocks: list[str] = []
    for path, module in model.named_modules():
        inside = any(path.startswith(block + ".") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            items = [sum(map(_is_projection, item.modules())) for item in module]
            if items and min(items) >= 4:
                blocks += [f"{path}.{i}" for i in range(len(module))]
    return blocks


def _is_projection(module: nn.Module | None) -> bool:
    return isinstance(module, nn.Linear)


def _projection(model: nn.Module, path: str) -> Projection:
    module = model.get_submodule(path)
    assert isinstance(module, nn.Linear)
    return Projection(path, module.in_features, module.out_features, has_bias=getattr(module, "bias", None) is not None)


def _run(model: nn.Module, batch: int) -> None:
    try:
        with torch.no_grad():
            model(**probe_inputs(model, batch))
    except AnatomyError:
        raise
    except Exception as error:  # a model that is not of our kind may raise anything
        raise AnatomyError(
            f"this {type(model).__name__} did not run on token ids",
            got=f"{type(error).__name__}: {error}",
            expected="a model that takes input_ids and attention_mask, and has a config with vocab_size",
        ) from error


def probe_inputs(model: nn.Module, batch: int, length: int = 6) -> dict[str, Tensor]:
    """One random row of token ids, repeated `batch` times: differences between rows are then the experiment's own."""
    config: Any = model.config
    vocabulary = int(config.vocab_size)
    generator = torch.Generator().manual_seed(0)
    # The first ids are specials in every tokenizer, and RoBERTa's positions depend on its pad id.
    ids = torch.randint(min(5, vocabulary - 1), vocabulary, (1, length), generator=generator)
    ids = ids.expand(batch, length).to(next(model.parameters()).device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _unreadable(model: nn.Module, looked_for: str, found: Sequence[object]) -> AnatomyError:
    return AnatomyError(
        f"the structure of this {type(model).__name__} could not be read",
        got=f"{list(found)[:12]}",
        expected=looked_for,
        next="pass layout=tombola.Layout(layers=…, q=…, k=…, v=…, o=…, mlp_in=(…,), mlp_out=…); it is proved like any other",
    )


# ---------------------------------------------------------------------------------------------------------- proving


def prove(model: nn.Module, anatomy: Anatomy) -> None:
    """Proves, in one forward pass, that each projection has the role and the slices the anatomy says.

    The rows of one batch are the experiments; row 0 is untouched. In all rows q, k, v and MLP-in put out the same random
    numbers instead of their own: the proof is about the wiring, and stands where a mask has zeroed weights. In a q or k row
    the first channel of one (kv-)head is perturbed: of the input of o, that head's slice must move *everywhere* and nothing
    else at all. A head that is assumed too wide fails the first half, one too narrow the second. A query perturbed at one
    position moves no other, which tells q from k. In a v row exactly that one channel moves; with v set to zero, nothing is
    left. In the MLP, channel j of `in` moves channel j of `out`'s input only. After each look every row is set back to
    row 0, so that no layer sees the experiments of another.

    Raises: AnatomyError naming the layer, the role and what moved, or the modules the model computes around.
    """
    first = anatomy.layers[0].attention
    n_kv, per_kv = first.n_kv_heads, first.n_heads // first.n_kv_heads
    experiments: list[tuple[str, int]] = [("none", 0)]
    experiments += [("q", head) for head in range(first.n_heads)]
    experiments += [(role, head) for role in "kv" for head in range(n_kv)]
    experiments += [("one query", 0), ("v = 0", 0)]
    generator = torch.Generator().manual_seed(1)
    unseen = {p.path for layer in anatomy.layers for p in (layer.attention.o, layer.mlp.out)}
    handles = []

    def perturb(role: str, projection: Projection, width: int) -> Any:
        rows = [row for row, (kind, _) in enumerate(experiments) if kind == role]

        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            if output.ndim != 3 or len(output) != len(experiments):
                raise AnatomyError(
                    f"{projection.path} does not see the rows of the batch",
                    got=f"an output of shape {tuple(output.shape)}",
                    expected=f"[{len(experiments)}, position, {projection.n_out}]",
                    next="pass a layout by hand",
                )
            # The same for all rows, and small, so that no softmax saturates. What is perturbed moves far, at each position
            # by another length, and in both directions, so that no ReLU and no saturated head swallows it.
            changed = torch.rand(output.shape[1:], generator=generator).to(output).expand_as(output).clone()
            for row in rows:
                noise = 10 + 40 * torch.rand(output.shape[1], generator=generator)
                noise[1::2] *= -1
                changed[row, :, experiments[row][1] * width % output.shape[-1]] += noise.to(output)  # an MLP may be that narrow
            if role == "q":
                changed[-2, 0] += 5
            if role == "v":
                changed[-1] = 0
            return changed

        return hook

    def look_at_heads(layer: Layer) -> Any:
        attention = layer.attention
        d = attention.d_head

        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            unseen.discard(attention.o.path)
            moved = _moved(args[0])
            for row, (kind, head) in enumerate(experiments[1:-2], start=1):
                expected = torch.zeros_like(moved[row])
                if kind == "q":
                    expected[head * d : (head + 1) * d] = True
                elif kind == "k":
                    expected[head * per_kv * d : (head + 1) * per_kv * d] = True
                else:
                    expected.view(-1, d)[head * per_kv : (head + 1) * per_kv, 0] = True
                _expect(layer, kind, head, moved[row], expected)
            if bool(_moved(args[0][:, 1:])[-2].any()):
                raise AnatomyError(
                    f"{layer.path}: {attention.q.path} is not the query projection",
                    got="perturbed at one position, it moves others",
                    expected="a query decides its own position only",
                    next="pass a layout by hand",
                )
            if bool(args[0][-1].any()):
                raise AnatomyError(
                    f"{layer.path}: {attention.v.path} is not the value projection",
                    got="o still has an input when v is zero",
                    expected="the input of o is a mixture of v only",
                    next="pass a layout by hand",
                )
            return (args[0][:1].expand_as(args[0]), *args[1:])

        return hook

    def look_at_neurons(layer: Layer) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            unseen.discard(layer.mlp.out.path)
            moved = _moved(args[0])
            for row in [row for row, (kind, _) in enumerate(experiments) if kind == "q"]:
                expected = torch.zeros_like(moved[row])
                neuron = experiments[row][1] % layer.mlp.d_ffn
                expected[neuron] = True
                _expect(layer, "mlp in", neuron, moved[row], expected)
            return (args[0][:1].expand_as(args[0]), *args[1:])

        return hook

    for layer in anatomy.layers:
        attention, (*gates, last) = layer.attention, layer.mlp.ins
        d = attention.d_head
        # The q rows double as the rows of the MLP experiment: o has set them back to row 0 by then.
        for role, projection, width in (
            ("q", attention.q, d),
            ("k", attention.k, d),
            ("v", attention.v, d),
            *(("gate", gate, 1) for gate in gates),
            ("q", last, 1),
        ):
            hook = perturb(role, projection, width)
            handles.append(model.get_submodule(projection.path).register_forward_hook(hook))
        # Before every other hook: what gates on a live model close is there all the same.
        for projection, look in ((attention.o, look_at_heads(layer)), (layer.mlp.out, look_at_neurons(layer))):
            handles.append(model.get_submodule(projection.path).register_forward_pre_hook(look, prepend=True))
    try:
        _run(model, batch=len(experiments))
    finally:
        for handle in handles:
            handle.remove()
    if unseen:
        raise AnatomyError(
            "the model does not run all modules of its anatomy",
            got=f"never called: {', '.join(sorted(unseen))}",
            expected="a forward pass through each",
            next="load the model anew, uncompiled and without fused kernels, or pass another layout",
        )


def _moved(x: Tensor) -> Tensor:
    """[row, channel] bool: whether the channel differs from row 0 at any position, beyond rounding."""
    tolerance = 64 * torch.finfo(x.dtype).eps * x[0].abs().amax()
    return ((x - x[:1]).abs() > tolerance).any(1)


def _expect(layer: Layer, kind: str, index: int, moved: Tensor, expected: Tensor) -> None:
    if not torch.equal(moved, expected):
        channels = torch.nonzero(moved).flatten().tolist()
        wanted = torch.nonzero(expected).flatten().tolist()
        raise AnatomyError(
            f"{layer.path}: perturbing {kind} {index} did not move what it should",
            got=f"{len(channels)} channels {_span(channels)}",
            expected=f"{len(wanted)} channels {_span(wanted)}",
            next="check the number of heads in the config, or pass a layout by hand",
        )


def _span(channels: Sequence[int]) -> str:
    return f"{channels[0]}…{channels[-1]}" if channels else "(none)"


def size_of(summary: Mapping[str, Any], mask: Mask) -> Size:
    """What a mask keeps in a model with this `Anatomy.summary()`: of heads and MLPs, or of the parameters it names.

    Raises: MaskError for a mask that has both, of which the same value could be counted twice.
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
    heads = torch.full_like(per_head, summary["heads"]) if mask.heads is None else mask.heads.sum(1)
    mlps = torch.ones_like(per_mlp, dtype=torch.bool) if mask.mlps is None else mask.mlps
    return Size(
        kept_values=int((heads * per_head).sum() + (mlps * per_mlp).sum()),
        maskable_values=int((per_head * summary["heads"] + per_mlp).sum()),
        total_parameters=summary["total_parameters"],
    )


def same_anatomy(a: Mapping[str, object], b: Mapping[str, object]) -> list[str]:
    """Names of the summary numbers (see `Anatomy.summary`) in which two models differ; parameters of heads may differ."""
    return [name for name in a if name != "total_parameters" and a[name] != b.get(name)]
