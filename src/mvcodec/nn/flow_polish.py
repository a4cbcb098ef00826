"""A learned last step of alignment: what linearisation alone cannot tell from coding noise.

    main, warped side --gradients, their products, means of 4x4--> normal equations of Lucas, Kanade (1981)
    their solution and their terms, scale-free --small dilated net at 1/4--> flow correction --bilinear--> full size

Classical flow is as sharp as its smoothness term is right; between coded pictures that is the limit (true pictures
aligned by flow between themselves fuse for nearly twice the gain). The net learns the term: it is trained on what
the correction does to the uncoded pictures. Zero start: an untrained polish corrects nothing.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvcodec.nn.alignment import blur, gradient

CELL = 4
CONTRAST = 20.0  # grey values in [0, 1] -> about one unit of gradient at a plain edge
DAMPING = 3e-3
DILATIONS = (1, 2, 4, 2, 1)


class FlowPolish(nn.Module):
    """See the module's docstring."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.first = nn.Conv2d(11, width, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(width, width, 3, padding=d, dilation=d) for d in DILATIONS)
        self.last = nn.Conv2d(width, 2, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, main: Tensor, warped: Tensor, consistency: Tensor) -> Tensor:
        """main, warped [N, 3, H, W], consistency [N, 1, H, W] -> what to add to the flow, [N, 2, H, W] pixels."""
        with torch.autocast(main.device.type, enabled=False):
            x = _normal_equations(_grey(main), _grey(warped), consistency.float())
        x = F.leaky_relu(self.first(x), 0.1)
        for conv in self.body:
            x = x + F.leaky_relu(conv(x), 0.1)
        correction = F.interpolate(self.last(x).float(), scale_factor=CELL, mode="bilinear", align_corners=False)
        return correction[..., : main.shape[-2], : main.shape[-1]]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Weights from before this block was there leave it at rest."""
        if not any(name.startswith(prefix) for name in state_dict):
            state_dict.update({prefix + name: value for name, value in self.state_dict().items()})
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _grey(picture: Tensor) -> Tensor:
    weights = picture.new_tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    return blur(CONTRAST * (picture * weights).sum(1, keepdim=True).float())


def _normal_equations(main: Tensor, warped: Tensor, consistency: Tensor) -> Tensor:
    """Grey pictures [N, 1, H, W] -> the step that least squares would take and how sure it is, [N, 11, H/4, W/4]."""
    dx, dy = (a / 2 + b / 2 for a, b in zip(gradient(main), gradient(warped), strict=True))
    dt = warped - main
    products = torch.cat((dx * dx, dx * dy, dy * dy, dx * dt, dy * dt, dt * dt), 1) * consistency
    xx, xy, yy, xt, yt, tt = blur(F.avg_pool2d(products, CELL, ceil_mode=True)).chunk(6, 1)
    xx, yy = xx + DAMPING, yy + DAMPING
    step = torch.cat((xy * yt - yy * xt, xy * xt - xx * yt), 1) / (xx * yy - xy * xy)
    strength, size = xx + yy, F.avg_pool2d(consistency, CELL, ceil_mode=True)
    shape = torch.cat((xx, xy, yy, xt, yt), 1) / strength
    return torch.cat((step.clamp(-2, 2), shape, 0.3 * strength.log(), 0.3 * (tt + 1e-3).log(), size, tt / strength), 1)
