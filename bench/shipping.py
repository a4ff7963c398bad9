"""A shrunk model: whether fewer operations are less time, beside Torch-Pruning's of the same shape; and how soon it is there."""

import copy
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from measure import Figure, Setup, evenly, tuned
from tombola.anatomy import Anatomy, read_anatomy
from tombola.cut import outputs_of, parity, prove_same, shrink
from tombola.gates import Gates
from tombola.mask import Mask
from tombola.objective import load_weights
from tombola.search.structured import SPruneSettings, s_prune
from tombola.tasks import get_task, load_rows
from tombola.tasks.encode import encode
from tombola.timing import bench_models, runner_of

SHAPES = ((8, 128), (16, 128))  # from 1,000 tokens a batch on
SELECTION_ROWS = 500


def ship(setup: Setup, _: str) -> list[Figure]:
    """Half of the heads and of the neurons of each layer removed, unevenly: seven of twelve heads in one layer, five in the next.

    A layer that is emptied has no counterpart in Torch-Pruning, so there is none here.
    """
    model, anatomy = setup.model, setup.anatomy
    mask = half_of(anatomy)
    small, rival = shrink(model, mask, anatomy), by_torch_pruning(model, anatomy, mask)
    rows = {"input_ids": torch.randint(5, 1000, (2, 16)), "attention_mask": torch.ones(2, 16, dtype=torch.long)}
    assert parity(outputs_of(rival, rows), outputs_of(small, rows)).holds, "Torch-Pruning's model is another one"
    figures: list[Figure] = []
    runners = {"dense": runner_of("dense", model), "ours": runner_of("ours", small), "theirs": runner_of("theirs", rival)}
    for batch, length in SHAPES:
        timed = {t.model: t for t in bench_models(runners, ((batch, length),), setup.rounds).timings}
        ours, operations = timed["ours"].against_dense.median, timed["ours"].flops / timed["dense"].flops
        noise = timed["ours"].noise
        said = f"{batch}x{length}: time {ours:.3f} for operations {operations:.3f} of the dense model, noise {noise:.3f}"
        figures.append(Figure("ship", "", f"time/operations {batch}x{length}", [ours / operations], said))
        against = timed["ours"].seconds.median / timed["theirs"].seconds.median
        figures.append(
            Figure("ship", "", f"Torch-Pruning {batch}x{length}", [against], "our time by that of its model of this shape")
        )
    seconds = []
    for _round in range(max(5, setup.rounds)):
        start = time.process_time()  # of the processor: company on the machine is no work of ours
        shrink(model, mask, anatomy, share=True)
        seconds.append(1e3 * (time.process_time() - start))
    figures.append(
        Figure("ship", "", "apply, ms", [median(seconds)], "milliseconds of the processor to shrink the loaded model in memory")
    )
    wall, worked = find_to_save(setup)
    said = f"seconds from a checkpoint on disk, {SELECTION_ROWS} selection rows; {worked:.1f} of the processor"
    figures.append(Figure("ship", "", "find to save, s", [wall], said))
    return figures


def half_of(anatomy: Anatomy) -> Mask:
    """Of each layer five or seven of twelve heads, and every other neuron or two of three."""
    heads = torch.ones(anatomy.n_attentions, anatomy.n_heads, dtype=torch.bool)
    neurons = torch.ones(anatomy.n_layers, anatomy.mlps[0].d_ffn, dtype=torch.bool)
    for layer in range(anatomy.n_layers):
        heads[layer, : 5 + 2 * (layer % 2)] = False
        neurons[layer, :: 2 + layer % 2] = False
    return Mask(heads=heads, neurons=neurons)


def by_torch_pruning(model: Any, anatomy: Anatomy, mask: Mask) -> Any:
    """The same shape by Torch-Pruning's functions on linear layers; the number of heads is set by hand, as in its examples."""
    import torch_pruning

    rival = copy.deepcopy(model)
    assert mask.heads is not None and mask.neurons is not None
    for attention, kept in zip(anatomy.attentions, mask.heads, strict=True):
        gone = torch.nonzero(~kept.repeat_interleave(attention.d_head)).flatten().tolist()
        for projection in (attention.q, attention.k, attention.v):
            torch_pruning.prune_linear_out_channels(rival.get_submodule(projection.path), gone)
        torch_pruning.prune_linear_in_channels(rival.get_submodule(attention.o.path), gone)
        owner = rival.get_submodule(attention.q.path.rpartition(".")[0])
        owner.num_attention_heads = int(kept.sum())
        owner.all_head_size = owner.num_attention_heads * attention.d_head
    for mlp, of in zip(anatomy.mlps, mask.neurons, strict=True):
        gone = torch.nonzero(~of).flatten().tolist()
        for projection in mlp.ins:
            torch_pruning.prune_linear_out_channels(rival.get_submodule(projection.path), gone)
        torch_pruning.prune_linear_in_channels(rival.get_submodule(mlp.out.path), gone)
    return rival


def find_to_save(setup: Setup) -> tuple[float, float]:
    """Seconds, of the clock and of the processor, from a fine-tuned checkpoint on disk to a shrunk folder: load, s-prune on the
    selection rows, shrink, prove equal, save."""
    setup = tuned(setup, "acceptability")
    rows = load_rows(get_task("acceptability"), "report", data_dir=None)
    rows = rows.take(evenly(len(rows), min(SELECTION_ROWS, len(rows))))
    with tempfile.TemporaryDirectory() as folder:
        checkpoint: Any = setup.model
        checkpoint.save_pretrained(Path(folder) / "checkpoint")
        start, worked = time.perf_counter(), time.process_time()
        model = load_weights(Path(folder) / "checkpoint", get_task("acceptability").labels, head_seed=0)
        anatomy, selection = read_anatomy(model), encode(setup.tokenizer, rows, 128)
        with Gates(model, anatomy) as gates:
            found = s_prune(gates, selection, "matthews", SPruneSettings())
        small: Any = shrink(model, found.mask, anatomy)
        prove_same(model, anatomy, found.mask, small)
        small.save_pretrained(Path(folder) / "small")
        return time.perf_counter() - start, time.process_time() - worked
