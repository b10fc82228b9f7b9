"""Learning of switching models against exhaustive sums over all paths of regimes."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import chi2, multivariate_normal
from test_switching import dense, exhaustive, within

import seqdgm as sq
from seqdgm.inference.rao_blackwell import draw_paths
from seqdgm.inference.regime_em import Statistics, expect
from seqdgm.inference.smc import Reference, SMCOptions
from seqdgm.models._regimes import NAMES, Regimes
from seqdgm.models.switching import SwitchingLinearSSM
from seqdgm.prepare import prepare
from seqdgm.testing import CHECKS, check_model

STEPS = 5
EVERYTHING = ("Pi", "p0", "F", "H", "Q", "R", "m0", "P0", "b", "d")
QUICK = {"max_iter": 3, "burn_in": 2, "n_starts": 1, "n_particles": 6, "n_trajectories": 2}


def two_regimes(**options) -> SwitchingLinearSSM:
    """Two columns of a pair of states; the matrices differ between the regimes."""
    given = {
        "Pi": [[0.8, 0.2], [0.4, 0.6]],
        "F": [[[0.9, 0.2], [-0.1, 0.7]], [[0.5, -0.4], [0.3, 0.9]]],
        "H": [[1.0, 0.0], [0.5, 1.0]],
        "Q": [[[0.5, 0.1], [0.1, 0.3]], [[3.0, 0.6], [0.6, 1.8]]],
        "R": [[[0.4, 0.15], [0.15, 0.6]], [[1.0, 0.0], [0.0, 0.3]]],
        "m0": [0.5, -0.5],
        "P0": [[1.0, 0.0], [0.0, 2.0]],
        "b": [[0.0, 0.0], [1.0, -1.0]],
        "d": [[0.0, 0.0], [0.5, 0.0]],
        "p0": [0.7, 0.3],
    }
    return SwitchingLinearSSM(**{**given, **options})


def data(model: SwitchingLinearSSM, seed: int = 0) -> np.ndarray:
    """A short series with a gap, and a vector seen in part."""
    y = model.sample(STEPS, seed=seed).values[0].copy()
    y[3] = np.nan
    y[4, 0] = np.nan
    return y


def parameters(model: SwitchingLinearSSM) -> Regimes:
    return Regimes(*(getattr(model, f"{name}_") for name in NAMES))


@cache
def posterior(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """All paths of regimes, and their exact probabilities given the data."""
    return path_law(two_regimes(), data(two_regimes(), seed))


def path_law(model: SwitchingLinearSSM, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    paths = np.array(list(itertools.product(range(2), repeat=len(y))))
    chain, first = model.Pi_.numpy(), model.p0_.numpy()
    seen = np.isfinite(y.ravel())
    logs = []
    for path in paths:
        mean, cov, load, offset, noise = dense(model, tuple(path))
        h = load[seen]
        s = h @ cov @ h.T + noise[np.ix_(seen, seen)]
        law = multivariate_normal(h @ mean + offset[seen], s)
        moves = sum(np.log(chain[i, j]) for i, j in itertools.pairwise(path))
        logs.append(np.log(first[path[0]]) + moves + law.logpdf(y.ravel()[seen]))
    logs = np.array(logs)
    return paths, np.exp(logs - np.logaddexp.reduce(logs))


def dense_statistics(
    model: SwitchingLinearSSM, y: np.ndarray, path: np.ndarray
) -> dict[str, np.ndarray]:
    """What `expect` must give for one path, from the joint Gaussian of all states and data."""
    mean, cov, load, offset, noise = dense(model, tuple(path))
    steps, n, dim = len(path), model.state_dim, y.shape[1]
    seen = np.isfinite(y.ravel())
    both = np.block([[cov, cov @ load.T], [load @ cov, load @ cov @ load.T + noise]])
    centre = np.concatenate([mean, load @ mean + offset])
    known = np.flatnonzero(np.concatenate([np.zeros(steps * n, bool), seen]))
    gain = np.linalg.solve(both[np.ix_(known, known)], both[known]).T
    at = centre + gain @ (y.ravel()[seen] - centre[known])
    left = both - gain @ both[known]
    second = left + np.outer(at, at)
    out = {"first": np.zeros(2), "moves": np.zeros((2, 2))}
    for part, size in (("start", n), ("transition", n), ("emission", dim)):
        width = 1 if part == "start" else n + 1
        out |= {f"{part}.yy": np.zeros((2, size, size)), f"{part}.yg": np.zeros((2, size, width))}
        out |= {f"{part}.gg": np.zeros((2, width, width)), f"{part}.steps": np.zeros(2)}
    one = len(at)
    wide = np.block([[second, at[:, None]], [at[None], np.ones((1, 1))]])

    def add(part: str, k: int, targets: np.ndarray, shift: np.ndarray, g: list[int]) -> None:
        # y - shift is a linear map of (all states, all data, 1)
        pick = np.zeros((len(targets), one + 1))
        pick[np.arange(len(targets)), targets] = 1.0
        pick[:, one] = -shift
        out[f"{part}.yy"][k] += pick @ wide @ pick.T
        out[f"{part}.yg"][k] += pick @ wide[:, g]
        out[f"{part}.gg"][k] += wide[np.ix_(g, g)]
        out[f"{part}.steps"][k] += 1

    m0, b, d = (getattr(model, f"{name}_").numpy() for name in ("m0", "b", "d"))
    out["first"][path[0]] += 1
    add("start", path[0], np.arange(n), m0[path[0]], [one])
    for t, k in enumerate(path):
        now = np.arange(t * n, (t + 1) * n)
        if t:
            out["moves"][path[t - 1], k] += 1
            add("transition", k, now, b[k], [*(now - n), one])
        if np.isfinite(y[t]).any():
            shown = steps * n + np.arange(t * dim, (t + 1) * dim)
            add("emission", k, shown, d[k], [*now, one])
    return out


def flat(statistics: Statistics) -> dict[str, np.ndarray]:
    out = {"first": statistics.first.numpy(), "moves": statistics.moves.numpy()}
    for part in ("start", "transition", "emission"):
        sums = getattr(statistics, part)
        out |= {f"{part}.{name}": getattr(sums, name).numpy() for name in sums._fields}
    return out


def batch_of(model: SwitchingLinearSSM, y):
    return prepare(model, y, None)[1]


def along(paths: np.ndarray) -> torch.Tensor:
    """Paths as `expect` takes them: one path for each series."""
    return torch.from_numpy(paths.astype(float))[:, None, :, None]


def test_expected_statistics_are_those_of_the_joint_gaussian() -> None:
    model = two_regimes()
    y, now = data(model), parameters(model)
    for path in posterior()[0][[5, 26]]:
        found = flat(expect(model, batch_of(model, y), now, now, along(path[None])))
        for name, exact in dense_statistics(model, y, path).items():
            np.testing.assert_allclose(found[name], exact, rtol=0, atol=1e-9, err_msg=name)


def test_statistics_do_not_depend_on_where_they_are_measured_from() -> None:
    """Residual moments from another origin are the same, a missing element's shift included."""
    model = two_regimes()
    batch, now = batch_of(model, data(model)), parameters(model)
    other = now._replace(m0=now.m0 + 2, b=now.b - 1, d=now.d + 3)
    z = along(posterior()[0][19][None])
    a, b = (expect(model, batch, now, origin, z) for origin in (now, other))
    pairs = (("start", now.m0[..., :0, None].mT, now.m0, now.m0, other.m0),)
    pairs += (("transition", now.F, now.b, now.b, other.b),)
    pairs += (("emission", now.H, now.d, now.d, other.d),)
    for name, coef, offset, first, second in pairs:
        coef = now.m0.new_zeros(2, 2, 0) if name == "start" else coef
        one = getattr(a, name).residual(coef, offset - first)
        two = getattr(b, name).residual(coef, offset - second)
        for p, q in zip(one, two, strict=True):
            assert torch.allclose(p, q, rtol=0, atol=1e-9)


