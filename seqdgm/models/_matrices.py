"""Matrices of the linear-Gaussian model: their checks, and their unconstrained parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from seqdgm.kernels.types import System


class Matrices(NamedTuple):
    """Parameters of the model; the first axis is 1 (shared) or the number of series."""

    F: Float[Tensor, "sys state state"]
    H: Float[Tensor, "sys dim state"]
    Q: Float[Tensor, "sys state state"]
    R: Float[Tensor, "sys dim dim"]
    m0: Float[Tensor, "sys state"]
    P0: Float[Tensor, "sys state state"]
    B: Float[Tensor, "sys state inputs"]
    D: Float[Tensor, "sys dim inputs"]
    b: Float[Tensor, "sys state"]
    d: Float[Tensor, "sys dim"]

    def take(self, rows: Int[Tensor, "series"]) -> Matrices:
        """The parameters of the chosen series."""
        return self if len(self.F) == 1 else Matrices(*(field[rows] for field in self))

    def system(
        self, u: Float[Tensor, "series steps inputs"], diffuse: Bool[Tensor, "state"]
    ) -> System:
        """System matrices with the inputs worked into the offsets."""
        b, d = self.b[:, None], self.d[:, None]
        if u.shape[2]:
            b = b + u @ self.B.mT
            d = d + u @ self.D.mT
        p0 = self.P0 * ~(diffuse[:, None] | diffuse[None, :])
        pinf = torch.diag(diffuse.to(p0.dtype)).expand_as(p0)
        return System(
            F=self.F[:, None],
            Q=self.Q[:, None],
            H=self.H[:, None],
            R=self.R[:, None],
            b=b,
            d=d,
            m0=self.m0,
            P0=p0,
            Pinf=pinf,
        )


NAMES = Matrices._fields
COVARIANCES = ("Q", "R", "P0")


def read_matrix(name: str, value: Any) -> np.ndarray | None:
    if value is None:
        return None
    array = np.asarray(value, dtype=np.float64)
    want = 1 if name in ("m0", "b", "d") else 2
    if array.ndim != want or not np.isfinite(array).all():
        raise ValueError(f"{name} must be a finite array with {want} axes, got shape {array.shape}")
    if name in COVARIANCES:
        if array.shape[0] != array.shape[1] or not np.allclose(array, array.T):
            raise ValueError(f"{name} must be a symmetric square matrix")
        if np.linalg.eigvalsh(array)[0] < -1e-10 * max(1.0, float(np.abs(array).max())):
            raise ValueError(f"{name} has a negative eigenvalue, so it is no covariance")
    return array


def find_latent_dim(latent_dim: int | None, given: Mapping[str, np.ndarray]) -> int:
    if latent_dim is not None:
        if int(latent_dim) != latent_dim or latent_dim < 1:
            raise ValueError(f"latent_dim={latent_dim!r} must be a whole number, at least 1")
        return int(latent_dim)
    for name, axis in (("F", 0), ("Q", 0), ("m0", 0), ("P0", 0), ("H", 1)):
        if name in given:
            return given[name].shape[axis]
    raise ValueError("give latent_dim, or a matrix that tells it (F, H, Q, m0 or P0)")


def check_shapes(given: Mapping[str, np.ndarray], state: int) -> None:
    dims = {given[n].shape[0] for n in ("H", "R", "D", "d") if n in given}
    inputs = {given[n].shape[1] for n in ("B", "D") if n in given}
    if len(dims) > 1 or len(inputs) > 1:
        raise ValueError(
            "H, R, D and d disagree on the number of observed columns, or B and D on the inputs: "
            f"{ {n: v.shape for n, v in given.items()} }"
        )
    shape = {"F": (state, state), "Q": (state, state), "P0": (state, state), "m0": (state,)}
    shape["b"] = (state,)
    for name, want in shape.items():
        if name in given and given[name].shape != want:
            raise ValueError(f"{name} has shape {given[name].shape}, expected {want}")
    if "H" in given and given["H"].shape[1] != state:
        raise ValueError(f"H has {given['H'].shape[1]} columns, expected latent_dim={state}")
    if "B" in given and given["B"].shape[0] != state:
        raise ValueError(f"B has {given['B'].shape[0]} rows, expected latent_dim={state}")


def diffuse_mask(diffuse: bool | Sequence[bool], state: int) -> Bool[Tensor, "state"]:
    mask = torch.as_tensor(np.broadcast_to(np.asarray(diffuse, dtype=bool), (state,)).copy())
    return mask


def pack(matrices: Matrices, names: Sequence[str], emission_cov: str) -> Float[Tensor, "sys free"]:
    r"""Unconstrained vectors of the named matrices.

    A covariance is :math:`L L'` with :math:`L = \mathrm{diag}(e^s) (I + U)`, U strictly lower
    triangular: s has no bound and U no scale. A diagonal R has s only.
    """
    parts = [matrices.F.new_zeros(len(matrices.F), 0)]
    for name in names:
        value = getattr(matrices, name)
        if name not in COVARIANCES:
            parts.append(value.flatten(1))
            continue
        size = value.shape[-1]
        spread = torch.diagonal(value, dim1=-2, dim2=-1).mean(-1)[:, None, None]
        ridge = torch.eye(size, dtype=value.dtype) * (1e-10 * spread + 1e-300)
        root = torch.linalg.cholesky(value + ridge)
        diagonal = torch.diagonal(root, dim1=-2, dim2=-1)
        parts.append(diagonal.log())
        if not (name == "R" and emission_cov == "diagonal"):
            low = torch.tril_indices(size, size, -1)
            parts.append((root / diagonal[..., None])[:, low[0], low[1]])
    return torch.cat(parts, 1)


def unpack(
    theta: Float[Tensor, "batch free"],
    template: Matrices,
    names: Sequence[str],
    emission_cov: str,
) -> Matrices:
    """Matrices of unconstrained vectors (see `pack`); the others are those of the template."""
    count, at = len(theta), 0
    changed = {}
    for name in names:
        like = getattr(template, name)
        if name not in COVARIANCES:
            size = like[0].numel()
            changed[name] = theta[:, at : at + size].reshape(count, *like.shape[1:])
            at += size
            continue
        size = like.shape[-1]
        scale = theta[:, at : at + size].exp()
        at += size
        root = torch.eye(size, dtype=theta.dtype).repeat(count, 1, 1)
        if not (name == "R" and emission_cov == "diagonal"):
            low = torch.tril_indices(size, size, -1)
            root[:, low[0], low[1]] = theta[:, at : at + low.shape[1]]
            at += low.shape[1]
        root = scale[..., None] * root
        changed[name] = root @ root.mT
    kept = {
        name: field.expand(count, *field.shape[1:])
        for name, field in zip(NAMES, template, strict=True)
        if name not in changed
    }
    return Matrices(**changed, **kept)
