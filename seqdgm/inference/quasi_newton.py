"""Maximise many independent smooth functions at once by quasi-Newton steps.

Every series of a panel has its own parameters and its own log-likelihood, and one call of a batched
kernel evaluates them all. So nothing here loops over series: central differences, line search and
BFGS updates run on the whole set of series that have not converged yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Objective = Callable[[Float[np.ndarray, "rows dim"], Int[np.ndarray, "rows"]], np.ndarray]

_STEP = np.finfo(np.float64).eps ** (1 / 3)  # balances truncation and rounding, central differences
_ARMIJO = 1e-4
_MAX_HALVINGS = 30
_LONGEST = 1.0  # longest move of one parameter in one iteration, in units of its size


class Optimum(NamedTuple):
    """What :func:`maximise` found.

    Attributes
    ----------
    theta : ndarray of shape (series, dim)
        Best parameters found; the start where the objective is not finite there.
    value : ndarray of shape (series,)
        Objective at `theta`; NaN where it is not finite at the start.
    gradient : ndarray of shape (series, dim)
        Central-difference gradient at `theta`.
    converged : ndarray of bool, shape (series,)
        Whether a convergence test was met.
    n_iter : ndarray of int, shape (series,)
        Iterations taken by each series.
    n_evaluations : int
        Objective rows evaluated, all series together.
    messages : tuple of str
        One a series: empty where it converged, the reason where it did not.
    trace : ndarray of shape (iterations + 1, series)
        Value of each series at the start and after each iteration; it never decreases, and stays
        where the series stopped.
    """

    theta: Float[np.ndarray, "series dim"]
    value: Float[np.ndarray, "series"]
    gradient: Float[np.ndarray, "series dim"]
    converged: Bool[np.ndarray, "series"]
    n_iter: Int[np.ndarray, "series"]
    n_evaluations: int
    messages: tuple[str, ...]
    trace: Float[np.ndarray, "iterations series"]


class _Counted:
    """The objective with its shape checked and its rows counted."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.n = 0

    def __call__(self, theta: np.ndarray, rows: np.ndarray) -> np.ndarray:
        values = np.asarray(self.objective(theta, rows), dtype=np.float64)
        if values.shape != rows.shape:
            raise ValueError(
                f"the objective returned shape {values.shape} for {len(rows)} parameter rows; "
                "return one value a row"
            )
        self.n += len(rows)
        return np.where(np.isfinite(values), values, np.nan)


