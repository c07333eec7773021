"""Principal directions by a Gram matrix, against a singular value decomposition in float64."""

import pytest
import torch

from rect_lightning.solving.spectrum import along, frobenius_norm, principal_directions

SHAPES = [(5, 9), (9, 5), (6, 6), (1, 4), (4, 1)]


def random(*shape, rank=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if rank is None:
        return torch.randn(*shape, generator=generator)
    return torch.randn(shape[0], rank, generator=generator) @ torch.randn(rank, shape[1], generator=generator)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_same_as_a_singular_value_decomposition(shape):
    matrix = random(*shape)
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    singular, directions = principal_directions(matrix)
    torch.testing.assert_close(singular, s)
    for r in range(1, len(s) + 1):
        found = along(matrix, directions[:, :r])
        torch.testing.assert_close(found, u[:, :r] @ torch.diag(s[:r]) @ vh[:r])
        factors = torch.rand(r, dtype=torch.float64)
        torch.testing.assert_close(along(matrix, directions[:, :r], factors), (u[:, :r] * s[:r] * factors) @ vh[:r])


def test_the_norm_of_many_small_entries():
    """One fp32 sum over so many would lose them."""
    assert frobenius_norm(torch.full((4096, 4096), 1e-3)) == pytest.approx(4.096, rel=1e-5)
    assert frobenius_norm(torch.tensor(-3.0, dtype=torch.bfloat16)) == 3
