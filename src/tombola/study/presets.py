"""Presets: what the paper says, what its released code does, and what is correct, option by option.

One row an option, named as the field of the settings it sets; where the paper is silent its column holds the plain reading.
A *ladder* between two presets takes the first and changes one option at a time to the second's value, so that what each
difference costs can be read off alone; its last rung is the second preset itself.
Source: Prasanna et al. 2020, its appendix, and the behaviour of sai-prasanna/bert-experiments at f02280f; Chen et al. 2020 and
the behaviour of VITA-Group/BERT-Tickets.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tombola.errors import SettingsError, TombolaError

NAMES = ("paper", "released", "corrected")
DEFAULT = "corrected"

# option: (paper, released, corrected). The last column is the default of the settings' own fields.
OPTIONS: Mapping[str, tuple[Any, Any, Any]] = {
    "selection_split": ("dev", "dev", "held_out_from_train"),
    "padding": ("max_length", "max_length", "bucketed"),
    "floor_rule": ("fraction_of_full", "fraction_of_full", "fraction_of_full"),
    "stsb_stop_metric": ("pearson", "mean_pearson_spearman", "pearson"),
    "importance_reduction": ("per_example", "accumulated", "per_example"),
    "importance_batch_size": (64, 64, 64),
    "importance_norm_members": ("all_heads", "all_heads", "remaining_heads"),
    "importance_minmax": (False, True, False),
    "mlp_importance_norm": ("none", "token_count", "none"),
    "rollback_importance": ("recompute", "keep_failed", "recompute"),
    "s_head_step": (0.10, 14, 0.10),
    "s_head_step_base": ("total", "total", "total"),
    "s_heads_only_phase_step": (0.10, 7, 0.05),
    "m_step_fraction": (0.10, 0.05, 0.05),
    "m_step_base": ("remaining", "remaining", "remaining"),
    "m_max_steps": (None, None, None),
    "random_size": ("exact", "bernoulli", "exact"),
    "control_draws": ("independent", "reseeded_42", "independent"),
    "bad_s_rule": ("pruned_plus_fill", "pruned_plus_fill", "pruned_plus_fill"),
    "bad_m_rule": ("pruned_plus_fill", "remove_highest", "pruned_plus_fill"),
    "super_bad_rule": ("least_surviving", "removed_in_all", "least_surviving"),
    "super_bad_draw": ("per_seed", "once", "per_seed"),
    "retrain_start": ("pretrained_keep_tuned_embeddings", "pretrained_all", "pretrained_all"),
    "empty_layer_bias": ("keep", "mask_keeps_shrink_drops", "keep"),
    "norm_map_weight": ("out_projection", "untransposed", "out_projection"),
    "map_inputs": ("full", "no_segment_ids_with_pad", "full_real_tokens"),
    "map_preprocess": ("same", "train_padded_predict_unpadded", "same"),
    "pattern_split": ("holdout", "select_on_test", "stratified_kfold"),
    # Liu et al. 2022 and llyx97/sparse-and-robust-PLM at 773dab1b
    "mask_rule": ("ge_threshold", "gt_threshold", "exact_top_k"),
    "sparsity_refresh_steps": (1000, 1000, 1),
    "mask_learning_rate": (5e-5, 5e-5, None),
    "gradual_end": (1.0, 1.0, 0.75),
    "score_init_draw": ("without_replacement", "with_replacement", "without_replacement"),
    "bias_predictions": ("in_sample", "in_sample", "out_of_fold"),
    "reweight_normalisation": ("none", "batch_weight_sum", "batch_weight_sum"),
    "hans_train_label": ("contradiction", "contradiction", "marginal"),
    # Chen et al. 2020 and VITA-Group/BERT-Tickets at 4d8e035
    "imp_schedule": ("geometric", "linear", "linear"),
    "imp_last_level": (0.9, 1.0, 0.9),
    "rewind": ("step_0", "step_0", "step_0"),
    "rewind_source": ("immutable", "aliased_mlm", "immutable"),
    "head_rewind": ("own_init", "carried", "own_init"),
    "lr_schedule_span": ("round", "whole_chain", "round"),
    "round_end": ("full_run", "fixed_step_count", "full_run"),
    "round_data_order": ("same", "continuing_rng", "seed_and_round"),
    "cut_count": ("exact", "rounded_per_call", "exact"),
    "mlm_first_cut": ("after_training", "before_training", "after_training"),
    "mlm_eval_masks": ("fixed_by_seed", "redrawn", "fixed_by_seed"),
    "mlm_accuracy_weight": ("masked_tokens", "padded_tokens", "masked_tokens"),
    "report_checkpoint": ("last", "last", "last"),  # neither paper nor code says which of its results is the one reported
    "artefact_level": ("single", "off_by_one", "single"),
    "pruned_weight_decay": ("none", "kept_values", "none"),
    "squad_epochs": (2, 4, 2),
    "mlm_finetune_steps": ("16x10000", "8x20000", "16x10000"),
    "std_kind": ("sample", "none", "sample"),
}


@dataclass(frozen=True, slots=True)
class Rung:
    """One rung of a ladder: the first preset with these options set otherwise."""

    name: str  # "released", "padding", …, "corrected"
    preset: str
    values: Mapping[str, Any]


def preset_values(preset: str, known: "set[str] | None" = None) -> dict[str, Any]:
    """Option → value of a preset, for the options in `known` (of one method), or all.

    Raises: SettingsError for an unknown preset; the nearest is offered.
    """
    _known(preset)
    column = NAMES.index(preset)
    return {name: row[column] for name, row in OPTIONS.items() if known is None or name in known}


def ladder(text: str, known: "set[str] | None" = None) -> list[Rung]:
    """The rungs of "A:B": preset A, then A with one option of B at a time, then B. Options that agree make no rung.

    Raises: SettingsError when `text` does not name two different presets.
    """
    first, colon, last = text.partition(":")
    if not colon or first == last:
        problem = TombolaError("a ladder goes from one preset to another", got=text, expected=f"A:B, two of {', '.join(NAMES)}")
        raise SettingsError([problem])
    for name in (first, last):
        _known(name, got=text)
    start, end = preset_values(first, known), preset_values(last, known)
    single = [Rung(name, first, {name: end[name]}) for name in start if start[name] != end[name]]
    return [Rung(first, first, {}), *single, Rung(last, last, {})]


def _known(preset: str, got: str | None = None) -> None:
    if preset not in NAMES:
        near = difflib.get_close_matches(preset, NAMES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else None
        raise SettingsError([TombolaError(f"there is no preset {preset!r}", got=got, expected=", ".join(NAMES), next=hint)])
