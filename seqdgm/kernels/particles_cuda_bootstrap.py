"""Fused bootstrap filters for CUDA: memory, launches and results of the Triton kernels."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels import LARGEST_CUDA_STATE
from seqdgm.kernels.particles_cuda_filter import (
    Axes,
    Cloud,
    Panel,
    Results,
    filter_kernel,
    half_step_kernel,
    moments_kernel,
)
from seqdgm.kernels.particles_cuda_layout import Layout, layout, readable, tables
from seqdgm.kernels.particles_cuda_models import Linear, LogVariance
from seqdgm.kernels.particles_reference import _Cloud, _stderr
from seqdgm.kernels.particles_types import Bootstrapped, LinearProblem, VolatilityProblem


def bootstrap_linear_gaussian(
    problem: LinearProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of a linear-Gaussian system."""
    problem = LinearProblem(*(readable(field) for field in problem))
    state = problem.m0.shape[1]
    if state > LARGEST_CUDA_STATE:
        raise ValueError(
            f"the 'cuda' kernels take up to {LARGEST_CUDA_STATE} state elements, not {state}; use "
            "'reference'"
        )
    start = torch.cat(_broadcast(1, problem.m0, problem.root0.flatten(1)), 1)
    F, root = problem.F.flatten(2), problem.root.flatten(2)
    dynamics = torch.cat(_broadcast(2, problem.b, F, root), 2)
    constant = -0.5 * (2.0 * math.pi * problem.var).log()
    scale = problem.var.reciprocal()
    emission = torch.cat(_broadcast(3, scale[..., None], constant[..., None], problem.h), 3)
    model = Linear(
        start,
        dynamics,
        emission,
        problem.y.contiguous(),
        problem.mask.contiguous().view(torch.uint8),
        _stride(start, 0),
        _stride(dynamics, 0),
        _stride(dynamics, 1),
        _stride(emission, 0),
        _stride(emission, 1),
    )
    seen = problem.mask.any(2)
    options = (n_particles, seed, threshold, moments)
    return _filter(model, state, problem.y.shape[2], seen, problem.lengths, *options)


def bootstrap_volatility(
    problem: VolatilityProblem, n_particles: int, seed: int, threshold: float, moments: bool
) -> Bootstrapped:
    """Bootstrap filter of stochastic volatility."""
    readable(problem.y)
    mu, rho, sigma, m0, s0, leverage, df, y, mask, lengths = problem
    n, steps = len(lengths), y.shape[1]
    constant = torch.zeros_like(mu)
    if df is not None:
        constant = torch.lgamma(0.5 * df + 0.5) - torch.lgamma(0.5 * df)
        constant = constant - 0.5 * (df * math.pi).log()
    fields = (mu, rho, sigma, m0, s0, leverage, constant if df is None else df, constant)
    parameters = torch.stack(torch.broadcast_tensors(*fields), 1)
    y, mask = y.contiguous(), mask.contiguous()
    model = LogVariance(
        parameters, y, mask.view(torch.uint8), _stride(parameters, 0), _stride(y, 0)
    )
    options = (n_particles, seed, threshold, moments)
    return _filter(model, 1, 1, mask.expand(n, steps), lengths, *options)


def _filter(
    model: Linear | LogVariance,
    state: int,
    obs: int,
    seen: Bool[Tensor, "series time"],
    lengths: Int[Tensor, "series"],
    count: int,
    seed: int,
    threshold: float,
    moments: bool,
) -> Bootstrapped:
    n, steps = seen.shape
    like = model.y
    plan = layout(n, count)
    cloud = _cloud(like, n, state, plan, moments)
    kept = n if moments else 0
    results = Results(
        like.new_zeros(n, steps),
        like.new_full((n, steps), math.nan),
        like.new_full((kept, steps, state), math.nan),
        like.new_full((kept, steps, state), math.nan),
    )
    panel = Panel(
        lengths.contiguous(),
        seen.contiguous().view(torch.uint8),
        torch.full((1,), seed - 2**64 * (seed >= 2**63), dtype=torch.int64, device=like.device),
        torch.tensor([threshold * count, -math.log(count)], dtype=torch.float64).to(like.device),
    )
    shared = (model, panel, cloud, tables(like, n, plan), results, plan.size, Axes(n, steps, obs))
    if steps:
        with torch.cuda.device_of(like):
            _launch(shared, plan, n, steps, state, moments)
    stderr = _evidence_stderr(cloud, plan, n, steps).masked_fill(lengths == 0, 0.0)
    found = (results.mean, results.var) if moments else (None, None)
    return Bootstrapped(results.increments, results.ess, stderr, *found)


def _launch(
    shared: tuple[Any, ...], plan: Layout, n: int, steps: int, state: int, moments: bool
) -> None:
    """Run through all steps."""
    constants = {
        "LINEAR": isinstance(shared[0], Linear),
        "STATE": state,
        "CHUNK": plan.chunk,
        "MOMENTS": moments,
    }
    options = {"num_warps": plan.warps, "enable_fp_fusion": True}
    if plan.one:
        filter_kernel[(n,)](*shared, **constants, **options)
        return
    constants["PROGRAMS"] = plan.programs
    _, _, cloud, _, results, size, axes = shared
    for t in range(steps):
        for second in (False, True):
            half_step_kernel[(size.programs, n)](t, *shared, SECOND=second, **constants, **options)
        if moments:
            moments_kernel[(state, n)](
                t, cloud, results, size, axes, STATE=state, PROGRAMS=plan.programs, **options
            )


def _cloud(like: Tensor, n: int, state: int, plan: Layout, moments: bool) -> Cloud:
    """Room for the particles; before the first step all weights are equal."""
    size = plan.size
    spans = size.programs if moments and not plan.one else 0
    cloud = Cloud(
        like.new_empty(2, n, state, size.particles),
        like.new_full((n, size.particles), -math.log(size.particles)),
        torch.empty(2, n, size.particles, dtype=torch.int32, device=like.device),
        like.new_empty(n, 3, size.programs),
        like.new_empty(n, state, 3, spans),
        like.new_zeros(2, n, 6),
    )
    cloud.eve[0] = torch.arange(size.particles, device=like.device)
    cloud.status[1, :, 1], cloud.status[1, :, 2] = size.particles, 1.0
    return cloud


def _evidence_stderr(cloud: Cloud, plan: Layout, n: int, steps: int) -> Float[Tensor, "series"]:
    """Standard error of the log-evidence from what the last step has left."""
    last = 0 if plan.one else (steps + 1) % 2
    shift, ess, alive, _, resamplings, _ = cloud.status[last].unbind(1)
    series = torch.arange(n, device=ess.device)
    log_weights = cloud.log_weights - shift[:, None]
    eve = cloud.eve[resamplings.long() % 2, series].long()
    end = _Cloud(cloud.z, log_weights, eve, ess, resamplings.long(), alive > 0)
    return torch.where(end.alive, _stderr(end), torch.nan)


def _broadcast(axes: int, *fields: Tensor) -> list[Tensor]:
    """Expand the first axes of all fields to the same lengths."""
    shape = torch.broadcast_shapes(*(field.shape[:axes] for field in fields))
    return [field.expand(*shape, *field.shape[axes:]) for field in fields]


def _stride(field: Tensor, axis: int) -> int:
    """How far the entries along an axis are apart; 0 where there is one."""
    return field.stride(axis) if field.shape[axis] > 1 else 0
