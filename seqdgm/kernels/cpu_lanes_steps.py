"""Steps of the Kalman filter and smoother on a block of series, one series a lane.

They are those of `seqdgm.kernels.cpu_steps` and `seqdgm.kernels.cpu_smoother`, with the same
decisions by the same tolerances, where a choice between two values stands for every branch. An
element that is missing has gain 0, and so changes nothing. Symmetric matrices lie in memory as
their lower triangle, row by row. The functions are run when a loop is compiled (see
`seqdgm.kernels.cpu_lanes_vector`); `Z` is the size of the state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from operator import or_

from seqdgm.kernels.cpu_lanes_vector import Flags, Lanes, Memory, emitted
from seqdgm.kernels.types import CONFLICT, DIFFUSE, DIFFUSE_SCALE, ROUNDING

# Totals of a block; the product of the variances is m 2^e with 1 <= m < 2, and LEFT counts the
# steps that a series has left, the present one included.
PRODUCT, EXPONENT, QUAD, N_OBS, N_DIFFUSE, RANK, LEFT = range(7)
N_TOTALS = 7
# What is noted of an observation; the last three for those of diffuse steps only.
V, VAR, STEP, INVERSE, STEP_INF, INVERSE_INF, SECOND = range(7)
N_NOTES = 7

_LEAST_NORMAL = 2.0**-1022
_LIFT = 54.0
_SPREAD_CONFLICT = 5.0 * math.sqrt(ROUNDING)

Vector = Sequence[Lanes]
Matrix = Sequence[Sequence[Lanes]]


# ---------------------------------------------------------------- vectors and matrices


def triangle(Z: int) -> int:
    """Number of elements of a lower triangle."""
    return Z * (Z + 1) // 2


def dot(a: Vector, b: Vector) -> Lanes:
    """Inner product."""
    total = a[0] * b[0]
    for x, y in zip(a[1:], b[1:], strict=True):
        total = total + x * y
    return total


def matrix(memory: Memory, rows: int, columns: int) -> list[list[Lanes]]:
    """A matrix from its rows."""
    return [memory.part(i * columns).get(columns) for i in range(rows)]


def symmetric(memory: Memory, Z: int) -> list[list[Lanes]]:
    """A symmetric matrix from its lower triangle."""
    flat = memory.get(triangle(Z))
    return [[flat[_low(max(i, j), min(i, j))] for j in range(Z)] for i in range(Z)]


def lower(S: Matrix) -> list[Lanes]:
    """The lower triangle of a matrix."""
    return [x for i, row in enumerate(S) for x in row[: i + 1]]


def transposed(A: Matrix) -> list[list[Lanes]]:
    """Transpose."""
    return [list(column) for column in zip(*A, strict=True)]


def product(A: Matrix, B: Matrix) -> list[list[Lanes]]:
    """A B."""
    columns = transposed(B)
    return [[dot(row, column) for column in columns] for row in A]


def apply(A: Matrix, x: Vector) -> list[Lanes]:
    """A x."""
    return [dot(row, x) for row in A]


def total_of(A: Matrix, B: Matrix) -> list[list[Lanes]]:
    """A + B."""
    return [[x + y for x, y in zip(*rows, strict=True)] for rows in zip(A, B, strict=True)]


def _low(i: int, j: int) -> int:
    return i * (i + 1) // 2 + j


def drop(memory: Memory, known: Sequence[Flags], Z: int) -> None:
    """Zero the rows and columns of elements of the state that are known exactly."""
    with reduce(or_, known).where_any():
        for i in range(Z):
            for j in range(i + 1):
                memory[_low(i, j)] = (known[i] | known[j]).choose(0.0, memory[_low(i, j)])


# ---------------------------------------------------------------- the state of a block


class State:
    """Where the moving state of a block lies."""

    def __init__(self, memory: Memory, Z: int) -> None:
        self.mean = memory
        self.cov = memory.part(Z)
        self.totals = self.cov.part(triangle(Z))
        self.factor = self.totals.part(N_TOTALS)  # of the diffuse covariance (Z, Z)


def state_size(Z: int) -> int:
    """Lanes that a `State` takes."""
    return Z + triangle(Z) + N_TOTALS + Z * Z


@emitted
def begin(Z: int, state: Memory, lengths: Memory, m0: Memory, P0: Memory) -> None:
    """Start a block: initial moments, and empty totals."""
    s = State(state, Z)
    s.mean.set(m0.get(Z))
    s.cov.set(P0.get(triangle(Z)))
    for k in range(N_TOTALS):
        s.totals[k] = 1.0 if k == PRODUCT else 0.0
    s.totals[LEFT] = lengths[0]


@emitted
def keep_totals(Z: int, state: Memory, totals: Memory) -> None:
    """Keep the totals."""
    totals.set(State(state, Z).totals.get(N_TOTALS))


@emitted
def begin_diffuse(Z: int, state: Memory, Pinf: Memory) -> None:
    """Cholesky factor of the semi-definite Pinf, and its rank."""
    s, S = State(state, Z), symmetric(Pinf, Z)
    zero = S[0][0].like(0.0)
    A: list[list[Lanes]] = [[] for _ in range(Z)]
    rank = zero
    for j in range(Z):
        column = [S[i][j] - dot(A[i], A[j]) if j else S[i][j] for i in range(j, Z)]
        used = column[0] > ROUNDING * S[j][j]
        root = column[0].root()
        for i in range(Z):
            A[i].append(zero if i < j else used.choose(column[i - j] / root, 0.0))
        rank = rank + used.choose(1.0, 0.0)
    s.factor.set([x for row in A for x in row])
    s.totals[RANK] = rank


@emitted
def is_diffuse(Z: int, state: Memory) -> bool:
    """Whether the state of any series is diffuse."""
    bit: bool = (State(state, Z).totals[RANK] > 0.0).some()
    return bit


@emitted
def predict(Z: int, state: Memory, F_: Memory, Q_: Memory, b_: Memory) -> None:
    """Moments of the next state: a <- F a + b, P <- F P F' + Q."""
    s, F, Q, b = State(state, Z), matrix(F_, Z, Z), symmetric(Q_, Z), b_.get(Z)
    mean = [b[i] + x for i, x in enumerate(apply(F, s.mean.get(Z)))]
    G = product(F, symmetric(s.cov, Z))
    s.mean.set(mean)
    s.cov.set([Q[i][j] + dot(G[i], F[j]) for i in range(Z) for j in range(i + 1)])
    s.totals[LEFT] = s.totals[LEFT] - 1.0
    drop(s.cov, [s.cov[_low(i, i)] < 0.0 for i in range(Z)], Z)


