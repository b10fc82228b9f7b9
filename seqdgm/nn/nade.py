r"""The neural autoregressive distribution estimator of binary vectors.

With weights W, V that all vectors share and biases b, c of each vector,

.. math::
    p(x) = \prod_{d=1}^{D} p(x_d \mid x_{<d}), \qquad
    p(x_d = 1 \mid x_{<d}) = \sigma(b_d + V_d \cdot h_d), \qquad
    h_d = \sigma\Big(c + \sum_{j < d} x_j W_j\Big).

References
----------
Larochelle and Murray (2011), The neural autoregressive distribution estimator, *AISTATS*, equations
9-10; Boulanger-Lewandowski, Bengio and Vincent (2012), Modeling temporal dependencies in
high-dimensional sequences, *ICML*, section 3 (biases that a recurrent network sets).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributions import constraints
from torch.nn import functional as F

from seqdgm.nn.joint import JointDistribution

N_MEAN = 256  # draws behind the mean
_BLOCK = 16


class _Conditionals(torch.autograd.Function):
    """Logits of all conditionals of complete vectors.

    The hidden layer of a row changes only after an element that is 1. Only those changes are
    computed and kept, (number of ones x hidden) numbers, where the plain formula keeps several
    times (rows x D x hidden).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, b: Tensor, c: Tensor, w: Tensor, v: Tensor) -> Tensor:
        n, dim = x.shape
        total, hidden = c.clone(), c.sigmoid()
        logits = c.new_empty(dim, n)
        changes = []
        for d in range(dim):
            torch.mv(hidden, v[d], out=logits[d])
            rows = x[:, d].nonzero()[:, 0]
            changes.append((rows, hidden[rows]))
            if len(rows):
                after = total[rows] + w[d]
                total.index_copy_(0, rows, after)
                hidden.index_copy_(0, rows, after.sigmoid_())
        ctx.save_for_backward(v, hidden)
        ctx.changes = changes
        return logits.mT + b

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        v, hidden = ctx.saved_tensors
        hidden = hidden.clone()
        columns = gradient.mT.contiguous()
        for_w, for_v = torch.zeros_like(v), torch.empty_like(v)
        # Of the hidden layer since its last change, and of the sum inside it.
        for_hidden, for_total = torch.zeros_like(hidden), torch.zeros_like(hidden)
        for d in range(len(v) - 1, -1, -1):
            rows, before = ctx.changes[d]
            if len(rows):
                h = hidden[rows]
                found = for_total[rows].addcmul_(for_hidden[rows], h * (1 - h))
                for_total.index_copy_(0, rows, found)
                for_hidden.index_fill_(0, rows, 0.0)
                for_w[d] = found.sum(0)
                hidden.index_copy_(0, rows, before)
            torch.mv(hidden.mT, columns[d], out=for_v[d])
            for_hidden.addr_(columns[d], v[d])
        for_c = for_total.addcmul_(for_hidden, hidden * (1 - hidden))
        return None, gradient, for_c, for_w, for_v


def conditionals(
    x: Float[Tensor, "rows dim"],
    b: Float[Tensor, "rows dim"],
    c: Float[Tensor, "rows hidden"],
    w: Float[Tensor, "dim hidden"],
    v: Float[Tensor, "dim hidden"],
) -> Float[Tensor, "rows dim"]:
    """Logit of every element given those before it, for vectors of 0 and 1.

    Examples
    --------
    >>> one = torch.ones(1, 2)
    >>> conditionals(one, 0 * one, 0 * one, torch.ones(2, 2), torch.ones(2, 2))
    tensor([[1.0000, 1.4621]])
    """
    logits: Tensor = _Conditionals.apply(x, b, c, w, v)
    return logits


