"""Priors in unconstrained coordinates, and models with several values of their parameters."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from grid_posterior import NoisyAutoregression, data, log_likelihood
from scipy import stats
from torch import nn
from torch.distributions import (
    Beta,
    Dirichlet,
    Gamma,
    HalfCauchy,
    Independent,
    MultivariateNormal,
    Normal,
    Poisson,
    Uniform,
    Wishart,
)

import seqdgm as sq
from seqdgm.inference.chains import Chains, Likelihood
from seqdgm.inference.parameters import (
    ParameterSpace,
    check_broadcast,
    find_parameter,
    substitute,
)
from seqdgm.prepare import prepare


class Gauge(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Parameter(torch.tensor(0.5).double())
        self.register_buffer("offset", torch.tensor([1.0, 2.0]).double())


class Vector(sq.StateSpaceModel):
    """Two states that rotate and shrink, seen through a gauge."""

    latent_dim = 2

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([0.9, 0.5]).double())
        self.gauge = Gauge()
        self.spin = 0.1
        self.obs_dim_ = 2

    def initial(self, u):
        return Normal(torch.zeros(2).double(), 1.0)

    def transition(self, z, u):
        return Normal(self.decay * z + self.spin * z.flip(-1), 1.0)

    def emission(self, z, u):
        return Normal(z + self.gauge.offset, self.gauge.width)


def test_substitution_reaches_parameters_buffers_numbers_and_submodules() -> None:
    model = Vector()
    values = {
        "decay": torch.rand(3, 2).double(),
        "gauge.width": torch.rand(3).double(),
        "gauge.offset": torch.rand(3, 2).double(),
        "spin": torch.rand(3).double(),
    }
    many = substitute(model, values)
    assert many.decay.shape == (3, 1, 2)
    assert many.gauge.width.shape == many.spin.shape == (3, 1, 1)
    assert many.gauge.offset.shape == (3, 1, 2)
    z = torch.rand(3, 5, 2).double()
    for k in range(3):
        expected = values["decay"][k] * z[k] + values["spin"][k] * z[k].flip(-1)
        assert torch.equal(many.transition(z, None).mean[k], expected)
        assert torch.equal(many.emission(z, None).mean[k], z[k] + values["gauge.offset"][k])
    assert isinstance(model.decay, nn.Parameter)
    assert model.spin == 0.1
    assert model.gauge is not many.gauge
    assert {name for name, _ in model.named_parameters()} == {"decay", "gauge.width"}


@pytest.mark.parametrize("name", ["rate", "gauge.depth", "pipe.width", "gauge", "obs_dim_.x"])
def test_unknown_parameters_are_named(name: str) -> None:
    with pytest.raises(ValueError, match=rf"no parameter '{name}'.*gauge.width"):
        find_parameter(Vector(), name)


def test_a_whole_row_of_parameters_gives_the_likelihoods_of_each() -> None:
    x = data()
    rho, noise = np.array([-0.7, 0.0, 0.4, 0.95]), np.array([0.2, 1.5, 0.7, 1.0])
    model = NoisyAutoregression()
    chains = Chains.of(model, x, {"rho": Uniform(-1, 1), "noise": Gamma(1.0, 1.0)}, None, 4)
    generator = torch.Generator().manual_seed(0)
    run = Likelihood(model, "kalman", 1, generator, {})
    values = {"rho": torch.from_numpy(rho), "noise": torch.from_numpy(noise)}
    found = chains.evidence(values, run).numpy()
    np.testing.assert_allclose(found, log_likelihood(rho, noise, x), rtol=1e-10)
    alone = replace(chains, batched=False).evidence(values, run).numpy()
    np.testing.assert_allclose(alone, found, rtol=1e-12)


def test_series_that_share_parameters_add_up() -> None:
    x = [data(12, 1), data(9, 2), data(5, 3)]
    rho, noise = np.array([-0.2, 0.8]), np.array([0.5, 1.5])
    model = NoisyAutoregression()
    priors = {"rho": Uniform(-1, 1), "noise": Gamma(1.0, 1.0)}
    run = Likelihood(model, "kalman", 1, torch.Generator(), {})
    pooled = Chains.of(model, x, priors, None, 2)
    values = {"rho": torch.from_numpy(rho), "noise": torch.from_numpy(noise)}
    each = np.stack([log_likelihood(rho, noise, one) for one in x], 1)
    np.testing.assert_allclose(pooled.evidence(values, run), each.sum(1), rtol=1e-10)
    own = Chains.of(model, x, priors, None, 2, pooled=False)
    wide = {name: value.repeat_interleave(3) for name, value in values.items()}
    np.testing.assert_allclose(own.evidence(wide, run), each.flatten(), rtol=1e-10)


PRIORS = {
    "interval": Uniform(-1.0, 3.0),
    "positive": Gamma(2.0, 3.0),
    "unit": Beta(2.0, 5.0),
    "half": HalfCauchy(2.0),
    "real": Normal(1.0, 2.0),
}


@pytest.mark.parametrize("kind", sorted(PRIORS))
def test_density_of_the_coordinates_integrates_to_one(kind: str) -> None:
    space = ParameterSpace.of(Vector(), {"spin": PRIORS[kind]})
    free = torch.linspace(-60, 60, 240_001).double()[:, None]
    log_p = space.log_prior(space.constrain(free)) + space.log_jacobian(free)
    mass = torch.trapezoid(log_p.exp(), free[:, 0])
    assert abs(float(mass) - 1) < 1e-6


def test_prior_of_vectors_is_the_product_and_the_jacobian_a_determinant() -> None:
    priors = {
        "decay": Gamma(torch.tensor([2.0, 5.0]), torch.tensor([1.0, 3.0])),
        "gauge.offset": MultivariateNormal(torch.zeros(2), torch.tensor([[2.0, 0.3], [0.3, 1.0]])),
        "spin": Uniform(-2.0, 2.0),
    }
    space = ParameterSpace.of(Vector(), priors)
    assert space.size == 5
    free = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    values = space.constrain(free)
    torch.testing.assert_close(space.unconstrain(values), free)
    a, b = values["decay"].numpy().T
    expected = stats.gamma.logpdf(a, 2) + stats.gamma.logpdf(b, 5, scale=1 / 3) - math.log(4)
    expected += stats.multivariate_normal.logpdf(
        values["gauge.offset"], np.zeros(2), [[2.0, 0.3], [0.3, 1.0]]
    )
    np.testing.assert_allclose(space.log_prior(values), expected, rtol=1e-6)

    def flat(row):
        return torch.cat([v.flatten() for v in space.constrain(row[None]).values()])

    for k, row in enumerate(free):
        derivative = torch.autograd.functional.jacobian(flat, row)
        torch.testing.assert_close(
            space.log_jacobian(free)[k], torch.linalg.slogdet(derivative).logabsdet
        )


def test_density_is_zero_outside_the_support() -> None:
    space = ParameterSpace.of(Vector(), {"decay": Beta(torch.ones(2), torch.ones(2))})
    values = torch.tensor([[0.5, 0.5], [0.5, 1.5], [-0.1, 0.5]]).double()
    assert space.log_prior({"decay": values}).isfinite().tolist() == [True, False, False]


@pytest.mark.parametrize(
    ("priors", "said"),
    [
        ({}, "priors is empty"),
        ({"spin": 0.3}, "no torch distribution"),
        ({"phi": Normal(0.0, 1.0)}, "no parameter 'phi'"),
        ({"decay": Normal(0.0, 1.0)}, r"shape \(\), but the parameter has shape \(2,\)"),
        ({"spin": Normal(torch.zeros(1), 1.0)}, r"shape \(1,\), but the parameter has shape \(\)"),
        ({"decay": Independent(Normal(torch.zeros(3), 1.0), 1)}, r"shape \(3,\)"),
        ({"spin": Poisson(3.0)}, "discrete"),
    ],
)
def test_priors_that_do_not_fit_are_refused(priors: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ParameterSpace.of(Vector(), priors)


def test_a_support_without_coordinates_is_refused() -> None:
    model = Vector()
    model.cov = torch.eye(2).double()
    with pytest.raises(ValueError, match="Cholesky"):
        ParameterSpace.of(model, {"cov": Wishart(torch.tensor(3.0), torch.eye(2))})


def test_a_simplex_has_one_coordinate_less() -> None:
    space = ParameterSpace.of(Vector(), {"decay": Dirichlet(torch.tensor([2.0, 3.0]))})
    assert space.size == 1
    free = torch.linspace(-40, 40, 80_001).double()[:, None]
    values = space.constrain(free)
    torch.testing.assert_close(values["decay"].sum(1), torch.ones(80_001).double())
    log_p = space.log_prior(values) + space.log_jacobian(free)
    assert abs(float(torch.trapezoid(log_p.exp(), free[:, 0])) - 1) < 1e-6


class Matrices(Vector):
    """Multiplies by a matrix from the right, which does not know rows."""

    def __init__(self) -> None:
        super().__init__()
        self.F = torch.eye(2).double()

    def transition(self, z, u):
        return Normal(z @ self.F.mT, 1.0)


class RowMatrices(Matrices):
    def transition(self, z, u):
        return Normal((self.F @ z[..., None])[..., 0], 1.0)


class Averaging(Vector):
    """Runs, but mixes the rows."""

    def emission(self, z, u):
        return Normal(z + self.spin * torch.ones(1).double(), torch.as_tensor(self.spin).mean())


class Concrete(Vector):
    def initial(self, u):
        return Normal(torch.zeros(2).double(), float(self.spin))


@pytest.mark.parametrize(
    ("model", "name", "function"),
    [
        (Matrices(), "F", "transition"),
        (Averaging(), "spin", "emission"),
        (Concrete(), "spin", "initial"),
    ],
)
def test_functions_that_do_not_broadcast_are_named(model, name: str, function: str) -> None:
    _, batch, _ = prepare(model, np.zeros((4, 2)), None)
    generator = torch.Generator().manual_seed(0)
    shape = find_parameter(model, name).shape
    values = {name: 0.5 + torch.rand((2, *shape), generator=generator).double()}
    with pytest.raises(ValueError, match=rf"{type(model).__name__}\.{function} .*batched=False"):
        check_broadcast(model, batch, values, generator)


@pytest.mark.parametrize("model", [Vector(), RowMatrices()])
def test_models_that_broadcast_pass(model) -> None:
    _, batch, _ = prepare(model, np.zeros((4, 2)), None)
    generator = torch.Generator().manual_seed(0)
    names = ["decay", "gauge.width", "gauge.offset", "spin"]
    names += ["F"] if isinstance(model, Matrices) else []
    values = {
        name: torch.rand((2, *find_parameter(model, name).shape), generator=generator).double()
        for name in names
    }
    check_broadcast(model, batch, values, generator)