@emitted
def keep(Z: int, state: Memory, mean: Memory, cov: Memory) -> None:
    """Keep the moments of the state."""
    s = State(state, Z)
    mean.set(s.mean.get(Z))
    cov.set(s.cov.get(triangle(Z)))


def _diffuse_cov(s: State, Z: int) -> list[Lanes]:
    A, proper = matrix(s.factor, Z, Z), s.totals[RANK] <= 0.0
    return [proper.choose(0.0, dot(A[i], A[j])) for i in range(Z) for j in range(i + 1)]


@emitted
def keep_diffuse(Z: int, state: Memory, cov_inf: Memory) -> None:
    """Keep the diffuse covariance A A'."""
    cov_inf.set(_diffuse_cov(State(state, Z), Z))


@emitted
def keep_last(Z: int, state: Memory, mean: Memory, cov: Memory, cov_inf: Memory) -> None:
    """Keep the moments of the series that end here."""
    s = State(state, Z)
    ends = s.totals[LEFT].equals(1.0)
    with ends.where_any():
        moments = (s.mean.get(Z), s.cov.get(triangle(Z)), _diffuse_cov(s, Z))
        for memory, values in zip((mean, cov, cov_inf), moments, strict=True):
            memory.set([ends.choose(x, memory[k]) for k, x in enumerate(values)])


# ---------------------------------------------------------------- an observation


