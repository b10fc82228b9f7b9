"""Building blocks of the deep models: distributions, emission heads, transitions, encoders."""

from seqdgm.nn.encoders import (
    BidirectionalEncoder,
    Encoder,
    FilteringEncoder,
    GaussianProposal,
    MeanFieldEncoder,
    SmoothingEncoder,
)
from seqdgm.nn.heads import Head, emission_head, head_options_from_data
from seqdgm.nn.recurrent import RecurrentCell
from seqdgm.nn.transitions import GatedTransition

__all__ = [
    "BidirectionalEncoder",
    "Encoder",
    "FilteringEncoder",
    "GatedTransition",
    "GaussianProposal",
    "Head",
    "MeanFieldEncoder",
    "RecurrentCell",
    "SmoothingEncoder",
    "emission_head",
    "head_options_from_data",
]
