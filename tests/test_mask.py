"""A mask is a value: an algebra that obeys its laws, exact counts, one bit per entry, and nothing that can change it."""

import copy
import pickle
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from fractions import Fraction
from math import comb, prod
from typing import Any

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tombola.errors import MaskError
from tombola.mask import Mask

SHAPES = {"heads": (3, 5), "mlps": (3,), "neurons": (3, 7), "encoder.bias": (9,), "encoder.weight": (2, 3, 4)}


def bits(*rows: str) -> torch.Tensor:
    """`bits("110", "001")` is a boolean tensor of two rows; one row gives one dimension."""
    table = torch.tensor([[char == "1" for char in row] for row in rows])
    return table if len(rows) > 1 else table[0]


def mask_of(parts: dict[str, torch.Tensor]) -> Mask:
    units: dict[str, Any] = {name: parts[name] for name in ("heads", "mlps", "neurons") if name in parts}
    return Mask(**units, values={name: part for name, part in parts.items() if name not in units})


def tensors(shape: tuple[int, ...]) -> st.SearchStrategy[torch.Tensor]:
    n = prod(shape)
    return st.lists(st.booleans(), min_size=n, max_size=n).map(lambda kept: torch.tensor(kept, dtype=torch.bool).reshape(shape))


def masks(names: tuple[str, ...] = tuple(SHAPES)) -> st.SearchStrategy[Mask]:
    """Masks with all of the parts `names`."""
    return st.fixed_dictionaries({name: tensors(SHAPES[name]) for name in names}).map(mask_of)


def some_masks() -> st.SearchStrategy[Mask]:
    """Masks with any selection of parts."""
    return st.fixed_dictionaries({}, optional={name: tensors(shape) for name, shape in SHAPES.items()}).map(mask_of)


def kept(mask: Mask, name: str, index: int) -> bool:
    """What a mask says of one entry: a part it does not have is kept."""
    part = mask.parts().get(name)
    return True if part is None else bool(part.reshape(-1)[index])


# ------------------------------------------------------------------------------------------------------------- algebra


@given(masks(), masks(), masks())
def test_masks_with_the_same_parts_obey_the_laws_of_a_boolean_algebra(a: Mask, b: Mask, c: Mask) -> None:
    assert ~(a & b) == ~a | ~b and ~(a | b) == ~a & ~b  # De Morgan
    assert a & a == a and a | a == a and ~~a == a
    assert a & b == b & a and a | b == b | a
    assert (a & b) & c == a & (b & c) and (a | b) | c == a | (b | c)
    assert a & (b | c) == (a & b) | (a & c)
    assert a | (a & b) == a and a & (a | b) == a
    assert (a & ~a).is_empty and (a | ~a).removes_nothing


@given(some_masks(), some_masks())
def test_and_and_or_hold_for_every_entry_of_every_model_whatever_parts_the_masks_have(a: Mask, b: Mask) -> None:
    """The oracle is the meaning: entry by entry, where a part that is absent keeps all."""
    both, either = a & b, a | b
    for name, shape in SHAPES.items():
        for i in range(prod(shape)):
            assert kept(both, name, i) == (kept(a, name, i) and kept(b, name, i))
            assert kept(either, name, i) == (kept(a, name, i) or kept(b, name, i))
    assert both.parts().keys() == a.parts().keys() | b.parts().keys()
    assert either.parts().keys() == a.parts().keys() & b.parts().keys()


def test_parts_are_listed_units_first_then_parameters_by_name() -> None:
    mask = Mask(values={"z": bits("1"), "a": bits("01")}, mlps=bits("10"), heads=bits("11", "01"))
    assert list(mask.parts()) == ["heads", "mlps", "a", "z"]


def test_combining_masks_of_different_architectures_names_every_part_that_differs() -> None:
    a = Mask(heads=bits("11", "00"), mlps=bits("10"), neurons=bits("1", "0").reshape(2, 1))
    b = Mask(heads=bits("110", "001"), mlps=bits("10"), neurons=bits("100", "001"))
    operations: tuple[Callable[[], object], ...] = (lambda: a & b, lambda: a | b, lambda: a.overlap(b))
    for operation in operations:
        with pytest.raises(MaskError, match="of different shape") as caught:
            operation()
        assert caught.value.got == "heads: (2, 2) and (2, 3); neurons: (2, 1) and (2, 3)"
        assert caught.value.next == "compare tickets of one base only"


# -------------------------------------------------------------------------------------------------- equality and counts


