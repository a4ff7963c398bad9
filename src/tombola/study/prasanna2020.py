"""Prasanna et al. 2020, "When BERT Plays the Lottery, All Tickets Are Winning": the study as tombola runs it.

The experiments are rows of `tombola.study.experiments.EXPERIMENTS` (E1 to E5 here). Sizes are the paper's: BERT-base, the
nine tasks of GLUE, five seeds, three epochs, one draw of each control a seed. More draws (`--set controls.draws=5`) tell the
spread over draws from that over seeds.
"""

from collections.abc import Mapping
from typing import Any

STUDY: Mapping[str, Any] = {
    "name": "prasanna2020",
    "about": "Prasanna et al. 2020: m-pruning and s-pruning of BERT on GLUE, good tickets against random and bad ones",
    "model": "google-bert/bert-base-uncased",
    "tasks": ["cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"],
    "seeds": [0, 1, 2, 3, 4],
    "preset": "corrected",
    "experiments": ["m-prune", "s-prune", "s-prune-heads", "s-prune-mlps", "controls"],
    "options": {"controls": {"of": ["s-prune", "m-prune"], "kinds": ["random", "bad"], "draws": 1, "retrain": True}},
}
