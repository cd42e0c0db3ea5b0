"""A weight's change as the product of two small matrices: the best one there is of a given rank."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NEGLIGIBLE = 1e-7  # of the largest singular value; the Gram matrix resolves about 1.5e-8 in double precision


class Factors(NamedTuple):
    """up x down, in the shapes a LoRA has.

    Attributes:
        up: [out, r], or [out, r, 1, 1] for a convolution; fp32.
        down: [r, in], or [r, in, h, w]; fp32.
        kept: sum of squares of the product.
        energy: sum of squares of what was factored.
    """

    up: Tensor
    down: Tensor
    kept: float
    energy: float


def factor(change: Tensor, rank: int) -> Factors:
    """The product of at most that rank which is nearest to a change in the sum of squares (truncated SVD).

    By the eigenvectors of the Gram matrix of the shorter side in double precision: the same bits on every run and no
    random numbers. Both factors get the square root of the singular values, so that half precision holds either. Ranks
    that carry nothing are left out, down to one.

    Args:
        change: [out, in] or [out, in, ...], finite.
        rank: at least 1.
    """
    matrix = change.detach().to("cpu", torch.float64).flatten(1)
    wide = matrix.shape[0] <= matrix.shape[1]
    short = matrix if wide else matrix.T
    _, vectors = torch.linalg.eigh(short @ short.T)  # in ascending order
    basis = vectors[:, -rank:].flip(1)
    rest = basis.T @ short  # [r, longer side], each row as long as its singular value
    sizes = rest.norm(dim=1)
    count = max(1, int((sizes > NEGLIGIBLE * sizes.max()).sum()))
    basis, rest, sizes = basis[:, :count], rest[:count], sizes[:count]
    root = sizes.sqrt()
    basis, rest = basis * root, rest / root.clamp_min(torch.finfo(root.dtype).tiny)[:, None]
    up, down = (basis, rest) if wide else (rest.T, basis.T)
    spatial = change.ndim - 2
    return Factors(
        up.float().reshape(*up.shape, *(1,) * spatial).contiguous(),
        down.float().reshape(count, *change.shape[1:]).contiguous(),
        float(sizes.square().sum()),
        float(matrix.square().sum()),
    )


def padded(factors: tuple[Tensor, Tensor], rank: int) -> tuple[Tensor, Tensor]:
    """The same product with `up` and `down` filled up with zeros to a rank, for formats that know one rank only."""
    up, down = factors
    missing = rank - len(down)
    if missing <= 0:
        return up, down
    more_up = up.new_zeros(len(up), missing, *up.shape[2:])
    return torch.cat([up, more_up], 1), torch.cat([down, down.new_zeros(missing, *down.shape[1:])])


@dataclass
class Share:
    """How much of many changes is kept, in sums of squares; as a text "97.31 %", 100 % only if nothing is lost."""

    kept: float = 0.0
    total: float = 0.0

    def whole(self, change: Tensor) -> Tensor:
        """Count a change that is kept, and return it."""
        self.kept += _energy(change)
        return self.lost(change)

    def lost(self, change: Tensor) -> Tensor:
        """Count a change that is not kept, and return it."""
        self.total += _energy(change)
        return change

    def part(self, factors: Factors) -> tuple[Tensor, Tensor]:
        """Count a change that its factors stand for, and return `up` and `down`."""
        self.kept += factors.kept
        self.total += factors.energy
        return factors.up, factors.down

    def __float__(self) -> float:
        return self.kept / self.total if self.total else 1.0

    def __str__(self) -> str:
        return "100 %" if float(self) > 1 - 1e-9 else f"{min(100 * float(self), 99.99):.2f} %"


def _energy(change: Tensor) -> float:
    return float(torch.linalg.vector_norm(change, dtype=torch.float64)) ** 2
