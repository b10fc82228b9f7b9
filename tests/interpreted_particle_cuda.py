"""The particle kernels for CUDA against the reference; run by `test_particle_cuda_kernels.py`.

With ``TRITON_INTERPRET=1`` in the environment on tensors of the CPU, else on a GPU.
"""

from __future__ import annotations

from typing import Any

import mpmath
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from interpreted_cuda import DEVICE, quick_interpreter
from scipy.special import logsumexp
from torch import Tensor

from seqdgm.kernels import System, particles, particles_cuda_layout, philox
from seqdgm.kernels.particles_cuda_steps import cos_sin, normals, uniform

__all__ = ["quick_interpreter"]

SPREAD = ["one program", "several programs"]
SEED = 2**63 + 12345
# Stratified and multinomial resampling are shorter ways through the same lines.
SCHEMES = [
    pytest.param(s, marks=pytest.mark.slow) if s in ("stratified", "multinomial") else s
    for s in particles.SCHEMES
]


@pytest.fixture(params=SPREAD)
def spread(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Whether a series of more than 128 particles is divided among programs."""
    divide(monkeypatch, request.param)
    return str(request.param)


def divide(patch: pytest.MonkeyPatch, spread: str) -> None:
    patch.setattr(particles_cuda_layout, "LARGEST_CHUNK", 128)
    if spread == "several programs":
        patch.setattr(particles_cuda_layout, "BLOCK", 128)


def tensor(values: Any) -> Tensor:
    return torch.as_tensor(np.asarray(values, float))


def moved(value: Any, device: str) -> Any:
    """Tensors, alone or in a named tuple, on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return type(value)(*(moved(field, device) for field in value))
    return value


def both(name: str, *arguments: Any, **options: Any) -> tuple[Any, Any]:
    """The result of the kernels on their device, and that of the reference."""
    function = getattr(particles, name)
    there = [moved(argument, DEVICE) for argument in arguments]
    found = moved(function(*there, implementation="cuda", **options), "cpu")
    return found, function(*arguments, implementation="reference", **options)


def same(found: Any, expected: Any, tolerance: float = 1e-12) -> None:
    for name, a, b in zip(expected._fields, found, expected, strict=True):
        assert (a is None) == (b is None), name
        if b is not None:
            torch.testing.assert_close(
                a, b, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m, n=name: n + m
            )


# ---------------------------------------------------------------- random numbers


@triton.jit
def words_kernel(counters: tl.tensor, keys: tl.tensor, words: tl.tensor) -> None:
    n = tl.program_id(0)
    base = counters + 4 * n
    c = (tl.load(base), tl.load(base + 1), tl.load(base + 2), tl.load(base + 3))
    drawn = tl.philox(tl.load(keys + n), c[0], c[1], c[2], c[3])
    for i in tl.static_range(4):
        tl.store(words + 4 * n + i, drawn[i].to(tl.int64))


def test_philox_gives_the_published_words() -> None:
    """Known answers of Random123 (kat_vectors of its source), for philox4x32-10."""
    ones = 2**32 - 1
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((ones,) * 4, (ones,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    counters = torch.tensor(np.array([case[0] for case in cases], np.uint32).view(np.int32))
    keys = np.array([low | high << 32 for _, (low, high), _ in cases], np.uint64).view(np.int64)
    words = torch.zeros(3, 4, dtype=torch.int64, device=DEVICE)
    words_kernel[(3,)](counters.to(DEVICE), torch.from_numpy(keys).to(DEVICE), words)
    assert words.tolist() == [list(case[2]) for case in cases]


@triton.jit
def draws_kernel(
    seed: tl.tensor, series: tl.tensor, t: tl.tensor, purpose: tl.tensor, out: tl.tensor
) -> None:
    pair = tl.arange(0, 64)
    first, second = normals(tl.load(seed), series, pair, t, purpose)
    tl.store(out + pair, first)
    tl.store(out + 64 + pair, second)
    tl.store(out + 128, uniform(tl.load(seed), series, t))


def test_draws_equal_those_of_the_reference() -> None:
    out = torch.zeros(129, dtype=torch.float64, device=DEVICE)
    seed = torch.tensor([SEED - 2**64], device=DEVICE)
    draws_kernel[(1,)](seed, 3, 7, 2, out)
    series = torch.tensor([3])
    expected = philox.normals(series, 128, 7, 2, SEED)[0]
    torch.testing.assert_close(out[:128].cpu(), expected, rtol=1e-14, atol=1e-15)
    assert float(out[128]) == float(philox.uniform(series, 7, SEED)[0])


@triton.jit
def turns_kernel(turns: tl.tensor, out: tl.tensor, count: tl.tensor) -> None:
    index = tl.arange(0, 1024)
    inside = index < count
    cosine, sine = cos_sin(tl.load(turns + index, mask=inside))
    tl.store(out + index, cosine, mask=inside)
    tl.store(out + count + index, sine, mask=inside)


def test_cosine_and_sine_of_a_turn() -> None:
    rng = np.random.default_rng(3)
    edges = np.arange(9) / 8
    near = [np.nextafter(edges[1:], 0), np.nextafter(edges[:-1], 1)]
    turns = np.concatenate([edges, *near, rng.random(500)])
    out = torch.zeros(2, len(turns), dtype=torch.float64, device=DEVICE)
    turns_kernel[(1,)](tensor(turns).to(DEVICE), out, len(turns))
    exact = [[f(2 * mpmath.mpf(float(x))) for x in turns] for f in (mpmath.cospi, mpmath.sinpi)]
    np.testing.assert_allclose(out.cpu(), np.array(exact, float), rtol=0, atol=2.3e-16)


# ---------------------------------------------------------------- weights and ancestors


def some_weights(n: int, count: int) -> Tensor:
    rng = np.random.default_rng([n, count])
    log_weights = rng.normal(0, 2, (n, count))
    log_weights[0, 3 : count // 2] = -np.inf
    return tensor(log_weights)


def test_weigh(spread: str) -> None:
    log_weights = some_weights(5, 150)
    log_weights[1] = -torch.inf
    log_weights[2, 140] = torch.nan
    log_weights[3, 1] = torch.inf
    log_weights[4] -= 1e3
    found, expected = both("weigh", log_weights)
    same(found, expected)
    exact = logsumexp(log_weights[[0, 4]], axis=1)
    np.testing.assert_allclose(found.total[[0, 4]], exact, rtol=1e-15, atol=1e-14)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_resample(spread: str, scheme: Any) -> None:
    log_weights = particles.weigh(some_weights(3, 150), implementation="reference").log_weights
    # The last level reaches the sum of the weights, and beyond it only weights of zero are left.
    log_weights[1, 120:] = -torch.inf
    log_weights[2] = -torch.inf
    needed = torch.tensor([True, True, False])
    rng = np.random.default_rng(7)
    numbers = {"systematic": 1, "killing": 300}.get(scheme, 150)
    uniforms = tensor(rng.random((3, numbers)))
    uniforms[1] = 1 - 2.0**-53
    found, expected = both("resample", scheme, log_weights, uniforms, needed)
    assert torch.equal(found, expected)
    assert torch.isfinite(log_weights[:2].gather(1, found[:2])).all()
    for weight in (-torch.inf, torch.nan):
        log_weights[2, 7] = weight
        with pytest.raises(ValueError, match="of series 0: no weight is positive"):
            both("resample", scheme, log_weights[2:], uniforms[2:], None)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float64, torch.complex128])
def test_gather(kind: torch.dtype) -> None:
    rng = np.random.default_rng(11)
    ancestors = torch.from_numpy(rng.integers(0, 50, (3, 40)))
    for trailing in ((), (1,), (3, 2), (200,), (0,)):
        x = tensor(rng.normal(0, 1, (3, 50, *trailing)) > 0)
        if kind != torch.bool:
            x = tensor(rng.normal(0, 1, x.shape))
        found, expected = both("gather", x.to(kind), ancestors)
        assert found.dtype == kind
        assert torch.equal(found, expected)


def test_pick(spread: str) -> None:
    rng = np.random.default_rng(13)
    log_weights = some_weights(4, 150).reshape(2, 2, 150) + 700
    uniforms = tensor(rng.random((2, 2)))
    uniforms[0, 1] = 1 - 2.0**-53
    found, expected = both("pick", log_weights, uniforms)
    assert torch.equal(found, expected)
    for row in (-torch.inf, torch.nan):
        log_weights[1, 1] = row
        with pytest.raises(ValueError, match="of row 0: no weight is positive"):
            both("pick", log_weights[1, 1:], uniforms[1, 1:])


# ---------------------------------------------------------------- bootstrap filters


def a_system(
    rng: np.random.Generator, state: int, obs: int, *, own: int = 1, varying: int = 1
) -> System:
    noise = rng.normal(0, 0.3, (own, 1, obs, obs))
    return System(
        tensor(rng.normal(0, 0.5, (1, varying, state, state))),
        tensor(np.eye(state) * rng.random((own, 1, 1, 1))),
        tensor(rng.normal(0, 1, (own, varying, obs, state))),
        tensor(noise @ noise.swapaxes(2, 3) + np.eye(obs)),
        tensor(rng.normal(0, 1, (1, 1, state))),
        tensor(rng.normal(0, 1, (1, varying, obs))),
        tensor(rng.normal(0, 1, (own, state))),
        tensor(np.eye(state)[None]),
        tensor(np.zeros((1, state, state))),
    )


def test_linear_gaussian_filter(spread: str) -> None:
    """Systems of each series that vary, correlated errors, gaps, an empty and a short series."""
    rng = np.random.default_rng(17)
    system = a_system(rng, 2, 2, own=3, varying=3)
    x, mask = tensor(rng.normal(0, 2, (3, 3, 2))), torch.from_numpy(rng.random((3, 3, 2)) < 0.7)
    mask[2, 1] = False
    lengths = torch.tensor([3, 0, 2])
    options: dict[str, Any] = {"n_particles": 150, "seed": SEED, "threshold": 0.7}
    found, expected = both(
        "bootstrap_linear_gaussian", system, x, mask, lengths, moments=True, **options
    )
    same(found, expected)
    assert float(found.stderr[0]) > 0  # somebody resampled


def test_volatility_filter_with_leverage(spread: str) -> None:
    """Series that share their data, one of which ends where its weights vanish."""
    x = tensor([[0.4, -1.0, 2.0, 0.1]])
    mask = torch.tensor([[True, False, True, True]])
    model = particles.Volatility(
        mu=tensor([-1.0, -1.0, -20000.0]),
        rho=tensor([0.9, 0.95, 0.9]),
        sigma=tensor([1.0]),
        leverage=tensor([-0.5, 0.0, 0.3]),
        s0=tensor([2.0]),
        m0=tensor([0.0]),
    )
    lengths = torch.tensor([4, 3, 4])
    options: dict[str, Any] = {"n_particles": 150, "seed": 3, "threshold": 0.9}
    found, expected = both("bootstrap_volatility", model, x, mask, lengths, **options)
    same(found, expected)
    assert float(found.increments[2].sum()) == -np.inf


@pytest.mark.slow
def test_volatility_filter_with_heavy_tails(spread: str) -> None:
    x = tensor([[0.4, 9.0], [0.1, 0.2]])
    model = particles.Volatility(
        tensor([-1.0]), tensor([0.9]), tensor([0.7]), df=tensor([3.0, 8.0]), mean=tensor([[0.1]])
    )
    options: dict[str, Any] = {"n_particles": 150, "seed": 5, "threshold": 1.0, "moments": True}
    found, expected = both(
        "bootstrap_volatility", model, x, x < 99, torch.tensor([2, 2]), **options
    )
    same(found, expected)


@pytest.mark.parametrize("steps", [0, 1])
def test_few_steps_and_one_particle(steps: int) -> None:
    rng = np.random.default_rng(19)
    system = a_system(rng, 1, 1)
    x = tensor(rng.normal(0, 1, (2, steps, 1)))
    lengths = torch.full((2,), steps)
    found, expected = both(
        "bootstrap_linear_gaussian", system, x, x < 99, lengths, n_particles=1, seed=1
    )
    same(found, expected)


def test_a_draw_does_not_depend_on_the_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    x = tensor([[0.4, -1.0]])
    model = particles.Volatility(tensor([-1.0]), tensor([0.9]), tensor([1.0]))
    found = []
    for chunk, block in ((512, 4096), (128, 4096), (256, 128)):
        monkeypatch.setattr(particles_cuda_layout, "LARGEST_CHUNK", chunk)
        monkeypatch.setattr(particles_cuda_layout, "BLOCK", block)
        arguments = [moved(a, DEVICE) for a in (model, x, x < 99, torch.tensor([2]))]
        found.append(
            moved(
                particles.bootstrap_volatility(
                    *arguments, n_particles=500, seed=1, threshold=1.0, implementation="cuda"
                ),
                "cpu",
            )
        )
        same(found[-1], found[0], 1e-13)


def test_what_the_kernels_cannot_read() -> None:
    rng = np.random.default_rng(23)
    x = tensor(rng.normal(0, 1, (2, 3, 1)))
    system = a_system(rng, 17, 1)
    with pytest.raises(ValueError, match="up to 16 state elements, not 17; use 'reference'"):
        both(
            "bootstrap_linear_gaussian", system, x, x < 99, torch.tensor([3, 3]),
            n_particles=8, seed=1,
        )  # fmt: skip
