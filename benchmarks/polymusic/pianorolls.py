"""The piano rolls of Boulanger-Lewandowski, Bengio and Vincent (2012), and two simple baselines.

Every likelihood here is in nats per time step: the total over the sequences divided by the total
number of steps, the first step of each sequence included.
"""

from __future__ import annotations

import sys

import numpy as np

import seqdgm as sq

FILES = {"jsb": "jsb", "nottingham": "nottingham", "muse": "musedata", "piano": "piano_midi"}
Sequences = list[np.ndarray]


def load(name: str) -> dict[str, Sequences]:
    """Parts "train", "valid" and "test" of a data set: arrays of 0 and 1, (time, 88).

    They are downloaded once, or read from the folder that SEQDGM_DATA names.
    """
    try:
        found = sq.datasets.load(FILES[name])
    except OSError as error:
        sys.exit(str(error))
    return {"train": found.train, "valid": found.valid, "test": found.test}


def transposed(rolls: Sequences, semitones: int) -> Sequences:
    """Every sequence in all keys up to `semitones` lower and higher, itself included.

    A copy whose notes would leave the keyboard is left out.
    """
    copies = list(rolls)
    for roll in rolls:
        played = np.flatnonzero(roll.any(axis=0))
        lowest = max(-semitones, -played[0])
        highest = min(semitones, roll.shape[1] - 1 - played[-1])
        shifts = [shift for shift in range(lowest, highest + 1) if shift]
        copies += [np.roll(roll, shift, axis=1) for shift in shifts]
    return copies


def independent_keys(train: Sequences, test: Sequences) -> float:
    """Each key as often as in training (with half a count more on either side)."""
    played = _share(sum(roll.sum(0) for roll in train), sum(map(len, train)))
    return _per_step([_log_bernoulli(roll, played) for roll in test])


def markov_chain(train: Sequences, test: Sequences) -> float:
    """Each key given itself one step before; the first step as `independent_keys` has it."""
    before = np.concatenate([roll[:-1] for roll in train])
    after = np.concatenate([roll[1:] for roll in train])
    after_on = _share((before * after).sum(0), before.sum(0))
    after_off = _share(((1 - before) * after).sum(0), (1 - before).sum(0))
    first = _share(sum(roll.sum(0) for roll in train), sum(map(len, train)))
    terms = []
    for roll in test:
        later = np.where(roll[:-1] == 1, after_on, after_off)
        terms.append(_log_bernoulli(roll, np.concatenate([first[None], later])))
    return _per_step(terms)


def _share(count: np.ndarray, of: np.ndarray | int) -> np.ndarray:
    return (count + 0.5) / (np.asarray(of) + 1.0)


def _log_bernoulli(roll: np.ndarray, played: np.ndarray) -> np.ndarray:
    return np.where(roll == 1, np.log(played), np.log1p(-played))


def _per_step(terms: Sequences) -> float:
    return float(-sum(part.sum() for part in terms) / sum(map(len, terms)))
