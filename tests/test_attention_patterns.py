"""Descriptors by hand, maps of known class, the classifier and its folds, the labelled maps, and the published layout."""

import math
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tombola.attention.describe import describe, token_groups
from tombola.attention.known import CLASSES, known_map, known_maps
from tombola.attention.labelled import (
    KINDS,
    SAMPLE,
    Identity,
    agreement,
    labelled_maps,
    maps_of,
    order_of,
    read_pass,
    read_published,
    sample,
    sentences,
    write_pass,
)
from tombola.attention.patterns import (
    PatternClassifier,
    PatternNet,
    PatternSettings,
    card,
    k_fold,
    packed,
    prepared,
    scored,
    shares,
    shipped,
    train,
)
from tombola.attention.sheets import contact_sheet
from tombola.errors import DataError, SettingsError

# ----------------------------------------------------------------------------------------------------------- descriptors


def test_descriptors_by_hand() -> None:
    one = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.25, 0.25, 0.5]])
    said = describe(one[None], {"last": torch.tensor([False, False, True]), "none": torch.zeros(3, dtype=torch.bool)})
    assert said.entropy.item() == pytest.approx((math.log(2) + 0 + (2 * 0.25 * math.log(4) + 0.5 * math.log(2))) / 3)
    assert said.distance.item() == pytest.approx((0.5 + 0 + (0.25 * 2 + 0.25)) / 3)
    assert said.mass["last"].item() == pytest.approx(0.5 / 3) and said.mass["none"].item() == 0
    assert said.previous.item() == pytest.approx((0 + 0.25) / 2)
    assert said.self.item() == pytest.approx((0.5 + 1 + 0.5) / 3)
    assert said.next.item() == pytest.approx((0.5 + 0) / 2)


def test_descriptors_do_not_depend_on_the_unit_of_norms() -> None:
    maps = torch.rand(2, 4, 5, 5)
    a, b = (describe(scale * maps, {}) for scale in (1.0, 37.0))
    torch.testing.assert_close(a.entropy, b.entropy)
    torch.testing.assert_close(a.distance, b.distance)
    assert a.entropy.shape == (2, 4)


def test_the_map_of_a_removed_head_has_no_descriptors_and_spoils_no_other() -> None:
    maps = torch.stack([torch.zeros(4, 4), torch.eye(4)])
    said = describe(maps, {})
    assert math.isnan(said.entropy[0]) and math.isnan(said.distance[0])
    assert said.entropy[1] == 0 and said.self[1] == 1
    with pytest.raises(DataError, match="square"):
        describe(torch.ones(2, 3, 4), {})


def test_groups_of_tokens(demo_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_folder)
    ids = tokenizer("Wait, unbelievably so!", "Is it?")["input_ids"]
    words = tokenizer.convert_ids_to_tokens(ids)
    groups = token_groups(tokenizer, ids)
    assert [w for w, yes in zip(words, groups["punctuation"], strict=True) if yes] == [",", "!", "?"]
    assert groups["cls"].tolist() == [w == "[CLS]" for w in words] and groups["sep"].sum() == 2


# -------------------------------------------------------------------------------------------------------- maps of a class


@given(st.integers(0, 4), st.integers(8, 64), st.integers(0, 1000))
def test_generated_maps_are_maps(label: int, size: int, seed: int) -> None:
    one = known_map(label, size, np.random.default_rng(seed))
    assert one.shape == (size, size) and bool(one.isfinite().all()) and float(one.min()) >= 0
    assert float(one.sum(1).min()) > 0


def test_generated_maps_are_a_function_of_the_seed() -> None:
    maps, labels = known_maps(7, seed=3)
    again, _ = known_maps(5, seed=3)
    other, _ = known_maps(5, seed=4)
    assert labels == [0, 1, 2, 3, 4, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(maps, again, strict=False))
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in zip(maps, other, strict=False))
    with pytest.raises(DataError, match="so few tokens"):
        known_maps(1, seed=0, size=5)


