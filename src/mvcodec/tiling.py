"""Large pictures in tiles that overlap, so that memory is bounded and the result is that of the whole picture.

    |-- reach --|----- tile -----|-- reach --|     what a stage sees
                |----- tile -----|                 what is kept of its output

A convolutional stage sees no further than its reach, which is measured on its own convolutions. A tile gets so much of
the picture around it, or ends where the picture ends and is padded there as the picture is: every number is then the
sum of the same products as without tiles. Only the order of summation is the convolution library's own and may depend
on a tile's size: float32 results agree to its rounding, bfloat16 ones to its (far coarser) rounding.

Tiles are for float stages alone. Whether a picture is tiled is not written into its file: the encoder's y may differ in
the last place and so, rarely, round to another integer, which is as good a file; the decoder's integers are exact.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mvcodec.cores import beside
from mvcodec.errors import UsageError

# stage(x [B, C, h, w], views): B views of the batch, all of them or a part, whole or a tile.
Stage = Callable[[Tensor, slice], Tensor]
FEW = 2_000_000  # pixels, of several views at once on a processor: two of 1024x832 take a tenth less than one by one
PROBE = 64  # pixels: the least size that every stage takes
SMALLEST = 512  # pixels: side of the least tile, its surroundings included
USUAL = 9_000_000  # pixels at a time where no budget is given: a 4K frame in one piece, about 1.4 GB for `fast`

# Bytes, as docs/performance_log.md says they were measured; rounded up.
PROGRAM = 1_000_000_000  # Python, torch and the weights
WALK = 120  # per pixel of the view that goes through the entropy path
HELD = 50  # per pixel of each other view
ALIGNED = 120  # per pixel of each view, where views are aligned with one another
PEER = 80  # per pixel of each view that helps the one at work
WAITING = 12  # per pixel of each way back that was found with the way there and waits for its turn
WORKING = {"klt": 160, "paper": 450}  # per pixel that a transform is at work on
FUSING = 250  # or the peers' part of the refinement
STEADYING = 120_000_000  # for one tile of nn/steady_flow.py, before the peers' part begins
SEARCHING = {"klt": 1500, "paper": 4500}  # per pixel of a tile of the encoder's search, which is SMALLEST a side
# All this is of networks in bfloat16. In float32:
WIDE = 1.5  # times as much of what is at work
FEATURES = 20  # more per pixel of each view that is aligned: 40 channels at half size


def pixels_at_once(
    transform: str,
    pixels: int,
    views: int,
    max_memory: int | None,
    peers: int = 0,
    searched: bool = False,
    bfloat16: bool = True,
) -> int:
    """How many pixels a transform may work on at a time, of `views` of `pixels` each, to stay within so many bytes.

    peers: with how many others each view is aligned. searched: the encoder looks for better latents, in tiles that
    are always the same. bfloat16: what the networks run in, else float32. Without a budget always the same number, so
    that a picture gives the same file wherever there is memory enough. Raises UsageError where what cannot be tiled is
    over the budget.
    """
    if max_memory is None:
        return USUAL
    waiting = min(views**2 // 4, views * peers // 2)
    aligned, wide = (ALIGNED, 1.0) if bfloat16 else (ALIGNED + FEATURES, WIDE)
    per_pixel = views * aligned + peers * PEER + waiting * WAITING if peers else WALK + HELD * (views - 1)
    working = int(wide * max(WORKING[transform], FUSING if peers else 0))
    tile = int(max(working, wide * SEARCHING[transform] * searched)) * SMALLEST**2
    held, least = PROGRAM + per_pixel * pixels, max(tile, STEADYING) if peers else tile
    if max_memory < held + least:
        megapixels = f"{pixels / 1e6:.1f}" if pixels >= 1e5 else f"{pixels / 1e6:.2g}"
        enough = -(-(held + least) // 10**7) * 10**7
        raise UsageError(
            f"{views} x {megapixels} megapixels need {_told(enough)} of memory, --max-memory is {_told(max_memory)}"
            + ("; --preview needs less" if peers else "; --effort 0 needs less" if searched else "")
        )
    return (max_memory - held) // working


def _told(size_bytes: int) -> str:
    """As --max-memory takes it."""
    return f"{size_bytes / 1e9:.4g}G" if size_bytes >= 1e9 else f"{size_bytes / 1e6:.4g}M"


def fused_at_once(most: int, pixels: int, peers: int) -> int:
    """How many views of so many pixels the peers' part may work on at a time, where `most` pixels at a time fit."""
    return 1 + max(0, (most - pixels) * FUSING // (pixels * (FUSING + peers * PEER)))


def steadied_at_once(most: int) -> int:
    """How many tiles of nn/steady_flow.py fit where `most` pixels of the peers' part do."""
    return most * FUSING // STEADYING


def pixels_in_walks(max_memory: int | None) -> int:
    """How many pixels of views may go through the entropy path at a time, all walks together; one view always may."""
    return USUAL if max_memory is None else min(USUAL, max(0, max_memory - PROGRAM) // (2 * WALK))


class Footprint(NamedTuple):
    """How far a stage sees, and on which grid it works, both in positions of its input."""

    reach: int
    grid: int


@torch.inference_mode()
def footprint(module: nn.Module, run: Stage, probe: Tensor) -> Footprint:
    """Found by running the stage on a small input [1, C, h, w] and adding up the reach of its convolutions.

    Branches count as if they stood in a row, so the reach is never too small. Stages that look at the whole picture at
    once (pooling, attention) have no footprint; none of g_a, g_s and the refinement's clean part does.
    """
    size, here = probe.shape[-1], threading.get_ident()
    reach, grid = 0.0, 1.0

    def see(layer: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal reach, grid
        if threading.get_ident() != here:  # another picture, which somebody decodes with the same model
            return
        spacing = size / inputs[0].shape[-1]  # positions of the stage's input per position of the layer's
        radius = (layer.kernel_size[0] - 1) / 2
        if isinstance(layer, nn.ConvTranspose2d):
            radius /= layer.stride[0]
        reach += spacing * math.ceil(radius)
        grid = max(grid, spacing, size / output.shape[-1])

    with ExitStack() as stack:
        for layer in module.modules():
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                stack.callback(layer.register_forward_hook(see).remove)
        run(probe, slice(0, 1))
    step = math.ceil(grid)
    return Footprint(-(-math.ceil(reach) // step) * step, step)


def tiled(module: nn.Module, run: Stage, x: Tensor, most: int) -> Tensor:
    """The stage `run` of x [B, C, H, W], at most `most` input positions at a time -> its output.

    `run` applies `module`. What fits is done in one piece, on a processor as views beside each other; where not even
    one view fits, in tiles.
    """
    batch, _, height, width = x.shape
    if height * width <= most:
        together = most // (height * width)
        # On a processor a batch is no faster than its views one by one, which stay in a core's cache.
        group = 1 if x.device.type == "cpu" else together
        views = [slice(k, k + group) for k in range(0, batch, group)]
        parts = beside(lambda part: run(x[part], part), views, x.device, together)
        return parts[0] if len(parts) == 1 else torch.cat(parts)
    seen = footprint(module, run, x[:1, :, :PROBE, :PROBE])
    side = max(math.isqrt(most) - 2 * seen.reach, seen.reach, seen.grid) // seen.grid * seen.grid
    whole: Tensor | None = None
    for view, rows, columns in product(range(batch), spans(height, side, seen.reach), spans(width, side, seen.reach)):
        part = run(x[view : view + 1, :, rows.seen, columns.seen], slice(view, view + 1))
        ratio = part.shape[-1] / (columns.seen.stop - columns.seen.start)  # of the output's resolution to the input's
        if whole is None:
            shape = (batch, part.shape[1], round(height * ratio), round(width * ratio))
            whole = torch.empty(shape, dtype=part.dtype, device=part.device)
        inside = part[0, :, _scaled(rows.inside, ratio), _scaled(columns.inside, ratio)]
        whole[view, :, _scaled(rows.kept, ratio), _scaled(columns.kept, ratio)] = inside
    assert whole is not None
    return whole


class Span(NamedTuple):
    """One tile along one side."""

    seen: slice  # of the input
    kept: slice  # of the input, without its surroundings
    inside: slice  # the same, counted from where `seen` begins


def spans(length: int, tile: int, reach: int) -> Iterator[Span]:
    """Tiles of one side, each with so much around it."""
    for start in range(0, length, tile):
        end = min(start + tile, length)
        first, last = max(start - reach, 0), min(end + reach, length)
        yield Span(slice(first, last), slice(start, end), slice(start - first, end - first))


def _scaled(part: slice, ratio: float) -> slice:
    return slice(round(part.start * ratio), round(part.stop * ratio))
