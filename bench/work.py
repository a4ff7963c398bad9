"""How much work a batch is: tokens, and floating-point operations by formula.

Seconds depend on the machine and on who else uses it; these counts do not, so that they are what the bench asserts. The
formula is held against torch's own counter for every kind of pass (`counted`), to the last operation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tombola.anatomy import Anatomy

# What a pass goes back to: nothing, the gates alone, every weight, or every weight through dropout.
Backward = Literal["none", "gates", "weights", "weights, dropout"]

Count = Callable[..., int]

# Matrix products in the backward pass of an attention: the fused CPU kernel computes the scores once more (5, not 4), but
# it knows no dropout, so that training falls back to plain products.
_ATTENTION_BACKWARD: dict[Backward, int] = {"none": 0, "gates": 5, "weights": 5, "weights, dropout": 4}


@dataclass(frozen=True, slots=True)
class Work:
    real: int = 0  # tokens of text
    computed: int = 0  # tokens with padding
    flops: int = 0  # of the matrix products; a multiplication and its addition are two


def work(lengths: Sequence[int], width: int, anatomy: Anatomy, n_classes: int, backward: Backward) -> Work:
    """The work of one pass over one batch: rows of these lengths, padded to `width` tokens."""
    n_rows, n_layers, d = len(lengths), anatomy.n_layers, anatomy.layers[0].attention.o.n_out
    tokens = n_rows * width
    qkv = linear = 0
    for layer in anatomy.layers:
        a = layer.attention
        qkv = 2 * tokens * sum(p.n_in * p.n_out for p in (a.q, a.k, a.v))
        linear += qkv + 2 * tokens * sum(p.n_in * p.n_out for p in (a.o, *layer.mlp.ins, layer.mlp.out))
    product = 2 * tokens * width * d  # queries with keys, or scores with values: all heads of a layer
    top = 2 * n_rows * (d * d + d * n_classes)  # pooler and classifier see one position a row
    flops = linear + top + 2 * n_layers * product
    if backward == "gates":  # gradients of inputs only, and none before the first layer's gates
        flops += linear - qkv + top + _ATTENTION_BACKWARD[backward] * (n_layers - 1) * product
    elif backward != "none":  # of inputs and weights
        flops += 2 * (linear + top) + _ATTENTION_BACKWARD[backward] * n_layers * product
    return Work(sum(lengths), tokens, flops)


def total(parts: Iterable[Work]) -> Work:
    parts = list(parts)
    return Work(sum(w.real for w in parts), sum(w.computed for w in parts), sum(w.flops for w in parts))


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of `run()` by torch's counter: as it comes, and with the fused CPU attention, which it does not know."""
    aten, forward, backward = torch.ops.aten, cast(Count, sdpa_flop_count), cast(Count, sdpa_backward_flop_count)
    fused = {
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: forward(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: backward(g, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        run()
    by_operation = counter.get_flop_counts().get("Global", {})
    return sum(n for operation, n in by_operation.items() if operation not in fused), sum(by_operation.values())
