"""Both ends of the link in Python: cameras that know nothing of each other, a sink that loses one of them.

python examples/camera_and_sink.py [FOLDER_OF_VIEWS]
"""

from __future__ import annotations

import sys
from pathlib import Path

import mvcodec


def camera(picture: Path) -> bytes:
    """What runs beside a camera: one picture in, one file out."""
    return mvcodec.encode(picture, quality=40)


def sink(received: list[bytes]) -> None:
    """What runs at the receiver: whatever arrived is decoded together."""
    for view in mvcodec.decode_set(received):
        height, width = view.pixels.shape[:2]
        helpers = ", ".join(view.peers) or "nobody"
        print(f"  {view.header.camera_id}: {width} x {height}, with the help of {helpers}")


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "nineveh"
    files = [camera(picture) for picture in sorted(folder.iterdir()) if picture.suffix != ".md"]
    print(f"{len(files)} cameras sent {sum(map(len, files))} bytes")
    sink(files)
    print("the first camera is lost")
    sink(files[1:])
