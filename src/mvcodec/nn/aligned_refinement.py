"""Third stage of the joint decoder: what other cameras saw of the same surface, at pixel level.

    picture i --clean--> x_i + residual            no peer involved: all that K = 1 or `peers=False` gets
                  |
                  features                         once per view, half resolution
                  |
    picture j --align, warp, match colours--> d_ij = warped_j - x_i --pair net--> logit, feature
                  |
                  softmax over i itself (logit 0) and all j, each j's share times its consistency
                  |
                  three-conv head -> residual, gated by consistency

PMIFM's principle (ParaHydra Eq. 14-16: reliability, softmax over sources, fusion) applied to aligned pixels
instead of features. Zero start: an untrained net returns its input. Where no peer is consistent, the peers'
part is exactly zero.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.alignment import Alignment, align
from mvcodec.nn.warping import warp

SCALE = 16.0  # coding errors are about 1/50 of the range: brings them near 1 inside the net
MIN_OVERLAP = 0.02  # mean consistency below which a pair is taken for two different places


class RefinedViews(NamedTuple):
    """Refined pictures, and who contributed: weights[i, j] is view j's share in view i ([i, i] its own)."""

    pictures: Tensor  # [K, 3, H, W] in [0, 1]
    weights: Tensor  # [K, K, 1, H, W], sums to 1 over the second dimension


class PeerPictures(NamedTuple):
    """The other views, as one main view would see them."""

    pictures: Tensor  # [S, 3, H, W]
    consistency: Tensor  # [S, 1, H, W] in [0, 1]


