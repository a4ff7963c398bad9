"""Presets, ladders and settings by name: every option says the same in the table, in the settings and in the paper's list."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import tiny_model
from tombola.anatomy import read_anatomy
from tombola.errors import SettingsError
from tombola.evaluate import Predictions
from tombola.gates import Gates
from tombola.scores import GateGradients
from tombola.search import SEARCHES, structured
from tombola.search.controls import ControlSettings
from tombola.search.structured import s_prune
from tombola.search.supers import SuperSettings
from tombola.study.jobs import find, open_lab
from tombola.study.kinds import CONTROL_KINDS
from tombola.study.liu2022 import OracleOptions
from tombola.study.presets import DEFAULT, NAMES, OPTIONS, ladder, preset_values
from tombola.study.runs import implied, plan_find
from tombola.study.settings import Settings, groups_of, options_of, resolve
from tombola.study.steps.attention import AttentionSettings
from tombola.tasks import files_task
from tombola.tasks.encode import Encoded

# The list of differences between the paper (and its appendix), its released code, and correct practice, as it was written
# down before the code was: (paper, released, corrected). "any" where a value plays no part.
PAPER: dict[str, tuple[Any, Any, Any]] = {
    "m_step_fraction": (0.10, 0.05, 0.05),
    "m_step_base": ("remaining", "remaining", "remaining"),
    "m_max_steps": (None, None, None),
    "importance_reduction": ("per_example", "accumulated", "per_example"),
    "importance_batch_size": ("any", 64, "any"),
    "importance_norm_members": ("all_heads", "all_heads", "remaining_heads"),
    "importance_minmax": (False, True, False),
    "mlp_importance_norm": ("none", "token_count", "none"),
    "rollback_importance": ("recompute", "keep_failed", "recompute"),
    "s_head_step": (0.10, 14, 0.10),
    "s_head_step_base": ("total", "total", "total"),
    "s_heads_only_phase_step": (0.10, 7, 0.05),
    "random_size": ("exact", "bernoulli", "exact"),
    "control_draws": ("independent", "reseeded_42", "independent"),
    "bad_s_rule": ("pruned_plus_fill", "pruned_plus_fill", "pruned_plus_fill"),
    "bad_m_rule": ("pruned_plus_fill", "remove_highest", "pruned_plus_fill"),
    "floor_rule": ("fraction_of_full", "fraction_of_full", "fraction_of_full"),
    "stsb_stop_metric": ("pearson", "mean_pearson_spearman", "pearson"),
    "selection_split": ("dev", "dev", "held_out_from_train"),
    "retrain_start": ("pretrained_keep_tuned_embeddings", "pretrained_all", "pretrained_all"),
    "empty_layer_bias": ("keep", "mask_keeps_shrink_drops", "keep"),
    "padding": ("max_length", "max_length", "bucketed"),
    "super_bad_rule": ("least_surviving", "removed_in_all", "least_surviving"),
    "super_bad_draw": ("per_seed", "once", "per_seed"),
    "norm_map_weight": ("out_projection", "untransposed", "out_projection"),
    "map_inputs": ("full", "no_segment_ids_with_pad", "full_real_tokens"),
    "map_preprocess": ("same", "train_padded_predict_unpadded", "same"),
    "pattern_split": ("holdout", "select_on_test", "stratified_kfold"),
    # of Chen et al. 2020
    "imp_schedule": ("geometric", "linear", "linear"),
    "imp_last_level": (0.9, 1.0, 0.9),
    "rewind": ("step_0", "step_0", "step_0"),
    "rewind_source": ("immutable", "aliased_mlm", "immutable"),
    "head_rewind": ("own_init", "carried", "own_init"),
    "lr_schedule_span": ("round", "whole_chain", "round"),
    "round_end": ("full_run", "fixed_step_count", "full_run"),
    "mlm_first_cut": ("after_training", "before_training", "after_training"),
    "round_data_order": ("same", "continuing_rng", "seed_and_round"),
    "report_checkpoint": ("last", "last", "last"),  # unverified, unspecified: the plain reading
    "artefact_level": ("single", "off_by_one", "single"),
    "mlm_eval_masks": ("any", "redrawn", "fixed_by_seed"),
    "mlm_accuracy_weight": ("any", "padded_tokens", "masked_tokens"),
    "cut_count": ("exact", "rounded_per_call", "exact"),
    "pruned_weight_decay": ("none", "kept_values", "none"),
    "squad_epochs": (2, 4, 2),
    "mlm_finetune_steps": ("16x10000", "8x20000", "16x10000"),
    "std_kind": ("any", "none", "sample"),
    # of Liu et al. 2022
    "mask_rule": ("ge_threshold", "gt_threshold", "exact_top_k"),
    "sparsity_refresh_steps": (1000, "any", 1),
    "gradual_end": ("any", 1.0, 0.75),
    "score_init_draw": ("without_replacement", "with_replacement", "without_replacement"),
    "mask_learning_rate": (5e-5, 5e-5, None),
    "bias_predictions": ("any", "in_sample", "out_of_fold"),
    "reweight_normalisation": ("none", "batch_weight_sum", "batch_weight_sum"),
    "hans_train_label": ("any", "contradiction", "marginal"),
}
# Of the same list, and no settings of cells: how figures and tables read what is stored.
LATER = {
    "fig2_random_source", "size_report", "agreement_report", "survivor_correlation", "tasks_m_prune",
}  # fmt: skip
METHODS = sorted(SEARCHES)


def defaults(method: str) -> dict[str, Any]:
    """Every setting of a method as its field declares it."""
    return {field.name: field.default for kind in groups_of(method).values() for field in fields(kind)}


# -------------------------------------------------------------------------------------------------------------- presets


def test_the_table_is_the_list_of_the_reproduction() -> None:
    assert NAMES == ("paper", "released", "corrected") and DEFAULT == "corrected"
    assert OPTIONS.keys() == PAPER.keys()
    for name, row in PAPER.items():
        for said, wanted in zip(OPTIONS[name], row, strict=True):
            assert wanted == "any" or (said == wanted and type(said) is type(wanted)), name


def test_no_setting_of_the_list_is_without_its_row() -> None:
    """An option that comes to be a setting later must come into the table with it."""
    every = {name for method in METHODS for name in options_of(method)}
    assert every & LATER == set()
    others = {field.name for kind in (SuperSettings, AttentionSettings) for field in fields(kind)}
    assert OPTIONS.keys() <= every | others | OracleOptions.model_fields.keys(), (
        "and every row is a setting of some method, of super-survivors, maps or oracles"
    )
    own = {field.name: field.default for field in fields(AttentionSettings)}
    assert {name: own[name] for name in OPTIONS.keys() & own} == preset_values("corrected", set(own))


@pytest.mark.parametrize("method", METHODS)
def test_the_corrected_column_is_what_the_fields_declare(method: str) -> None:
    own = defaults(method)
    corrected = preset_values("corrected", set(own))
    assert corrected == {name: own[name] for name in corrected}
    assert corrected.keys() == OPTIONS.keys() & own.keys()
    plain = {n: v for group in resolve({}, method=method).plain().values() for n, v in group.items()}
    assert plain == own, "so that no preset and the default preset are the same settings"


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_sets_every_option_of_its_method_and_nothing_else(preset: str, method: str) -> None:
    settings = resolve({}, method=method, preset=preset)
    assert settings.preset == preset and settings.method == method
    column, own = NAMES.index(preset), defaults(method)
    for group in settings.plain().values():
        for name, value in group.items():
            assert value == (OPTIONS[name][column] if name in OPTIONS else own[name]), name


def test_values_that_are_given_win_over_the_preset() -> None:
    settings = resolve({"padding": "bucketed", "s_head_step": 0.2, "random_size": "exact", "epochs": 1}, preset="released")
    assert (settings.data.padding, settings.search.s_head_step, settings.control.random_size) == ("bucketed", 0.2, "exact")
    assert settings.train.epochs == 1
    assert settings.data.selection_split == "dev" and settings.search.importance_reduction == "accumulated"
    assert settings.control.control_draws == "reseeded_42" and settings.preset == "released"


def test_a_count_stays_a_count_and_a_fraction_a_fraction() -> None:
    """14 of 144 heads and 0.14 of them, 1 head and all of them, are told apart by type alone."""
    assert type(resolve({}, preset="released").search.s_head_step) is int
    assert type(resolve({}, preset="paper").search.s_head_step) is float
    assert type(resolve({"s_head_step": 1}).search.s_head_step) is int
    for wrong in (0, -1, 1.0, 1.5, 0.0, "many", True, 2.0):
        with pytest.raises(SettingsError, match="s_head_step is not valid"):
            resolve({"s_head_step": wrong})


@pytest.mark.parametrize(
    ("said", "nearest"), [("relased", "released"), ("papers", "paper"), ("correct", "corrected"), ("default", None)]
)
def test_an_unknown_preset_is_refused_and_the_nearest_offered(said: str, nearest: str | None) -> None:
    for call in (lambda: preset_values(said), lambda: resolve({}, preset=said), lambda: ladder(f"{said}:corrected")):
        with pytest.raises(SettingsError, match=f"there is no preset '{said}'") as caught:
            call()
        (problem,) = caught.value.problems
        assert problem.next == (None if nearest is None else f"did you mean '{nearest}'?")
        assert problem.expected == "paper, released, corrected"


@pytest.mark.parametrize(
    ("method", "name", "value"),
    [
        ("m-prune", "s_head_step", 14),
        ("m-prune", "importance_reduction", "per_example"),
        ("m-prune", "sparsity", 0.5),
        ("s-prune", "m_step_fraction", 0.1),
        ("s-prune", "scope", "body"),
        ("one-shot", "floor", 0.9),
        ("one-shot", "m_max_steps", 3),
    ],
)
def test_settings_of_another_method_are_refused_by_name(method: str, name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=f"there is no setting '{name}' of {method}"):
        resolve({name: value}, method=method)
    for preset in NAMES:  # what a preset says of another method is passed over: it was not asked for by name
        assert resolve({}, method=method, preset=preset).method == method


@pytest.mark.parametrize("sparsity", [1.0, 1, -0.1, float("nan"), "half", None])
def test_a_sparsity_outside_its_range_is_refused(sparsity: object) -> None:
    with pytest.raises(SettingsError, match="sparsity is not valid"):
        resolve({"sparsity": sparsity}, method="one-shot")
    assert resolve({"sparsity": 0.0}, method="one-shot").search.sparsity == 0.0


@pytest.mark.parametrize(
    ("said", "nearest"), [("sprune", "s-prune"), ("m-pruning", "m-prune"), ("oneshot", "one-shot"), ("magic", None)]
)
def test_an_unknown_method_is_refused_and_the_nearest_offered(said: str, nearest: str | None) -> None:
    with pytest.raises(SettingsError, match=f"unknown method '{said}'") as caught:
        resolve({}, method=said)
    assert caught.value.problems[0].next == (None if nearest is None else f"did you mean {nearest!r}?")


@pytest.mark.parametrize(
    ("name", "value", "read_as"),
    [
        ("epochs", True, "1"),
        ("epochs", 3.0, "3"),
        ("floor", True, "1.0"),
        ("importance_minmax", 1, "True"),
        ("s_head_step", 1.0, "1"),
    ],
)
def test_a_value_that_would_be_read_as_another_is_refused_not_adjusted(name: str, value: object, read_as: str) -> None:
    """s_head_step=1.0 is all heads to who writes it, and would have been one head a step."""
    with pytest.raises(SettingsError, match=f"{name} is not valid") as caught:
        resolve({name: value})
    (problem,) = caught.value.problems
    assert problem.got == repr(value) and read_as in str(problem.expected)
    assert resolve({"floor": 1}).search.floor == 1.0, "a whole number is a number"


def test_unknown_values_of_an_option_name_the_known_ones() -> None:
    with pytest.raises(SettingsError) as caught:
        resolve({"retrain_start": "theta", "empty_layer_bias": "drop", "padding": "none", "random_size": "about"})
    text = str(caught.value)
    assert len(caught.value.problems) == 4
    for known in ("pretrained_keep_tuned_embeddings", "mask_keeps_shrink_drops", "max_length", "exact_per_layer"):
        assert known in text


# --------------------------------------------------------------------------------------------- what released does, in heads


@pytest.mark.parametrize(
    ("preset", "joint", "heads_only"),
    [("released", 14, 7), ("paper", 14, 14), ("corrected", 14, 7)],  # int(0.1 · 144), int(0.05 · 144)
)
def test_a_model_of_144_heads_loses_as_many_a_step_as_published(
    preset: str, joint: int, heads_only: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve layers of twelve heads. The score holds for two joint steps, then for one of heads alone."""
    model = tiny_model("bert", layers=12, heads=12, width=24, d_ffn=8)
    anatomy = read_anatomy(model)
    generator = torch.Generator().manual_seed(0)
    right = iter([90, 90, 90, 10, 90, 10, 10])  # of 100 rows, half of them of each class

    def rows(gates: Gates, selection: Encoded) -> tuple[Predictions, GateGradients]:
        labels = [0, 1] * 50
        n = next(right)
        logits = torch.eye(2)[[label if i < n else 1 - label for i, label in enumerate(labels)]]
        gradients = (torch.rand(100, 12, 12, generator=generator).double(), torch.rand(100, 12, generator=generator).double())
        return Predictions(tuple(map(str, range(100))), logits, tuple(labels)), GateGradients(*gradients, logits)

    monkeypatch.setattr(structured, "score_and_gradients", rows)
    one_row = Encoded(("a",), ({"input_ids": (5,)},), (0,), 0, {"input_ids": 0})
    settings = resolve({}, preset=preset).search
    result = s_prune(Gates(model, anatomy), one_row, "accuracy", settings)
    kept = [(trial.phase, *(count for count, _ in trial.mask.counts().values())) for trial in result.trials]
    assert kept == [
        ("full", 144, 12),
        ("joint", 144 - joint, 11),
        ("joint", 144 - 2 * joint, 10),
        ("joint", 144 - 3 * joint, 9),
        ("heads", 144 - 2 * joint - heads_only, 10),
        ("heads", 144 - 2 * joint - 2 * heads_only, 10),
        ("mlps", 144 - 2 * joint - heads_only, 9),
    ]


