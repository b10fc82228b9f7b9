"""Maximise many independent smooth functions at once by quasi-Newton steps.

Every series of a panel has its own parameters and its own log-likelihood, and one call of a batched
kernel evaluates them all. The search itself (`seqdgm.kernels.cpu_search`) is compiled and asks for
values; each round here answers, in one call, what all the series that have not converged yet ask.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from seqdgm.kernels import cpu_search, cpu_steps
from seqdgm.kernels.cached import compiled, digest
from seqdgm.kernels.cpu_search import Limits, Search, make_search

Objective = Callable[[Float[np.ndarray, "rows dim"], Int[np.ndarray, "rows"]], np.ndarray]


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
    limits = Limits(max_iter, gradient_tol, value_tol)
    search = make_search(theta.shape[0], theta.shape[1], max_iter)
    search.table[:, cpu_search.THETA], search.table[:, cpu_search.SIZE] = theta, size
    _follow(objective, search, limits)
    return _optimum(search, max_iter)


def _follow(objective: Objective, search: Search, limits: Limits) -> None:
    """Answer all searches together until the last one ends."""
    tell = _compiled()
    rows, counts = np.arange(len(search.note)), np.zeros(len(search.note), np.int64)
    points = search.table[:, cpu_search.INVERSE + search.table.shape[2] :]
    slots = np.arange(points.shape[1])
    tell(search, rows, counts, np.empty(0), limits)
    while len(rows):
        owners = np.repeat(rows, counts[rows])
        asked = points[rows][slots < counts[rows, None]]
        values = np.asarray(objective(asked, owners), dtype=np.float64)
        if values.shape != owners.shape:
            raise ValueError(
                f"the objective returned shape {values.shape} for {len(owners)} parameter rows; "
                "return one value a row"
            )
        tell(search, rows, counts, values, limits)
        rows = rows[counts[rows] > 0]


def _optimum(search: Search, max_iter: int) -> Optimum:
    """What ended searches found."""
    ends, n_iter = search.note[:, cpu_search.END], search.note[:, cpu_search.N_ITER]
    return Optimum(
        search.table[:, cpu_search.THETA],
        search.number[:, cpu_search.VALUE],
        search.table[:, cpu_search.GRADIENT],
        ends == cpu_search.CONVERGED,
        n_iter,
        int(search.note[:, cpu_search.N_EVALUATIONS].sum()),
        tuple(cpu_search.MESSAGES[end].format(max_iter=max_iter) for end in ends),
        cpu_search.filled(search.trace, n_iter),
    )


@cache
def _compiled() -> Callable[..., None]:
    """The compiled step of the searches, cached on disk and keyed by its sources."""
    return compiled(cpu_search.bind_tell(digest(cpu_steps, cpu_search)))


def warm_up() -> None:
    """Compile the search."""
    maximise(lambda theta, rows: -((theta - 1.0) ** 2).sum(1), np.zeros((1, 1)))


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
