r"""Affine approximations of conditional laws, and conditioning, on square roots of covariances.

A law :math:`p(y \mid z)` with mean :math:`m(z)` and covariance :math:`R(z)`, and a state
:math:`z = \mu + L\xi` with :math:`\xi \sim N(0, I)`, are replaced by

.. math:: y = a + B\xi + C\varepsilon, \quad \varepsilon \sim N(0, I),

by a first-order Taylor expansion (`Taylor`) or by sigma points (`SigmaPoints`). Everything stays in
the whitened coordinate :math:`\xi`, so that no covariance is inverted or subtracted.

References
----------
Särkkä and Svensson (2023), *Bayesian Filtering and Smoothing*, 2nd ed., chapters 7-10; van der
Merwe (2004), *Sigma-point Kalman filters*, algorithms 3.1 and 3.2; Kailath, Sayed and Hassibi
(2000), *Linear Estimation*, section 12.3 (array algorithms).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch import distributions as td
from torch.distributions import Distribution

from seqdgm.nn import distributions as dist
from seqdgm.nn.drawing import scale_tril
from seqdgm.types import check_count

# A conditional distribution given z (..., state), for any leading axes of z.
Law = Callable[[Tensor], Distribution]


class Affine(NamedTuple):
    r"""A vector :math:`y = a + B\xi + C\varepsilon` with independent standard normal parts.

    Attributes
    ----------
    mean : Tensor of shape (..., dim)
        a
    load : Tensor of shape (..., dim, state)
        B
    noise : Tensor of shape (..., dim, columns)
        C, with at least `dim` columns.
    """

    mean: Float[Tensor, "*batch dim"]
    load: Float[Tensor, "*batch dim state"]
    noise: Float[Tensor, "*batch dim columns"]


class Rule(Protocol):
    """How a law is made affine around a Gaussian state."""

    @property
    def iterations(self) -> int:
        """How often an update linearises, each time around what the last time gave."""

    def check(self, n: int) -> None:
        """Raise a ValueError unless the rule suits states of length `n`."""

    def __call__(
        self,
        law: Law,
        mean: Float[Tensor, "*batch state"],
        root: Float[Tensor, "*batch state state"],
        dim: int,
    ) -> Affine:
        """Affine form of a law over vectors of length `dim`."""


# ------------------------------------------------------------------------------------- moments


class _Spread(NamedTuple):
    """Square root of a covariance: standard deviations (..., dim), or a matrix where joint."""

    value: Tensor
    joint: bool

    def root(self) -> Float[Tensor, "*batch dim columns"]:
        return self.value if self.joint else torch.diag_embed(self.value)


def _moments(d: Distribution, shape: Sequence[int], dim: int) -> tuple[Tensor, _Spread]:
    """Mean (*shape, dim) and spread, in float64."""
    d = dist.expand(d, shape, dim)
    try:
        mean = dist.mean(d).double()
        if isinstance(d, td.MultivariateNormal):
            return mean, _Spread(scale_tril(d).double(), joint=True)
        if isinstance(d, td.LowRankMultivariateNormal):
            columns = [d.cov_factor, torch.diag_embed(d.cov_diag.sqrt())]
            return mean, _Spread(torch.cat(columns, -1).double(), joint=True)
        if not d.event_shape:
            return mean, _Spread(dist.variance(d).double().sqrt(), joint=False)
    except NotImplementedError:
        pass
    raise ValueError(
        f"{type(d).__name__} has no mean and covariance in closed form, so it has no Gaussian "
        "approximation; use method='particle'"
    )


def matched(
    d: Distribution, shape: Sequence[int], dim: int
) -> tuple[Float[Tensor, "*shape dim"], Float[Tensor, "*shape dim dim"]]:
    """Mean and lower triangular root of the covariance of a distribution, in float64.

    Raises
    ------
    ValueError
        If the distribution has no moments in closed form, or is over vectors of another length.

    Examples
    --------
    >>> mean, root = matched(td.Gamma(torch.ones(2), 2.0), (3,), 2)
    >>> mean[0].tolist(), root[0].tolist()
    ([0.5, 0.5], [[0.5, 0.0], [0.0, 0.5]])
    """
    mean, spread = _moments(d, shape, dim)
    root = spread.root()
    if root.shape[-1] > dim:
        root = triangular(root)
    return mean, root.expand(*shape, dim, dim)


# --------------------------------------------------------------------------------------- rules


@dataclass(frozen=True)
class Taylor:
    r"""First-order expansion: :math:`a = m(\mu)`, :math:`B = m'(\mu) L`, :math:`CC^T = R(\mu)`.

    The Jacobian comes from one reverse pass over as many copies of the points as the vector has
    elements: copy i gives row i. (Forward mode would want no copies where there are more elements
    than states, but many of its rules run through Python and take ten times as long.)

    Attributes
    ----------
    iterations : int
        1 is the extended Kalman filter; with more, an update is a Gauss-Newton search for the
        posterior mode (Bell and Cathey 1993, The iterated Kalman filter update as a Gauss-Newton
        method), whose covariance and density come from its last linearisation.
    """

    iterations: int = 1

    def __post_init__(self) -> None:
        check_count("iterations", self.iterations)

    def check(self, n: int) -> None:
        """Any length will do."""

    def __call__(
        self,
        law: Law,
        mean: Float[Tensor, "*batch state"],
        root: Float[Tensor, "*batch state state"],
        dim: int,
    ) -> Affine:
        """Affine form of a law over vectors of length `dim`."""
        tracked = torch.is_grad_enabled() and _has_gradient(law, mean, dim)
        with torch.enable_grad():
            point = mean.expand(dim, *mean.shape)
            if not (tracked and point.requires_grad):
                point = point.detach().requires_grad_()
            value, spread = _moments(law(point), point.shape[:-1], dim)
            rows = _rows(value, point, tracked=tracked)
        if not tracked:
            value, spread = value.detach(), spread._replace(value=spread.value.detach())
        # Nothing of a law varies along the axis of copies.
        if spread.value.ndim == point.ndim + int(spread.joint):
            spread = spread._replace(value=spread.value[0])
        return _affine(value[0], rows.movedim(0, -2) @ root, spread.root())


def _has_gradient(law: Law, mean: Tensor, dim: int) -> bool:
    """Whether the point, or else the law there, is part of somebody's graph."""
    if mean.requires_grad:
        return True
    value, spread = _moments(law(mean), mean.shape[:-1], dim)
    return value.requires_grad or spread.value.requires_grad


