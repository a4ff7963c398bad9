"""Searches: procedures that give a ticket. One file each, one row here."""

from collections.abc import Callable
from typing import Any

from tombola.search.imp import ImpSettings, imp
from tombola.search.learned import LearnedSettings
from tombola.search.magnitude import MPruneSettings, m_prune
from tombola.search.one_shot import OneShotSettings, one_shot
from tombola.search.scored import learn_mask
from tombola.search.structured import SPruneSettings, s_prune

# method -> (search, its settings). The name on the command line is the key.
SEARCHES: dict[str, tuple[Callable[..., Any], type[Any]]] = {
    "s-prune": (s_prune, SPruneSettings),
    "m-prune": (m_prune, MPruneSettings),
    "one-shot": (one_shot, OneShotSettings),
    "learned": (learn_mask, LearnedSettings),
    "imp": (imp, ImpSettings),
}