def maximise(
    objective: Objective,
    start: Float[np.ndarray, "series dim"],
    *,
    max_iter: int = 200,
    gradient_tol: float = 1e-8,
    value_tol: float = 1e-10,
    step: Float[np.ndarray, "..."] | float | None = None,
) -> Optimum:
    r"""Maximise one smooth function a series, all series at once, by BFGS.

    In iteration k every active series moves along :math:`p = B g`, with g the central-difference
    gradient and B the BFGS approximation of the inverse of minus the Hessian, whose first diagonal
    comes from the second differences that the gradient evaluates anyway. A backtracking line search
    asks for the Armijo condition :math:`f(\theta + \alpha p) \ge f(\theta) + 10^{-4} \alpha p'g`.

    A series has converged when its scaled gradient
    :math:`\max_i |g_i| \max(|\theta_i|, s_i) / \max(|f|, 1)` is at most `gradient_tol`, or when
    its last gain and the gain that the quadratic model still promises, :math:`g'Bg/2`, are both at
    most `value_tol` times :math:`\max(|f|, 1)`. It leaves the active set then, and so does a series
    that fails; the others never notice: solving a batch equals solving each series alone.

    Parameters
    ----------
    objective : callable
        ``objective(theta, rows)`` with `theta` (B, dim) and `rows` (B,) the series each row belongs
        to (a series may have several rows), returning (B,) values. A value that is not finite
        marks a point outside the domain; the series never moves there.
    start : ndarray of shape (series, dim)
        Starting parameters; dim may be 0, then the objective is only evaluated.
    max_iter : int
        Iterations allowed to each series.
    gradient_tol, value_tol : float
        Tolerances of the convergence tests above.
    step : float or ndarray broadcastable with `start`, optional
        Typical size :math:`s_i` of each parameter, 1 by default. Finite-difference steps are
        :math:`\epsilon^{1/3} \max(|\theta_i|, s_i)` and no parameter moves by more than
        :math:`\max(|\theta_i|, s_i)` in one iteration.

    Returns
    -------
    Optimum

    Raises
    ------
    ValueError
        If `start` is not a finite matrix, `step` is not positive, or the objective returns
        anything but one value a row.

    References
    ----------
    Nocedal and Wright (2006), Numerical Optimization, 2nd ed., sections 3.1, 6.1 and 8.1; Dennis
    and Schnabel (1983), Numerical Methods for Unconstrained Optimization, section 7.2.

    Examples
    --------
    >>> import numpy as np
    >>> centre = np.array([[1.0], [-2.0]])
    >>> best = maximise(lambda x, rows: -((x - centre[rows]) ** 2).sum(1), np.zeros((2, 1)))
    >>> best.theta.round(6).ravel().tolist(), best.converged.tolist()
    ([1.0, -2.0], [True, True])
    """
    theta, size = _validated(start, step)
    evaluate = _Counted(objective)
    search = _Search(evaluate, theta, size, max_iter, gradient_tol, value_tol)
    trace = [search.value.copy()]
    while search.active.any():
        search.iterate()
        trace.append(search.value.copy())
    return Optimum(
        search.theta,
        search.value,
        search.gradient,
        search.converged,
        search.n_iter,
        evaluate.n,
        tuple(search.messages),
        np.stack(trace),
    )


def _validated(start: np.ndarray, step: np.ndarray | float | None) -> tuple[np.ndarray, np.ndarray]:
    theta = np.array(start, dtype=np.float64)
    if theta.ndim != 2:
        raise ValueError(f"start has shape {theta.shape}; give a matrix (series, parameters)")
    if not np.isfinite(theta).all():
        series, column = np.argwhere(~np.isfinite(theta))[0]
        raise ValueError(
            f"start of series {series}, parameter {column} is {theta[series, column]}; "
            "give finite starting values"
        )
    size = np.broadcast_to(np.asarray(1.0 if step is None else step, np.float64), theta.shape)
    if not ((size > 0) & np.isfinite(size)).all():
        raise ValueError("step must hold the positive, finite size of each parameter")
    return theta, size


