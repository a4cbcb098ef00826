"""EP of Eq. (4): contexts -> mean and scale of the latents that are coded next."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from mvcodec.exact.arithmetic import Block
from mvcodec.exact.conv import Conv


class EntropyParameters(Block):
    """EP, Eq. (4): 1x1 convolutions -> (mu, ln sigma offset). The last layer starts at zero: mu = 0, sigma = prior."""

    def __init__(self, channels_in: int, hidden: tuple[int, ...], channels_out: int) -> None:
        super().__init__()
        widths = [channels_in, *hidden]
        self.hidden = nn.ModuleList(Conv(a, b, 1) for a, b in pairwise(widths))
        self.last = Conv(widths[-1], 2 * channels_out, 1)

    def start_as_prior(self) -> None:
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = self.arithmetic
        for layer in self.hidden:
            x = a.leaky(layer(x))
        mu, ln_sigma = a.convolve_last(self.last, x).chunk(2, dim=1)
        return mu, ln_sigma
