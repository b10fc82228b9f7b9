"""RNN and DMM: likelihoods against hand-written ones, training that guards its weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import seqdgm as sq
from seqdgm.inference.objectives import Objective, evaluate
from seqdgm.inference.training import TrainingOptions
from seqdgm.prepare import prepare
from seqdgm.types import make_generator


def wave(length: int = 40, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return 10 + 3 * np.sin(np.arange(length) / 3) + 0.3 * rng.normal(size=length)


def test_rnn_likelihood_equals_a_plain_torch_loop() -> None:
    y = wave()
    model = sq.RNN("lstm", 5, max_epochs=4).fit(y, seed=0)
    loc, scale = model.transform_.loc.item(), model.transform_.scale.item()
    w = torch.tensor((y - loc) / scale, dtype=torch.float32)
    previous, total = torch.zeros(1, 1, 1), 0.0
    h, c = (part[:, None].contiguous() for part in model.rnn.start)
    with torch.no_grad():
        for value in w:
            out, (h, c) = model.rnn.rnn(previous, (h, c))
            law = model.head(out[0, 0])
            total += stats.norm.logpdf(float(value), law.loc.item(), law.scale.item())
            previous = value.reshape(1, 1, 1)
    exact = model.log_prob()
    assert exact.kind == "exact"
    # The data were standardised: densities of y are those of w over the scale.
    assert exact.value[0] == pytest.approx(total - len(y) * np.log(scale), abs=1e-3)


def test_rnn_marginalises_missing_values() -> None:
    """Two steps, the first missing: p(x_2) = int p(x_1) p(x_2 | x_1) dx_1 by quadrature."""
    model = sq.RNN("gru", 4, max_epochs=30, scale=None, learning_rate=0.05).fit(
        wave(30) / 5, seed=1
    )
    target, grid = 1.7, np.linspace(-8, 12, 1501)
    pairs = np.stack([grid, np.full_like(grid, target)], 1)
    density = np.exp(model.log_prob([*pairs]).value)
    exact = np.trapezoid(density, grid)
    ratios = []
    for seed in range(20):
        found = model.log_prob(np.array([np.nan, target]), n_particles=200, seed=seed)
        assert found.kind == "estimate"
        ratios.append(np.exp(found.value[0]) / exact)
    stderr = np.std(ratios, ddof=1) / np.sqrt(20)
    assert abs(np.mean(ratios) - 1) < 5 * stderr + 1e-4


def linear_dmm() -> tuple[sq.DMM, sq.LinearGaussianSSM]:
    """A DMM whose networks are set to a linear-Gaussian system, and that system."""
    model = sq.DMM(1, 2, 4, scale=None, max_epochs=1).fit(np.random.default_rng(0).normal(size=30))
    gated, head = model.gated, model.head
    sigma_q, sigma_r = 0.5, 0.8
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        gated.gate.bias.fill_(-40.0)
        gated.linear.weight.fill_(0.9)
        gated.scale.bias.fill_(np.log(np.expm1(sigma_q - gated.min_scale)))
        # relu(x) - relu(-x) = x carries the state through two rectified layers.
        model.features[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model.features[2].weight.copy_(torch.eye(2))
        head.linear.weight[0] = torch.tensor([1.0, -1.0])
        raw = np.log(np.expm1(sigma_r - head.min_scale))
        head.linear.bias.copy_(torch.tensor([0.0, raw]))
        model.combiner.out.bias.copy_(torch.tensor([0.0, 0.5]))
    exact = sq.LinearGaussianSSM(
        F=[[0.9]],
        H=[[1.0]],
        Q=[[sigma_q**2]],
        R=[[sigma_r**2]],
        m0=[0.0],
        P0=[[sigma_q**2]],
    )
    return model, exact


def test_a_linear_dmm_has_the_kalman_likelihood_and_a_bound_below_it() -> None:
    model, exact = linear_dmm()
    y = exact.sample(15, seed=4).values.copy()
    y[0, 6:8] = np.nan
    truth = exact.log_prob(y).value[0]
    ratios = np.array(
        [np.exp(model.log_prob(y, n_particles=500, seed=s).value[0] - truth) for s in range(20)]
    )
    assert abs(ratios.mean() - 1) < 5 * ratios.std(ddof=1) / np.sqrt(20)
    elbo = model.log_prob(y, method="variational", n_particles=400, seed=0)
    assert elbo.kind == "lower bound"
    assert elbo.value[0] + 5 * elbo.stderr[0] < truth
    smoothed = np.array([model.smooth(y, n_particles=400, seed=s).mean for s in range(20)])
    gap = np.abs(smoothed.mean(0) - exact.smooth(y).mean)
    stderr = smoothed.std(0, ddof=1) / np.sqrt(20)
    assert np.all(gap < 5 * stderr + 5 * exact.smooth(y).std / 400)


def test_the_analytic_divergence_equals_its_monte_carlo_estimate() -> None:
    model, exact = linear_dmm()
    y = exact.sample(10, seed=5).values
    _, batch, _ = prepare(model, y, None)
    with torch.no_grad():
        analytic, sampled = [], []
        for seed in range(400):
            terms = evaluate(model, batch, Objective(), 1.0, make_generator(seed))
            analytic.append(float(terms.divergence.sum()))
    # q is N(0, softplus(0.5)), whatever the data; p is N(0.9 z, 0.5): integrate z out by hand.
    s = float(torch.nn.functional.softplus(torch.tensor(0.5))) + model.combiner.min_scale
    for k in range(10):
        spread = 0.81 * s**2 if k else 0.0
        sampled.append(np.log(0.5 / s) + (s**2 + spread) / (2 * 0.25) - 0.5)
    stderr = np.std(analytic, ddof=1) / 20
    assert abs(np.mean(analytic) - np.sum(sampled)) < 5 * stderr


@pytest.mark.parametrize(
    "model", [sq.RNN("gru", 6, max_epochs=25), sq.DMM(2, 6, 6, max_epochs=25, kl_warmup=0)]
)
def test_training_improves_the_objective_and_keeps_the_best_epoch(model) -> None:
    panel = [wave(40, seed) for seed in range(6)]
    model.fit(panel, seed=0)
    report = model.fit_report_
    assert report.objective[-1] > report.objective[0]
    assert max(report.valid_objective) > report.valid_objective[0]
    assert report.n_iter == len(report.objective) == len(report.valid_objective)


def test_early_stopping_stops() -> None:
    noise = np.random.default_rng(0).normal(size=60)
    model = sq.RNN("gru", 16, max_epochs=500, patience=5, learning_rate=0.05).fit(noise, seed=0)
    assert model.fit_report_.n_iter < 500
    assert model.fit_report_.converged.all()


def test_a_diverging_run_keeps_the_last_good_weights_and_names_the_series() -> None:
    panel = {"good": wave(30), "wild": wave(30)}
    panel["wild"][4] = 3e19  # its square overflows, the variance of the panel does not
    model = sq.RNN("gru", 4, scale=None, max_epochs=10, batch_size=1, learning_rate=1e-3)
    frames = [
        {"unique_id": name, "ds": k, "y": v}
        for name, values in panel.items()
        for k, v in enumerate(values)
    ]
    import pandas as pd

    before = model.get_params()
    with pytest.raises(ValueError, match=r"series 'wild'.*not finite"):
        model.fit(pd.DataFrame(frames), seed=0)
    assert model.fit_report_ is None
    assert model.get_params() == before


def test_padding_and_company_do_not_change_a_likelihood() -> None:
    panel = [wave(40, 0), wave(25, 1), wave(33, 2)]
    for model in (sq.RNN("lstm", 5, max_epochs=2), sq.DMM(2, 5, 5, max_epochs=2)):
        model.fit(panel, seed=0)
        if isinstance(model, sq.RNN):
            joint = model.log_prob(panel).value
            alone = [model.log_prob(y).value[0] for y in panel]
            np.testing.assert_allclose(joint, alone, rtol=1e-5)
        else:
            _, batch, _ = prepare(model, panel, None)
            _, one, _ = prepare(model, panel[1], None)
            np.testing.assert_allclose(
                model.encode(batch)[1, :25].detach(), model.encode(one)[0].detach(), atol=1e-6
            )


def test_known_inputs_reach_the_deep_models() -> None:
    rng = np.random.default_rng(0)
    u = rng.normal(size=(80, 1))
    y = 3 * u[:, 0] + 0.1 * rng.normal(size=80)
    for model in (sq.RNN("gru", 8, max_epochs=150), sq.DMM(2, 8, 8, max_epochs=150)):
        model.fit(y, inputs=u, seed=0, learning_rate=0.02)
        future = model.forecast(4, inputs=np.array([[2.0], [-2.0], [1.0], [0.0]]), seed=0)
        assert np.all(np.abs(future.mean[0, :, 0] - [6, -6, 3, 0]) < 1.5)
        with pytest.raises(ValueError, match="input columns"):
            model.forecast(4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sq.RNN("rnn"), "cell"),
        (lambda: sq.RNN(emission="gamma"), "emission"),
        (lambda: sq.RNN(emission="bernoulli").fit(wave()), "cannot occur"),
        (lambda: sq.DMM(emission="poisson").fit(-np.arange(20.0)), "cannot occur"),
        (lambda: sq.DMM(max_epochs=1).fit(wave(), epochs=3), "unknown training options"),
        (lambda: sq.DMM(max_epochs=1).fit(wave(), valid_fraction=2.0), "valid_fraction"),
        (lambda: sq.DMM().filter(wave()), "not fitted"),
    ],
)
def test_bad_settings_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_defaults_of_training_are_those_of_the_models() -> None:
    for model in (sq.RNN(), sq.DMM()):
        for name, value in model.get_params().items():
            if hasattr(TrainingOptions(), name):
                assert getattr(TrainingOptions(), name) == value


@pytest.mark.parametrize("size", [{"latent_dim": 0}, {"hidden_dim": 2.5}, {"encoder_dim": -1}])
def test_a_size_that_is_no_count_is_named(size):
    (name,) = size
    with pytest.raises(ValueError, match=f"{name}=.* must be a whole number, at least 1"):
        sq.DMM(**size)
    if name == "hidden_dim":
        with pytest.raises(ValueError, match=f"{name}="):
            sq.RNN(**size)
