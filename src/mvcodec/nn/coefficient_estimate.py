"""What a decoded picture still lacks in each of its coefficients, told from what its file says of that coefficient.

    for each y: symbol, ln sigma, quality, channel,
    how large all this is in its place, over all channels --three linear layers--> how much each term counts

    estimate = sum over terms of (share) (term), in quantiser steps
    terms: how far the picture's y is from y_hat, what of that is beyond REACH, which way the symbol points,
           how far it was before it was drawn back, what peers have changed, and what they show

A decoder that knows the density in a cell takes its mean there and not its middle (Sullivan, "Efficient scalar
quantization of exponential and Laplacian random variables", 1996). Here the picture has been through synthesis,
cleaning and maybe peers, and its y lies anywhere: whether that is to be believed more than y_hat depends on how sure
the entropy model was (sigma), on whether it was right (the symbol), and on how far the picture is from y_hat there in
all channels. Zero start: untrained, it estimates nothing.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

REACH = 0.36  # of a quantiser step: beyond it a coefficient is mostly wrong (quantisation_constraint.py)
HIDDEN = 32
CONTEXTS, TERMS = 13, 4  # what peers have changed, and what they show, is one term more and two contexts, each
FLOOR = 1e-3  # of a mean square
CACHED, AT_ONCE = 1 << 14, 1 << 22  # coefficients at a time: what is between the layers fits a core's cache; elsewhere


class Told(NamedTuple):
    """What a file says of each latent besides y_hat, [K, M, ..] each."""

    symbols: Tensor  # of any type
    ln_sigma: Tensor  # in quantiser steps


class CoefficientEstimate(nn.Module):
    """See the module's docstring. helped: peers may have changed the picture."""

    def __init__(self, channels: int, helped: bool) -> None:
        super().__init__()
        more = 2 * helped
        self.of_channel = nn.Parameter(torch.zeros(channels, HIDDEN))
        self.of_quality = nn.Linear(2, HIDDEN)
        self.first = nn.Linear(CONTEXTS + 2 * more, HIDDEN, bias=False)
        self.second = nn.Linear(HIDDEN, HIDDEN)
        self.last = nn.Linear(HIDDEN, TERMS + more)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, told: Told, quality: Tensor, *found: Tensor) -> Tensor:
        """quality [K] in [0, 1], all else [K, M, ..] -> the same, to be added to the picture's y.

        found: of the picture's y less y_hat, as it is, and before it was drawn back; with peers also what they have
        changed of it, and how far what they show is from what was drawn back.
        """
        place = magnitudes(told, *found)
        of_place = self.first.weight[:, -place.shape[1] :] @ place.transpose(0, 1).flatten(1)
        of_view = self.of_quality(torch.stack((quality, (quality - 0.5).abs()), -1)).T  # [hidden, K]
        of_place = of_place.unflatten(1, (len(quality), -1)).add_(of_view[..., None])
        maps = (*told, *found)
        parts = []
        most = CACHED if place.device.type == "cpu" else AT_ONCE
        count = max(1, most * found[0].shape[1] // found[0].numel())
        for start in range(0, found[0].shape[1], count):
            channels = slice(start, start + count)
            parts.append(self._of_channels(channels, of_place, *(x[:, channels] for x in maps)))
        return torch.cat(parts, dim=1)

    def _of_channels(
        self, channels: slice, of_place: Tensor, symbols: Tensor, ln_sigma: Tensor, *found: Tensor
    ) -> Tensor:
        """Of these channels [K, C, ..]; of_place: what the first layer has of quality and `magnitudes`, [.., K, P]."""
        symbols, ln_sigma, found = symbols.float(), ln_sigma.float(), tuple(x.float() for x in found)
        apart, before, ways, size = *found[:2], symbols.sign(), symbols.abs()
        contexts = (
            ln_sigma.clamp(-3, 3),
            (ln_sigma + 1).abs().clamp(max=4),
            (size == 0).float(),
            (size == 1).float(),
            size.clamp(max=8) / 4,
            apart.abs().clamp(max=1.5),
            (apart * ways).clamp(-1, 1),
            *(x.abs().clamp(max=2) for x in found[2:]),
            before.abs().clamp(max=1.5),
            (before * apart.sign()).clamp(-1, 1),
        )
        # Coefficients last: such products take half the time of `nn.Linear` on rows of so few numbers.
        x = self.first.weight[:, : len(contexts)] @ torch.stack(contexts).flatten(1)
        x = x.view(HIDDEN, *apart.shape[:2], -1).add_(of_place[:, :, None])
        x = F.leaky_relu(x.add_(self.of_channel[channels].T[:, None, :, None]), 0.1, inplace=True).flatten(1)
        x = F.leaky_relu((self.second.weight @ x).add_(self.second.bias[:, None]), 0.1, inplace=True)
        shares = (self.last.weight @ x).add_(self.last.bias[:, None]).view(-1, *apart.shape)
        terms = (apart, apart - apart.clamp(-REACH, REACH), ways, *found[1:])
        estimate, *others = (share * term for share, term in zip(shares, terms, strict=True))
        return sum(others, estimate)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Older weights know less of a coefficient: what came later stands last, and counts for nothing with them."""
        for name in (f"{prefix}first.weight", f"{prefix}last.weight", f"{prefix}last.bias"):
            given, own = state_dict.get(name), self.get_parameter(name.removeprefix(prefix))
            if given is not None and given.numel() < own.numel():
                state_dict[name] = torch.zeros_like(own)
                state_dict[name][tuple(map(slice, given.shape))] = given
        super()._load_from_state_dict(state_dict, prefix, *rest)


def magnitudes(told: Told, *found: Tensor) -> Tensor:
    """How large it all is in each place, over all channels: [K, M, ..] each -> [K, maps, ..]."""
    energies = [x.float().square().mean(1).add(FLOOR).log() / 2 + 1 for x in (told.symbols != 0, *found)]
    return torch.stack((*energies, told.ln_sigma.float().mean(1)), dim=1)
