"""Losses: what each row costs, or each token of a language model, and how rows are averaged. Pure functions of tensors.

One function and one row of `LOSSES` each. A loss takes the model's logits and what is known of the rows beside them (gold
classes, a bias-only model's opinion, a teacher's) and gives a value and perhaps a weight for each row; `reduce` averages. All
count in nats and work on log-probabilities throughout: no probability is ever taken the logarithm of.

p = softmax(logits), b = the bias-only model's probabilities, q = the teacher's, c = the gold class, K classes.
Source: Liu et al. 2022 and its released code; product of experts and learned-mixin: Clark, Yatskar, Zettlemoyer 2019;
reweighting: Schuster et al. 2019; confidence regularisation: Utama, Moosavi, Gurevych 2020; focal: Lin et al. 2017.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from annotated_types import Gt, Le
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax, nll_loss, softplus

from tombola.errors import SettingsError, TombolaError

Logits = Float[Tensor, "row cls"]
Normalisation = Literal["batch_weight_sum", "none", "dataset_mean"]

LossName = Literal[
    "ce", "poe", "reweight", "conf-reg", "focal", "distillation", "label-smoothing", "smoothed-reweight", "smoothed-distillation",
    "permuted-distillation", "marginal",
]  # fmt: skip

# A probability of 0 counts as this, after which the others are scaled: a product with 0 would ask for infinite logits.
SMALLEST = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What is known of the rows of a batch beside the model's logits."""

    labels: Int[Tensor, " row"]
    bias: Logits | None = None  # log-probabilities of a bias-only model, constants
    teacher: Logits | None = None  # log-probabilities of a teacher, constants
    hidden: Float[Tensor, "row width"] | None = None  # what the head reads; of learned-mixin
    allowed: Bool[Tensor, "row cls"] | None = None  # the classes that a row's label may stand for; None: its own alone


@dataclass(frozen=True, slots=True)
class RowLosses:
    """The loss of each row, and how much it counts; without weights all count alike."""

    values: Float[Tensor, " row"]
    weights: Float[Tensor, " row"] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LossSettings:
    """What models are trained against, by the names of the reproduction's table; the defaults are its `corrected` column."""

    loss: LossName = "ce"  # of the dense model, and of tickets that are retrained; a learned mask has its own, `mask_loss`
    # of `tombola.bias`: what losses against a bias need; the last three are biased language models, for tasks of tokens
    bias_model: (
        Literal["nli-overlap", "paraphrase-overlap", "first-text", "second-text", "first-word", "bigram", "trigram", "cue"] | None
    ) = None
    # of a biased language model in a product of experts: "divided" by what the same model says without the shortcut
    bias_prior: Literal["divided", "kept"] = "divided"
    bias_predictions: Literal["out_of_fold", "in_sample"] = "out_of_fold"
    bias_vectors: Literal["none", "model"] = "none"  # word vectors of overlap features: none, or the base's input embeddings
    reweight_normalisation: Normalisation = "batch_weight_sum"
    anneal_to: Annotated[float, Gt(0), Le(1)] = 1.0  # the bias to this power at the end of training, linearly from 1

    def plain(self, loss: str) -> dict[str, dict[str, object]]:
        """What a cell says of its loss, as JSON; nothing of cross-entropy, so that cells older than losses keep their names."""
        about = {"loss": loss, "reweight_normalisation": self.reweight_normalisation, "anneal_to": self.anneal_to}
        return {} if loss == "ce" else {"loss": about}


# --------------------------------------------------------------------------------------------------------------- losses


def plain(logits: Logits, known: Known) -> RowLosses:
    """−log p_c: cross-entropy."""
    return RowLosses(cross_entropy(logits, known.labels, reduction="none"))


def product_of_experts(logits: Logits, known: Known) -> RowLosses:
    """Cross-entropy of softmax(log p + log b): what the bias explains, the model need not learn. At test time p alone."""
    return RowLosses(cross_entropy(log_softmax(logits, -1) + _of(known, "bias"), known.labels, reduction="none"))


