"""Resampling schemes, their conditional versions, and the evidence that they leave unbiased."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from torch.distributions import Categorical, Normal

import seqdgm as sq
from seqdgm.inference import smc
from seqdgm.inference.resampling import (
    CONDITIONAL,
    RESAMPLERS,
    adaptive,
    effective_sample_size,
    find_resampler,
    resample_from,
    select,
    weigh,
)
from seqdgm.inference.smc import Reference, SMCOptions, Step
from seqdgm.prepare import prepare
from seqdgm.types import Batch

SCHEMES = sorted(RESAMPLERS)
WEIGHTS = [0.42, 0.0, 0.27, 0.01, 0.3]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rows(weights: list[float], n: int) -> torch.Tensor:
    return torch.tensor(weights).double().log().expand(n, len(weights)).contiguous()


def count(ancestors: torch.Tensor) -> np.ndarray:
    """Offspring (row, particle)."""
    width = ancestors.shape[1]
    return torch.nn.functional.one_hot(ancestors, width).sum(1).double().numpy()


def within(values: np.ndarray, target: np.ndarray | float, errors: float = 5.0) -> None:
    """Mean over the first axis lies within so many standard errors of the target."""
    stderr = values.std(0, ddof=1) / np.sqrt(len(values))
    gap = np.abs(values.mean(0) - target)
    assert np.all(gap <= errors * stderr + 1e-12), (values.mean(0), target, stderr)


def repeat(batch: Batch, n: int) -> Batch:
    """Every series `n` times in a row."""
    return batch.take(torch.arange(batch.n_series).repeat_interleave(n))


# ---------------------------------------------------------------------------------- schemes


@pytest.mark.parametrize("scheme", SCHEMES)
def test_offspring_are_unbiased(scheme: str) -> None:
    out = RESAMPLERS[scheme](rows(WEIGHTS, 20_000), generator())
    offspring = count(out.ancestors)
    within(offspring, 5 * np.array(WEIGHTS))
    assert offspring[:, 1].max() == 0
    assert torch.equal(out.log_weights, torch.full_like(out.log_weights, -np.log(5)))
    if scheme == "systematic":
        assert np.all(np.abs(offspring - 5 * np.array(WEIGHTS)) < 1)
    if scheme == "residual":
        assert np.all(offspring >= np.floor(5 * np.array(WEIGHTS)))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_equal_weights_keep_every_particle_where_the_scheme_is_balanced(scheme: str) -> None:
    offspring = count(RESAMPLERS[scheme](rows([0.25] * 4, 50), generator()).ancestors)
    assert (offspring == 1).all() == (scheme != "multinomial")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_selection_is_weighing_and_then_adaptive_resampling(scheme: str, threshold: float) -> None:
    log_weights = 2 * torch.randn(9, 4, dtype=torch.float64, generator=generator(3))
    log_weights[2] = 5.0
    own, theirs = generator(1), generator(1)
    for survivors in (9, 6, 3):
        weighed = weigh(log_weights)
        found = select(log_weights, survivors, scheme, threshold, own)  # type: ignore[arg-type]
        kept, ess = weighed.log_weights[:survivors], weighed.ess[:survivors]
        wanted = adaptive(RESAMPLERS[scheme], threshold)(kept, ess, theirs)
        assert (wanted is None) == (found.ancestors is None) == (threshold == 0)
        if wanted is None:
            assert torch.equal(found.log_weights, kept)
            continue
        assert torch.equal(found.log_weights, wanted[0].log_weights)
        assert torch.equal(found.ancestors, wanted[0].ancestors)
        assert torch.equal(found.resampled, wanted[1])
        assert bool(found.resampled.all()) == (threshold == 1)
    assert torch.equal(own.get_state(), theirs.get_state())


def test_selection_names_the_series_that_has_no_weight() -> None:
    log_weights = rows(WEIGHTS, 3)
    log_weights[1] = -torch.inf
    with pytest.raises(ValueError, match="log_weights of series 1: no weight is positive"):
        select(log_weights, 3, "systematic", 0.5, generator())


def test_adaptive_resampling_leaves_balanced_series_alone() -> None:
    log_weights = torch.cat([rows([0.25] * 4, 1), rows([0.97, 0.01, 0.01, 0.01], 1)])
    resample = adaptive(RESAMPLERS["multinomial"], 0.5)
    ess = effective_sample_size(log_weights)
    done = resample(log_weights, ess, generator())
    assert done is not None
    assert done[1].tolist() == [False, True]
    assert done[0].ancestors[0].tolist() == [0, 1, 2, 3]
    assert torch.equal(done[0].log_weights[0], log_weights[0])
    assert resample(log_weights[:1], ess[:1], generator()) is None


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no resampler 'branching'.*killing"):
        find_resampler("branching")
    with pytest.raises(ValueError, match="no conditional resampler"):
        find_resampler("branching", conditional=True)


# ----------------------------------------------------------------------- conditional schemes


@pytest.mark.parametrize("weights", [WEIGHTS, [0.1, 0.6, 0.3], [0.5, 0.25, 0.25], [0.07, 0.93]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_conditional_law_is_the_law_given_the_reference(scheme: str, weights: list[float]) -> None:
    """P(offspring | a_0 = 0) is proportional to P(offspring) times the offspring of particle 0."""
    n, width = 20_000, len(weights)
    given = CONDITIONAL[scheme](rows(weights, n), generator(1)).ancestors
    assert (given[:, 0] == 0).all()
    log_weights = rows(weights, n)
    start = torch.randint(width, (n, 1), generator=generator(2))
    turn = (torch.arange(width) + start) % width
    free = RESAMPLERS[scheme](torch.gather(log_weights, 1, turn), generator(3)).ancestors
    offspring = count(torch.gather(turn, 1, free))
    biased = offspring * offspring[:, :1] / (width * weights[0])
    within(np.concatenate([count(given), -biased]) * 2, 0.0)
    pairs = list(itertools.combinations(range(width), 2))
    product = np.array([count(given)[:, i] * count(given)[:, j] for i, j in pairs]).T
    reference = np.array([biased[:, i] * offspring[:, j] for i, j in pairs]).T
    within(np.concatenate([product, -reference]) * 2, 0.0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_another_particle_can_be_the_ancestor_of_the_reference(scheme: str) -> None:
    weights = [0.1, 0.6, 0.3]
    origin = torch.full((20_000, 1), 2)
    out = resample_from(CONDITIONAL[scheme], rows(weights, 20_000), origin, generator(4))
    assert (out.ancestors[:, 0] == 2).all()
    plain = CONDITIONAL[scheme](rows([0.3, 0.1, 0.6], 20_000), generator(5))
    within(count(out.ancestors) - count(plain.ancestors)[:, [1, 2, 0]], 0.0)


class Hidden(sq.StateSpaceModel):
    """Three hidden states, so that the posterior of all paths is a sum over few of them."""

    latent_dim = 1
    start_p = torch.tensor([0.5, 0.3, 0.2]).double()
    move = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]]).double()
    level = torch.tensor([-1.0, 0.5, 2.0]).double()

    def initial(self, u):
        return Categorical(self.start_p)

    def transition(self, z, u):
        return Categorical(self.move[z.long()])

    def emission(self, z, u):
        return Normal(self.level[z.long()], 0.5)


OBSERVED = [0.9, float("nan"), 1.6, -0.4]


def exact_paths() -> tuple[np.ndarray, np.ndarray]:
    """All paths and their posterior probabilities."""
    paths = np.array(list(np.ndindex(*[3] * len(OBSERVED))))
    p = Hidden.start_p.numpy()[paths[:, 0]]
    for before, now in itertools.pairwise(paths.T):
        p = p * Hidden.move.numpy()[before, now]
    for state, x in zip(paths.T, OBSERVED, strict=True):
        if np.isfinite(x):
            p = p * stats.norm.pdf(x, Hidden.level.numpy()[state], 0.5)
    return paths, p / p.sum()


class Lineage:
    """Keeps the states and ancestors of all steps."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def update(self, step: Step) -> None:
        """Take in one step."""
        self.steps.append(step)

    def trace(self, final: torch.Tensor) -> torch.Tensor:
        """The paths that end in the chosen particles, (series, time)."""
        path = []
        for step in reversed(self.steps):
            path.append(torch.gather(step.z[..., 0], 1, final))
            if step.ancestors is not None:
                final = torch.gather(step.ancestors, 1, final)
        return torch.cat(path[::-1], 1)