def test_counts_are_those_one_counts_by_hand() -> None:
    mask = Mask(heads=bits("1010", "0001"), mlps=bits("00"), values={"w": torch.ones(2, 3, dtype=torch.bool)})
    assert mask.counts() == {"heads": (3, 8), "mlps": (0, 2), "w": (6, 6)}


@given(some_masks())
def test_a_mask_and_its_inverse_count_to_everything(mask: Mask) -> None:
    for name, (n_kept, n) in mask.counts().items():
        assert n == prod(SHAPES[name])
        assert n_kept + (~mask).counts()[name][0] == n


def test_removing_nothing_and_keeping_nothing_are_told_apart_from_having_no_parts() -> None:
    assert Mask().removes_nothing and not Mask().is_empty
    assert Mask(mlps=bits("11")).removes_nothing and not Mask(mlps=bits("11")).is_empty
    assert Mask(mlps=bits("00")).is_empty and not Mask(mlps=bits("00")).removes_nothing
    half = Mask(mlps=bits("00"), heads=bits("00", "01"))
    assert not half.is_empty and not half.removes_nothing


@given(masks(("heads", "mlps")), masks(("heads", "mlps")))
def test_masks_are_equal_when_every_entry_is_and_equal_masks_hash_alike(a: Mask, b: Mask) -> None:
    same = all(kept(a, name, i) == kept(b, name, i) for name in ("heads", "mlps") for i in range(prod(SHAPES[name])))
    assert (a == b) == same
    twin = mask_of(a.parts())
    assert twin == a and hash(twin) == hash(a)
    assert len({a, twin, b}) == (1 if same else 2)


def test_a_full_mask_of_a_part_is_not_the_mask_without_that_part_and_no_mask_is_a_string() -> None:
    assert Mask(mlps=bits("11")) != Mask()
    assert Mask(mlps=bits("11")) != Mask(values={"mlp": bits("11")})
    assert Mask(heads=bits("10", "01")) != Mask(heads=bits("1001", "1001")[:1])  # the same entries in another shape
    assert Mask() != "mask"


# ------------------------------------------------------------------------------------------------------------- overlap


def test_overlap_is_the_one_worked_out_by_hand() -> None:
    """8 heads; a keeps 4, b keeps 3, both keep 2. By chance 4·3/8 = 1.5 are shared, and at least 2 with probability
    (C(4,2)·C(4,1) + C(4,3)·C(4,0)) / C(8,3) = 28/56."""
    a, b = Mask(heads=bits("1111", "0000")), Mask(heads=bits("1100", "1000"), mlps=bits("10"))
    overlap = a.overlap(b)
    assert list(overlap) == ["heads"]  # b's MLPs have no partner
    heads = overlap["heads"]
    assert (heads.n, heads.size_a, heads.size_b, heads.shared) == (8, 4, 3, 2)
    assert heads.jaccard == pytest.approx(2 / 5)
    assert heads.expected_shared == 1.5 and heads.ratio == pytest.approx(4 / 3)
    assert heads.p_at_least == pytest.approx(float(Fraction(comb(4, 2) * comb(4, 1) + comb(4, 3), comb(8, 3))))


def test_overlap_of_disjoint_masks_is_zero_and_undefined_ones_say_why() -> None:
    a = Mask(mlps=bits("1100"))
    assert a.overlap(~a)["mlps"].jaccard == 0.0
    empty = Mask(mlps=bits("0000"))
    assert empty.overlap(empty)["mlps"].jaccard is None
    assert Mask().overlap(a) == {}


# -------------------------------------------------------------------------------------------------------------- packed


