"""Inference networks: summaries of the observations, and Gaussian proposals that read them.

Every encoder sees the observations with 0 where they are missing, the mask beside them (so that a
missing value is not taken for a zero), and the known inputs. What lies beyond a series' own end is
never read.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from seqdgm.nn.dropout import Dropout
from seqdgm.nn.fused_combiner import Weights, combine
from seqdgm.nn.ragged import Ragged
from seqdgm.nn.recurrent import Kind, RecurrentCell


def _valid(lengths: Int[Tensor, "series"], n_steps: int) -> Bool[Tensor, "series time 1"]:
    t = torch.arange(n_steps, device=lengths.device)
    return (t < lengths[:, None])[..., None]


class Encoder(nn.Module):
    """Base of the encoders: builds what they read, and blanks what lies beyond a series' end.

    Parameters
    ----------
    input_dim : int
        Length of a step's encoded observation; a multiple of `mask_dim` whose elements are grouped
        by column of the mask (as one-hot codes are).
    hidden_dim : int
        Units of the network.
    mask_dim : int, optional
        Number of observed columns; `input_dim` by default.
    inputs_dim : int
        Length of a step's known inputs.
    context_dim : int
        Length C of the summary of a step.
    dropout : float
        Rate at which elements of the observations and of the summaries are left out in training
        (`seqdgm.nn.dropout`).
    layer_norm : bool
        Whether each summary is normalised to mean 0 and variance 1, then scaled and shifted by
        learned numbers (Ba, Kiros and Hinton, 2016, equation 4).
    """

    def __init__(
        self,
        input_dim: int,
        mask_dim: int | None,
        inputs_dim: int,
        context_dim: int,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__()
        self.mask_dim = input_dim if mask_dim is None else mask_dim
        if input_dim % self.mask_dim:
            raise ValueError(
                f"input_dim={input_dim} is not a multiple of mask_dim={self.mask_dim}: it is not "
                "clear which elements a missing column blanks"
            )
        self.input_dim = input_dim
        self.inputs_dim = inputs_dim
        self.read_dim = input_dim + self.mask_dim + inputs_dim
        self.context_dim = context_dim
        self.thin_read, self.thin_summary = Dropout(dropout), Dropout(dropout)
        self.norm = nn.LayerNorm(context_dim) if layer_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "series time input"],
        mask: Bool[Tensor, "series time dim"],
        u: Float[Tensor, "series time inputs"] | None,
        lengths: Int[Tensor, "series"],
    ) -> Float[Tensor, "series time context"]:
        """Summaries c_t, 0 beyond a series' end.

        Parameters
        ----------
        x : Tensor of shape (series, time, input_dim)
            Encoded observations, not read where missing.
        mask : Tensor of bool, shape (series, time, mask_dim)
            What was observed.
        u : Tensor of shape (series, time, inputs_dim), or None without inputs
            Known inputs.
        lengths : Tensor of int, shape (series,)
            Number of steps of each series.
        """
        widths = (x.shape[-1], mask.shape[-1], 0 if u is None else u.shape[-1])
        built = (self.input_dim, self.mask_dim, self.inputs_dim)
        if widths != built:
            raise ValueError(
                f"the encoder was built for observations, mask and inputs of lengths {built}, got "
                f"{widths}"
            )
        valid = _valid(lengths, x.shape[1])
        mask = mask & valid
        seen = mask.repeat_interleave(self.input_dim // self.mask_dim, -1)
        parts = [torch.cat([self.thin_read(torch.where(seen, x, 0.0)), mask.to(x.dtype)], -1)]
        if u is not None:
            parts.append(torch.where(valid, u, 0.0))
        summary = self._summarise(parts, lengths)
        return torch.where(valid, self.thin_summary(self.norm(summary)), 0.0)

    def _summarise(self, read: list[Tensor], lengths: Tensor) -> Tensor:
        raise NotImplementedError


class FilteringEncoder(Encoder):
    """Forward recurrent network: c_t summarises x_{1:t}.

    Parameters
    ----------
    input_dim, hidden_dim, mask_dim, inputs_dim, dropout, layer_norm
        See :class:`Encoder`.
    kind : {"gru", "lstm"}
    layers : int
        Layers of the recurrent network.

    Examples
    --------
    >>> encoder = FilteringEncoder(input_dim=2, hidden_dim=8)
    >>> x = torch.zeros(3, 5, 2)
    >>> encoder(x, torch.ones_like(x, dtype=torch.bool), None, torch.tensor([5, 4, 1])).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        kind: Kind = "gru",
        *,
        layers: int = 1,
        mask_dim: int | None = None,
        inputs_dim: int = 0,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_dim, mask_dim, inputs_dim, hidden_dim, dropout, layer_norm)
        self.cell = RecurrentCell(kind, self.read_dim, hidden_dim, layers)

    def _summarise(self, read: list[Tensor], lengths: Tensor) -> Tensor:
        return self.cell.run(read, lengths=lengths)


