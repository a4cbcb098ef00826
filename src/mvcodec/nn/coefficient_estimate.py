"""What a decoded picture still lacks in each of its coefficients, told from what its file says of that coefficient.

    for each y by itself: symbol, ln sigma, quality, channel --three linear layers--> how much each term counts
    estimate = sum over terms of (share) (term), in quantiser steps
    terms: how far the picture's y is from y_hat, what of that is beyond REACH, which way the symbol points,
           how far it was before it was drawn back, and what peers have changed

A decoder that knows the density in a cell takes its mean there and not its middle (Sullivan, "Efficient scalar
quantization of exponential and Laplacian random variables", 1996). Here the picture has been through synthesis,
cleaning and maybe peers, and its y lies anywhere: whether that is to be believed more than y_hat depends on how sure
the entropy model was (sigma), and on whether it was right (the symbol). Zero start: untrained, it estimates nothing.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REACH = 0.36  # of a quantiser step: beyond it a coefficient is mostly wrong (quantisation_constraint.py)
HIDDEN = 32
CONTEXTS, TERMS = 7, 4  # without peers; what they have changed is one more of both
CACHED, AT_ONCE = 1 << 14, 1 << 22  # coefficients at a time: what is between the layers fits a core's cache; elsewhere


class Told(NamedTuple):
    """What a file says of each latent besides y_hat, [K, M, h, w] each."""

    symbols: Tensor  # of any type
    ln_sigma: Tensor  # in quantiser steps


class CoefficientEstimate(nn.Module):
    """See the module's docstring. helped: peers may have changed the picture."""

    def __init__(self, channels: int, helped: bool) -> None:
        super().__init__()
        self.of_channel = nn.Parameter(torch.zeros(channels, HIDDEN))
        self.of_quality = nn.Linear(2, HIDDEN)
        self.first = nn.Linear(CONTEXTS + helped, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, TERMS + helped)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(
        self, told: Told, quality: Tensor, apart: Tensor, before: Tensor, change: Tensor | None = None
    ) -> Tensor:
        """All but quality [K] in [0, 1] of shape [K, M, h, w] -> the same, to be added to the picture's y.

        apart: y of the picture less y_hat; before: the same, before it was drawn back; change: of it, by peers.
        """
        maps = (*told, apart, before) if change is None else (*told, apart, before, change)
        parts = []
        most = CACHED if apart.device.type == "cpu" else AT_ONCE
        count = max(1, most * apart.shape[1] // apart.numel())
        for start in range(0, apart.shape[1], count):
            channels = slice(start, start + count)
            parts.append(self.of_channels(channels, quality, *(x[:, channels] for x in maps)))
        return torch.cat(parts, dim=1)

    def of_channels(
        self, channels: slice, quality: Tensor, symbols: Tensor, ln_sigma: Tensor, *found: Tensor
    ) -> Tensor:
        """Of these channels [K, C, ..]; found: apart, before, and change where peers may have helped."""
        symbols, ln_sigma, found = symbols.float(), ln_sigma.float(), tuple(x.float() for x in found)
        apart, ways, size = found[0], symbols.sign(), symbols.abs()
        contexts = (
            ln_sigma.clamp(-3, 3),
            (ln_sigma + 1).abs().clamp(max=4),
            (size == 0).float(),
            (size == 1).float(),
            size.clamp(max=8) / 4,
            apart.abs().clamp(max=1.5),
            (apart * ways).clamp(-1, 1),
            *(change.abs().clamp(max=2) for change in found[2:]),
        )
        same = self.of_channel[channels] + self.of_quality(torch.stack((quality, (quality - 0.5).abs()), -1))[:, None]
        same = same.permute(2, 0, 1).reshape(HIDDEN, len(quality), -1, *[1] * (apart.ndim - 2))
        # Coefficients last: such products take half the time of `nn.Linear` on rows of so few numbers.
        x = (self.first.weight @ torch.stack(contexts).flatten(1)).view(HIDDEN, *apart.shape) + same
        x = F.leaky_relu(x, 0.1, inplace=True).flatten(1)
        x = F.leaky_relu(self.second.weight @ x + self.second.bias[:, None], 0.1, inplace=True)
        shares = (self.last.weight @ x + self.last.bias[:, None]).view(-1, *apart.shape)
        terms = (apart, apart - apart.clamp(-REACH, REACH), ways, *found[1:])
        estimate, *others = (share * term for share, term in zip(shares, terms, strict=True))
        return sum(others, estimate)
