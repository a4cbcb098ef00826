"""Third stage of the joint decoder: what other cameras saw of the same surface, at pixel level.

    picture i --clean--> x_i                       no peer involved: all that K = 1 or `peers=False` gets
                  |
                  features                         once per view, half resolution
                  |
    x_j --align, warp, match colours--> d_ij = warped_j - x_i --pair net--> logit, feature
                  |
                  softmax over i itself (logit 0) and all j, each j's share times its consistency
                  |
                  three-conv head -> residual, gated by consistency

PMIFM's principle (ParaHydra Eq. 14-16: reliability, softmax over sources, fusion) applied to aligned pixels
instead of features. Zero start: an untrained net returns its input. Where no peer is consistent, the peers'
part is exactly zero. One main view and one peer at a time: memory grows with K only by what each view keeps.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.alignment import Sight, sights
from mvcodec.nn.warping import warp

SCALE = 16.0  # coding errors are about 1/50 of the range: brings them near 1 inside the net
MAX_COARSER = 0.5  # a peer of lower quality by more shows nothing new: one view at 80 beside others at 15 lost 0.1 dB
MIN_OVERLAP = 0.02  # mean consistency below which a pair is taken for two different places


class RefinedViews(NamedTuple):
    """Refined pictures, and who contributed: weights[i, j] is view j's mean share in view i ([i, i] its own)."""

    pictures: Tensor  # [K, 3, H, W] in [0, 1]
    weights: Tensor  # [K, K], sums to 1 over the second dimension
    maps: Tensor | None  # the same pixel by pixel, uint8 of 255, [K, K, H, W]; if asked for


class Peer(NamedTuple):
    """Another view, as the main view would see it."""

    picture: Tensor  # [B, 3, H, W]
    consistency: Tensor  # [B, 1, H, W] in [0, 1]
    quality: Tensor  # [B]


class Fused(NamedTuple):
    """Main views [B, 3, H, W] refined with peers, and each peer's share [B, S, 1, H, W]."""

    pictures: Tensor
    shares: Tensor


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(width, width, 3, padding=1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


class AlignedRefinement(nn.Module):
    """See the module's docstring. All nets work at half resolution, through pixel-unshuffle."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(12 + 1, width, 3, padding=1), nn.LeakyReLU(0.1), _Residual(width), _Residual(width)
        )
        self.clean_out = _zero(nn.Conv2d(width, 12, 3, padding=1))
        self.pair = nn.Sequential(
            nn.Conv2d(width + 12 + 4 + 2, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            _Residual(width),
            _Residual(width),
        )
        self.pair_out = nn.Conv2d(width, 4 + width, 1)
        self.head = nn.Sequential(
            nn.Conv2d(2 * width + 12 + 4, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1),
            _zero(nn.Conv2d(width, 12, 3, padding=1)),
        )

    @torch.no_grad()
    def forward(
        self,
        pictures: Tensor,
        quality: Tensor,
        peers: bool = True,
        max_peers: int | None = None,
        maps: bool = False,
    ) -> RefinedViews:
        """Refine K views [K, 3, H, W] in [0, 1] of qualities [K] in [0, 1], for use; training calls the parts.

        max_peers: each view is helped by its most consistent peers only.
        """
        views, _, height, width = pictures.shape
        refined = torch.empty_like(pictures, dtype=torch.float32)
        features = []
        for i in range(views):
            cleaned, feature = self.clean(pictures[i : i + 1], quality[i : i + 1])
            refined[i] = cleaned[0].clamp(0, 1)
            features.append(feature)
        weights = torch.eye(views)
        drawn = torch.zeros(views, views, height, width, dtype=torch.uint8) if maps else None
        if peers and views > 1:
            # The peers of every view are the cleaned views, not the ones that their peers have refined.
            cleaned = refined.clone()
            for i, sight in enumerate(sights(cleaned, max_peers)):
                overlap = sight.consistency.mean((1, 2, 3)) >= MIN_OVERLAP
                able = [float(quality[j]) >= float(quality[i]) - MAX_COARSER for j in sight.peers]
                kept = [n for n in range(len(sight.peers)) if overlap[n] and able[n]]
                seen = self._see(cleaned, sight, i, kept, quality)
                picture, shares = self.fuse(cleaned[i : i + 1], features[i], quality[i : i + 1], seen)
                refined[i] = picture[0].clamp(0, 1)
                chosen = [sight.peers[n] for n in kept]
                weights[i, chosen] = shares[0].float().mean((1, 2, 3)).cpu()
                weights[i, i] = 1 - weights[i, chosen].sum()
                if drawn is not None:
                    drawn[i, chosen] = (255 * shares[0, :, 0].float()).round().byte().cpu()
                    drawn[i, i] = (255 * (1 - shares[0, :, 0].float().sum(0))).round().byte().cpu()
        elif drawn is not None:
            drawn[range(views), range(views)] = 255
        return RefinedViews(refined, weights, drawn)

    def _see(self, pictures: Tensor, sight: Sight, view: int, kept: list[int], quality: Tensor) -> Iterator[Peer]:
        """Peers `kept` of a sight, one at a time."""
        main = pictures[view : view + 1]
        for n in kept:
            j = sight.peers[n]
            consistency = sight.consistency[n][None]
            picture = see(pictures[j : j + 1], main, sight.flow[n][None], consistency)
            yield Peer(picture, consistency, quality[j : j + 1])

    def clean(self, pictures: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Each view alone: [B, 3, H, W], quality [B] -> picture [B, 3, H, W], features [B, C, H/2, W/2]."""
        x = _halve(pictures)
        features = self.look(_stack((2 * x - 1, _plane(quality, x)), x.dtype))
        return pictures + _restore(self.clean_out(features), pictures), features

    def fuse(self, main: Tensor, features: Tensor, quality: Tensor, peers: Iterable[Peer]) -> Fused:
        """Cleaned main views [B, 3, H, W] with their features and qualities [B], and their peers one by one."""
        cast = features.dtype
        votes: list[Tensor] = []
        strongest, difference, feature = (main.new_zeros(()) for _ in range(3))
        for peer in peers:
            reliable = _halve(peer.consistency)  # [B, 4, H/2, W/2]
            apart = _halve(SCALE * peer.consistency * (peer.picture - main))
            qualities = _plane(torch.stack((peer.quality, quality), dim=1), apart)
            x = self.pair(_stack((features, apart, reliable, qualities), cast))
            logit, says = self.pair_out(x).split((4, x.shape[1]), dim=1)
            # softmax over the main view (logit 0) and its peers; a peer's share falls with its consistency
            vote = reliable * logit.float().clamp(-10, 10).exp()
            apart, says = apart * vote.repeat(1, 3, 1, 1), says * vote.mean(1, keepdim=True).to(cast)
            first = not votes
            difference, feature = (apart, says) if first else (difference + apart, feature + says)
            strongest = reliable if first else torch.maximum(strongest, reliable)
            votes.append(vote)
        if not votes:
            return Fused(main, main.new_zeros(len(main), 0, 1, *main.shape[-2:]))
        total = sum(votes[1:], votes[0])
        own = 1 / (1 + total)
        means = (difference * own.repeat(1, 3, 1, 1), feature / (1 + total).mean(1, keepdim=True).to(cast), total * own)
        residual = self.head(_stack((features, *means), cast))
        shares = torch.stack([_full(vote * own, main) for vote in votes], dim=1)
        return Fused(main + _restore(strongest.repeat(1, 3, 1, 1) * residual, main), shares)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Older weights hold a learned correction of the flow, which the epipolar lines made worthless."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}polish.")]:
            del state_dict[name]
        super()._load_from_state_dict(state_dict, prefix, *rest)