def band_share(one: torch.Tensor) -> float:
    """Of the mass how much lies on its best diagonal and the two beside it, against an even map."""
    n = len(one)
    sums = [float(one.diagonal(k).sum()) for k in range(-4, 5)]
    best = max(range(1, 8), key=lambda k: sum(sums[k - 1 : k + 2]))
    return sum(sums[best - 1 : best + 2]) / float(one.sum()) / (3 / n)


def column_share(one: torch.Tensor) -> float:
    """Of an average row how much lies on the best column, by its median over rows, against an even map."""
    rows = one / one.sum(1, keepdim=True)
    return float(rows.median(0).values.max()) * len(one)


def test_generated_classes_have_what_defines_them() -> None:
    maps, labels = known_maps(500, seed=5, size=32)
    band, column = [band_share(x) for x in maps], [column_share(x) for x in maps]

    def of(values: list[float], label: str) -> float:
        return float(np.median([v for v, c in zip(values, labels, strict=True) if CLASSES[c] == label]))

    assert min(of(band, "diagonal"), of(band, "mix")) > 1.5 * max(of(band, "vertical"), of(band, "other"), of(band, "block"))
    assert min(of(column, "vertical"), of(column, "mix")) > 1.5 * max(of(column, "diagonal"), of(column, "other"))


# -------------------------------------------------------------------------------------------------------------- classifier

QUICK = PatternSettings(generated_steps=60, generated_largest=14, batch=20, real_epochs=3, learning_rate=3e-3)


@pytest.fixture(scope="module")
def quick() -> PatternClassifier:
    return train([], [], QUICK)


def test_the_net_has_the_published_layers() -> None:
    convolutions = [m for m in PatternNet().modules() if isinstance(m, torch.nn.Conv2d)]
    assert [(m.out_channels, m.kernel_size[0]) for m in convolutions] == [
        *((16, 3), (16, 3), (32, 3), (32, 3), (64, 3), (64, 3), (16, 1), (5, 1)),
    ]
    assert PatternNet()(torch.zeros(2, 1, 4, 9)).shape == (2, 5)


def test_a_minute_of_generated_maps_teaches_more_than_chance(quick: PatternClassifier) -> None:
    maps, labels = known_maps(100, seed=77, size=12)
    found = scored(labels, quick.classify(maps))
    assert found.weighted_f1 > 0.4  # chance: 0.2


def test_predictions_do_not_depend_on_company_order_or_unit(quick: PatternClassifier) -> None:
    maps, _ = known_maps(9, seed=8)
    together = quick.probabilities(maps)
    alone = torch.cat([quick.probabilities([3.7 * one]) for one in reversed(maps)]).flip(0)
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    torch.testing.assert_close(together.sum(1), torch.ones(9))


