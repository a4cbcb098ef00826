"""Views of a scene that never was: one picture cut into layers of depth, seen by several cameras.

    depth field --thresholds--> layers, each nearer one inside the last         the picture's pixels, by layer
    what a layer hides of the one behind: that one's own filler (the picture mirrored), the same for all cameras
    camera k: homography H_k for all layers, then layer l moved by baseline_k * disparity_l; nearer layers cover

Photographs of one place taken by hand hold little parallax; here it can be any amount, with true occlusion.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from mvcodec.training.data import Picture

LAYERS = 3
MARGIN = 0.25  # of the crop's side: how much of the picture around the crop the cameras may see
MAX_PARALLAX = 0.15  # of the side: how far the nearest layer moves against the farthest
MAX_TILT = 0.08  # homography: rotation in radians, scale; perspective a tenth of it over the crop


@dataclass(frozen=True)
class Camera:
    """Where a view looks from: source = homography @ target (pixels about the centre), and the layers' baseline."""

    homography: NDArray[np.float64]  # [3, 3]
    baseline: tuple[float, float]  # (rows, columns) that a layer of disparity 1 moves

    @staticmethod
    def still() -> Camera:
        return Camera(np.eye(3), (0.0, 0.0))


def smooth_field(height: int, width: int, rng: np.random.Generator, cells: int = 4) -> NDArray[np.float64]:
    """Random [H, W] in 0..1 with `cells` bumps a side: the depth of a scene of a few blobs."""
    coarse = torch.from_numpy(rng.random((1, 1, cells, cells)))
    field = F.interpolate(coarse, (height, width), mode="bicubic", align_corners=True)[0, 0].numpy()
    return (field - field.min()) / (np.ptp(field) + 1e-12)


def layer_index(field: NDArray[np.float64], layers: int = LAYERS) -> NDArray[np.int64]:
    """[H, W] in 0 (farthest) .. layers - 1; each layer beyond the first gets an equal share of the nearer half."""
    edges = np.quantile(field, np.linspace(0.5, 1, layers)[:-1])
    return np.digitize(field, edges)


def render(
    picture: Tensor, index: NDArray[np.int64], disparities: list[float], camera: Camera, size: tuple[int, int]
) -> NDArray[np.uint8]:
    """The central [*size, 3] uint8 of what `camera` sees. picture [3, H, W] in [0, 1], index [H, W] of layers.

    A camera that stands still sees the picture itself.
    """
    _, height, width = picture.shape
    rows, columns = (
        at - (own - 1) / 2.0 + (whole - own) % 2 / 2  # whole pixels of the picture
        for at, own, whole in zip(np.mgrid[: size[0], : size[1]], size, (height, width), strict=True)
    )
    target = np.stack((columns, rows, np.ones_like(rows)))
    x, y, w = np.einsum("ij,jhw->ihw", camera.homography, target)
    x, y = x / w, y / w
    filler = picture.flip(2)
    seen = torch.zeros(3, *size)
    for layer, disparity in enumerate(disparities):
        own = torch.from_numpy(index == layer)
        reaches = torch.from_numpy(index >= layer).float()[None]
        content = torch.cat((torch.where(own, picture, filler), reaches))[None]
        down, right = (disparity * b for b in camera.baseline)
        grid = np.stack(((x - right) * 2 / (width - 1), (y - down) * 2 / (height - 1)), axis=-1)
        flow = torch.from_numpy(grid).float()[None]
        colours = F.grid_sample(content[:, :3], flow, "bicubic", "reflection", align_corners=True)[0]
        alpha = F.grid_sample(content[:, 3:], flow, "bilinear", "border", align_corners=True)[0]
        seen = seen.lerp(colours, alpha)
    return (255 * seen.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def random_camera(size: tuple[int, int], rng: np.random.Generator) -> Camera:
    """A small turn, change of scale and perspective, and a baseline."""
    angle, scale = rng.uniform(-MAX_TILT, MAX_TILT), 1 + rng.uniform(-MAX_TILT, MAX_TILT)
    cos, sin = scale * np.cos(angle), scale * np.sin(angle)
    perspective = rng.uniform(-0.1 * MAX_TILT, 0.1 * MAX_TILT, 2) / size[::-1]
    homography = np.array([[cos, -sin, 0], [sin, cos, 0], [*perspective, 1]])
    down, right = rng.uniform(-MAX_PARALLAX, MAX_PARALLAX, 2) * size
    return Camera(homography, (float(down), float(right)))


def synthetic_views(picture: Picture, views: int, size: tuple[int, int], rng: np.random.Generator) -> Picture:
    """[K, *size, 3] uint8: a random place of `picture` [H, W, 3] seen by K cameras; one of them stands still."""
    height, width = (min(whole, int(own * (1 + 2 * MARGIN))) for whole, own in zip(picture.shape, size, strict=False))
    top, left = (
        int(rng.integers(whole - part + 1)) for whole, part in zip(picture.shape, (height, width), strict=False)
    )
    part = picture[top : top + height, left : left + width].copy()
    tensor = torch.from_numpy(part).permute(2, 0, 1).float() / 255
    index = layer_index(smooth_field(height, width, rng))
    disparities = [0.0, *np.sort(rng.uniform(0.2, 1, LAYERS - 1)).tolist()]
    cameras = [Camera.still(), *(random_camera(size, rng) for _ in range(views - 1))]
    seen = [render(tensor, index, disparities, camera, size) for camera in cameras]
    return np.stack([seen[i] for i in rng.permutation(views)])
