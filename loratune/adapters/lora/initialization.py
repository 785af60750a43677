"""Starting values of LoRA's factors.

The draws from torch's global generator come in PEFT's order (A, then B, then A again), so that
the same seed gives the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loratune.adapters.lora.config import Init
from loratune.errors import ModelError


@torch.no_grad()
def initial_factors(base_weight: Tensor, rank: int, init: Init, name: str) -> tuple[Tensor, Tensor]:
    """A (rank, in) and B (out, rank) in fp32 for a base weight given as (out, in).

    Raises:
        ModelError: if ``orthonormal`` or ``svd`` is asked for more rows than the weight has rank.
    """
    out_features, in_features = base_weight.shape
    lora_A = torch.empty(rank, in_features)
    lora_B = torch.empty(out_features, rank)
    nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    nn.init.kaiming_uniform_(lora_B, a=math.sqrt(5))
    if init is Init.random:
        return lora_A, lora_B
    if init is Init.kaiming:
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
    elif init is Init.gaussian:
        nn.init.normal_(lora_A, std=1 / rank)
    else:
        _check_rank(rank, base_weight, init, name)
        if init is Init.orthonormal:
            nn.init.orthogonal_(lora_A)
        else:
            lora_A.copy_(_right_singular_vectors(base_weight, rank))
    return lora_A, lora_B.zero_()


@torch.no_grad()
def initial_expert_factors(
    shape: tuple[int, int, int], rank: int, init: Init
) -> tuple[Tensor, Tensor]:
    """A (experts · rank, in) and B (out, rank · experts) in fp32, drawn as PEFT draws them.

    Args:
        shape: experts, out and in.
        rank: of each expert.
        init: of A; orthonormal rows and singular vectors are refused before.
    """
    experts, out_features, in_features = shape
    empty = torch.empty(out_features, in_features, device="meta")
    lora_A, lora_B = initial_factors(empty, experts * rank, init, "")
    return (lora_A.mul_(experts) if init is Init.gaussian else lora_A), lora_B


def _check_rank(rank: int, base_weight: Tensor, init: Init, name: str) -> None:
    limit = base_weight.shape[1] if init is Init.orthonormal else min(base_weight.shape)
    if rank > limit:
        raise ModelError(
            f"init {init} cannot give {rank} orthonormal rows of length {base_weight.shape[1]}",
            where=name,
            fix=f"set adapter.rank to at most {limit}, or adapter.init=kaiming",
        )


def _right_singular_vectors(weight: Tensor, rank: int) -> Tensor:
    """The ``rank`` directions of the input that ``weight`` (out, in) amplifies most, as rows.

    Each row's sign is fixed (largest component positive), so that the result does not depend on
    the linear algebra library.  A QR step in fp64 makes the rows orthonormal to fp32's last bits.
    """
    _, _, vectors = torch.linalg.svd(weight.float().cpu(), full_matrices=False)
    rows = torch.linalg.qr(vectors[:rank].double().T).Q.T
    largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = rows * largest.sign()
    return signed


@torch.no_grad()
def initial_embedding_factors(
    shape: tuple[int, int], rank: int, init: Init
) -> tuple[Tensor, Tensor]:
    """A (rank, vocabulary) zero and B (width, rank) standard normal, reversed as in PEFT."""
    vocabulary, width = shape
    lora_A = torch.randn(rank, vocabulary)
    lora_B = torch.randn(width, rank)
    if init is Init.random:
        return lora_A, lora_B
    return lora_A.zero_(), nn.init.normal_(lora_B)