@emitted
def observe(
    Z: int,
    exact: int,
    diffuse: int,
    state: Memory,
    h_: Memory,
    y: Memory,
    var_: Memory,
    seen_: Memory,
    note: Memory,
    K_: Memory,
    K1_: Memory,
) -> None:
    """Update the state with one observation where it is seen.

    `exact` says whether the observation of any lane may have no error, `diffuse` whether the state
    of any may be diffuse.
    """
    s, h, var, seen = State(state, Z), h_.get(Z), var_[0], seen_[0] > 0.0
    a, P = s.mean.get(Z), symmetric(s.cov, Z)
    v, M = y[0] - dot(h, a), apply(P, h)
    signal, used = dot(h, M), seen
    reach = _spread(h, P)
    floor = var.equals(0.0).choose(ROUNDING * (reach * reach), 0.0) if exact else 0.0
    f = (signal <= floor).choose(0.0, signal) + var
    if exact:
        used = seen & ~f.equals(0.0)
    diffused = seen & ~seen
    if diffuse:
        g, f_inf, diffused = _diffuse_variance(s, h, seen, Z)
    ordinary = used & ~diffused
    if exact:
        conflict = seen & ~used & ~diffused & _contradicts(h, a, y[0], v, reach)
        s.totals[QUAD] = conflict.choose(math.inf, s.totals[QUAD])
    inverse = ordinary.choose(1.0 / f, 0.0)
    K = [m * inverse for m in M]
    step = ordinary.choose(v * inverse, 0.0)
    note[V], note[VAR], note[STEP], note[INVERSE] = v, f, step, inverse
    _count(s, f, step * v, ordinary)
    if diffuse:
        inverse_inf = diffused.choose(1.0 / f_inf, 0.0)
        gain = [x * inverse_inf for x in apply(matrix(s.factor, Z, Z), g)]
        K = [diffused.choose(*pair) for pair in zip(gain, K, strict=True)]
        K1_.set([diffused.choose((M[k] - gain[k] * f) * inverse_inf, 0.0) for k in range(Z)])
        note[STEP_INF], note[INVERSE_INF] = diffused.choose(v * inverse_inf, 0.0), inverse_inf
        note[SECOND] = diffused.choose(f * inverse_inf * inverse_inf, 0.0)
        _reduce_factor(s, K, g, diffused, Z)
        _multiply(s, f_inf, diffused)
        s.totals[N_DIFFUSE] = s.totals[N_DIFFUSE] + diffused.choose(1.0, 0.0)
        note[VAR] = diffused.choose(math.inf, f)
    K_.set(K)
    _update(s, a, P, M, K, h, v, var, f, ordinary | diffused, exact, Z)


def _spread(h: Vector, P: Matrix) -> Lanes:
    """Largest standard deviation that h' z could have with these variances."""
    return dot([x.size() for x in h], [P[k][k].root() for k in range(len(h))])


def _contradicts(h: Vector, a: Vector, y: Lanes, v: Lanes, reach: Lanes) -> Flags:
    """Whether an observation of variance zero differs from what is known already."""
    size = y.size() + dot([x.size() for x in h], [x.size() for x in a])
    return v.size() > CONFLICT * size + _SPREAD_CONFLICT * reach


def _count(s: State, f: Lanes, quad: Lanes, ordinary: Flags) -> None:
    """Add ordinary observations to the totals."""
    s.totals[N_OBS] = s.totals[N_OBS] + ordinary.choose(1.0, 0.0)
    s.totals[QUAD] = s.totals[QUAD] + ordinary.choose(quad, 0.0)
    _multiply(s, f, ordinary)


def _multiply(s: State, f: Lanes, used: Flags) -> None:
    """Multiply the product of the variances; infinity and NaN stay in it."""
    x = s.totals[PRODUCT] * used.choose(f, 1.0)
    small = x < _LEAST_NORMAL
    x = small.choose(x * 2.0**_LIFT, x)
    s.totals[EXPONENT] = s.totals[EXPONENT] + x.exponent() - small.choose(_LIFT, 0.0)
    s.totals[PRODUCT] = (x < math.inf).choose(x.mantissa(), x)


def _update(
    s: State,
    a: Vector,
    P: Matrix,
    M: Vector,
    K: Vector,
    h: Vector,
    v: Lanes,
    var: Lanes,
    f: Lanes,
    used: Flags,
    exact: int,
    Z: int,
) -> None:
    """Moments after an observation, Joseph's form P <- (I - K h') P (I - K h')' + K var K'.

    A variance that cancels to rounding error of its terms (an observation without error determines
    it), or below zero, becomes zero with its row and column.
    """
    W = [[P[i][j] - M[i] * K[j] for j in range(Z)] for i in range(Z)]
    u = [x - var * k for x, k in zip(apply(transposed(W), h), K, strict=True)]
    s.mean.set([x + k * v for x, k in zip(a, K, strict=True)])
    s.cov.set([W[i][j] - K[i] * u[j] for i in range(Z) for j in range(i + 1)])
    known = []
    for i in range(Z):
        floor: Lanes | float = 0.0
        if exact:
            floor = var.equals(0.0).choose(ROUNDING * (P[i][i] + K[i] * K[i] * f), 0.0)
        known.append(used & (s.cov[_low(i, i)] <= floor))
    drop(s.cov, known, Z)