def test_paths_and_series_of_any_length_add_up() -> None:
    model = two_regimes()
    now = parameters(model)
    long, short = data(model), data(model, 1)[:4]
    paths = [posterior()[0][[5, 22]], posterior()[0][[10, 29]]]
    both = along(np.concatenate(paths)).reshape(2, 2, STEPS, 1)
    found = flat(expect(model, batch_of(model, [long, short]), now, now, both))
    alone = [
        dense_statistics(model, y, path[: len(y)])
        for y, group in zip((long, short), paths, strict=True)
        for path in group
    ]
    for name, value in found.items():
        np.testing.assert_allclose(value, sum(one[name] for one in alone) / 2, atol=1e-9)


@pytest.mark.parametrize("proposal", ["auto", "bootstrap"])
def test_drawn_paths_give_the_exact_expected_statistics(proposal: str) -> None:
    """From exact references one conditional filter of 4 particles leaves the exact law."""
    model, groups, size = two_regimes(), 20, 200
    y, now = data(model), parameters(model)
    paths, chance = posterior()
    rng = np.random.default_rng(0)
    held = paths[rng.choice(len(paths), size=groups * size, p=chance)]
    batch = batch_of(model, np.repeat(y[None], groups * size, 0))
    how = SMCOptions(
        4,
        resampler="multinomial",
        threshold=1.0,
        proposal=proposal,
        reference=Reference(along(held)[:, 0], ancestor_sampling=False),
    )
    z = draw_paths(model, batch, how, torch.Generator().manual_seed(0), 1).z
    moved = (z[:, 0, :, 0].numpy() != held).any(1)
    assert moved.mean() > 0.3
    found = [
        flat(expect(model, batch.take(rows), now, now, z[rows]))
        for rows in torch.arange(groups * size).reshape(groups, size)
    ]
    exact = [dense_statistics(model, y, path) for path in paths]
    for name in found[0]:
        target = np.tensordot(chance, np.array([one[name] for one in exact]), 1)
        within(np.array([one[name] for one in found]) / size, target)