# -------------------------------------------------------------------------------------------------------------- ladders


@pytest.mark.parametrize("text", ["released:corrected", "paper:corrected", "corrected:released", "paper:released"])
@pytest.mark.parametrize("method", METHODS)
def test_a_ladder_has_one_rung_for_each_option_that_differs(method: str, text: str) -> None:
    first, last = text.split(":")
    a, b = (resolve({}, method=method, preset=name) for name in (first, last))
    differing = {
        name: value for group, values in b.plain().items() for name, value in values.items() if a.plain()[group][name] != value
    }
    rungs = ladder(text, options_of(method))
    assert [rung.name for rung in rungs] == [first, *(name for name in OPTIONS if name in differing), last]
    assert rungs[0].values == {} == rungs[-1].values and (rungs[0].preset, rungs[-1].preset) == (first, last)
    for rung in rungs[1:-1]:
        assert rung.preset == first and rung.values == {rung.name: differing[rung.name]}


def test_the_numbers_of_rungs_are_those_one_counts_in_the_table() -> None:
    counts = {
        (text, method): len(ladder(text, options_of(method))) - 2
        for text in ("released:corrected", "paper:corrected")
        for method in METHODS
    }
    # of the two that hold a floor: its metric on STS-B
    # shared by all: split, padding, size and draws of random, bad_m_rule, empty layers | split, padding, start of retraining;
    # and what losses against a bias have, which `implied` takes out again where nothing is learned: predictions | and weights
    shared = {"released:corrected": 6 + 1, "paper:corrected": 3 + 2}
    own = {
        ("released:corrected", "m-prune"): 1,
        ("released:corrected", "one-shot"): 0,
        # accumulation, members of the norm, min-max, token count, rollback, two steps
        ("released:corrected", "s-prune"): 1 + 7,
        # last level, two ends of rounds, two spans, head, cuts, four of masked language modelling, decay, std, two lengths
        # of tasks | schedule, order of rows
        ("released:corrected", "imp"): 15,
        ("paper:corrected", "imp"): 2,
        # rule, refresh, end of a schedule, draws, rate
        ("released:corrected", "learned"): 5,
        ("paper:corrected", "learned"): 4,
        ("paper:corrected", "m-prune"): 1,
        ("paper:corrected", "one-shot"): 0,
        ("paper:corrected", "s-prune"): 2,
    }
    assert counts == {(text, method): shared[text] + n for (text, method), n in own.items()}


