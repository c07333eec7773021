"""The closed forms against the textbook formulas."""

from __future__ import annotations

import pytest
import torch

from rect_lightning.solving.solvers import Factored, equality_constrained, least_squares, rank_one


def moment_of(width, low, high):
    """A symmetric matrix with eigenvalues from ``low`` to ``high``, evenly in the exponent."""
    basis = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
    eigenvalues = torch.logspace(torch.tensor(low).log10(), torch.tensor(high).log10(), width, dtype=torch.float64)
    matrix = basis * eigenvalues @ basis.T
    return (matrix + matrix.T) / 2


def relative(found, expected):
    return float((found.double() - expected).norm() / expected.norm())


def memit(residuals, keys, moment, weight):
    """``R Kᵀ (λC + K Kᵀ)⁻¹`` as the paper writes it, a system as wide as the layer."""
    keys, residuals = keys.T.to(moment.dtype), residuals.T.to(moment.dtype)
    return residuals @ keys.T @ torch.linalg.inv(weight * moment + keys @ keys.T)


@pytest.mark.parametrize("requests", [1, 7, 24, 60])
@pytest.mark.parametrize("weight", [0.5, 1000.0])
def test_least_squares(requests, weight):
    """With fewer keys than the layer is wide, as many, and more."""
    moment = moment_of(24, 0.1, 10.0)
    keys, residuals = torch.randn(requests, 24), torch.randn(requests, 16)
    found = least_squares(residuals, keys, Factored(moment, "C"), weight)
    assert found.shape == (16, 24)
    assert found.dtype == torch.float64
    assert relative(found, memit(residuals, keys, moment, weight)) < 1e-10


@pytest.mark.parametrize("requests", [1, 24, 60])
def test_without_a_moment_it_is_the_identity(requests):
    keys, residuals = torch.randn(requests, 24), torch.randn(requests, 16)
    found = least_squares(residuals, keys, None, 3.0)
    assert relative(found, memit(residuals, keys, torch.eye(24).double(), 3.0)) < 1e-10


def test_least_squares_with_a_moment_as_ill_conditioned_as_real_ones():
    """Eigenvalues from 4e-3 to 4e4, where the same in fp32 is wrong."""
    moment = moment_of(96, 4e-3, 4e4)
    keys, residuals = torch.randn(40, 96), torch.randn(40, 32)
    expected = memit(residuals, keys, moment, 100.0)
    assert relative(least_squares(residuals, keys, Factored(moment, "C"), 100.0), expected) < 1e-6
    solved = torch.linalg.solve(moment.float(), keys.T)
    in_fp32 = residuals.T @ torch.linalg.solve(keys @ solved + 100 * torch.eye(40), solved.T)
    assert relative(in_fp32, expected) > 1e-4


def test_least_squares_is_the_minimum():
    """Of ``Σ ‖ΔW k − r‖² + λ tr(ΔW C ΔWᵀ)``: a step in any direction makes it larger."""
    moment, weight = moment_of(12, 0.1, 10.0), 3.0
    keys, residuals = torch.randn(5, 12).double(), torch.randn(5, 8).double()

    def loss(update):
        return ((keys @ update.T - residuals) ** 2).sum() + weight * (update @ moment * update).sum()

    found = least_squares(residuals, keys, Factored(moment, "C"), weight)
    for _ in range(10):
        step = torch.randn(8, 12).double()
        assert loss(found + 1e-3 * step) > loss(found)
        assert loss(found - 1e-3 * step) > loss(found)


def emmet(residuals, keys, moment, ridge):
    """``R (Kᵀ C⁻¹ K + ridge · I)⁻¹ Kᵀ C⁻¹`` as the paper writes it."""
    keys, residuals = keys.T.to(moment.dtype), residuals.T.to(moment.dtype)
    inverse = torch.linalg.inv(moment)
    ridge = ridge * torch.eye(keys.shape[1], dtype=moment.dtype)
    return residuals @ torch.linalg.inv(keys.T @ inverse @ keys + ridge) @ keys.T @ inverse


@pytest.mark.parametrize("ridge", [0.0, 0.1, 10.0])
@pytest.mark.parametrize("requests", [1, 7, 23])
def test_equality_constrained(requests, ridge):
    moment = moment_of(24, 0.1, 10.0)
    keys, residuals = torch.randn(requests, 24), torch.randn(requests, 16)
    found = equality_constrained(residuals, keys, Factored(moment, "C"), ridge)
    assert found.shape == (16, 24)
    assert found.dtype == torch.float64
    assert relative(found, emmet(residuals, keys, moment, ridge)) < 1e-9
    lack = relative(found @ keys.double().T, residuals.double().T)
    assert lack < 1e-9 if ridge == 0 else lack > 1e-4


