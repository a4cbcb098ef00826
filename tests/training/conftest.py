"""A folder of two small scenes whose views are shifted crops of one picture."""

from __future__ import annotations

import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvcodec.training.checkpoint import Ema
from mvcodec.training.config import TrainConfig
from mvcodec.training.loop import train
from tests.conftest import smooth_picture

SHIFT = (16, 24)  # rows, columns: multiples of 8, the resolution of the global search


@pytest.fixture(scope="session")
def scenes_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    for scene in range(2):
        cells = np.random.default_rng(scene).integers(0, 24, (24, 32, 3)).repeat(8, axis=0).repeat(8, axis=1)
        wide = (smooth_picture(192, 256, seed=scene) // 2 + cells).astype(np.uint8)  # waves alone match themselves
        for view in range(2):
            top, left = view * SHIFT[0], view * SHIFT[1]
            path = folder / f"scene{scene}" / f"view{view}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(wide[top : top + 160, left : left + 192]).save(path)
    return folder


@pytest.fixture
def after_single(scenes_folder: Path, tmp_path: Path) -> TrainConfig:
    """Of a run of a later stage, which is still to be named: it begins where one step of stage `single` ended."""
    folder = str(tmp_path / "single")
    single = TrainConfig(str(scenes_folder), folder, profile="tiny", steps=1, batch=1, crop=64, threads=1)
    return replace(single, batch=2, crop=TrainConfig.crop, start_from=str(train(single, False)))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], None]:
    """Calls a run that Ctrl-C stops in its second step, between the weights' move and that of their averages."""
    update = Ema.update

    def interrupting(ema: Ema, model: object, step: int) -> None:
        if step == 1:
            signal.raise_signal(signal.SIGINT)
        update(ema, model, step)

    def call(run: Callable[[], object]) -> None:
        ours = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        try:
            with monkeypatch.context() as patch:
                patch.setattr(Ema, "update", interrupting)
                with pytest.raises(KeyboardInterrupt):
                    run()
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        finally:
            signal.signal(signal.SIGINT, ours)

    return call
