"""The projector on the smallest eigenvectors, against its definition."""

import pytest
import torch

from rect_lightning.solving.null_space import null_space_projector


def moments(values):
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=torch.Generator().manual_seed(0)).double())[0]
    return q @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ q.T, q


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({}, 2),
        ({"threshold": 0.3}, 3),
        ({"energy": 0.0025}, 1),  # of a trace of 4.012, which is 0.01003
        ({"energy": 0.1}, 3),
        ({"threshold": None, "energy": 1.0}, 5),
    ],
    ids=str,
)
def test_on_the_smallest_eigenvectors(options, count):
    c, q = moments([0.002, 0.01, 0.2, 0.8, 3.0])
    basis = q[:, :count]
    found = null_space_projector(c.float(), **options)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, basis @ basis.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(found @ found, found)
    assert float(found.trace()) == pytest.approx(count)


def test_keys_outside_it_keep_their_values():
    keys = torch.randn(20, 12, generator=torch.Generator().manual_seed(1)).double()
    keys[:, 8:] = 0
    mixed = keys @ torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(2)).double())[0]
    projector = null_space_projector(mixed.T @ mixed / 20)
    assert float(projector.trace()) == pytest.approx(4)
    assert (mixed @ projector).abs().max() < 1e-12


@pytest.mark.parametrize(
    ("c", "options", "message"),
    [
        (torch.eye(3), {}, r"go from 1 to 1, so nothing .* larger"),
        (0.001 * torch.eye(3), {}, r"All .* from 0.001 to 0.001, so nothing .* smaller"),
        (torch.eye(3), {"energy": 0.1}, "energy 0.1"),
        (torch.eye(3), {"energy": 1.5}, "from 0 to 1"),
        (torch.eye(3), {"threshold": None}, "threshold of the eigenvalues or an energy"),
        (torch.ones(3, 2), {}, r"\[3, 2\]"),
        (torch.full((2, 2), torch.nan), {}, "finite"),
    ],
)
def test_refuses(c, options, message):
    with pytest.raises(ValueError, match=message):
        null_space_projector(c, **options)
