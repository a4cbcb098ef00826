"""Model files: what is wrong with one is said, and nothing wrong is loaded."""

import copy
import json
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from mvcodec.codec import encode_image
from mvcodec.errors import ModelError
from mvcodec.exact.stored import load_tensors
from mvcodec.images import Image
from mvcodec.parahydra import ParaHydra
from mvcodec.weights import FORMAT, available_models, find_model, load_model, read_model_file
from tests.conftest import smooth_picture


def rewritten(source, target, change):
    tensors, config, _ = read_model_file(source)
    metadata = {"format": FORMAT, "config": json.dumps(config.to_dict())}
    change(tensors, metadata)
    save_file(tensors, target, metadata)
    return target


def test_loaded_weights_are_the_exported_ones_in_half_precision(tiny_model_file, tiny_model):
    stored = load_file(tiny_model_file)
    assert stored["g_a.klt.weight"].dtype == torch.float16
    assert torch.equal(tiny_model.net.g_a.klt.weight, stored["g_a.klt.weight"].float())
    assert stored["h_s.conv3.weight"].dtype == torch.int16
    assert stored["para_em.unit"].dtype == torch.int32


def test_id_depends_on_the_entropy_path(tiny_model_file, tiny_model, tmp_path):
    def change(tensors, metadata):
        tensors["h_s.conv3.bias"][0] += 1

    other = load_model(rewritten(tiny_model_file, tmp_path / "m.safetensors", change))
    assert len(other.id) == 8
    assert other.id != tiny_model.id


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: t.pop("tables.hyper.counts"), "tables.hyper.counts is missing"),
        (lambda t, m: t["tables.gaussian.counts"].add_(1), "sum"),
        (lambda t, m: t.pop("h_s.conv3.fraction_bits"), "h_s.conv3.fraction_bits is missing"),
        (lambda t, m: t.update({"h_s.conv3.weight": t["h_s.conv3.weight"].half()}), "no exact arithmetic without"),
        (lambda t, m: t["h_s.conv3.fraction_bits"].fill_(0), "fraction bits"),
        (lambda t, m: t["h_s.conv3.input_limit"].fill_(0), "input limit"),
        (lambda t, m: t["para_em.ln_spread"].fill_((1 << 24) + 1), "float32 would round"),
        (
            lambda t, m: m.update(config=m["config"].replace('"attention_tile": 16', '"attention_tile": 0')),
            "no exact form",
        ),
        (lambda t, m: m.update(config="[]"), "no valid configuration"),
        (lambda t, m: m.update(config="[" * 5000), "no valid configuration"),
        (lambda t, m: m.update(config=m["config"].replace('"slices": 4', '"slices": 0')), "no valid configuration"),
        (lambda t, m: m.update(config=m["config"].replace('"window": 5', '"window": 20001')), "no valid configuration"),
        (lambda t, m: m.update(config=m["config"].replace('"opam"', '"foo"')), "no valid configuration"),
        (lambda t, m: m.update(config=m["config"].replace('_tile": 16', '_tile": "16"')), "no valid configuration"),
        (lambda t, m: t.update({"tables.exp": t["tables.exp"].double()}), "no exact arithmetic"),
        (lambda t, m: t["tables.exp"][-1:].fill_(-5), "falling table"),
        (lambda t, m: t["para_em.unit"].zero_(), "powers of two"),
        (lambda t, m: t["para_em.unit"].fill_(3 * 65536), "powers of two"),
        (lambda t, m: t["tables.sigma_thresholds"].zero_(), "rising"),
        (lambda t, m: t["tables.exp"].zero_(), "falling table"),
        (lambda t, m: t.pop("g_a.klt.weight"), "do not fit their configuration"),
        (lambda t, m: m.update(config="{}["), "no valid configuration"),
        (lambda t, m: m.update(config=m["config"].replace('"block_channels": 16', '"block_channels": 2048')), "larger"),
        (lambda t, m: t["para_jd.fine.stage4.branch.leave.bias"].fill_(float("nan")), "something else than finite"),
        (lambda t, m: t.update({"gain.log_gain": t["gain.log_gain"].long()}), "something else than finite"),
        (lambda t, m: m.update(format="other"), "not an mvcodec model file"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tiny_model_file, tmp_path, change, message):
    with pytest.raises(ModelError, match=message):
        load_model(rewritten(tiny_model_file, tmp_path / "bad.safetensors", change))


def test_a_file_that_is_no_model_is_refused(tmp_path):
    (tmp_path / "junk.safetensors").write_bytes(b"junk" * 100)
    with pytest.raises(ModelError, match="not a readable model file"):
        load_model(tmp_path / "junk.safetensors")
    with pytest.raises(ModelError, match="does not exist"):
        load_model(tmp_path / "absent.safetensors")
    (tmp_path / "a.png").touch()
    with pytest.raises(ModelError, match=r"a\.png is no model file"):
        load_model(tmp_path / "a.png")


def test_unknown_names_list_the_known_ones(tiny_model_file, monkeypatch):
    monkeypatch.setenv("MVCODEC_MODELS", str(tiny_model_file.parent))
    assert tiny_model_file in available_models()
    assert find_model("tiny") == tiny_model_file
    with pytest.raises(ModelError, match=r"no model named 'huge'; available: .*tiny"):
        find_model("huge")


def test_a_folder_of_models_that_is_none_is_told(monkeypatch, tmp_path):
    monkeypatch.setenv("MVCODEC_MODELS", str(tmp_path / "absent"))
    with pytest.raises(ModelError, match=r"\$MVCODEC_MODELS: .*absent is no folder"):
        available_models()


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_a_model_is_the_same_whatever_torch_takes_by_default(tiny_model_file, tiny_model, default):
    """Of the numbers that belong to no convolution bfloat16 would round some away, and with them the integers."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        with torch.device("meta"):
            found = load_model(tiny_model_file)
    finally:
        torch.set_default_dtype(before)
    for name, value in tiny_model.net.state_dict().items():
        same = found.net.state_dict()[name]
        assert same.dtype == value.dtype
        assert torch.equal(same, value)


def test_numbers_that_would_be_rounded_are_refused(tiny_model_file):
    tensors, config, _ = read_model_file(tiny_model_file)
    para_em = ParaHydra(config).para_em.bfloat16()
    with pytest.raises(ModelError, match="bfloat16 does not hold what is stored"):
        load_tensors(para_em, tensors, "para_em.")


def test_gradients_through_a_model_first_loaded_in_inference_mode(tiny_model_file):
    with torch.inference_mode():
        model = load_model(tiny_model_file)
    assert not any(x.is_inference() for x in model.net.state_dict().values())
    assert encode_image(model, Image(smooth_picture(60, 60)), 50, effort=1)


def test_a_copied_model_writes_the_same_file(tiny_model):
    image = Image(smooth_picture(60, 60))
    for other in (copy.deepcopy(tiny_model), pickle.loads(pickle.dumps(tiny_model))):
        assert encode_image(other, image, 50) == encode_image(tiny_model, image, 50)
