"""The entropy path in exact arithmetic: near the float networks, one result on all back ends, safe operations."""

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mvcodec import selftest, weights
from mvcodec.codec import encode_image
from mvcodec.container import unpack
from mvcodec.errors import DesyncError
from mvcodec.exact.arithmetic import FLOAT, use
from mvcodec.exact.conv import Conv
from mvcodec.exact.proof import Backend
from mvcodec.exact.quantise import fix, learn, quantise
from mvcodec.exact.stored import exact_layers
from mvcodec.images import Image
from mvcodec.latents import decode_latents
from mvcodec.nn.para_em import ParaEM
from tests.conftest import smooth_picture

# Operations that give the same bits on every processor, with any number of threads: data movement, comparisons, IEEE
# single operations, and sums of products, which `proof` bounds; addcmul, which rounds once or twice, where nothing is
# to be rounded. No exp, no softmax, no sqrt, no float mean.
SAFE = {
    "_to_copy", "_unsafe_view", "add", "add_", "addcmul", "addcmul_", "alias", "amax", "bmm", "bucketize", "cat",
    "clamp", "clamp_", "clone", "constant_pad_nd", "convolution", "copy_", "detach", "div", "div_", "empty_like",
    "expand", "floor", "floor_", "full", "full_like", "index_select", "leaky_relu_", "lift_fresh",
    "mkldnn_convolution", "mul", "mul_", "new_empty", "new_zeros", "permute", "relu", "rsub", "select", "slice",
    "split", "stack", "sub", "sum", "transpose", "unbind", "unsqueeze", "view", "zeros_like",
}  # fmt: skip


class Watch(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*args, **(kwargs or {}))


def test_the_decode_path_is_made_of_safe_operations_alone(tiny_model):
    stream = unpack(encode_image(tiny_model, Image(smooth_picture(64, 64)), 60))
    with torch.no_grad(), Watch() as watch:  # inference mode would hide what composite operations are made of
        decode_latents(tiny_model, stream)
    assert sorted(watch.names - SAFE) == []
    assert {"convolution", "bmm", "index_select"} <= watch.names  # it did watch


@pytest.mark.parametrize(
    "check", [c for c in selftest.CHECKS if c is not selftest.surroundings], ids=lambda c: c.__name__
)
def test_selftest_passes(tiny_model, check):
    with torch.inference_mode():
        assert check(tiny_model)


@pytest.mark.slow
def test_threads_libraries_and_lesser_processors_give_one_digest(tiny_model):
    assert "one digest" in selftest.surroundings(tiny_model)


def test_selftest_finds_a_machine_that_rounds(tiny_model_file):
    from mvcodec.weights import load_model

    model = load_model(tiny_model_file)
    layer = model.net.h_s.conv3
    layer.rounded = (layer.rounded[0] + 2.0**-3, *layer.rounded[1:])
    with torch.inference_mode(), pytest.raises(DesyncError, match=r"h_s\.conv3"):
        selftest.extreme_inputs(model)


def test_a_machine_that_rounds_float32_is_noticed_when_a_model_is_loaded(tiny_model_file, tmp_path, monkeypatch):
    """As oneDNN's fast math does where the processor has it: operands of a convolution become bfloat16."""
    exact = Conv._sum
    monkeypatch.setattr(Conv, "_sum", lambda self, x, w, b: exact(self, x.bfloat16().to(x), w.bfloat16().to(w), b))
    copied = tmp_path / "tiny.safetensors"
    copied.write_bytes(tiny_model_file.read_bytes())
    monkeypatch.setattr(weights, "_checked", set)  # as in a new process
    with pytest.raises(DesyncError, match="does not add exactly"):
        weights.load_model(copied)


def test_where_the_environment_allows_rounding_float64_is_used(tiny_model, tiny_model_file, monkeypatch):
    monkeypatch.setenv("ONEDNN_DEFAULT_FPMATH_MODE", "BF16")
    careful = weights.load_model(tiny_model_file)
    assert {layer.backend for layer in selftest.entropy_layers(careful).values()} == {Backend.FLOAT64}
    assert selftest.walk_digest(careful) == selftest.walk_digest(tiny_model)


SWITCHES = [
    {"raw_slices": True},
    {"shared_source": False},
    {"channel_context": "plain"},
    {"channel_context": "hpa"},
    {"channel_context": "vpa"},
    {"channel_context": "average"},
    {"channel_context": "attention2d"},
    {"global_context": "mlic"},
    {"tile": 4},
]


def entropy_model(**switches) -> ParaEM:
    torch.manual_seed(0)
    model = ParaEM(16, 8, 8, 4, (12,), **switches)
    for part in model.models:
        for net in (part.anchor_parameters, part.other_parameters):
            torch.nn.init.normal_(net.last.weight, std=0.1)
    return model


def parameters(model: ParaEM, values, hyper):
    """Every step's mu and ln sigma, with given decoded values."""
    found = []

    def code(step, mu, ln_sigma):
        found.append(torch.cat([mu.double(), ln_sigma.double()]))
        return values[step].to(mu.dtype)

    model(hyper, torch.zeros(1, dtype=hyper.dtype), code)
    return found


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_exact_is_near_float(switches, narrow):
    model = entropy_model(**switches)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randint(-3, 4, (1, 4, 8, 4), generator=generator).float() for _ in range(8)]
    hyper = torch.randn(1, 8, 8, 8, generator=generator)
    with torch.no_grad():
        wanted = parameters(model, values, hyper)
        quantise(model, (lambda: parameters(model, values, hyper)) if narrow else None)
        fix(model)
        found = parameters(model, values, (hyper * 256).round())
    spread = torch.cat([w.flatten() for w in wanted]).std()
    error = torch.cat([(f - w).flatten() for f, w in zip(found, wanted, strict=True)]).abs()
    # The median: random networks have knife-edge softmaxes, at which any rounding may choose the other side.
    assert error.median() < (0.03 if narrow else 0.005) * spread
    for values_of_step in found:  # dyadic numbers: what all machines can agree on
        assert torch.equal(values_of_step * 2**40, (values_of_step * 2**40).round())


def test_training_with_rounding_lowers_the_loss_of_the_rounded_network():
    model = entropy_model(raw_slices=True)
    generator = torch.Generator().manual_seed(1)
    values = [torch.randint(-3, 4, (1, 4, 8, 4), generator=generator).float() for _ in range(8)]
    hyper = torch.randn(1, 8, 8, 8, generator=generator)
    with torch.no_grad():
        quantise(model, lambda: parameters(model, values, hyper))
    fix(model)
    learn(model, True)
    rounded = (hyper * 256).round()

    def loss():
        steps = parameters(model, values, rounded)
        return sum((p[:1] - v).square().mean() for p, v in zip(steps, values, strict=True))

    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    before = loss().item()
    for _ in range(30):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
    learn(model, False)  # integers anew, from the trained weights
    with torch.no_grad():
        assert loss().item() < 0.7 * before


def test_float_networks_do_not_change_by_being_quantised_and_back(tiny_model):
    net = copy.deepcopy(tiny_model.net.para_em)
    use(FLOAT, net)
    assert all(layer.integers is not None for layer in exact_layers(net).values())
    for layer in exact_layers(net).values():
        x = torch.randn(1, layer._channels[1], 4, 4)
        assert torch.isfinite(layer(x)).all()
