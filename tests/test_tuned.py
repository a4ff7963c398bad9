"""Mask tuning: factors against numpy's least squares on what the hooks of this file see, folding against scaling, the loss."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import sentiment, tiny_family, tiny_model, trained_on_sentiment
from tombola.anatomy import Anatomy, probe_inputs, read_anatomy
from tombola.errors import MaskError
from tombola.evaluate import mean_loss
from tombola.gates import masked
from tombola.mask import Mask
from tombola.tasks.encode import Encoded, batches
from tombola.tuned import Equations, fold, tune


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Any:
    return trained_on_sentiment(tiny_folder).double()


@pytest.fixture(scope="module")
def rows(tiny_folder: Path) -> Encoded:
    return sentiment(tiny_folder, 40, 3)


def halved(anatomy: Anatomy, seed: int = 0) -> Mask:
    """Half of the heads and of the neurons of each layer, drawn."""
    generator = torch.Generator().manual_seed(seed)

    def half(rows: int, n: int) -> torch.Tensor:
        return torch.stack([torch.randperm(n, generator=generator) < n // 2 for _ in range(rows)])

    return Mask(heads=half(anatomy.n_attentions, anatomy.n_heads), neurons=half(anatomy.n_layers, anatomy.d_ffn or 0))


def seen(model: Any, path: str, rows: Encoded) -> tuple[np.ndarray, np.ndarray]:
    """What a projection takes in and gives out, of all tokens that are no padding: [token, in], [token, out]."""
    both: list[tuple[np.ndarray, np.ndarray]] = []
    with torch.no_grad():
        for _, inputs in batches(rows):
            real = inputs["attention_mask"].bool()
            handle = model.get_submodule(path).register_forward_hook(
                lambda _, args, out, real=real: both.append((args[0][real].numpy(), out[real].numpy()))
            )
            model(**{name: value for name, value in inputs.items() if name != "labels"})
            handle.remove()
    taken, given = zip(*both, strict=True)
    return np.concatenate(taken), np.concatenate(given)


def by_hand(
    model: Any, folded: Any, anatomy: Anatomy, mask: Mask, rows: Encoded, path: str, part: np.ndarray, damp: float
) -> np.ndarray:
    """Factors of one projection by numpy: A written out, a row for each token and output channel, damping as further rows.

    folded: the model with the factors of the sites before.
    """
    module = model.get_submodule(path)
    weight, bias = module.weight.detach().numpy(), module.bias.detach().numpy()
    b = (seen(model, path, rows)[1] - bias).ravel()
    with masked(folded, anatomy, mask):
        z = seen(folded, path, rows)[0]
    kept = sorted(set(part[part >= 0].tolist()))
    a = np.stack([(z[:, part == p] @ weight[:, part == p].T).ravel() for p in kept], axis=1)
    ridge = damp * np.sqrt((a**2).sum(0).mean()) * np.eye(len(kept))
    r, *_ = np.linalg.lstsq(np.concatenate([a, ridge]), np.concatenate([b - a.sum(1), np.zeros(len(kept))]), rcond=None)
    found = np.ones(len(part))
    found[part >= 0] = (1 + r)[np.searchsorted(kept, part[part >= 0])]
    return found


@pytest.mark.parametrize("damp", [1e-2, 0.5])
def test_the_factors_of_every_site_are_those_of_numpys_least_squares(model: Any, rows: Encoded, damp: float) -> None:
    anatomy = read_anatomy(model)
    mask, width = halved(anatomy), anatomy.attentions[0].d_head
    assert mask.heads is not None and mask.neurons is not None
    tuning = tune(model, mask, anatomy, lambda: batches(rows), damp=damp, limit=1e9)
    folded, compared = copy.deepcopy(model), []
    for heads, neurons, attention, mlp in zip(mask.heads, mask.neurons, anatomy.attentions, anatomy.mlps, strict=True):
        of_heads = np.where(heads.repeat_interleave(width).numpy(), np.arange(attention.o.n_in) // width, -1)
        of_neurons = np.where(neurons.numpy(), np.arange(mlp.d_ffn), -1)
        for path, part in ((attention.o.path, of_heads), (mlp.out.path, of_neurons)):
            if path in tuning.factors:
                expected = by_hand(model, folded, anatomy, mask, rows, path, part, damp)
                np.testing.assert_allclose(tuning.factors[path].numpy(), expected, rtol=1e-3, atol=1e-4)
                fold(folded, {path: tuning.factors[path]})
                compared.append(path)
    assert len(compared) >= 2, tuning.left


def test_equations_are_solved_as_numpy_solves_them_and_say_how_much_is_left() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.normal(size=(50, 4)), draw.normal(size=50)
    equations = Equations(torch.from_numpy(a.T @ a), torch.from_numpy(a.T @ b), float(b @ b))
    best, *_ = np.linalg.lstsq(a, b, rcond=None)
    np.testing.assert_allclose(equations.solve(0.0).numpy(), best, rtol=1e-9)
    assert equations.error(torch.from_numpy(best)) == pytest.approx(float(((a @ best - b) ** 2).sum() / (b @ b)))
    assert equations.error(torch.ones(4).double()) == pytest.approx(float(((a.sum(1) - b) ** 2).sum() / (b @ b)))
    np.testing.assert_allclose(equations.solve(1e6).numpy(), np.ones(4), rtol=1e-6)  # damped to no change
    twice = torch.ones(2, 2).double()  # two parts that do the same
    np.testing.assert_allclose(Equations(twice, 3 * twice[0], 9.0).solve(0.0).numpy(), [1.5, 1.5])


def test_tuning_lowers_the_error_of_every_site_and_never_the_quality_on_its_rows(model: Any, rows: Encoded) -> None:
    anatomy = read_anatomy(model)
    for seed in range(3):
        mask = halved(anatomy, seed)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        tuning = tune(model, mask, anatomy, lambda: batches(rows))
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is as it was"
        assert not model.get_submodule(anatomy.mlps[0].out.path)._forward_pre_hooks
        assert all(after <= b4 + 1e-9 for b4, after in tuning.errors.values()) and len(tuning.errors) == 4
        with masked(model, anatomy, mask):
            assert tuning.loss[0] == pytest.approx(mean_loss(model, rows), rel=1e-6)
        try:
            fold(model, tuning.factors)
            with masked(model, anatomy, mask):
                assert mean_loss(model, rows) == pytest.approx(tuning.loss[1], rel=1e-4)
        finally:
            model.load_state_dict(before)
        assert tuning.loss[1] <= tuning.loss[0]
        assert len(tuning.factors) + len(tuning.left) == 4


def test_nothing_removed_gives_factors_of_one(model: Any, rows: Encoded) -> None:
    anatomy = read_anatomy(model)
    tuning = tune(model, anatomy.full_mask("heads", "neurons"), anatomy, lambda: batches(rows))
    for of in tuning.factors.values():
        torch.testing.assert_close(of, torch.ones_like(of), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5", "modernbert", "distilbert", "falcon"])
def test_folding_is_scaling_what_comes_in_whatever_the_family(name: str) -> None:
    """Of fused and transposed projections too: columns times factors is the same as inputs times factors."""
    model = (tiny_model(name) if name == "distilbert" else tiny_family(name)).eval().double()
    anatomy = read_anatomy(model)
    draw = torch.Generator().manual_seed(1)
    factors = {one.o.path: torch.rand(one.o.n_in, generator=draw) + 0.5 for one in anatomy.attentions}
    factors |= {one.out.path: torch.rand(one.out.n_in, generator=draw) + 0.5 for one in anatomy.mlps}
    inputs = probe_inputs(model, batch=2)
    handles = [
        model.get_submodule(path).register_forward_pre_hook(lambda _, args, of=of: (args[0] * of.to(args[0]),))
        for path, of in factors.items()
    ]
    with torch.no_grad():
        expected = model(**inputs)[0]
        for handle in handles:
            handle.remove()
        assert not torch.allclose(model(**inputs)[0], expected, rtol=1e-3)
        fold(model, factors)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_tuned_is_refused(model: Any, rows: Encoded, tiny_folder: Path) -> None:
    anatomy = read_anatomy(model)
    name = f"{anatomy.mlps[0].out.path}.weight"
    values = Mask(values={name: torch.ones(dict(model.named_parameters())[name].shape, dtype=torch.bool)})
    with pytest.raises(MaskError, match="nothing to tune"):
        tune(model, values, anatomy, lambda: batches(rows))
    with pytest.raises(MaskError, match="nothing to tune"):
        tune(model, Mask(), anatomy, lambda: batches(rows))
    albert = tiny_family("albert").eval()
    of = read_anatomy(albert)
    with pytest.raises(MaskError, match="could not be folded") as caught:
        tune(albert, of.full_mask(), of, lambda: batches(rows))
    assert "3 times a pass" in str(caught.value.got)
    with pytest.raises(MaskError, match="another model"):
        fold(model, {anatomy.mlps[0].out.path: torch.ones(3)})
    with pytest.raises(MaskError, match="another model"):
        fold(model, {"no.such.module": torch.ones(3)})


def test_factors_beyond_the_limit_are_left_out_and_said(model: Any, rows: Encoded) -> None:
    anatomy = read_anatomy(model)
    tuning = tune(model, halved(anatomy), anatomy, lambda: batches(rows), damp=1e-6, limit=1e-6)
    assert not tuning.factors and set(tuning.left) == set(tuning.errors) and tuning.loss[0] == tuning.loss[1]
