"""Third stage of the joint decoder: what other cameras saw of the same surface, at pixel level.

    picture i --clean--> x_i                       no peer involved: all that K = 1 or `peers=False` gets
                  |
                  features                         once per view, half resolution
                  |
    x_i, x_j drawn back into their cells (`settle`)
    x_j --align, warp, match colours--> d_ij = warped_j - x_i --pair net--> logit, feature
                  |
                  softmax over i itself (logit 0) and all j, each j's share times its consistency
                  |
                  three-conv head -> residual, gated by consistency

PMIFM's principle (ParaHydra Eq. 14-16: reliability, softmax over sources, fusion) applied to aligned pixels
instead of features. Zero start: an untrained net returns its input. Where no peer is consistent, the peers'
part is exactly zero. One main view and one peer at a time: memory grows with K only by what each view keeps. Large
views go through the nets in tiles; then all peers of one view are warped first.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, product
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.cores import at_a_time, beside
from mvcodec.graphs import PLAIN, Graphs
from mvcodec.nn.alignment import Sight, sights
from mvcodec.nn.steady_flow import SteadyFlow
from mvcodec.nn.warping import BAND_PIXELS, CACHED_PIXELS, bands, warp
from mvcodec.tiling import Span, fused_at_once, spans, steadied_at_once, tiled

SCALE = 16.0  # coding errors are about 1/50 of the range: brings them near 1 inside the net
MAX_COARSER = 0.5  # a peer of lower quality by more shows nothing new: one view at 80 beside others at 15 lost 0.1 dB
FADES = (0.8, 0.7)  # from this quality on less of what peers correct is believed, at 1 so much: it is too bold there
REACH = 16  # pixels: eight 3x3 convolutions at half resolution
QUARTERS = tuple(product((0, 1), repeat=2))  # rows and columns of a pixel's four
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


class Other(NamedTuple):
    """Another view as it was taken, and where the main view finds itself in it."""

    picture: Tensor  # [B, 3, H, W]
    flow: Tensor  # [B, 2, H, W]
    consistency: Tensor  # [B, 1, H, W]
    quality: Tensor  # [B]


class Fused(NamedTuple):
    """Main views [B, 3, H, W] refined with S peers."""

    pictures: Tensor
    shares: Tensor  # of each peer, [B, S, 1, H, W]
    shown: Tensor  # by the peers: how they differ from the main views, each by share and consistency, [B, 3, H, W]


class _Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.body(x)
        return out.add_(x)  # a convolution does not look at its output again: gradients are as without this


class AlignedRefinement(nn.Module):
    """See the module's docstring. All nets work at half resolution, through pixel-unshuffle."""

    def __init__(self, width: int = 40) -> None:
        super().__init__()
        self.look = nn.Sequential(
            nn.Conv2d(12 + 1, width, 3, padding=1), nn.LeakyReLU(0.1, inplace=True), _Residual(width), _Residual(width)
        )
        self.clean_out = _zero(nn.Conv2d(width, 12, 3, padding=1))
        self.pair = nn.Sequential(
            nn.Conv2d(width + 12 + 4 + 2, width, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            _Residual(width),
            _Residual(width),
        )
        self.pair_out = nn.Conv2d(width, 4 + width, 1)
        self.head = nn.Sequential(
            nn.Conv2d(2 * width + 12 + 4, width, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(0.1, inplace=True),
            _zero(nn.Conv2d(width, 12, 3, padding=1)),
        )
        # Weights that hold it bring it along, others switch it off: it is no part of the configuration, so that the
        # two can read each other's files.
        self.steady: SteadyFlow | None
        self.register_module("steady", None)

    @torch.no_grad()
    def forward(
        self,
        pictures: Tensor,
        quality: Tensor,
        peers: bool = True,
        max_peers: int | None = None,
        maps: bool = False,
        most: int | None = None,
        settle: Callable[[int, Tensor], None] | None = None,
        finish: Callable[[int, Tensor, Tensor], None] | None = None,
        call: Graphs = PLAIN,
    ) -> RefinedViews:
        """Refine K views [K, 3, H, W] in [0, 1] of qualities [K] in [0, 1], for use; training calls the parts.

        max_peers: each view is helped by its most consistent peers only. most: so many pixels go through the nets at a
        time (default: one view); views of more than that have even sides. settle: what is to become of cleaned view i
        [3, H, W], in place, before others see it; finish: of one that peers have changed, given what they show
        [3, H, W]. call: what views go through in one piece can be replayed.
        """
        views, _, height, width = pictures.shape
        most = height * width if most is None else most
        refined = torch.empty_like(pictures, dtype=torch.float32)

        def clean(i: int) -> Tensor:
            cleaned, feature = self._clean_in_tiles(pictures[i : i + 1], quality[i : i + 1], most, call)
            torch.clamp(cleaned[0], 0, 1, out=refined[i])
            if settle is not None:
                settle(i, refined[i])
            return feature

        features = beside(clean, range(views), pictures.device, most // (height * width))
        weights = torch.eye(views)
        drawn = torch.zeros(views, views, height, width, dtype=torch.uint8) if maps else None
        if peers and views > 1:
            # The peers of every view are the cleaned views, not the ones that their peers have refined.
            cleaned = refined.clone()
            qualities = quality.tolist()
            belief = fade(quality)

            def fuse(seen: tuple[int, Sight]) -> None:
                i, sight = seen
                overlap = sight.consistency.mean((1, 2, 3)).tolist()
                able = [qualities[j] >= qualities[i] - MAX_COARSER for j in sight.peers]
                kept = [n for n in range(len(sight.peers)) if overlap[n] >= MIN_OVERLAP and able[n]]
                chosen = [sight.peers[n] for n in kept]
                given = torch.zeros(len(chosen), dtype=torch.float64)
                shown = torch.empty_like(refined[i])
                others = tuple(
                    Other(cleaned[j : j + 1], sight.flow[n][None], sight.consistency[n][None], quality[j : j + 1])
                    for n, j in zip(kept, chosen, strict=True)
                )
                tiles = self._fuse_in_tiles(cleaned[i : i + 1], features[i], quality[i : i + 1], others, most, call)
                for rows, columns, fused in tiles:
                    place, inside = (..., rows.kept, columns.kept), (..., rows.inside, columns.inside)
                    refined[i][place].lerp_(fused.pictures[0][inside], belief[i]).clamp_(0, 1)
                    shown[place] = fused.shown[0][inside]
                    shares = fused.shares[0, :, 0][inside].float()
                    given += shares.sum((1, 2)).cpu()
                    if drawn is not None:
                        every = torch.cat((shares, 1 - shares.sum(0, keepdim=True)))
                        drawn[i, [*chosen, i], rows.kept, columns.kept] = (255 * every).round().byte().cpu()
                weights[i, chosen] = (given / (height * width)).float()
                weights[i, i] = 1 - weights[i, chosen].sum()
                if finish is not None and weights[i, i] < 1:
                    finish(i, refined[i], shown)

            found = enumerate(sights(cleaned, max_peers, self.steady, quality, steadied_at_once(most), call))
            at_once = fused_at_once(most, height * width, min(max_peers or views, views - 1))
            while some := list(islice(found, at_a_time(pictures.device, at_once))):
                beside(fuse, some, pictures.device)
        elif drawn is not None:
            drawn[range(views), range(views)] = 255
        return RefinedViews(refined, weights, drawn)

    def _clean_in_tiles(self, picture: Tensor, quality: Tensor, most: int, call: Graphs) -> tuple[Tensor, Tensor]:
        """`clean` of one view, at most so many pixels at a time."""
        if picture[0, 0].numel() <= most:
            found: tuple[Tensor, Tensor] = call(self.clean, picture, quality)
            return found
        features = tiled(self, lambda x, _: self._features(x, quality), picture, most)
        residual = tiled(self, lambda x, _: self.clean_out(x), features, max(most // 4, 1))
        return _restore(residual, picture).add_(picture), features

    def _fuse_in_tiles(
        self, main: Tensor, features: Tensor, quality: Tensor, others: tuple[Other, ...], most: int, call: Graphs
    ) -> Iterator[tuple[Span, Span, Fused]]:
        """`fuse` of one view, at most so many pixels at a time: what is `inside` the spans is as in one piece."""
        height, width = main.shape[-2:]
        if height * width <= most:
            (rows,), (columns,) = spans(height, height, 0), spans(width, width, 0)
            yield rows, columns, call(self._fuse_with, main, features, quality, others)
            return
        side = max(math.isqrt(most) - 2 * REACH, REACH) // 2 * 2
        peers = list(_seen_from(main, others))
        for rows, columns in product(spans(height, side, REACH), spans(width, side, REACH)):
            seen = (..., rows.seen, columns.seen)
            down, across = (slice(span.seen.start // 2, -(-span.seen.stop // 2)) for span in (rows, columns))
            parts = (Peer(peer.picture[seen], peer.consistency[seen], peer.quality) for peer in peers)
            yield rows, columns, self.fuse(main[seen], features[..., down, across], quality, parts)

    def _fuse_with(self, main: Tensor, features: Tensor, quality: Tensor, others: tuple[Other, ...]) -> Fused:
        """`fuse` with peers that are still to be warped; recorded for a GPU, it holds as many as were given."""
        return self.fuse(main, features, quality, _seen_from(main, others))

    def clean(self, pictures: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """Each view alone: [B, 3, H, W], quality [B] -> picture [B, 3, H, W], features [B, C, H/2, W/2]."""
        features = self._features(pictures, quality)
        return _restore(self.clean_out(features), pictures).add_(pictures), features

    def _features(self, pictures: Tensor, quality: Tensor) -> Tensor:
        x = _halve(pictures)
        features: Tensor = self.look(_stack((2 * x - 1, _plane(quality, x)), x.dtype))
        return features

    def fuse(self, main: Tensor, features: Tensor, quality: Tensor, peers: Iterable[Peer]) -> Fused:
        """Cleaned main views [B, 3, H, W] with their features and qualities [B], and their peers one by one."""
        cast = features.dtype
        votes: list[Tensor] = []
        strongest, difference, feature = (main.new_zeros(()) for _ in range(3))
        for peer in peers:
            reliable = _halve(peer.consistency)  # [B, 4, H/2, W/2]
            apart = _halve((peer.picture - main).mul_(SCALE * peer.consistency))
            qualities = _plane(torch.stack((peer.quality, quality), dim=1), apart)
            x = self.pair(_stack((features, apart, reliable, qualities), cast))
            logit, says = self.pair_out(x).split((4, x.shape[1]), dim=1)
            # softmax over the main view (logit 0) and its peers; a peer's share falls with its consistency
            vote = reliable * logit.float().clamp(-10, 10).exp()
            apart, says = _times(apart, vote), says * vote.mean(1, keepdim=True).to(cast)
            first = not votes
            difference, feature = (apart, says) if first else (difference + apart, feature + says)
            strongest = reliable if first else torch.maximum(strongest, reliable)
            votes.append(vote)
        if not votes:
            return Fused(main, main.new_zeros(len(main), 0, 1, *main.shape[-2:]), torch.zeros_like(main))
        total = sum(votes[1:], votes[0])
        own = 1 / (1 + total)
        means = (_times(difference, own), feature / (1 + total).mean(1, keepdim=True).to(cast), total * own)
        residual = self.head(_stack((features, *means), cast))
        shares = torch.stack([_full(vote * own, main) for vote in votes], dim=1)
        refined = _restore(_times(residual.contiguous(), strongest), main).add_(main)
        return Fused(refined, shares, _restore(means[0], main))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Older weights do not steady the flow, or hold a correction of it that the epipolar lines made worthless."""
        for name in [name for name in state_dict if name.startswith(f"{prefix}polish.")]:
            del state_dict[name]
        if not any(name.startswith(f"{prefix}steady.") for name in state_dict):
            self.steady = None
        elif self.steady is None:
            self.steady = SteadyFlow().to(self.pair_out.weight.device)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def fade(quality: Tensor) -> Tensor:
    """How much of what peers correct is believed at qualities [..] in [0, 1]; found on training scenes."""
    start, least = FADES
    return 1 - (1 - least) * ((quality - start) / (1 - start)).clamp(0, 1)


def _seen_from(main: Tensor, others: tuple[Other, ...]) -> Iterator[Peer]:
    """One at a time: memory holds one warped picture."""
    for side, flow, consistency, quality in others:
        yield Peer(see(side, main, flow, consistency), consistency, quality)


def see(side: Tensor, main: Tensor, flow: Tensor, consistency: Tensor) -> Tensor:
    """Warp side views [N, 3, H, W] onto main ones, in their colours (one gain and offset per channel and pair)."""
    return match_colours(warp(side.float(), flow), main.float(), consistency).clamp(0, 1)


def match_colours(warped: Tensor, main: Tensor, consistency: Tensor) -> Tensor:
    """Least squares gain and offset per channel; drawn towards (1, 0) where there is little to go by."""
    sums: list[Tensor | float] = [0.0] * 5
    for rows in bands(main, CACHED_PIXELS if main.device.type == "cpu" else BAND_PIXELS):
        side, target, weight = (x[..., rows, :] for x in (warped, main, consistency))
        weighted = weight * side
        terms = (weight, weighted, weight * target, weighted * side, weighted * target)
        sums = [total + x.sum((-2, -1), keepdim=True).double() for total, x in zip(sums, terms, strict=True)]
    weights, sides, targets, squares, products = sums
    size = weights + 1
    side_mean, target_mean = sides / size, targets / size
    variance = (squares - 2 * side_mean * sides + side_mean**2 * weights) / size
    covariance = (products - side_mean * targets - target_mean * sides + side_mean * target_mean * weights) / size
    gain = ((covariance + 1e-3) / (variance + 1e-3)).clamp(0.5, 2)
    return (target_mean - gain * side_mean).to(warped.dtype) + gain.to(warped.dtype) * warped


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
    # as `pixel_unshuffle`, on a processor in a third of its time; `_full` is its way back
    return torch.stack([x[..., down::2, across::2] for down, across in QUARTERS], dim=2).flatten(1, 2)


def _restore(residual: Tensor, like: Tensor) -> Tensor:
    """Half-resolution residual [B, 12, H/2, W/2] -> [B, 3, H, W] in the units of pictures."""
    return _full(residual, like).mul_(1 / SCALE)


def _full(x: Tensor, like: Tensor) -> Tensor:
    """[B, 4 C, H/2, W/2] -> [B, C, H, W] in the precision of pictures."""
    batch, channels, height, width = x.shape
    full = like.new_empty(batch, channels // 4, 2 * height, 2 * width)
    for n, (down, across) in enumerate(QUARTERS):
        full[..., down::2, across::2] = x[:, n::4]
    return full[..., : like.shape[-2], : like.shape[-1]]


def _times(x: Tensor, weights: Tensor) -> Tensor:
    """[B, 4 C, h, w] by [B, 4, h, w], the same for all C colours."""
    return (x.unflatten(1, (-1, 4)) * weights[:, None]).flatten(1, 2)


def _plane(values: Tensor, like: Tensor) -> Tensor:
    """[B] or [B, C] -> constant planes [B, C, h, w]."""
    return values.view(like.shape[0], -1, 1, 1).expand(-1, -1, *like.shape[-2:]).to(like.dtype)
