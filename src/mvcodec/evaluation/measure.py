"""Running codecs over scenes: peers one picture at a time; ours as it is used, encoded alone and decoded together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from mvcodec import codec, container
from mvcodec.errors import DesyncError, MvcodecError
from mvcodec.evaluation.peers import PEERS, Peer
from mvcodec.evaluation.points import Ledger, Point, Scene, measure
from mvcodec.images import Image
from mvcodec.weights import Model

SEPARATE, JOINT = "mvcodec separate", "mvcodec joint"
Tell = Callable[[str], None]


def usable_peers(names: Sequence[str], tell: Tell) -> list[Peer]:
    """Those of the named peers that can run here; of each other it is told why not."""
    reasons = {name: PEERS[name].missing() for name in names}
    for name, reason in reasons.items():
        if reason:
            tell(f"{name}: left out, {reason}")
    return [PEERS[name] for name in names if not reasons[name]]


def measure_peer(scene: Scene, peer: Peer, ledger: Ledger) -> list[Point]:
    """Every view at every setting. To a peer that sees one view a file, each is a scene of its own.

    MvcodecError where the peer fails, with whatever it raised: others' codecs have their limits.
    """
    groups = [scene] if peer.together else [Scene(scene.name, (view,)) for view in scene.views]
    points: list[Point] = []
    for group in groups:
        for setting in peer.settings:
            kept = [ledger.get(peer.name, peer.about, group, view, setting) for view in group.views]
            found = [point for point in kept if point is not None]
            if len(found) < len(kept):
                try:
                    data, decoded = peer.code([view.pixels for view in group.views], setting)
                except Exception as error:
                    raise MvcodecError(str(error) or type(error).__name__) from error
                share = round(len(data) / len(decoded))  # bytes of a common file
                found = [
                    measure(peer.name, peer.about, group, view, setting, share, pixels)
                    for view, pixels in zip(group.views, decoded, strict=True)
                ]
                ledger.add(found)
            points += found
    return points


def measure_ours(
    scene: Scene, model: Model, qualities: Sequence[float], ledger: Ledger, tell: Tell, effort: int = 0
) -> Iterator[Point]:
    """Every view at every quality, decoded alone and decoded together."""
    version = fingerprint(model) + (f" effort {effort}" if effort else "")
    for quality in sorted(qualities):
        kept = [ledger.get(name, version, scene, v, quality) for name in (SEPARATE, JOINT) for v in scene.views]
        points = [point for point in kept if point is not None]
        if len(points) < len(kept):
            points = _our_points(scene, model, version, quality, effort, prove=quality == max(qualities))
            ledger.add(points)
        tell(f"{scene.name}: quality {quality:g} done")
        yield from points


@torch.inference_mode()
def _our_points(scene: Scene, model: Model, version: str, quality: float, effort: int, prove: bool) -> list[Point]:
    """Code the views at one quality. The latents come from the encoder; `prove` decodes one real file as well.

    Raises DesyncError if the decoder finds other pixels than the encoder's latents give.
    """
    coded = [
        codec.encode_view(model, Image(view.pixels), quality, camera_id=view.name, effort=effort, estimate=True)
        for view in scene.views
    ]
    streams = [container.unpack(view.data) for view in coded]
    latents = [view.latents() for view in coded]
    points = []
    for name, joint in ((SEPARATE, False), (JOINT, True)):
        views = codec.views_of(model, streams, latents, joint=joint)
        decoded = [view.pixels.astype(np.uint8) for view in views]
        if prove and not joint:
            _prove(model, coded[0].data, decoded[0])
        for view, file, pixels in zip(scene.views, coded, decoded, strict=True):
            overhead = container.describe(file.data)["overhead_bytes"]
            costs = {"estimated_bytes": file.estimated_bits / 8, "overhead_bytes": overhead}
            points.append(measure(name, version, scene, view, quality, len(file.data), pixels, **costs))
    return points


def _prove(model: Model, data: bytes, expected: NDArray[np.uint8]) -> None:
    (decoded,) = codec.decode_set(model, [data], joint=False)
    if not np.array_equal(decoded.pixels, expected):
        raise DesyncError("the decoded file differs from what its encoder saw; no figure here can be trusted")


def fingerprint(model: Model) -> str:
    """16 hex digits over all weights: the model id covers the entropy model alone."""
    digest = hashlib.sha256(model.id)
    for name, value in sorted(model.net.state_dict().items()):
        digest.update(name.encode() + value.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
