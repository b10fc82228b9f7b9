"""The recursion that every state-space model of the package shares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributions import Distribution
from torch.distributions.constraints import Constraint

from seqdgm.model import SequenceModel
from seqdgm.nn import distributions
from seqdgm.types import Batch, Inputs, Steer, Unrolled

if TYPE_CHECKING:
    from seqdgm.kernels.particles_types import Volatility
    from seqdgm.kernels.types import System


class StateSpaceModel(SequenceModel):
    r"""The recursion that all models of the package share; subclass it for your own.

    .. math::

        h_t &= \mathrm{advance}(s_{t-1}, x_{t-1}, u_t) \\
        z_t &\sim \mathrm{prior}(h_t) \\
        s_t &= \mathrm{absorb}(h_t, z_t) \\
        x_t &\sim \mathrm{emission}(s_t)

    A Markov model needs only the short form: `initial`, `transition` and `emission`, each of which
    returns a `torch.distributions` object whose last axis is the vector's axis. A distribution
    with an empty event shape is independent along that axis. All functions must accept any leading
    batch shape (series, particles, time).

    Attributes
    ----------
    latent_dim : int
        Width of z; 0 for a model without random states.
    feedback : bool
        Whether `advance` reads the previous observation (then missing ones are sampled).
    domains : mapping of str to Constraint
        Sets that the values of `nn.Parameter` attributes lie in, by name, such as
        ``{"rho": constraints.interval(-1, 1)}`` of `torch.distributions.constraints`; learners
        climb in unconstrained coordinates of them.
    fills_missing : bool
        False where `advance` takes an observation with NaN for what is missing; engines then draw
        it only where a forecast or an imputation needs it.

    Examples
    --------
    The nonlinear growth model of Gordon, Salmond and Smith (1993):

    >>> import torch, seqdgm as sq
    >>> from torch.distributions import Normal
    >>> class Growth(sq.StateSpaceModel):
    ...     latent_dim = 1
    ...     def initial(self, u):
    ...         return Normal(torch.zeros(1), torch.ones(1))
    ...     def transition(self, z, u):
    ...         mean = z / 2 + 25 * z / (1 + z**2) + 8 * torch.cos(1.2 * u.t)[..., None]
    ...         return Normal(mean, 10**0.5)
    ...     def emission(self, z, u):
    ...         return Normal(z**2 / 20, 1.0)
    >>> y = Growth().sample(50, seed=0)
    >>> Growth().filter(y, n_particles=200, seed=1).mean.shape
    (1, 50, 1)
    """

    engines: ClassVar[tuple[str, ...]] = ("particle", "ekf", "ukf", "abc")
    learners: ClassVar[Mapping[str, str]] = {
        "given": "given",
        "mle": "particle-score",
        "particle-em": "particle-em",
    }
    domains: ClassVar[Mapping[str, Constraint]] = {}
    latent_dim: int = 0
    feedback: bool = False
    fills_missing: bool = True

    @property
    def ready(self) -> bool:
        """A model that was written down needs no fit."""
        return True

    def initial(self, u: Inputs) -> Distribution:
        """Distribution of the first state."""
        raise NotImplementedError(f"{type(self).__name__} must define initial(u)")

    def transition(self, z: Float[Tensor, "*batch state"], u: Inputs) -> Distribution:
        """Distribution of the next state given this one."""
        raise NotImplementedError(f"{type(self).__name__} must define transition(z, u)")

    def emission(self, s: Any, u: Inputs) -> Distribution:
        """Distribution of the observation given the state."""
        raise NotImplementedError(f"{type(self).__name__} must define emission(z, u)")

    def simulate(
        self, s: Any, u: Inputs, generator: torch.Generator
    ) -> Float[Tensor, "*batch dim"]:
        """Draw the observation given the state; by default from the emission.

        A model that can only be simulated defines this in place of `emission`, draws from
        `generator`, and has ``engines = ("abc",)`` (`seqdgm.inference.abc`).
        """
        leaf = s
        while not isinstance(leaf, Tensor):
            leaf = leaf[0]
        law = self.emission(s, u)
        wide = distributions.expand(law, leaf.shape[:-1], distributions.vector_dim(law))
        return distributions.sample(wide, generator)

    def start(self, batch_shape: tuple[int, ...]) -> Any:
        """State before the first step; None where the first state has a law of its own."""
        return None

    def embed(self, x: Float[Tensor, "*batch dim"]) -> Tensor:
        """Features of the previous observation, computed for all steps at once where possible."""
        return x

    def advance(self, s: Any, x: Tensor | None, u: Inputs) -> Any:
        """Deterministic memory before z; `x` is the embedded previous observation."""
        return s

    def prior(self, h: Any, u: Inputs) -> Distribution | None:
        """Distribution of z given the memory; None for a model without random states."""
        return self.initial(u) if h is None else self.transition(h, u)

    def absorb(self, h: Any, z: Tensor | None) -> Any:
        """State after z; the default keeps z alone, as Markov models do."""
        return z

    def report(self, h: Any, z: Tensor | None) -> Float[Tensor, "*batch state"]:
        """The vector that `filter` and `smooth` report; default z."""
        assert z is not None
        return z

    def memory(self, x: Tensor, u: Inputs) -> Any:
        """All h_t in one fused call where the memory does not see z; None where it does.

        `x` holds the embedded previous observations, ``(series, time, features)``.
        """
        return None

    def encode(self, batch: Batch) -> Tensor | None:
        """What the proposal needs from the data, (series, time, features); None: no proposal."""
        return None

    def backbone(self, c: Tensor) -> Any:
        """The part of all h_t that does not see z, out of the encoded data; None without such.

        A model whose `encode` has run that part over complete data in one fused call hands it on
        here. `advance` is then given step t of it in place of the embedded previous observation;
        engines that draw observations as they go never ask for it.
        """
        return None

    def proposal(self, h: Any, c: Tensor, u: Inputs) -> Distribution:
        """Approximate posterior of z given the memory and the encoded data."""
        raise NotImplementedError(
            f"{type(self).__name__} encodes data but has no proposal(h, c, u)"
        )

    def auxiliary(
        self, h: Any, z: Tensor, c: Tensor, u: Inputs
    ) -> Float[Tensor, "*batch time"] | None:
        """What training maximises besides the bound, for all steps at once; None for nothing.

        `h` and `z` lie along a path drawn from the proposal and `c` is the encoded data, each with
        axes (..., time, features). Likelihoods never contain it.
        """
        return None

    def unroll(
        self,
        s: Any,
        x: Tensor | None,
        c: Tensor,
        u: Inputs,
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
        steer: Steer | None = None,
    ) -> Unrolled | None:
        """All proposals and draws in one hand-fused call; None (the default): one by one.

        What it returns has a row for each path.

        Parameters
        ----------
        s : state tree
            State before the first step, of each series or of several paths of each, which stand
            next to each other.
        x : Tensor of shape (series, time, features), or None
            Embedded previous observations, where `advance` reads them.
        c : Tensor of shape (series, time, context)
            Encoded data.
        u : Inputs
            Of all steps.
        lengths : Tensor of int, shape (series,)
            Number of steps of each series, beyond which nothing need be computed.
        generator : torch.Generator
        steer : callable, optional
            Chooses after each step whom the paths go on from (`seqdgm.types.Steer`). Without it
            there is one path a series. A model that cannot be steered returns None.
        """
        return None

    def lookahead(
        self, h: Any, x: Tensor, mask: Tensor, u: Inputs
    ) -> Float[Tensor, "*batch"] | None:
        r"""Log of a guess at :math:`p(x_t \mid h_t)`, for the auxiliary particle filter.

        None (the default) stands for :math:`g(x_t \mid \mathrm{E}[z_t \mid h_t])`.
        """
        return None

    def set_starts(self, batch: Batch) -> None:
        """Set what is learned to rough estimates, where learning begins; default: as it is."""

    def transition_bound(self, u: Inputs) -> Float[Tensor, "*batch"] | float | None:
        """Log of an upper bound of the transition's density, for ``smoother="ffbs-reject"``.

        None (the default) takes the peak of a Gaussian, Student-t, Laplace or Cauchy transition.
        """
        return None

    def fused(self, batch: Batch) -> System | Volatility | None:
        """What a fused bootstrap filter must know of the model; None where there is none for it."""
        return None

    def linear_gaussian(
        self, u: Float[Tensor, "series steps inputs"], rows: Int[Tensor, "series"]
    ) -> System:
        """System matrices of a linear-Gaussian model, for the engine ``"kalman"``."""
        raise NotImplementedError(f"{type(self).__name__} is not linear-Gaussian")

    @property
    def has_proposal(self) -> bool:
        """Whether the model brings a proposal of its own."""
        return type(self).proposal is not StateSpaceModel.proposal

    @property
    def has_density(self) -> bool:
        """Whether observations have a density; not where the model simulates them its own way."""
        return type(self).simulate is StateSpaceModel.simulate

    @property
    def markov(self) -> bool:
        """Whether z alone is the state, and `initial` and `transition` say everything about it."""
        own, plain = type(self), StateSpaceModel
        names = ("advance", "absorb", "prior", "report")
        return all(getattr(own, name) is getattr(plain, name) for name in names)

    @property
    def memoryless(self) -> bool:
        """Whether z and the observation are all that a step leaves to the next.

        Backward smoothing and ancestor sampling then apply. True unless `absorb` or `report` say
        otherwise; a model whose `absorb` keeps no more than that beside z says so itself.
        """
        own, plain = type(self), StateSpaceModel
        return self.markov or (own.absorb is plain.absorb and own.report is plain.report)
