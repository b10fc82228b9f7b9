"""Gradient learning: minibatches, schedules, updates, validation, curves and their picture."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

import seqdgm as sq
from seqdgm.inference.batching import minibatches, padded_share
from seqdgm.inference.schedules import Plateau, rate_share
from seqdgm.inference.training_options import TrainingOptions, read_options
from seqdgm.inference.updates import Updater
from seqdgm.prepare import prepare


def waves(count: int = 5, length: int = 20) -> list[np.ndarray]:
    """Series of different lengths."""
    rng = np.random.default_rng(3)
    return [
        np.sin(np.arange(length - 2 * k) / 3 + k) + 0.2 * rng.normal(size=length - 2 * k)
        for k in range(count)
    ]


def chorales() -> np.ndarray:
    """Lengths like those of the JSB chorales: 229, mean 60, at most 129."""
    lengths = np.random.default_rng(0).gamma(7.0, 8.8, size=229).round().astype(int)
    return lengths.clip(25, 129)


def weights(model: sq.RNN) -> np.ndarray:
    return torch.cat([p.detach().ravel() for p in model.parameters()]).numpy()


# Minibatches


def test_minibatches_hold_every_series_once_and_little_padding() -> None:
    lengths, loose = chorales(), []
    assert lengths.mean() == pytest.approx(60, abs=3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        parts = minibatches(lengths, 20, 0.1, generator)
        assert sorted(np.concatenate(parts)) == list(range(229))
        assert sorted(len(rows) for rows in parts) == [9] + [20] * 11
        assert padded_share(lengths, parts) <= 0.1
        loose.append(padded_share(lengths, minibatches(lengths, 20, 1.0, generator)))
    assert np.mean(loose) > 0.3


def test_the_padded_share_is_that_of_the_tensors() -> None:
    lengths = np.array([3, 5, 5, 2])
    parts = [np.array([0, 1]), np.array([2, 3])]
    assert padded_share(lengths, parts) == pytest.approx(1 - 15 / 20)


def test_minibatches_change_from_epoch_to_epoch_and_depend_on_the_seed_alone() -> None:
    lengths = chorales()

    def together(generator: torch.Generator) -> np.ndarray:
        same = np.zeros((229, 229), dtype=bool)
        for rows in minibatches(lengths, 20, 0.1, generator):
            same[np.ix_(rows, rows)] = True
        np.fill_diagonal(same, False)
        return same

    generator = torch.Generator().manual_seed(1)
    first, second = together(generator), together(generator)
    assert (first & second).sum() < 0.6 * first.sum()
    np.testing.assert_array_equal(first, together(torch.Generator().manual_seed(1)))


def test_series_of_one_length_are_divided_uniformly() -> None:
    """Two given series meet with probability (size - 1) / (n - 1)."""
    generator, met = torch.Generator().manual_seed(0), []
    for _ in range(2000):
        parts = minibatches(np.full(9, 7), 3, 0.1, generator)
        met.append([any({0, k} <= set(rows.tolist()) for rows in parts) for k in (1, 4, 8)])
    rate = np.mean(met, axis=0)
    assert np.all(np.abs(rate - 2 / 8) < 5 * np.sqrt(0.25 * 0.75 / 2000))


def test_lengths_too_different_are_sorted() -> None:
    lengths = np.array([1, 100, 2, 50])
    parts = minibatches(lengths, 2, 0.0, torch.Generator().manual_seed(0))
    assert sorted(sorted(lengths[rows].tolist()) for rows in parts) == [[1, 2], [50, 100]]


# Schedules


def test_cosine_and_warm_up_are_those_of_torch() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    rise = torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=3)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16, eta_min=0.1)
    both = torch.optim.lr_scheduler.SequentialLR(optimizer, [rise, fall], milestones=[4])
    expected = []
    for _ in range(20):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        both.step()
    found = [rate_share("cosine", k, 20, 4, 0.1) for k in range(20)]
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    np.testing.assert_allclose(
        [rate_share("constant", k, 20, 4, 0.1) for k in range(20)], [0.25, 0.5, 0.75] + [1.0] * 17
    )


def test_plateau_is_that_of_torch() -> None:
    values = np.random.default_rng(5).normal(size=40).cumsum() * 0.3
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    # torch counts the epochs that are borne, not the one at which the rate falls.
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, "max", factor=0.5, patience=2, threshold=0.0, min_lr=0.1
    )
    state = Plateau()
    for value in values:
        theirs.step(float(value))
        state = state.after(float(value), patience=3, factor=0.5)
        share = rate_share("plateau", 9, 20, 4, 0.1, state.share)
        assert share == pytest.approx(optimizer.param_groups[0]["lr"])
    assert share == 0.1


# Updates


def plain_training(
    model: sq.RNN, y: list[np.ndarray], epochs: int, options: dict[str, float]
) -> tuple[list[torch.Tensor], list[float], list[float], list[torch.Tensor]]:
    """Full-batch training of an RNN, written down with torch alone."""
    _, batch, _ = prepare(model, y, None)
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options["weight_decay"]},
            {"params": others, "weight_decay": 0.0},
        ],
        lr=options["learning_rate"],
        betas=options["betas"],
    )
    average = [p.detach().clone() for p in model.parameters()]
    values, norms = [], []
    steps = sum(map(len, y))
    for k in range(epochs):
        previous = torch.cat([torch.zeros_like(batch.x[:, :1]), batch.x[:, :-1]], 1)
        start = tuple(part[:, None].expand(-1, len(y), -1).contiguous() for part in model.rnn.start)
        hidden, _ = model.rnn.rnn(previous, start)
        law = model.head(hidden)
        value = (law.log_prob(batch.x)[..., 0] * batch.mask[..., 0]).sum() / steps
        optimizer.zero_grad()
        (-value).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
        optimizer.step()
        values.append(value.item())
        norms.append(norm.item())
        decay = min(options["average"], (1 + k) / (10 + k))
        average = [
            decay * a + (1 - decay) * p.detach()
            for a, p in zip(average, model.parameters(), strict=True)
        ]
    return [p.detach() for p in model.parameters()], values, norms, average


@pytest.mark.parametrize("average", [0.0, 0.5])
def test_training_equals_a_plain_torch_loop(average: float) -> None:
    y = waves()
    options = {
        "learning_rate": 0.02,
        "weight_decay": 0.3,
        "betas": (0.8, 0.95),
        "clip": 0.5,
        "average": average,
    }
    own = {"scale": None, "valid_fraction": 0.0, **options}
    scale = own.pop("scale")
    start = sq.RNN("lstm", 3, scale=scale, max_epochs=1).fit(y, seed=0, learning_rate=1e-30)
    model = sq.RNN("lstm", 3, scale=scale, max_epochs=4).fit(y, seed=0, **own)
    last, values, norms, averaged = plain_training(start, y, 4, options)
    expected = averaged if average else last
    for found, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-4, atol=2e-6)
    report = model.fit_report_
    np.testing.assert_allclose(report.objective, values, rtol=1e-5)
    np.testing.assert_allclose(report.gradient_norm, norms, rtol=1e-4)
    assert report.learning_rate == (0.02,) * 4
    assert report.valid_objective == ()


def test_every_step_weighs_the_same_in_all_minibatches() -> None:
    """The gradients of an epoch's minibatches add up to that of the whole."""
    y = waves(5)
    model = sq.RNN("gru", 3, scale=None, max_epochs=1).fit(y, seed=0)
    _, batch, _ = prepare(model, y, None)
    steps = int(batch.lengths.sum())

    def gradient(rows: list[int], weight: float) -> np.ndarray:
        twin = copy.deepcopy(model)
        updater = Updater.of(twin, replace(TrainingOptions(), clip=1e9))
        updater.optimizer.step = lambda: None
        outcome = updater(
            batch.take(torch.tensor(rows)),
            weight=weight,
            beta=1.0,
            rate=1e-3,
            generator=torch.Generator().manual_seed(0),
            due=False,
        )
        assert not outcome.fault
        return torch.cat([p.grad.ravel() for p in twin.parameters()]).numpy()

    # As `fit` weighs them: the mean over minibatches is the gradient per step of all series.
    parts = [gradient([0, 1, 2], 2 / steps), gradient([3, 4], 2 / steps)]
    np.testing.assert_allclose(
        np.mean(parts, axis=0), gradient([0, 1, 2, 3, 4], 1 / steps), rtol=1e-4, atol=1e-7
    )


