"""Checkerboard halves and the contexts built on them."""

import numpy as np
import pytest
import torch

from mvcodec.nn.checkerboard import assembled, merge, passes, split
from mvcodec.nn.global_context import attend_anchors
from mvcodec.nn.local_context import CheckerboardAttention
from tests.nn.test_parallax_attention import maps


def test_anchors_are_the_positions_with_odd_row_plus_column():
    row, column = np.indices((4, 6))
    grid = torch.from_numpy(row * 10 + column)[None, None]
    anchor, other = split(grid)
    assert sorted(anchor.flatten().tolist()) == [r * 10 + c for r in range(4) for c in range(6) if (r + c) % 2]
    assert sorted(other.flatten().tolist()) == [r * 10 + c for r in range(4) for c in range(6) if not (r + c) % 2]


def test_merge_undoes_split():
    full = maps(0, 2, 3, 5, 8)
    assert torch.equal(merge(*split(full)), full)


@pytest.mark.parametrize("lattice", [False, True])
def test_assembled_undoes_passes(lattice):
    full = maps(0, 2, 3, 8, 12)
    assert torch.equal(assembled(passes(full, lattice)), full)


def test_passes_over_a_lattice_are_ever_denser():
    row, column = np.indices((4, 8))
    grid = torch.from_numpy(row * 10 + column)[None, None]
    found = [sorted(part.flatten().tolist()) for part in passes(grid, True)]
    even = [r * 10 + c for r in (0, 2) for c in (1, 3, 5, 7)]  # the even rows of the anchors
    first = [r * 10 + c for r, c in ((0, 3), (0, 7), (2, 1), (2, 5))]  # row / 2 + column // 2 odd
    odd = [r * 10 + c for r in (1, 3) for c in (0, 2, 4, 6)]
    others = [r * 10 + c for r in range(4) for c in range(8) if not (r + c) % 2]
    assert found == [first, sorted(set(even) - set(first)), odd, others]


def test_a_non_anchor_sees_exactly_the_anchors_of_its_5x5_window():
    context = CheckerboardAttention(4, 3, 4).double()
    anchors = merge(maps(0, 1, 4, 8, 4), torch.zeros(1, 4, 8, 4, dtype=torch.float64)).requires_grad_()
    out = context(split(anchors)[0], maps(1, 1, 3, 8, 4))
    for row, column in ((4, 2), (3, 3)):  # non-anchors: even columns of even rows, odd ones of odd rows
        (gradient,) = torch.autograd.grad(out[0, :, row, column // 2].sum(), anchors, retain_graph=True)
        seen = {(int(r), int(c)) for r, c in gradient[0].abs().sum(dim=0).nonzero()}
        assert seen == {(row + dy, column + dx) for dy in range(-2, 3) for dx in range(-2, 3) if (dy + dx) % 2}


def test_global_attention_in_chunks_is_exact():
    q, k, v = maps(0, 1, 4, 6, 3), maps(1, 1, 4, 6, 3), maps(2, 1, 4, 6, 3)
    whole = attend_anchors(q, k, v)
    torch.testing.assert_close(attend_anchors(q, k, v, chunk=20), whole)
    scores = (q.flatten(2).mT @ k.flatten(2)) / 2  # sqrt(4)
    torch.testing.assert_close(whole.flatten(2), (scores.softmax(dim=-1) @ v.flatten(2).mT).mT)  # Eq. (19)


def test_tiled_attention_is_attention_within_each_tile():
    q, k, v = (maps(i, 1, 3, 6, 5) for i in range(3))  # half-grids of 6 x 10 positions
    found = attend_anchors(q, k, v, tile=4)
    for top in (0, 4):
        for left in (0, 2, 4):
            window = (..., slice(top, top + 4), slice(left, left + 2))
            torch.testing.assert_close(found[window], attend_anchors(q[window], k[window], v[window]))