def _rows(
    value: Float[Tensor, "dim *batch dim"],
    point: Float[Tensor, "dim *batch state"],
    *,
    tracked: bool,
) -> Float[Tensor, "dim *batch state"]:
    """Row i of the Jacobian, from copy i."""
    if not value.requires_grad:  # the mean does not depend on the state
        return value.new_zeros(point.shape)
    dim = value.shape[-1]
    unit = torch.eye(dim, dtype=value.dtype, device=value.device)
    unit = unit.view(dim, *[1] * (value.ndim - 2), dim).expand_as(value)
    try:
        (rows,) = torch.autograd.grad(
            value, point, unit, create_graph=tracked, allow_unused=True, materialize_grads=True
        )
    except NotImplementedError as error:
        raise ValueError(
            "the model uses an operation without a derivative, which the extended Kalman filter "
            f"needs; use sigma points (method='ukf'): {error}"
        ) from error
    return rows.to(value.dtype)


@dataclass(frozen=True)
class SigmaPoints:
    r"""Scaled unscented transform, on square roots.

    With :math:`\gamma^2 = \alpha^2 (n + \kappa)`, values :math:`y_0` at the mean and
    :math:`y_{\pm i}` at :math:`\mu \pm \gamma L_i`, and :math:`e_i = (y_i + y_{-i})/2 - y_0`, the
    usual weighted sums over the points are

    .. math::

        a = y_0 + \tfrac{1}{\gamma^2} \sum_i e_i, \quad
        B_i = \frac{y_i - y_{-i}}{2\gamma}, \quad
        CC^T = \bar R + \tfrac{1}{\gamma^2} E (I + k 11^T) E^T, \quad
        k = \frac{\beta - \alpha^2}{\gamma^2},

    and :math:`I + k 11^T` has a real square root whenever :math:`1 + kn \ge 0`: the weight of the
    centre may be negative without a covariance ever being subtracted. The mean covariance
    :math:`\bar R` of the law is taken over the same points, or over those of the cubature rule
    (:math:`\gamma^2 = n`), whose weights are positive, where the centre's weight is negative.

    Attributes
    ----------
    alpha, beta, kappa : float
        As in van der Merwe (2004) and `filterpy.kalman.MerweScaledSigmaPoints`. ``(1, 0, 0)`` is
        the cubature Kalman filter (Arasaratnam and Haykin 2009).

    Raises
    ------
    ValueError
        If the points coincide or the weights make a covariance indefinite.
    """

    alpha: float = 1.0
    beta: float = 2.0
    kappa: float = 0.0

    @property
    def iterations(self) -> int:
        """Once: the points are spread around the prediction."""
        return 1

    def check(self, n: int) -> None:
        """Raise a ValueError for coinciding points or an indefinite covariance."""
        self._square(n)

    def __call__(
        self,
        law: Law,
        mean: Float[Tensor, "*batch state"],
        root: Float[Tensor, "*batch state state"],
        dim: int,
    ) -> Affine:
        """Affine form of a law over vectors of length `dim`."""
        n = mean.shape[-1]
        square = self._square(n)
        width = math.sqrt(square)
        value, spread = _at_points(law, mean, root, width, dim)
        centre, up, down = value[0], value[1 : n + 1], value[n + 1 :]
        bend = (up + down) / 2 - centre
        total = bend.sum(0)
        spared = max(1 + (self.beta - self.alpha**2) * n / square, 0.0)
        share = (math.sqrt(spared) - 1) / n
        curved = (bend + share * total) / width
        if square >= n:
            weights = [1 - n / square] + [0.5 / square] * (2 * n)
        else:
            _, spread = _at_points(law, mean, root, math.sqrt(n), dim)
            weights = [0.0] + [0.5 / n] * (2 * n)
        noise = _average(spread, mean.new_tensor(weights), mean.ndim)
        slopes = ((up - down) / (2 * width)).movedim(0, -1)
        made = _affine(centre + total / square, slopes, noise)
        return made._replace(noise=torch.cat([curved.movedim(0, -1), made.noise], -1))

    def _square(self, n: int) -> float:
        square = self.alpha**2 * (n + self.kappa)
        given = f"alpha={self.alpha!r}, beta={self.beta!r}, kappa={self.kappa!r}"
        if not square > 0:
            raise ValueError(
                f"{given} put all sigma points of a state of length {n} in one place; alpha must "
                f"not be 0 and kappa must be greater than {-n}"
            )
        if 1 + (self.beta - self.alpha**2) * n / square < -1e-12:
            raise ValueError(
                f"{given} weigh the sigma points of a state of length {n} so that a covariance can "
                f"be indefinite; take beta of at least {self.alpha**2 - square / n:g}"
            )
        return square