class SmoothingEncoder(FilteringEncoder):
    """Backward recurrent network: c_t summarises x_{t:T}, from each series' own last step.

    In a Markov model, z_{t-1} and x_{t:T} hold all that the observations say of z_t (Krishnan,
    Shalit and Sontag, 2017, part "Structured inference networks"). Parameters as in
    :class:`FilteringEncoder`.

    Examples
    --------
    >>> encoder = SmoothingEncoder(input_dim=2, hidden_dim=8)
    >>> x = torch.zeros(3, 5, 2)
    >>> encoder(x, torch.ones_like(x, dtype=torch.bool), None, torch.tensor([5, 4, 1])).shape
    torch.Size([3, 5, 8])
    """

    def _summarise(self, read: list[Tensor], lengths: Tensor) -> Tensor:
        return self.cell.run(read, lengths=lengths, backwards=True)


class BidirectionalEncoder(Encoder):
    """Forward and backward recurrent networks side by side: c_t summarises x_{1:T}.

    Parameters as in :class:`FilteringEncoder`; the summary has length 2 x `hidden_dim`.

    Examples
    --------
    >>> encoder = BidirectionalEncoder(input_dim=2, hidden_dim=8)
    >>> x = torch.zeros(3, 5, 2)
    >>> encoder(x, torch.ones_like(x, dtype=torch.bool), None, torch.tensor([5, 4, 1])).shape
    torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        kind: Kind = "gru",
        *,
        layers: int = 1,
        mask_dim: int | None = None,
        inputs_dim: int = 0,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_dim, mask_dim, inputs_dim, 2 * hidden_dim, dropout, layer_norm)
        self.ahead = RecurrentCell(kind, self.read_dim, hidden_dim, layers)
        self.back = RecurrentCell(kind, self.read_dim, hidden_dim, layers)

    def _summarise(self, read: list[Tensor], lengths: Tensor) -> Tensor:
        back = self.back.run(read, lengths=lengths, backwards=True)
        return torch.cat([self.ahead.run(read, lengths=lengths), back], -1)


class MeanFieldEncoder(Encoder):
    """Rectified layer without memory: c_t summarises x_t alone.

    A layer more is the proposal's own, which reads the summary beside the state.

    Parameters
    ----------
    input_dim, hidden_dim, mask_dim, inputs_dim, dropout, layer_norm
        See :class:`Encoder`.

    Examples
    --------
    >>> encoder = MeanFieldEncoder(input_dim=2, hidden_dim=8)
    >>> x = torch.zeros(3, 5, 2)
    >>> encoder(x, torch.ones_like(x, dtype=torch.bool), None, torch.tensor([5, 4, 1])).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        *,
        mask_dim: int | None = None,
        inputs_dim: int = 0,
        dropout: float = 0.0,
        layer_norm: bool = False,
    ) -> None:
        super().__init__(input_dim, mask_dim, inputs_dim, hidden_dim, dropout, layer_norm)
        self.net = nn.Sequential(nn.Linear(self.read_dim, hidden_dim), nn.ReLU(inplace=True))

    def _summarise(self, read: list[Tensor], lengths: Tensor) -> Tensor:
        return self.net(torch.cat(read, -1))