def test_losses_make_no_rungs_where_nothing_is_learned() -> None:
    from tombola.study.runs import implied

    for method in METHODS:
        taken = {"bias_predictions", "reweight_normalisation"} & implied("nli-overlap", method).keys()
        assert len(taken) == (0 if method == "learned" else 2), method


def applied(method: str, preset: str, values: dict[str, Any]) -> dict[str, Any]:
    settings: Settings = resolve(values, method=method, preset=preset)
    return {name: value for group in settings.plain().values() for name, value in group.items()}


@pytest.mark.parametrize("method", METHODS)
def test_all_rungs_together_climb_from_the_first_preset_to_the_last(method: str) -> None:
    for text in ("released:corrected", "paper:released"):
        first, last = text.split(":")
        rungs = ladder(text, options_of(method))
        together = {name: value for rung in rungs for name, value in rung.values.items()}
        assert applied(method, first, together) == applied(method, last, {})


def test_a_ladder_of_a_method_has_no_rungs_of_another() -> None:
    names = {rung.name for rung in ladder("paper:released", options_of("m-prune"))}
    assert "m_step_fraction" in names and not names & {"s_head_step", "importance_reduction", "importance_minmax"}
    everything = {rung.name for rung in ladder("paper:released")}
    assert names < everything and "s_head_step" in everything


