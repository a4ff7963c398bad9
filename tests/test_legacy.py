"""Legacy masks: read as data or refused; nothing rounded, nothing guessed, nothing run."""

import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file
from torch.nn.utils import prune

from tombola.anatomy import Anatomy, read_anatomy
from tombola.errors import MaskError
from tombola.legacy import import_mask

QUERY = "bert.encoder.layer.0.attention.self.query.weight"  # [24, 24]
INTO = "bert.encoder.layer.1.intermediate.dense.weight"  # [40, 24]
BIAS = "bert.encoder.layer.1.output.dense.bias"  # [24]


@pytest.fixture(scope="module")
def model() -> Any:
    from conftest import tiny_model

    return tiny_model("bert")


@pytest.fixture(scope="module")
def anatomy(model: Any) -> Anatomy:
    return read_anatomy(model)  # 2 layers of 4 heads


def bits(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random(shape) < 0.6


HEADS, MLPS = np.array([[1, 0, 1, 1], [0, 0, 1, 0]]), np.array([1, 0])
VALUES = {QUERY: bits(24, 24), INTO: bits(40, 24, seed=1), BIAS: bits(24, seed=2)}


def save_npy(file: Path, arrays: dict[str, np.ndarray]) -> None:
    (array,) = arrays.values()
    np.save(file, array)


def save_pt(file: Path, arrays: dict[str, np.ndarray]) -> None:
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, file)


SAVERS: dict[str, Callable[[Path, dict[str, np.ndarray]], None]] = {
    ".npy": save_npy,
    ".npz": lambda file, arrays: np.savez(file, **arrays),
    ".pt": save_pt,
    ".pth": save_pt,
    ".bin": save_pt,
    ".safetensors": lambda file, arrays: save_file(arrays, file),
}


# ----------------------------------------------------------------------------------------------------------- what is read


@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("dtype", ["float32", "float64", "int64", "uint8", "bool"])
def test_heads_and_mlps_are_read_from_every_kind_of_file(suffix: str, dtype: str, anatomy: Anatomy, tmp_path: Path) -> None:
    heads, mlps = tmp_path / f"heads{suffix}", tmp_path / f"mlps{suffix}"
    SAVERS[suffix](heads, {"any": HEADS.astype(dtype)})
    SAVERS[suffix](mlps, {"any": MLPS.astype(dtype)})
    mask = import_mask(anatomy, heads=heads, mlps=mlps)
    assert mask.heads is not None and mask.mlps is not None and not mask.values
    assert mask.heads.dtype == torch.bool and mask.heads.tolist() == HEADS.astype(bool).tolist()
    assert mask.mlps.tolist() == [True, False]
    anatomy.check(mask)
    inverted = import_mask(anatomy, heads=heads, ones="removed")
    assert inverted.mlps is None and inverted.heads is not None and torch.equal(inverted.heads, ~mask.heads)


@pytest.mark.parametrize("suffix", [suffix for suffix in SAVERS if suffix != ".npy"])
def test_values_are_read_by_the_names_of_parameters(suffix: str, anatomy: Anatomy, tmp_path: Path) -> None:
    SAVERS[suffix](tmp_path / f"values{suffix}", {name: array.astype("float32") for name, array in VALUES.items()})
    mask = import_mask(anatomy, values=tmp_path / f"values{suffix}")
    assert mask.values.keys() == VALUES.keys()
    assert all(mask.values[name].tolist() == array.tolist() for name, array in VALUES.items())
    anatomy.check(mask)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int8, torch.bool])
def test_torch_types_that_numpy_does_not_have_are_read(dtype: torch.dtype, anatomy: Anatomy, tmp_path: Path) -> None:
    torch.save(torch.from_numpy(HEADS).to(dtype), tmp_path / "heads.pt")
    mask = import_mask(anatomy, heads=tmp_path / "heads.pt")
    assert mask.heads is not None and mask.heads.tolist() == HEADS.astype(bool).tolist()


def test_layouts_of_memory_and_byte_orders_do_not_matter(anatomy: Anatomy, tmp_path: Path) -> None:
    np.save(tmp_path / "heads.npy", np.asfortranarray(HEADS).astype(">f4"))
    torch.save({INTO: torch.from_numpy(VALUES[INTO]).float().t().contiguous().t()}, tmp_path / "values.pt")
    mask = import_mask(anatomy, heads=tmp_path / "heads.npy", values=tmp_path / "values.pt")
    assert mask.heads is not None and mask.heads.tolist() == HEADS.astype(bool).tolist()
    assert mask.values[INTO].tolist() == VALUES[INTO].tolist()


