"""SMC^2 against integration over a grid."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from grid_posterior import PRIORS, Grid, NoisyAutoregression, data
from torch.distributions import Gamma, Normal, Uniform

from seqdgm.inference import smc
from seqdgm.inference.particle_gibbs import particle_gibbs
from seqdgm.inference.smc import SMCOptions
from seqdgm.inference.smc2 import smc2
from seqdgm.prepare import prepare


def population(seed: int, y: object = None, **more: object):
    settings = {"n_theta": 150, "n_particles": 4, "max_particles": 4, **more}
    return smc2(NoisyAutoregression(), data() if y is None else y, PRIORS, seed=seed, **settings)


def test_four_particles_are_enough_for_posterior_and_evidence() -> None:
    runs = [population(seed) for seed in range(16)]
    grid = Grid.of(data())
    for name in PRIORS:
        grid.check(name, np.concatenate([run.draws[name] for run in runs]))
    ratio = np.exp([run.log_evidence - grid.log_evidence for run in runs])
    assert abs(ratio.mean() - 1) < 5 * ratio.std(ddof=1) / math.sqrt(len(ratio))
    assert ratio.std() < 0.5
    assert all(0.05 < run.accept_rate[0] < 0.6 for run in runs)


@pytest.mark.slow
def test_more_particles_on_the_way_change_nothing_of_the_target() -> None:
    # With a threshold of acceptance that is never met, the number doubles at every rejuvenation.
    from seqdgm.inference import smc2 as module

    least = module.LEAST_ACCEPTED
    module.LEAST_ACCEPTED = 1.0
    try:
        y = [data(10, 3), data(6, 4)]
        runs = [population(s, y, n_particles=2, max_particles=32, n_moves=2) for s in range(25)]
    finally:
        module.LEAST_ACCEPTED = least
    grid = Grid.of(*y)
    for name in PRIORS:
        grid.check(name, np.concatenate([run.draws[name] for run in runs]))
    ratio = np.exp([run.log_evidence - grid.log_evidence for run in runs])
    assert abs(ratio.mean() - 1) < 5 * ratio.std(ddof=1) / math.sqrt(len(ratio))


def test_the_result_is_one_chain_of_equally_weighted_draws() -> None:
    found = population(0, n_theta=40)
    assert found.draws["rho"].shape == found.log_likelihood.shape == (1, 40)
    assert found.kind == "estimate"
    again, other = population(0, n_theta=40), population(1, n_theta=40)
    np.testing.assert_array_equal(found.draws["rho"], again.draws["rho"])
    assert found.log_evidence == again.log_evidence != other.log_evidence
    assert found.forecast(2, n_draws=10, seed=0).mean.shape == (1, 2, 1)


@pytest.mark.parametrize("stops", [(3, 12), (1, 2, 3, 4, 12), (11, 12)])
def test_a_filter_goes_on_from_where_it_stopped(stops: tuple[int, ...]) -> None:
    model = NoisyAutoregression()
    _, batch, _ = prepare(model, [data(12, 3), data(7, 4)], None)
    options = SMCOptions(20, threshold=0.9)
    whole = smc.run(model, batch, options, torch.Generator().manual_seed(1))
    generator, cloud = torch.Generator().manual_seed(1), None
    for stop in stops:
        part = smc.run(model, batch, options, generator, cloud=cloud, stop=stop)
        cloud = part.cloud
        assert part.increments.shape == (2, stop)
    for name in ("increments", "ess", "log_weights", "s", "stderr"):
        assert torch.equal(getattr(part, name), getattr(whole, name))


def test_a_series_without_weight_has_evidence_zero_if_asked() -> None:
    class Bounded(NoisyAutoregression):
        engines = ("particle",)

        def emission(self, z, u):
            return Uniform(-1.0 + 0 * z, 1.0 + 0 * z, validate_args=False)

    model, y = Bounded(), [np.array([0.1, 5.0, 0.3]), np.array([0.1, 0.2, 0.3])]
    with pytest.raises(ValueError, match="series 0, step 1"):
        model.log_prob(y, n_particles=8, seed=0)
    found = model.log_prob(y, n_particles=8, seed=0, collapse="zero").value
    assert found[0] == -np.inf
    np.testing.assert_allclose(found[1], -3 * np.log(2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"n_theta": 0}, "n_theta=0"),
        ({"n_moves": 1.5}, "n_moves=1.5"),
        ({"theta_threshold": 2.0}, "theta_threshold=2.0"),
        ({"resampler": "none"}, "no resampler 'none'"),
    ],
)
def test_bad_arguments_are_refused(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        population(0, **settings)


def test_priors_that_exclude_the_data_are_an_error() -> None:
    class Bounded(NoisyAutoregression):
        engines = ("particle",)
        bound = 1.0

        def emission(self, z, u):
            return Uniform(-self.bound + 0 * z, self.bound + 0 * z, validate_args=False)

    y = np.array([0.1, 9.0])
    with pytest.raises(ValueError, match="likelihood zero at step 1"):
        smc2(Bounded(), y, {"bound": Uniform(1.0, 2.0)}, n_theta=20, n_particles=4, seed=0)
    with pytest.raises(ValueError, match=r"chain 0.*likelihood zero"):
        particle_gibbs(Bounded(), y, {"bound": Uniform(1.0, 2.0)}, n_iter=2, seed=0)


def test_models_that_do_not_broadcast_are_refused() -> None:
    class Mixed(NoisyAutoregression):
        def transition(self, z, u):
            return Normal(torch.as_tensor(self.rho).mean() * z, 0.5)

    with pytest.raises(ValueError, match=r"Mixed\.transition"):
        smc2(Mixed(), data(), {"rho": Uniform(-1, 1), "noise": Gamma(8.0, 8.0)}, seed=0)