class GaussianProposal(nn.Module):
    r"""Gaussian :math:`q(z_t \mid s, c_t)` over a state given a memory and an encoder's summary.

    The combiner of Krishnan, Shalit and Sontag (2017, part "Structured inference networks"), where
    :math:`s = z_{t-1}`:

    .. math::
        h &= \tfrac12 (\tanh(W s + b) + c_t) \\
        \mu &= W_\mu h + b_\mu, \qquad
        \sigma = \mathrm{softplus}(W_\sigma h + b_\sigma) + \sigma_{\min}.

    Where there is no memory yet (t = 1), a learned one stands in. With `state_dim=0` the proposal
    never has one, and is :math:`h = \mathrm{relu}(W c_t + b)` instead.

    Parameters
    ----------
    latent_dim : int
        Length of z.
    context_dim : int
        Length of the summary; mapped to `hidden_dim` by a linear layer where it differs.
    hidden_dim : int
        Length of h.
    state_dim : int, optional
        Length of the memory; `latent_dim` by default.
    min_scale : float
        Floor of the scale.

    Examples
    --------
    >>> proposal = GaussianProposal(latent_dim=4, context_dim=8, hidden_dim=8)
    >>> c = torch.zeros(3, 8)
    >>> first = proposal(c)
    >>> proposal(c, first.loc).scale.shape
    torch.Size([3, 4])
    """

    def __init__(
        self,
        latent_dim: int,
        context_dim: int,
        hidden_dim: int,
        *,
        state_dim: int | None = None,
        min_scale: float = 1e-3,
    ) -> None:
        super().__init__()
        self.state_dim = latent_dim if state_dim is None else state_dim
        self.min_scale = min_scale
        self.context: nn.Module
        if self.state_dim:
            same = context_dim == hidden_dim
            self.context = nn.Identity() if same else nn.Linear(context_dim, hidden_dim)
            self.state = nn.Linear(self.state_dim, hidden_dim)
            self.start = nn.Parameter(torch.zeros(self.state_dim))
        else:
            self.context = nn.Sequential(nn.Linear(context_dim, hidden_dim), nn.ReLU())
        self.out = nn.Linear(hidden_dim, 2 * latent_dim)

    def forward(
        self,
        context: Float[Tensor, "*batch context"],
        state: Float[Tensor, "*batch state"] | None = None,
    ) -> Normal:
        """Proposal for any leading batch shape; those of the two arguments broadcast."""
        hidden = self.context(context)
        if self.state_dim:
            memory = self.start if state is None else state
            hidden = 0.5 * (torch.tanh(self.state(memory)) + hidden)
        loc, raw_scale = self.out(hidden).chunk(2, -1)
        # A non-finite parameter is the training loop's to report, with the series that caused it.
        return Normal(loc, F.softplus(raw_scale) + self.min_scale, validate_args=False)

    def unroll(
        self,
        context: Float[Tensor, "series time context"],
        first: Float[Tensor, "series state"],
        lengths: Int[Tensor, "series"],
        generator: torch.Generator,
    ) -> tuple[Normal, Float[Tensor, "series time latent"]]:
        """Proposals of all steps and draws from them, each given the draw before.

        The same numbers as calls of the module step by step, in one hand-fused loop
        (`seqdgm.nn.fused_combiner`). Beyond a series' end the proposal is standard normal and the
        draw 0.

        Parameters
        ----------
        context : Tensor of shape (series, time, context)
            Summaries.
        first : Tensor of shape (series, state)
            Draw before the first step.
        lengths : Tensor of int, shape (series,)
            Number of steps of each series.
        generator : torch.Generator
        """
        ragged = Ragged.of(lengths, context.shape[1])
        c = self.context(ragged.pack(context))
        noise = torch.randn(
            (len(c), first.shape[-1]), generator=generator, dtype=c.dtype, device=c.device
        )
        weights = Weights(self.state.weight, self.state.bias, self.out.weight, self.out.bias)
        path = combine(c, first[ragged.order], noise, weights, ragged, self.min_scale)
        loc, scale = ragged.unpack(path.loc), ragged.unpack(path.scale, 1.0)
        return Normal(loc, scale, validate_args=False), ragged.unpack(path.z)
