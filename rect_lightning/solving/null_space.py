"""Where the keys that a model was trained on have almost no energy, so that a change there leaves their values alone.

Fang et al., "AlphaEdit: Null-Space Constrained Knowledge Editing for Language Models" (ICLR 2025, arXiv 2410.02355),
section 3.1: with ``C = U diag(λ) Uᵀ`` and Û the eigenvectors of small eigenvalues, ``P = Û Ûᵀ`` and ``ΔW P k ≈ 0`` for keys k
of which C is the second moment. The published threshold is 0.02, on C as the mean of ``k kᵀ`` over tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def null_space_projector(c: Tensor, *, threshold: float | None = 0.02, energy: float | None = None) -> Tensor:
    """The projector on the eigenvectors of C with the smallest eigenvalues.

    Args:
        c: ``C = E[k kᵀ]``, ``[n, n]``, symmetric.
        threshold: Take eigenvalues below this. It is absolute, so what it means depends on the model's scale.
        energy: Instead take as many of the smallest as together hold at most this share of the trace, from 0 to 1: of the
            mean squared norm of a key.

    Returns:
        ``P``, ``[n, n]`` float64, on the device of ``c``, symmetric and with ``P P = P``.

    Raises:
        ValueError: C is no finite square matrix, neither threshold nor energy is given, no eigenvector is small enough,
            or all are below the threshold.
    """
    if c.ndim != 2 or c.shape[0] != c.shape[1] or not c.isfinite().all():
        raise ValueError(f"Second moments are a finite square matrix; got one of shape {list(c.shape)}.")
    if energy is not None and not 0 <= energy <= 1:
        raise ValueError(f"energy is a share of the trace, from 0 to 1; got {energy}.")
    values, vectors = torch.linalg.eigh(c.double())  # ascending
    if energy is not None:
        cumulated = values.clamp(min=0).cumsum(0)
        small = cumulated <= energy * cumulated[-1]
    elif threshold is not None:
        small = values < threshold
    else:
        raise ValueError("Give a threshold of the eigenvalues or an energy.")
    if not small.any():
        limit = f"threshold {threshold:g}" if energy is None else f"energy {energy:g}"
        raise ValueError(
            f"No eigenvalue of the second moments is small enough for {limit}: they go from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}, so nothing of an update would be left. Give a larger one."
        )
    if energy is None and small.all():
        raise ValueError(
            f"All eigenvalues of the second moments are below threshold {threshold:g}: they go from {float(values[0]):.3g} to "
            f"{float(values[-1]):.3g}, so nothing would be projected away. Give a smaller one."
        )
    basis = vectors[:, small]
    return basis @ basis.T
