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


def least_squares(residuals: Tensor, keys: Tensor, moment: Factored | None, weight: float) -> Tensor:
    """MEMIT's update ``ΔW = R Kᵀ (λC + K Kᵀ)⁻¹`` (Meng et al. 2023, MEMIT, eq. 14), with columns of K and R as rows here.

    With fewer keys than their width it is ``R (λI + Kᵀ A)⁻¹ Aᵀ`` with ``A = C⁻¹ K`` (Woodbury): a system of as many rows as
    there are keys, and one factor of C serves every batch. With more keys the system is of their width.

    Args:
        residuals: ``R``, ``[requests, out]``.
        keys: ``K``, ``[requests, in]``.
        moment: ``C``, factored; None for the identity.
        weight: ``λ``.

    Returns:
        ``ΔW``, ``[out, in]``, float64.
    """
    keys, residuals = keys.double(), residuals.double()
    if len(keys) > keys.shape[1]:
        identity = torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device)
        factor = identity if moment is None else moment.factor.to(keys.device)
        whole = Factored(weight * (factor @ factor.T) + keys.T @ keys, "λC + K Kᵀ")
        return whole.solve(keys.T @ residuals).T
    solved = keys.T if moment is None else moment.solve(keys.T)
    system = keys @ solved
    system.diagonal().add_(weight)
    return residuals.T @ torch.linalg.solve(system, solved.T)


_ALIKE = 1e-10
"""The share of a key that keys before it leave unexplained, below which it counts as a combination of them: fp32 rounding
alone leaves 1e-14."""


def equality_constrained(residuals: Tensor, keys: Tensor, moment: Factored, ridge: float) -> Tensor:
    """EMMET's update ``ΔW = R (Kᵀ C⁻¹ K + ridge · I)⁻¹ Kᵀ C⁻¹`` (Gupta et al. 2024, arXiv 2403.14236).

    With a ridge it is `least_squares` with ``λ = ridge`` (Woodbury). Without one ``ΔW K = R`` holds, and of all such updates
    it has the smallest ``tr(ΔW C ΔWᵀ)``.

    Args:
        residuals: ``R``, ``[requests, out]``.
        keys: ``K``, ``[requests, in]``.
        moment: ``C``, factored.
        ridge: At least 0.

    Returns:
        ``ΔW``, ``[out, in]``, float64.

    Raises:
        ValueError: Without a ridge, a key is a combination of others, and so cannot be given a value of its own.
    """
    if ridge > 0:
        return least_squares(residuals, keys, moment, ridge)
    keys, residuals = keys.double(), residuals.double()
    solved = moment.solve(keys.T)
    system = keys @ solved
    factor, failed = torch.linalg.cholesky_ex(system)
    unexplained = factor.diagonal().square() / system.diagonal()
    if failed.item() or not (unexplained > _ALIKE).all():
        request = failed.item() - 1 if failed.item() else int(unexplained.argmin())
        raise ValueError(
            f"The key of request {request} of this batch, counted from 0, is a combination of those before it, so without "
            "a ridge they cannot all have values of their own. Set ridge above 0, or edit them in different batches."
        )
    return residuals.T @ torch.cholesky_solve(solved.T, factor)


def null_space_least_squares(residuals: Tensor, keys: Tensor, past: Tensor | None, ridge: float) -> Tensor:
    """AlphaEdit's update ``ΔW = R Kᵀ P (K_p K_pᵀ P + K Kᵀ P + L₂ I)⁻¹`` (Fang et al. 2025, arXiv 2410.02355).

    ``P = Pᵀ = P P``, so with ``K̂ = P K`` it is ``R K̂ᵀ (K̂_p K̂_pᵀ + K̂ K̂ᵀ + L₂ I)⁻¹``, which is symmetric and needs no P.

    Args:
        residuals: ``R``, ``[requests, out]``.
        keys: ``K̂``, the projected keys, ``[requests, in]``.
        past: ``K̂_p K̂_pᵀ``, ``[in, in]`` float64, or None where nothing was edited before.
        ridge: ``L₂``, positive.

    Returns:
        ``ΔW``, ``[out, in]``, float64.
    """
    keys = keys.double()
    # what cannot be factored makes an update that is not finite, which the editor refuses by the requests' names
    system = keys.T @ keys
    if past is not None:
        system += past.to(keys.device)
    system.diagonal().add_(ridge)
    factor, failed = torch.linalg.cholesky_ex(system)
    update = residuals.to(keys).T @ torch.cholesky_solve(keys.T, factor).T
    if failed.item():
        update.fill_(torch.nan)
    return update.to(residuals.device)


def gradient_values(keys: Tensor, gradients: Tensor, lr: float) -> Tensor:
    """UltraEdit's values ``V = −lr ‖ĥ‖² ĝ`` (Gu et al. 2025, arXiv 2505.14679), of normalised keys and gradients.

    The update is their ridge regression on the keys as they are, ``ΔWᵀ = (HᵀH + I)⁻¹ Hᵀ V``: `least_squares` with the identity
    for C and a weight of 1.

    Args:
        keys: ``ĥ``, ``[tokens, in]``.
        gradients: ``ĝ``, ``[tokens, out]``.
        lr: Learning rate.

    Returns:
        ``[tokens, out]``.
    """
    return -lr * keys.square().sum(dim=1, keepdim=True) * gradients
