"""What heads attend to: maps of the live model, numbers that describe a map, and the five classes of patterns.

maps       raw and norm-weighted maps, row by row, in bounded memory
describe   entropy, distance to the diagonal, mass on special tokens and punctuation
known      a generator of maps whose class is known
patterns   the classifier of Prasanna et al. 2020: a small CNN, its training, its weights, its folds
sheets     pictures of maps, to be labelled by eye
labelled   maps with labels by eye: our own, and the published layout
"""