def test_a_state_dict_of_torch_pruning_is_read_as_torch_made_it(anatomy: Anatomy, tmp_path: Path, make_tiny: Any) -> None:
    # the oracle is torch.nn.utils.prune itself: its state dict, and what its forward pass makes zero
    pruned = make_tiny("bert")
    modules = [pruned.get_submodule(name.removesuffix(".weight")) for name in (QUERY, INTO)]
    prune.global_unstructured([(module, "weight") for module in modules], prune.L1Unstructured, amount=0.7)
    prune.l1_unstructured(modules[0], "bias", amount=5)
    torch.save(pruned.state_dict(), tmp_path / "model.pt")
    mask = import_mask(anatomy, values=tmp_path / "model.pt", layout="torch-prune")
    assert set(mask.values) == {QUERY, QUERY.replace("weight", "bias"), INTO}
    for module, name in zip(modules, (QUERY, INTO), strict=True):
        assert torch.equal(mask.values[name], module.weight != 0)
    kept = sum(int(part.sum()) for name, part in mask.values.items() if name.endswith("weight"))
    assert kept == 24 * 24 + 40 * 24 - round(0.7 * (24 * 24 + 40 * 24))
    assert int(mask.values[QUERY.replace("weight", "bias")].sum()) == 24 - 5
    anatomy.check(mask)


def test_other_names_are_mapped_by_a_json_file(anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "old.pt", {"q": VALUES[QUERY], "step": np.array([7]), "module." + BIAS: VALUES[BIAS]})
    (tmp_path / "names.json").write_text(json.dumps({"q": QUERY, "step": None, "module." + BIAS: BIAS}))
    mask = import_mask(anatomy, values=tmp_path / "old.pt", layout=tmp_path / "names.json")
    assert {name: part.tolist() for name, part in mask.values.items()} == {n: VALUES[n].tolist() for n in (QUERY, BIAS)}


@given(
    st.lists(
        st.sampled_from([0.0, 1.0, -0.0, 0.5, -1.0, 2.0, 1 + 2**-40, 5e-324, float("nan"), float("inf")]), min_size=8, max_size=8
    )
)
def test_any_array_is_taken_exactly_or_refused(anatomy: Anatomy, tmp_path_factory: Any, numbers: list[float]) -> None:
    file = tmp_path_factory.mktemp("any") / "heads.npy"
    np.save(file, np.array(numbers).reshape(2, 4))
    strange = [x for x in numbers if x not in (0, 1)]
    if strange:
        with pytest.raises(MaskError, match="not a mask of 0 and 1") as error:
            import_mask(anatomy, heads=file)
        assert str(error.value.got).startswith(f"{len(strange)} of 8 numbers")
    else:
        mask = import_mask(anatomy, heads=file)
        assert mask.heads is not None and mask.heads.flatten().tolist() == [x == 1 for x in numbers]


# --------------------------------------------------------------------------------------------------------- what is refused