def test_an_epoch_gives_every_minibatch_the_weight_of_its_steps(monkeypatch) -> None:
    seen, update = [], Updater.__call__

    def watch(self, batch, *, weight, **rest):
        seen.append((weight, int(batch.lengths.sum())))
        return update(self, batch, weight=weight, **rest)

    monkeypatch.setattr(Updater, "__call__", watch)
    sq.RNN("gru", 2, max_epochs=1, batch_size=2).fit(waves(), seed=0, valid_fraction=0.0)
    given, steps = np.array(seen).T
    assert len(set(steps)) > 1
    np.testing.assert_allclose(given, 3 / sum(map(len, waves())))


def test_weights_decay_but_biases_do_not() -> None:
    model = sq.RNN("gru", 3, max_epochs=1)
    still = model.clone().fit(waves(), seed=0, learning_rate=1e-3, weight_decay=0.0)
    shrunk = model.clone().fit(waves(), seed=0, learning_rate=1e-3, weight_decay=100.0)
    for (name, a), b in zip(still.named_parameters(), shrunk.parameters(), strict=True):
        same = torch.equal(a, b)
        assert same == (a.ndim != 2), name


# Validation


def test_validation_series_score_the_kept_weights() -> None:
    y, other = waves(4), waves(7)[4:]
    model = sq.RNN("gru", 4, scale=None, max_epochs=6, learning_rate=0.03)
    model.fit(y, valid=other, seed=0)
    report = model.fit_report_
    steps = sum(map(len, other))
    kept = report.valid_objective[report.best_epoch - 1]
    assert kept == max(report.valid_objective)
    assert kept == pytest.approx(model.log_prob(other).value.sum() / steps, rel=1e-5)
    # Nothing is held out of the series themselves.
    alone = sq.RNN("gru", 4, scale=None, max_epochs=6, learning_rate=0.03)
    alone.fit(y, seed=0, valid_fraction=0.0)
    assert alone.fit_report_.objective == report.objective


