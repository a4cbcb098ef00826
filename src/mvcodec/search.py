"""More time in the encoder, fewer bits for the same decoder: what `encode --effort` does.

g_a gives every picture's latents in one pass. Fitting them to the picture at hand is known to save bits (Campos et al.,
"Content adaptive optimization for neural image compression", CVPR workshops 2019; Yang, Bamler and Mandt, "Improving
inference for neural image compression", NeurIPS 2020). Those descend a relaxed problem for thousands of steps; here the
integers themselves are searched, so that a handful of gradients pays:

    y_hat --> cost = bits + lambda 255^2 error, and its gradient g --> for every symbol k: what would k + 1, k - 1 cost?
      ^                                                                     |
      +-- blocks of latents whose cost fell keep them <-- try some of those that promise to be cheaper

A symbol's step s = +-1 changes the cost by about  s g + H / 2 + b(k + s) - b(k):  g holds the error and, through the
contexts, the bits of all later symbols; H is the error's curvature, per channel; b are the symbol's own bits.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvcodec.exact.arithmetic import FLOAT, use
from mvcodec.latents import LATENT_STRIDE
from mvcodec.nn.dead_zone import rounded, threshold
from mvcodec.nn.gain import exact_log_gain, hat_basis, rate_distortion_lambda
from mvcodec.nn.hyperprior import LN_SIGMA_BOUND, gaussian_likelihood
from mvcodec.tiling import SMALLEST
from mvcodec.weights import Model

MOST_EFFORT = 5  # each further one has been worth less than the one before
TILE = SMALLEST // LATENT_STRIDE  # latents a side that are searched at a time: whole tiles of Para-EM's attention
SEAM = 1  # latents beside another tile keep their symbols: not all that they change is in sight
BLOCK = 4  # latents a side that keep their steps or take them back together
DAMPING = 1.1  # of the curvature: neighbours that step at once add to each other's error
CHANCE, LEAST_CHANCE = 0.4, 0.1  # that a promising step is tried, per block;
SUCCESS, FAILURE = 1.2, 0.7  # and how it changes with each outcome


def steps_of(effort: int) -> int:
    """Each effort takes twice as long as the one before; 0 is none."""
    return 2**effort if effort else 0


def better_latents(
    model: Model,
    y: Tensor,
    z: Tensor,
    quality: float,
    effort: int,
    picture: Callable[[slice, slice], Tensor],
    size: tuple[int, int],
) -> Tensor:
    """Latents to be rounded in the place of y, float32 [1, M, h, w]: the same in every run on one machine.

    y in quantiser steps; z [1, N, h/4, w/4] stays as it is; quality in [0, 1]. picture(rows, columns) gives a part of
    what is coded, [1, 3, .., ..] in [0, 1] on the model's device; size: its height and width without padding. The
    search looks at one tile at a time: time grows with the picture's area, working memory does not.
    """
    with torch.inference_mode(False), torch.enable_grad():
        found, costs = y.clone(), _Costs(model, quality)
        with torch.no_grad():
            hyper = costs.h_s(z.clone().round())
        generator = torch.Generator().manual_seed(0)
        height, width = y.shape[2:]
        for rows, columns in _tiles(height, width):
            inside = size[0] - LATENT_STRIDE * rows.start, size[1] - LATENT_STRIDE * columns.start
            costs.look_at(picture(_pixels(rows), _pixels(columns)), hyper[..., rows, columns], inside)
            free = torch.zeros_like(found[:, :1])
            free[..., _without_seams(rows, height), _without_seams(columns, width)] = 1
            start = found[..., rows, columns]
            found[..., rows, columns] = _search(costs, start, free[..., rows, columns], steps_of(effort), generator)
        return found


def _tiles(height: int, width: int) -> Iterator[tuple[slice, slice]]:
    for top in range(0, height, TILE):
        for left in range(0, width, TILE):
            yield slice(top, min(top + TILE, height)), slice(left, min(left + TILE, width))


def _without_seams(span: slice, length: int) -> slice:
    return slice(span.start + SEAM * (span.start > 0), span.stop - SEAM * (span.stop < length))


def _pixels(span: slice) -> slice:
    return slice(LATENT_STRIDE * span.start, LATENT_STRIDE * span.stop)


class _State(NamedTuple):
    """Rounded latents of a tile, all [1, M, h, w], and what they cost, [1, 1, h, w] in bits."""

    target: Tensor  # what was rounded
    y_hat: Tensor
    gradient: Tensor  # of the whole cost by y_hat
    up: Tensor  # a symbol's own bits if it were one more, against now
    down: Tensor
    coded: Tensor  # those of the lowest sigma are not, and stay zero
    cost: Tensor


def _search(costs: _Costs, y: Tensor, free: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """y [1, M, h, w] -> what so many trials find; free [1, 1, h, w] is 1 where it may change."""
    best = costs.of(y)
    curvature = costs.curvature(best.y_hat, generator)
    chance = torch.full_like(_sum_of_blocks(best.cost), CHANCE)
    for _ in range(steps):
        rise = best.gradient + DAMPING / 2 * curvature + best.up
        fall = -best.gradient + DAMPING / 2 * curvature + best.down
        promising = (torch.minimum(rise, fall) < 0) & best.coded.bool() & free.bool()
        drawn = torch.rand(y.shape, generator=generator).to(y.device) < _blocks_to_latents(chance)
        step = torch.where(rise < fall, 1.0, -1.0)
        tried = costs.of(torch.where(promising & drawn, best.y_hat + step, best.target))
        better = _sum_of_blocks(tried.cost) <= _sum_of_blocks(best.cost)
        chance = (chance * torch.where(better, SUCCESS, FAILURE)).clamp(LEAST_CHANCE, 1)
        kept = _blocks_to_latents(better)
        best = _State(*(torch.where(kept, new, old) for new, old in zip(tried, best, strict=True)))
    return best.target


def _sum_of_blocks(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, BLOCK, divisor_override=1)  # sides are multiples of BLOCK: z is at a quarter


def _blocks_to_latents(x: Tensor) -> Tensor:
    """A value of each block -> of each of its latents."""
    return x.repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3)


class _Costs:
    """Bits and error of one tile at one quality, in floating point and with gradients."""

    def __init__(self, model: Model, quality: float) -> None:
        self.model, self.config, self.quality = model, model.net.config, quality
        self.h_s, self.para_em = copy.deepcopy(model.net.h_s), copy.deepcopy(model.net.para_em)
        for network in (self.h_s, self.para_em):
            use(FLOAT, network)
        self.t = torch.tensor([quality], device=model.device)
        self.basis = hat_basis(self.t, model.net.config.quality_knots)
        self.inverse = model.net.gain.inverse(self.basis)
        self.ln_gain = torch.full((1,), exact_log_gain(quality), device=model.device)
        # Of the mean over three samples of a pixel, in bits.
        self.error_weight = rate_distortion_lambda(self.t) * 255**2
        self.ln_sigma_coded = model.sigma_thresholds[0].float()

    def look_at(self, pixels: Tensor, hyper: Tensor, inside: tuple[int, int]) -> None:
        """The tile: its picture [1, 3, 16 h, 16 w], Phi_h [1, C, h, w], height and width that are no padding."""
        self.picture, self.hyper = pixels, hyper
        self.inside = torch.zeros_like(self.picture[:, :1])
        self.inside[..., : inside[0], : inside[1]] = 1
        shown = F.max_pool2d(self.inside, LATENT_STRIDE)  # the other latents are not for us to choose
        self.shown = self.config.coding_order(shown)

    def of(self, target: Tensor) -> _State:
        """Round `target` as the encoder does, half slice by half slice."""
        parts = self.config.coding_order(target)
        y_hat: list[Tensor] = []
        bits: list[Tensor] = []
        others: list[tuple[Tensor, Tensor, Tensor]] = []

        def code(step: int, mu: Tensor, ln_sigma: Tensor) -> Tensor:
            coded = (ln_sigma.detach() > self.ln_sigma_coded) * self.shown[step]
            ln_sigma = ln_sigma.clamp(min=LN_SIGMA_BOUND)
            k = rounded(parts[step] - mu.detach(), threshold(ln_sigma.detach())) * coded
            y_hat.append((mu.detach() + k).requires_grad_())
            own = _bits(k, ln_sigma)
            with torch.no_grad():
                others.append((_bits(k + 1, ln_sigma) - own, _bits(k - 1, ln_sigma) - own, coded))
                # y - mu is anywhere within the unit around k: the mean slope of its bits there.
                slope = _bits(k + 0.5, ln_sigma) - _bits(k - 0.5, ln_sigma)
            bits.append(((own - slope * (mu - mu.detach())) * coded).sum(dim=1, keepdim=True))
            return y_hat[-1]

        latents: Tensor = self.para_em(self.hyper, self.ln_gain, code)
        cost = sum(self.config.by_slice(bits), self._error(latents))
        gradient = self.config.in_place(torch.autograd.grad(cost.sum(), y_hat))
        up, down, coded = (self.config.in_place(parts) for parts in zip(*others, strict=True))
        return _State(target, latents.detach(), gradient, up, down, coded, cost.detach())

    def curvature(self, y_hat: Tensor, generator: torch.Generator) -> Tensor:
        """Second derivative of the error by one latent of each channel [1, M, 1, 1], on the mean over its positions.

        From the difference of two gradients along random signs v (Hutchinson): E[v H v] is the diagonal of H.
        """
        signs = (torch.rand(y_hat.shape, generator=generator).to(y_hat.device) < 0.5).float() * 2 - 1
        gradients: list[Tensor] = []
        for step in (0.5, -0.5):
            moved = (y_hat + step * signs).requires_grad_()
            gradients += torch.autograd.grad(self._error(moved).sum(), moved)
        products = (gradients[0] - gradients[1]) * signs
        return products.mean(dim=(2, 3), keepdim=True).clamp(min=0)

    def _error(self, y_hat: Tensor) -> Tensor:
        """lambda 255^2 times the squared error of the separately decoded picture, in bits [1, 1, h, w]."""
        net = self.model.net
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.model.bfloat16):
            picture = net.para_jd((y_hat * self.inverse)[None], self.basis[None], False, False)[0].float()
            if net.refinement is not None:
                picture = net.refinement.clean(picture.clamp(0, 1), self.t)[0].float()
        error = (picture.clamp(0, 1) - self.picture).square().mean(dim=1, keepdim=True) * self.inside
        return self.error_weight * F.avg_pool2d(error, LATENT_STRIDE, divisor_override=1)


def _bits(symbols: Tensor, ln_sigma: Tensor) -> Tensor:
    return -torch.log2(gaussian_likelihood(symbols, ln_sigma))
