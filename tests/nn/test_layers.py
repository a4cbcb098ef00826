"""The layers' two forms, one for training and one for use, are one function."""

from __future__ import annotations

import pytest
import torch

from mvcodec.nn.layers import QualityBlock, QualityBranch
from mvcodec.nn.transforms import KltAnalysis


@pytest.mark.parametrize("block", [QualityBlock(6, 10, 3), QualityBranch(6, 10, 1, 3)], ids=lambda b: type(b).__name__)
def test_a_block_in_use_computes_what_it_was_trained_to(block: QualityBlock | QualityBranch) -> None:
    torch.manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    block.scale.uniform_(0.1, 3)
    x, quality = torch.randn(1, 6, 9, 8), torch.tensor([[0.2, 0.8, 0.0]])
    trained = block(x, quality)
    with torch.no_grad():
        used, of_two = block(x, quality), block(torch.cat((x, -x)), torch.cat((quality, quality.flip(1))))
    torch.testing.assert_close(used, trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_two[:1], trained, rtol=1e-5, atol=1e-5)


def test_the_analysis_by_halves_computes_what_it_was_trained_to() -> None:
    torch.manual_seed(0)
    analysis = KltAnalysis(16, 16, 1, 1, (8, 16), 3).double()
    for parameter in analysis.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    x, quality = torch.rand(1, 3, 64, 48).double(), torch.tensor([[0.2, 0.8, 0.0]]).double()
    trained = analysis(x, quality)
    with torch.no_grad():
        torch.testing.assert_close(analysis(x, quality), trained)