def test_validation_series_come_with_their_inputs_and_missing_values() -> None:
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(30, 1)), rng.normal(size=(12, 1))
    y, other = 2 * u[:, 0], 2 * v[:, 0]
    other[3] = np.nan
    model = sq.DMM(1, 4, 4, max_epochs=2)
    model.fit(y, u, valid=other, valid_inputs=v, seed=0)
    assert np.isfinite(model.fit_report_.valid_objective).all()
    with pytest.raises(ValueError, match="valid_inputs"):
        model.fit(y, u, valid=other)


def test_series_of_which_nothing_can_be_validated_are_refused() -> None:
    with pytest.raises(ValueError, match="'valid'"):
        sq.LinearGaussianSSM(latent_dim=1).fit(waves()[0], valid=waves()[1])
    with pytest.raises(ValueError, match="columns"):
        sq.RNN(max_epochs=1).fit(waves()[0], valid=np.zeros((5, 2)))


def test_validation_every_few_epochs_and_after_the_last() -> None:
    model = sq.RNN("gru", 3, max_epochs=5).fit(waves(), seed=0, evaluate_every=2)
    report = model.fit_report_
    assert report.valid_epochs == (2, 4, 5)
    assert len(report.valid_objective) == 3
    assert report.best_epoch in report.valid_epochs


def test_the_kept_epoch_is_the_best_and_patience_ends_the_training() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 40))
    model = sq.RNN("gru", 6, max_epochs=60, patience=3, learning_rate=0.05)
    report = model.fit(list(noise), seed=0, kl_warmup=0).fit_report_
    best = int(np.argmax(report.valid_objective)) + 1
    assert report.best_epoch == best
    assert report.n_iter == best + 3 < 60
    assert report.converged.all()


# Curves


