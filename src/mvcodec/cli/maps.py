"""Pictures of who helped where: per view and peer the peer's share, red to green (ParaHydra Fig. 1)."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mvcodec import images
from mvcodec.errors import UsageError
from mvcodec.files import atomic
from mvcodec.frames import Source, safe_path, shortened

LONGEST = 255  # bytes that a name may have
FULL = 0.5  # share from which green is pure: a view and one peer that count alike


def colours(share: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shares [H, W] of 255 -> [H, W, 3]: red for nothing, yellow for a quarter, green for a half and more."""
    x = np.minimum(share / (255 * FULL), 1)
    rgb = np.stack((np.minimum(2 - 2 * x, 1), np.minimum(2 * x, 1), np.zeros_like(x)), axis=-1)
    picture: NDArray[np.uint8] = (255 * rgb).round().astype(np.uint8)
    return picture


def _named(view: str, peer: str) -> str:
    """VIEW.from_PEER.png, of a long name the beginning and a hash."""
    ending = f".from_{peer}.png"
    raw, room = os.fsencode(view), LONGEST - len(os.fsencode(ending))
    return f"{view if len(raw) <= room else shortened(raw, raw, room)}{ending}"


class Maps:
    """Where the maps of each view go: `DIR/view.from_PEER.png`, folders as those of the inputs."""

    def __init__(self, folder: str, views: Iterable[Source], force: bool, skip_existing: bool) -> None:
        """Raise UsageError, before any work is done, where `folder` is a file or maps of a view are there already."""
        self.folder, self.skip_existing = Path(folder), skip_existing
        if self.folder.is_file():
            raise UsageError(f"--maps {folder}: is a file, not a folder")
        for view in views:
            place = self.folder / view.relative
            for path in [] if force or skip_existing else sorted(place.parent.glob("*.png")):
                if path.name.startswith(f"{place.stem}.from_"):
                    raise UsageError(f"{path}: exists; overwrite with -f")

    def paths(self, view: Source, peers: Iterable[str]) -> list[Path]:
        """Where the map of each peer goes, in the order of their camera ids."""
        paths: list[Path] = []
        for number, peer in enumerate(peers):
            name = str(safe_path(peer, None, None)) if peer else f"view{number}"
            path = self.folder / view.relative.with_name(_named(view.relative.stem, name))
            if path in paths:  # of another id, equal but for what no file name may hold
                path = path.with_name(f"{path.stem}.{number}.png")
            paths.append(path)
        return paths

    def write(self, view: Source, peers: Iterable[str], shares: NDArray[np.uint8]) -> list[Path]:
        """One picture per peer, of shares [S, H, W]; -> their paths."""
        paths = self.paths(view, peers)
        for path, share in zip(paths, shares, strict=True):
            if self.skip_existing and path.exists():
                continue
            with atomic(path) as file:
                file.write(images.to_bytes(images.Image(colours(share)), ".png"))
        return paths
