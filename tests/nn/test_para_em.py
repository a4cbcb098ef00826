"""Causality of Para-EM: what is decoded later never influences what was decoded before."""

import pytest
import torch

from mvcodec.nn.checkerboard import merge
from mvcodec.nn.entropy_parameters import EntropyParameters
from mvcodec.nn.para_em import ParaEM
from tests.nn.test_parallax_attention import maps


def entropy_model(**switches) -> ParaEM:
    torch.manual_seed(0)
    model = ParaEM(16, 8, 8, 4, (12,), **switches).double()
    for part in model.models:  # parameters that start at zero would hide every dependence
        for net in part.modules():
            if isinstance(net, EntropyParameters):
                torch.nn.init.normal_(net.last.weight)
    return model


def parameters_and_values(model: ParaEM, hyper: torch.Tensor):
    """Run with free values: every step's (mu, ln sigma) and the leaf it returned as y_hat."""
    parameters, values = [], []

    def code(step, mu, ln_sigma):
        parameters.append(torch.cat([mu, ln_sigma]))
        values.append(maps(step, *mu.shape).requires_grad_())
        return values[-1]

    model(hyper, torch.zeros(1, dtype=torch.float64), code)
    return parameters, values


@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"raw_slices": True},
        {"channel_context": "plain"},
        {"channel_context": "hpa"},
        {"channel_context": "vpa"},
        {"global_context": "mlic"},
        {"anchor_lattice": True},
    ],
)
def test_parameters_depend_on_earlier_steps_only(switches):
    parameters, values = parameters_and_values(entropy_model(**switches), maps(9, 1, 8, 4, 4))
    assert len(parameters) == 8 + 2 * switches.get("anchor_lattice", False)  # 4 slices x (anchors, non-anchors)
    for step, found in enumerate(parameters):
        gradients = torch.autograd.grad(found.sum(), values, allow_unused=True, retain_graph=True) if step else []
        for source, gradient in enumerate(gradients):
            reached = gradient is not None and bool((gradient != 0).any())
            if source >= step:
                assert not reached, f"step {step} sees step {source}"
            elif source == step - 1 or switches.get("raw_slices"):
                assert reached, f"step {step} does not see step {source}"


def test_anchors_of_a_slice_are_predicted_without_any_value_of_that_slice():
    parameters, values = parameters_and_values(entropy_model(), maps(9, 1, 8, 4, 4))
    (gradient,) = torch.autograd.grad(parameters[6].sum(), values[7], allow_unused=True)
    assert gradient is None


def test_anchors_on_a_lattice_know_their_neighbours():
    """Of the odd rows, exactly the places of the even ones that their context reaches, and those beside them first."""
    parameters, values = parameters_and_values(entropy_model(anchor_lattice=True), maps(9, 1, 8, 24, 24))
    assert [tuple(v.shape[2:]) for v in values[:4]] == [(12, 6), (12, 6), (12, 12), (24, 12)]
    place = parameters[2][0, :, 6, 6].sum()  # row 13, column 12 of the latents
    first, second = torch.autograd.grad(place, values[:2])
    even = merge(first.abs().sum(dim=1, keepdim=True), second.abs().sum(dim=1, keepdim=True))[0, 0]
    reached = {(2 * int(r), 2 * int(c) + 1) for r, c in even.nonzero()}  # among the latents
    assert {(12, 11), (12, 13), (14, 11), (14, 13)} <= reached
    assert reached == {(r, c) for r in range(6, 19, 2) for c in range(7, 20, 2)}


def test_an_untrained_model_predicts_the_prior_scale():
    model = ParaEM(16, 8, 8, 4, (12,)).double()
    model.ln_spread.fill_(0.7)
    seen = []

    def code(step, mu, ln_sigma):
        seen.append((mu, ln_sigma))
        return torch.zeros_like(mu)

    model(maps(0, 1, 8, 4, 4), torch.tensor([0.5], dtype=torch.float64), code)
    for mu, ln_sigma in seen:
        assert torch.equal(mu, torch.zeros_like(mu))
        torch.testing.assert_close(ln_sigma, torch.full_like(ln_sigma, 1.2))


@pytest.mark.parametrize("channel_context", ["opam", "average"])
def test_a_shared_source_with_equal_weights_is_each_slice_having_its_own(channel_context):
    shared = entropy_model(channel_context=channel_context)
    own = entropy_model(channel_context=channel_context, shared_source=False)
    state = shared.state_dict()
    wanted = {}
    for name in own.state_dict():
        _, found, after = name.partition(".channel_context.source.")
        wanted[name] = state["source." + after] if found else state[name]
    own.load_state_dict(wanted)
    hyper = maps(9, 1, 8, 4, 4)
    for a, b in zip(parameters_and_values(shared, hyper)[0], parameters_and_values(own, hyper)[0], strict=True):
        torch.testing.assert_close(a, b)