def _affine(mean: Tensor, load: Tensor, noise: Tensor) -> Affine:
    return Affine(mean, load, noise.expand(*load.shape[:-1], noise.shape[-1]))


def _at_points(
    law: Law, mean: Tensor, root: Tensor, width: float, dim: int
) -> tuple[Float[Tensor, "points *batch dim"], _Spread]:
    offset = width * root.movedim(-1, 0)
    points = torch.cat([mean.expand(offset.shape[1:])[None], mean + offset, mean - offset])
    return _moments(law(points), points.shape[:-1], dim)


def _average(
    spread: _Spread, weights: Float[Tensor, "points"], ndim: int
) -> Float[Tensor, "*batch dim columns"]:
    """Root of the weighted mean of covariances along the leading axis."""
    value = spread.value
    if not spread.joint:
        squares = value.square().movedim(0, -1)
        return torch.diag_embed((squares @ weights).sqrt())
    if value.ndim < ndim + 2:
        return value  # one for all points
    columns = value.movedim(0, -2) * weights.sqrt()[:, None]
    return triangular(columns.flatten(-2))


# -------------------------------------------------------------------------------------- arrays


def triangular(array: Float[Tensor, "*batch rows columns"]) -> Float[Tensor, "*batch rows rows"]:
    r"""Lower triangular :math:`L` with :math:`LL^T = AA^T` and a diagonal that is not negative.

    Found by an orthogonal reduction, so that it exists whatever the rank. `array` has at least as
    many columns as rows.

    Examples
    --------
    >>> triangular(torch.tensor([[3.0, 4.0]]))
    tensor([[5.]])
    """
    lower = torch.linalg.qr(array.mT, mode="r").R.mT
    diagonal = torch.diagonal(lower, dim1=-2, dim2=-1)
    return lower * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :]


class Conditional(NamedTuple):
    r"""Law of :math:`\xi` given the observed elements of y.

    Attributes
    ----------
    mean : Tensor of shape (..., state)
    root : Tensor of shape (..., state, state)
        Lower triangular root of the covariance; expanded where it is shared.
    log_prob : Tensor of shape (...)
        Log-density of the observed elements, in nats; 0 where there are none.
    """

    mean: Float[Tensor, "*batch state"]
    root: Float[Tensor, "*batch state state"]
    log_prob: Float[Tensor, "*batch"]


