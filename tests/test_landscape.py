"""Barrier and sharpness: against functions whose landscape is known by hand, and plain loops over the same models."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tombola.errors import DataError
from tombola.evaluate import Predictions
from tombola.landscape import along_line, barrier, filter_normalised, mean_loss, rises

AT = [i / 10 for i in range(11)]


class Weights(torch.nn.Module):
    """Parameters and nothing else."""

    def __init__(self, **values: Any) -> None:
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, torch.nn.Parameter(torch.as_tensor(value, dtype=torch.float64)))


def test_two_wells_have_the_barrier_between_them() -> None:
    """(w² − 1)² from −1 to 1: 0 at both ends, 1 in the middle."""
    model = Weights(w=[[-1.0]])
    losses = along_line(model, {"w": torch.tensor([[1.0]], dtype=torch.float64)}, AT, lambda: float((model.w**2 - 1) ** 2))
    assert losses == pytest.approx([((2 * t - 1) ** 2 - 1) ** 2 for t in AT])
    found = barrier(AT, losses)
    assert (found.over_line, found.over_ends, found.at) == pytest.approx((1.0, 1.0, 0.5))
    assert model.w.item() == -1.0, "the model is given back as it was"


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=9), st.floats(-3, 3), st.floats(-3, 3))
def test_a_barrier_is_never_negative_and_does_not_see_a_slope(losses: list[float], slope: float, shift: float) -> None:
    at = [i / (len(losses) - 1) for i in range(len(losses))]
    found = barrier(at, losses)
    tilted = barrier(at, [loss + slope * t + shift for t, loss in zip(at, losses, strict=True)])
    assert tilted.over_line == pytest.approx(found.over_line, abs=1e-9)
    assert found.over_line >= found.over_ends - 1e-9 >= -1e-9


def test_a_bowl_has_no_barrier() -> None:
    assert barrier(AT, [(t - 0.3) ** 2 for t in AT]).over_line == pytest.approx(0.0, abs=1e-12)
    found = barrier([0.0, 0.5, 1.0], [1.0, 2.5, 3.0])
    assert (found.over_line, found.over_ends, found.at) == (0.5, 0.0, 0.5), "above the line, below the higher end"


@pytest.mark.parametrize("at", [[0.0, 0.5], [0.1, 1.0], [0.0], [0.0, 0.5, 1.0]])
def test_what_is_no_line_is_refused(at: list[float]) -> None:
    with pytest.raises(DataError, match="no losses on a line"):
        barrier(at, [0.0, 1.0])


def test_lines_between_different_models_are_refused() -> None:
    with pytest.raises(DataError, match="different models"):
        along_line(Weights(w=[1.0]), {"w": torch.zeros(2)}, [0.0, 1.0], lambda: 0.0)


def test_mean_loss_is_that_of_torch_and_of_hand() -> None:
    logits = torch.tensor([[0.0, math.log(3.0)], [0.0, 0.0]])
    assert mean_loss(Predictions(("a", "b"), logits, (1, 0))) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert mean_loss(Predictions(("a", "b"), torch.tensor([[1.0], [3.0]]), (0.0, 3.5))) == pytest.approx(0.625)


def test_directions_have_the_norms_of_rows_and_leave_zeros_alone() -> None:
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[1, :4], weight[2] = 0, 0
    model = Weights(w=weight, other=[1.0])
    (found,) = filter_normalised(model, ["w"], 3).values()
    assert torch.equal(found != 0, weight != 0)
    assert torch.allclose(found.norm(dim=1), weight.norm(dim=1))
    again, another = (filter_normalised(model, ["w"], seed)["w"] for seed in (3, 4))
    assert torch.equal(found, again) and not torch.equal(found, another)


def test_the_rise_of_a_quadratic_is_the_one_that_its_hessian_gives() -> None:
    """½ wᵀHw + g·w: the expected rise is radius² / 2 · Σ |row|² / values · trace of H over the row; the slope cancels."""
    drawn = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 6, generator=drawn, dtype=torch.float64) * torch.tensor([[0.5], [1.0], [2.0]])
    weight[0, 3:] = 0
    root = torch.randn(18, 18, generator=drawn, dtype=torch.float64)
    hessian, slope = root @ root.T / 18, torch.randn(18, generator=drawn, dtype=torch.float64)
    model = Weights(w=weight)

    def loss() -> float:
        flat = model.w.detach().flatten()
        return float(flat @ hessian @ flat / 2 + slope @ flat)

    here, radius = loss(), 0.1
    found = [(there + back) / 2 - here for there, back in rises(model, ["w"], loss, radius=radius, draws=4000, seed=0)]
    trace = hessian.diagonal().reshape(3, 6) * (weight != 0)
    expected = radius**2 / 2 * sum(float(weight[i].norm() ** 2 / (weight[i] != 0).sum() * trace[i].sum()) for i in range(3))
    error = torch.tensor(found).std().item() / math.sqrt(len(found))
    assert sum(found) / len(found) == pytest.approx(expected, abs=4 * error) and error < 0.05 * expected
    assert loss() == here and torch.equal(model.w.detach(), weight)


def test_scaling_that_changes_no_output_changes_no_rise() -> None:
    """The reason for it: of relu(w x) with w·10 and the next weight / 10, a Hessian says something else, and this does not."""

    def sharpness(scale: float) -> float:
        first = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64) * scale
        model = Weights(a=first, b=torch.tensor([[1.0, 3.0]], dtype=torch.float64) / scale)
        x = torch.tensor([[1.0, 0.3], [0.2, 2.0], [1.5, 1.0]], dtype=torch.float64)

        def loss() -> float:
            return float((((x @ model.a.T).relu() @ model.b.T - 1) ** 2).mean().detach())

        here = loss()
        return sum((a + b) / 2 - here for a, b in rises(model, ["a", "b"], loss, radius=0.1, draws=20, seed=0))

    assert sharpness(10.0) == pytest.approx(sharpness(1.0), rel=1e-9)


# ------------------------------------------------------------------------------------------------------------ experiment


def test_landscape_of_tickets_is_that_of_their_weights(tmp_path: Path, tiny_folder: Path, data_folder: Path) -> None:
    import json

    import transformers

    from test_prasanna2020 import FAST
    from tombola.study.cells import Cell, read_rows
    from tombola.study.jobs import open_lab
    from tombola.study.plan import Study, plan_study
    from tombola.study.results import collect

    lab = open_lab(tmp_path / "store", data_folder)
    said: dict[str, Any] = {"name": "paper", "model": str(tiny_folder), "tasks": ["sst2"], "seeds": [0], "settings": FAST}
    options = {"landscape": {"kinds": ["random"], "points": 3, "directions": 2}, "controls": {"kinds": ["random"]}}
    both = plan_study(lab, Study(**said, experiments=["controls", "landscape"], options=options))
    alone = plan_study(lab, Study(**said, experiments=["controls"], options={"controls": {"kinds": ["random"]}}))
    trained = {
        name: [one for one in plan.cells.values() if one.step == "retrain"] for name, plan in (("both", both), ("alone", alone))
    }
    assert len(trained["both"]) == len(trained["alone"]) == 2, "nothing is trained twice"
    assert all(one.settings["keep_weights"] for one in trained["both"])
    assert not any(one.settings["keep_weights"] for one in trained["alone"])
    assert {one.without_weights for one in trained["both"]} == {one.key for one in trained["alone"]}
    lab.run(both.cells.values())
    rows = collect(lab.store).landscape
    expected = {(kind, role) for kind in ("full", "good", "random") for role in ("report", "train")}
    assert {(row.kind, row.role) for row in rows} == expected and len(rows) == 6

    def model_of(cell: Cell) -> Any:
        return transformers.AutoModelForSequenceClassification.from_pretrained(lab.folder(cell) / "weights").eval()

    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_folder)
    sentences = [json.loads(line) for line in (data_folder / "sst2" / "validation.jsonl").read_text().splitlines()]

    @torch.no_grad()
    def loss(model: Any) -> float:
        every = [
            model(**tokenizer(row["sentence"], return_tensors="pt"), labels=torch.tensor([row["label"]])).loss
            for row in sentences
        ]
        return float(torch.stack(every).mean())

    for one in (cell for cell in both.cells.values() if cell.step == "landscape" and "retrained" in cell.inputs):
        row = next(row for row in read_rows(lab.folder(one) / "landscape.jsonl") if row["role"] == "report")
        dense, ticket = model_of(one.inputs["dense"]), model_of(one.inputs["retrained"])  # type: ignore[arg-type]
        middle = model_of(one.inputs["dense"])  # type: ignore[arg-type]
        for name, parameter in middle.named_parameters():
            parameter.data = (dense.get_parameter(name).data + ticket.get_parameter(name).data) / 2
        assert row["losses"] == pytest.approx([loss(dense), loss(middle), loss(ticket)], abs=1e-5)
        assert row["at"] == [0.0, 0.5, 1.0] and row["n"] == 80 and row["loss"] == pytest.approx(row["losses"][2])
        excess = row["losses"][1] - (row["losses"][0] + row["losses"][2]) / 2
        assert row["over_line"] == pytest.approx(max(excess, 0.0), abs=1e-9)
        assert row["sharpness"] == pytest.approx(sum(row["rises"]) / 2) and len(row["rises"]) == 2
    lab.run(trained["alone"][:1])
    retrained = [row for row in collect(lab.store).scores if (row.stage, row.role) == ("retrained", "report")]
    assert sorted(row.kind for row in retrained) == ["good", "random"], "what was trained twice all the same is shown once"
    full = [row for row in rows if row.kind == "full"]
    assert all(row.at == () and row.over_line is None for row in full)
    assert {row.search for row in rows} == {"", "s-prune"}
