"""encode_image and decode_set on the untrained tiny model: bits are exact whatever the weights are."""

import dataclasses
import math
from contextlib import nullcontext
from unittest.mock import patch

import numpy as np
import pytest
import torch

from mvcodec import codec
from mvcodec import latents as latents_module
from mvcodec.codec import decode_set, encode_image, in_frames
from mvcodec.container import Damage, Stream, pack, unpack
from mvcodec.errors import BitstreamError, DesyncError, ModelError, UsageError
from mvcodec.images import Image
from mvcodec.latents import decode_intact, decode_latents, encode_latents, snap
from mvcodec.parahydra import ParaHydra, config_for
from mvcodec.weights import export_model, load_model
from tests.conftest import smooth_picture


def encoded(model, height=48, width=80, seed=0, quality=60.0, **header) -> bytes:
    return encode_image(model, Image(smooth_picture(height, width, seed)), quality, **header)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.mean((a.astype(float) - b) ** 2)))


def test_decoder_recovers_the_encoders_latents_exactly(tiny_model):
    torch.manual_seed(0)
    y = 3 * torch.randn(1, 32, 8, 12)
    z = 2 * torch.randn(1, 16, 2, 3)
    latents = encode_latents(tiny_model, y, z, 0.42)
    header = dataclasses.replace(unpack(encoded(tiny_model)).header, width=192, height=128, quality=42.0)
    decoded = decode_latents(tiny_model, Stream(header, latents.hyper, latents.slices))
    assert all(torch.equal(found, sent) for found, sent in zip(decoded, latents.latents(), strict=True))
    assert (decoded.y_hat * 64 == (decoded.y_hat * 64).round()).all()  # on the grid
    zero = torch.zeros(1, 1, 1, 1)
    coded = snap(zero, zero, tiny_model.sigma_thresholds)[1]  # sigma 1 is coded, not skipped
    assert coded > 0


def test_one_walk_for_many_views_decodes_what_one_for_each_does(tiny_model):
    """Each at its own quality; one that cannot be decoded, and one that is cut, leave the others as they are."""
    whole = [encoded(tiny_model, 70, 100, seed=k, quality=20 + 30 * k) for k in range(3)]
    streams = [unpack(file) for file in whole]
    streams.append(dataclasses.replace(streams[0], slices=tuple(reversed(streams[0].slices))))  # not its integers
    streams.append(unpack(whole[1][:-40], partial=True))
    with torch.inference_mode():
        together = decode_intact(tiny_model, streams)
        alone = [decode_intact(tiny_model, [stream])[0] for stream in streams]
    assert isinstance(together[3], DesyncError)
    assert str(together[3]) == str(alone[3])
    for one, other in zip(together[:3] + together[4:], alone[:3] + alone[4:], strict=True):
        assert all(torch.equal(*x) for x in zip(one[0], other[0], strict=True))
        assert one[1] == other[1]


def test_what_is_cut_for_wrong_integers_is_told_by_the_sections_that_the_file_has(lattice_model):
    stream = unpack(encoded(lattice_model, 70, 100))
    first, second, *_ = stream.slices
    wrong = dataclasses.replace(second, check=second.check ^ 1)
    damage = Damage("file CRC mismatch", 9, ())
    short = dataclasses.replace(stream, slices=(first, wrong), count=2, damage=damage)
    with torch.inference_mode():
        ((_, kept),) = decode_intact(lattice_model, [short])
    assert kept.slices == (first,)
    assert kept.damage is not None
    assert kept.damage.missing == ("slice 1 anchor", "slice 1 non-anchor")


@pytest.mark.parametrize("elsewhere", [(), ("cpu",)], ids=["at once", "beside the network"])
def test_a_section_that_is_not_the_code_of_its_symbols_is_found(tiny_model, monkeypatch, elsewhere):
    """Only coding its symbols once more shows it, perhaps when later steps are done already."""
    monkeypatch.setattr("mvcodec.latents.ELSEWHERE", elsewhere)
    stream = unpack(encoded(tiny_model, 70, 100))
    slices = list(stream.slices)
    slices[1] = dataclasses.replace(slices[1], sections=(slices[1].sections[0] + b"\1", slices[1].sections[1]))
    with torch.inference_mode():
        (found,) = decode_intact(tiny_model, [dataclasses.replace(stream, slices=tuple(slices))])
        assert isinstance(found, DesyncError)
        assert str(found).startswith("slice 1: entropy-coded section is not the shortest code")
        slices[3] = dataclasses.replace(slices[3], sections=(b"\xff" * 40, slices[3].sections[1]))
        (other,) = decode_intact(tiny_model, [dataclasses.replace(stream, slices=tuple(slices))])
    assert str(other) == str(found)  # the first that is wrong, whichever thread found another


