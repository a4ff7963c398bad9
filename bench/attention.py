"""Norm-weighted attention maps: time and memory beside the explicit tensor [head, query, key, d]."""

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from measure import Figure, Result, Setup
from tombola.attention.maps import attention_maps, batch_maps
from tombola.tasks import get_task, load_rows
from tombola.tasks.base import Rows
from tombola.tasks.encode import Encoded, collate, encode
from ways import WIDTH

ROWS = 4


def attention(setup: Setup, task: str) -> list[Figure]:
    """Raw and norm-weighted maps of four rows of 128 tokens, one row at a time, forward pass included.

    explicit    f(x_j) of all heads, times α: [head, query, key, d] for one layer and row at a time, then its norm over d

    Both run the same eager forward pass; what differs is how the norms come about, and ours checks its first batch. Asserted:
    equal maps; the bytes of the tensor, and of what ours hands out, by formula; and that ours never holds as much as a
    twentieth of the tensor.
    """
    rows = _long_rows(setup)
    layers, heads, d = setup.anatomy.n_layers, setup.anatomy.n_heads, setup.anatomy.attentions[0].o.n_out
    tensor = heads * WIDTH * WIDTH * d * 4
    handed = layers * heads * (WIDTH * WIDTH + WIDTH) * 4

    def ours() -> float:
        largest = 0.0
        for row in attention_maps(setup.model, setup.anatomy, rows, entries_per_batch=1):
            assert sum(one.raw.nbytes + one.norms.nbytes for one in row.maps) == handed
            for one in row.maps:
                largest = max(largest, float(one.weighted.max()))
            del row, one  # as who streams does
        return largest

    def explicit() -> float:
        return max(float(one.max()) for i in range(len(rows)) for one in _explicit(setup, rows, i))

    _assert_same(setup, rows, tensor)
    peaks = {way: _peak(run) for way, run in (("ours", ours), ("explicit", explicit))}
    assert peaks["explicit"] >= tensor and peaks["ours"] <= tensor / 20, f"{peaks} bytes, the tensor has {tensor}"
    ratios = []
    for _ in range(setup.rounds):
        (mine, a), (theirs, b) = _timed(ours), _timed(explicit)
        assert abs(a - b) <= 1e-4 * b
        ratios.append(theirs / mine)
    told = f"{ROWS} rows of {WIDTH} tokens, one at a time, forward pass included; seconds, × ours"
    space = f"peak bytes above the model's own, × those of explicit: {peaks['ours']:,} and {peaks['explicit']:,}"
    space += f"; the tensor of a layer and row has {tensor:,}"
    return [
        Figure("attention", task, "explicit", ratios, told),
        Figure("attention", task, "memory", [peaks["ours"] / peaks["explicit"]], space),
    ]


def _long_rows(setup: Setup) -> Encoded:
    """Generated sentences, one after the other until 128 tokens are full."""
    texts = load_rows(get_task("acceptability:report_rows=400"), "report", data_dir=None).texts
    joined = tuple((" ".join(text for (text,) in texts[i::ROWS]),) for i in range(ROWS))
    rows = encode(setup.tokenizer, Rows(tuple(map(str, range(ROWS))), joined, (0,) * ROWS), WIDTH)
    assert rows.lengths == [WIDTH] * ROWS
    return rows


@torch.no_grad()
def _explicit(setup: Setup, rows: Encoded, row: int) -> list[Tensor]:
    """The norm-weighted maps of a row, block by block, as the definition has them."""
    inputs = {name: x for name, x in collate(rows, [row]).items() if name != "labels"}
    values: list[Tensor] = []
    handles = [
        setup.model.get_submodule(one.v.path).register_forward_hook(lambda _, __, out: values.append(out))
        for one in setup.anatomy.attentions
    ]
    try:
        maps = batch_maps(setup.model, setup.anatomy, inputs, prove=False)
    finally:
        for handle in handles:
            handle.remove()
    weighted = []
    for one, value, block in zip(maps, values, setup.anatomy.attentions, strict=True):
        columns = setup.model.get_parameter(f"{block.o.path}.weight").T.reshape(block.n_heads, block.d_head, -1)
        f = torch.einsum("khd,hdo->hko", value[0].reshape(len(value[0]), block.n_heads, -1), columns)
        weighted.append((one.raw[0][..., None] * f[:, None]).norm(dim=-1))  # the tensor, and then its norm
    return weighted


def _assert_same(setup: Setup, rows: Encoded, tensor: int) -> None:
    """That both give the same maps of every row, and that the tensor has the bytes that the formula says."""
    for row in attention_maps(setup.model, setup.anatomy, rows, entries_per_batch=1):
        for one, other in zip(row.maps, _explicit(setup, rows, row.row), strict=True):
            assert one.weighted.numel() * setup.anatomy.attentions[one.block].o.n_out * 4 == tensor
            off = float((one.weighted - other).abs().max() / other.max())
            assert off < 1e-4, f"block {one.block}: the ways disagree by {off:.1e} of the largest value"


def _peak(run: Callable[[], object]) -> int:
    """The most bytes held at a time while `run()` runs, above what was held before, by torch's own record of its allocations."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _timed(run: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result