class Fused(NamedTuple):
    """Main views [B, 3, H, W] refined with peers, the same without them, and each peer's share [B, S, 1, H, W]."""

    pictures: Tensor
    alone: Tensor
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

    def forward(
        self,
        pictures: Tensor,
        quality: Tensor,
        peers: bool = True,
        alignment: Alignment | None = None,
        max_peers: int | None = None,
    ) -> RefinedViews:
        """Refine K views [K, 3, H, W] in [0, 1] of qualities [K] in [0, 1].

        `alignment` may be given when already known; `max_peers` keeps the most consistent peers of each view.
        """
        views, _, height, width = pictures.shape
        refined = torch.empty_like(pictures, dtype=torch.float32)
        weights = torch.zeros(views, views, 1, height, width, device=pictures.device)
        peers = peers and views > 1
        if peers and alignment is None:
            alignment = align(pictures)
        for i in range(views):
            chosen = _choose(alignment, i, max_peers) if alignment is not None and peers else []
            if chosen:
                seen = see_through_peers(pictures, alignment, i, chosen)  # type: ignore[arg-type]
                picture, _, shares = self.fuse(
                    pictures[i : i + 1], quality[i : i + 1], seen.pictures[None], seen.consistency[None],
                    quality[chosen][None],
                )  # fmt: skip
                weights[i, chosen] = shares[0].float()
            else:
                picture, _ = self.clean(pictures[i : i + 1], quality[i : i + 1])
            refined[i] = picture[0]
            weights[i, i] = 1 - weights[i].sum(0)
        return RefinedViews(refined.clamp(0, 1), weights)

    def clean(self, pictures: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Each view alone: [B, 3, H, W], quality [B] -> picture [B, 3, H, W], features [B, C, H/2, W/2]."""
        x = _halve(pictures)
        features = self.look(torch.cat((2 * x - 1, _plane(quality, x)), dim=1))
        return pictures + _restore(self.clean_out(features), pictures), features

    def fuse(self, main: Tensor, quality: Tensor, peers: Tensor, consistency: Tensor, peer_quality: Tensor) -> Fused:
        """Main views [B, 3, H, W] with S warped peers each [B, S, 3, H, W], consistency [B, S, 1, H, W].

        Qualities are [B] and [B, S].
        """
        batch, sources = peers.shape[:2]
        cleaned, features = self.clean(main, quality)
        reliable = _halve(consistency.flatten(0, 1))  # [B S, 4, H/2, W/2]
        difference = _halve((SCALE * consistency * (peers - main[:, None])).flatten(0, 1))
        shared = features.repeat_interleave(sources, dim=0)
        qualities = torch.stack((peer_quality.flatten(), quality.repeat_interleave(sources)), dim=1)
        x = self.pair(torch.cat((shared, difference, reliable, _plane(qualities, difference)), dim=1))
        logit, feature = self.pair_out(x).split((4, x.shape[1]), dim=1)

        # softmax over the main view (logit 0) and its peers; a peer's share falls with its consistency
        votes = (reliable * logit.float().clamp(-10, 10).exp()).unflatten(0, (batch, sources))
        share = votes / (1 + votes.sum(1, keepdim=True))  # [B, S, 4, H/2, W/2]
        fused_difference = (share.repeat(1, 1, 3, 1, 1) * difference.unflatten(0, (batch, sources))).sum(1)
        fused_feature = (share.mean(2, keepdim=True) * feature.unflatten(0, (batch, sources))).sum(1)
        residual = self.head(torch.cat((features, fused_difference, fused_feature, share.sum(1)), dim=1))
        gate = reliable.unflatten(0, (batch, sources)).amax(1).repeat(1, 3, 1, 1)
        size = main.shape[-2:]
        shares = F.pixel_shuffle(share.flatten(0, 1), 2).unflatten(0, (batch, sources))[..., : size[0], : size[1]]
        return Fused(cleaned + _restore(gate * residual, main), cleaned, shares)


def see_through_peers(pictures: Tensor, alignment: Alignment, view: int, peers: list[int]) -> PeerPictures:
    """Warp the peers onto the view and give them its colours (one gain and offset per channel and pair)."""
    main = pictures[view].float()
    consistency = alignment.consistency[view, peers]
    warped = warp(pictures[peers].float(), alignment.flow[view, peers])
    return PeerPictures(match_colours(warped, main, consistency).clamp(0, 1), consistency)


def match_colours(warped: Tensor, main: Tensor, consistency: Tensor) -> Tensor:
    """Least squares gain and offset per channel; drawn towards (1, 0) where there is little to go by."""
    weight = consistency / (consistency.sum((-2, -1), keepdim=True) + 1)
    mean_side = (weight * warped).sum((-2, -1), keepdim=True)
    mean_main = (weight * main).sum((-2, -1), keepdim=True)
    side, target = warped - mean_side, main - mean_main
    variance = (weight * side * side).sum((-2, -1), keepdim=True)
    gain = ((weight * side * target).sum((-2, -1), keepdim=True) + 1e-3) / (variance + 1e-3)
    return gain.clamp(0.5, 2) * side + mean_main


def _choose(alignment: Alignment, view: int, max_peers: int | None) -> list[int]:
    """Peers that overlap, the most consistent first if only some may stay; in order of index."""
    overlap = alignment.consistency[view].mean((-3, -2, -1))
    overlap[view] = 0
    best = [int(j) for j in overlap.argsort(descending=True) if overlap[j] >= MIN_OVERLAP]
    return sorted(best[:max_peers])


def _zero(conv: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(conv.weight)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


def _halve(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, ceil(H/2), ceil(W/2)]"""
    x = F.pad(x, (0, x.shape[-1] % 2, 0, x.shape[-2] % 2), mode="replicate")
    return F.pixel_unshuffle(x, 2)


def _restore(residual: Tensor, like: Tensor) -> Tensor:
    """Half-resolution residual [B, 12, H/2, W/2] -> [B, 3, H, W] in the units of pictures."""
    return F.pixel_shuffle(residual.float(), 2)[..., : like.shape[-2], : like.shape[-1]] / SCALE


def _plane(values: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, C] -> constant planes [B, C, h, w]."""
    return values.view(like.shape[0], -1, 1, 1).expand(-1, -1, *like.shape[-2:]).to(like.dtype)
