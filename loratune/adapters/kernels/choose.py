"""When to form W + ΔW instead of sending tokens through the narrow factors (arXiv:2312.03415)."""

from __future__ import annotations

import torch


def dense_pays(spared: int, rank: int, in_features: int, out_features: int) -> bool:
    """Whether forming W + ΔW costs less than the narrow products that it spares.

    Args:
        spared: width of the spared products, summed over tokens: multiply-adds / rank.
        rank: columns of the narrow factors.
        in_features: input width.
        out_features: output width.
    """
    return spared > in_features * out_features


def dense_is_exact_enough(dtype: torch.dtype) -> bool:
    """Whether W + ΔW keeps ΔW: in half precision most of a small ΔW is rounded away."""
    return dtype in (torch.float32, torch.float64)
