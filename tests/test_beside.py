"""What is measured beside tickets and scores, run on a tiny model and held against another way of counting."""

import math
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from test_prasanna2020 import cells_of
from tombola.attention.known import CLASSES
from tombola.attention.patterns import shipped
from tombola.errors import DataError, SettingsError
from tombola.evaluate import score
from tombola.study.cells import Cell, Lab, read_json, read_rows
from tombola.study.data import TaskData
from tombola.study.jobs import open_lab
from tombola.study.results import collect
from tombola.study.steps.shared import ticket_of
from tombola.study.steps.words import _fitted, overlap_features, tokens
from tombola.tasks import Rows, get_task

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


def test_a_trained_classifier_is_used_and_its_worth_is_said(lab: Lab, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cell of a classifier, made small: 40 generated maps for labelled ones, two steps of training."""
    from tombola.attention.known import known_maps
    from tombola.attention.labelled import Labelled
    from tombola.study.steps import attention

    maps, labels = known_maps(40, seed=1, size=12)
    labelled = Labelled(tuple(map(str, range(40))), tuple(maps), tuple(labels))
    monkeypatch.setattr(attention, "labelled_maps", lambda kind: labelled)
    options = {"pattern_split": "holdout", "map_preprocess": "train_padded_predict_unpadded"}
    cells = cells_of(lab, tiny_folder, "attention", seeds=(0,), weights=["pretrained"], **options, **SHORT)
    (one,) = by_step(cells, "attention")
    asked = one.inputs["patterns"]
    assert isinstance(asked, Cell) and options.items() <= asked.settings["patterns"].items()
    fewer = {"generated_steps": 2, "real_epochs": 1, "generated_largest": 16}
    small = Cell("patterns", asked.version, {**asked.settings, "patterns": {**asked.settings["patterns"], **fewer}})
    cell = Cell(one.step, one.version, one.settings, {"patterns": small})
    lab.run([cell])
    said = read_json(lab.folder(small) / "patterns.json")
    for row in read_rows(lab.folder(cell) / "attention.jsonl"):
        assert row["f1"] == said[row["kind"]]["weighted_f1"] and row["pattern_split"] == "holdout" and row["n"] == 12
    assert (said["raw"]["maps"], said["raw"]["trained_padded_to"], said["raw"]["pad_to"]) == (10, 16, None)
    collect(lab.store)  # a cell of no task has no place in it, and is no obstacle


def test_a_map_option_that_is_none_is_refused(lab: Lab, tiny_folder: Path) -> None:
    from pydantic import ValidationError

    with pytest.raises((SettingsError, ValidationError), match="norm_map_weight"):
        cells_of(lab, tiny_folder, "attention", norm_map_weight="transposed")


# ------------------------------------------------------------------------------------------------------------ baselines


def test_baselines_are_full_models_destroyed_a_random_mask_on_drawn_weights_and_words(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "baselines", seeds=(0, 1))
    assert len(by_step(cells, "bag_of_words")) == 1, "nothing in it is drawn: one for all seeds"
    kinds = ["bad", "random-init-random", "dense-random-init", "dense-shuffle-values", "dense-shuffle-layers"]
    assert [one.settings["kind"] for one in by_step(cells, "control")] == [*kinds, *kinds]
    ran = [*by_step(cells, "bag_of_words"), *by_step(cells, "control")[:5]]
    lab.run(ran)
    tickets = {ticket_of(lab, one).kind: ticket_of(lab, one) for one in by_step(cells, "control")[:5]}
    bad, random_init = tickets["bad"], tickets["random-init-random"]
    assert bad.mask.counts_by_type() == random_init.mask.counts_by_type()
    assert random_init.details["lesion"]["name"] == "random-init"
    for kind in kinds[2:]:
        assert tickets[kind].mask.removes_nothing and tickets[kind].details["lesion"]
    rows = [row for row in collect(lab.store).scores if row.kind == "bag-of-words" and row.role == "report"]
    assert {(row.stage, row.metric, row.n) for row in rows} == {("full", "accuracy", 80)}
    assert all(row.value > 0.9 > row.majority for row in rows), "the answer is one word of each row"


def test_tokens_and_overlap_by_hand() -> None:
    pair = ("A cat sat.", "The cat, a cat")
    found = tokens(pair)
    assert [one for one in found if one.startswith("both")] == ["both a", "both cat"]
    assert found[:7] == ["0 a", "0 cat", "0 sat", "0 .", "0 a cat", "0 cat sat", "0 sat ."] and "1 cat ," in found
    assert overlap_features(pair) == pytest.approx([2 / 4, 2 / 3, 2 / 3, math.log(4 / 5)])
    assert overlap_features(("one text",)) == [] and tokens(("one text",)) == ["0 one", "0 text", "0 one text"]


def test_a_bag_of_words_is_the_pipeline_of_sklearn_and_learns_pairs_and_values() -> None:
    """Pairs whose answer is whether they share a word no single side tells; and a value that is a number of shared words."""
    import random

    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    rng = random.Random(0)
    words = [f"w{i}" for i in range(12)]

    def rows(n: int, split: str, *, value: bool) -> Rows:
        pairs = [(" ".join(rng.sample(words, 4)), " ".join(rng.sample(words, 4))) for _ in range(n)]
        shared = [len(set(a.split()) & set(b.split())) for a, b in pairs]
        labels = tuple(float(k) if value else int(k > 1) for k in shared)
        return Rows(tuple(f"{split}:{i}" for i in range(n)), tuple(pairs), labels)

    for value, spec in ((False, "rte"), (True, "stsb")):
        train, selection, report = (rows(n, split, value=value) for n, split in ((400, "a"), (100, "b"), (200, "c")))
        data = TaskData(get_task(spec), train, selection, report, None, 0)
        predictions = _fitted(data, 1.0)(report)
        assert score(predictions, "pearson" if value else "accuracy").value > 0.9
    single = TaskData(get_task("sst2"), *(rows(n, s, value=False) for n, s in ((60, "a"), (30, "b"), (30, "c"))), None, 0)
    one_text = [Rows(x.ids, tuple((a,) for a, _ in x.texts), x.labels) for x in (single.train, single.selection, single.report)]
    single = TaskData(single.task, *one_text, None, 0)
    counted = TfidfVectorizer(ngram_range=(1, 2), min_df=2, sublinear_tf=True, token_pattern=r"\w+")
    plain = make_pipeline(counted, LogisticRegression(C=10.0, max_iter=1000))
    plain.fit([a for (a,) in single.train.texts], single.train.labels)
    expected = plain.predict_log_proba([a for (a,) in single.report.texts])
    assert _fitted(single, 10.0)(single.report).logits.numpy() == pytest.approx(expected, abs=1e-4)


def test_running_text_has_no_bag_of_words() -> None:
    task = get_task("wikitext2")
    rows = Rows(("a:0",), (("text",),), (None,))
    with pytest.raises(DataError, match="no bag of words"):
        _fitted(TaskData(task, rows, rows, rows, None, 0), 1.0)


# -------------------------------------------------------------------------------------------------------------- crossed


def test_the_crossed_design_is_every_combination_and_shares_the_first_run(lab: Lab, tiny_folder: Path) -> None:
    cells = cells_of(lab, tiny_folder, "crossed", seeds=(0, 1), of=["s-prune"])
    dense = {one.key: one.settings for one in by_step(cells, "fine_tune")}
    combinations = {tuple(said["seeds"][name] for name in ("head", "data", "dropout")) for said in dense.values()}
    assert len(dense) == 8 and combinations == set(product((0, 1), repeat=3))
    assert {(said["seeds"]["run"], said["seeds"]["mask"]) for said in dense.values()} == {(0, 0)}
    (shared,) = (key for key, said in dense.items() if "design" not in said)
    ordinary = by_step(cells_of(lab, tiny_folder, "s-prune", seeds=(0, 1)), "fine_tune")
    assert shared == ordinary[0].key
    lab.run([*cells, *ordinary, *cells_of(lab, tiny_folder, "s-prune", seeds=(0, 1))])
    keys = {below.key for one in [*cells, *cells_of(lab, tiny_folder, "s-prune", seeds=(0, 1))] for below in one.needed()}
    found = collect(lab.store, keys)
    assert sorted((row.head_seed, row.data_seed, row.dropout_seed) for row in found.crossed) == sorted(combinations)
    assert [(row.kind, row.seed) for row in found.tickets] == [("good", 0), ("good", 1)], "runs of the design are no seeds"
    assert {row.seed for row in found.scores if row.kind == "full"} == {0, 1} and {row.task for row in found.crossed} == {"sst2"}
    assert len([row for row in found.scores if row.kind == "full" and row.role == "report"]) == 2


def test_the_crossed_design_needs_seeds_for_its_levels(lab: Lab, tiny_folder: Path) -> None:
    assert cells_of(lab, tiny_folder, "crossed", seeds=(0, 1), tasks=["rte"]) == [], "asked for on another task alone"
    with pytest.raises(SettingsError, match="levels from the seeds"):
        cells_of(lab, tiny_folder, "crossed", seeds=(0, 1), levels=3)
