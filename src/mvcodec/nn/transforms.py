"""Analysis and synthesis transforms g_a, g_s; the synthesis in two stages, one per Para-JD submodule (Eq. (17)).

`paper`: four 5x5 stride-2 convolutions with GDN.        y at 1/16, second stage from 1/4.
`klt`:   residual branches at 1/2 and 1/4, pixel-unshuffle by 8, residual blocks at 1/8, 2x2 stride-2 convolution,
         residual blocks at 1/16. Starts as the KLT of 16x16 blocks (training/klt.py): y at 1/16, second stage
         from 1/8. The synthesis mirrors it down to 1/4; 1/2 belongs to the refinement that follows.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.gdn import GDN
from mvcodec.nn.layers import QualityBlock, QualityBranch, folds, substituted

BLOCK = 8  # side of the pixel-unshuffle
PIXELS = 3 * BLOCK * BLOCK  # channels at 1/8


class QualityStack(nn.Module):
    """Residual blocks conditioned on quality."""

    def __init__(self, channels: int, hidden: int, blocks: int, quality_knots: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(QualityBlock(channels, hidden, quality_knots) for _ in range(blocks))

    def forward(self, x: Tensor, quality: Tensor, order: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, quality, order)
        return x

    def set_scale(self, scale: Tensor) -> None:
        for block in self.blocks:
            block.scale.copy_(scale[:, None, None])


class FineStage(nn.Module):
    """A residual branch on blocks of `block` x `block` pixels. [B, 3, H, W] -> same shape."""

    def __init__(self, block: int, width: int, depth: int, quality_knots: int) -> None:
        super().__init__()
        self.block = block
        self.branch = QualityBranch(3 * block * block, width, depth, quality_knots)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        return F.pixel_shuffle(self.branch(F.pixel_unshuffle(x, self.block), quality), self.block)


class KltAnalysis(nn.Module):
    """g_a of the `klt` kind: x [B, 3, H, W] in [0, 1] -> y [B, M, H/16, W/16], before the gain."""

    def __init__(
        self,
        latent_channels: int,
        hidden: int,
        blocks8: int,
        blocks16: int,
        fine_widths: tuple[int, int],
        quality_knots: int,
    ) -> None:
        super().__init__()
        self.stage2 = FineStage(2, fine_widths[0], 2, quality_knots)
        self.stage4 = FineStage(4, fine_widths[1], 1, quality_knots)
        self.stage8 = QualityStack(PIXELS, hidden, blocks8, quality_knots)
        self.klt = nn.Conv2d(PIXELS, latent_channels, 2, stride=2)
        self.stage16 = QualityStack(latent_channels, latent_channels, blocks16, quality_knots)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        if folds(quality):
            return self._by_halves(x, quality)
        x = self.stage4(self.stage2(x - 0.5, quality), quality)
        x = F.pixel_unshuffle(x, BLOCK)
        return self.stage16(in_full(self.klt, self.stage8(x, quality)), quality)

    def linear(self, x: Tensor) -> Tensor:
        """By how much a small change x of the picture moves y: the KLT alone, without blocks and offset."""
        return in_full(substituted(self.klt, {"weight": self.klt.weight, "bias": None}), F.pixel_unshuffle(x, BLOCK))

    def _by_halves(self, x: Tensor, quality: Tensor) -> Tensor:
        """The same without ever shuffling back: the weights go into the order in which halving leaves the channels."""
        x = x - 0.5
        for depth, stage in enumerate((self.stage2.branch, self.stage4.branch, self.stage8), 1):
            x = stage(halved(x), quality, halved_order(depth, x.device))
        klt = {**dict(self.klt.named_parameters()), "weight": self.klt.weight[:, halved_order(3, x.device)]}
        y: Tensor = self.stage16(in_full(substituted(self.klt, klt), x), quality)
        return y


def in_full(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in the precision of its weights under autocast, too; what residual blocks add to its output keeps that.

    A latent may be hundreds of steps, and a sample has 256 levels: the eight bits of bfloat16 would round both. For
    one per cent of the transforms' work it gains all that float32 would gain throughout, 0.05 dB at quality 100. Eleven
    bits will do, TF32, which torch lets a GPU take (operands so rounded on a processor: 0.002 dB of 8 crops).
    """
    with torch.autocast(x.device.type, enabled=False):
        y: Tensor = layer(x.to(next(layer.parameters()).dtype))
        return y


def halved(x: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, 4 C, H/2, W/2], channels last, a fifth of the time that pixel-unshuffle takes there.

    Whole pixels are moved: the new channels are in order of row, column, old channel.
    """
    blocks = x.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
    return blocks.flatten(3).permute(0, 3, 1, 2)


@lru_cache(maxsize=8)
def halved_order(depth: int, device: torch.device) -> Tensor:
    """Of each channel that a picture has after so many halvings, its place in pixel-unshuffle's order."""
    channels = torch.arange(3 * 4**depth, device=device).view(3, *[2] * (2 * depth))  # colour, rows, columns
    return channels.permute(*(d for n in range(1, depth + 1) for d in (n, n + depth)), 0).flatten()