@pytest.mark.parametrize("text", ["released:released", "paper:paper", "released", ""])
def test_a_ladder_must_go_somewhere(text: str) -> None:
    with pytest.raises(SettingsError, match="a ladder goes from one preset to another") as caught:
        ladder(text)
    assert caught.value.problems[0].got == text


@pytest.mark.parametrize("text", ["released:", ":corrected", "released:corrected:paper", "released-corrected:paper"])
def test_a_ladder_between_what_is_no_preset_is_refused(text: str) -> None:
    with pytest.raises(SettingsError, match="there is no preset"):
        ladder(text)


# ---------------------------------------------------------------------------------------------------- kinds of control


def test_what_a_kind_of_control_changes_are_settings_of_controls_with_known_values() -> None:
    known = {field.name for field in fields(ControlSettings)}
    for name, kind in CONTROL_KINDS.items():
        assert kind.changes.keys() <= known, name
        resolve(dict(kind.changes))  # each value is one that the setting takes
        assert kind.rule in ("random", "bad", "strict-bad", "good", "all", "inverted", "inverted-revived")
        differs = kind.has_own_mask, kind.lesion is not None
        assert differs == (True, True) if name == "random-init-random" else sum(differs) == 1, (
            "the mask differs or the weights do"
        )


@pytest.mark.parametrize("preset", NAMES)
def test_the_floor_of_stsb_is_held_by_the_metric_of_the_preset_and_of_other_tasks_by_their_own(
    tmp_path: Path, tiny_folder: Path, data_folder: Path, preset: str
) -> None:
    for words, name in ((12, "train"), (11, "dev")):
        texts = [["good"] * (i % words) + ["bad"] * (words - i % words) for i in range(60)]
        rows = [{"text": " ".join(text), "score": float(text.count("good"))} for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = files_task(
        train=tmp_path / "train.jsonl", validation=tmp_path / "dev.jsonl", text="text", label="score", regression=True
    )
    fast = {"epochs": 2, "learning_rate": 3e-3, "batch_size": 16, "max_length": 16, "floor": 0.5, "m_step_fraction": 0.5}
    (ticket,) = find(str(tiny_folder), task, method="m-prune", preset=preset, store=tmp_path / "store", **fast)
    held = {one["metric"] for one in ticket.metrics if one["split"] == "selection"}
    reported = {one["metric"] for one in ticket.metrics if one["split"] != "selection"}
    assert held == {"mean_pearson_spearman" if preset == "released" else "pearson"} and "pearson" in reported
    lab = open_lab(tmp_path / "store", data_folder)
    values = implied("sst2", "m-prune") | {"selection_rows": 20}
    (of_classes,) = plan_find(lab, str(tiny_folder), "sst2", resolve(values, method="m-prune", preset=preset), (0,))
    assert "stsb_stop_metric" not in of_classes.search.settings["search"], "cells of other tasks keep their names"