def exact_statistics(model: SwitchingLinearSSM, y: np.ndarray, origin: Regimes) -> Statistics:
    """The whole E-step, by the sum over all paths."""
    paths, chance = path_law(model, y)
    batch, now = batch_of(model, y), parameters(model)
    parts = [expect(model, batch, now, origin, along(path[None])) for path in paths]

    def mean(*leaves):
        if isinstance(leaves[0], torch.Tensor):
            weights = torch.from_numpy(chance).reshape(-1, *[1] * leaves[0].ndim)
            return (weights * torch.stack(leaves)).sum(0)
        return type(leaves[0])(*(mean(*group) for group in zip(*leaves, strict=True)))

    return mean(*parts)


SHARING = {
    "nothing": (),
    "emission": ("H", "R", "d"),
    "loading of unequal noise": ("H",),
    "transition of unequal noise": ("F", "m0"),
}


@pytest.mark.parametrize("shared", SHARING)
def test_exact_em_climbs(shared: str) -> None:
    """With the exact E-step the likelihood never falls, whatever the regimes share."""
    draft, truth = two_regimes(), two_regimes()
    y = data(truth, 3)
    given = {name: getattr(truth, f"{name}_").numpy() for name in NAMES}
    given |= {name: given[name][0] for name in SHARING[shared]}
    draft = SwitchingLinearSSM(**given, learn=EVERYTHING)
    batch = batch_of(truth, y)
    (now,) = draft.em_starts(batch, 1, torch.Generator())
    origin, value = now, -np.inf
    for _ in range(4):
        draft.set_regimes(now)
        last, value = value, exhaustive(draft, y, STEPS).log_likelihood
        assert value > last - 1e-9
        now = draft.em_step(now, origin, exact_statistics(draft, y, origin))
    assert value > exhaustive(truth, y, STEPS).log_likelihood + 1
    for name in SHARING[shared]:
        assert torch.equal(getattr(now, name)[0], getattr(now, name)[1])


def test_what_is_given_stays() -> None:
    truth = two_regimes()
    y = data(truth)
    draft = SwitchingLinearSSM(
        **{name: getattr(truth, f"{name}_").numpy() for name in NAMES}, learn=("Q", "Pi")
    )
    (now,) = draft.em_starts(batch_of(truth, y), 1, torch.Generator())
    draft.set_regimes(now)
    found = draft.em_step(now, now, exact_statistics(draft, y, now))
    changed = {n for n in NAMES if not torch.equal(getattr(now, n), getattr(found, n))}
    assert changed == {"Q", "Pi"}


