"""PMIFM: any number of side sources, in any order."""

import torch

from mvcodec.nn.parallax_attention import SourceFeatures
from mvcodec.nn.pmifm import ParallaxFusion
from tests.nn.test_parallax_attention import maps


def stacked(fusion: ParallaxFusion, sides: list[torch.Tensor]) -> SourceFeatures | None:
    features = [fusion.features(s) for s in sides]
    return SourceFeatures(*(torch.stack(parts) for parts in zip(*features, strict=True))) if sides else None


def fuse(fusion: ParallaxFusion, main: torch.Tensor, sides: list[torch.Tensor]) -> torch.Tensor:
    return fusion(main, fusion.features(main), stacked(fusion, sides))


def test_order_of_side_sources_is_irrelevant():
    fusion = ParallaxFusion(8, 8).double()
    main, sides = maps(0, 1, 8, 4, 6), [maps(i, 1, 8, 4, 6) for i in (1, 2, 3)]
    forward, backward = fuse(fusion, main, sides), fuse(fusion, main, sides[::-1])
    torch.testing.assert_close(forward, backward)
    _, found = fusion.source(fusion.features(main), stacked(fusion, sides))
    _, turned = fusion.source(fusion.features(main), stacked(fusion, sides[::-1]))
    torch.testing.assert_close(found, turned.flip(0))


def test_no_side_source_is_allowed_and_still_runs_the_fusion_network():
    fusion = ParallaxFusion(8, 8).double()
    main = maps(0, 1, 8, 4, 6)
    alone = fuse(fusion, main, [])
    _, consistency = fusion.source(fusion.features(main), None)
    assert consistency.shape[0] == 0
    assert not torch.equal(alone, main)


def test_sources_are_weighted_by_the_softmax_of_their_consistencies():
    fusion = ParallaxFusion(8, 8).double()
    main, sides = maps(0, 1, 8, 4, 6), [maps(i, 1, 8, 4, 6) for i in (1, 2)]
    own = fusion.features(main)
    found = [fusion.source.opam(own, fusion.features(s)) for s in sides]
    weight = torch.cat([f.consistency for f in found], dim=1).softmax(dim=1)
    mixed = weight[:, :1] * found[0].feature + weight[:, 1:] * found[1].feature  # Eq. (15)
    expected = main + fusion.fusion.gain * fusion.fusion.fuse(torch.cat([mixed, own.value], dim=1))  # Eq. (16)
    torch.testing.assert_close(fuse(fusion, main, sides), expected)


def test_zero_gain_leaves_the_main_source_alone():
    fusion = ParallaxFusion(8, 4, initial_gain=0.0).double()
    main = maps(0, 1, 8, 4, 6)
    torch.testing.assert_close(fuse(fusion, main, [maps(1, 1, 8, 4, 6)]), main)
