r"""Unconstrained coordinates of the parameters that a learner climbs in.

A model names the domains of its parameters (`StateSpaceModel.domains`), and a learner moves
:math:`\phi` in :math:`R^P` with :math:`\theta = T(\phi)`, T being the map of
`torch.distributions.biject_to`; gradients go through

.. math:: \nabla_\phi \ell = \left(\frac{\partial T}{\partial \phi}\right)^\top
    \nabla_\theta \ell.

The maximum is the same in either coordinates, and no step leaves the domain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributions import Transform, biject_to

if TYPE_CHECKING:
    from seqdgm.recursion import StateSpaceModel


@dataclass(frozen=True)
class Coordinates:
    """Coordinates of a model's learnable parameters.

    Attributes
    ----------
    parameters : dict of str to Parameter
        The model's own, by name.
    free : dict of str to Parameter
        What an optimiser moves: coordinates of a parameter with a domain, else the parameter
        itself.
    transforms : dict of str to Transform
        From coordinates to parameters, for those with a domain.
    """

    parameters: dict[str, nn.Parameter]
    free: dict[str, nn.Parameter]
    transforms: dict[str, Transform]

    @classmethod
    def of(cls, model: StateSpaceModel) -> Coordinates:
        """Coordinates at the model's present values.

        Raises
        ------
        ValueError
            If the model has nothing to learn, names a domain of a parameter that it does not have,
            or a parameter does not lie inside its domain.

        Examples
        --------
        >>> import seqdgm as sq
        >>> model = sq.StochasticVolatility()
        >>> found = Coordinates.of(model)
        >>> found.restore(found.snapshot() | {"rho": torch.tensor(0.0)})
        >>> model.rho.item()
        0.0
        """
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not parameters:
            raise ValueError(
                f"{type(model).__name__} has nothing to learn; make its parameters "
                "torch.nn.Parameter attributes, or call fit with method='given'"
            )
        known = {name for part in model.modules() for name in part._parameters}
        unknown = sorted(name for name in model.domains if name.split(".")[-1] not in known)
        if unknown:
            raise ValueError(
                f"{type(model).__name__}.domains names {unknown}, which are not among its "
                f"parameters {sorted(known)}"
            )
        free, transforms = dict(parameters), {}
        for name in parameters.keys() & model.domains.keys():
            domain, value = model.domains[name], parameters[name].detach()
            transform = biject_to(domain)
            coordinate = transform.inv(value)
            if not bool(domain.check(value).all() and coordinate.isfinite().all()):
                raise ValueError(
                    f"parameter {name!r} of {type(model).__name__} starts at {value.tolist()}, "
                    f"which does not lie inside its domain {domain}"
                )
            free[name], transforms[name] = nn.Parameter(coordinate), transform
        return cls(parameters, free, transforms)

    @torch.no_grad()
    def write(self) -> None:
        """Set the model's parameters to those of the coordinates."""
        for name, transform in self.transforms.items():
            self.parameters[name].copy_(transform(self.free[name]))

    @torch.no_grad()
    def read(self) -> None:
        """Set the coordinates to those of the model's parameters."""
        for name, transform in self.transforms.items():
            self.free[name].copy_(transform.inv(self.parameters[name]))

    def pull_back(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gradients by the coordinates, of gradients by the parameters at the coordinates."""
        found = dict(gradients)
        for name, transform in self.transforms.items():
            with torch.enable_grad():
                value = transform(self.free[name])
            (found[name],) = torch.autograd.grad(value, self.free[name], gradients[name])
        return found

    def snapshot(self) -> dict[str, Tensor]:
        """Copies of the coordinates."""
        return {name: p.detach().clone() for name, p in self.free.items()}

    @torch.no_grad()
    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Set coordinates and parameters, and leave no gradient behind."""
        for name, p in self.free.items():
            p.copy_(values[name])
            p.grad = None
        self.write()
        for p in self.parameters.values():
            p.grad = None
