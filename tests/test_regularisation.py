"""Dropout, layer normalisation and options of the emission heads of the deep models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import seqdgm as sq
from seqdgm.inference import joint
from seqdgm.inference.objectives import Objective, along, evaluate, replicate
from seqdgm.inference.scan import scan
from seqdgm.models.lstm_ssm import LSTMSSM
from seqdgm.models.noisin import Noisin
from seqdgm.models.srnn import SRNN
from seqdgm.models.storn import STORN
from seqdgm.models.vrnn import VRNN
from seqdgm.models.zforcing import ZForcing
from seqdgm.nn import GaussianProposal
from seqdgm.nn.dropout import Dropout, thinned
from seqdgm.testing import check_model
from seqdgm.types import Batch, make_generator

LATENT: dict[str, Callable[..., Any]] = {
    "dmm": lambda **k: sq.DMM(2, 4, 5, **k),
    "dmm-feedback": lambda **k: sq.DMM(2, 4, 5, feedback=True, **k),
    "lstm-ssm": lambda **k: LSTMSSM(2, 4, 5, **k),
    "storn": lambda **k: STORN(2, 4, 5, **k),
    "vrnn": lambda **k: VRNN(2, 4, 5, **k),
    "srnn": lambda **k: SRNN(2, 4, 5, **k),
    "zforcing": lambda **k: ZForcing(2, 4, 5, **k),
}
MODELS = LATENT | {
    "rnn": lambda **k: sq.RNN("gru", 4, **k),
    "noisin": lambda **k: Noisin("gru", 4, **k),
}


def built(make: Callable[..., Any], **options: Any) -> Any:
    """The model with random networks in training, in double precision."""
    model = make(**options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model.build(2, 0)
    return model.double().train()


def batch_of(n: int = 3, steps: int = 5, lengths: tuple[int, ...] = (5, 3, 4)) -> Batch:
    x = torch.randn(n, steps, 2, generator=make_generator(1), dtype=torch.float64)
    ends = torch.tensor(lengths[:n])
    mask = (torch.arange(steps) < ends[:, None])[..., None].expand_as(x)
    zeros = x.new_zeros(n, steps, 0)
    return Batch(x * mask, mask, ends, zeros, torch.arange(n), tuple(range(n)))


def waves() -> list[np.ndarray]:
    rng = np.random.default_rng(1)
    return [np.sin(np.arange(n) / 3) + 0.2 * rng.normal(size=n) for n in (8, 11, 7, 10)]


# ----------------------------------------------------------------------------------------- dropout


def test_masks_have_the_rate_and_keep_the_mean() -> None:
    layer, n, width = Dropout(0.3), 4000, 25
    with thinned(make_generator(0), n):
        y = layer(torch.ones(n, width, dtype=torch.float64))
    kept = y > 0
    assert torch.equal(y[kept], torch.full_like(y[kept], 1 / 0.7))
    error = (0.7 * 0.3 / kept.numel()) ** 0.5
    assert abs(kept.double().mean() - 0.7) < 5 * error
    # Series and elements are thinned independently of each other.
    by_series, by_element = kept.double().mean(1), kept.double().mean(0)
    for means, count in ((by_series, width), (by_element, n)):
        spread = means.var() / (0.7 * 0.3 / count)
        assert abs(spread - 1) < 5 * (2 / len(means)) ** 0.5


def test_a_series_has_one_mask_at_each_place() -> None:
    layer, other = Dropout(0.5), Dropout(0.5)
    with thinned(make_generator(0), 3):
        once = layer(torch.ones(3, 40))
        over_time = layer(torch.ones(3, 7, 40))
        particles = layer(torch.ones(3, 4, 7, 40))
        copies = layer(torch.ones(6, 7, 40))
        assert not torch.equal(other(torch.ones(3, 40)), once)
    assert torch.equal(over_time, once[:, None].expand(3, 7, 40))
    assert torch.equal(particles, once[:, None, None].expand(3, 4, 7, 40))
    assert torch.equal(copies, over_time.repeat_interleave(2, 0))
    assert len({tuple(row.tolist()) for row in once}) == 3
    with thinned(make_generator(0), 3):
        assert torch.equal(layer(torch.ones(3, 40)), once)
        with pytest.raises(RuntimeError):
            layer(torch.ones(4, 40))


def test_outside_of_training_nothing_is_thinned() -> None:
    x = torch.ones(2, 3)
    assert Dropout(0.0)(x) is x
    assert Dropout(0.5).eval()(x) is x
    with pytest.raises(RuntimeError, match=r"needs a generator; call eval\(\)"):
        Dropout(0.5)(x)


@pytest.mark.parametrize("name", MODELS)
def test_the_emission_is_that_of_the_network_without_the_features(name: str) -> None:
    batch, objective = batch_of(1), Objective("elbo", n_particles=2)
    model = built(MODELS[name], dropout=0.5)
    thin = copy.deepcopy(model)
    for place in model.modules():
        if isinstance(place, Dropout) and place is not model.thin_features:
            place.rate = 0.0
    with thinned(make_generator(4), 1):
        value = evaluate(model, batch, objective, 1.0, make_generator(5)).value
        mask = model.thin_features(torch.ones(1, 4, dtype=torch.float64))
    assert 0 < int((mask == 0).sum()) < 4
    for place in thin.modules():
        if isinstance(place, Dropout):
            place.rate = 0.0
    with torch.no_grad():
        thin.head.linear.weight *= mask
    plain = evaluate(thin, batch, objective, 1.0, make_generator(5)).value
    torch.testing.assert_close(value, plain)


@pytest.mark.parametrize("name", sorted(set(MODELS) - {"dmm", "lstm-ssm"}))
def test_observations_that_are_fed_back_are_left_out(name: str) -> None:
    x, model = batch_of(1).x, built(MODELS[name], dropout=0.5)
    with thinned(make_generator(2), 1):
        found = model.embed(x)
        mask = model.thin_fed(torch.ones(1, 2, dtype=torch.float64))
    assert int((mask == 0).sum()) == 1
    torch.testing.assert_close(found, model.eval().embed(x * mask))


@pytest.mark.parametrize("network", ["filtering", "smoothing", "bidirectional", "mean-field"])
def test_encoders_leave_out_observations_and_summaries(network: str) -> None:
    batch = batch_of(1)
    model = built(LATENT["dmm"], dropout=0.5, inference_network=network)
    encoder = model.encoder
    with thinned(make_generator(2), 1):
        found = model.encode(batch)
        read = encoder.thin_read(torch.ones(1, 2, dtype=torch.float64))
        said = encoder.thin_summary(torch.ones(1, encoder.context_dim, dtype=torch.float64))
    assert int((read == 0).sum()) == 1
    model.eval()
    with torch.no_grad():
        for key, weight in encoder.named_parameters():
            if key.endswith(("weight_ih_l0", "net.0.weight")):
                weight[:, :2] *= read
    torch.testing.assert_close(found, model.encode(batch) * said)


@pytest.mark.parametrize("name", LATENT)
def test_the_thinned_network_is_one_in_every_way_of_running_it(name: str) -> None:
    """In the fused pass and in the loop over the steps, for all particles and paths."""
    batch, count = batch_of(), 4
    model = built(LATENT[name], dropout=0.4)
    with torch.no_grad(), thinned(make_generator(3), 3):
        trace = scan(model, batch, make_generator(5), count)
        found = along(model, replicate(batch, count), trace, closed=False)
        z = trace.z.unflatten(0, (3, count))
        path = joint.follow(model, batch, z)
        x, mask = (
            part[:, None].expand(3, count, *part.shape[1:]) for part in (batch.x, batch.mask)
        )
        log_g = joint.log_emission(model, batch, path, x, mask)
        log_f = joint.log_prior(model, batch, path, z)
        log_q = joint.log_proposal(model, batch, path, z, model.encode(batch))
    torch.testing.assert_close(found.reconstruction.unflatten(0, (3, count)), log_g)
    torch.testing.assert_close(found.divergence.unflatten(0, (3, count)), log_q - log_f)


@pytest.mark.parametrize("method", ["elbo", "iwae", "fivo", "rws"])
def test_masks_come_from_the_generator_alone(method: Any) -> None:
    model = built(LATENT["vrnn"], dropout=0.4)
    objective = Objective(method, n_particles=3)
    before = torch.get_rng_state()

    def value(seed: int) -> Tensor:
        generator = make_generator(seed)
        with thinned(generator, 3):
            return evaluate(model, batch_of(), objective, 1.0, generator).value

    assert torch.equal(value(0), value(0))
    assert not torch.equal(value(0), value(1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["dmm", "vrnn", "noisin"])
def test_training_with_dropout_repeats_and_its_likelihood_has_none(name: str) -> None:
    def fitted(dropout: float) -> Any:
        model = MODELS[name](dropout=dropout, max_epochs=2, batch_size=3)
        return model.fit(waves(), seed=0)

    one, other, none = fitted(0.3), fitted(0.3), fitted(0.0)
    assert one.fit_report_.objective == other.fit_report_.objective
    assert one.fit_report_.objective != none.fit_report_.objective
    none.load_state_dict(one.state_dict())
    values = [model.log_prob(waves(), n_particles=5, seed=1).value for model in (one, none)]
    assert np.array_equal(*values)


class Stop(Exception):  # noqa: N818 - stands for whatever ends a process
    """What interrupts."""


@pytest.mark.parametrize("name", ["rnn", "dmm-feedback", "srnn"])
def test_a_resumed_run_draws_the_masks_of_the_uninterrupted_one(tmp_path: Path, name: str) -> None:
    def model() -> Any:
        return MODELS[name](dropout=0.3, layer_norm=True, max_epochs=3, batch_size=2)

    def interrupt(report: Any) -> None:
        if report.n_iter == 2:
            raise Stop

    path = tmp_path / "run.safetensors"
    whole = model().fit(waves(), seed=0)
    with pytest.raises(Stop):
        model().fit(waves(), seed=0, checkpoint=path, checkpoint_minutes=0, on_epoch=interrupt)
    resumed = model().fit(waves(), seed=0, resume=path)
    assert resumed.fit_report_.objective == whole.fit_report_.objective
    for key, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[key]), key
    other = MODELS[name](dropout=0.2, layer_norm=True, max_epochs=3, batch_size=2)
    with pytest.raises(ValueError, match=r"dropout=0\.3"):
        other.fit(waves(), seed=0, resume=path)


def test_windows_of_a_series_share_its_masks() -> None:
    def objective(**options: Any) -> float:
        model = sq.RNN("gru", 4, dropout=0.4, max_epochs=1, learning_rate=1e-12, batch_size=4)
        return model.fit(waves(), seed=0, **options).fit_report_.objective[0]

    assert objective(truncate=5) == pytest.approx(objective(), rel=1e-5)


def test_particle_em_thins_its_networks() -> None:
    def fitted(dropout: float, seed: int) -> Any:
        model = LATENT["lstm-ssm"](dropout=dropout, max_epochs=2)
        return model.fit(waves(), method="particle-em", n_particles=5, seed=seed)

    first = [fitted(dropout, 0).state_dict() for dropout in (0.4, 0.4, 0.0)]
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in first[:2]), strict=True))
    assert not torch.equal(first[0]["head.linear.weight"], first[2]["head.linear.weight"])


@pytest.mark.parametrize("rate", [-0.1, 1.0, float("nan")])
def test_a_rate_out_of_range_is_refused(rate: float) -> None:
    for make in MODELS.values():
        with pytest.raises(ValueError, match=r"dropout=.* must be at least 0 and below 1"):
            make(dropout=rate)


# ------------------------------------------------------------------------------ layer normalisation


@pytest.mark.parametrize("name", MODELS)
def test_features_and_summaries_are_normalised(name: str) -> None:
    batch = batch_of()
    model, plain = (built(MODELS[name], layer_norm=on).eval() for on in (True, False))
    extra = set(model.state_dict()) - set(plain.state_dict())
    latent = name in LATENT
    assert len(extra) == 4 if latent else 2
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k not in extra})
    features = torch.randn(3, 5, 4, generator=make_generator(0), dtype=torch.float64)
    normalised = F.layer_norm(features, (4,))
    torch.testing.assert_close(model.emit(features).mean, plain.head(normalised).mean)
    if latent:
        wide = batch.x.new_zeros(3, 5, model.encoder.inputs_dim)
        given = (batch.x, batch.mask, wide, batch.lengths)
        summary = plain.encoder(*given)
        wanted = F.layer_norm(summary, summary.shape[-1:]) * batch.valid[..., None]
        torch.testing.assert_close(model.encoder(*given), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmm-feedback", "srnn", "rnn"])
def test_regularised_models_pass_the_conformance_suite(name: str) -> None:
    model = MODELS[name](dropout=0.2, layer_norm=True, max_epochs=3, patience=2)
    check_model(model)


# ------------------------------------------------------------------------- options of the emission


@pytest.mark.parametrize(
    ("emission", "options", "shape"),
    [
        ("gaussian", {"min_scale": 0.01}, 2 * 3),
        ("mixture", {"n_components": 2}, 3 * 2 * 3),
        ("gaussian-lowrank", {"rank": 2}, 4 * 3),
        ("nade", {"hidden_dim": 7}, 3 + 7),
        ("flow", {"n_layers": 2, "hidden_dim": 9}, 2 * 3 + 2 * 9),
        ("categorical", {"n_categories": 4}, 4 * 3),
    ],
)
@pytest.mark.parametrize("make", [MODELS["rnn"], MODELS["dmm"]])
def test_options_reach_the_head_and_the_file(
    tmp_path: Path, make: Any, emission: str, options: dict[str, Any], shape: int
) -> None:
    y = np.random.default_rng(0).integers(0, 2, size=(2, 12, 3)).astype(float)
    y = (
        y
        if emission in ("nade", "categorical")
        else y + np.random.default_rng(1).normal(size=y.shape)
    )
    stored = {key: np.int64(v) if isinstance(v, int) else v for key, v in options.items()}
    model = make(emission=emission, emission_options=stored, max_epochs=1).fit(y, seed=0)
    assert model.head.linear.out_features == shape
    assert model.get_params()["emission_options"] == options
    assert repr(options["min_scale"]) in repr(model) if "min_scale" in options else True
    model.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors")
    assert again.get_params()["emission_options"] == options
    values = [m.log_prob(y, n_particles=4, seed=0).value for m in (model, again)]
    assert np.array_equal(*values)
    assert model.clone().fit(y, seed=0).head.linear.out_features == shape


@pytest.mark.parametrize("make", MODELS.values())
@pytest.mark.parametrize(
    ("emission", "options", "message"),
    [
        ("gaussian-lowrank", {"rnk": 3}, r"no option 'rnk'; it has \['min_scale', 'rank'\]"),
        ("flow", {"rank": 3}, r"it has \['hidden_dim', 'min_scale', 'n_layers'\]"),
        ("bernoulli", {"min_scale": 0.1}, "no option 'min_scale'; it has none"),
        ("mixture", {"n_components": 0}, "n_components=0 must be a whole number, at least 1"),
        ("gaussian-lowrank", {"rank": 1.5}, "rank=1.5 must be a whole number"),
        ("gaussian", {"min_scale": 0.0}, "min_scale=0.0 must be positive"),
    ],
)
def test_options_that_a_head_has_not_are_named(
    make: Any, emission: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(emission=emission, emission_options=options)


def test_options_of_another_head_do_not_survive_its_change() -> None:
    model = sq.RNN(emission="gaussian-lowrank", emission_options={"rank": 2})
    with pytest.raises(ValueError, match="'gaussian' has no option 'rank'"):
        model.set_params(emission="gaussian")
    model.set_params(emission="gaussian", emission_options=None)


def test_fewer_categories_than_the_data_have_are_refused() -> None:
    y = np.arange(12.0) % 5
    model = sq.RNN("gru", 4, emission="categorical", emission_options={"n_categories": 3})
    with pytest.raises(ValueError, match="whole numbers from 0 to 3 - 1"):
        model.fit(y, seed=0)


def test_a_combiner_reads_thinned_summaries_in_its_fused_loop() -> None:
    """The loop by hand is that of single steps, with zeros among the summaries."""
    generator, lengths = make_generator(0), torch.tensor([5, 3])
    law = GaussianProposal(2, 6, 6).double()
    c = torch.randn(2, 5, 6, generator=generator, dtype=torch.float64)
    layer = Dropout(0.5)
    with thinned(make_generator(1), 2):
        c = layer(c)
    z = torch.zeros(2, 2, dtype=torch.float64)
    found, path = law.unroll(c, z, lengths, make_generator(2))
    for t in range(3):
        torch.testing.assert_close(law(c[:, t], z).loc, found.loc[:, t])
        z = path[:, t]
