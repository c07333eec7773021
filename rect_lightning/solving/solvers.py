"""The closed-form updates. All matrices are ``[out, in]``; keys and values are rows."""

from __future__ import annotations

import torch
from torch import Tensor


class Factored:
    """A symmetric positive definite matrix, factored once and solved with many times, in float64.

    Args:
        matrix: ``[n, n]``.
        name: What to call the matrix in an error.

    Raises:
        ValueError: The matrix is not finite or not positive definite.
    """

    def __init__(self, matrix: Tensor, name: str) -> None:
        factor, info = torch.linalg.cholesky_ex(matrix.double())
        if info.item() or not factor.isfinite().all():
            raise ValueError(
                f"{name} is not positive definite: it was estimated from fewer tokens than its {len(matrix)} rows, or from "
                "keys that are not finite. Estimate the moments from more text (moments.tokens)."
            )
        self.factor = factor

    def solve(self, right: Tensor) -> Tensor:
        """``matrix⁻¹ right`` for ``right`` of ``[n, columns]``, float64."""
        found = torch.cholesky_solve(right.to(self.factor.device, torch.float64), self.factor)
        return found.to(right.device)


def rank_one(residual: Tensor, direction: Tensor, key: Tensor) -> Tensor:
    """ROME's update ``ΔW = (v* − W k) uᵀ / (uᵀ k)`` (Meng et al. 2022, ROME, eq. 2), which makes ``(W + ΔW) k = v*``.

    Args:
        residual: ``v* − W k``, ``[out]``.
        direction: ``u = C⁻¹ k`` up to a factor, ``[in]``.
        key: ``k``, ``[in]``.

    Returns:
        ``ΔW``, ``[out, in]``, float64.
    """
    residual, direction, key = residual.double(), direction.double(), key.double()
    return torch.outer(residual, direction) / direction.dot(key)


def least_squares(residuals: Tensor, keys: Tensor, moment: Factored, weight: float) -> Tensor:
    """MEMIT's update ``ΔW = R Kᵀ (λC + K Kᵀ)⁻¹`` (Meng et al. 2023, MEMIT, eq. 14), with columns of K and R as rows here.

    With fewer keys than their width it is ``R (λI + Kᵀ A)⁻¹ Aᵀ`` with ``A = C⁻¹ K`` (Woodbury): a system of as many rows as
    there are keys, and one factor of C serves every batch. With more keys the system is of their width.

    Args:
        residuals: ``R``, ``[requests, out]``.
        keys: ``K``, ``[requests, in]``.
        moment: ``C``, factored.
        weight: ``λ``.

    Returns:
        ``ΔW``, ``[out, in]``, float64.
    """
    keys, residuals = keys.double(), residuals.double()
    if len(keys) > keys.shape[1]:
        factor = moment.factor.to(keys.device)
        whole = Factored(weight * (factor @ factor.T) + keys.T @ keys, "λC + K Kᵀ")
        return whole.solve(keys.T @ residuals).T
    solved = moment.solve(keys.T)
    system = keys @ solved
    system.diagonal().add_(weight)
    return residuals.T @ torch.linalg.solve(system, solved.T)