def test_views_of_one_size_are_decoded_in_one_walk_and_none_where_memory_is_short(tiny_model, monkeypatch):
    files = [
        encoded(tiny_model, *size, seed=k, camera_id=str(k)) for k, size in enumerate([(70, 100), (30, 40), (66, 90)])
    ]
    walks = []
    monkeypatch.setattr(
        codec, "decode_intact", lambda model, views: walks.append(len(views)) or decode_intact(model, views)
    )
    together = decode_set(tiny_model, files)
    monkeypatch.setattr(codec, "pixels_in_walks", lambda *_: 0)
    for one, other in zip(together, decode_set(tiny_model, files), strict=True):
        assert np.array_equal(one.pixels, other.pixels)
    assert walks == [2, 1, 1, 1, 1]


def test_quality_buys_fidelity_with_bytes(tiny_model):
    picture = smooth_picture(128, 192)
    files = [encode_image(tiny_model, Image(picture), q) for q in (0, 50, 100)]
    fidelity = [psnr(picture, decode_set(tiny_model, [f])[0].pixels) for f in files]
    assert len(files[0]) < len(files[1]) < len(files[2])
    assert fidelity[0] < fidelity[1] < fidelity[2]
    assert fidelity[2] > 30


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 70), (63, 64), (65, 64), (64, 128), (100, 37)])
def test_every_size_comes_back_in_its_size(tiny_model, height, width):
    (view,) = decode_set(tiny_model, [encoded(tiny_model, height, width)])
    assert view.pixels.shape == (height, width, 3)


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_any_number_of_views_of_different_sizes_and_qualities(tiny_model, count):
    files = [
        encoded(tiny_model, 40 + 8 * k, 90 - 8 * k, seed=k, quality=10 * k, camera_id=f"cam{k}") for k in range(count)
    ]
    views = decode_set(tiny_model, files)
    assert [v.pixels.shape for v in views] == [(40 + 8 * k, 90 - 8 * k, 3) for k in range(count)]
    assert [len(v.peers) for v in views] == [count - 1] * count


def test_strips_that_no_common_frame_holds_are_decoded_apart(tiny_model):
    shapes = {"tall": (640, 10), "wide": (10, 640), "wider": (20, 600), "thin": (600, 10)}
    files = [encoded(tiny_model, *size, camera_id=name) for name, size in shapes.items()]
    views = {view.header.camera_id: view for view in decode_set(tiny_model, files, maps=True)}
    assert {name: view.pixels.shape[:2] for name, view in views.items()} == shapes
    assert {name: view.peers for name, view in views.items()} == {
        "tall": ("thin",),
        "thin": ("tall",),
        "wide": ("wider",),
        "wider": ("wide",),
    }
    assert views["wide"].maps.shape == (1, 10, 640)


def test_upright_and_lying_pictures_share_a_frame():
    assert in_frames([(40, 60), (60, 40), (15, 20)]) == [[0, 1, 2]]
    assert in_frames([(1, 4096), (4096, 1), (1, 3000)]) == [[0, 2], [1]]


def test_tiny_views_beside_a_large_one_do_not_cost_a_large_one_each():
    """A file of a hundred bytes may make the work of the others no more than a few times as large."""
    sizes = [(1, 1)] * 9 + [(512, 640)] + [(1, 1)] * 11
    groups = in_frames(sizes)
    assert sorted(k for group in groups for k in group) == list(range(21))
    pairs = sum(len(g) ** 2 * max(sizes[k][0] for k in g) * max(sizes[k][1] for k in g) for g in groups)
    assert pairs <= 4 * sum(math.sqrt(height * width) for height, width in sizes) ** 2
    assert in_frames([(512, 640)] * 6) == in_frames([(512, 640), (640, 512)] * 3) == [list(range(6))]


def test_tiny_views_that_are_left_out_are_decoded_whatever_their_order(tiny_model):
    sizes = [(256, 256), *[(1, 1)] * 5, (1, 30)]
    files = [encoded(tiny_model, *size, camera_id=f"cam{k}", seed=k) for k, size in enumerate(sizes)]
    views = decode_set(tiny_model, files)
    assert [view.pixels.shape[:2] for view in views] == sizes
    assert {frozenset({view.header.camera_id, *view.peers}) for view in views} == {
        frozenset({"cam0", "cam1", "cam2"}),
        frozenset({"cam3", "cam4", "cam5", "cam6"}),
    }
    for one, other in zip(views, decode_set(tiny_model, files[::-1]), strict=True):
        assert (one.header, one.peers) == (other.header, other.peers)
        assert np.array_equal(one.pixels, other.pixels)


def test_arrays_seen_backwards_are_pictures_too(tiny_model):
    picture = smooth_picture(64, 128)
    for turned in (picture[::-1], picture[..., ::-1]):
        assert encode_image(tiny_model, Image(turned), 50) == encode_image(tiny_model, Image(turned.copy()), 50)


