"""The element-wise map between the data's own units and the units a model works in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from seqdgm.panel import Panel

SCALES = (None, "standard", "mean")
TRANSFORMS = (None, "log")


@dataclass(frozen=True)
class Transform:
    r"""Monotone map :math:`w = (g(x) - \text{loc}) / \text{scale}` with :math:`g` identity or log.

    Likelihoods are reported in the units of `x`: the density of `x` is that of `w` times
    :math:`|dw/dx|`, which :meth:`log_jacobian` returns element by element.

    Parameters
    ----------
    log : bool
        Whether :math:`g` is the natural logarithm.
    loc, scale : Tensor of shape (series or 1, dim)
        Shift and positive scale in the units of :math:`g(x)`.

    Examples
    --------
    >>> import torch
    >>> one = torch.ones(1, 1, dtype=torch.float64)
    >>> Transform(log=True, loc=0 * one, scale=one).forward(one[None]).item()
    0.0
    """

    log: bool
    loc: Float[Tensor, "sys dim"]
    scale: Float[Tensor, "sys dim"]

    @classmethod
    def identity(cls, dim: int) -> Transform:
        """Map that changes nothing."""
        one = torch.ones(1, dim, dtype=torch.float64)
        return cls(log=False, loc=torch.zeros_like(one), scale=one)

    @property
    def trivial(self) -> bool:
        """Whether the map is the identity."""
        return not self.log and bool((self.loc == 0).all()) and bool((self.scale == 1).all())

    def _broadcast(self, like: Tensor) -> tuple[Tensor, Tensor]:
        shape = (self.loc.shape[0], *([1] * (like.ndim - 2)), self.loc.shape[1])
        return (
            self.loc.reshape(shape).to(like.device, like.dtype),
            self.scale.reshape(shape).to(like.device, like.dtype),
        )

    def forward(self, x: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        """Data units to model units."""
        loc, scale = self._broadcast(x)
        return ((x.log() if self.log else x) - loc) / scale

    def inverse(self, w: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        """Model units to data units."""
        loc, scale = self._broadcast(w)
        g = w * scale + loc
        return g.exp() if self.log else g

    def inverse_mean(
        self, mean: Float[Tensor, "series ... dim"], variance: Float[Tensor, "series ... dim"]
    ) -> Float[Tensor, "series ... dim"]:
        r"""Mean in data units of a Gaussian in model units (log-normal mean where `log`)."""
        loc, scale = self._broadcast(mean)
        g = mean * scale + loc
        return (g + 0.5 * variance * scale**2).exp() if self.log else g

    def inverse_variance(
        self, mean: Float[Tensor, "series ... dim"], variance: Float[Tensor, "series ... dim"]
    ) -> Float[Tensor, "series ... dim"]:
        """Variance in data units of a Gaussian in model units."""
        loc, scale = self._broadcast(mean)
        v = variance * scale**2
        return torch.expm1(v) * (2 * (mean * scale + loc) + v).exp() if self.log else v

    def log_jacobian(self, x: Float[Tensor, "series ... dim"]) -> Float[Tensor, "series ... dim"]:
        """Logarithm of dw/dx at `x` (data units)."""
        _, scale = self._broadcast(x)
        out = -scale.log().expand_as(x)
        return out - x.log() if self.log else out

    def select(self, rows: list[int]) -> Transform:
        """Map of the chosen series."""
        if self.loc.shape[0] == 1:
            return self
        return Transform(self.log, self.loc[rows], self.scale[rows])


def fit_transform(
    panel: Panel, transform: str | None, scale: str | None, *, pooled: bool = True
) -> Transform:
    """Fit the map on a panel.

    Parameters
    ----------
    panel : Panel
        Data to fit on (the training part).
    transform : {None, "log"}
        Function applied first.
    scale : {None, "standard", "mean"}
        ``"standard"`` subtracts the mean and divides by the standard deviation of each dimension;
        ``"mean"`` divides every series by its own mean absolute value;
        None leaves the values as they are.
    pooled : bool
        Whether ``"standard"`` pools the panel or standardises every series on its own.

    Raises
    ------
    ValueError
        For an unknown name, or values that the logarithm does not admit (series and place named).
    """
    if transform not in TRANSFORMS:
        raise ValueError(f"transform={transform!r} is unknown; choose one of {TRANSFORMS}")
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is unknown; choose one of {SCALES}")
    log = transform == "log"
    if log:
        check_positive(panel)
    values = np.log(panel.values) if log else panel.values
    dim = panel.n_dims
    if scale is None:
        base = Transform.identity(dim)
        return Transform(log, base.loc, base.scale)
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
    return Transform(log, torch.from_numpy(loc.copy()), torch.from_numpy(spread.copy()))


def check_positive(panel: Panel) -> None:
    """Raise a ValueError that names the first value which has no logarithm."""
    bad = np.argwhere(panel.values <= 0)
    if len(bad):
        n, t, d = bad[0]
        raise ValueError(
            f"series {panel.ids[n]!r}, column {panel.columns[d]!r}, {panel.index[n][t]!s}: value "
            f"{panel.values[n, t, d]:g} is not positive, so it has no logarithm; use "
            "transform=None or shift the series"
        )
