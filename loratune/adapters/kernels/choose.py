"""When to form W + ΔW instead of sending tokens through the narrow factors.

RunLoRA (arXiv:2312.03415) chooses among such orders by counting multiplications.  Forming W + ΔW
also reads and writes a whole weight, which at small rank costs more than its multiplications; in
timings on one CPU core (in, out 768 and 3,072; rank 16, 64, 256) that came to those of 32 ranks.
"""

from __future__ import annotations

import torch

FORMING_OVERHEAD_RANKS = 32


def dense_pays(spared: int, rank: int, in_features: int, out_features: int) -> bool:
    """Whether forming W + ΔW costs less than the narrow products that it spares.

    Args:
        spared: multiply-adds of the spared products, divided by the rank.
        rank: width of the narrow factors.
        in_features: input width of the layer.
        out_features: output width of the layer.
    """
    return spared * rank > in_features * out_features * (rank + FORMING_OVERHEAD_RANKS)


def dense_is_exact(dtype: torch.dtype) -> bool:
    """Whether W + ΔW keeps ΔW: in half precision most of a small ΔW is rounded away."""
    return dtype in (torch.float32, torch.float64)