@given(st.lists(st.lists(st.integers(0, 6), min_size=0, max_size=4), max_size=3), st.randoms(use_true_random=False))
def test_packing_and_unpacking_gives_the_mask_back_for_any_shapes(shapes: list[list[int]], random: Any) -> None:
    parts = {f"p{i}": torch.tensor([random.random() < 0.5 for _ in range(prod(s))], dtype=torch.bool).reshape(s)
             for i, s in enumerate(shapes)}  # fmt: skip
    mask = mask_of(parts)
    packed = mask.pack()
    assert {name: part.numel() for name, part in packed.items()} == {f"p{i}": (prod(s) + 7) // 8 for i, s in enumerate(shapes)}
    again = Mask.unpack(packed, {name: tuple(part.shape) for name, part in parts.items()})
    assert again == mask
    assert all(
        again.parts()[name].shape == part.shape and again.parts()[name].dtype == torch.bool for name, part in parts.items()
    )


def test_the_first_entry_is_the_lowest_bit_and_the_last_byte_is_filled_with_zeros() -> None:
    mask = Mask(heads=bits("10000", "00110"), mlps=bits("01"), values={"w": torch.ones(2, 2, 2, dtype=torch.bool)})
    # heads in rows: 1000000110 -> bits 0, 7 | 8 (as bit 0 of the second byte)
    assert {name: part.tolist() for name, part in mask.pack().items()} == {
        "heads": [0b10000001, 0b00000001],
        "mlps": [0b10],
        "w": [0b11111111],
    }


def test_entries_are_packed_in_order_of_rows_also_for_tensors_that_lie_otherwise_in_memory() -> None:
    rows = bits("110", "001")
    assert torch.equal(Mask(heads=rows.t()).pack()["heads"], Mask(heads=rows.t().contiguous()).pack()["heads"])


def test_bytes_that_do_not_belong_to_the_shapes_are_refused() -> None:
    packed = Mask(mlps=torch.ones(9, dtype=torch.bool)).pack()
    with pytest.raises(MaskError, match="wrong number of bytes") as caught:
        Mask.unpack(packed, {"mlps": (17,)})
    assert (caught.value.got, caught.value.expected) == ("2 × uint8", "3 bytes for shape (17,)")
    with pytest.raises(MaskError, match="wrong number of bytes"):
        Mask.unpack({"mlps": packed["mlps"].to(torch.int16)}, {"mlps": (9,)})
    with pytest.raises(MaskError, match="wrong number of bytes"):
        Mask.unpack({"mlps": packed["mlps"][:0]}, {"mlps": (2**32, 2**32)})  # no overflow to 0 on the way
    with pytest.raises(MaskError, match="name different parts") as caught:
        Mask.unpack(packed, {"heads": (3, 3)})
    assert (caught.value.got, caught.value.expected) == (["mlps"], ["heads"])


def test_a_mask_of_bert_base_heads_and_mlps_is_twenty_bytes() -> None:
    mask = Mask(heads=torch.ones(12, 12, dtype=torch.bool), mlps=torch.ones(12, dtype=torch.bool))
    assert sum(part.numel() for part in mask.pack().values()) == 144 // 8 + 2


# ------------------------------------------------------------------------------------------------------ frozen and checked


def test_a_mask_does_not_change_with_the_tensors_it_was_made_from() -> None:
    heads, weight = bits("11", "11"), torch.ones(3, dtype=torch.bool)
    values = {"w": weight}
    mask = Mask(heads=heads, values=values)
    heads[0, 0] = False
    weight[:] = False
    values["another"] = weight
    assert mask == Mask(heads=bits("11", "11"), values={"w": torch.ones(3, dtype=torch.bool)})


def test_a_mask_cannot_be_assigned_to() -> None:
    mask = Mask(mlps=bits("10"), values={"w": bits("1")})
    with pytest.raises(FrozenInstanceError):
        mask.mlps = bits("11")  # type: ignore[misc]
    with pytest.raises(TypeError, match="does not support item assignment"):
        mask.values["w"] = bits("0")  # type: ignore[index]


def test_a_mask_can_be_copied_and_sent_to_another_process() -> None:
    mask = Mask(heads=bits("10", "01"), values={"w": bits("101")})
    for twin in (copy.copy(mask), copy.deepcopy(mask), pickle.loads(pickle.dumps(mask))):
        assert twin == mask and twin.digest() == mask.digest()


@pytest.mark.parametrize(
    ("parts", "got"),
    [
        ({"heads": torch.ones(2, 2)}, "heads: torch.float32 of shape (2, 2)"),
        ({"heads": bits("101")}, "heads: torch.bool of shape (3,)"),
        ({"mlps": torch.ones(2, 2, dtype=torch.bool)}, "mlps: torch.bool of shape (2, 2)"),
        ({"neurons": bits("1")}, "neurons: torch.bool of shape (1,)"),
        ({"values": {"w": torch.zeros(3, dtype=torch.uint8)}}, "w: torch.uint8 of shape (3,)"),
        ({"mlps": bits("1")[0], "values": {"w": torch.ones(1)}}, "mlps: torch.bool of shape (); w: torch.float32 of shape (1,)"),
    ],
)
def test_parts_that_are_not_boolean_or_of_another_rank_are_all_named(
    parts: dict[str, Any], got: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users run it: nothing else checks annotations
    with pytest.raises(MaskError, match="not boolean tensors of the right rank") as caught:
        Mask(**parts)
    assert caught.value.got == got
    assert "True = kept" in str(caught.value) and "next:     compare scores with a threshold" in str(caught.value)


def test_a_parameter_may_not_have_the_name_of_a_part() -> None:
    with pytest.raises(MaskError, match="name of a part") as caught:
        Mask(values={"mlps": bits("10"), "w": bits("1")})
    assert caught.value.got == ["mlps"]


# ------------------------------------------------------------------------------------------ single values taken together

VALUES = ("encoder.bias", "encoder.weight")


def test_values_of_all_parameters_are_counted_together_as_one_type() -> None:
    mask = Mask(mlps=bits("10"), values={"z": bits("110", "001"), "a": bits("0111")})
    assert mask.counts_by_type() == {"mlps": (1, 2), "values": (6, 10)}
    assert list(Mask(heads=bits("10", "01"), values={"a": bits("1")}).counts_by_type()) == ["heads", "values"]
    assert Mask(mlps=bits("10")).counts_by_type() == {"mlps": (1, 2)} and Mask().counts_by_type() == {}


@given(some_masks())
def test_types_count_what_parts_count(mask: Mask) -> None:
    by_type, flat = mask.counts_by_type(), mask.counts()
    for place in (0, 1):
        assert sum(count[place] for count in by_type.values()) == sum(count[place] for count in flat.values())
    assert by_type.keys() == {name if name in ("heads", "mlps", "neurons") else "values" for name in flat}


def test_entries_of_a_type_lie_in_a_row_in_the_order_of_names_and_of_positions() -> None:
    mask = Mask(heads=bits("10", "01"), values={"z": bits("110", "001"), "a": bits("0111")})
    assert mask.flat("values").tolist() == [c == "1" for c in "0111" + "110" + "001"]
    assert mask.flat("heads").tolist() == [True, False, False, True]
    assert mask.flat("z").tolist() == [True, True, False, False, False, True]


def test_a_part_that_is_not_there_has_no_row() -> None:
    for part in ("heads", "values", "w"):
        with pytest.raises(MaskError, match=f"the mask has no {part}"):
            Mask(mlps=bits("10")).flat(part)


@given(some_masks())
def test_a_row_of_entries_counts_what_its_type_counts(mask: Mask) -> None:
    for part, (n_kept, n) in mask.counts_by_type().items():
        assert (int(mask.flat(part).sum()), mask.flat(part).numel()) == (n_kept, n)


@given(masks(VALUES), masks(VALUES))
def test_overlap_of_values_is_that_of_one_long_row(a: Mask, b: Mask) -> None:
    overlap = a.overlap_by_type(b)
    assert list(overlap) == ["values"]
    mine, theirs = a.flat("values"), b.flat("values")
    found = overlap["values"]
    assert (found.n, found.size_a, found.size_b) == (33, int(mine.sum()), int(theirs.sum()))
    assert found.shared == sum(x and y for x, y in zip(mine.tolist(), theirs.tolist(), strict=True))
    as_one = Mask(values={"all": mine}).overlap(Mask(values={"all": theirs}))["all"]
    assert found == as_one, "chance included: values of all parameters compete with each other"


def test_overlap_by_type_takes_only_what_both_have() -> None:
    a = Mask(heads=bits("10", "01"), values={"u": bits("1100"), "v": bits("11")})
    b = Mask(mlps=bits("10"), values={"u": bits("0110"), "w": bits("11")})
    assert list(a.overlap_by_type(b)) == ["values"]
    assert a.overlap_by_type(b)["values"] == a.overlap(b)["u"]
    assert Mask(heads=bits("10", "01")).overlap_by_type(b) == {}
    both = Mask(heads=bits("11", "00"), values={"u": bits("1111")})
    assert list(a.overlap_by_type(both)) == ["heads", "values"]
    with pytest.raises(MaskError, match="of different shape"):
        a.overlap_by_type(Mask(values={"u": bits("110")}))


@given(some_masks())
def test_the_structured_part_and_the_values_are_the_mask(mask: Mask) -> None:
    assert not mask.structured().values
    assert mask.structured().parts().keys() == mask.parts().keys() & {"heads", "mlps", "neurons"}
    assert mask.structured() & Mask(values=mask.values) == mask


def test_or_with_its_inverse_keeps_everything_in_the_same_shapes() -> None:
    """What the control that keeps all is made of."""
    mask = Mask(heads=bits("10", "01"), values={"w": bits("110", "001")})
    full = mask | ~mask
    assert full.removes_nothing and full.counts() == {"heads": (4, 4), "w": (6, 6)}