# ---------------------------------------------------------------- the diffuse factor


def _norm(x: Vector) -> Lanes:
    return dot(x, x).root()


def _amplitudes(A: Matrix) -> list[Lanes]:
    """Size of each row of a diffuse factor, no less than a fraction of the largest."""
    norms = [_norm(row) for row in A]
    largest = reduce(lambda x, y: (y > x).choose(y, x), norms)
    return [x + DIFFUSE_SCALE * largest for x in norms]


def _keep_rows(s: State, A: Matrix, bounds: Vector, Z: int) -> Flags:
    """Store a factor without the rows that have cancelled to rounding error; is any left."""
    kept = [_norm(row) > DIFFUSE * bound for row, bound in zip(A, bounds, strict=True)]
    for i in range(Z):
        s.factor.part(i * Z).set([kept[i].choose(x, 0.0) for x in A[i]])
    return reduce(or_, kept)


@emitted
def predict_factor(Z: int, state: Memory, F_: Memory) -> None:
    """Diffuse factor of the next state, A <- F A; rank 0 where nothing diffuse is left.

    A series that has ended keeps its rank.
    """
    s, F = State(state, Z), matrix(F_, Z, Z)
    A = matrix(s.factor, Z, Z)
    bounds = apply([[x.size() for x in row] for row in F], _amplitudes(A))
    some = _keep_rows(s, product(F, A), bounds, Z)
    rank = s.totals[RANK]
    s.totals[RANK] = (some | (s.totals[LEFT] <= 0.0)).choose(rank, 0.0)


def _diffuse_variance(s: State, h: Vector, seen: Flags, Z: int) -> tuple[list[Lanes], Lanes, Flags]:
    """g = A' h, the diffuse variance |g|^2, and where an observation has one."""
    A = matrix(s.factor, Z, Z)
    bound = dot([x.size() for x in h], _amplitudes(A))
    g = apply(transposed(A), h)
    some = _norm(g) > DIFFUSE * bound
    return g, dot(g, g), seen & (s.totals[RANK] > 0.0) & some


def _reduce_factor(s: State, K: Vector, g: Vector, diffused: Flags, Z: int) -> None:
    """Take the observed direction out of A: A <- A - K g'."""
    A = matrix(s.factor, Z, Z)
    bounds = [diffused.choose(x, 0.0) for x in _amplitudes(A)]
    less = [[diffused.choose(A[i][j] - K[i] * g[j], A[i][j]) for j in range(Z)] for i in range(Z)]
    rank = s.totals[RANK]
    left = _keep_rows(s, less, bounds, Z).choose(rank - 1.0, 0.0)
    s.totals[RANK] = diffused.choose(left, rank)


# ---------------------------------------------------------------- the way back


class Back:
    """Where (r_0, r_1), (N_0, N_1, N_2) relative to a step lie, N_0 F and N_1 F, and P."""

    def __init__(self, memory: Memory, Z: int) -> None:
        size = triangle(Z)
        self.r = [memory.part(k * Z) for k in range(2)]
        self.N = [memory.part(2 * Z + k * size) for k in range(3)]
        self.NF = [memory.part(2 * Z + 3 * size + k * Z * Z) for k in range(2)]
        self.P = memory.part(2 * Z + 3 * size + 2 * Z * Z)  # filtered covariance


def back_size(Z: int) -> int:
    """Lanes that a `Back` takes."""
    return 2 * Z + 4 * triangle(Z) + 2 * Z * Z


@emitted
def begin_back(Z: int, back: Memory) -> None:
    """After the last step, r = 0 and N = 0."""
    for k in range(back_size(Z)):
        back[k] = 0.0


@emitted
def pull_transition(Z: int, diffuse: int, back: Memory, F_: Memory) -> None:
    """r <- F' r and N <- F' N F, keeping N F for the lag-one covariance."""
    b, F = Back(back, Z), matrix(F_, Z, Z)
    across = transposed(F)
    for r in b.r[: 1 + diffuse]:
        r.set(apply(across, r.get(Z)))
    for k in range(1 + 2 * diffuse):
        NF = product(symmetric(b.N[k], Z), F)
        columns = transposed(NF)
        b.N[k].set([dot(across[i], columns[j]) for i in range(Z) for j in range(i + 1)])
        if k < 2:
            b.NF[k].set([x for row in NF for x in row])


