"""Nested masks: levels against masks kept one by one, bytes against what the page says, bits a value against the promise."""

import json
import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tombola.errors import MaskError, TicketError
from tombola.levels import Levels, pack_within, unpack_within
from tombola.mask import Mask
from tombola.ticket import Ticket, Weights

SHAPES = {"a.weight": (7, 5), "b.bias": (11,), "c": (3,)}


def chain(seed: int, n: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> list[Mask]:
    """n masks, each within the one before, by drawing when each value goes."""
    rng = np.random.default_rng(seed)
    when = {name: rng.integers(1, n + 3, size=shape) for name, shape in shapes.items()}
    return [Mask(values={name: torch.from_numpy(w > level) for name, w in when.items()}) for level in range(1, n + 1)]


@given(st.integers(0, 10**6), st.integers(1, 20))
@settings(max_examples=40)
def test_levels_give_back_every_mask_and_survive_packing(seed: int, n: int) -> None:
    masks = chain(seed, n)
    levels = Levels.of(masks)
    again = Levels.unpack(levels.pack(), SHAPES, n)
    for k, mask in enumerate(masks, start=1):
        assert levels.mask(k) == mask == again.mask(k)
    assert levels.mask(0).removes_nothing
    total = sum(math.prod(shape) for shape in SHAPES.values())
    kept = [sum(k for k, _ in mask.counts().values()) for mask in masks]
    assert levels.sparsities == pytest.approx([1 - k / total for k in kept], abs=1e-12)


def test_a_value_is_written_as_the_page_says() -> None:
    """By hand: of ten values the levels 0 1 2 3 0 0 0 0 1 2. Plane 0: 0 1 0 1 0 0 0 0 | 1 0, plane 1: 0 0 1 1 0 0 0 0 | 0 1."""
    at = torch.tensor([0, 1, 2, 3, 0, 0, 0, 0, 1, 2], dtype=torch.uint8)
    packed = Levels({"x": at}, 3).pack()["x"]
    assert packed.tolist() == [[0b00001010, 0b01], [0b00001100, 0b10]]


@pytest.mark.parametrize(("n", "planes"), [(1, 1), (3, 2), (7, 3), (9, 4), (15, 4), (22, 5)])
def test_nine_levels_take_four_bits_a_value(n: int, planes: int) -> None:
    size = 40_000
    packed = Levels.of(chain(0, n, {"x": (size,)})).pack()["x"]
    assert packed.numel() * 8 == planes * size


@pytest.mark.parametrize("back_at", [2, 3])
def test_masks_that_give_a_value_back_are_refused(back_at: int) -> None:
    """Removed at 1, there again at `back_at`, removed at 4: also where a later level would hide it."""
    kept = [[False] * 3, [False] * 3, [False] * 3, [False] * 3]
    kept[back_at - 1][1] = True
    with pytest.raises(MaskError, match="not nested") as caught:
        Levels.of([Mask(values={"x": torch.tensor(one)}) for one in kept])
    assert f"level {back_at} keeps 1 values of x that level {back_at - 1} removed" in str(caught.value)
    with pytest.raises(MaskError, match="not nested"):
        pack_within(Mask(values={"x": torch.tensor([True, False])}), Mask(values={"x": torch.tensor([True, True])}))


def test_what_is_no_chain_is_refused() -> None:
    one = Mask(values={"x": torch.ones(3, dtype=torch.bool)})
    for masks in (
        [],
        [one, Mask(values={"y": torch.ones(3, dtype=torch.bool)})],
        [Mask(mlps=torch.ones(2, dtype=torch.bool))] * 2,
    ):
        with pytest.raises(MaskError):
            Levels.of(masks)
    with pytest.raises(MaskError, match="no levels"):
        Levels({"x": torch.tensor([0, 3], dtype=torch.uint8)}, 2)
    levels = Levels.of([one, one])
    with pytest.raises(MaskError, match="no such level"):
        levels.mask(3)
    with pytest.raises(MaskError, match="wrong number of bytes"):
        Levels.unpack(levels.pack(), {"x": (9,)}, 2)


@given(st.integers(0, 10**6), st.floats(0, 1), st.floats(0, 1), st.integers(0, 70))
@settings(max_examples=60)
def test_a_mask_within_another_is_read_back(seed: int, keep: float, lose: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    outer = torch.from_numpy(rng.random(size) < keep)
    inner = outer & torch.from_numpy(rng.random(size) >= lose)
    parent, child = Mask(values={"x": outer}), Mask(values={"x": inner})
    assert unpack_within(parent, pack_within(parent, child)) == child


def test_bytes_of_another_parent_are_refused() -> None:
    masks = chain(3, 3, {"x": (400,)})
    packed = pack_within(masks[0], masks[1])
    with pytest.raises(MaskError, match="do not fit"):
        unpack_within(Mask(values={"x": torch.ones(700, dtype=torch.bool)}), packed)
    with pytest.raises(MaskError, match="other parameters"):
        unpack_within(Mask(values={"y": torch.ones(400, dtype=torch.bool)}), packed)


def test_nine_levels_one_within_the_other_take_less_than_five_bits_a_value() -> None:
    size = 300_000
    order = np.random.default_rng(0).permutation(size)
    masks = []
    for level in range(1, 10):
        kept = np.ones(size, dtype=bool)
        kept[order[: size * level // 10]] = False
        masks.append(Mask(values={"x": torch.from_numpy(kept)}))
    whole = Mask(values={"x": torch.ones(size, dtype=torch.bool)})
    bits = sum(8 * pack_within(a, b)["x"].numel() for a, b in zip([whole, *masks], masks, strict=False)) / size
    assert bits < 4.0
    entropy = math.log2(10)  # of a value's level, each of ten as likely: nothing can be shorter
    assert bits > entropy


# ------------------------------------------------------------------------------------------------------------- in tickets


def ticket(mask: Mask, **changes: Any) -> Ticket:
    base = Weights("tiny", "0" * 32)
    said: dict[str, Any] = {"anatomy": {"layers": 1}, "kind": "good", "scope": "body", "sparsity": 0.5}
    return Ticket(mask=mask, base=base, found_on=base, **{**said, **changes})


def test_a_nested_ticket_is_read_back_and_gives_every_level(tmp_path: Path) -> None:
    masks = chain(1, 9)
    levels = Levels.of(masks)
    saved = ticket(masks[6], levels=levels, level=7)
    folder = saved.save_pretrained(tmp_path / "t")
    again = Ticket.from_pretrained(folder)
    assert again.identity == saved.identity != ticket(masks[6]).identity
    assert again.mask == masks[6] and again.level == 7
    for k, mask in enumerate(masks, start=1):
        one = again.at_level(k)
        assert one.mask == mask and one.sparsity == pytest.approx(levels.sparsities[k - 1])
        assert Ticket.from_pretrained(one.save_pretrained(tmp_path / str(k))).identity == one.identity
    assert again.at_level(0).mask.removes_nothing


def test_a_nested_ticket_can_be_read_by_the_page_alone(tmp_path: Path) -> None:
    """With json and struct: format version 2, planes of bits, level 0 for what is never removed."""
    masks = chain(2, 5)
    folder = ticket(masks[2], levels=Levels.of(masks), level=3).save_pretrained(tmp_path)
    body = json.loads((folder / "ticket.json").read_text())
    assert body["format_version"] == 2 and (body["mask"]["levels"], body["mask"]["level"]) == (5, 3)
    content = (folder / "mask.safetensors").read_bytes()
    (n_header,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + n_header]), content[8 + n_header :]
    for name, shape in SHAPES.items():
        begin, end = header[name]["data_offsets"]
        n, planes = math.prod(shape), header[name]["shape"][0]
        width = (end - begin) // planes
        level = [sum((data[begin + p * width + i // 8] >> (i % 8) & 1) << p for p in range(planes)) for i in range(n)]
        kept = [one == 0 or one > 3 for one in level]
        assert kept == masks[2].values[name].flatten().tolist()
        assert sum(kept) == body["mask"]["kept"][name]


def test_plain_tickets_are_still_of_the_first_version(tmp_path: Path) -> None:
    folder = ticket(chain(0, 1)[0]).save_pretrained(tmp_path)
    assert json.loads((folder / "ticket.json").read_text())["format_version"] == 1


def test_a_ticket_whose_mask_is_not_its_level_is_refused() -> None:
    masks = chain(4, 3)
    with pytest.raises(TicketError, match="not that of its level"):
        ticket(masks[0], levels=Levels.of(masks), level=2)
    with pytest.raises(TicketError, match="or neither"):
        ticket(masks[0], level=2)
    with pytest.raises(TicketError, match="carries no chain"):
        ticket(masks[0]).at_level(1)


def test_a_chain_of_tickets_each_within_the_one_before(tmp_path: Path) -> None:
    masks, before = chain(5, 4), None
    for k, mask in enumerate(masks):
        one = ticket(mask, details={"level": k + 1})
        one.save_pretrained(tmp_path / f"{k}" / "ticket", within=before)
        before = (one, f"../../{k}/ticket")
        read = Ticket.from_pretrained(tmp_path / f"{k}" / "ticket")
        assert read.mask == mask and read.identity == one.identity
    alone = Ticket.from_pretrained(tmp_path / "3" / "ticket").save_pretrained(tmp_path / "alone")
    assert json.loads((alone / "ticket.json").read_text())["format_version"] == 1

    other = replace(ticket(masks[0]), kind="random")
    other.save_pretrained(tmp_path / "0" / "ticket")  # another ticket of the same mask: the mask is what counts
    assert Ticket.from_pretrained(tmp_path / "3" / "ticket").mask == masks[3]
    ticket(Mask(values={n: torch.ones_like(p) for n, p in masks[0].values.items()})).save_pretrained(tmp_path / "0" / "ticket")
    with pytest.raises(TicketError, match="not the one"):
        Ticket.from_pretrained(tmp_path / "3" / "ticket")
    for file in (tmp_path / "0" / "ticket").iterdir():
        file.unlink()
    with pytest.raises(TicketError, match="written within another that is not here"):
        Ticket.from_pretrained(tmp_path / "1" / "ticket")


def test_tickets_of_other_scopes_are_not_joined() -> None:
    from tombola.study.derived import RULES, Sources

    masks = chain(6, 2)
    one, other = ticket(masks[0], scope="chen2020"), ticket(masks[1], scope="body")
    for rule in ("union", "intersection"):
        with pytest.raises(TicketError, match="different scopes"):
            RULES[rule].make(Sources(one, [other], {}, lambda: pytest.fail("no weights are needed")))
        made = RULES[rule].make(
            Sources(one, [replace(other, scope="chen2020")], {}, lambda: pytest.fail("no weights are needed"))
        )
        assert made.mask == masks[0 if rule == "union" else 1], "of nested masks any is the larger, all the smaller"


def test_levels_that_are_read_in_turn_are_unpacked_twice_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tombola import ticket as tickets

    masks = chain(3, 6)
    before = None
    for k, mask in enumerate(masks):
        one = ticket(mask)
        one.save_pretrained(tmp_path / str(k), within=before)
        before = (one, f"../{k}")
    unpacked, original = list[int](), tickets.unpack_within
    monkeypatch.setattr(tickets, "unpack_within", lambda *given: unpacked.append(1) or original(*given))

    def read() -> int:
        unpacked.clear()
        assert [Ticket.from_pretrained(tmp_path / str(k)).mask for k in range(len(masks))] == masks
        return len(unpacked)

    assert read() == 1 + 2 + 3 + 4 + 5
    with tickets.reading_chains():
        assert read() <= 2 * 5
    assert read() == 15, "and nothing is kept afterwards"
