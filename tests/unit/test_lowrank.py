"""Low-rank factors against PyTorch's own singular value decomposition."""

import pytest
import torch

from comfy_sude.lowrank import factor, padded


def change(*shape: int, seed: int = 0) -> torch.Tensor:
    """A matrix or convolution whose singular values fall slowly, small as trained changes are."""
    g = torch.Generator().manual_seed(seed)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    scale = 0.9 ** torch.arange(columns)
    return (torch.randn(rows, columns, generator=g) * scale * 1e-5).reshape(shape)


def product(up: torch.Tensor, down: torch.Tensor, shape) -> torch.Tensor:
    return (up.flatten(1).double() @ down.flatten(1).double()).reshape(shape)


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (16, 16), (12, 6, 3, 3), (40, 2, 3, 3), (20, 30, 1, 1), (1, 9)])
@pytest.mark.parametrize("rank", [1, 5, 12, 100])
def test_the_product_is_the_truncated_svd_and_its_energy_is_told(shape, rank):
    given = change(*shape)
    found = factor(given, rank)
    u, s, v = torch.linalg.svd(given.double().flatten(1), full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ v[:rank]).reshape(shape)
    assert (product(found.up, found.down, shape) - best).norm() < 1e-6 * best.norm()
    assert found.kept == pytest.approx(float(s[:rank].square().sum()), rel=1e-9)
    assert found.energy == pytest.approx(float(given.double().square().sum()), rel=1e-9)


def test_a_convolution_is_factored_into_a_convolution_and_a_pointwise_one():
    given = change(12, 6, 3, 3)
    up, down, *_ = factor(given, 4)
    assert up.shape == (12, 4, 1, 1) and down.shape == (4, 6, 3, 3)
    x = torch.randn(2, 6, 5, 5, generator=torch.Generator().manual_seed(1))
    twice = torch.nn.functional.conv2d(torch.nn.functional.conv2d(x, down, padding=1), up)
    once = torch.nn.functional.conv2d(x, product(up, down, given.shape).float(), padding=1)
    assert (twice - once).abs().max() < 1e-5 * once.abs().max()


def test_the_same_change_gives_the_same_bits_and_draws_no_random_numbers():
    before = torch.get_rng_state()
    first, second = factor(change(30, 50), 7), factor(change(30, 50), 7)
    assert torch.equal(first.up, second.up) and torch.equal(first.down, second.down)
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_that_carry_nothing_are_left_out():
    g = torch.Generator().manual_seed(0)
    given = torch.randn(40, 3, generator=g) @ torch.randn(3, 60, generator=g)
    found = factor(given, 32)
    assert found.up.shape == (40, 3) and found.kept == pytest.approx(found.energy)
    nothing = factor(torch.zeros(8, 5), 4)
    assert nothing.up.shape == (8, 1) and nothing.energy == 0 and not product(nothing.up, nothing.down, (8, 5)).any()
    assert nothing.up.isfinite().all() and nothing.down.isfinite().all()


def test_neither_factor_is_lost_in_half_precision():
    given = change(64, 64) * 1e-3  # of size 1e-8, below the smallest half
    up, down, *_ = factor(given, 64)
    error = product(up.half(), down.half(), given.shape) - given.double()
    assert (given.half() - given).norm() > 0.9 * given.norm() and error.norm() < 2e-3 * given.norm()


@pytest.mark.parametrize("shape", [(12, 20), (12, 6, 3, 3)])
def test_padding_changes_the_rank_and_nothing_else(shape):
    up, down, *_ = factor(change(*shape), 3)
    more_up, more_down = padded((up, down), 8)
    assert more_up.shape[1] == len(more_down) == 8
    assert torch.equal(product(more_up, more_down, shape), product(up, down, shape))
    assert padded((up, down), 2)[1] is down
