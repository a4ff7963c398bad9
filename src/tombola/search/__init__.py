"""Searches: procedures that give a ticket. One file each, one row here."""

from tombola.search.structured import SPruneSettings, s_prune

# method -> (search, its settings). The name on the command line is the key.
SEARCHES = {"s-prune": (s_prune, SPruneSettings)}
