"""A matrix along its principal directions, by the eigenvectors of the smaller of its two Gram matrices.

That costs a few times less than a singular value decomposition and gives the same in float64, except for singular values
below about 1e-8 of the largest, which rounding hides.
"""

from __future__ import annotations

import torch
from torch import Tensor


def frobenius_norm(matrix: Tensor) -> float:
    """‖M‖_F of a tensor of any shape: row by row in at least fp32, then in fp64."""
    wide = torch.promote_types(matrix.dtype, torch.float32)
    return float(torch.linalg.vector_norm(matrix, dim=-1, dtype=wide).cpu().double().norm())


def principal_directions(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values and the singular vectors of the shorter side, the largest first.

    Args:
        matrix: ``[m, n]``.

    Returns:
        ``σ``, ``[min(m, n)]``, and ``U`` in columns, ``[min(m, n), min(m, n)]``; both float64, on the matrix's device.
    """
    matrix = matrix.double()
    gram = matrix @ matrix.T if matrix.shape[0] <= matrix.shape[1] else matrix.T @ matrix
    values, vectors = torch.linalg.eigh(gram)
    return values.clamp(min=0).sqrt().flip(0), vectors.flip(1)


def along(matrix: Tensor, directions: Tensor, factors: Tensor | float = 1.0) -> Tensor:
    """The part of a matrix along some directions of its shorter side, each multiplied by a factor.

    Args:
        matrix: ``[m, n]``.
        directions: ``U``, orthonormal columns ``[min(m, n), r]`` float64, such as some of `principal_directions`.
        factors: ``f``, one a direction ``[r]``, or one for all.

    Returns:
        ``U diag(f) Uᵀ M``, or ``M U diag(f) Uᵀ`` where the columns are the shorter side; ``[m, n]`` float64.
    """
    scaled, wide = directions * factors, matrix.double()
    return scaled @ (directions.T @ wide) if matrix.shape[0] <= matrix.shape[1] else (wide @ directions) @ scaled.T
