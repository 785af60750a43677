"""How exact a behaviour has to be.

The four classes: T0 is equality to the bit, T1 1e-6, T2 1e-4 (fp32 in different orders), T3 1e-3
(half precision).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """One class: its name and the largest absolute difference."""

    name: str
    limit: float

    def check(self, got: Tensor, expected: Tensor, what: str = "") -> None:
        """Assert that two tensors agree within this class; T0 asks for the same dtype too."""
        assert got.shape == expected.shape, (what, got.shape, expected.shape)
        if self.limit == 0:
            assert got.dtype == expected.dtype, (what, got.dtype, expected.dtype)
            assert torch.equal(got, expected), (what, largest(got, expected))
        else:
            assert largest(got, expected) <= self.limit, (what, largest(got, expected))


T0 = Tolerance("T0", 0.0)
T1 = Tolerance("T1", 1e-6)
T2 = Tolerance("T2", 1e-4)
T3 = Tolerance("T3", 1e-3)


def largest(got: Tensor, expected: Tensor) -> float:
    """Largest absolute difference."""
    return float((got.detach().double() - expected.detach().double()).abs().max())