def reweight(logits: Logits, known: Known) -> RowLosses:
    """Cross-entropy weighted by 1 − b_c: rows that the bias gets right count little."""
    return RowLosses(plain(logits, known).values, 1 - _gold(_of(known, "bias"), known).exp())


def confidence_regularisation(logits: Logits, known: Known) -> RowLosses:
    """−Σ_j q'_j log p_j with q' ∝ q^(1 − b_c): the teacher, less sure of itself where the bias is right."""
    return RowLosses(_against(logits, _scaled_teacher(known)))


def focal(logits: Logits, known: Known, gamma: float = 1.0) -> RowLosses:
    """Cross-entropy weighted by (1 − p_c)^γ, no gradient through the weight: rows the model gets right count little."""
    values = plain(logits, known).values
    return RowLosses(values, (-torch.expm1(-values.detach())) ** gamma)


def distillation(logits: Logits, known: Known) -> RowLosses:
    """−Σ_j q_j log p_j."""
    return RowLosses(_against(logits, _of(known, "teacher")))


def label_smoothing(logits: Logits, known: Known) -> RowLosses:
    """Cross-entropy against (1 − b_c)·onehot + b_c/K: the answer, less certain where the bias knows it."""
    share, log_p = _gold(_of(known, "bias"), known).exp(), log_softmax(logits, -1)
    return RowLosses(-(1 - share) * _gold(log_p, known) - share * log_p.mean(-1))


def smoothed_reweight(logits: Logits, known: Known) -> RowLosses:
    """Cross-entropy weighted by q'_c, with q' as in confidence regularisation."""
    return RowLosses(plain(logits, known).values, _gold(_scaled_teacher(known), known).exp())


def smoothed_distillation(logits: Logits, known: Known, theta: float = 0.5) -> RowLosses:
    """Distillation from q^((1 − b_c) + θ), renormalised. θ = 0.5 is ours: the published code leaves it to its caller."""
    exponent = 1 - _gold(_of(known, "bias"), known).exp() + theta
    return RowLosses(_against(logits, log_softmax(exponent[:, None] * _of(known, "teacher"), -1)))


def permuted_distillation(logits: Logits, known: Known) -> RowLosses:
    """Distillation from q' with the two classes exchanged that are not its largest.

    Raises: TombolaError unless there are three classes.
    """
    if logits.shape[-1] != 3:
        raise TombolaError(
            "permuted distillation exchanges the two smaller of three classes", got=f"{logits.shape[-1]} classes", expected="3"
        )
    target = _scaled_teacher(known)
    largest = target.argmax(-1, keepdim=True)
    classes = torch.arange(3, device=target.device).expand_as(target)
    other = torch.where(classes == largest, classes, 3 - largest - classes)  # the third class, of 0 + 1 + 2
    return RowLosses(_against(logits, target.gather(-1, other)))


def marginal_likelihood(logits: Logits, known: Known) -> RowLosses:
    """−log of the summed probability of the classes that a row's label may stand for; cross-entropy where that is one."""
    if known.allowed is None:
        return plain(logits, known)
    return marginal(logits, known.allowed)


def teacher_as_bias(known: Known) -> Known:
    """The same rows with the teacher's opinion in place of the bias-only model's: product of experts with q, 1 − q_c."""
    return replace(known, bias=_of(known, "teacher"))


@dataclass(frozen=True, slots=True)
class Loss:
    """One row of `LOSSES`."""

    of: Callable[[Logits, Known], RowLosses]
    needs: tuple[str, ...] = ()  # fields of `Known`
    about: str = ""


