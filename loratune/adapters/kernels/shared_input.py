"""One narrow product for layers that share both their input and their frozen factor.

The query, key and value layers of one attention block read the same tensor, and VeRA's layers
share A, so ``x Aᵀ`` is computed, and kept for the backward pass, once for the three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Key = tuple[object, ...]
_products: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Input → (what it was multiplied by and when, product); an entry dies with its input."""


def recall_product(x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``x Aᵀ`` if it is known for this very tensor and neither has changed since.

    Changes show in autograd's version counters, as they do to its own saved tensors.
    """
    if torch.compiler.is_compiling():
        return None
    if x not in _products:
        return None
    key, product = _products[x]
    return product if key == _key(x, A, dtype) else None


def remember_product(x: Tensor, A: Tensor, dtype: torch.dtype, product: Tensor) -> None:
    """Keep ``x Aᵀ`` for as long as ``x`` lives."""
    if not torch.compiler.is_compiling():
        _products[x] = (_key(x, A, dtype), product)


def _key(x: Tensor, A: Tensor, dtype: torch.dtype) -> _Key:
    # Inference tensors keep no version, and so could change unnoticed: they never match.
    if x.is_inference() or A.is_inference():
        return (object(),)
    return (x._version, A.data_ptr(), A.shape, A.stride(), A._version, dtype)
