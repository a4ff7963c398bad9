"""Statistics of few seeds and small splits: numbers in, estimates out, and a reason wherever there is no number.

Read `Estimate` first: every interval leaves here as one. What has no answer (one seed, an empty mask, raters who never
vary) is None with a `note` that says why, never NaN; what is no question at all (more right answers than rows) raises.
Whatever is drawn (permutations, resamples) is drawn from a fixed `seed`: the same numbers in, the same numbers out.
A leaf: it knows no models, no tickets, no files.

    estimate     Estimate; means over seeds, shares and metrics of rows; medians
    paired       two models on the same seeds or rows, and a family of such tests
    power        what n seeds and n rows can show at all
    matching     whether a ticket is as good as the dense model, by four rules; transfer matrices
    masks        what masks share: two of them, those of several seeds, those of two tasks
    survivors    what seeds do not agree on; survival against kinds of attention map
    crossed      what masks depend on, when every combination of several factors was run
    mantel       whether two similarities of the same things go together
    orders       whether two importances rank the same parts first
"""

from tombola.stats.crossed import Split, split_variance
from tombola.stats.estimate import (
    ALPHA,
    DRAWS,
    LEVEL,
    POWER,
    Band,
    Estimate,
    band,
    difference_over_rows,
    metric_over_rows,
    over_rows,
    over_seeds,
    share_over_rows,
)
from tombola.stats.mantel import Mantel, mantel
from tombola.stats.masks import (
    CochranQ,
    Overlap,
    Stability,
    TaskOverlap,
    cochran_pairs,
    cochran_q,
    fleiss_kappa,
    kappa_of_votes,
    krippendorff_alpha,
    mean_jaccard,
    overlap,
    overlap_of_counts,
    overlap_of_tasks,
    stability,
)
from tombola.stats.matching import (
    MARGIN,
    Match,
    Transfer,
    Universal,
    certainly_lost,
    dark_counts,
    highest_matching,
    matching,
    transfers,
    universal,
)
from tombola.stats.orders import Orders, compare_orders, rank_biased_overlap, spearman
from tombola.stats.paired import (
    Corrected,
    Paired,
    correct,
    mcnemar,
    mcnemar_of_counts,
    paired_over_rows,
    paired_over_seeds,
    two_level,
)
from tombola.stats.power import (
    smallest_detectable_difference,
    smallest_difference_over_seeds,
    smallest_paired_difference,
    smallest_two_sided_p,
)
from tombola.stats.survivors import Undecided, survivor_correlation, undecided

__all__ = [
    "ALPHA",
    "DRAWS",
    "LEVEL",
    "MARGIN",
    "POWER",
    "Band",
    "CochranQ",
    "Corrected",
    "Estimate",
    "Mantel",
    "Match",
    "Orders",
    "Overlap",
    "Paired",
    "Split",
    "Stability",
    "TaskOverlap",
    "Transfer",
    "Undecided",
    "Universal",
    "band",
    "certainly_lost",
    "cochran_pairs",
    "cochran_q",
    "compare_orders",
    "correct",
    "dark_counts",
    "difference_over_rows",
    "fleiss_kappa",
    "highest_matching",
    "kappa_of_votes",
    "krippendorff_alpha",
    "mantel",
    "matching",
    "mcnemar",
    "mcnemar_of_counts",
    "mean_jaccard",
    "metric_over_rows",
    "over_rows",
    "over_seeds",
    "overlap",
    "overlap_of_counts",
    "overlap_of_tasks",
    "paired_over_rows",
    "paired_over_seeds",
    "rank_biased_overlap",
    "share_over_rows",
    "smallest_detectable_difference",
    "smallest_difference_over_seeds",
    "smallest_paired_difference",
    "smallest_two_sided_p",
    "spearman",
    "split_variance",
    "stability",
    "survivor_correlation",
    "transfers",
    "two_level",
    "undecided",
    "universal",
]
