r"""Gaussian filtering and smoothing of Markov state-space models: what `ekf` and `ukf` share.

Every conditional law of the model is replaced by an affine one with Gaussian noise around the
present Gaussian state (`seqdgm.inference._linearise`), with the mean and covariance of whatever
distribution the model returns: Student-t, Poisson, Bernoulli and the like are moment-matched. The
result is exact for linear-Gaussian models and an approximation without a bound elsewhere.

Covariances are carried as triangular roots through orthogonal reductions, so that they stay
positive semi-definite. Smoothing is the Rauch-Tung-Striebel recursion with the cross-covariances of
the linearised transition.

References
----------
Särkkä and Svensson (2023), *Bayesian Filtering and Smoothing*, 2nd ed., chapters 7-9 and 13-14;
Park and Kailath (1995), New square-root smoothing algorithms, *IEEE Trans. Automatic Control* 41.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.distributions import Distribution

from seqdgm.inference._linearise import Affine, Conditional, Rule, matched, triangular, update
from seqdgm.inference.kalman import _correlated, conditional_emission
from seqdgm.kernels.types import System
from seqdgm.types import Batch, Evidence, Gaussian, Inputs, Prediction, States, tree_map

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


class Step(NamedTuple):
    r"""The Gaussian state of one step, as means and lower triangular roots.

    Attributes
    ----------
    mean, root
        Given the observations up to this step; those of its last step beyond a series' end.
    ahead, ahead_root
        Given the observations before this step.
    increment : Tensor of shape (series,)
        Log-density of the observation given those before.
    link : Affine or None
        This state as a function of the whitened one before; None at the first step.
    """

    mean: Float[Tensor, "series state"]
    root: Float[Tensor, "series state state"]
    ahead: Float[Tensor, "series state"]
    ahead_root: Float[Tensor, "series state state"]
    increment: Float[Tensor, "series"]
    link: Affine | None


# --------------------------------------------------------------------------------------- verbs


@torch.no_grad()
def filter(model: StateSpaceModel, batch: Batch, rule: Rule) -> States:
    """Filtering means and covariances."""
    means, roots, total = [], [], _zeros(batch)
    for step in _steps(model, batch, rule):
        means.append(step.mean)
        roots.append(step.root)
        total = total + step.increment
    return _states(batch, torch.stack(means, 1), torch.stack(roots, 1), total)


@torch.no_grad()
def log_prob(
    model: StateSpaceModel, batch: Batch, rule: Rule, start: Int[Tensor, "series"] | None = None
) -> Evidence:
    """Sum of the Gaussian log-densities of the observations given those before.

    Its error is not known, so its standard error is NaN.
    """
    first = torch.zeros_like(batch.lengths) if start is None else start
    value = _zeros(batch)
    for t, step in enumerate(_steps(model, batch, rule)):
        value = value + torch.where(t >= first, step.increment, 0.0)
    return Evidence(value, "approximation", torch.full_like(value, torch.nan))


def smooth(model: StateSpaceModel, batch: Batch, rule: Rule) -> States:
    """Smoothing means and covariances, and joint draws from the linearised model."""
    out = _smoothed(model, batch, rule)
    outside = ~batch.valid[:, None, :, None]

    def draw(n: int, generator: torch.Generator) -> Tensor:
        return out.draw(n, generator).masked_fill(outside, torch.nan)

    return _states(batch, out.mean, out.root, out.log_likelihood)._replace(draw=draw)


@torch.no_grad()
def forecast(model: StateSpaceModel, batch: Batch, rule: Rule, horizon: int) -> Prediction:
    """Gaussian moments of the steps after each series' end, propagated without observations.

    Joint draws are those of the linearised model.
    """
    total = _zeros(batch)
    for last in _steps(model, batch, rule):
        total = total + last.increment
    mean, root = last.mean, last.root
    path: list[tuple[Affine, Tensor, Affine]] = []
    for j in range(horizon):
        place = _Place.after(batch, j)
        link, root = place.call("transition", partial(_move, model, rule), mean, root)
        mean = link.mean
        place.check("transition", mean, root)
        law = partial(_emit, model, rule, batch.x.shape[2])
        seen = place.call("emission", law, mean, root)
        place.check("emission", seen.mean, seen.load @ seen.load.mT + _square(seen.noise))
        path.append((link, root, seen))

    def simulate(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        xi = _normal(n, last.mean, generator)
        states, observations = [], []
        for link, root, seen in path:
            moved = _apply(link.load, xi) + _shock(link.noise, n, generator)
            xi = torch.linalg.solve_triangular(root[:, None], moved[..., None], upper=False)[..., 0]
            states.append(link.mean[:, None] + moved)
            noise = _shock(seen.noise, n, generator)
            observations.append(seen.mean[:, None] + _apply(seen.load, xi) + noise)
        return torch.stack(states, 2), torch.stack(observations, 2)

    states = States(
        torch.stack([link.mean for link, _, _ in path], 1),
        torch.stack([_square(root) for _, root, _ in path], 1),
        total,
        draw=lambda n, generator: simulate(n, generator)[0],
    )
    expected = torch.stack([seen.mean for _, _, seen in path], 1)
    variance = torch.stack([_variance(seen) for _, _, seen in path], 1)
    observations = Gaussian(expected, variance, lambda n, generator: simulate(n, generator)[1])
    return Prediction(observations, states)


@torch.no_grad()
def impute(model: StateSpaceModel, batch: Batch, rule: Rule) -> Gaussian:
    """Moments of every observation given all, with the emission affine around smoothed states."""
    out = _smoothed(model, batch, rule)
    n, dim = model.latent_dim, batch.x.shape[2]
    seen = _emit(model, rule, dim, batch.inputs_all(), out.mean, out.root)
    # Given the smoothed moments, each step is a system whose state is the whitened one.
    eye, zero = torch.eye(n).to(out.mean), out.mean.new_zeros(1, 1, n)
    system = System(
        F=eye.expand(1, 1, n, n),
        Q=eye.expand(1, 1, n, n),
        H=seen.load,
        R=_square(seen.noise),
        b=zero,
        d=seen.mean,
        m0=zero[0],
        P0=eye.expand(1, n, n),
        Pinf=0 * eye.expand(1, n, n),
    )
    load, mean, noise = conditional_emission(system, batch)
    variance = torch.diagonal(load @ load.mT + noise, dim1=-2, dim2=-1).clamp_min(0.0)

    def draw(count: int, generator: torch.Generator) -> Tensor:
        away = out.draw(count, generator) - out.mean[:, None]
        xi = torch.linalg.solve_triangular(out.root[:, None], away[..., None], upper=False)
        error = _correlated(noise[:, None].expand(-1, count, -1, -1, -1), generator)
        return mean[:, None] + (load[:, None] @ xi)[..., 0] + error

    return Gaussian(mean, variance, draw)


# -------------------------------------------------------------------------------------- passes


def _steps(model: StateSpaceModel, batch: Batch, rule: Rule) -> Iterator[Step]:
    """Filter step by step; the caller keeps what it needs."""
    _check_model(model)
    rule.check(model.latent_dim)
    seen = batch.mask.any(-1).any(0).tolist()
    complete = batch.mask.all(-1).all(0).tolist()
    now: Step | None = None
    for t in range(batch.n_steps):
        place = _Place.at(batch, t)
        if now is None:
            h = model.advance(model.start((batch.n_series,)), None, place.u)
            ahead, ahead_root = place.call("first state", partial(_first, model), h)
            link = None
        else:
            move = partial(_move, model, rule)
            link, ahead_root = place.call("transition", move, now.mean, now.root)
            ahead = link.mean
        place.check("transition" if t else "first state", ahead, ahead_root)
        mean, root, increment = ahead, ahead_root, ahead.new_zeros(batch.n_series)
        if seen[t]:
            mask = None if complete[t] else batch.mask[:, t]
            observe = partial(_observe, model, rule)
            found = place.call("emission", observe, ahead, ahead_root, batch.x[:, t], mask)
            place.check("emission", *found)
            increment = found.log_prob
            mean = ahead + (ahead_root @ found.mean[..., None])[..., 0]
            root = ahead_root @ found.root
        if now is not None:
            mean = torch.where(place.active[:, None], mean, now.mean)
            root = torch.where(place.active[:, None, None], root, now.root)
        now = Step(mean, root, ahead, ahead_root, increment, link)
        yield now


class _Smoothed(NamedTuple):
    """Smoothed moments of all steps, a sampler of joint trajectories, and the log-likelihood."""

    mean: Float[Tensor, "series time state"]
    root: Float[Tensor, "series time state state"]
    draw: Callable[[int, torch.Generator], Tensor]
    log_likelihood: Float[Tensor, "series"]


class _Back(NamedTuple):
    """A state given the next one, N(mean + gain (next - ahead), root root^T), where that exists."""

    inside: Bool[Tensor, "series one"]
    mean: Float[Tensor, "series state"]
    ahead: Float[Tensor, "series state"]
    gain: Float[Tensor, "series state state"]
    root: Float[Tensor, "series state state"]

    @classmethod
    def of(cls, now: Step, after: Step, inside: Bool[Tensor, "series"]) -> _Back:
        assert after.link is not None
        load, noise = after.link.load, after.link.noise
        n = load.shape[-1]
        rows = [torch.cat([load, noise], -1), torch.cat([now.root, torch.zeros_like(noise)], -1)]
        both = triangular(torch.cat(rows, -2))
        gain = torch.linalg.solve_triangular(
            both[..., :n, :n], both[..., n:, :n], upper=False, left=False
        )
        inside = inside[:, None]
        return cls(
            inside,
            now.mean,
            after.ahead,
            torch.where(inside[..., None], gain, 0.0),
            torch.where(inside[..., None], both[..., n:, n:], now.root),
        )


@torch.no_grad()
def _smoothed(model: StateSpaceModel, batch: Batch, rule: Rule) -> _Smoothed:
    total, links, now = _zeros(batch), [], None
    for t, after in enumerate(_steps(model, batch, rule)):
        if now is not None:
            links.append(_Back.of(now, after, t < batch.lengths))
        total, now = total + after.increment, after
    assert now is not None
    last = now
    means, roots = [last.mean], [last.root]
    for link in reversed(links):
        away = torch.where(link.inside, means[-1] - link.ahead, 0.0)
        means.append(link.mean + (link.gain @ away[..., None])[..., 0])
        roots.append(triangular(torch.cat([link.root, link.gain @ roots[-1]], -1)))

    def draw(n: int, generator: torch.Generator) -> Tensor:
        path = [last.mean[:, None] + _shock(last.root, n, generator)]
        for link in reversed(links):
            away = torch.where(link.inside[:, None], path[-1] - link.ahead[:, None], 0.0)
            noise = _shock(link.root, n, generator)
            path.append(link.mean[:, None] + _apply(link.gain, away) + noise)
        return torch.stack(path[::-1], 2)

    return _Smoothed(torch.stack(means[::-1], 1), torch.stack(roots[::-1], 1), draw, total)


# --------------------------------------------------------------------- what is asked of a model


def _check_model(model: StateSpaceModel) -> None:
    if not model.markov or model.feedback or model.latent_dim == 0:
        raise ValueError(
            f"{type(model).__name__} is not a Markov model of a random state, which a Gaussian "
            "approximation of the state needs; use method='particle'"
        )


def _first(model: StateSpaceModel, u: Inputs, h: Any) -> tuple[Tensor, Tensor]:
    return matched(_prior(model, u, h), u.values.shape[:-1], model.latent_dim)


def _move(
    model: StateSpaceModel, rule: Rule, u: Inputs, mean: Tensor, root: Tensor
) -> tuple[Affine, Tensor]:
    def law(z: Tensor) -> Distribution:
        return _prior(model, u, z.to(model.dtype))

    link = rule(law, mean, root, model.latent_dim)
    return link, triangular(torch.cat([link.load, link.noise], -1))


def _emit(
    model: StateSpaceModel, rule: Rule, dim: int, u: Inputs, mean: Tensor, root: Tensor
) -> Affine:
    return rule(lambda z: model.emission(z.to(model.dtype), u), mean, root, dim)


def _observe(
    model: StateSpaceModel,
    rule: Rule,
    u: Inputs,
    mean: Tensor,
    root: Tensor,
    x: Tensor,
    mask: Tensor | None,
) -> Conditional:
    def law(z: Tensor) -> Distribution:
        return model.emission(z.to(model.dtype), u)

    return update(rule, law, mean, root, x.double(), mask)


def _prior(model: StateSpaceModel, u: Inputs, h: Any) -> Distribution:
    prior = model.prior(h, u)
    assert prior is not None
    return prior


class _Place(NamedTuple):
    """One step of every series, for calls of the model whose failures name series and step."""

    ids: tuple[Any, ...]
    u: Inputs
    t: Int[Tensor, "series"]
    active: Bool[Tensor, "series"]

    @classmethod
    def at(cls, batch: Batch, t: int) -> _Place:
        """Step `t` of every series."""
        when = torch.full_like(batch.lengths, t)
        return cls(batch.ids, batch.inputs_at(t), when, when < batch.lengths)

    @classmethod
    def after(cls, batch: Batch, ahead: int) -> _Place:
        """The step so many after the end of each series."""
        when = batch.lengths + ahead
        series = torch.arange(batch.n_series, device=when.device)
        return cls(batch.ids, Inputs(batch.u[series, when], when), when, when >= 0)

    def call(self, what: str, function: Callable[..., Any], *args: Any) -> Any:
        """`function(u, *args)`; a ValueError is raised again with its series and step."""
        try:
            return function(self.u, *args)
        except ValueError as error:
            k = self._culprit(function, args)
            raise ValueError(f"{self._name(k)}: the {what} of the model failed: {error}") from error

    def check(self, what: str, *moments: Tensor) -> None:
        """Raise a ValueError unless all moments of the active series are finite."""
        if math.isfinite(sum(float(m.sum()) for m in moments)):
            return
        finite = [m.isfinite().reshape(len(m), -1).all(1) for m in moments]
        bad = self.active & ~torch.stack(finite).all(0)
        if bool(bad.any()):
            raise ValueError(
                f"{self._name(int(bad.nonzero()[0, 0]))}: the mean, the covariance or a derivative "
                f"of the {what} is not finite (a Student-t with df <= 2 has no variance); check "
                "the model there, or use method='particle', which needs no moments"
            )

    def _name(self, k: int) -> str:
        return f"series {self.ids[k]!r}, step {int(self.t[k])}"

    def _culprit(self, function: Callable[..., Any], args: tuple[Any, ...]) -> int:
        """The first series for which a call fails by itself."""
        for k in range(len(self.ids)):
            t = self.u.t[k : k + 1] if self.u.t.ndim else self.u.t
            alone = [tree_map(itemgetter(slice(k, k + 1)), arg) for arg in args]
            try:
                function(Inputs(self.u.values[k : k + 1], t), *alone)
            except ValueError:
                return k
        return 0


# ----------------------------------------------------------------------------------- arithmetic


def _zeros(batch: Batch) -> Float[Tensor, "series"]:
    return torch.zeros(batch.n_series, dtype=torch.float64, device=batch.x.device)


def _states(batch: Batch, mean: Tensor, root: Tensor, total: Tensor) -> States:
    outside = ~batch.valid[..., None]
    cov = _square(root).masked_fill(outside[..., None], torch.nan)
    return States(mean.masked_fill(outside, torch.nan), cov, total)


def _square(root: Float[Tensor, "*batch dim columns"]) -> Float[Tensor, "*batch dim dim"]:
    return root @ root.mT


def _variance(affine: Affine) -> Float[Tensor, "series dim"]:
    return affine.load.square().sum(-1) + affine.noise.square().sum(-1)


def _apply(
    matrix: Float[Tensor, "series rows columns"], x: Float[Tensor, "series n columns"]
) -> Float[Tensor, "series n rows"]:
    return (matrix[:, None] @ x[..., None])[..., 0]


def _normal(n: int, like: Tensor, generator: torch.Generator) -> Float[Tensor, "series n dim"]:
    shape = (len(like), n, like.shape[-1])
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device)


def _shock(
    root: Float[Tensor, "series dim columns"], n: int, generator: torch.Generator
) -> Float[Tensor, "series n dim"]:
    return _apply(root, _normal(n, root[:, 0], generator))
