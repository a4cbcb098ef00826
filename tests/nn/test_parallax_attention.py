"""OPAM is what Eq. (7)-(13) say, however it is chunked, and reaches the whole plane."""

import numpy as np
import pytest
import torch

from mvcodec.nn.parallax_attention import (
    OmniParallaxAttention,
    attend_columns,
    attend_everywhere,
    attend_rows,
)


def maps(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).double()


def naive_row_attention(query, key, value):
    """Eq. (8)-(11) entry by entry, with the explicit matrix product of Eq. (10)."""
    n, c, height, width = query.shape
    aligned, consistency = torch.zeros_like(value), torch.zeros(n, 1, height, width, dtype=value.dtype)
    for b in range(n):
        for row in range(height):
            match = query[b, :, row].T @ key[b, :, row] * c**-0.5
            to_main, to_side = match.softmax(dim=-1), match.T.softmax(dim=-1)
            aligned[b, :, row] = (to_main @ value[b, :, row].T).T
            consistency[b, 0, row] = torch.diagonal(to_main @ to_side)
    return aligned, consistency


def test_rows_equal_the_naive_computation_and_consistency_the_explicit_product():
    q, k, v = maps(0, 2, 6, 5, 7), maps(1, 2, 6, 5, 7), maps(2, 2, 4, 5, 7)
    found = attend_rows(q, k, v, 6**-0.5)
    aligned, consistency = naive_row_attention(q, k, v)
    torch.testing.assert_close(found.feature, aligned)
    torch.testing.assert_close(found.consistency, consistency)
    assert (found.consistency > 0).all()
    assert (found.consistency <= 1).all()


def test_columns_are_rows_of_the_transposed_maps():
    q, k, v = maps(0, 1, 6, 5, 7), maps(1, 1, 6, 5, 7), maps(2, 1, 4, 5, 7)
    found = attend_columns(q, k, v, 6**-0.5)
    aligned, consistency = naive_row_attention(q.mT, k.mT, v.mT)
    torch.testing.assert_close(found.feature, aligned.mT)
    torch.testing.assert_close(found.consistency, consistency.mT)


@pytest.mark.parametrize("chunk", [1, 60, 200, 10**6])
def test_chunked_equals_unchunked(chunk):
    q, k, v = maps(0, 2, 6, 5, 7), maps(1, 2, 6, 5, 7), maps(2, 2, 4, 5, 7)
    for attend in (attend_rows, attend_columns):
        whole, parts = attend(q, k, v, 1.0), attend(q, k, v, 1.0, chunk=chunk)
        torch.testing.assert_close(parts.feature, whole.feature)
        torch.testing.assert_close(parts.consistency, whole.consistency)


def test_two_dimensional_attention_is_one_softmax_over_all_positions():
    q, k, v = maps(0, 1, 6, 3, 4), maps(1, 1, 6, 3, 4), maps(2, 1, 2, 3, 4)
    match = q.flatten(2).mT @ k.flatten(2) * 0.5
    expected = (match.softmax(dim=-1) @ v.flatten(2).mT).mT.reshape(v.shape)
    torch.testing.assert_close(attend_everywhere(q, k, v, 0.5).feature, expected)


def test_opam_equals_its_two_naive_stages():
    opam = OmniParallaxAttention(8).double()
    main, side = opam.features(maps(0, 1, 8, 5, 6)), opam.features(maps(1, 1, 8, 5, 6))
    horizontal, c_hor = naive_row_attention(main.row_key, side.row_key, side.value)
    vertical, c_ver = naive_row_attention(main.column_key.mT, opam.column_skm(horizontal).mT, horizontal.mT)
    found = opam(main, side)
    torch.testing.assert_close(found.feature, vertical.mT)
    torch.testing.assert_close(found.consistency, c_hor * c_ver.mT)  # Eq. (12)


def test_every_position_of_the_result_reaches_every_position_of_the_side_source():
    opam = OmniParallaxAttention(8).double()
    main = opam.features(maps(0, 1, 8, 5, 6))
    value = maps(1, 1, 8, 5, 6).requires_grad_()
    # Only the values' path, Eq. (13): keys held fixed, so convolutions cannot do the reaching.
    keys = [k.detach() for k in opam.features(value.detach())]
    for row, column in [(0, 0), (2, 3), (4, 5)]:
        horizontal = attend_rows(main.row_key, keys[1], value, opam.scale)
        vertical = attend_columns(main.column_key, keys[2], horizontal.feature, opam.scale)
        (gradient,) = torch.autograd.grad(vertical.feature[0, :, row, column].sum(), value)
        assert (gradient.abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("mode", ["opam", "hpa", "vpa", "attention2d", "average"])
def test_every_ablation_aligns(mode):
    opam = OmniParallaxAttention(8, mode).double()
    main, side = opam.features(maps(0, 2, 8, 4, 6)), opam.features(maps(1, 2, 8, 4, 6))
    found = opam(main, side)
    assert found.feature.shape == (2, 8, 4, 6)
    assert found.consistency.shape == (2, 1, 4, 6)


def test_identical_sources_with_sharp_keys_align_to_themselves():
    sharp = 30 * torch.eye(6, dtype=torch.float64).T.reshape(1, 6, 1, 6)
    found = attend_rows(sharp, sharp, maps(0, 1, 3, 1, 6), 1.0)
    torch.testing.assert_close(found.feature, maps(0, 1, 3, 1, 6))
    torch.testing.assert_close(found.consistency, torch.ones(1, 1, 1, 6, dtype=torch.float64))


def test_segments_match_nothing_beyond_their_own_positions():
    q, k, v = (maps(i, 2, 3, 5, 7) for i in range(3))
    for attend, axis in ((attend_rows, -1), (attend_columns, -2)):
        found = attend(q, k, v, 1.0, 3)
        for start in range(0, q.shape[axis], 3):
            window = (*(slice(None) for _ in range(4 + axis)), slice(start, start + 3))
            alone = attend(q[window], k[window], v[window], 1.0)
            torch.testing.assert_close(found.feature[window], alone.feature)
            torch.testing.assert_close(found.consistency[window], alone.consistency)