def test_training_is_a_function_of_its_seed_and_leaves_the_callers_random_state() -> None:
    settings = PatternSettings(generated_steps=2, generated_largest=9, batch=5, real_epochs=1)
    maps, labels = known_maps(6, seed=1, size=8)
    torch.manual_seed(4)
    before = torch.random.get_rng_state()
    a, b = (train(maps, labels, settings).net.state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    other = train(maps, labels, PatternSettings(generated_steps=2, generated_largest=9, batch=5, real_epochs=1, seed=1))
    assert not torch.equal(a["net.0.weight"], other.net.state_dict()["net.0.weight"])


def test_real_maps_are_learned_from() -> None:
    """Labels that contradict the generator are learned when real maps say so: here all of them are block."""
    maps, _ = known_maps(20, seed=2, size=10)
    settings = PatternSettings(generated_steps=0, generated_largest=9, batch=4, real_epochs=15, learning_rate=3e-3)
    assert train(maps, [3] * 20, settings).classify(maps).count(3) >= 12


@pytest.mark.parametrize(
    ("preprocess", "trained", "predicted"),
    [("same", None, None), ("same_padded", 12, 12), ("train_padded_predict_unpadded", 12, None)],
)
def test_preprocessing_by_name(preprocess: str, trained: int | None, predicted: int | None) -> None:
    settings = PatternSettings(generated_steps=1, generated_largest=9, batch=5, real_epochs=1, map_preprocess=preprocess)
    maps, labels = known_maps(5, seed=1, size=12)
    classifier = train(maps, labels, settings)
    assert (classifier.trained_padded_to, classifier.pad_to) == (trained, predicted)
    larger = known_maps(1, seed=1, size=20)[0]
    if predicted is None:
        assert len(classifier.classify(larger)) == 1
    else:
        with pytest.raises(DataError, match="larger than those"):
            classifier.classify(larger)


def test_padding_is_centred_and_the_largest_entry_is_one() -> None:
    ready = prepared(torch.full((4, 5), 0.25), 7)
    assert ready.shape == (1, 7, 7) and ready.sum() == 20
    assert ready[0, 1:5, 1:6].min() == 1


@pytest.mark.parametrize("wrong", [torch.zeros(6, 6), torch.ones(3, 9), -torch.eye(5), torch.full((5, 5), math.nan)])
def test_what_is_no_map_is_refused(wrong: torch.Tensor, quick: PatternClassifier) -> None:
    with pytest.raises(DataError, match="no attention map"):
        quick.classify([wrong])


def test_wrong_settings_are_refused_together() -> None:
    with pytest.raises(SettingsError, match="2 settings"):
        PatternSettings(map_preprocess="resized", batch=0)
    with pytest.raises(DataError, match="labels and maps"):
        train([torch.eye(8)], [5], QUICK)


def test_weighted_f1_and_confusion_against_sklearn() -> None:
    from sklearn.metrics import confusion_matrix, f1_score

    rng = np.random.default_rng(0)
    labels, predicted = rng.integers(0, 4, 60).tolist(), rng.integers(0, 5, 60).tolist()  # one class has no maps
    found = scored(labels, predicted)
    assert found.weighted_f1 == pytest.approx(f1_score(labels, predicted, average="weighted", zero_division=0.0))
    assert found.confusion.tolist() == confusion_matrix(labels, predicted, labels=range(5)).tolist()
    assert found.counts["other"] == 0 and sum(found.counts.values()) == 60


@pytest.mark.parametrize("grouped", [False, True])
def test_each_map_is_predicted_by_a_net_that_has_not_seen_it(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import tombola.attention.patterns as room

    maps, labels = known_maps(15, seed=6, size=8)
    at, groups, seen = {id(one): i for i, one in enumerate(maps)}, [i // 3 for i in range(15)], []

    def noted(some: Any, labels: Any, settings: Any, start: Any) -> Any:
        trained_on = {at[id(one)] for one in some}

        class Told:
            def classify(self, unseen: Any) -> list[int]:
                rows = {at[id(one)] for one in unseen}
                assert not rows & trained_on and rows | trained_on == set(range(15))
                if grouped:
                    assert not {groups[i] for i in rows} & {groups[i] for i in trained_on}
                seen.extend(rows)
                return [0] * len(unseen)

        return Told()

    monkeypatch.setattr(room, "train", noted)
    found = k_fold(maps, labels, folds=3, groups=groups if grouped else None)
    assert sorted(seen) == list(range(15)) and found.predicted == (0,) * 15
    with pytest.raises(DataError, match="too few maps"):
        k_fold(maps, labels, folds=16)


def test_shares_of_classes() -> None:
    assert shares([1, 1, 4, 0]) == {"diagonal": 0.25, "vertical": 0.5, "mix": 0.0, "block": 0.0, "other": 0.25}
    with pytest.raises(DataError, match="no maps"):
        shares([])


# ------------------------------------------------------------------------------------------------------------ what we ship


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_classifiers_know_the_generators_maps_and_what_their_card_says(kind: str) -> None:
    maps, labels = known_maps(200, seed=12345)
    said = card()
    assert said["classes"] == list(CLASSES)
    assert scored(labels, shipped(kind).classify(maps)).weighted_f1 == pytest.approx(said["nets"][kind]["generated_f1"], abs=0.02)
    counts = {name: list(read_pass(kind, 1).values()).count(i) for i, name in enumerate(CLASSES)}
    folds = said["nets"][kind]["folds"]
    confusion = torch.tensor(folds["confusion"])
    assert confusion.sum() == said["nets"][kind]["maps"] and all(
        int(n) <= counts[name] for n, name in zip(confusion.sum(1), CLASSES, strict=True)
    )
    again = scored(*zip(*((i, j) for i in range(5) for j in range(5) for _ in range(int(confusion[i, j]))), strict=True))
    assert again.weighted_f1 == pytest.approx(folds["weighted_f1"])


def test_packed_weights_come_back(quick: PatternClassifier) -> None:
    from safetensors.torch import load

    stored = load(packed({"raw": quick}))
    assert {name.partition(".")[0] for name in stored} == {"raw"}
    for name, value in quick.net.state_dict().items():
        torch.testing.assert_close(stored[f"raw.{name}"].float(), value, rtol=1e-3, atol=1e-6)
    with pytest.raises(DataError, match="no such classifier"):
        shipped("cross")


def test_the_sample_is_fixed_and_the_passes_cover_it() -> None:
    drawn = sample()
    assert len(set(drawn)) == SAMPLE and drawn[:2] == (Identity("p02", 3, 8), Identity("s01", 4, 7))
    assert len(sentences()) == 40 and {one.sentence for one in drawn} <= set(sentences().ids)
    for kind in KINDS:
        for labelling in (1, 2):
            assert set(read_pass(kind, labelling)) == set(drawn)
    orders = [tuple(order_of(kind, n)) for kind in KINDS for n in (1, 2)]
    assert len(set(orders)) == 4 and all(sorted(order) == list(range(SAMPLE)) for order in orders)


@pytest.mark.parametrize(("kind", "share", "kappa"), [("raw", 0.845, 0.68), ("weighted", 0.845, 0.78)])
def test_agreement_of_the_passes_is_what_the_guide_and_the_card_say(kind: str, share: float, kappa: float) -> None:
    """The numbers of docs/attention-patterns.md. They change only with a new pass: labels are not adjusted afterwards."""
    from sklearn.metrics import cohen_kappa_score

    first, second = read_pass(kind, 1), read_pass(kind, 2)
    a, b = [first[one] for one in sample()], [second[one] for one in sample()]
    found = agreement(a, b)
    assert found.n == 200 and found.share == pytest.approx(share)
    assert found.kappa == pytest.approx(cohen_kappa_score(a, b))
    assert found.kappa == pytest.approx(kappa, abs=0.005)
    assert int(found.confusion.sum()) == 200 and float(found.confusion.diagonal().sum()) / 200 == found.share
    said = card()["nets"][kind]
    assert said["agreement_of_the_passes"]["confusion"] == found.confusion.tolist()
    assert said["maps"] + said["where_the_passes_differ"]["maps"] == 200 and said["maps"] == int(found.confusion.diagonal().sum())


def test_kappa_by_hand_and_where_there_is_none() -> None:
    assert agreement([0, 0, 1, 1], [0, 1, 1, 1]).kappa == pytest.approx(0.5)  # .75 observed, .5 by chance
    assert agreement([2, 2], [2, 2]).kappa is None


def test_a_pass_is_written_in_the_order_of_its_sheets(tmp_path: Path) -> None:
    answers = [CLASSES[i % 5] for i in range(SAMPLE)]
    write_pass(tmp_path / "x.tsv", "raw", 7, answers)
    lines = (tmp_path / "x.tsv").read_text(encoding="utf-8").splitlines()
    first_shown = sample()[order_of("raw", 7)[0]]
    assert f"{first_shown.sentence}\t{first_shown.block}\t{first_shown.head}\t{answers[0]}" in lines
    with pytest.raises(DataError, match="no labels of a pass"):
        write_pass(tmp_path / "y.tsv", "raw", 7, ["banana"] * SAMPLE)
    assert not (tmp_path / "y.tsv").exists()


def test_maps_are_recomputed_from_the_demo_model(demo_folder: Path) -> None:
    few = sample()[:3]
    raw, weighted = maps_of(few, "raw"), maps_of(few, "weighted")
    for a, b in zip(raw, weighted, strict=True):
        torch.testing.assert_close(a.sum(1), torch.ones(len(a)))
        ratio = b / a  # a norm for each column
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_labelled_maps_are_those_both_passes_agree_on(kind: str) -> None:
    found = labelled_maps(kind)
    assert len(found.maps) == len(found.labels) == 169  # of either kind, by chance the same number


# -------------------------------------------------------------------------------------------------------------- pictures


def test_a_sheet_is_a_png_that_shows_the_maps() -> None:
    picture = contact_sheet([torch.eye(4), torch.tensor([[0.0, 1.0], [0.5, 0.0]])], columns=2, side=8)
    assert picture.startswith(b"\x89PNG\r\n\x1a\n") and picture.endswith(struct.pack(">I", zlib.crc32(b"IEND")))
    width, height = struct.unpack(">II", picture[16:24])
    start = picture.index(b"IDAT")
    (length,) = struct.unpack(">I", picture[start - 4 : start])
    lines = zlib.decompress(picture[start + 4 : start + 4 + length])
    pixels = np.frombuffer(lines, dtype=np.uint8).reshape(height, 1 + width * 3)[:, 1:].reshape(height, width, 3)
    first, second = (pixels[24:32, left : left + 8, 0] for left in (6, 20))
    assert first.tolist() == np.kron(255 * (1 - np.eye(4)), np.ones((2, 2))).tolist()
    assert second.tolist() == np.kron(np.array([[255, 0], [128, 255]]), np.ones((4, 4))).tolist()


# ------------------------------------------------------------------------------------------------------- published layout


@pytest.fixture
def published(tmp_path: Path) -> Path:
    for i, name in enumerate(["0001", "0002", "7_3_2", "0400", "unlabelled"]):
        np.save(tmp_path / f"{name}.npy", np.full((5 + i, 5 + i), 0.2))
    return tmp_path


def test_the_published_layout_is_read(published: Path) -> None:
    (published / "labels.txt").write_text("diagonal = 1\n\nsingle_vertical = 0002, 400\nheterogeneous=7_3_2\n")
    found = read_published(published, published / "labels.txt")
    assert found.names == ("0001", "0002", "0400", "7_3_2")
    assert [CLASSES[c] for c in found.labels] == ["diagonal", "vertical", "vertical", "other"]
    assert [len(one) for one in found.maps] == [5, 6, 8, 7] and found.maps[0].dtype == torch.float32


def test_a_table_of_names_and_labels_is_read_too(published: Path) -> None:
    (published / "labels.tsv").write_text("name\tlabel\n0001.npy\tmix\n7_3_2\tvertical+diagonal\n0400\tblock\n")
    found = read_published(published, published / "labels.tsv")
    assert [CLASSES[c] for c in found.labels] == ["mix", "mix", "block"]


def test_what_is_wrong_in_the_published_layout_is_said_at_once(published: Path) -> None:
    (published / "labels.txt").write_text("stripes = 1\nblock = 0002, 9\nmix = 0002\n")
    with pytest.raises(DataError) as refused:
        read_published(published, published / "labels.txt")
    assert all(word in str(refused.value) for word in ("labels unknown stripes", "no file for 9", "two labels for 0002"))
    for text in ("", "block 0001\n"):
        (published / "labels.txt").write_text(text)
        with pytest.raises(DataError):
            read_published(published, published / "labels.txt")


def test_pickled_and_misshapen_maps_are_refused(published: Path) -> None:
    np.save(published / "0001.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (published / "labels.txt").write_text("block = 1\n")
    with pytest.raises((DataError, ValueError), match=r"pickle|no map"):
        read_published(published, published / "labels.txt")
    np.save(published / "0001.npy", np.ones(4))
    with pytest.raises(DataError, match="no map"):
        read_published(published, published / "labels.txt")


def test_a_class_rarer_than_the_folds_is_no_reason_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    import tombola.attention.patterns as room

    maps, labels = known_maps(11, seed=6, size=8)  # three of the first class, two of each other

    class Right:
        def classify(self, unseen: Any) -> list[int]:
            return [labels[next(i for i, one in enumerate(maps) if one is each)] for each in unseen]

    monkeypatch.setattr(room, "train", lambda *_: Right())
    for groups in (None, list(range(11))):
        assert k_fold(maps, labels, folds=3, groups=groups).weighted_f1 == 1
