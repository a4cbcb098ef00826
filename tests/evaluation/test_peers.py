"""Each peer that is here codes a picture, better at each next setting; each that is not says why."""

import numpy as np
import pytest

from mvcodec.errors import MvcodecError
from mvcodec.evaluation import ffmpeg
from mvcodec.evaluation.metrics import psnr
from mvcodec.evaluation.peers import PEERS
from tests.conftest import smooth_picture


@pytest.mark.parametrize("peer", PEERS.values(), ids=PEERS)
def test_more_bits_buy_more_fidelity(peer):
    if reason := peer.missing():
        pytest.skip(reason)
    noise = np.random.default_rng(0).integers(-6, 7, (64, 96, 3))
    picture = (smooth_picture(64, 96).astype(int) + noise).clip(0, 255).astype(np.uint8)
    sizes, fidelities = [], []
    for setting in (peer.settings[0], peer.settings[len(peer.settings) // 2], peer.settings[-1]):
        data, (decoded,) = peer.code([picture], setting)
        assert (decoded.shape, decoded.dtype) == (picture.shape, np.uint8)
        sizes.append(len(data))
        fidelities.append(psnr(picture, decoded))
    assert sizes[0] < sizes[1] < sizes[2]
    assert fidelities[0] < fidelities[1] < fidelities[2]
    assert fidelities[2] > 30


@pytest.mark.skipif(bool(PEERS["vvc-video"].missing()), reason="no VVenC")
def test_views_as_a_video_cost_less_than_alone_and_may_differ_in_size():
    views = [smooth_picture(65, 97), smooth_picture(64, 96)]
    together, decoded = PEERS["vvc-video"].code(views, 22)
    alone = sum(len(PEERS["vvc"].code([view], 22)[0]) for view in views)
    assert len(together) < 0.9 * alone
    assert [picture.shape for picture in decoded] == [view.shape for view in views]
    assert min(psnr(view, picture) for view, picture in zip(views, decoded, strict=True)) > 35


def test_the_colour_transform_comes_back_to_one_step():
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3)).astype(np.uint8)
    back = ffmpeg.from_ycbcr(ffmpeg.to_ycbcr(picture).round())
    assert np.abs(back.astype(int) - picture).max() <= 2
    assert psnr(picture, back) > 45
    grey = np.full((2, 2, 3), 200, np.uint8)
    assert ffmpeg.to_ycbcr(grey)[:, 0, 0].round(9).tolist() == [200, 128, 128]


def test_what_is_not_here_is_said_not_raised(monkeypatch):
    monkeypatch.setattr(ffmpeg, "_ffmpegs", list)
    assert PEERS["x265"].missing() == "ffmpeg is not on PATH and imageio-ffmpeg not installed"
    monkeypatch.setattr(ffmpeg, "_ffmpegs", lambda: ["program"])
    monkeypatch.setattr(ffmpeg, "_output", lambda command, data: b" V....D libx265 ...")
    ffmpeg._ffmpeg_with.cache_clear()
    assert PEERS["x265"].missing() == ""
    assert PEERS["vvc"].missing() == "this ffmpeg was built without libvvenc"
    ffmpeg._ffmpeg_with.cache_clear()
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    assert PEERS["avif"].missing() == "this Pillow was built without avif"


@pytest.mark.skipif(bool(PEERS["x265"].missing()), reason="no x265")
def test_ffmpeg_s_failure_is_told_in_one_line():
    with pytest.raises(MvcodecError, match=r"^ffmpeg failed: Image size is too small \(8x8\)\.$"):
        PEERS["x265"].code([smooth_picture(8, 8)], 32)