def see(side: Tensor, main: Tensor, flow: Tensor, consistency: Tensor) -> Tensor:
    """Warp side views [N, 3, H, W] onto main ones, in their colours (one gain and offset per channel and pair)."""
    return match_colours(warp(side.float(), flow), main.float(), consistency).clamp(0, 1)


def match_colours(warped: Tensor, main: Tensor, consistency: Tensor) -> Tensor:
    """Least squares gain and offset per channel; drawn towards (1, 0) where there is little to go by."""
    weight = consistency / (consistency.sum((-2, -1), keepdim=True) + 1)
    mean_side = (weight * warped).sum((-2, -1), keepdim=True)
    mean_main = (weight * main).sum((-2, -1), keepdim=True)
    side, target = warped - mean_side, main - mean_main
    variance = (weight * side * side).sum((-2, -1), keepdim=True)
    gain = ((weight * side * target).sum((-2, -1), keepdim=True) + 1e-3) / (variance + 1e-3)
    return gain.clamp(0.5, 2) * side + mean_main


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _stack(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Along channels. Channels last, all of them: convolutions of mixed maps take twice as long on a CPU."""
    return torch.cat([x.to(dtype, memory_format=torch.channels_last) for x in parts], dim=1)


def _halve(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, ceil(H/2), ceil(W/2)]"""
    right, below = x.shape[-1] % 2, x.shape[-2] % 2
    if right or below:
        x = F.pad(x, (0, right, 0, below), mode="replicate")
    return F.pixel_unshuffle(x, 2)


def _restore(residual: Tensor, like: Tensor) -> Tensor:
    """Half-resolution residual [B, 12, H/2, W/2] -> [B, 3, H, W] in the units of pictures."""
    return _full(residual.float(), like) / SCALE


def _full(x: Tensor, like: Tensor) -> Tensor:
    """[B, 4, H/2, W/2] -> [B, 1, H, W]"""
    return F.pixel_shuffle(x, 2)[..., : like.shape[-2], : like.shape[-1]]


def _plane(values: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, C] -> constant planes [B, C, h, w]."""
    return values.view(like.shape[0], -1, 1, 1).expand(-1, -1, *like.shape[-2:]).to(like.dtype)