def test_curves_are_parts_of_one_objective() -> None:
    model = sq.DMM(2, 4, 4, max_epochs=4, kl_warmup=3, batch_size=2)
    report = model.fit(waves(), seed=0, lr_warmup=2, schedule="cosine").fit_report_
    beta = np.array([1 / 3, 2 / 3, 1.0, 1.0])
    np.testing.assert_allclose(
        report.objective,
        np.array(report.reconstruction) - beta * np.array(report.divergence),
        rtol=1e-6,
    )
    assert min(report.divergence) > 0
    assert min(report.gradient_norm) > 0
    # Two of four epochs rise; three minibatches an epoch, of which the last is written down.
    shares = [rate_share("cosine", 3 * k + 2, 12, 6, 0.01) for k in range(4)]
    np.testing.assert_allclose(report.learning_rate, 5e-3 * np.array(shares))


def test_a_plateau_lowers_the_rate() -> None:
    noise = np.random.default_rng(0).normal(size=(2, 30))
    model = sq.RNN("gru", 6, max_epochs=12, learning_rate=0.05)
    report = model.fit(list(noise), seed=0, schedule="plateau", plateau_patience=2).fit_report_
    state, expected = Plateau(), []
    for value in report.valid_objective:
        expected.append(0.05 * state.share)
        state = state.after(value, 2, 0.5)
    np.testing.assert_allclose(report.learning_rate, expected)
    assert report.learning_rate[-1] < 0.05


def test_curves_are_drawn_and_survive_a_file(tmp_path) -> None:
    model = sq.DMM(1, 3, 3, max_epochs=3).fit(waves(), seed=0, evaluate_every=2)
    model.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors").fit_report_
    for name, value in vars(model.fit_report_).items():
        assert np.all(getattr(again, name) == value), name
    axes = again.plot().axes
    titles = [axis.get_title(loc="left") for axis in axes]
    assert titles == ["Objective", "Parts of the objective", "Gradient norm", "Learning rate"]
    drawn = {line.get_label(): line.get_xydata() for line in axes[0].lines}
    np.testing.assert_allclose(drawn["training"][:, 1], again.objective)
    np.testing.assert_allclose(drawn["validation"], np.c_[[2, 3], again.valid_objective])
    other = sq.LinearGaussianSSM(latent_dim=1).fit(waves()[0], max_iter=3).fit_report_
    assert [a.get_title(loc="left") for a in other.plot().axes] == ["Objective"]


