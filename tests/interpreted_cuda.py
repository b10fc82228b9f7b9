"""The CUDA kernels against the reference and the dense Gaussian; run by `test_cuda_kernels.py`.

With ``TRITON_INTERPRET=1`` in the environment on tensors of the CPU, else on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import triton
from test_associative import same
from test_kalman_kernels import Data, close, dense, random_data, random_system, tensor

from seqdgm.kernels import System, cuda, reference

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cpu" if INTERPRETED else "cuda"
SERIES, STEPS = 3, 6
OWN = dict.fromkeys(("F", "Q", "H", "R", "b", "d", "m0", "P0"), SERIES)
VARYING = dict.fromkeys(("F", "Q", "H", "R", "b", "d"), STEPS)
CASES: dict[str, tuple[int, int, dict[str, Any]]] = {
    "scalar, diffuse": (1, 1, {"diffuse": 1}),
    "own, varying, correlated": (3, 2, {"systems": OWN, "times": VARYING}),
    "diffuse": (4, 2, {"diffuse": 2, "noise": "diagonal", "systems": {"F": SERIES}}),
    "diffuse, exact": (2, 2, {"diffuse": 1, "noise": "zero", "times": {"F": STEPS, "Q": STEPS}}),
}


@pytest.fixture(autouse=True, scope="module")
def quick_interpreter() -> Any:
    """The interpreter patches the language at every call of a device function; once is enough."""
    if not INTERPRETED:
        yield
        return
    from triton.runtime import interpreter

    patched: set[str] = set()

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        # The launch of a kernel patches what our own functions see.
        if module.startswith("triton") and module not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(module)
        return self.rewrite()(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "__call__", call)
        yield


def make(case: str) -> tuple[System, Data]:
    state, obs, options = CASES[case]
    rng = np.random.default_rng([46, len(case)])
    return random_system(rng, state, obs, **options), random_data(rng, SERIES, STEPS, obs)


def run(function: Any, system: System, data: Data, **options: Any) -> Any:
    """Call a kernel with the tensors on its device; the result comes back to the CPU."""
    moved = System(*(field.to(DEVICE) for field in system))
    out = function(moved, *(field.to(DEVICE) for field in data), **options)
    return type(out)(*(None if field is None else field.cpu() for field in out))


@pytest.mark.parametrize("case", CASES)
def test_filter_equals_the_reference(case: str) -> None:
    system, data = make(case)
    every = run(cuda.kalman_filter, system, data, store="all")
    same(every, reference.kalman_filter(system, *data, store="all"))


@pytest.mark.parametrize("case", ["diffuse, exact"])
def test_what_is_stored_changes_nothing(case: str) -> None:
    system, data = make(case)
    data = data._replace(lengths=torch.tensor([0, 4, 1]))
    for store in ("likelihood", "last"):
        out = run(cuda.kalman_filter, system, data, store=store)
        same(out, reference.kalman_filter(system, *data, store=store))


@pytest.mark.parametrize("case", CASES)
def test_smoother_equals_reference_and_dense(case: str) -> None:
    system, data = make(case)
    out = run(cuda.kalman_smoother, system, data, lag_one=True)
    same(out, reference.kalman_smoother(system, *data, lag_one=True))
    state = out.mean.shape[-1]
    for n in range(SERIES):
        x, mask, steps = data.series(n)
        expected = dense(system, x, mask, n, steps)
        blocks = expected.cov.reshape(steps, state, steps, state).swapaxes(1, 2)
        close(out.loglik[n], expected.loglik)
        close(out.mean[n, :steps], expected.mean)
        close(out.cov[n, :steps], blocks[np.arange(steps), np.arange(steps)])
        close(out.lag_one[n, : steps - 1], blocks[np.arange(1, steps), np.arange(steps - 1)])


def test_parts_of_a_panel_and_expanded_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    system, data = make("scalar, diffuse")
    expected = reference.kalman_smoother(system, *data, lag_one=True)
    wide = system._replace(Q=system.Q.expand(SERIES, STEPS, 1, 1), m0=system.m0.expand(SERIES, 1))
    monkeypatch.setattr(cuda, "_SCRATCH_BYTES", 1)
    same(run(cuda.kalman_smoother, wide, data, lag_one=True), expected)


def test_redundant_and_contradictory_observations() -> None:
    """An exact copy of an exact observation adds nothing; a different value is impossible."""
    rng = np.random.default_rng(31)
    once = random_system(rng, 2, 1, noise="zero")
    twice = once._replace(
        H=torch.cat([once.H, 2.0 * once.H], 2),
        R=tensor(np.zeros((1, 1, 2, 2))),
        d=torch.cat([once.d, 2.0 * once.d], 2),
    )
    x = tensor(rng.standard_normal((2, 4, 1)))
    copied = torch.cat([x, 2.0 * x], 2)
    copied[1, 2, 1] += 0.01
    data = Data(copied, ~copied.isnan(), torch.tensor([4, 4]))
    out = run(cuda.kalman_filter, twice, data, store="likelihood")
    plain = reference.kalman_filter(once, x, ~x.isnan(), data.lengths, store="likelihood")
    close(out.loglik[0], plain.loglik[0])
    assert float(out.loglik[1]) == -np.inf


def test_what_the_kernels_cannot_read() -> None:
    rng = np.random.default_rng(37)
    system, data = random_system(rng, 17, 1), random_data(rng, 2, 3, 1)
    with pytest.raises(ValueError, match="up to 16 state elements, not 17; use 'reference'"):
        run(cuda.kalman_filter, system, data, store="last")
    system, data = make("scalar, diffuse")
    elsewhere = system._replace(F=system.F.to("meta"))
    moved = (field.to(DEVICE) for field in data)
    with pytest.raises(ValueError, match="F is on meta but x on c"):
        cuda.kalman_filter(
            System(*(f if f.is_meta else f.to(DEVICE) for f in elsewhere)), *moved, store="last"
        )
