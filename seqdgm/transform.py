"""The element-wise map between the data's own units and the units a model works in."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.panel import Panel

Function = str | tuple[str, float] | None  # what a model's `transform` may be
SCALES = (None, "standard", "mean")
POWERS = (0.0, 2.0)  # range in which a Box-Cox power is estimated
_NODES = 96  # of the quadrature for means
_REACH = 9.0  # standard deviations beyond which a Gaussian has no mass in double precision


@dataclass(frozen=True)
class Transform:
    r"""Monotone map :math:`w = (g(x) - \text{loc}) / \text{scale}` with a Box-Cox function g.

    .. math:: g(x) = (x^\lambda - 1) / \lambda \quad (\lambda > 0), \qquad
        g(x) = \log x \quad (\lambda = 0), \qquad g(x) = x \quad \text{without a power}.

    Likelihoods are reported in the units of `x`: the density of `x` is that of `w` times
    :math:`|dw/dx|`, which :meth:`log_jacobian` returns element by element.

    Parameters
    ----------
    power : Tensor of shape (series or 1, dim), or None
        Box-Cox power :math:`\lambda \ge 0`, 0 for the natural logarithm.
    loc, scale : Tensor of shape (series or 1, dim)
        Shift and positive scale in the units of :math:`g(x)`.

    References
    ----------
    Box and Cox (1964), An analysis of transformations, *Journal of the Royal Statistical Society*
    B 26(2), 211-252.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> Transform(power=0.5 * one, loc=0 * one, scale=one).forward(4 * one[None]).item()
    2.0
    """

    power: Float[Tensor, "sys dim"] | None
    loc: Float[Tensor, "sys dim"]
    scale: Float[Tensor, "sys dim"]

    @classmethod
    def identity(cls, dim: int) -> Transform:
        """Map that changes nothing."""
        one = torch.ones(1, dim, dtype=torch.float64)
        return cls(power=None, loc=torch.zeros_like(one), scale=one)

    @property
    def log(self) -> bool:
        """Whether g is the logarithm for every series."""
        return self.power is not None and bool((self.power == 0).all())

    @property
    def trivial(self) -> bool:
        """Whether the map is the identity."""
        plain = bool((self.loc == 0).all()) and bool((self.scale == 1).all())
        return self.power is None and plain

    def forward(self, x: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        """Data units to model units."""
        if self.power is None:
            g = x
        elif self.log:
            g = x.log()
        else:
            power = _along(self.power, x)
            one = torch.where(power > 0, power, 1.0)
            g = torch.where(power > 0, torch.expm1(one * x.log()) / one, x.log())
        return (g - _along(self.loc, x)).div_(_along(self.scale, x))

    def of_panel(self, panel: Panel) -> Float[Tensor, "series time dim"]:
        """Values of a panel in model units, NaN where there are none; nobody else holds them."""
        values = torch.from_numpy(panel.values.copy())
        return values if self.trivial else self.forward(values)

    def inverse(self, w: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        r"""Model units to data units.

        A positive power reaches no :math:`g < -1 / \lambda`; what lies below is taken to 0.
        """
        g = w * _along(self.scale, w) + _along(self.loc, w)
        if self.power is None:
            return g
        return g.exp() if self.log else _undone(g, _along(self.power, w))

    def inverse_mean(
        self, mean: Float[Tensor, "series ... dim"], variance: Float[Tensor, "series ... dim"]
    ) -> Float[Tensor, "series ... dim"]:
        r"""Mean in data units of a Gaussian in model units.

        In closed form for the logarithm (log-normal) and without a power; elsewhere by quadrature,
        to about fourteen digits.
        """
        scale = _along(self.scale, mean)
        g, spread = mean * scale + _along(self.loc, mean), variance * scale**2
        if self.power is None:
            return g
        closed = (g + 0.5 * spread).exp()
        if self.log:
            return closed
        power = _along(self.power, mean)
        one = torch.where(power > 0, power, 1.0)
        return torch.where(power > 0, _boxcox_mean(g, spread, one), closed)

    def inverse_variance(
        self, mean: Float[Tensor, "series ... dim"], variance: Float[Tensor, "series ... dim"]
    ) -> Float[Tensor, "series ... dim"]:
        r"""Variance in data units of a Gaussian in model units; as exact as `inverse_mean`.

        The square of an inverse Box-Cox function of g with power :math:`\lambda` is that of 2g with
        power :math:`\lambda / 2`.
        """
        scale = _along(self.scale, mean)
        g, spread = mean * scale + _along(self.loc, mean), variance * scale**2
        if self.power is None:
            return spread
        closed = torch.expm1(spread) * (2.0 * g + spread).exp()
        if self.log:
            return closed
        power = _along(self.power, mean)
        one = torch.where(power > 0, power, 1.0)
        square = _boxcox_mean(2.0 * g, 4.0 * spread, 0.5 * one)
        found = (square - _boxcox_mean(g, spread, one) ** 2).clamp_min(0.0)
        return torch.where(power > 0, found, closed)

    def log_jacobian(self, x: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        """Logarithm of dw/dx at `x` (data units)."""
        out = -_along(self.scale, x).log().expand_as(x)
        return out if self.power is None else out + (_along(self.power, x) - 1.0) * x.log()

    def select(self, rows: list[int]) -> Transform:
        """Map of the chosen series."""

        def chosen(field: Tensor) -> Tensor:
            return field if field.shape[0] == 1 else field[rows]

        power = None if self.power is None else chosen(self.power)
        return Transform(power, chosen(self.loc), chosen(self.scale))

    @classmethod
    def join(cls, parts: Sequence[Transform], counts: Sequence[int]) -> Transform:
        """Map of a panel whose parts, of so many series each, have these maps."""

        def joined(fields: Sequence[Tensor]) -> Tensor:
            if all(len(field) == 1 and torch.equal(field, fields[0]) for field in fields):
                return fields[0]
            wide = [f.expand(n, -1) for f, n in zip(fields, counts, strict=True)]
            return torch.cat(wide)

        powers = [part.power for part in parts if part.power is not None]
        return cls(
            joined(powers) if powers else None,
            joined([part.loc for part in parts]),
            joined([part.scale for part in parts]),
        )


def _along(field: Float[Tensor, "sys dim"], like: Tensor) -> Tensor:
    """A field of the map with axes for what lies between series and dimension."""
    shape = (field.shape[0], *([1] * (like.ndim - 2)), field.shape[1])
    return field.reshape(shape).to(like.device, like.dtype)


def _undone(g: Tensor, power: Tensor) -> Tensor:
    """Inverse Box-Cox function, 0 below its range."""
    one = torch.where(power > 0, power, 1.0)
    root = (torch.log1p((one * g).clamp_min(-1.0)) / one).exp()
    return torch.where(power > 0, root, g.exp())


def _boxcox_mean(mean: Tensor, variance: Tensor, power: Tensor) -> Tensor:
    r"""Mean of the inverse Box-Cox function of a Gaussian, for positive powers.

    Gauss-Legendre quadrature of :math:`h(g) \phi(g)` about its mode :math:`g^*`, the positive root
    :math:`(1 + \lambda g^*)(g^* - \mu) = \sigma^2`. The integrand is log-concave and at least as
    narrow as the Gaussian. Cubed abscissae smooth the root that h has at the end of its range.
    """
    spread = variance.sqrt().clamp_min(1e-9)
    half, shift = 1.0 - power * mean, mean + spread**2
    root = ((1.0 + power * mean) ** 2 + 4.0 * power * spread**2).sqrt()
    mode = torch.where(half > 0, 2.0 * shift / (half + root), 0.5 * (root - half) / power)
    ahead = spread**2 / (1.0 + power * mode)  # of the mean; from here on distances to the mean
    low = torch.maximum(ahead - _REACH * spread, -1.0 / power - mean)
    width = ahead + _REACH * spread - low
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    total = torch.zeros_like(mode)
    for node, weight in zip(0.5 * (nodes + 1.0), 0.5 * weights, strict=True):
        gap = low + width * node**3
        log_h = torch.log1p((power * (mean + gap)).clamp_min(-1.0)) / power
        density = (log_h - 0.5 * (gap / spread) ** 2).exp()
        total = total + 3.0 * weight * node**2 * density
    return total * width / spread / math.sqrt(2.0 * math.pi)


def given_power(transform: Function) -> float | None:
    """Box-Cox power that a model's `transform` names; None without one, NaN if to be estimated.

    Parameters
    ----------
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)

    Raises
    ------
    ValueError
        For anything else, and for a negative power: a Gaussian has mass where it has no inverse,
        so that forecasts would have no mean.

    Examples
    --------
    >>> given_power("log"), given_power(("boxcox", 0.5))
    (0.0, 0.5)
    """
    if transform is None:
        return None
    if isinstance(transform, str) and transform in ("log", "boxcox"):
        return 0.0 if transform == "log" else math.nan
    if isinstance(transform, tuple | list) and len(transform) == 2 and transform[0] == "boxcox":
        power = transform[1]
        number = isinstance(power, int | float | np.number) and not isinstance(power, bool)
        if not number or not 0 <= power < math.inf:
            raise ValueError(
                f"transform={transform!r}: the power must be a number of at least 0 (0 is the "
                "logarithm); a negative one has no inverse on the whole line, so forecasts would "
                "have no mean"
            )
        return float(power)
    raise ValueError(
        f"transform={transform!r} is unknown; choose None, 'log', 'boxcox' (power estimated) or "
        "('boxcox', power)"
    )


def fit_transform(
    panel: Panel,
    transform: Function,
    scale: str | None,
    *,
    pooled: bool = True,
    power: Float[Tensor, "sys dim"] | None = None,
) -> Transform:
    """Fit the map on a panel.

    Parameters
    ----------
    panel : Panel
        Data to fit on (the training part).
    transform : {None, "log", "boxcox"} or tuple ("boxcox", power)
        Function applied first.
    scale : {None, "standard", "mean"}
        ``"standard"`` subtracts the mean and divides by the standard deviation of each dimension;
        ``"mean"`` divides every series by its own mean absolute value;
        None leaves the values as they are.
    pooled : bool
        Whether ``"standard"`` pools the panel or standardises every series on its own.
    power : Tensor of shape (series or 1, dim), optional
        Box-Cox power to use for ``"boxcox"``, which names none itself.

    Raises
    ------
    ValueError
        For an unknown name, or values that the function does not admit (series and place named).
    """
    given = given_power(transform)
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {SCALES}")
    dim = panel.n_dims
    base = Transform.identity(dim)
    if given is not None:
        check_positive(panel)
        if power is None:
            check_given(transform)
            power = torch.full((1, dim), given, dtype=torch.float64)
        base = Transform(power, base.loc, base.scale)
    if scale is None:
        return base
    values = base.of_panel(panel).numpy()
    if scale == "standard":
        axes = (0, 1) if pooled else (1,)
        loc = np.nanmean(values, axis=axes).reshape(-1, dim)
        spread = np.nanstd(values, axis=axes).reshape(-1, dim)
    else:
        spread = np.stack([np.nanmean(np.abs(v), axis=0) for v in values])
        loc = np.zeros_like(spread)
    # A constant dimension has no scale of its own; dividing by it would only amplify rounding.
    floor = 1e-12 * np.maximum(1.0, np.abs(loc))
    spread = np.where(spread > floor, spread, 1.0)
    return Transform(base.power, torch.from_numpy(loc.copy()), torch.from_numpy(spread.copy()))


def check_given(transform: Function) -> None:
    """Raise a ValueError if the power of a Box-Cox function still has to be estimated."""
    power = given_power(transform)
    if power is not None and math.isnan(power):
        raise ValueError(
            f"transform={transform!r} is learned from data; call fit(y) first, or give the power: "
            "transform=('boxcox', 0.5)"
        )


def check_positive(panel: Panel) -> None:
    """Raise a ValueError that names the first value which has no logarithm."""
    bad = np.argwhere(panel.values <= 0)
    if len(bad):
        n, t, d = bad[0]
        raise ValueError(
            f"series {panel.ids[n]!r}, column {panel.columns[d]!r}, {panel.index[n][t]!s}: value "
            f"{panel.values[n, t, d]:g} is not positive, so it has no logarithm or power; use "
            "transform=None or shift the series"
        )
