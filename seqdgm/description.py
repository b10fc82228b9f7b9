"""What a model says of itself: its hyperparameters, and what engines and verbs ask of it."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqdgm.panel import Panel
from seqdgm.results import FitReport
from seqdgm.transform import Function, Transform, check_positive, given_power


class Description(nn.Module):
    """Hyperparameters in the manner of scikit-learn, and the hooks that a model may fill.

    Attributes
    ----------
    engines : tuple of str
        Inference engines the model admits, most exact first; ``method="auto"`` takes the first.
    learners : mapping of str to str
        What ``fit(method=...)`` accepts, and the learner that serves it; the first is the default.
    per_series : bool
        Whether `fit` gives every series of a panel its own parameters unless ``pooled=True``.
    dtype : torch.dtype
        Precision of the model's arithmetic: float64 for exact models, float32 for deep ones.
    """

    engines: ClassVar[tuple[str, ...]] = ()
    learners: ClassVar[Mapping[str, str]] = {}
    per_series: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.float64
    transform: Function = None
    scale: str | None = None
    min_length: int = 1

    def __init__(self) -> None:
        super().__init__()
        self.obs_dim_: int | None = None
        self.input_dim_: int = 0
        self.input_columns_: tuple[str, ...] | None = None
        self.build_options_: dict[str, Any] = {}
        self.data_: Panel | None = None
        self.inputs_: np.ndarray | None = None
        self.transform_: Transform | None = None
        self.fit_report_: FitReport | None = None

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the hyperparameters, as in scikit-learn."""
        return {name: getattr(self, name) for name in self._parameter_names()}

    def set_params(self, **params: Any) -> Self:
        """Change hyperparameters; the model is unfitted afterwards.

        Raises
        ------
        ValueError
            For a name the model does not have.
        """
        known = self.get_params()
        for name in params:
            if name not in known:
                raise ValueError(
                    f"{type(self).__name__} has no parameter {name!r}; it has {sorted(known)}"
                )
        fresh = type(self)(**{**known, **params})
        self.__dict__ = fresh.__dict__
        return self

    def clone(self) -> Self:
        """Return an unfitted model with the same hyperparameters."""
        return type(self)(**copy.deepcopy(self.get_params()))

    def __repr__(self) -> str:
        defaults = inspect.signature(type(self).__init__).parameters
        shown = [
            f"{name}={value!r}"
            for name, value in self.get_params().items()
            if not _same(value, defaults[name].default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters (the CPU for a model without any)."""
        tensor = next(chain(self.parameters(), self.buffers()), None)
        return torch.device("cpu") if tensor is None else tensor.device

    @property
    def ready(self) -> bool:
        """Whether the model can be used without (further) fitting."""
        return self.fit_report_ is not None

    def build_options(self, panel: Panel) -> dict[str, Any]:
        """What `build` must know about the training data besides its width (JSON values)."""
        return {}

    def build(self, obs_dim: int, input_dim: int, **options: Any) -> None:
        """Create the weights once the width of the data is known (default: nothing to create)."""

    def initialise(self, values: Float[np.ndarray, "series time dim"]) -> None:
        """Set starting values from the training data in model units (default: none to set)."""

    def effective_scale(self) -> str | None:
        """Scaling of the data that the model can use (counts and categories have none)."""
        return self.scale

    def check_data(self, panel: Panel) -> None:
        """Raise a ValueError for data outside the model's support (default: powers need x > 0)."""
        if given_power(self.transform) is not None:
            check_positive(panel)

    def fitted_ids(self) -> tuple[Any, ...] | None:
        """Names of the series that have parameters of their own, or None where all share them."""
        return None

    def input_width(self) -> int | None:
        """Columns of inputs the model needs; None where any number will do."""
        return self.input_dim_ if self.fit_report_ is not None else None

    def estimates(self) -> dict[str, float]:
        """Named estimates of a single fitted series, for `summary`."""
        return {}

    def describe(self) -> list[str]:
        """Lines of `summary` about the estimates (default: those that `estimates` names)."""
        estimates = self.estimates()
        width = max(map(len, estimates), default=0)
        return [f"  {name:<{width}}  {value: .6g}" for name, value in estimates.items()]

    def extra_state(self) -> dict[str, Any]:
        """What a model file must hold besides hyperparameters, weights and data."""
        return {}

    def restore_extra(self, state: dict[str, Any]) -> None:
        """Take over what `extra_state` gave."""

    def join_series(self, parts: Sequence[Self], ids: tuple[Any, ...]) -> None:
        """Take over the parameters of `parts`, each fitted to the next series of those named.

        Default: tensors, which have an axis of series first, are joined along it.
        """
        for name, _ in list(self.named_buffers()):
            setattr(self, name, torch.cat([part.get_buffer(name) for part in parts]))
        self.restore_extra({**self.extra_state(), "ids": ids if len(ids) > 1 else None})

    def state_names(self, dim: int) -> tuple[str, ...]:
        """Names of the entries of the reported state."""
        return tuple(f"z{k + 1}" for k in range(dim))

    @classmethod
    def _parameter_names(cls) -> list[str]:
        return list(inspect.signature(cls.__init__).parameters)[1:]


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray | Tensor) or isinstance(b, np.ndarray | Tensor):
        return a is b
    return bool(a == b)