LOSSES: Mapping[str, Loss] = {
    "ce": Loss(plain, (), "cross-entropy"),
    "poe": Loss(product_of_experts, ("bias",), "product of experts with a bias-only model"),
    "reweight": Loss(reweight, ("bias",), "rows that the bias gets right count little"),
    "conf-reg": Loss(confidence_regularisation, ("bias", "teacher"), "a teacher, less sure where the bias is right"),
    "focal": Loss(focal, (), "rows the model gets right count little"),
    "distillation": Loss(distillation, ("teacher",), "the teacher's probabilities"),
    "label-smoothing": Loss(label_smoothing, ("bias",), "labels, less certain where the bias is right"),
    "smoothed-reweight": Loss(smoothed_reweight, ("bias", "teacher"), "weights from the scaled teacher"),
    "smoothed-distillation": Loss(smoothed_distillation, ("bias", "teacher"), "the teacher, sharpened where the bias is wrong"),
    "permuted-distillation": Loss(permuted_distillation, ("bias", "teacher"), "the scaled teacher, smaller classes exchanged"),
    "marginal": Loss(marginal_likelihood, (), "the summed probability of the classes that a label may stand for"),
}


# ---------------------------------------------------------------------------------------------- losses that learn a number


class LearnedMixin(nn.Module):
    """Cross-entropy of softmax(log p + g·log b) + λ·H(softmax(g·log b)), with g = softplus(linear(hidden)) > 0 for each row.

    λ (`penalty`) > 0 is the form "+H": it keeps the model from switching the bias off. g is learned with the model and thrown
    away after training. The linear map starts as torch draws it.
    """

    def __init__(self, width: int, penalty: float = 0.0) -> None:
        super().__init__()
        self.gate, self.penalty = nn.Linear(width, 1), penalty

    def forward(self, logits: Logits, known: Known) -> RowLosses:
        if known.hidden is None:
            raise TombolaError("learned-mixin reads what the head reads", got="no hidden state")
        scaled = softplus(self.gate(known.hidden)) * _of(known, "bias")
        values = cross_entropy(log_softmax(logits, -1) + scaled, known.labels, reduction="none")
        log_bias = log_softmax(scaled, -1)
        return RowLosses(values - self.penalty * (log_bias.exp() * log_bias).sum(-1))


class Calibrated(nn.Module):
    """Cross-entropy of logits / T, one temperature T > 0 for all rows, learned from 1."""

    def __init__(self) -> None:
        super().__init__()
        self.log_temperature = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Logits, known: Known) -> RowLosses:
        return plain(logits / self.log_temperature.exp(), known)


# ------------------------------------------------------------------------------------------------------- around a loss


def reduce(of: RowLosses, normalisation: Normalisation = "batch_weight_sum", mean_weight: float = 1.0) -> Float[Tensor, ""]:
    """The loss of a batch, a mean over its rows.

    batch_weight_sum: Σ wᵢ·lᵢ / Σ wᵢ, which hangs on what else is in the batch. none: Σ wᵢ·lᵢ / n. dataset_mean: Σ wᵢ·lᵢ / n
    over `mean_weight`, the mean weight of all train rows. Where all weights are 0 the loss is 0, and so are its gradients.

    Raises: TombolaError, naming the rows of the batch, when a value or weight is not a number or infinite.
    """
    weights = torch.ones_like(of.values) if of.weights is None else of.weights
    bad = (~(of.values.isfinite() & weights.isfinite())).nonzero().flatten().tolist()
    if bad:
        raise TombolaError(
            "the loss of a row is not a finite number",
            got=f"rows {', '.join(map(str, bad[:6]))} of this batch",
            next="a smaller learning rate; or look at the bias-only model's probabilities of these rows",
        )
    total = (of.values * weights).sum()
    if normalisation == "batch_weight_sum":
        return total / weights.sum().clamp_min(torch.finfo(total.dtype).tiny)
    return total / len(weights) / (mean_weight if normalisation == "dataset_mean" else 1.0)


def annealed(log_probabilities: Logits, share: float, start: float = 1.0, end: float = 0.8) -> Logits:
    """b^θ renormalised, in logarithms; θ goes linearly from `start` to `end` as the share of training done goes from 0 to 1."""
    return log_softmax((start + (end - start) * share) * log_probabilities, -1)


def marginal(logits: Logits, allowed: Tensor) -> RowLosses:
    """−log of the summed probability of the allowed classes, a row of bools each: "not entailment" of a model of three classes.

    Source: ours, in place of taking every such row for a contradiction, as the released oracle training does.
    """
    return RowLosses(-log_softmax(logits, -1).masked_fill(~allowed, -torch.inf).logsumexp(-1))


