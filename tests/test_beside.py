"""What is measured beside tickets and scores, run on a tiny model and held against another way of counting."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from test_prasanna2020 import cells_of
from tombola.attention.known import CLASSES
from tombola.attention.patterns import shipped
from tombola.errors import SettingsError
from tombola.study.cells import Cell, Lab, read_rows
from tombola.study.jobs import open_lab
from tombola.study.results import collect

SHORT = {"min_tokens": 8, "map_rows": 12}


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Lab:
    """One store for all: what experiments share is computed once."""
    return open_lab(tmp_path_factory.mktemp("beside") / "store", data_folder)


def by_step(cells: list[Cell], step: str) -> list[Cell]:
    return [cell for cell in cells if cell.step == step]


# ------------------------------------------------------------------------------------------------------------ attention


def maps_by_hand(folder: Path, texts: list[str]) -> list[torch.Tensor]:
    """[layer, head, query, key] of each text, as transformers gives them."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager").eval()
    with torch.no_grad():
        return [torch.cat(model(**tokenizer(text, return_tensors="pt"), output_attentions=True).attentions) for text in texts]


def test_attention_counts_and_describes_the_maps_that_transformers_gives(lab: Lab, tiny_folder: Path, data_folder: Path) -> None:
    import json

    cells = by_step(cells_of(lab, tiny_folder, "attention", seeds=(0, 1), **SHORT), "attention")
    assert len(cells) == 2 + 1, "the pre-trained model is read once for all seeds"
    lab.run(cells)
    tuned, base = ([one for one in cells if ("weights" in one.inputs) is is_tuned] for is_tuned in (True, False))
    rows = read_rows(lab.folder(base[0]) / "attention.jsonl")
    assert len(rows) == 2 * 4 * 2 and {row["seed"] for row in rows} == {None} and {row["n"] for row in rows} == {12}
    # By hand: the same rows, found by their ids; classes by the same net, entropy by its definition.
    names = {row["row"] for row in read_rows(lab.folder(base[0]) / "samples.jsonl")}
    said = [json.loads(line) for line in (data_folder / "sst2" / "validation.jsonl").read_text().splitlines()]
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    long_enough = [row for row in said if len(tokenizer(row["sentence"])["input_ids"]) >= 8]
    assert names <= {f"validation:{row['idx']}" for row in long_enough}
    import random

    chosen = random.Random(0).sample(range(len(long_enough)), 12)
    every = maps_by_hand(tiny_folder, [long_enough[i]["sentence"] for i in chosen])
    net = shipped("raw")
    for row in (one for one in rows if one["kind"] == "raw"):
        mine = [one[row["layer"], row["head"]] for one in every]
        classes = [CLASSES[c] for c in net.classify(mine)]
        assert row["counts"] == {name: classes.count(name) for name in CLASSES}
        assert row["shares"] == {name: classes.count(name) / 12 for name in CLASSES}
        entropies = [float(-(p * p.log()).nan_to_num(0).sum(-1).mean()) for p in mine]
        assert row["means"]["entropy"] == pytest.approx(sum(entropies) / 12, rel=1e-4)
        assert row["means"]["mass_cls"] == pytest.approx(sum(float(p[:, 0].mean()) for p in mine) / 12, rel=1e-4)
    assert rows != read_rows(lab.folder(tuned[0]) / "attention.jsonl")


def test_samples_of_maps_are_pixels_and_magnitudes_are_means_of_weights(lab: Lab, tiny_folder: Path) -> None:
    import transformers

    cells = cells_of(lab, tiny_folder, "attention", seeds=(0, 1), **SHORT)
    lab.run(cells)
    found = collect(lab.store)
    assert len(found.attention) == 3 * 16 and {row.weights for row in found.attention} == {"fine_tuned", "pretrained"}
    for sample in found.map_samples:
        assert len(sample.pixels) == sample.tokens == len(sample.pixels[0]) and max(map(max, sample.pixels)) == 255
        assert sample.label in CLASSES and 0.2 <= sample.probability <= 1
    base = transformers.AutoModel.from_pretrained(tiny_folder)
    own = [one for one in found.magnitudes if one.weights == "pretrained"]
    assert len(own) == 2 * 4 + 2
    for one in own:
        layer = base.encoder.layer[one.layer]
        if one.part == "mlps":
            parts = [layer.intermediate.dense.weight, layer.output.dense.weight]
        else:
            mine = slice(one.head * 8, one.head * 8 + 8)
            three = (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value)
            parts = [*(p.weight[mine] for p in three), layer.attention.output.dense.weight[:, mine]]
        assert one.mean_abs == pytest.approx(float(torch.cat([p.detach().flatten() for p in parts]).abs().mean()), rel=1e-5)


def test_too_few_rows_are_said_and_options_come_from_the_preset(lab: Lab, tiny_folder: Path) -> None:
    cells = by_step(cells_of(lab, tiny_folder, "attention", seeds=(0,), min_tokens=20), "attention")
    lab.run(cells)
    assert any("rows asked for have 20 tokens" in one for one in collect(lab.store, {one.key for one in cells}).warnings)

    def asked(**changed: Any) -> list[Cell]:
        from test_prasanna2020 import FAST
        from tombola.study.plan import Study, plan_study

        said: dict[str, Any] = {"name": "paper", "model": str(tiny_folder), "tasks": ["sst2"], "settings": FAST}
        return list(plan_study(lab, Study(**said | {"experiments": ["attention"]} | changed)).cells.values())

    (released,) = {str(sorted(one.settings["attention"].items())) for one in by_step(asked(preset="released"), "attention")}
    for value in ("untransposed", "no_segment_ids_with_pad", "train_padded_predict_unpadded", "select_on_test"):
        assert value in released
    assert len(by_step(asked(preset="released"), "patterns")) == 1 and not by_step(asked(), "patterns")
    rungs = by_step(asked(ladder="released:corrected"), "attention")
    options = {str(sorted(one.settings["attention"].items())) for one in rungs}
    assert len(options) == 2 + 4, "both ends, and one option of maps at a time"


@pytest.mark.parametrize("split", ["holdout", "select_on_test", "stratified_kfold"])
def test_a_classifier_is_worth_what_its_split_says(split: str) -> None:
    """Tiny labelled sets of generated maps: what is tested on was not trained on, but by select_on_test."""
    from tombola.attention.known import known_maps
    from tombola.attention.patterns import PatternSettings
    from tombola.study.steps.attention import SPLITS, _stratified

    maps, labels = known_maps(50, seed=3, size=12)
    classifier, worth = SPLITS[split](maps, labels, PatternSettings(generated_steps=1, real_epochs=2, generated_largest=12))
    assert int(worth.confusion.sum()) == (50 if split == "stratified_kfold" else 10)
    assert 0 <= worth.weighted_f1 <= 1 and len(classifier.classify(maps)) == 50
    seen, unseen = _stratified(labels, 0)
    assert not set(seen) & set(unseen) and sorted(seen + unseen) == list(range(50))
    assert sorted(labels[i] for i in unseen) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert math.isfinite(worth.weighted_f1)


def test_a_map_option_that_is_none_is_refused(lab: Lab, tiny_folder: Path) -> None:
    from pydantic import ValidationError

    with pytest.raises((SettingsError, ValidationError), match="norm_map_weight"):
        cells_of(lab, tiny_folder, "attention", norm_map_weight="transposed")