class _Search:
    """Iterates of all series; `active` marks those that still move."""

    def __init__(
        self,
        evaluate: _Counted,
        theta: np.ndarray,
        size: np.ndarray,
        max_iter: int,
        gradient_tol: float,
        value_tol: float,
    ) -> None:
        n, dim = theta.shape
        self.evaluate, self.size = evaluate, size
        self.max_iter, self.gradient_tol, self.value_tol = max_iter, gradient_tol, value_tol
        self.theta = theta
        self.n_iter = np.zeros(n, dtype=np.int64)
        self.messages = [""] * n
        self.converged = np.zeros(n, dtype=bool)
        self.gradient = np.full((n, dim), np.nan)
        self.curvature = np.full((n, dim), np.nan)
        self.inverse = np.zeros((n, dim, dim))
        self.fresh = np.ones(n, dtype=bool)
        rows = np.arange(n)
        self.value = evaluate(theta, rows)
        self.active = np.isfinite(self.value)
        self._fail(rows[~self.active], "the objective is not finite at the starting values")
        rows = rows[self.active]
        if dim == 0:
            self.converged[rows] = True
            self.active[:] = False
            return
        self._differentiate(rows)
        rows = rows[self.active[rows]]
        self._reset(rows)
        self._stop(rows[self._small_gradient(rows)])
        self._out_of_iterations()

    def iterate(self) -> None:
        """One BFGS step of every active series."""
        rows = np.flatnonzero(self.active)
        before, gradient = self.value[rows], self.gradient[rows]
        direction = self._direction(rows)
        move, gain = self._line_search(rows, direction)
        self.n_iter[rows] += 1
        stuck = gain <= 0
        self._stuck(rows[stuck])
        rows, move, gradient = rows[~stuck], move[~stuck], gradient[~stuck]
        before, gain = before[~stuck], gain[~stuck]
        self._differentiate(rows)
        alive = self.active[rows]
        rows, move, gradient = rows[alive], move[alive], gradient[alive]
        before, gain = before[alive], gain[alive]
        self._update(rows, move, gradient)
        limit = self.value_tol * np.maximum(np.abs(before), 1.0)
        settled = (gain <= limit) & (self._promise(rows) <= limit)
        self._stop(rows[settled | self._small_gradient(rows)])
        self._out_of_iterations()

    def _scale(self, rows: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(self.theta[rows]), self.size[rows])

    def _small_gradient(self, rows: np.ndarray) -> np.ndarray:
        scaled = np.abs(self.gradient[rows]) * self._scale(rows)
        return scaled.max(1) <= self.gradient_tol * np.maximum(np.abs(self.value[rows]), 1.0)

    def _promise(self, rows: np.ndarray) -> np.ndarray:
        g = self.gradient[rows]
        return 0.5 * np.einsum("ni,nij,nj->n", g, self.inverse[rows], g)

    def _stop(self, rows: np.ndarray) -> None:
        self.converged[rows] = True
        self.active[rows] = False

    def _fail(self, rows: np.ndarray, message: str) -> None:
        self.active[rows] = False
        for n in rows:
            self.messages[n] = message

    def _out_of_iterations(self) -> None:
        over = np.flatnonzero(self.active & (self.n_iter >= self.max_iter))
        self._fail(over, f"no convergence in {self.max_iter} iterations")

    def _differentiate(self, rows: np.ndarray) -> None:
        """Central differences: gradient and second derivatives, one call for all series."""
        theta, value = self.theta[rows], self.value[rows]
        m, dim = theta.shape
        if m == 0:
            return
        h = _STEP * self._scale(rows)
        offsets = np.einsum("ni,ij->nij", h, np.eye(dim))
        up, down = theta[:, None] + offsets, theta[:, None] - offsets
        # Differences of what was evaluated: theta + h is rounded, and h itself is not exact.
        above = np.einsum("nii->ni", up) - theta
        below = theta - np.einsum("nii->ni", down)
        f = self.evaluate(
            np.concatenate([up, down], 1).reshape(-1, dim), np.repeat(rows, 2 * dim)
        ).reshape(m, 2, dim)
        rise, fall = (f[:, 0] - value[:, None]) / above, (value[:, None] - f[:, 1]) / below
        central = (f[:, 0] - f[:, 1]) / (above + below)
        # At the edge of the domain only one side exists.
        one_sided = np.where(np.isfinite(rise), rise, fall)
        self.gradient[rows] = np.where(np.isfinite(central), central, one_sided)
        bend = (fall - rise) / (0.5 * (above + below))
        self.curvature[rows] = np.where(np.isfinite(bend), bend, 0.0)
        lost = ~np.isfinite(self.gradient[rows]).all(1)
        self._fail(rows[lost], "the objective is not finite on either side of the parameters")

    def _reset(self, rows: np.ndarray) -> None:
        """Start again from a diagonal of the inverse Hessian."""
        gradient, scale = np.abs(self.gradient[rows]), self._scale(rows)
        # No coordinate is sent further than its own size by a curvature that rounding invented.
        floor = np.maximum(gradient / scale, np.finfo(np.float64).tiny)
        diagonal = 1.0 / np.maximum(np.abs(self.curvature[rows]), floor)
        self.inverse[rows] = np.einsum("ni,ij->nij", diagonal, np.eye(gradient.shape[1]))
        self.fresh[rows] = True

    def _direction(self, rows: np.ndarray) -> np.ndarray:
        direction = np.einsum("nij,nj->ni", self.inverse[rows], self.gradient[rows])
        slope = (direction * self.gradient[rows]).sum(1)
        bad = ~(slope > 0) | ~np.isfinite(direction).all(1)
        if bad.any():
            self._reset(rows[bad])
            direction[bad] = np.einsum(
                "nij,nj->ni", self.inverse[rows[bad]], self.gradient[rows[bad]]
            )
        longest = (np.abs(direction) / self._scale(rows)).max(1)
        return direction * np.minimum(1.0, _LONGEST / np.maximum(longest, _LONGEST))[:, None]

    def _line_search(
        self, rows: np.ndarray, direction: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Backtrack until Armijo's condition holds; moves the parameters. Gain 0 where it fails."""
        start, value = self.theta[rows], self.value[rows]
        slope = (direction * self.gradient[rows]).sum(1)
        alpha, gain = np.ones(len(rows)), np.zeros(len(rows))
        pending = np.arange(len(rows))
        for _ in range(_MAX_HALVINGS):
            trial = start[pending] + alpha[pending, None] * direction[pending]
            reached = self.evaluate(trial, rows[pending])
            rise = reached - value[pending]
            promised = alpha[pending] * slope[pending]
            accepted = (rise >= _ARMIJO * promised) & (rise > 0)
            chosen = pending[accepted]
            self.theta[rows[chosen]] = trial[accepted]
            self.value[rows[chosen]] = reached[accepted]
            gain[chosen] = rise[accepted]
            # Top of the parabola through value, slope and trial, kept within [0.1, 0.5].
            below = np.maximum(promised - rise, 0.5 * promised)
            top = 0.5 * promised / np.maximum(below, np.finfo(np.float64).tiny)
            alpha[pending] *= np.clip(np.where(np.isfinite(rise), top, 0.25), 0.1, 0.5)
            # A promise below the tolerance is not worth another evaluation.
            hopeful = promised > 1e-2 * self.value_tol * np.maximum(np.abs(value[pending]), 1.0)
            pending = pending[~accepted & hopeful]
            if len(pending) == 0:
                break
        return self.theta[rows] - start, gain

    def _stuck(self, rows: np.ndarray) -> None:
        """No better point along the direction: rounding at the top, or a bad inverse Hessian."""
        limit = 10.0 * self.value_tol * np.maximum(np.abs(self.value[rows]), 1.0)
        at_top = self._promise(rows) <= limit
        self._stop(rows[at_top])
        again = ~at_top & ~self.fresh[rows]
        self._reset(rows[again])
        self._fail(
            rows[~at_top & ~again],
            "the line search found no better point although the gradient is not zero",
        )

    def _update(self, rows: np.ndarray, move: np.ndarray, gradient: np.ndarray) -> None:
        """BFGS update of the inverse where the curvature along the move allows it.

        `gradient` is the one before the move.
        """
        inverse, drop = self.inverse[rows], gradient - self.gradient[rows]
        curved = (move * drop).sum(1)
        safe = curved > 1e-10 * np.sqrt((move**2).sum(1) * (drop**2).sum(1))
        rho = 1.0 / np.where(safe, curved, 1.0)
        left = np.eye(move.shape[1]) - np.einsum("n,ni,nj->nij", rho, move, drop)
        updated = left @ inverse @ left.transpose(0, 2, 1)
        updated += np.einsum("n,ni,nj->nij", rho, move, move)
        # Where the function still bends upwards the step was too short: four times as long a step
        # along this direction, and along no other, is what the next iteration would take.
        direction = np.einsum("nij,nj->ni", inverse, gradient)
        slope = np.where(safe, 1.0, (direction * gradient).sum(1))
        longer = inverse + 3.0 * np.einsum("n,ni,nj->nij", 1.0 / slope, direction, direction)
        self.inverse[rows] = np.where(safe[:, None, None], updated, longer)
        self.fresh[rows] = False