class NADE(JointDistribution):
    r"""Binary vectors by a chain of D conditionals that share their weights.

    Vectors observed in part are handled exactly: missing elements behind the last observed one drop
    out of the product, the others are summed over, :math:`2^m` terms for m of them, at most 8.
    Beyond that `log_prob_observed` and `condition` raise a ValueError. Draws given a part of a
    vector are exact under the same limit.

    Parameters
    ----------
    b : Tensor of shape (*batch, dim)
        Biases of the elements.
    c : Tensor of shape (*batch, hidden)
        Biases of the hidden layer.
    w, v : Tensor of shape (dim, hidden)
        Weights into and out of the hidden layer.

    Examples
    --------
    >>> zeros = torch.zeros(5, 3)
    >>> dist = NADE(zeros, torch.zeros(5, 4), torch.zeros(3, 4), torch.zeros(3, 4))
    >>> dist.log_prob(zeros).exp()
    tensor([0.1250, 0.1250, 0.1250, 0.1250, 0.1250])
    """

    support = constraints.independent(constraints.boolean, 1)
    max_hidden: ClassVar[int] = 8
    limit: ClassVar[str] = "at most 8 before the last observed one"

    def __init__(
        self,
        b: Float[Tensor, "*batch dim"],
        c: Float[Tensor, "*batch hidden"],
        w: Float[Tensor, "dim hidden"],
        v: Float[Tensor, "dim hidden"],
    ) -> None:
        # Under autocasting the features' numbers come with fewer bits than the weights.
        super().__init__((b.to(w.dtype), c.to(w.dtype)), (w, v), b.shape[-1])

    @property
    def mean(self) -> Float[Tensor, "*batch dim"]:
        """Probability of a 1 in each element, by Monte-Carlo without gradients.

        The average of the conditional probabilities along 256 draws of fixed seed: the standard
        error is below 0.032, and 0 for the first element.
        """
        b = self.tensors[0]
        generator = torch.Generator(b.device).manual_seed(0)
        total = torch.zeros_like(b)
        with torch.no_grad():
            for _ in range(N_MEAN // _BLOCK):
                total += self._ancestral((_BLOCK, *self.batch_shape), generator)[1].sum(0)
        return total / N_MEAN

    @property
    def variance(self) -> Float[Tensor, "*batch dim"]:
        """Variance of each element, from the mean."""
        mean = self.mean
        return mean * (1 - mean)

    def draw(
        self, shape: torch.Size, generator: torch.Generator
    ) -> Float[Tensor, "*shape_batch dim"]:
        """Element by element, each given those before."""
        return self._ancestral((*shape, *self.batch_shape), generator)[0]

    def _ancestral(
        self,
        batch: tuple[int, ...],
        generator: torch.Generator,
        x: Float[Tensor, "*batch dim"] | None = None,
        known: Bool[Tensor, "*batch dim"] | None = None,
    ) -> tuple[Float[Tensor, "*batch dim"], Float[Tensor, "*batch dim"]]:
        """Draws that keep the known elements of `x`, and their conditional probabilities."""
        (b, c), (w, v) = self.tensors, self.shared
        total = c.expand(*batch, -1)
        drawn, chances = [], []
        for d, noise in enumerate(
            torch.rand(
                (b.shape[-1], *batch), generator=generator, dtype=b.dtype, device=b.device
            ).unbind()
        ):
            chance = torch.sigmoid(b[..., d] + total.sigmoid() @ v[d])
            value = (noise < chance).to(b.dtype)
            if x is not None and known is not None:
                value = torch.where(known[..., d], x[..., d], value)
            total = total + value[..., None] * w[d]
            drawn.append(value)
            chances.append(chance)
        return torch.stack(drawn, -1), torch.stack(chances, -1)

    def _density(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows"]:
        return self._terms(x).sum(-1)

    def _terms(self, x: Float[Tensor, "rows dim"]) -> Float[Tensor, "rows dim"]:
        logits = conditionals(x, *self.tensors, *self.shared)
        return F.logsigmoid(torch.where(x > 0, logits, -logits))

    @staticmethod
    def hidden(mask: Bool[Tensor, "rows dim"]) -> Int[Tensor, "rows"]:
        """Missing elements before the last observed one."""
        return (~mask & _up_to_last(mask)).sum(-1)

    def _completions(
        self, x: Tensor, mask: Tensor
    ) -> list[tuple[Int[Tensor, "rows"], Tensor, Tensor]]:
        """Rows by number of elements to sum over: all ways to set those, and their log-density."""
        counts = self.hidden(mask)
        last = _up_to_last(mask)
        out = []
        for m in counts.unique().tolist():
            rows = (counts == m).nonzero()[:, 0]
            places = (~mask & last)[rows].nonzero()[:, 1].view(len(rows), m)
            bits = torch.arange(m, device=x.device)
            codes = (torch.arange(2**m, device=x.device)[:, None] >> bits) & 1
            ways = x[rows].expand(2**m, -1, -1).clone()
            where = places.expand(2**m, -1, -1)
            ways.scatter_(2, where, codes[:, None].expand_as(where).to(x.dtype))
            law = self.rebuilt([t[rows] for t in self.tensors]).rows(ways.shape[:2])
            terms = law._terms(ways.flatten(0, 1)).view(ways.shape)
            out.append((rows, ways, torch.where(last[rows], terms, 0.0).sum(-1)))
        return out

    def _marginal(
        self, x: Float[Tensor, "rows dim"], mask: Bool[Tensor, "rows dim"]
    ) -> Float[Tensor, "rows"]:
        value = x.new_zeros(len(x), dtype=self.tensors[0].dtype)
        for rows, _, terms in self._completions(x, mask):
            value = value.index_copy(0, rows, terms.logsumexp(0))
        return value

    def _complete(
        self,
        x: Float[Tensor, "rows dim"],
        mask: Bool[Tensor, "rows dim"],
        generator: torch.Generator,
    ) -> Float[Tensor, "rows dim"]:
        x = x.clone()
        for rows, ways, terms in self._completions(x, mask):
            chosen = torch.multinomial(terms.softmax(0).mT, 1, generator=generator)[:, 0]
            x[rows] = ways[chosen, torch.arange(len(rows), device=x.device)]
        return self._ancestral(tuple(x.shape[:1]), generator, x, _up_to_last(mask))[0]


def _up_to_last(mask: Bool[Tensor, "rows dim"]) -> Bool[Tensor, "rows dim"]:
    """Elements up to the last observed one."""
    return mask.flip(-1).int().cummax(-1).values.flip(-1).bool()