def test_argument_order_never_changes_a_result(tiny_model):
    files = [encoded(tiny_model, seed=k, camera_id=f"cam{k}") for k in range(3)]
    forward, backward = decode_set(tiny_model, files), decode_set(tiny_model, files[::-1])
    assert [v.header.camera_id for v in backward] == ["cam0", "cam1", "cam2"]
    for a, b in zip(forward, backward, strict=True):
        assert np.array_equal(a.pixels, b.pixels)


def test_grey_and_16_bit_come_back_as_what_they_were(tiny_model):
    grey = smooth_picture(50, 60)[..., 0]
    deep = smooth_picture(50, 60).astype(np.uint16) * 257
    for pixels in (grey, deep, deep[..., 0]):
        (view,) = decode_set(tiny_model, [encode_image(tiny_model, Image(pixels), 90)])
        assert (view.pixels.shape, view.pixels.dtype) == (pixels.shape, pixels.dtype)


def test_profile_and_header_fields_survive(tiny_model):
    image = Image(smooth_picture(20, 30), icc=b"profile", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0")
    data = encode_image(tiny_model, image, 33.333, camera_id="süd", frame=7, timestamp_us=123456)
    (view,) = decode_set(tiny_model, [data])
    assert (view.header.camera_id, view.header.frame, view.header.timestamp_us) == ("süd", 7, 123456)
    assert view.header.quality == 33.33
    assert (view.image.icc, view.image.exif) == (image.icc, image.exif)


def test_quality_outside_its_range_is_refused(tiny_model):
    for quality in (-0.1, 100.5, float("nan")):
        with pytest.raises(UsageError, match="between 0 and 100"):
            encoded(tiny_model, quality=quality)


def test_a_file_of_other_weights_is_refused(tiny_model, tmp_path):
    torch.manual_seed(5)
    export_model(ParaHydra(config_for("tiny")), tmp_path / "other.safetensors")
    other = load_model(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="was written with tiny model"):
        decode_set(other, [encoded(tiny_model)])


def test_a_better_joint_decoder_keeps_the_model_id(tiny_model_file, tmp_path):
    model = load_model(tiny_model_file)
    net = ParaHydra(model.net.config)
    net.load_state_dict(model.net.state_dict())
    torch.nn.init.normal_(net.para_jd.fusions[0].fusion.gain)
    assert export_model(net.float(), tmp_path / "refined.safetensors") == model.id


def test_parameters_that_differ_are_reported_as_desynchronisation(tiny_model, tiny_model_file):
    data = encoded(tiny_model, 64, 64)
    model = load_model(tiny_model_file)
    model.net.para_em.models[0].anchor_parameters.last.plain[0].add_(128)  # another machine's arithmetic
    with pytest.raises(DesyncError, match="slice 0"):
        decode_set(model, [data])


def test_a_damaged_file_decodes_as_far_as_it_is_intact(tiny_model):
    picture = smooth_picture(128, 128)
    data = encode_image(tiny_model, Image(picture), 60)
    whole = psnr(picture, decode_set(tiny_model, [data])[0].pixels)
    stream = unpack(data)
    tail = sum(map(len, stream.slices[-1].sections)) + 4
    (view,) = decode_set(tiny_model, [data[: -tail - 1]], partial=True)
    assert view.damage is not None
    assert 10 < psnr(picture, view.pixels) < whole


def test_files_are_the_same_whatever_the_number_of_threads(tiny_model):
    threads = torch.get_num_threads()
    try:
        files = []
        for count in (1, 2):
            torch.set_num_threads(count)
            files.append(decode_latents(tiny_model, unpack(encoded(tiny_model))).y_hat)
        assert torch.equal(*files)
    finally:
        torch.set_num_threads(threads)


def test_repacking_is_identity(tiny_model):
    data = encoded(tiny_model)
    assert pack(unpack(data)) == data


def test_pictures_in_tiles_are_the_pictures(tiny_model, monkeypatch):
    monkeypatch.setattr("mvcodec.tiling.USUAL", 400 * 400)
    in_tiles = encoded(tiny_model, 448, 640)
    (tiled,) = decode_set(tiny_model, [in_tiles])
    monkeypatch.undo()
    (whole,) = decode_set(tiny_model, [in_tiles])
    assert np.abs(tiled.pixels.astype(int) - whole.pixels).max() <= 1
    assert abs(len(in_tiles) - len(encoded(tiny_model, 448, 640))) < 0.01 * len(in_tiles)  # ties may round otherwise


def test_the_least_memory_that_is_accepted_suffices_for_a_tile(tiny_model):
    image = Image(smooth_picture(48, 80))
    with pytest.raises(UsageError, match=r"need [0-9.]+G of memory"):
        encode_image(tiny_model, image, 50, max_memory=1_000_000_000)
    assert encode_image(tiny_model, image, 50, max_memory=2_000_000_000) == encode_image(tiny_model, image, 50)


def test_slices_at_the_end_that_hold_nothing_are_not_in_the_file(lattice_model):
    y, z = torch.zeros(1, 32, 8, 12), torch.zeros(1, 16, 2, 3)
    y[:, 8:16] = 5  # of slice 1 of 4
    latents = encode_latents(lattice_model, y, z, 0.42)
    assert [len(part.sections) for part in latents.slices] == [4, 2]
    header = unpack(encode_image(lattice_model, Image(smooth_picture(128, 192)), 42)).header
    stream = Stream(header, latents.hyper, latents.slices)
    data = pack(stream)
    assert unpack(data) == stream
    assert torch.equal(decode_latents(lattice_model, unpack(data)).y_hat, latents.y_hat)

    last = latents.slices[-1]
    forged = dataclasses.replace(stream, slices=(latents.slices[0], dataclasses.replace(last, check=last.check ^ 1)))
    with pytest.raises(DesyncError, match="slice 1"):
        decode_latents(lattice_model, forged)
    for slices in latents.slices[:1], latents.slices * 3:
        with pytest.raises(BitstreamError, match=f"file has {len(slices)} slices where the model has 4"):
            decode_latents(lattice_model, dataclasses.replace(stream, slices=slices, count=max(2, len(slices))))
    (view,) = decode_set(lattice_model, [data[:-6]], partial=True)  # its last byte has not arrived
    assert view.damage.missing == ("slice 1 non-anchor",)

    nothing = encode_latents(lattice_model, 0 * y, z, 0.42)
    assert len(nothing.slices) == 1
    assert torch.equal(
        decode_latents(lattice_model, Stream(header, nothing.hyper, nothing.slices)).y_hat, nothing.y_hat
    )


def test_a_last_slice_that_holds_nothing_is_refused(lattice_model):
    y, z = torch.zeros(1, 32, 8, 12), torch.zeros(1, 16, 2, 3)
    y[:, 8:16] = 5
    coded = latents_module._encode_section

    def as_if_it_held_something(coming, model):
        return coded(coming, model)._replace(holds=True)

    with patch.object(latents_module, "_encode_section", as_if_it_held_something):
        wasteful = encode_latents(lattice_model, y, z, 0.42)
    assert len(wasteful.slices) == 4
    header = unpack(encode_image(lattice_model, Image(smooth_picture(128, 192)), 42)).header
    for version, error in (2, None), (3, "last slice of the file holds nothing"):
        stream = Stream(header, wasteful.hyper, wasteful.slices, version=version)
        with pytest.raises(BitstreamError, match=error) if error else nullcontext():
            assert torch.equal(decode_latents(lattice_model, stream).y_hat, wasteful.y_hat)


def test_a_model_with_anchors_on_a_lattice_writes_version_3(tiny_model, lattice_model):
    picture = Image(smooth_picture(70, 100))
    data = encode_image(lattice_model, picture, 80)
    stream = unpack(data)
    assert stream.version == 3
    assert [len(part.sections) for part in stream.slices] == [4, 2, 2, 2]
    assert all(stream.slices[0].sections)
    (view,) = decode_set(lattice_model, [data])
    assert psnr(picture.pixels, view.pixels) > 30
    assert encode_image(lattice_model, picture, 80, effort=1) != data  # the search goes through the same passes
    for file, model in ((data, tiny_model), (encode_image(tiny_model, picture, 80), lattice_model)):
        with pytest.raises(ModelError, match="written with"):
            decode_set(model, [file])


def test_of_a_lattice_any_leading_passes_can_be_kept(lattice_model):
    """What is lost is replaced by its expectation: the first pass alone already shows the picture."""
    picture = smooth_picture(128, 192)
    data = encode_image(lattice_model, Image(picture), 80)
    whole = unpack(data)
    fidelities = []
    for kept in (1, 2, 3, 4):
        lost = [section for part in whole.slices for section in part.sections][kept:]
        stream = unpack(data[: len(data) - 4 - sum(map(len, lost))], partial=True)
        assert len(stream.slices[0].sections) == kept
        (view,) = decode_set(lattice_model, [stream], partial=True)
        fidelities.append(psnr(picture, view.pixels))
    assert fidelities == sorted(fidelities)


def test_a_version_that_the_model_does_not_write_is_refused(tiny_model, lattice_model):
    streams = [unpack(encode_image(model, Image(smooth_picture(64, 64)), 50)) for model in (tiny_model, lattice_model)]
    for model, stream in zip((lattice_model, tiny_model), streams, strict=True):
        with pytest.raises(BitstreamError, match="version"):
            decode_latents(model, stream)