@emitted
def smooth(Z: int, diffuse: int, back: Memory, mean: Memory, cov: Memory, cov_inf: Memory) -> None:
    """Smoothed from filtered moments, in place.

    V = P - P (N0 P + N1 Pinf) - Pinf (N1 P + N2 Pinf).
    """
    b, P = Back(back, Z), symmetric(cov, Z)
    b.P.set(lower(P))
    X = product(symmetric(b.N[0], Z), P)
    z = [x + y for x, y in zip(mean.get(Z), apply(P, b.r[0].get(Z)), strict=True)]
    V = P
    if diffuse:
        Pinf, N1, N2 = symmetric(cov_inf, Z), symmetric(b.N[1], Z), symmetric(b.N[2], Z)
        z = [x + y for x, y in zip(z, apply(Pinf, b.r[1].get(Z)), strict=True)]
        X = total_of(X, product(N1, Pinf))
        V = _less(V, product(Pinf, total_of(product(N1, P), product(N2, Pinf))))
    V = _less(V, product(P, X))
    mean.set(z)
    cov.set(lower(V))
    drop(cov, [V[i][i] < 0.0 for i in range(Z)], Z)


def _less(A: Matrix, B: Matrix) -> list[list[Lanes]]:
    return [[x - y for x, y in zip(*rows, strict=True)] for rows in zip(A, B, strict=True)]


@emitted
def smooth_pair(
    Z: int,
    diffuse: int,
    back: Memory,
    F: Memory,
    Q: Memory,
    cov_inf: Memory,
    cov: Memory,
    pair: Memory,
) -> None:
    """Cov(z_{t+1}, z_t | x) = F V_t - Q (N0 F P + N1 F Pinf), N relative to the predicted state."""
    b = Back(back, Z)
    X = product(matrix(b.NF[0], Z, Z), symmetric(b.P, Z))
    if diffuse:
        X = total_of(X, product(matrix(b.NF[1], Z, Z), symmetric(cov_inf, Z)))
    first = product(matrix(F, Z, Z), symmetric(cov, Z))
    pair.set([x for row in _less(first, product(symmetric(Q, Z), X)) for x in row])


@emitted
def pull(Z: int, back: Memory, h_: Memory, K_: Memory, note: Memory) -> None:
    """Pull (r, N) back through an observation; one that is missing has K = 0 and 1 / f = 0."""
    b, h, K = Back(back, Z), h_.get(Z), K_.get(Z)
    r, c = b.r[0].get(Z), apply(symmetric(b.N[0], Z), K)
    _add_sides(b.N[0], h, c, dot(K, c) + note[INVERSE], Z)
    _add(b.r[0], r, h, note[STEP] - dot(K, r))


@emitted
def pull_diffuse(Z: int, back: Memory, h_: Memory, K_: Memory, K1_: Memory, note: Memory) -> None:
    """The same, power by power of 1 / kappa; K1 and 1 / f_inf of ordinary observations are 0."""
    b, h, K, K1 = Back(back, Z), h_.get(Z), K_.get(Z), K1_.get(Z)
    r, r1 = b.r[0].get(Z), b.r[1].get(Z)
    N = [symmetric(memory, Z) for memory in b.N]
    NK, NK1 = [apply(k, K) for k in N], [apply(k, K1) for k in N[:2]]
    weights = [
        dot(K, NK[0]) + note[INVERSE],
        dot(K, NK[1]) + 2.0 * dot(K1, NK[0]) + note[INVERSE_INF],
        dot(K, NK[2]) + 2.0 * dot(K1, NK[1]) + dot(K1, NK1[0]) - note[SECOND],
    ]
    for k in range(3):
        c = [x + y for x, y in zip(NK[k], NK1[k - 1], strict=True)] if k else NK[0]
        _add_sides(b.N[k], h, c, weights[k], Z)
    _add(b.r[0], r, h, note[STEP] - dot(K, r))
    _add(b.r[1], r1, h, note[STEP_INF] - dot(K, r1) - dot(K1, r))


def _add(memory: Memory, r: Vector, h: Vector, weight: Lanes) -> None:
    memory.set([x + weight * y for x, y in zip(r, h, strict=True)])


def _add_sides(memory: Memory, h: Vector, c: Vector, weight: Lanes, Z: int) -> None:
    """N <- N - c h' - h c' + weight h h'."""
    N = symmetric(memory, Z)
    left = [weight * x - y for x, y in zip(h, c, strict=True)]
    memory.set([N[i][j] + left[i] * h[j] - h[i] * c[j] for i in range(Z) for j in range(i + 1)])