def condition(
    affine: Affine, y: Float[Tensor, "*batch dim"], mask: Bool[Tensor, "*batch dim"] | None
) -> Conditional:
    r"""Condition :math:`\xi` on y by one orthogonal reduction.

    .. math::

        \begin{pmatrix} C & B \\ 0 & I \end{pmatrix} \Theta =
        \begin{pmatrix} S & 0 \\ G & L \end{pmatrix}, \quad
        E[\xi \mid y] = G S^{-1} (y - a), \quad \mathrm{Var}[\xi \mid y] = L L^T.

    The rows of missing elements become rows of the identity that nothing else touches, which drops
    them exactly (`mask` None: all are observed). Where B, C and the mask are the same along a
    leading axis, as over the particles of a linear-Gaussian model, they are reduced once.
    """
    mean, load, noise = affine
    dim, n = load.shape[-2:]
    residual = y - mean
    whole = torch.broadcast_shapes(load.shape[:-2], residual.shape[:-1])
    load, noise = narrow(load), narrow(noise)
    lead = torch.broadcast_shapes(load.shape[:-2], noise.shape[:-2])
    blocks = [noise, load]
    count = mean.new_tensor(dim)
    if mask is not None:
        residual = torch.where(mask, residual, 0.0)
        seen = narrow(mask[..., None])[..., 0].to(load.dtype)
        lead = torch.broadcast_shapes(lead, seen.shape[:-1])
        blocks = [block * seen[..., None] for block in blocks]
        blocks.insert(0, torch.diag_embed(1 - seen))
        count = mask.sum(-1, dtype=mean.dtype)
    top = torch.cat([block.expand(*lead, *block.shape[-2:]) for block in blocks], -1)
    bottom = top.new_zeros(*lead, n, top.shape[-1])
    bottom[..., -n:] = torch.eye(n, dtype=top.dtype, device=top.device)
    lower = triangular(torch.cat([top, bottom], -2))
    scale = lower[..., :dim, :dim]
    whitened = _solve(scale, residual.expand(*whole, dim))
    log_det = torch.diagonal(scale, dim1=-2, dim2=-1).log().sum(-1)
    log_prob = -0.5 * (whitened.square().sum(-1) + count * math.log(2 * math.pi)) - log_det
    root = lower[..., dim:, dim:].expand(*whole, n, n)
    return Conditional(product(lower[..., dim:, :dim], whitened), root, log_prob)


def narrow(matrices: Shaped[Tensor, "*batch rows columns"]) -> Shaped[Tensor, "*lead rows columns"]:
    """Matrices with a leading axis cut to length 1 where all along it are the same.

    What depends on a gradient is cut only where an axis was expanded: two values that happen to be
    equal may have different derivatives.
    """
    for axis in range(matrices.ndim - 2):
        if matrices.shape[axis] == 1:
            continue
        first = matrices.narrow(axis, 0, 1)
        expanded = matrices.stride(axis) == 0
        if expanded or (not matrices.requires_grad and bool((matrices == first).all())):
            matrices = first
    return matrices


def product(
    matrices: Float[Tensor, "*lead rows columns"], x: Float[Tensor, "*batch columns"]
) -> Float[Tensor, "*batch rows"]:
    """Matrix times vector; one product of matrices where the last leading axis has length 1."""
    if matrices.shape[-3:-2] == (1,):
        return x @ matrices[..., 0, :, :].mT
    return (matrices @ x[..., None])[..., 0]


def _solve(
    lower: Float[Tensor, "*lead dim dim"], x: Float[Tensor, "*batch dim"]
) -> Float[Tensor, "*batch dim"]:
    """As `product`, with the inverses of triangular matrices."""
    if lower.shape[-3:-2] == (1,):
        return torch.linalg.solve_triangular(lower[..., 0, :, :], x.mT, upper=False).mT
    return torch.linalg.solve_triangular(lower, x[..., None], upper=False)[..., 0]


def update(
    rule: Rule,
    law: Law,
    mean: Float[Tensor, "*batch state"],
    root: Float[Tensor, "*batch state state"],
    y: Float[Tensor, "*batch dim"],
    mask: Bool[Tensor, "*batch dim"] | None,
) -> Conditional:
    r"""Law of :math:`\xi` in :math:`z = \mu + L\xi` given y, linearised as the rule says."""
    found = condition(rule(law, mean, root, y.shape[-1]), y, mask)
    xi = torch.zeros_like(found.mean)
    for _ in range(rule.iterations - 1):
        # Without a finite step, the next one starts where this one did.
        xi = torch.where(found.mean.isfinite().all(-1, keepdim=True), found.mean, xi)
        point = mean + product(narrow(root), xi)
        affine = rule(law, point, root, y.shape[-1])
        back = product(narrow(affine.load), xi)
        found = condition(affine._replace(mean=affine.mean - back), y, mask)
    return found
