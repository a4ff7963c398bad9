"""The steps of attention: maps of a model classified and described head by head, and a classifier trained for them.

A map is seen once and forgotten: what is kept of it are counts and sums of its head, and a few samples to look at.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from annotated_types import Ge
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from tombola.anatomy import Anatomy, Projection, read_anatomy
from tombola.attention.describe import Descriptors, describe, token_groups
from tombola.attention.known import CLASSES
from tombola.attention.labelled import labelled_maps
from tombola.attention.maps import AttentionMap, attention_maps
from tombola.attention.patterns import (
    FoldScores,
    PatternClassifier,
    PatternNet,
    PatternSettings,
    card,
    k_fold,
    scored,
    shipped,
    train,
)
from tombola.objective import load_weights
from tombola.study.cells import Cell, Lab, read_json, write_json, write_rows
from tombola.study.data import base_folder, encoded_rows, layout_of, same_data, tokenizer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Progress = Callable[[float], None]
KINDS = ("raw", "weighted")
SAMPLES, SAMPLE_TOKENS = 2, 48  # maps kept of each kind and class, and their largest size
TEST_SHARE = 0.2  # of the labelled maps, where a classifier is held against a part of them

NormMapWeight = Literal["out_projection", "untransposed"]
MapInputs = Literal["full_real_tokens", "full", "no_segment_ids_with_pad"]
MapPreprocess = Literal["same", "same_padded", "train_padded_predict_unpadded"]
PatternSplit = Literal["stratified_kfold", "holdout", "select_on_test"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSettings:
    """Which maps, and how they are classified. The defaults are the `corrected` column."""

    map_rows: Annotated[int, Ge(1)] = 100  # report rows, drawn by split_seed: the same for every run seed
    min_tokens: Annotated[int, Ge(4)] = 16  # of shorter rows no map is taken
    norm_map_weight: NormMapWeight = "out_projection"
    map_inputs: MapInputs = "full_real_tokens"
    map_preprocess: MapPreprocess = "same"
    # On which labelled maps the classifier's F1 is measured: each once by a net that has not seen it; a fifth held out; or a
    # fifth that also chose the epoch, as released
    pattern_split: PatternSplit = "stratified_kfold"

    @property
    def as_shipped(self) -> bool:
        """Whether the classifier that comes with tombola is the one that is asked for."""
        return self.map_preprocess == "same" and self.pattern_split == "stratified_kfold"


# ------------------------------------------------------------------------------------------------------------ classifier


def run_patterns(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """A classifier of raw and one of norm-weighted maps: `patterns.safetensors`, and in `patterns.json` what they are worth.

    Of each kind: maps, pattern_split, weighted_f1, confusion [label][predicted] in the order of `classes`.
    """
    asked, tensors, said = cell.settings["patterns"], dict[str, Tensor](), dict[str, Any]()
    settings = PatternSettings(**{name: value for name, value in asked.items() if name != "pattern_split"})
    for i, kind in enumerate(KINDS):
        labelled = labelled_maps(kind)
        classifier, worth = SPLITS[asked["pattern_split"]](list(labelled.maps), list(labelled.labels), settings)
        tensors |= {f"{kind}.{name}": value.contiguous() for name, value in classifier.net.state_dict().items()}
        said[kind] = {
            "maps": int(worth.confusion.sum()),
            "weighted_f1": worth.weighted_f1,
            "confusion": worth.confusion.tolist(),
            "trained_padded_to": classifier.trained_padded_to,
            "pad_to": classifier.pad_to,
        }
        progress((i + 1) / len(KINDS))
    save_file(tensors, out / "patterns.safetensors")
    write_json(out / "patterns.json", said | {"classes": list(CLASSES), "pattern_split": asked["pattern_split"]})


def _folds(maps: list[Tensor], labels: list[int], settings: PatternSettings) -> tuple[PatternClassifier, FoldScores]:
    """Trained on all maps; worth what five nets are on the maps that each has not seen."""
    generated = train([], [], settings) if settings.map_preprocess == "same" else None  # else its padding is not that of the maps
    return train(maps, labels, settings, generated), k_fold(maps, labels, settings, start=generated)


def _holdout(maps: list[Tensor], labels: list[int], settings: PatternSettings) -> tuple[PatternClassifier, FoldScores]:
    seen, unseen = _stratified(labels, settings.seed)
    classifier = train([maps[i] for i in seen], [labels[i] for i in seen], settings)
    return classifier, _worth(classifier, maps, labels, unseen)


def _select_on_test(maps: list[Tensor], labels: list[int], settings: PatternSettings) -> tuple[PatternClassifier, FoldScores]:
    """As released: the epoch with the best F1 on the test maps is kept, and that F1 reported. Moments start anew each epoch."""
    seen, unseen = _stratified(labels, settings.seed)
    of_seen = [maps[i] for i in seen], [labels[i] for i in seen]
    classifier = train(*of_seen, replace(settings, real_epochs=1))
    best = classifier, _worth(classifier, maps, labels, unseen)
    for epoch in range(1, settings.real_epochs):
        classifier = train(*of_seen, replace(settings, real_epochs=1, seed=settings.seed + epoch), classifier)
        worth = _worth(classifier, maps, labels, unseen)
        if worth.weighted_f1 > best[1].weighted_f1:
            best = classifier, worth
    return best


SPLITS: Mapping[str, Callable[[list[Tensor], list[int], PatternSettings], tuple[PatternClassifier, FoldScores]]] = {
    "stratified_kfold": _folds,
    "holdout": _holdout,
    "select_on_test": _select_on_test,
}


def _stratified(labels: list[int], seed: int) -> tuple[list[int], list[int]]:
    """(trained on, tested on): of each class a fifth of its maps is tested on, at least one of a class of two or more."""
    draw, tested = random.Random(seed), list[int]()
    for label in sorted(set(labels)):
        of = [i for i, one in enumerate(labels) if one == label]
        tested += draw.sample(of, max(round(TEST_SHARE * len(of)), 1) if len(of) > 1 else 0)
    return [i for i in range(len(labels)) if i not in set(tested)], sorted(tested)


def _worth(classifier: PatternClassifier, maps: list[Tensor], labels: list[int], at: list[int]) -> FoldScores:
    return scored([labels[i] for i in at], classifier.classify([maps[i] for i in at]))


def _classifiers(cell: Cell, lab: Lab) -> tuple[dict[str, PatternClassifier], dict[str, float]]:
    """Kind of map → its classifier, and what that is worth (weighted F1)."""
    if "patterns" not in cell.inputs:
        worth = {kind: float(card()["nets"][kind]["folds"]["weighted_f1"]) for kind in KINDS}
        return {kind: shipped(kind) for kind in KINDS}, worth
    folder = lab.folder(cell.inputs["patterns"])
    said, stored, found = read_json(folder / "patterns.json"), load_file(folder / "patterns.safetensors"), {}
    for kind in KINDS:
        net = PatternNet()
        net.load_state_dict({name.removeprefix(f"{kind}."): x for name, x in stored.items() if name.startswith(f"{kind}.")})
        found[kind] = PatternClassifier(net.eval(), said[kind]["trained_padded_to"], said[kind]["pad_to"])
    return found, {kind: float(said[kind]["weighted_f1"]) for kind in KINDS}


# ------------------------------------------------------------------------------------------------------------------ maps


class _OfHeads:
    """Counts and sums over the maps of the heads of one block, of one kind."""

    def __init__(self, n_heads: int) -> None:
        self.counts = torch.zeros(n_heads, len(CLASSES), dtype=torch.int64)
        self.unclassified = torch.zeros(n_heads, dtype=torch.int64)
        self.sums: dict[str, Tensor] = {}
        self.described = torch.zeros(n_heads, dtype=torch.int64)

    def describe(self, said: Descriptors) -> None:
        """Adds one row; a map of zeros has no descriptors, and is left out."""
        values = {"entropy": said.entropy, "distance": said.distance, "previous": said.previous, "self": said.self}
        values |= {"next": said.next} | {f"mass_{name}": mass for name, mass in said.mass.items()}
        there = said.entropy.isfinite()
        self.described += there
        for name, value in values.items():
            total = self.sums.setdefault(name, torch.zeros(len(there), dtype=torch.float64))
            total += torch.where(there, value.double(), 0.0)

    def rows(self) -> list[dict[str, Any]]:
        """One row a head."""
        found = []
        for head, (counts, described) in enumerate(zip(self.counts.tolist(), self.described.tolist(), strict=True)):
            n = sum(counts)
            means = {name: float(total[head]) / described if described else None for name, total in self.sums.items()}
            found.append(
                {"head": head, "n": n, "unclassified": int(self.unclassified[head])}
                | {"counts": dict(zip(CLASSES, counts, strict=True))}
                | {"shares": {name: count / n for name, count in zip(CLASSES, counts, strict=True)} if n else {}}
                | {"means": means}
            )
        return found


def run_attention(cell: Cell, lab: Lab, out: Path, progress: Progress) -> None:
    """Every head of one model, fine-tuned (input `weights`) or as it was pre-trained, on a sample of report rows.

    attention.jsonl      a row for each block of self-attention, head and kind of map: classes (counts, shares, n) and means
    samples.jsonl        a few maps of each kind and class, drawn by chance; their pixels are in samples.safetensors
    samples.safetensors  name → uint8 [query, key], the largest entry 255
    magnitudes.jsonl     mean |weight| of each head and MLP
    """
    settings = AttentionSettings(**cell.settings["attention"])
    data, tuned = same_data(cell, lab), cell.inputs.get("weights")
    folder = base_folder(lab, cell.settings["model"]) if tuned is None else lab.folder(tuned) / "weights"
    model = load_weights(folder, data.task.objective, head_seed=0)
    anatomy = read_anatomy(model, layout_of(cell.settings["model"]))
    model.to(cell.settings["machine"]["device"])
    lengths = encoded_rows(lab, cell, "report", data.report).lengths
    eligible = [i for i, length in enumerate(lengths) if length >= settings.min_tokens]
    drawn = random.Random(cell.settings["data"]["split_seed"])
    chosen = sorted(drawn.sample(eligible, min(settings.map_rows, len(eligible))))
    which = "pretrained" if tuned is None else "fine_tuned"
    seed = cell.settings["seeds"]["run"] if tuned is not None else None
    said = {"model": cell.settings["model"]["name"], "task": cell.settings["data"]["task"], "seed": seed, "weights": which}
    how = {name: asdict(settings)[name] for name in ("norm_map_weight", "map_inputs", "map_preprocess", "pattern_split")}
    found: dict[tuple[int, int, str], _OfHeads] = {}
    samples: dict[tuple[str, int], list[tuple[float, dict[str, Any], Tensor]]] = {}
    classifiers, worth = _classifiers(cell, lab)
    if chosen:
        encoded = encoded_rows(lab, cell, f"attention {settings.map_rows} {settings.min_tokens}", data.report.take(chosen))
        tokenizer, inputs = tokenizer_of(lab, cell), settings.map_inputs
        streamed = attention_maps(model, anatomy, encoded, norm_map_weight=settings.norm_map_weight, map_inputs=inputs)
        for done, row in enumerate(streamed):
            groups = token_groups(tokenizer, row.tokens)
            own = [one for one in row.maps if one.kind == "self"]  # maps across two texts have no diagonal
            for kind in KINDS:
                _add(kind, own, groups, classifiers[kind], found, samples, drawn, row.id)
            progress((done + 1) / len(encoded))
    rows = [
        said | how | {"layer": block, "run": run, "kind": kind, "f1": worth[kind], "split": data.task.splits["report"]} | one
        for (block, run, kind), of in sorted(found.items())
        for one in of.rows()
    ]
    write_rows(out / "attention.jsonl", rows)
    kept = [(meta, pixels) for _, several in sorted(samples.items()) for _, meta, pixels in several]
    write_rows(out / "samples.jsonl", (said | {"name": str(i)} | meta for i, (meta, _) in enumerate(kept)))
    save_file({str(i): pixels for i, (_, pixels) in enumerate(kept)}, out / "samples.safetensors")
    write_rows(out / "magnitudes.jsonl", (said | one for one in magnitudes(model, anatomy)))
    few = f"only {len(chosen)} of {settings.map_rows} rows asked for have {settings.min_tokens} tokens or more"
    lost = sum(int(of.unclassified.sum()) for of in found.values())
    warnings = [few] if len(chosen) < settings.map_rows else []
    warnings += [f"{lost} maps are of zeros and have no class: heads whose weights are zero"] if lost else []
    write_json(out / "result.json", {"warnings": warnings})


def _add(
    kind: str,
    own: list[AttentionMap],
    groups: Mapping[str, Tensor],
    classifier: PatternClassifier,
    found: dict[tuple[int, int, str], _OfHeads],
    samples: dict[tuple[str, int], list[tuple[float, dict[str, Any], Tensor]]],
    drawn: random.Random,
    row: str,
) -> None:
    """Adds the maps of one row, of one kind: all heads of all blocks are classified together."""
    maps = [one.raw if kind == "raw" else one.weighted for one in own]
    every = [(i, head) for i, of in enumerate(maps) for head in range(len(of)) if float(of[head].max()) > 0]
    for one, of in zip(own, maps, strict=True):
        heads = found.setdefault((one.block, one.run, kind), _OfHeads(len(of)))
        heads.describe(describe(of, groups))
        heads.unclassified += 1
    likely = classifier.probabilities([maps[i][head] for i, head in every]).tolist() if every else []
    for (i, head), chances in zip(every, likely, strict=True):
        block, label, one_map = own[i], max(range(len(CLASSES)), key=chances.__getitem__), maps[i][head]
        heads = found[block.block, block.run, kind]
        heads.counts[head, label] += 1
        heads.unclassified[head] -= 1
        lot, some = drawn.random(), samples.setdefault((kind, label), [])
        # Those with the lowest lots are kept: each map has the same chance.
        if len(one_map) <= SAMPLE_TOKENS and (len(some) < SAMPLES or lot < some[-1][0]):
            meta = {"kind": kind, "label": CLASSES[label], "probability": chances[label], "row": row, "tokens": len(one_map)}
            pixels = (255 * one_map / one_map.max()).round().to(torch.uint8)
            some.append((lot, meta | {"layer": block.block, "run": block.run, "head": head}, pixels))
            some.sort(key=lambda kept: kept[0])
            del some[SAMPLES:]


@torch.no_grad()
def magnitudes(model: "PreTrainedModel", anatomy: Anatomy) -> list[dict[str, Any]]:
    """Mean |weight| of each head (its rows of q, k and v, its columns of o) and of each MLP; biases left out.

    One row {part, layer, head or None, mean_abs} a part. A kv-head counts for every head that reads it.
    """
    rows: list[dict[str, Any]] = []
    for block, one in enumerate(anatomy.attentions):
        of_q, of_k, of_v, of_o = (_sizes(model, p) for p in (one.q, one.k, one.v, one.o))
        shared = one.n_heads // one.n_kv_heads
        parts: list[Float[Tensor, " head"]] = [of_q.reshape(one.n_heads, -1).sum(1)]
        parts += [x.reshape(one.n_kv_heads, -1).sum(1).repeat_interleave(shared) for x in (of_k, of_v)]
        parts.append(of_o.T.reshape(one.n_heads, -1).sum(1))
        n = (of_q.numel() + shared * (of_k.numel() + of_v.numel()) + of_o.numel()) / one.n_heads
        means = (torch.stack(parts).sum(0) / n).tolist()
        rows += [{"part": "heads", "layer": block, "head": head, "mean_abs": mean} for head, mean in enumerate(means)]
    for layer, mlp in enumerate(anatomy.mlps):
        weights = [_sizes(model, p) for p in mlp.projections]
        mean = float(sum(x.sum() for x in weights)) / sum(x.numel() for x in weights)
        rows.append({"part": "mlps", "layer": layer, "head": None, "mean_abs": mean})
    return rows


def _sizes(model: "PreTrainedModel", projection: Projection) -> Float[Tensor, "n_out n_in"]:
    return projection.rows(model.get_parameter(f"{projection.path}.weight").detach()).abs().double()
