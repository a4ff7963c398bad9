"""A ticket comes back as it was saved or not at all; its identity, and that of weights, means what the format's page says.

The page itself, docs/ticket-format.md, is tested by a reader written from it: `read_by_the_page` uses nothing of tombola,
torch or safetensors, down to its own canonical JSON.
"""

import hashlib
import json
import math
import pickle
import random
import re
import shutil
import struct
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from tombola.errors import FingerprintError, TicketError, TombolaError
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.source import fingerprint_folder, resolve_model
from tombola.ticket import Ticket, Weights, locate_weights

PAGE = Path(__file__).parents[1] / "docs" / "ticket-format.md"


def example() -> Ticket:
    """The ticket of docs/ticket-format.md: every field is filled, and strings and numbers are of the awkward sort."""
    return Ticket(
        mask=Mask(heads=torch.tensor([[1, 0, 0, 0, 0], [0, 0, 1, 1, 0]]).bool(), mlps=torch.tensor([True, False])),
        base=Weights("some-org/tiny-bert", "00112233445566778899aabbccddeeff", revision="c0ffee" * 6 + "cafe"),
        found_on=Weights("tiny-bert fine-tuned on “cola”", "ffeeddccbbaa99887766554433221100", path="../weights"),
        anatomy={
            "model_type": "bert",
            "layers": 2,
            "heads": 5,
            "kv_heads": 5,
            "d_head": 4,
            "d_model": 20,
            "d_ffn": 40,
            "values_per_head": [332, 332],
            "values_per_mlp": [1660, 1660],
            "total_parameters": 8182,
        },
        kind="good",
        scope="heads+mlps",
        sparsity=1 - (3 * 332 + 1660) / (10 * 332 + 2 * 1660),
        task="cola",
        labels=("unacceptable", "acceptable"),
        settings={"floor": 0.9, "learning_rate": 2e-05, "steps": 10**16, "note": 'a "quoted" \\ line\nand a 🎟', "none": None},
        seeds={"run": 0, "head": 0, "data": 0, "dropout": 0, "mask": 0},
        metrics=({"split": "selection", "metric": "mcc", "value": 0.5, "n": 1000},),
        details={"path": [[0, 1.0], [1, 0.75]], "held": True},
        parents=("0123456789abcdef0123456789abcdef",),
        cell=None,
        versions={"tombola": "0.1.0"},
    )


def small(**changed: Any) -> Ticket:
    """The example without places, or with other changes: equal again after a round trip through any folder."""
    ticket = example()
    return replace(ticket, **{"found_on": replace(ticket.found_on, path=None)} | changed)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder that holds the example."""
    return small().save_pretrained(tmp_path / "ticket")


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None], *, digest: bool) -> None:
    """Edits ticket.json; with `digest`, as somebody would who knows how to write one."""
    file = folder / "ticket.json"
    body = json.loads(file.read_text())
    change(body)
    if digest:
        body["digest"] = hashlib.sha256(canonical(json.loads(json.dumps(body), **AS_WRITTEN)).encode()).hexdigest()[:32]
    file.write_text(json.dumps(body))


# ------------------------------------------------------------------------------------- a reader written from the page


class Token(str):
    """A number as it stands in the file."""


AS_WRITTEN: dict[str, Any] = {"parse_float": Token, "parse_int": Token}


def canonical(value: Any, *, without: tuple[str, ...] = ("digest",), depth: int = 0) -> str:
    """The page's canonical form."""
    if isinstance(value, dict):
        if depth == 0:
            value = {key: one for key, one in value.items() if key not in without}
            for role in {"base", "found_on"} & {key for key, one in value.items() if isinstance(one, dict)}:
                value[role] = {key: one for key, one in value[role].items() if key != "path"}
        keys = sorted(value, key=lambda key: [ord(char) for char in key])
        return "{" + ",".join(quoted(key) + ":" + canonical(value[key], depth=1) for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(canonical(one, depth=1) for one in value) + "]"
    if isinstance(value, Token):
        return str(value)
    return quoted(value) if isinstance(value, str) else {True: "true", False: "false", None: "null"}[value]


def quoted(text: str) -> str:
    short = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}
    out = ""
    for char in text:
        if char in short:
            out += short[char]
        elif 0x20 <= ord(char) <= 0x7E:
            out += char
        else:
            units = char.encode("utf-16-be")
            out += "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))
    return '"' + out + '"'