class Bomb:
    """What a hostile file holds: unpickling it makes a folder."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (str(self.mark),)


def write_bomb(kind: str, file: Path, mark: Path) -> None:
    bomb = np.array([Bomb(mark)], dtype=object)
    if kind == "npy of objects":
        np.save(file, bomb, allow_pickle=True)
    elif kind == "npz of objects":
        with file.open("wb") as stream:  # by name, numpy would add a suffix of its own
            np.savez(stream, fine=np.ones(2), heads=bomb)
    elif kind == "torch zip":
        torch.save({"a": torch.ones(2), "b": Bomb(mark)}, file)
    elif kind == "torch before zip":
        torch.save({"b": Bomb(mark)}, file, _use_new_zipfile_serialization=False)
    else:
        file.write_bytes(pickle.dumps({"b": Bomb(mark)}))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("npy of objects", ".npy"),
        ("npz of objects", ".npz"),
        ("npz of objects", ".npy"),
        ("torch zip", ".pt"),
        ("torch before zip", ".bin"),
        *(("pickle", suffix) for suffix in (".npy", ".npz", ".pt", ".safetensors")),
    ],
)
@pytest.mark.parametrize("part", ["heads", "mlps", "values"])
def test_a_file_that_would_run_code_is_refused_and_runs_none(
    kind: str, suffix: str, part: str, anatomy: Anatomy, tmp_path: Path
) -> None:
    file, mark = tmp_path / f"bomb{suffix}", tmp_path / "it-ran"
    write_bomb(kind, file, mark)
    with pytest.raises(MaskError, match=f"bomb{suffix} cannot be read as data"):
        import_mask(anatomy, **{part: file})
    assert not mark.exists()


def test_the_bombs_of_these_tests_do_go_off_when_they_are_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "bomb.npy", np.array([Bomb(tmp_path / "it-ran")], dtype=object), allow_pickle=True)
    np.load(tmp_path / "bomb.npy", allow_pickle=True)
    assert (tmp_path / "it-ran").exists()


@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.95])
def test_truncated_files_are_refused(suffix: str, share: float, anatomy: Anatomy, tmp_path: Path) -> None:
    file = tmp_path / f"values{suffix}"
    SAVERS[suffix](file, {QUERY: VALUES[QUERY].astype("float32")})
    whole = file.read_bytes()
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(MaskError, match="cannot be read as data"):
        import_mask(anatomy, values=file)


def test_a_damaged_byte_of_an_archive_is_noticed(anatomy: Anatomy, tmp_path: Path) -> None:
    file = tmp_path / "values.npz"
    np.savez_compressed(file, **{QUERY: VALUES[QUERY]})
    with zipfile.ZipFile(file) as archive:
        at = archive.infolist()[0].header_offset + 200
    damaged = bytearray(file.read_bytes())
    damaged[at] ^= 255
    file.write_bytes(bytes(damaged))
    with pytest.raises(MaskError, match="cannot be read as data"):
        import_mask(anatomy, values=file)


@pytest.mark.parametrize(
    ("array", "got"),
    [(HEADS.T, "(4, 2)"), (HEADS.ravel(), "(8,)"), (np.ones((12, 12)), "(12, 12)"), (np.ones((2, 4, 1)), "(2, 4, 1)")],
)
def test_heads_of_another_shape_are_refused(array: np.ndarray, got: str, anatomy: Anatomy, tmp_path: Path) -> None:
    np.save(tmp_path / "heads.npy", array)
    with pytest.raises(MaskError, match=r"heads of heads\.npy has the wrong shape") as error:
        import_mask(anatomy, heads=tmp_path / "heads.npy")
    assert str(error.value.got) == got and error.value.expected == (2, 4)


def test_a_transposed_matrix_is_named_as_one(anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "gpt.pt", {INTO: VALUES[INTO].T.copy()})
    with pytest.raises(MaskError, match=f"{INTO} of gpt.pt has the wrong shape") as error:
        import_mask(anatomy, values=tmp_path / "gpt.pt")
    assert (error.value.got, error.value.expected) == ((24, 40), (40, 24))
    assert "transpose" in str(error.value.next)


@pytest.mark.parametrize("array", [np.array([1 + 0j, 0]), np.array(["1", "0"]), np.array([1, 0], dtype="datetime64[s]")])
def test_what_is_no_number_is_refused(array: np.ndarray, anatomy: Anatomy, tmp_path: Path) -> None:
    np.save(tmp_path / "mlps.npy", array)
    with pytest.raises(MaskError, match="not an array of numbers"):
        import_mask(anatomy, mlps=tmp_path / "mlps.npy")


def test_sparse_and_nested_entries_are_refused(anatomy: Anatomy, tmp_path: Path) -> None:
    torch.save(torch.from_numpy(HEADS).float().to_sparse(), tmp_path / "heads.pt")
    torch.save({"state_dict": {QUERY: torch.ones(24, 24)}}, tmp_path / "nested.pt")
    (tmp_path / "names.json").write_text(json.dumps({"state_dict": QUERY}))
    with pytest.raises(MaskError) as error:
        import_mask(anatomy, heads=tmp_path / "heads.pt", values=tmp_path / "nested.pt", layout=tmp_path / "names.json")
    assert "2 problems" in str(error.value)
    assert "heads of heads.pt is not an array of numbers" in str(error.value)
    assert "a nested state dict must be saved alone" in str(error.value)


def test_prefixes_are_not_guessed_but_the_nearest_name_and_the_way_out_are_offered(anatomy: Anatomy, tmp_path: Path) -> None:
    wrapped = "a.wrapper.around.another.wrapper.around.what.was.once.a.whole.model.of.its.own." + QUERY
    for theirs in (QUERY.removeprefix("bert."), f"module.{QUERY}", wrapped, QUERY.replace("query", "qurey")):
        save_pt(tmp_path / "old.pt", {theirs: VALUES[QUERY]})
        with pytest.raises(MaskError, match="masks a parameter that this bert does not have") as error:
            import_mask(anatomy, values=tmp_path / "old.pt")
        assert error.value.got == theirs and QUERY in str(error.value.expected)
        # the way out that is offered works as it is printed
        (tmp_path / "names.json").write_text(str(error.value.next).partition("layout: ")[2])
        mask = import_mask(anatomy, values=tmp_path / "old.pt", layout=tmp_path / "names.json")
        assert mask.values[QUERY].tolist() == VALUES[QUERY].tolist()


def test_all_problems_of_all_files_are_told_at_once(anatomy: Anatomy, tmp_path: Path) -> None:
    np.save(tmp_path / "heads.npy", np.ones((3, 4)))
    np.save(tmp_path / "mlps.npy", np.array([0.5, 1.0]))
    save_pt(
        tmp_path / "values.pt",
        {"nowhere": np.ones(3), INTO: VALUES[INTO].T.copy(), BIAS: np.full(24, np.nan), QUERY: VALUES[QUERY]},
    )
    with pytest.raises(MaskError) as error:
        import_mask(
            anatomy, heads=tmp_path / "heads.npy", mlps=tmp_path / "mlps.npy", values=tmp_path / "values.pt", ones="dropped"
        )
    text = str(error.value)
    assert text.startswith("6 problems with the masks to import:")
    for part in (
        "'dropped'",
        "(3, 4)",
        "1 of 2 numbers are neither: 0.5",
        "nowhere",
        "(24, 40)",
        "24 of 24 numbers are neither: nan",
    ):
        assert part in text
    assert QUERY not in text.replace(f"{QUERY}.", "")


def test_many_problems_are_counted(anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "values.pt", {f"stranger.{i}": np.ones(3) for i in range(30)})
    with pytest.raises(MaskError) as error:
        import_mask(anatomy, values=tmp_path / "values.pt")
    assert str(error.value).startswith("30 problems") and str(error.value).endswith("and 22 more")


def test_a_mapping_and_a_file_that_do_not_belong_together_are_refused(anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "old.pt", {"q": VALUES[QUERY], "p": VALUES[QUERY], "extra": np.ones(1)})
    (tmp_path / "names.json").write_text(json.dumps({"q": QUERY, "p": QUERY, "gone": BIAS}))
    with pytest.raises(MaskError) as error:
        import_mask(anatomy, values=tmp_path / "old.pt", layout=tmp_path / "names.json")
    text = str(error.value)
    assert text.startswith("3 problems")
    assert "names arrays that old.pt does not hold\n  got:      gone" in text
    assert "holds arrays that names.json does not name\n  got:      extra" in text
    assert f"gives a parameter two masks\n  got:      {QUERY}" in text


@pytest.mark.parametrize(
    ("written", "told"), [("{", "is not JSON"), ("[1]", "is not a mapping of names"), ('{"a": 3}', "is not a mapping of names")]
)
def test_a_mapping_that_is_none_is_refused(written: str, told: str, anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "old.pt", {"q": VALUES[QUERY]})
    (tmp_path / "names.json").write_text(written)
    with pytest.raises(MaskError, match=f"names.json {told}"):
        import_mask(anatomy, values=tmp_path / "old.pt", layout=tmp_path / "names.json")


def test_files_that_hold_something_else_than_asked_for_are_refused(anatomy: Anatomy, tmp_path: Path) -> None:
    save_pt(tmp_path / "two.pt", {"a": HEADS, "b": HEADS})
    save_pt(tmp_path / "none.pt", {})
    np.save(tmp_path / "one.npy", VALUES[QUERY])
    refused: list[tuple[dict[str, Any], str]] = [
        ({}, "there is no mask to import"),
        ({"heads": tmp_path / "two.pt"}, "two.pt must hold one array"),
        ({"values": tmp_path / "one.npy"}, "one.npy holds no arrays by name"),
        ({"values": tmp_path / "none.pt"}, "none.pt holds no arrays by name"),
        ({"values": tmp_path / "two.pt", "layout": "torch-prune"}, "two.pt holds no masks of torch.nn.utils.prune"),
        ({"values": tmp_path / "two.pt", "layout": "nmaes"}, "unknown layout 'nmaes'"),
        ({"heads": tmp_path / "heads.txt"}, "heads.txt is of no kind that can be read"),
        ({"heads": tmp_path / "gone.npy"}, "gone.npy cannot be read as data"),
    ]
    for arguments, told in refused:
        with pytest.raises(MaskError, match=told):
            import_mask(anatomy, **arguments)