def tokens_of(
    logits: Float[Tensor, "row position cls"], labels: Int[Tensor, "row position"], bias: Tensor | None = None
) -> tuple[Float[Tensor, "token cls"], Known, Int[Tensor, " token"]]:
    """A language model's batch as rows, one for each predicted token, so that every loss holds for tokens too.

    Each token but the first is predicted from those before it; label −100 is no token. The third says of each whose row it is.
    bias: log-probabilities of a biased language model, of the shape of `logits` and at the same places.
    """
    predicted, gold = logits[:, :-1], labels[:, 1:]
    real = gold != -100
    opinion = None if bias is None else bias[:, :-1][real]
    rows = torch.arange(len(labels), device=labels.device)[:, None].expand_as(gold)[real]
    return predicted[real], Known(labels=gold[real], bias=opinion), rows


def sequence_reweight(logits: Float[Tensor, "token cls"], known: Known, rows: Int[Tensor, " token"]) -> RowLosses:
    """Cross-entropy of tokens, each weighted by 1 − exp(mean over its sequence of log b of the gold tokens).

    A sequence that the biased model would have written anyway counts little, whole. Source: ours (spec 8.1).
    """
    gold = _gold(_of(known, "bias"), known)
    n = int(rows.max()) + 1 if len(rows) else 0
    sums, counts = gold.new_zeros(n).index_add_(0, rows, gold), gold.new_zeros(n).index_add_(0, rows, torch.ones_like(gold))
    return RowLosses(plain(logits, known).values, (-torch.expm1(sums / counts.clamp_min(1)))[rows])


def token_confidence_regularisation(logits: Float[Tensor, "token cls"], known: Known, top: int = 50) -> RowLosses:
    """Confidence regularisation over a vocabulary: of the teacher the `top` likeliest tokens alone, renormalised."""
    target = _scaled_teacher(known)
    best, which = target.topk(min(top, target.shape[-1]), dim=-1)
    return RowLosses(-(log_softmax(best, -1).exp() * log_softmax(logits, -1).gather(-1, which)).sum(-1))


def check_loss(name: str, known: tuple[str, ...]) -> Loss:
    """The loss of that name. Raises: SettingsError for an unknown one, and for all that it needs and is not in `known`."""
    if name not in LOSSES:
        raise SettingsError([TombolaError(f"unknown loss {name!r}", expected=", ".join(LOSSES))])
    missing = [need for need in LOSSES[name].needs if need not in known]
    if missing:
        raise SettingsError(
            [
                TombolaError(
                    f"the loss {name} needs a {'bias-only model' if need == 'bias' else 'teacher'}",
                    expected="log-probabilities for every train row, keyed by its id",
                )
                for need in missing
            ]
        )
    return LOSSES[name]


# --------------------------------------------------------------------------------------------------------------- helpers


def _of(known: Known, field: Literal["bias", "teacher"]) -> Logits:
    """The log-probabilities asked for, none below log `SMALLEST`, summing to 1."""
    found = getattr(known, field)
    if found is None:
        raise TombolaError(f"this loss needs the log-probabilities of a {'bias-only model' if field == 'bias' else field}")
    floored: Tensor = found.clamp_min(torch.tensor(SMALLEST).log().item())
    return log_softmax(floored, -1)


def _gold(log_probabilities: Logits, known: Known) -> Float[Tensor, " row"]:
    return -nll_loss(log_probabilities, known.labels, reduction="none")


def _scaled_teacher(known: Known) -> Logits:
    """log q', q'_j = q_j^(1 − b_c) renormalised: nearly uniform where the bias is sure of the gold class."""
    exponent = 1 - _gold(_of(known, "bias"), known).exp()
    return log_softmax(exponent[:, None] * _of(known, "teacher"), -1)


def _against(logits: Logits, log_target: Logits) -> Float[Tensor, " row"]:
    return -(log_target.exp() * log_softmax(logits, -1)).sum(-1)