class KltSynthesisCoarse(nn.Module):
    """First stage of g_s: y_hat [B, M, H/16, W/16] -> f [B, 192, H/8, W/8]."""

    def __init__(self, latent_channels: int, blocks16: int, quality_knots: int) -> None:
        super().__init__()
        self.stage16 = QualityStack(latent_channels, latent_channels, blocks16, quality_knots)
        self.klt = nn.Conv2d(latent_channels, 4 * PIXELS, 1)

    def forward(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        return F.pixel_shuffle(in_full(self.klt, self.stage16(y_hat, quality)), 2)


class KltSynthesisFine(nn.Module):
    """Second stage of g_s: f [B, 192, H/8, W/8] -> picture [B, 3, H, W]."""

    def __init__(self, hidden: int, blocks8: int, fine_width: int, quality_knots: int) -> None:
        super().__init__()
        self.stage8 = QualityStack(PIXELS, hidden, blocks8, quality_knots)
        self.stage4 = FineStage(4, fine_width, 1, quality_knots)

    def forward(self, f: Tensor, quality: Tensor) -> Tensor:
        return self.stage4(F.pixel_shuffle(self.stage8(f, quality), BLOCK), quality) + 0.5


@torch.no_grad()
def start_as_klt(
    analysis: KltAnalysis, synthesis: KltSynthesisCoarse, fine: KltSynthesisFine, covariance: Tensor
) -> Tensor:
    """Set the transforms to the first M principal components of 16x16 RGB blocks.

    covariance [768, 768] float64 of pixel-unshuffled 2x2 neighbourhoods (order: channel at 1/8, row, column), about
    the mean 0.5. Returns the standard deviation of each component [M].
    """
    count = analysis.klt.out_channels
    values, vectors = torch.linalg.eigh(covariance)
    basis = vectors.flip(1)[:, :count].T.float()  # [M, 768], largest first
    spread = values.flip(0)[:count].clamp(min=1e-8).sqrt().float()
    analysis.klt.weight.copy_(basis.reshape(count, PIXELS, 2, 2))
    synthesis.klt.weight.copy_(basis.T[:, :, None, None])
    for layer in (analysis.klt, synthesis.klt):
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    analysis.stage16.set_scale(spread)
    synthesis.stage16.set_scale(spread)
    pixel_spread = covariance.diagonal().mean().sqrt().float().expand(PIXELS)
    analysis.stage8.set_scale(pixel_spread)
    fine.stage8.set_scale(pixel_spread)
    for stage in (analysis.stage2, analysis.stage4, fine.stage4):
        stage.branch.scale.fill_(pixel_spread[0].item())
    return spread


def _convolutions(widths: tuple[int, ...], transposed: bool, last_is_picture: bool) -> nn.Sequential:
    """5x5 stride-2 layers with (inverse) GDN between; none after the last one when `last_is_picture`."""
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(pairwise(widths)):
        if transposed:
            layers.append(nn.ConvTranspose2d(a, b, 5, stride=2, padding=2, output_padding=1))
        else:
            layers.append(nn.Conv2d(a, b, 5, stride=2, padding=2))
        if index < len(widths) - 2 or not last_is_picture:
            layers.append(GDN(b, inverse=transposed))
    return nn.Sequential(*layers)


def _last_in_full(layers: nn.Sequential, x: Tensor) -> Tensor:
    *hidden, last = layers
    for layer in hidden:
        x = layer(x)
    return in_full(last, x)


class PaperAnalysis(nn.Module):
    """g_a: 4 x (5x5 stride-2 convolution), GDN between. [B, 3, H, W] -> [B, M, H/16, W/16]."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        m = latent_channels
        self.layers = _convolutions((3, m, m, m, m), transposed=False, last_is_picture=True)

    def forward(self, x: Tensor, quality: Tensor) -> Tensor:
        return _last_in_full(self.layers, x)


class PaperSynthesisCoarse(nn.Module):
    """2 x (5x5 stride-2 deconvolution, IGDN): y_hat [B, M, H/16, W/16] -> f [B, M, H/4, W/4]."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        m = latent_channels
        self.layers = _convolutions((m, m, m), transposed=True, last_is_picture=False)

    def forward(self, y_hat: Tensor, quality: Tensor) -> Tensor:
        return self.layers(y_hat)


class PaperSynthesisFine(nn.Module):
    """Deconvolution, IGDN, deconvolution: f [B, M, H/4, W/4] -> picture [B, 3, H, W]."""

    def __init__(self, latent_channels: int) -> None:
        super().__init__()
        self.layers = _convolutions((latent_channels, latent_channels, 3), transposed=True, last_is_picture=True)

    def forward(self, f: Tensor, quality: Tensor) -> Tensor:
        return _last_in_full(self.layers, f)