def test_regression_with_a_known_part_is_the_conditional_maximum() -> None:
    """Only F of regime pairs is learned: no other F of the same cost is better (gradient zero)."""
    truth = two_regimes()
    y = data(truth)
    given = {name: getattr(truth, f"{name}_").numpy() for name in NAMES}
    draft = SwitchingLinearSSM(**given | {"F": given["F"][0]}, learn=("F",))
    (now,) = draft.em_starts(batch_of(truth, y), 1, torch.Generator())
    draft.set_regimes(now)
    statistics = exact_statistics(draft, y, now)
    found = draft.em_step(now, now, statistics)
    coef = found.F[0].clone().requires_grad_()
    moments = statistics.transition.residual(coef.expand(2, 2, 2), now.b - now.b)
    loss = (torch.linalg.inv(now.Q) * moments.rr).sum()
    (gradient,) = torch.autograd.grad(loss, coef)
    assert gradient.abs().max() < 1e-9
    assert not torch.equal(found.F, now.F)


def test_a_regime_that_is_never_visited_keeps_its_parameters() -> None:
    truth = two_regimes()
    y = data(truth)
    given = {name: getattr(truth, f"{name}_").numpy() for name in NAMES}
    draft = SwitchingLinearSSM(**given, learn=EVERYTHING)
    (now,) = draft.em_starts(batch_of(truth, y), 1, torch.Generator())
    draft.set_regimes(now)
    calm = along(np.zeros((1, STEPS)))
    found = draft.em_step(now, now, expect(draft, batch_of(truth, y), now, now, calm))
    for name in ("F", "Q", "H", "R", "m0", "P0", "b", "d"):
        assert torch.equal(getattr(found, name)[1], getattr(now, name)[1]), name
        assert torch.isfinite(getattr(found, name)).all()
    assert 0 < found.Pi[0, 1] < 0.05
    assert 0 < found.p0[1] < 0.05


# -- whole fits -----------------------------------------------------------------------------------


def level(**options) -> SwitchingLinearSSM:
    """A level that is calm or wild."""
    given = {"F": [[1.0]], "H": [[1.0]], "n_regimes": 2}
    return SwitchingLinearSSM(**given | options)


def jumps(steps: int, n: int, seed: int) -> np.ndarray:
    truth = SwitchingLinearSSM(
        Pi=[[0.9, 0.1], [0.3, 0.7]], F=[[1.0]], H=[[1.0]], Q=[[[0.05]], [[9.0]]], R=[[0.5]]
    )
    return truth.sample(steps, n, seed=seed).values.copy()


def exact_value(model: SwitchingLinearSSM, y: np.ndarray) -> float:
    return sum(exhaustive(model, one, len(one)).log_likelihood for one in y)


def test_exact_likelihood_rises_and_a_seed_repeats_the_fit() -> None:
    y = jumps(6, 8, 0)
    y[0, 3] = np.nan
    options = {"max_iter": 10, "burn_in": 5, "n_starts": 1, "n_particles": 8}
    model = level().fit(y, seed=0, **options)
    start = level()
    start.set_regimes(start.em_starts(batch_of(model, y), 1, torch.Generator())[0])
    assert exact_value(model, y) > exact_value(start, y) + 2
    report = model.fit_report_
    assert report.method == "particle-em"
    assert report.n_iter == len(report.objective) == 10
    first, again, other = (level().fit(y, seed=seed, **QUICK) for seed in (0, 0, 1))
    assert torch.equal(first.Q_, again.Q_)
    assert not torch.equal(first.Q_, other.Q_)
    assert torch.equal(model.F_, torch.ones(2, 1, 1).double())


def test_screening_keeps_the_best_start() -> None:
    y = jumps(8, 6, 2)
    model = level().fit(y, seed=0, n_starts=3, screening=2, max_iter=3, n_particles=5)
    assert model.fit_report_.n_iter == 3


