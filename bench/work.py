"""How much work a batch is: tokens, and floating-point operations by formula.

Seconds depend on the machine and on who else uses it; these counts do not, so that they are what the bench asserts. The
formula is held against torch's own counter on one batch of every way (`counted`), to the last operation.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Literal

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from tombola.anatomy import Anatomy

# What a pass goes back to: nothing, the gates alone, every weight, or every weight through dropout.
Backward = Literal["none", "gates", "weights", "weights, dropout"]

# Multiplications of the two attention products that the backward pass makes: the fused CPU kernel computes the scores once
# more (5 instead of 4), but it takes no dropout, so that training falls back to plain matrix products.
_ATTENTION_BACKWARD: dict[Backward, int] = {"none": 0, "gates": 5, "weights": 5, "weights, dropout": 4}


@dataclass(frozen=True, slots=True)
class Work:
    """Totals over batches. FLOPs of the matrix products only: a multiplication and an addition are two."""

    rows: int = 0
    real: int = 0  # tokens that are text
    computed: int = 0  # tokens with padding
    flops: int = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.rows + other.rows, self.real + other.real, self.computed + other.computed, self.flops + other.flops
        )


def work(lengths: Sequence[int], width: int, anatomy: Anatomy, n_labels: int, backward: Backward) -> Work:
    """The work of one pass over one batch of rows of these lengths, padded to `width` tokens."""
    d, n_rows = anatomy.layers[0].attention.o.n_out, len(lengths)
    tokens = n_rows * width
    qkv = linear = 0
    for layer in anatomy.layers:
        a = layer.attention
        qkv = 2 * tokens * sum(p.n_in * p.n_out for p in (a.q, a.k, a.v))
        linear += qkv + 2 * tokens * sum(p.n_in * p.n_out for p in (a.o, *layer.mlp.ins, layer.mlp.out))
    product, n_layers = 2 * tokens * width * d, anatomy.n_layers  # product: of queries with keys, or of these with values
    head = 2 * n_rows * (d * d + d * n_labels)  # pooler and classifier see one position a row
    flops = linear + head + 2 * n_layers * product
    if backward == "gates":  # inputs only, and nothing of the first layer that lies before its gates
        flops += linear - qkv + head + _ATTENTION_BACKWARD[backward] * (n_layers - 1) * product
    elif backward != "none":  # inputs and weights
        flops += 2 * (linear + head) + _ATTENTION_BACKWARD[backward] * n_layers * product
    return Work(n_rows, sum(lengths), tokens, flops)


def total(parts: Iterable[Work]) -> Work:
    return reduce(Work.__add__, parts, Work())


def counted(run: Callable[[], object]) -> tuple[int, int]:
    """FLOPs of `run()` by torch's counter: (as it comes, and with the fused attention of the CPU, which it does not know)."""
    fused = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: (
            sdpa_backward_flop_count(g, q, k, v)
        ),
    }
    counter = FlopCounterMode(display=False, custom_mapping=fused)
    with counter:
        run()
    known = {str(operation) for operation in fused}
    of_attention = sum(n for operation, n in counter.get_flop_counts()["Global"].items() if str(operation) in known)
    return counter.get_total_flops() - of_attention, counter.get_total_flops()
