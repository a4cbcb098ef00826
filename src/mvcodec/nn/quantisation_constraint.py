"""Back into the quantiser's cells: a decoded picture, analysed again, must give about the integers it was decoded from.

    picture --g_a, gain--> y --less y_hat--> how far from the middle of its cell --beyond REACH--> excess
    picture - (the KLT's inverse of the excess, gain undone)

The picture that was encoded lies in its cells, |y - y_hat| <= 1/2 for each coefficient: a convex set if g_a were
linear, and projection onto a convex set brings a picture nearer to every point of it (Zakhor, "Iterative procedures for
reduction of blocking effects in transform image coding", 1992). Coefficients near the border of their cell are mostly
wrong, so the cells are made narrower (Park and Kim, "Theory of projection onto the narrow quantization constraint set",
1999). No network and no peer needs to be trusted for this: it bounds what they may do.
"""

import torch.nn.functional as F
from torch import Tensor

from mvcodec.nn.transforms import BLOCK, KltSynthesisCoarse

# On training scenes the mean of y - y_hat, given where the decoded picture has its y, turns back from about here.
REACH = 0.36  # of a quantiser step
STEP = (0.7, 1.15)  # share of the excess that is taken back, at quality 0 and 1


def excess(y: Tensor, y_hat: Tensor) -> Tensor:
    """What of y [K, M, h, w], of decoded pictures, is further than REACH from the y_hat they were decoded from."""
    apart = y - y_hat
    return apart - apart.clamp(-REACH, REACH)


def correction(coarse: KltSynthesisCoarse, astray: Tensor, inverse_gain: Tensor, quality: Tensor) -> Tensor:
    """What to subtract from pictures [K, 3, 16 h, 16 w].

    astray: their `excess` [K, M, h, w]; inverse_gain [K, M, 1, 1]; quality [K] in [0, 1].
    """
    low, high = STEP
    step = (low + (high - low) * quality)[:, None, None, None]
    blocks = F.conv2d(step * inverse_gain * astray, coarse.klt.weight)
    return F.pixel_shuffle(F.pixel_shuffle(blocks, 2), BLOCK)