def sweep(n: int, repeats: int = 3, *, ancestor_sampling: bool, **options) -> np.ndarray:
    """Start from the posterior, run conditional SMC a few times, and return codes of the paths."""
    paths, p = exact_paths()
    path = torch.from_numpy(paths[np.random.default_rng(1).choice(len(p), n, p=p)])
    model, random = Hidden(), generator(2)
    _, batch, _ = prepare(model, np.array(OBSERVED), None)
    batch = repeat(batch, n)
    for _ in range(repeats):
        reference = Reference(path[..., None].double(), ancestor_sampling)
        lineage = Lineage()
        out = smc.run(model, batch, SMCOptions(reference=reference, **options), random, (lineage,))
        path = lineage.trace(torch.multinomial(out.log_weights.exp(), 1, generator=random)).long()
    return path.numpy() @ 3 ** np.arange(len(OBSERVED))[::-1]


@pytest.mark.parametrize(
    ("threshold", "ancestor_sampling"), [(1.0, False), (0.7, False), (0.7, True)]
)
@pytest.mark.parametrize("n_particles", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize("resampler", SCHEMES)
def test_conditional_filter_leaves_the_smoothing_distribution_invariant(
    resampler: str, n_particles: int, threshold: float, ancestor_sampling: bool
) -> None:
    n, (_, p) = 8_000, exact_paths()
    codes = sweep(
        n,
        n_particles=n_particles,
        resampler=resampler,
        threshold=threshold,
        ancestor_sampling=ancestor_sampling,
    )
    found = np.bincount(codes, minlength=len(p))
    rare = n * p < 5
    observed = np.append(found[~rare], found[rare].sum())
    expected = n * np.append(p[~rare], p[rare].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-4


# ---------------------------------------------------------------------------------- evidence


class Level(sq.StateSpaceModel):
    """A local level with two observations of it, and a proposal that reads them."""

    latent_dim = 1

    def initial(self, u):
        return Normal(torch.zeros(1).double(), 1.0)

    def transition(self, z, u):
        return Normal(0.9 * z, 0.7)

    def emission(self, z, u):
        return Normal(torch.cat([z, 0.5 * z], -1), 1.0)

    def encode(self, batch):
        return torch.cat([batch.x, batch.mask.to(batch.x.dtype)], -1)

    def proposal(self, h, c, u):
        prior = self.prior(h, u)
        x, seen = c[..., :2], c[..., 2:]
        load = torch.tensor([1.0, 0.5]).double() * seen
        precision = 1 / prior.variance + (load**2).sum(-1, keepdim=True)
        mean = (prior.mean / prior.variance + (load * x).sum(-1, keepdim=True)) / precision
        return Normal(mean + 0.1, 1.2 / precision.sqrt())


@pytest.fixture(scope="module")
def panel() -> tuple[Batch, np.ndarray]:
    """One complete and one gappy series, and their exact log-likelihoods."""
    values = Level().sample(6, 2, seed=4).values.copy()
    values[1, 2] = np.nan
    values[1, 4, 0] = np.nan
    known = sq.LinearGaussianSSM(
        F=[[0.9]],
        H=[[1.0], [0.5]],
        Q=[[0.49]],
        R=[[1.0, 0.0], [0.0, 1.0]],
        m0=[0.0],
        P0=[[1.0]],
        diffuse=False,
    )
    _, batch, _ = prepare(Level(), values, None)
    return batch, known.log_prob(values).value


def gaussian_lookahead(model, h, u, x, mask):
    """log p(x_t | h_t), which is Gaussian here: the perfect look-ahead."""
    prior = model.prior(h, u)
    load = torch.tensor([1.0, 0.5]).double()
    total = 0.0
    mean, variance = prior.mean[..., 0], prior.variance[..., 0].expand(prior.mean.shape[:-1])
    for k in range(2):
        spread = load[k] ** 2 * variance + 1
        error = x[..., k] - load[k] * mean
        each = Normal(0.0, spread.sqrt()).log_prob(error)
        gain = torch.where(mask[..., k], load[k] * variance / spread, 0.0)
        total = total + torch.where(mask[..., k], each, 0.0)
        mean, variance = mean + gain * error, variance * (1 - gain * load[k])
    return total


FILTERS = {
    "bootstrap": {"proposal": "bootstrap"},
    "guided": {"proposal": "learned"},
    "mean look-ahead": {"proposal": "bootstrap", "lookahead": "mean"},
    "auxiliary": {"proposal": "learned", "lookahead": gaussian_lookahead},
}


@pytest.mark.parametrize(
    "n_particles", [4, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 64))]
)
@pytest.mark.parametrize("kind", sorted(FILTERS))
@pytest.mark.parametrize("resampler", SCHEMES)
def test_evidence_is_unbiased(
    panel: tuple[Batch, np.ndarray], resampler: str, kind: str, n_particles: int
) -> None:
    batch, exact = panel
    n = 1500
    for threshold in (0.5, 1.0):
        how = SMCOptions(n_particles, resampler, threshold, **FILTERS[kind])
        out = smc.run(Level(), repeat(batch, n), how, generator(n_particles))
        ratio = (out.increments.sum(1).view(2, n) - torch.from_numpy(exact)[:, None]).exp()
        within(ratio.T.numpy(), 1.0)


def test_a_better_lookahead_gives_a_better_estimate(panel: tuple[Batch, np.ndarray]) -> None:
    spread = {}
    for kind, options in FILTERS.items():
        out = smc.run(Level(), repeat(panel[0], 500), SMCOptions(64, **options), generator())
        spread[kind] = float(out.increments.sum(1)[:500].std())
    assert spread["auxiliary"] < spread["guided"] < spread["bootstrap"]