def sha(text: str) -> str:
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:32]


def read_by_the_page(folder: Path) -> tuple[dict[str, Any], dict[str, "np.ndarray[Any, Any]"], str]:
    """(the fields with numbers as tokens, the mask by part, the identity), refusing what the page tells to refuse."""
    body = json.loads((folder / "ticket.json").read_bytes().decode("utf-8"), **AS_WRITTEN)
    assert body["format_version"] == "1"
    assert sha(canonical(body)) == body["digest"]
    content = (folder / "mask.safetensors").read_bytes()
    assert body["mask"]["file"] == "mask.safetensors"
    assert hashlib.sha256(content).hexdigest() == body["mask"]["sha256"]
    (n_header,) = struct.unpack("<Q", content[:8])
    header, data = json.loads(content[8 : 8 + n_header]), content[8 + n_header :]
    assert header.pop("__metadata__") == {"format": "tombola-mask 1"}
    assert header.keys() == body["mask"]["shapes"].keys() == body["mask"]["kept"].keys()
    mask = {}
    for part, place in header.items():
        shape, (begin, end) = [int(size) for size in body["mask"]["shapes"][part]], place["data_offsets"]
        n = math.prod(shape)
        assert place["dtype"] == "U8" and place["shape"] == [end - begin] == [-(-n // 8)]
        entries = [data[begin + i // 8] >> (i % 8) & 1 for i in range(n)]
        assert sum(entries) == int(body["mask"]["kept"][part])
        mask[part] = np.array(entries, dtype=bool).reshape(shape)
    return body, mask, sha(canonical(body, without=("digest", "metrics")))


def fingerprint_by_the_page(folder: Path) -> str:
    types = {
        "F32": "float32",
        "F64": "float64",
        "F16": "float16",
        "BF16": "bfloat16",
        "I64": "int64",
        "BOOL": "bool",
        "U8": "uint8",
    }
    found = {}
    for file in folder.glob("*.safetensors"):
        content = memoryview(file.read_bytes())
        (n_header,) = struct.unpack("<Q", content[:8])
        for name, place in json.loads(bytes(content[8 : 8 + n_header])).items():
            if name != "__metadata__":
                begin, end = place["data_offsets"]
                found[name] = (place, content[8 + n_header :][begin:end])
    digest = hashlib.sha256()
    for name in sorted(found, key=lambda name: [ord(char) for char in name]):
        place, raw = found[name]
        sizes = place["shape"]
        shape = f"({sizes[0]},)" if len(sizes) == 1 else "(" + ", ".join(map(str, sizes)) + ")"
        digest.update(f"{name}|torch.{types[place['dtype']]}|{shape}|".encode())
        digest.update(raw)
    return digest.hexdigest()[:32]


def test_the_page_is_enough_to_read_a_ticket(tmp_path: Path) -> None:
    ticket = example()
    body, mask, identity = read_by_the_page(ticket.save_pretrained(tmp_path))
    assert identity == ticket.identity
    assert set(mask) == {"heads", "mlps"}
    for part, entries in mask.items():
        assert np.array_equal(entries, ticket.mask.parts()[part].numpy())
    named = {one.name for one in fields(Ticket)} - {"levels", "level"} | {"format_version", "digest"}
    assert body.keys() == named
    assert (body["kind"], body["labels"], body["task"], body["cell"]) == ("good", ["unacceptable", "acceptable"], "cola", None)
    assert float(body["sparsity"]) == ticket.sparsity
    assert body["settings"]["note"] == ticket.settings["note"]
    assert body["found_on"] == {"name": ticket.found_on.name, "fingerprint": ticket.found_on.fingerprint,
                                "revision": None, "path": "../weights"}  # fmt: skip


def test_every_field_of_a_ticket_stands_on_the_page(saved: Path) -> None:
    body, page = json.loads((saved / "ticket.json").read_text()), PAGE.read_text(encoding="utf-8")
    named = [name for part in (body, body["base"], body["mask"], body["anatomy"]) for name in part]
    assert [name for name in named if f"`{name}`" not in page] == []


def test_the_example_on_the_page_is_what_tombola_writes_and_reads(tmp_path: Path) -> None:
    """Golden bytes: when this fails, tickets that people have no longer mean what they meant. Raise the version, do not edit."""
    page = PAGE.read_text(encoding="utf-8").split("## An example")[1]
    said, dump = re.findall(r"```(?:json)?\n(.*?)\n```", page, re.DOTALL)
    by_hand, by_tombola = tmp_path / "by-hand", example().save_pretrained(tmp_path / "by-tombola")
    by_hand.mkdir()
    (by_hand / "ticket.json").write_text(said + "\n", encoding="utf-8")
    (by_hand / "mask.safetensors").write_bytes(bytes.fromhex(dump))
    for name in ("ticket.json", "mask.safetensors"):
        assert (by_hand / name).read_bytes() == (by_tombola / name).read_bytes()
    assert f"{(by_hand / 'mask.safetensors').stat().st_size} bytes in hex" in page
    _, _, identity = read_by_the_page(by_hand)
    assert identity == Ticket.from_pretrained(by_hand).identity == example().identity
    assert f"`{identity}`" in page


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(details=st.dictionaries(st.text(), JSON, max_size=4))
@settings(deadline=None, max_examples=60)
def test_digest_and_identity_are_those_of_the_page_for_any_content(
    details: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    ticket = small(details=details)
    folder = ticket.save_pretrained(tmp_path_factory.mktemp("any"))
    _, _, identity = read_by_the_page(folder)
    assert identity == ticket.identity
    assert Ticket.from_pretrained(folder) == ticket


# ---------------------------------------------------------------------------------------------------------- round trips


def test_a_saved_ticket_comes_back_equal(saved: Path) -> None:
    ticket = Ticket.from_pretrained(saved)
    assert ticket == small()
    assert ticket.mask == small().mask and ticket.identity == small().identity
    assert sorted(file.name for file in saved.iterdir()) == ["README.md", "mask.safetensors", "ticket.json"]


def test_the_same_ticket_gives_the_same_bytes_every_time(tmp_path: Path) -> None:
    folders = [small().save_pretrained(tmp_path / str(i)) for i in range(20)]
    folders.append(Ticket.from_pretrained(folders[0]).save_pretrained(tmp_path / "again"))
    folders.append(small().save_pretrained(folders[1]))  # over itself
    for name in ("README.md", "mask.safetensors", "ticket.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1
    assert len({small().identity for _ in range(50)}) == 1


def test_the_place_of_the_weights_is_relative_on_disk_and_absolute_in_memory(tmp_path: Path) -> None:
    folder = example().save_pretrained(tmp_path / "a" / "ticket")
    assert Ticket.from_pretrained(folder).found_on.path == str((tmp_path / "a" / "weights").resolve())
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert Ticket.from_pretrained(tmp_path / "b" / "ticket").found_on.path == str((tmp_path / "b" / "weights").resolve())


def test_a_mask_of_144_heads_takes_a_few_hundred_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    mask = Mask(heads=torch.rand(12, 12) > 0.5, mlps=torch.rand(12) > 0.5)
    folder = small(mask=mask).save_pretrained(tmp_path)
    assert (folder / "mask.safetensors").stat().st_size < 300
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4096
    values = Mask(values={"w": torch.rand(1000, 1000) > 0.5})
    assert small(mask=values).save_pretrained(tmp_path / "v").joinpath("mask.safetensors").stat().st_size < 1_000_000 / 8 + 200


def test_the_model_card_says_what_the_ticket_keeps_and_what_its_numbers_stand_on(saved: Path) -> None:
    card = (saved / "README.md").read_text(encoding="utf-8")
    assert "# A good ticket of some-org/tiny-bert at c0ffeec0ffee" in card and "for cola" in card
    assert "Keeps 3 of 10 heads, 1 of 2 mlps: sparsity 0.6000" in card
    assert "| selection | mcc | 0.5000 | 1000 |" in card
    assert 'tombola.load(tombola.Ticket.from_pretrained("THIS FOLDER"), weights="base")' in card


@pytest.mark.parametrize("bad", [{"x": float("nan")}, {"x": torch.ones(2)}, {"x": {1, 2}}, {"x": {(1, 2): 3}}])
def test_what_is_not_json_is_refused_before_anything_is_written(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="plain JSON only"):
        small(details=bad).save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_identity_ignores_metrics_and_places_and_nothing_else() -> None:
    ticket = example()
    same = {
        "metrics": ({"split": "report", "metric": "mcc", "value": 1.0, "n": 3},),
        "base": replace(ticket.base, path="/elsewhere"),
        "found_on": replace(ticket.found_on, path=None),
    }
    for name, value in same.items():
        assert replace(ticket, **{name: value}).identity == ticket.identity, name
    flipped = ticket.mask.parts()["heads"].clone()
    flipped[1, 4] ^= True
    other = {
        "mask": replace(ticket.mask, heads=flipped),
        "base": replace(ticket.base, revision=None),
        "found_on": replace(ticket.found_on, name="another"),
        "anatomy": dict(ticket.anatomy) | {"d_ffn": 41},
        "kind": "random",
        "scope": "heads",
        "sparsity": 0.5,
        "task": "sst2",
        "labels": ("acceptable", "unacceptable"),
        "preset": "paper",
        "settings": dict(ticket.settings) | {"floor": 0.95},
        "seeds": dict(ticket.seeds) | {"mask": 1},
        "details": {},
        "parents": (),
        "cell": "abc",
        "versions": {},
    }
    identities = {name: replace(ticket, **{name: value}).identity for name, value in other.items()}
    identities["fingerprint"] = replace(ticket, base=replace(ticket.base, fingerprint="0" * 32)).identity
    assert len({ticket.identity, *identities.values()}) == len(identities) + 1
    in_mask = {"levels", "level"}  # see test_levels.py
    assert {one.name for one in fields(Ticket)} - in_mask == set(other) | set(same)


# --------------------------------------------------------------------------------------------------------------- damage


def test_an_empty_folder_and_a_folder_of_something_else_are_not_tickets(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="is not a ticket") as caught:
        Ticket.from_pretrained(tmp_path)
    assert (caught.value.got, caught.value.expected) == ("an empty folder", "ticket.json")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TicketError, match="is not a ticket") as caught:
        Ticket.from_pretrained(tmp_path)
    assert caught.value.got == ["config.json"]


def test_a_name_that_is_neither_here_nor_on_the_hub_is_said(tmp_path: Path) -> None:
    with pytest.raises(TicketError, match="no ticket 'nobody/has-this'") as caught:
        Ticket.from_pretrained("nobody/has-this")
    assert "neither a folder here nor a Hub repository" in str(caught.value)
    with pytest.raises(TicketError, match="no ticket"):
        Ticket.from_pretrained(tmp_path / "gone")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", '"x"', "{}", '{"format_version": 1', "\ufeff{}", "[" * 10**5])
def test_a_file_that_is_no_json_object_is_damaged(saved: Path, text: str) -> None:
    (saved / "ticket.json").write_text(text, encoding="utf-8")
    with pytest.raises(TicketError, match=r"ticket\.json is damaged"):
        Ticket.from_pretrained(saved)


def test_a_file_that_is_not_utf8_is_damaged(saved: Path) -> None:
    (saved / "ticket.json").write_bytes((saved / "ticket.json").read_text().encode("utf-16"))
    with pytest.raises(TicketError, match=r"ticket\.json is damaged"):
        Ticket.from_pretrained(saved)


@pytest.mark.parametrize("version", [3, 99, 0, -1, "1", 1.0, None, True])
def test_a_version_this_reader_does_not_know_is_refused_before_the_rest_is_looked_at(saved: Path, version: Any) -> None:
    (saved / "ticket.json").write_text(json.dumps({"format_version": version, "something": "new"}))
    with pytest.raises(TicketError, match="newer format than this tombola reads") as caught:
        Ticket.from_pretrained(saved)
    assert (caught.value.got, caught.value.expected, caught.value.next) == (version, "at most 2", "upgrade tombola")


ALL_FIELDS = sorted({one.name for one in fields(Ticket)} - {"level", "levels"})  # these only nested tickets have


@pytest.mark.parametrize("name", ALL_FIELDS)
def test_an_edited_field_is_noticed(saved: Path, name: str) -> None:
    def edit(body: dict[str, Any]) -> None:
        value = body[name]
        if isinstance(value, dict):
            body[name] = value | {"added": 1} if name not in ("base", "found_on") else value | {"name": "another"}
        else:
            body[name] = {str: f"{value}x", list: [*value, "x"] if isinstance(value, list) else [], float: 0.25}.get(
                type(value), "x"
            )

    rewrite(saved, edit, digest=False)
    with pytest.raises(TicketError, match="was changed after it was written") as caught:
        Ticket.from_pretrained(saved)
    assert caught.value.got != caught.value.expected


@pytest.mark.parametrize("name", [*ALL_FIELDS, "digest"])
def test_a_missing_field_and_one_of_another_type_are_named_though_the_digest_is_right(saved: Path, name: str) -> None:
    whole = (saved / "ticket.json").read_text()
    for change in (lambda body: body.pop(name), lambda body: body.update({name: 7 if name != "sparsity" else "7"})):
        (saved / "ticket.json").write_text(whole)
        rewrite(saved, change, digest=name != "digest")
        with pytest.raises(TicketError, match="lacks fields, or has them in another type") as caught:
            Ticket.from_pretrained(saved)
        assert list(caught.value.got) == [name]  # type: ignore[call-overload]
        assert caught.value.expected == "see docs/ticket-format.md"


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body["base"].pop("fingerprint"),
        lambda body: body["found_on"].update({"path": "a\0b"}),
        lambda body: body["found_on"].update({"path": 5}),
        lambda body: body["base"].update({"url": "x"}),
        lambda body: body["mask"].pop("shapes"),
        lambda body: body["mask"].update({"shapes": [2, 5]}),
        lambda body: body["mask"]["shapes"].pop("mlps"),
        lambda body: body["mask"]["shapes"].update({"heads": [2, 50]}),
        lambda body: body["mask"]["shapes"].update({"heads": [-2, -5]}),
        lambda body: body["mask"]["shapes"].update({"heads": [10]}),
        lambda body: body["mask"]["shapes"].update({"heads": ["2", 5]}),
        lambda body: body["mask"]["shapes"].update({"heads": 10}),
        lambda body: body["mask"].update({"sha256": 3}),
    ],
)
def test_a_ticket_with_a_right_digest_that_does_not_follow_the_format_is_refused(
    saved: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    rewrite(saved, change, digest=True)
    with pytest.raises(TicketError, match="does not follow the format") as caught:
        Ticket.from_pretrained(saved)
    assert caught.value.expected == "see docs/ticket-format.md"


def test_a_mask_file_that_is_no_mask_is_refused_though_all_digests_are_right(saved: Path) -> None:
    for content in (b"", b"not safetensors", struct.pack("<Q", 2**60) + b"{}"):
        (saved / "mask.safetensors").write_bytes(content)
        rewrite(saved, lambda body, c=content: body["mask"].update({"sha256": hashlib.sha256(c).hexdigest()}), digest=True)
        with pytest.raises(TicketError, match="does not follow the format") as caught:
            Ticket.from_pretrained(saved)
        assert "SafetensorError" in str(caught.value.got)


def test_counts_that_are_not_those_of_the_mask_are_refused(saved: Path) -> None:
    rewrite(saved, lambda body: body["mask"]["kept"].update({"heads": 4}), digest=True)
    with pytest.raises(TicketError, match=r"does not keep what ticket\.json says") as caught:
        Ticket.from_pretrained(saved)
    assert (caught.value.got, caught.value.expected) == ({"heads": 3, "mlps": 1}, {"heads": 4, "mlps": 1})


def test_a_missing_mask_is_said(saved: Path) -> None:
    (saved / "mask.safetensors").unlink()
    with pytest.raises(TicketError, match=r"mask\.safetensors is missing"):
        Ticket.from_pretrained(saved)


def test_every_flipped_bit_and_every_truncation_of_the_mask_is_noticed(saved: Path) -> None:
    file = saved / "mask.safetensors"
    whole = file.read_bytes()
    damaged = [bytes([*whole[:i], whole[i] ^ 1 << bit, *whole[i + 1 :]]) for i in range(len(whole)) for bit in (0, 7)]
    damaged += [whole[:n] for n in range(len(whole))] + [whole + b"\0"]
    for content in damaged:
        file.write_bytes(content)
        with pytest.raises(TicketError, match="is truncated or was changed"):
            Ticket.from_pretrained(saved)


def test_whatever_bytes_are_damaged_a_ticket_is_equal_or_refused(saved: Path) -> None:
    rng, ticket = random.Random(0), small()
    originals = {name: (saved / name).read_bytes() for name in ("ticket.json", "mask.safetensors")}
    equal = refused = 0
    for round_ in range(400):
        name = "ticket.json" if round_ % 4 else "mask.safetensors"
        content = bytearray(originals[name])
        kind = rng.choice(("flip", "flips", "cut", "insert", "swap"))
        at, to = sorted(rng.randrange(len(content)) for _ in range(2))
        if kind in ("flip", "flips"):
            for _ in range(1 if kind == "flip" else 5):
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif kind == "cut":
            del content[at:to]
        elif kind == "insert":
            content[at:at] = rng.choice((b" ", b"\n", b"\xff", b'"', b"{", b"0", b"null"))
        else:
            content[at:to] = content[at:to][::-1]
        (saved / name).write_bytes(bytes(content))
        try:
            found = Ticket.from_pretrained(saved)
        except TicketError:
            refused += 1
        else:
            # Only what no digest covers, white space and the hint of a place, may differ.
            assert replace(found, **{role: replace(getattr(found, role), path=None) for role in ("base", "found_on")}) == ticket
            equal += 1
        (saved / name).write_bytes(originals[name])
    assert refused > 350 and equal >= 1


def test_nothing_is_ever_unpickled(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    bomb = pickle.dumps(Bomb(), protocol=2)
    for name in ("ticket.json", "mask.safetensors"):
        shutil.copytree(saved, tmp_path / name)
        (tmp_path / name / name).write_bytes(bomb)
        with pytest.raises(TicketError):
            Ticket.from_pretrained(tmp_path / name)
    weights = tmp_path / "weights"
    weights.mkdir()
    (weights / "pytorch_model.bin").write_bytes(bomb)
    with pytest.raises(TombolaError, match="are damaged"):
        fingerprint_folder(weights)
    assert not (tmp_path / "exploded").exists()
    pickle.loads(bomb)  # it would have
    assert (tmp_path / "exploded").exists()

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("unpickled")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert Ticket.from_pretrained(saved) == small()


# ---------------------------------------------------------------------------------------------------------- fingerprint


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "b.weight": torch.randn(3, 4),
        "a": torch.randn(5),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "flags": torch.tensor([True, False, True]),
        "half": torch.randn(2, 2).bfloat16(),
        "ids": torch.arange(3),
        "none": torch.zeros(0, 3),
        "é": torch.ones(1).half(),
    }


def weights_in(folder: Path, *shards: dict[str, torch.Tensor], **metadata: str) -> Path:
    folder.mkdir(parents=True)
    for i, shard in enumerate(shards):
        save_file(shard, folder / f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors", metadata=metadata or None)
    return folder


def test_fingerprints_are_those_of_the_page(tmp_path: Path, tiny_folder: Path) -> None:
    folder = weights_in(tmp_path / "odd", tensors())
    assert fingerprint_folder(folder) == fingerprint_by_the_page(folder)
    assert fingerprint_folder(tiny_folder) == fingerprint_by_the_page(tiny_folder)
    assert re.fullmatch(r"[0-9a-f]{32}", fingerprint_folder(folder))


def test_sharding_order_and_metadata_do_not_change_a_fingerprint(tmp_path: Path) -> None:
    items = list(tensors().items())
    one = fingerprint_folder(weights_in(tmp_path / "one", dict(items)))
    assert fingerprint_folder(weights_in(tmp_path / "two", dict(items[5:]), dict(items[:5]))) == one
    assert fingerprint_folder(weights_in(tmp_path / "other", dict(items[::2]), dict(items[1::2]), format="pt")) == one
    single = weights_in(tmp_path / "single", dict(reversed(items)))
    next(single.iterdir()).rename(single / "model.safetensors")
    (single / "config.json").write_text("{}")
    assert fingerprint_folder(single) == one


def test_a_bit_a_name_a_type_and_a_shape_each_change_a_fingerprint(tmp_path: Path) -> None:
    base = tensors()
    flipped = base["a"].clone()
    flipped.view(torch.int32)[3] ^= 1
    variants = {
        "same": base,
        "bit": base | {"a": flipped},
        "name": {("A" if name == "a" else name): value for name, value in base.items()},
        "type": base | {"a": base["a"].view(torch.int32)},
        "wider": base | {"a": base["a"].double()},
        "shape": base | {"b.weight": base["b.weight"].reshape(4, 3)},
        "more": base | {"z": torch.zeros(1)},
        "empty": base | {"none": torch.zeros(0, 4)},
        "swapped": base | {"a": base["a"].flip(0)},
    }
    found = {name: fingerprint_folder(weights_in(tmp_path / name, shard)) for name, shard in variants.items()}
    assert len(set(found.values())) == len(variants)


def test_folders_without_weights_and_with_damaged_ones_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(TombolaError, match="no weights in"):
        fingerprint_folder(tmp_path)
    folder = weights_in(tmp_path / "weights", tensors())
    file = next(folder.iterdir())
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(TombolaError, match="are damaged") as caught:
        fingerprint_folder(folder)
    assert "SafetensorError" in str(caught.value.got)
    for content in (b"", b"PK\x03\x04 cut", b"no pickle"):
        file.unlink(missing_ok=True)
        (folder / "pytorch_model.bin").write_bytes(content)
        with pytest.raises(TombolaError, match="are damaged"):
            fingerprint_folder(folder)


def test_legacy_weights_have_the_fingerprint_of_the_same_weights_in_safetensors(tmp_path: Path) -> None:
    known = {name: value for name, value in tensors().items() if value.numel()}
    folder = tmp_path / "legacy"
    folder.mkdir()
    torch.save(known, folder / "pytorch_model.bin")
    assert fingerprint_folder(folder) == fingerprint_folder(weights_in(tmp_path / "modern", known))


# ------------------------------------------------------------------------------------------------------ loading weights


def test_base_is_found_by_name_and_checked(tiny_folder: Path, tmp_path: Path) -> None:
    fingerprint = fingerprint_folder(tiny_folder)
    ticket = small(base=Weights(str(tiny_folder), fingerprint))
    assert locate_weights(ticket, "base") == (tiny_folder, fingerprint)
    other = small(base=Weights(str(tiny_folder), "0" * 32, revision="abc"))
    with pytest.raises(FingerprintError, match=f"does not belong to the weights of {re.escape(str(tiny_folder))}") as caught:
        locate_weights(other, "base")
    assert caught.value.got == f"fingerprint {fingerprint}"
    assert caught.value.expected == f"fingerprint {'0' * 32} (revision abc)"
    with pytest.raises(TombolaError, match="unknown model 'some-org/tiny-bert'"):
        locate_weights(small(), "base")


def test_found_on_is_found_by_its_place_and_checked(tiny_folder: Path) -> None:
    fingerprint = fingerprint_folder(tiny_folder)
    assert locate_weights(small(found_on=Weights("x", fingerprint, path=str(tiny_folder))), "found_on") == (
        tiny_folder,
        fingerprint,
    )
    with pytest.raises(FingerprintError, match="does not belong to the weights of x"):
        locate_weights(small(found_on=Weights("x", "0" * 32, path=str(tiny_folder))), "found_on")
    for path, got in ((None, "no place recorded"), ("/gone", "/gone")):
        with pytest.raises(TicketError, match="found on are not here") as caught:
            locate_weights(small(found_on=Weights("x", fingerprint, path=path)), "found_on")
        assert caught.value.got == got
        assert caught.value.expected == f"x, fingerprint {fingerprint}"
        assert 'weights="base"' in str(caught.value)


def test_a_folder_of_ones_own_is_taken_as_given(tiny_folder: Path, tmp_path: Path) -> None:
    assert locate_weights(small(), tiny_folder) == (tiny_folder, fingerprint_folder(tiny_folder))
    assert locate_weights(small(), str(tiny_folder)) == (tiny_folder, fingerprint_folder(tiny_folder))
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(TombolaError, match="is a folder but not a model") as caught:
        locate_weights(small(), tmp_path)
    assert caught.value.got == ["notes.txt"]


def test_the_demo_model_resolves_to_its_real_weights() -> None:
    source = resolve_model("demo")
    assert source.fingerprint == fingerprint_by_the_page(source.folder)
    assert json.loads((source.folder / "config.json").read_text())["num_attention_heads"] == 12


def test_a_head_is_drawn_from_its_seed_and_from_nothing_else(tiny_folder: Path) -> None:
    def head(seed: int, caller: int) -> torch.Tensor:
        torch.manual_seed(caller)
        before = torch.get_rng_state()
        model: Any = load_weights(tiny_folder, ("no", "yes", "perhaps"), head_seed=seed)
        assert torch.equal(torch.get_rng_state(), before)
        assert model.config.id2label == {0: "no", 1: "yes", 2: "perhaps"} and not model.training
        weight: torch.Tensor = model.classifier.weight
        return weight

    assert head(1, caller=5).shape == (3, 32)
    assert torch.equal(head(1, caller=5), head(1, caller=6))
    assert not torch.equal(head(1, caller=5), head(2, caller=5))


def test_without_labels_the_head_is_what_the_folder_says(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    model = make_tiny("bert")
    model.save_pretrained(tmp_path)
    loaded: Any = load_weights(tmp_path, (), head_seed=0)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)


def test_a_head_of_another_size_is_refused(make_tiny: Callable[..., Any], tmp_path: Path) -> None:
    make_tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(TombolaError, match="could not be loaded as a classifier of 3 classes"):
        load_weights(tmp_path, ("a", "b", "c"), head_seed=0)


def test_what_is_pushed_to_the_hub_says_nothing_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    pushed: dict[str, Any] = {}

    class Hub:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
            pushed["private"] = private
            return f"https://hub.example/{repo_id}"

        def upload_folder(self, *, repo_id: str, folder_path: str) -> None:
            shutil.copytree(folder_path, tmp_path / "pushed")

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    ticket = replace(example(), base=replace(example().base, path="/home/me/base"))
    assert ticket.push_to_hub("me/my-ticket") == "https://hub.example/me/my-ticket"
    assert pushed == {"private": True}
    fetched = Ticket.from_pretrained(tmp_path / "pushed")
    assert (fetched.base.path, fetched.found_on.path) == (None, None)
    assert fetched.identity == ticket.identity and fetched.mask == ticket.mask