def test_progress_is_shown_only_when_asked_for(capfd) -> None:
    model = sq.RNN("gru", 2, max_epochs=2)
    model.fit(waves(), seed=0)
    assert capfd.readouterr() == ("", "")
    model.fit(waves(), seed=0, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "training" in err


# The guard


class Fragile(sq.RNN):
    """Its emission turns to NaN for the largest series after so many passes."""

    passes = 0

    def emission(self, s, u):
        law = super().emission(s, u)
        if self.training:
            Fragile.passes += 1
        if Fragile.passes <= 6:
            return law
        wild = u.values[..., :1] > 2
        return torch.distributions.Normal(
            torch.where(wild, torch.nan, law.loc), law.scale, validate_args=False
        )


def test_a_run_that_breaks_down_keeps_its_best_weights_and_names_the_series() -> None:
    y = waves(3)
    u = [np.full(len(x), float(k + 1)) for k, x in enumerate(y)]
    calm = sq.RNN("gru", 3, max_epochs=2, batch_size=1).fit(y, u, seed=0, valid_fraction=0.0)
    Fragile.passes = 0
    model = Fragile("gru", 3, max_epochs=20, batch_size=1)
    model.fit(y, u, seed=0, valid_fraction=0.0)
    report = model.fit_report_
    assert report.n_iter == 2
    assert not report.converged.any()
    assert "epoch 2: series 2 gave a loss that is not finite" in report.messages[0]
    np.testing.assert_array_equal(weights(model), weights(calm))


# Precision


@pytest.mark.parametrize("model", [sq.RNN("gru", 4), sq.DMM(2, 4, 4, kl_warmup=0)])
def test_mixed_precision_stays_near_full_precision(
    model: sq.StateSpaceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Hand-fused loops, which draw their noise at once, are left out of autocasting.
    monkeypatch.setattr(type(model), "unroll", sq.StateSpaceModel.unroll)
    options = {"seed": 0, "max_epochs": 3, "valid_fraction": 0.0}
    full = model.clone().fit(waves(), **options).fit_report_
    mixed = model.clone().fit(waves(), precision="bf16-mixed", **options)
    report = mixed.fit_report_
    assert all(p.dtype == torch.float32 for p in mixed.parameters())
    assert report.objective != full.objective
    # bfloat16 has 8 bits: a relative error of 2^-8 in every layer.
    np.testing.assert_allclose(report.objective, full.objective, rtol=0.03)


def test_loss_scaling_skips_an_overflow_and_goes_on() -> None:
    """float16 itself needs a GPU at this level; its arithmetic runs on the CPU as well."""
    y = waves()
    model = sq.RNN("gru", 4, scale=None, max_epochs=1).fit(y, seed=0)
    _, batch, _ = prepare(model, y, None)
    options = replace(TrainingOptions(), precision="16-mixed", clip=1e9)
    plain = Updater.of(copy.deepcopy(model), replace(options, precision="32-true"))
    scaled = Updater.of(copy.deepcopy(model), options)
    scaled.scaler._init_scale = 2.0**40  # overflows float16 for sure
    call = {"beta": 1.0, "rate": 1e-3, "generator": torch.Generator(), "due": False}
    weight = 1 / int(batch.lengths.sum())
    before = [p.detach().clone() for p in scaled.evaluation.parameters()]
    skipped = scaled(batch, weight=weight, **call)
    assert not skipped.fault
    assert not np.isfinite(skipped.norm)
    for a, b in zip(before, scaled.evaluation.parameters(), strict=True):
        assert torch.equal(a, b)
    assert scaled.scaler.get_scale() == 2.0**39
    scaled.scaler.update(1024.0)
    norms = [updater(batch, weight=weight, **call).norm for updater in (plain, scaled)]
    assert norms[1] == pytest.approx(norms[0], rel=0.02)
    scaled.scaler.update(0.5)
    bad = replace(batch, x=batch.x * 1e30)
    assert "not finite" in scaled(bad, weight=weight, **call).fault


def test_float16_without_a_gpu_is_refused() -> None:
    with pytest.raises(ValueError, match="bf16-mixed"):
        sq.RNN(max_epochs=1).fit(waves(), precision="16-mixed")


# Settings


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"schedule": "step"}, "schedule"),
        ({"precision": "fp8"}, "precision"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"average": 1.0}, "average"),
        ({"padding": -0.1}, "padding"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"evaluate_every": 0}, "evaluate_every"),
        ({"lr_floor": 2.0}, "lr_floor"),
        ({"checkpoint": "nowhere/to/go"}, "folder"),
        ({"devices": 2}, "torchrun"),
        ({"epochs": 3}, "unknown training options"),
    ],
)
def test_impossible_settings_are_named(option: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sq.RNN(max_epochs=1).fit(waves(), **option)


def test_objectives_take_their_own_settings() -> None:
    options = read_options(sq.DMM(), "elbo", {"free_bits": 0.5, "n_particles": 3})
    assert (options.objective.free_bits, options.objective.n_particles) == (0.5, 3)
    assert read_options(sq.RNN(), "mle", {}).objective.name == "elbo"


class Latent(sq.DMM):
    learners = dict.fromkeys(("elbo", "iwae", "fivo", "rws"), "gradient")


@pytest.mark.parametrize("method", ["iwae", "fivo", "rws"])
def test_particle_objectives_train_by_their_names(method: str) -> None:
    assert read_options(sq.DMM(), method, {}).objective.n_particles == 4
    model = Latent(1, 3, 3, max_epochs=2, kl_warmup=0).fit(waves(3, 12), method=method, seed=0)
    report = model.fit_report_
    assert report.method == method
    assert np.isfinite(report.valid_objective).all()
    # The bound is the reconstruction less the divergence, with the full weight of the latter.
    np.testing.assert_allclose(
        np.array(report.reconstruction) - report.divergence, report.objective, rtol=1e-5
    )
