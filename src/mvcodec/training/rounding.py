"""Stage `quantise`: the entropy model learns to live with its integers.

    calibration (f, r and limit of every layer) --kept--> weights rounded anew in every pass, straight-through
                                                          gradients of the rate --> integers of the averaged weights

Only h_s and Para-EM move. Their gradient from the distortion is zero: y_hat = round(y - mu) + mu does not follow mu
where rounding passes gradients straight through. So the decoder does not run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mvcodec.exact.quantise import fix, learn
from mvcodec.exact.stored import load_tensors, to_tensors
from mvcodec.parahydra import ParaHydra
from mvcodec.training.data import calibration_pictures
from mvcodec.weights import calibrate, exact_parts

Calibration = dict[str, Tensor]  # as `exact.stored` keeps it


def calibration_on(net: ParaHydra, data: Path) -> Calibration:
    """Of a network on the CPU that counts in real numbers, on pictures of a training folder."""
    calibrate(net, calibration_pictures(data))
    return to_tensors(exact_parts(net))


def count_in_integers(net: ParaHydra, calibration: Mapping[str, Tensor]) -> None:
    """Let the entropy path train with rounding, and nothing else; its weights become those of the calibration."""
    parts = exact_parts(net)
    load_tensors(parts, calibration, "")
    fix(parts)
    net.requires_grad_(False)
    learn(parts, True)


def settle(net: ParaHydra, calibration: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Load weights that were trained with this calibration, and give the entropy path their integers, for export."""
    count_in_integers(net, calibration)
    net.load_state_dict(weights)
    learn(exact_parts(net), False)
