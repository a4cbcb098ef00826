"""Views of one picture, turned and zoomed about its centre: how much flow is right, what joint decoding gains.

The first picture of each scene is looked at twice, as by two cameras without parallax. Flow is right where it is
within a pixel (three pixels) of what it must be, counted where both views show the place.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import mvcodec
from mvcodec import images
from mvcodec.evaluation.metrics import psnr
from mvcodec.images import Image
from mvcodec.nn.alignment import sights
from mvcodec.nn.warping import pixel_grid

SIZE = 384
CASES = [(5, 1.0), (10, 1.0), (20, 1.0), (40, 1.0), (90, 1.0), (180, 1.0)]  # degrees, zoom
CASES += [(0, 1.1), (0, 1.25), (0, 1.5), (0, 2.0), (20, 1.25)]
MARGIN = 4  # pixels from the border that do not count


def turn(degrees: float) -> Tensor:
    angle = math.radians(degrees)
    return torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def look(picture: Tensor, degrees: float, zoom: float) -> Image:
    """Half the size, times the zoom; four samples a pixel."""
    height, width = picture.shape[-2:]
    from_centre = (pixel_grid(2 * SIZE, 2 * SIZE, picture) + 0.5) / 2 - SIZE / 2
    position = (turn(degrees) @ from_centre.flatten(2)[0]).T.view(1, 2 * SIZE, 2 * SIZE, 2) * (2 / zoom)
    grid = position * picture.new_tensor([2 / width, 2 / height])
    view = F.avg_pool2d(F.grid_sample(picture, grid, padding_mode="reflection", align_corners=False), 2)
    return Image((255 * view[0].permute(1, 2, 0)).round().clamp(0, 255).byte().numpy())


def true_flow(degrees: float, zoom: float) -> Tensor:
    from_centre = pixel_grid(SIZE, SIZE, torch.zeros(1)) + 0.5 - SIZE / 2
    return zoom * (turn(degrees).T @ from_centre.flatten(2)[0]).view_as(from_centre) - from_centre


def tensor(image: Image) -> Tensor:
    return torch.tensor(image.pixels).permute(2, 0, 1)[None].float() / 255


def measure(picture: Tensor, degrees: float, zoom: float, quality: float, model: str | None) -> list[float]:
    """Shares of right flow to 1 and 3 pixels, gain in dB."""
    views = [look(picture, 0, 1.0), look(picture, degrees, zoom)]
    files = [mvcodec.encode(v, quality=quality, camera_id=str(n), model=model) for n, v in enumerate(views)]
    alone = [mvcodec.decode_set([file], joint=False, model=model)[0].image for file in files]
    together = {d.header.camera_id: d.image for d in mvcodec.decode_set(files, model=model)}
    truth = true_flow(degrees, zoom)
    target = pixel_grid(SIZE, SIZE, truth) + truth
    both = ((target > MARGIN) & (target < SIZE - 1 - MARGIN)).all(dim=1)
    flow = next(sights(torch.cat([tensor(image) for image in alone]))).flow
    error = (flow - truth).norm(dim=1)[both]
    gains = [psnr(v.pixels, together[str(n)].pixels) - psnr(v.pixels, alone[n].pixels) for n, v in enumerate(views)]
    return [float((error < 1).float().mean()), float((error < 3).float().mean()), sum(gains) / 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenes", type=Path, nargs="+", help="folders; the first picture of each is taken")
    parser.add_argument("--quality", type=float, default=40.0)
    parser.add_argument("--model", help="name or path; default: the one that is shipped")
    options = parser.parse_args()
    pictures = [tensor(images.read(min(p for p in scene.iterdir() if p.is_file()))) for scene in options.scenes]
    print("degrees  zoom  <1 px  <3 px  gain dB")
    for degrees, zoom in CASES:
        found = [measure(picture, degrees, zoom, options.quality, options.model) for picture in pictures]
        near, nearly, gain = (sum(values) / len(values) for values in zip(*found, strict=True))
        print(f"{degrees:7d}  {zoom:4.2f}  {near:5.0%}  {nearly:5.0%}  {gain:+7.3f}", flush=True)


if __name__ == "__main__":
    main()