@pytest.mark.slow
def test_recovery_by_the_likelihood_ratio() -> None:
    """Twice the gain over the truth is chi-squared, with a degree of freedom for each parameter."""
    truth = SwitchingLinearSSM(
        Pi=[[0.95, 0.05], [0.1, 0.9]],
        F=[[[0.9]], [[-0.6]]],
        H=[[1.0]],
        Q=[[[0.1]], [[1.0]]],
        R=[[0.2]],
        m0=[0.0],
        P0=[[1.0]],
        p0=[0.5, 0.5],
    )
    y = truth.sample(100, 16, seed=0).values
    known = {"H": [[1.0]], "m0": [0.0], "P0": [[1.0]], "p0": [0.5, 0.5]}
    model = SwitchingLinearSSM(**known).fit(y, seed=0, max_iter=30, burn_in=20, n_starts=1)
    found, exact = (m.log_prob(y, n_particles=300, seed=0) for m in (model, truth))
    gain = found.value.sum() - exact.value.sum()
    slack = 5 * np.sqrt((found.stderr**2 + exact.stderr**2).sum())
    free = 2 + 2 + 2 + 1
    assert -slack < gain < chi2.ppf(1 - 1e-6, free) / 2 + slack
    calm = int(model.Q_[:, 0, 0].argmin())
    assert model.F_[calm, 0, 0] > 0.5
    assert model.F_[1 - calm, 0, 0] < 0


@pytest.mark.slow
def test_a_learned_model_conforms() -> None:
    y = jumps(26, 1, 4)[0]
    assert check_model(level(), y, fit_options=QUICK) == tuple(CHECKS)


def test_save_and_load(tmp_path) -> None:
    model = level(learn=("b",)).fit(jumps(10, 2, 1), seed=0, **QUICK)
    model.save(tmp_path / "model.safetensors")
    again = sq.load(tmp_path / "model.safetensors")
    for name in NAMES:
        assert torch.equal(getattr(model, f"{name}_"), getattr(again, f"{name}_"))
    assert {"Pi[0,1]", "Q[1,0,0]", "R[0,0]", "b[1,0]"} <= again.estimates().keys()


def test_nothing_given_but_sizes() -> None:
    model = SwitchingLinearSSM(n_regimes=2, state_dim=2)
    y = two_regimes().sample(12, 3, seed=0).values + 100
    model.fit(y, seed=0, **QUICK | {"n_starts": 2, "screening": 1})
    assert torch.equal(model.H_[0], model.H_[1])
    assert not torch.equal(model.F_[0], model.F_[1])
    assert (torch.linalg.eigvalsh(model.R_) > 0).all()
    assert np.isfinite(model.log_prob(n_particles=50, seed=0).value).all()
    with pytest.raises(ValueError, match="not fitted"):
        SwitchingLinearSSM(n_regimes=2, state_dim=2).filter(y)


def test_singular_noise_asks_for_the_genealogy() -> None:
    draft = SwitchingLinearSSM(H=[[1.0]], R=[[0.0]], n_regimes=2)
    y = np.random.default_rng(0).normal(size=20)
    with pytest.raises(ValueError, match="smoother='genealogy'"):
        draft.fit(y, seed=0, **QUICK)
    fitted = draft.fit(y, seed=0, smoother="genealogy", **QUICK)
    assert torch.isfinite(fitted.Q_).all()


BAD = {
    "no number of regimes": ({"n_regimes": None}, "n_regimes"),
    "no width": ({"F": None, "H": None}, "state_dim"),
    "an unknown name": ({"learn": ("B",)}, "no parameters"),
    "a shared chain": ({"shared": ("Pi",)}, "cannot be the same"),
    "Pi of another size": ({"Pi": np.eye(3)}, "square"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_choices_are_refused(what: str) -> None:
    changed, match = BAD[what]
    with pytest.raises(ValueError, match=match):
        level(**changed)


def test_bad_options_and_data_are_refused() -> None:
    y = jumps(12, 1, 0)[0]
    for option, value in (("n_particles", 1), ("smoother", "ffbs"), ("n_starts", 0)):
        with pytest.raises(ValueError, match=option):
            level().fit(y, **{option: value})
    with pytest.raises(ValueError, match="columns"):
        level().fit(np.zeros((12, 2)))
    with pytest.raises(ValueError, match="too short"):
        level().fit(y[:1])
    with pytest.raises(ValueError, match="given"):
        two_regimes().fit(data(two_regimes()), method="particle-em")