def test_without_a_ridge_the_change_is_the_smallest_that_meets_the_constraint():
    moment = moment_of(12, 0.1, 10.0)
    keys, residuals = torch.randn(5, 12).double(), torch.randn(5, 8).double()
    found = equality_constrained(residuals, keys, Factored(moment, "C"), 0.0)
    free = torch.eye(12).double() - keys.T @ torch.linalg.inv(keys @ keys.T) @ keys
    for _ in range(10):
        other = found + 1e-3 * torch.randn(8, 12).double() @ free
        assert relative(other @ keys.T, residuals.T) < 1e-9
        assert (other @ moment * other).sum() > (found @ moment * found).sum()


@pytest.mark.parametrize("kind", ["twice the same", "a sum", "more than the width"])
def test_without_a_ridge_refuses_keys_that_depend_on_each_other(kind):
    keys = torch.randn(4 if kind != "more than the width" else 13, 12)
    if kind != "more than the width":
        keys[2] = keys[0] if kind == "twice the same" else keys[0] + 3 * keys[1]
    residuals, moment = torch.randn(len(keys), 8), Factored(moment_of(12, 0.1, 10.0), "C")
    number = 2 if kind != "more than the width" else 12
    with pytest.raises(ValueError, match=f"key of request {number} of this batch.*Set ridge above 0"):
        equality_constrained(residuals, keys, moment, 0.0)
    assert equality_constrained(residuals, keys, moment, 0.1).isfinite().all()


def test_inputs_are_left_alone():
    moment = moment_of(12, 0.1, 10.0)
    keys, residuals = torch.randn(5, 12).double(), torch.randn(5, 8).double()
    copies = [x.clone() for x in (moment, keys, residuals)]
    factored = Factored(moment, "C")
    first = least_squares(residuals, keys, factored, 2.0)
    assert torch.equal(least_squares(residuals, keys, factored, 2.0), first)
    rank_one(residuals[0], keys[0], keys[1])
    assert all(torch.equal(a, b) for a, b in zip((moment, keys, residuals), copies, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rank_one_maps_the_key_to_the_target(dtype):
    weight, key, target = torch.randn(8, 12, dtype=dtype), torch.randn(12, dtype=dtype), torch.randn(8, dtype=dtype)
    direction = torch.linalg.solve(moment_of(12, 1e-3, 1e3), key.double())
    update = rank_one(target - weight @ key, direction, key)
    assert update.dtype == torch.float64
    assert relative((weight.double() + update) @ key.double(), target.double()) < 1e-5
    assert torch.linalg.matrix_rank(update) == 1
    other = torch.randn(12, dtype=torch.float64)
    other -= direction * (other @ direction) / direction.square().sum()
    assert (update @ other).norm() < 1e-10 * update.norm() * other.norm()
    torch.testing.assert_close(rank_one(target - weight @ key, 7 * direction, key), update)


@pytest.mark.parametrize(("low", "high"), [(0.1, 10.0), (4e-3, 4e4)])
def test_factored_solves(low, high):
    matrix = moment_of(24, low, high)
    right = torch.randn(24, 5)
    found = Factored(matrix, "C").solve(right)
    assert found.dtype == torch.float64
    assert relative(matrix @ found, right.double()) < 1e-7


def bad_matrices():
    keys = torch.randn(5, 12)
    with_nan, with_inf, negative = torch.eye(12), torch.eye(12), torch.eye(12)
    with_nan[3, 3] = with_nan[7, 2] = torch.nan
    with_inf[3, 3] = torch.inf
    negative[3, 3] = -1e-3
    nan_below = torch.eye(12)
    nan_below[11, 0] = nan_below[0, 11] = torch.nan
    return {
        "few tokens": keys.T @ keys,
        "zero": torch.zeros(12, 12),
        "nan": with_nan,
        "a nan off the diagonal": nan_below,
        "inf": with_inf,
        "negative": negative,
    }


@pytest.mark.parametrize("kind", ["few tokens", "zero", "nan", "a nan off the diagonal", "inf", "negative"])
def test_factored_refuses(kind):
    with pytest.raises(ValueError, match=r"Layer 7's moment is not positive definite: .*12 rows.*moments\.tokens"):
        Factored(bad_matrices()[kind], "Layer 7's moment")


@pytest.mark.parametrize("requests", [3, 40])
def test_moments_on_the_cpu_serve_keys_on_a_gpu(requests):
    """With fake tensors, which know their device and have no content, so that no GPU is needed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        moment = object.__new__(Factored)
        moment.factor = torch.eye(24, dtype=torch.float64)
        keys, residuals = torch.zeros(requests, 24, device="cuda"), torch.zeros(requests, 16, device="cuda")
        assert moment.solve(keys.T).device.type == "cuda"
        if requests < 24:  # the other branch factors a matrix and looks at what comes out, which has no content here
            assert least_squares(residuals, keys, moment, 1.0).device.type == "cuda"
