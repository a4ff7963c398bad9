"""The ways that are compared, each written as plainly as such code is in practice. Nothing here measures.

    published   every row padded to 128 tokens, 64 a batch in data set order (32 at random when training). Importance as in
                run_bertology and the code released with Prasanna et al. 2020: mask variables on heads and MLPs, the mean
                loss of a batch, `loss.backward()`, sum over batches of the absolute gradient of the variables, which is
                never zeroed. The score is of the logits of the same pass.
    dynamic     the same, but padded to the longest row of each batch, as the usual collator does.
    ours        tombola.

All three run the same model object: fp32, fused attention (the released code had none), in eval mode for importance, in
train mode with dropout and fused AdamW for training. The rivals are given what costs them nothing to have: rows of
`published` are padded before the clock starts, and weight gradients are dropped after each batch instead of added up.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from tombola.anatomy import Anatomy
from tombola.evaluate import score_and_gradients
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.order import LengthBuckets
from tombola.scores import GateGradients, Importance, sensitivity
from tombola.tasks.encode import Encoded, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WIDTH, SCORE_BATCH, TRAIN_BATCH = 128, 64, 32  # of the published runs

Batch = dict[str, Tensor]


def in_order(n_rows: int) -> list[list[int]]:
    """Row numbers in data set order, 64 a batch."""
    return [list(range(start, min(start + SCORE_BATCH, n_rows))) for start in range(0, n_rows, SCORE_BATCH)]


def shuffled(n_rows: int, seed: int) -> list[list[int]]:
    """Row numbers in random order, 32 a batch."""
    order = np.random.default_rng(seed).permutation(n_rows).tolist()
    return [order[start : start + TRAIN_BATCH] for start in range(0, n_rows, TRAIN_BATCH)]


def bucketed(encoded: Encoded, seed: int) -> list[list[int]]:
    """Row numbers in the order of `tombola.fine_tune`, 32 a batch."""
    order = list(LengthBuckets(encoded.lengths, TRAIN_BATCH, seed))
    return [order[start : start + TRAIN_BATCH] for start in range(0, len(order), TRAIN_BATCH)]


def collate_to(encoded: Encoded, rows: Sequence[int], width: int) -> Batch:
    """Model inputs of these rows, padded to `width` tokens."""
    batch = collate(encoded, rows)
    missing = (0, width - batch["input_ids"].shape[1])
    return {name: x if x.ndim == 1 else pad(x, missing, value=encoded.pad.get(name, 0)) for name, x in batch.items()}


def published_batches(rows: Encoded) -> list[tuple[list[int], Batch]]:
    """The full batches of "published", with their row numbers: padded before the clock starts, as the released code does."""
    order = in_order(len(rows))
    return [(numbers, collate_to(rows, numbers, WIDTH)) for numbers in order if len(numbers) == len(order[0])]


# ----------------------------------------------------------------------------------------------------------- importance


@contextmanager
def mask_variables(model: "PreTrainedModel", anatomy: Anatomy, mask: Mask) -> Iterator[tuple[Tensor, Tensor]]:
    """Variables [layer, head] and [layer] at the values of `mask`, multiplied into heads and MLPs while this is open."""
    assert mask.heads is not None and mask.mlps is not None
    heads, mlps = mask.heads.float().requires_grad_(), mask.mlps.float().requires_grad_()
    handles = []
    for i, layer in enumerate(anatomy.layers):

        def of_heads(_: Any, args: tuple[Any, ...], i: int = i, d_head: int = layer.attention.d_head) -> tuple[Any, ...]:
            return (args[0] * heads[i].repeat_interleave(d_head), *args[1:])

        def of_mlp(_: Any, __: Any, output: Tensor, i: int = i) -> Tensor:
            return output * mlps[i]

        handles.append(model.get_submodule(layer.attention.o.path).register_forward_pre_hook(of_heads))
        handles.append(model.get_submodule(layer.mlp.out.path).register_forward_hook(of_mlp))
    try:
        yield heads, mlps
    finally:
        for handle in handles:
            handle.remove()


def bertology(model: "PreTrainedModel", anatomy: Anatomy, mask: Mask, batches: Iterable[Batch]) -> tuple[Importance, Tensor]:
    """Importance under `mask` and logits in the order of the batches, as "published" and "dynamic" get them."""
    model.eval()
    head_importance, mlp_importance = torch.zeros(anatomy.n_layers, anatomy.n_heads), torch.zeros(anatomy.n_layers)
    logits = []
    with mask_variables(model, anatomy, mask) as (heads, mlps):
        for batch in batches:
            output = model(**batch)
            output.loss.backward()
            assert heads.grad is not None and mlps.grad is not None
            head_importance += heads.grad.abs()
            mlp_importance += mlps.grad.abs()
            logits.append(output.logits.detach())
            model.zero_grad()
    return Importance(head_importance, mlp_importance), torch.cat(logits)


def score_alone(model: "PreTrainedModel", anatomy: Anatomy, mask: Mask, batches: Iterable[Batch]) -> Tensor:
    """Logits of a forward pass of its own."""
    model.eval()
    with torch.no_grad(), mask_variables(model, anatomy, mask):
        return torch.cat([model(**batch).logits for batch in batches])


def ours_importance(model: "PreTrainedModel", anatomy: Anatomy, encoded: Encoded) -> tuple[Importance, GateGradients]:
    """Importance by the paper's formula, and the gradient of each row that it is made of, with logits."""
    with Gates(model, anatomy) as gates:
        _, gradients = score_and_gradients(gates, encoded)
    return sensitivity(gradients), gradients


# ------------------------------------------------------------------------------------------------------------- training


def training_step(model: "PreTrainedModel", optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Forward, backward, clip, optimizer, zero_grad: the same for all three ways."""
    model.train()
    model(**batch).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


def adamw(model: "PreTrainedModel") -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=2e-5, eps=1e-8, weight_decay=0.0, fused=True)


# -------------------------------------------------------------------------------------------------------- mask training


class ReleasedMask(torch.nn.Module):
    """A mask on one matrix as the code released with Liu et al. 2022 has it: a float for every value of the mask in each forward
    pass, by a threshold at the k-th smallest score. Scores start at abs(W), as its soft start."""

    def __init__(self, weight: Tensor, sparsity: float) -> None:
        super().__init__()
        self.scores, self.sparsity = torch.nn.Parameter(weight.detach().abs().clone()), sparsity
        self.set_threshold()

    def set_threshold(self) -> None:
        scores = self.scores.detach().flatten()
        self.threshold = float(torch.kthvalue(scores, round(self.sparsity * len(scores))).values)

    def forward(self, weight: Tensor) -> Tensor:
        masked: Tensor = weight * _StraightThrough.apply(self.scores, self.threshold)  # type: ignore[no-untyped-call]
        return masked


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, scores: Tensor, threshold: float) -> Tensor:
        return (scores > threshold).float()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
