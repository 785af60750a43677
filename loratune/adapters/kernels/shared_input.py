"""One narrow product for layers that share both their input and their frozen factor.

The query, key and value layers of one attention block read the same tensor, and VeRA's layers
share A, so ``x Aᵀ`` is computed, and kept for the backward pass, once for the three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_Key = tuple[object, ...]


class SharedProducts:
    """Products ``x Aᵀ`` by their input; each is forgotten with its input."""

    def __init__(self) -> None:
        self._products: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __deepcopy__(self, memo: object) -> SharedProducts:
        """A copied model has its own inputs: nothing is taken over."""
        return SharedProducts()

    def recall(self, x: Tensor, A: Tensor, dtype: torch.dtype) -> Tensor | None:
        """``x Aᵀ`` if it was computed for this very tensor and neither has changed since.

        Changes show in autograd's version counters, as they do to its own saved tensors.
        """
        if torch.compiler.is_compiling() or x not in self._products:
            return None
        key, product = self._products[x]
        return product if key == _key(x, A, dtype) else None

    def remember(self, x: Tensor, A: Tensor, dtype: torch.dtype, product: Tensor) -> None:
        """Keep ``x Aᵀ`` for as long as ``x`` lives."""
        if not torch.compiler.is_compiling():
            self._products[x] = (_key(x, A, dtype), product)


def _key(x: Tensor, A: Tensor, dtype: torch.dtype) -> _Key:
    # Inference tensors keep no version, and so could change unnoticed: they never match.
    if x.is_inference() or A.is_inference():
        return (object(),)
    return (x._version, A.data_ptr(), A.shape, A.stride(), A._version, dtype)
