"""docs/families.md is what this test measures: each family of transformers that is read, and what works on it.

`TOMBOLA_WRITE_DOCS=1 ./dev pytest -n 0 tests/test_family_table.py` writes the page anew.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import FAMILIES, TINY, tiny_family
from test_families import furthest, logits, mask_without, rows_for
from tombola.anatomy import Anatomy, read_anatomy
from tombola.gates import Gates, hold, load, prove_acts
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.scope import scope_parameters
from tombola.scores import gate_gradients
from tombola.source import fingerprint_folder
from tombola.ticket import Ticket, Weights

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

HEAD = """# Families of transformers that are read

Written by `tests/test_family_table.py`, from a model of each family with random weights, made as small as its code allows; the
test fails when this page is not what it measures. Anything else is read by its structure too, and refused when that cannot be
proved: `tombola inspect MODEL` says which, and `--layout FILE.yaml` says by hand where things are.

* **proved**: one channel of each projection is perturbed, and the slice that the reading predicts is all that moves.
* **gated**: heads, MLPs and neurons are removed by gates; the proof that a mask acts passes, and the output changes.
* **scored**: every head and MLP has an exact gradient for each row, in one backward pass.
* **values**: single values are masked, and held at zero through a training step.
* **saved**: a ticket goes through a folder and gives the same outputs on weights that are loaded anew.

| family | class | attention blocks | heads (kv) | projections of attention | MLP | proved | gated | scored | values | saved |
| --- | --- | ---: | ---: | --- | --- | --- | --- | --- | --- | --- |
"""


def attention_kind(anatomy: Anatomy) -> str:
    one = anatomy.layers[0].attention
    fused = one.q.path == one.k.path
    cross = anatomy.n_attentions > anatomy.n_layers
    rows = one.q.channels()
    beside = fused and bool((rows[1:] - rows[:-1] == 1).all())
    kind = ("fused, one after the other" if beside else "fused, head by head") if fused else "apart"
    return kind + (", transposed" if one.o.transposed else "") + (", cross-attention" if cross else "")


def mlp_kind(anatomy: Anatomy) -> str:
    mlp = anatomy.mlps[0]
    if len(mlp.ins) == 1:
        return "plain"
    return "gated, fused" if mlp.ins[0].path == mlp.ins[1].path else "gated"


def gated(model: Any, anatomy: Anatomy, _: Path) -> None:
    before = logits(model)
    mask = mask_without(anatomy, [(0, 0)], (anatomy.n_layers - 1,))
    neurons = torch.ones(anatomy.n_layers, anatomy.mlps[0].d_ffn, dtype=torch.bool)
    neurons[0, 1:4] = False
    for one in (mask, Mask(neurons=neurons)):
        prove_acts(model, anatomy, one)
        with Gates(model, anatomy, one):
            assert furthest(logits(model), before) > 0
    assert furthest(logits(model), before) == 0


def scored(model: Any, anatomy: Anatomy, _: Path) -> None:
    rows = rows_for(model)
    n = len(next(iter(rows.values())))
    with Gates(model, anatomy) as gates:
        found = gate_gradients(gates, [(torch.arange(n), {**rows, "labels": torch.arange(n) % 2})], n)
    assert bool((found.heads.abs().sum(0) > 0).all()) and bool((found.mlps.abs().sum(0) > 0).all())


def values(model: Any, anatomy: Anatomy, _: Path) -> None:
    names = list(scope_parameters(model, anatomy, "body:weights"))
    mask = Mask(values={name: model.get_parameter(name).abs() > model.get_parameter(name).abs().median() for name in names})
    prove_acts(model, anatomy, mask)
    hold(model, anatomy, mask)
    step = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(**rows_for(model), labels=torch.tensor([1, 0, 1])).loss.backward()
    step.step()
    assert not any(bool(model.get_parameter(name)[~part].any()) for name, part in mask.values.items())


def saved(model: Any, anatomy: Anatomy, folder: Path) -> None:
    model.save_pretrained(folder / "model")
    own = load_weights(folder / "model", ("bad", "good"), head_seed=0)
    mask = mask_without(anatomy, [(0, 0)], (0,))
    place = Weights(str(folder / "model"), fingerprint_folder(folder / "model"))
    ticket = Ticket(
        mask=mask, base=place, found_on=place, anatomy=read_anatomy(own).summary(), kind="good", scope="heads+mlps",
        sparsity=anatomy.size(mask).sparsity, labels=("bad", "good"), seeds={"head": 0},
    )  # fmt: skip
    again = load(Ticket.from_pretrained(ticket.save_pretrained(folder / "ticket")), "base")
    with Gates(own, anatomy, mask):
        expected = logits(own)
    assert furthest(logits(again), expected) < 1e-5 * float(expected.abs().max())


CHECKS: dict[str, Callable[[Any, Anatomy, Path], None]] = {"gated": gated, "scored": scored, "values": values, "saved": saved}
NOT_ASKED = {("vit", "saved"): "–"}  # tombola.load makes models of text


def row(kind: str, folder: Path) -> str:
    model = tiny_family(kind)
    anatomy = read_anatomy(model)  # raises when it cannot be proved
    one = anatomy.layers[0].attention
    cells = [kind, type(model).__name__, str(anatomy.n_attentions), f"{one.n_heads} ({one.n_kv_heads})"]
    cells += [attention_kind(anatomy), mlp_kind(anatomy), "yes"]
    for name, check in CHECKS.items():
        if (kind, name) in NOT_ASKED:
            cells.append(NOT_ASKED[kind, name])
            continue
        fresh = tiny_family(kind)
        (folder / name).mkdir()
        check(fresh, read_anatomy(fresh), folder / name)
        cells.append("yes")
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("kind", [*sorted(TINY), *FAMILIES])
def test_the_page_says_what_works_on_each_family(kind: str, tmp_path: Path) -> None:
    line = row(kind, tmp_path)
    if os.environ.get("TOMBOLA_WRITE_DOCS"):
        lines = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
        others = {old.split("|")[1].strip(): old for old in lines if old.startswith("| ")}
        order = [*sorted(TINY), *FAMILIES]
        table = [text for name in order if (text := line if name == kind else others.get(name))]
        PAGE.write_text(HEAD + "\n".join(table) + "\n", encoding="utf-8")
    assert line in PAGE.read_text(encoding="utf-8").splitlines()


def test_the_page_has_no_family_that_is_not_tested() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text.startswith(HEAD)
    assert [line.split("|")[1].strip() for line in text.removeprefix(HEAD).splitlines()] == [*sorted(TINY), *FAMILIES]
