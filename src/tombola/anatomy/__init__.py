"""What a transformer is made of: layers, each with attention and an MLP.

`read_anatomy` finds the parts by structure, without asking for a model's name: one traced forward pass shows in which order the
projections of a repeated block run and which of them share an input, and that tells their roles. A second pass then *proves* the
reading with numbers: one channel of a projection is perturbed, and only the slice that the reading predicts may move. What cannot
be proved is refused. A reading can also be given by hand (`Layout`); it is proved in the same way.

    parts    the values: projections, attention, MLPs, layers, sizes of masks
    read     structure → values
    prove    values → proof on the live model
"""

from tombola.anatomy.parts import (
    MLP,
    Anatomy,
    Attention,
    Layer,
    Layout,
    Projection,
    Size,
    layers_of_heads,
    same_anatomy,
    size_of,
)
from tombola.anatomy.probe import by_row, evaluating, probe_inputs
from tombola.anatomy.prove import prove
from tombola.anatomy.read import read_anatomy

__all__ = [
    "MLP",
    "Anatomy",
    "Attention",
    "Layer",
    "Layout",
    "Projection",
    "Size",
    "by_row",
    "evaluating",
    "layers_of_heads",
    "probe_inputs",
    "prove",
    "read_anatomy",
    "same_anatomy",
    "size_of",
]
