"""Starting values of LoRA's factors.

The draws from torch's global generator come in PEFT's order (A, then B, then A again), so that
the same seed gives the same numbers.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from loratune.adapters.base import LayerPlan, data_device
from loratune.adapters.config import LayerKind
from loratune.adapters.kernels.blocks import blocks_of, weight_of
from loratune.adapters.lora.config import Init
from loratune.errors import ModelError


def initial_parameters(
    plan: LayerPlan, init: Init, scaling: float
) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) for a layer, trainable, in fp32 and where its weight is.

    Args:
        plan: the layer, its rank.
        init: how to start.
        scaling: factor s on B A.

    Raises:
        ModelError: if the layer is too narrow for this start.
    """
    weight = _weight_to_read(plan, init)
    if init is Init.loftq and plan.shape.kind is not LayerKind.linear:
        raise ModelError(
            "init loftq starts from what quantizing a layer lost, and this one is not quantized",
            where=plan.shape.name,
            fix="leave it out of the targets, or set adapter.init=kaiming",
        )
    if plan.shape.kind is LayerKind.embedding:
        vocabulary, width = weight.shape
        factors = initial_embedding_factors((vocabulary, width), plan.rank, init)
    elif plan.shape.is_stacked:
        sizes = plan.shape.experts, plan.shape.out_features, plan.shape.in_features
        factors = initial_expert_factors(sizes, plan.rank, init)
    else:
        oriented = weight if plan.shape.kind is LayerKind.linear else weight.T
        factors = initial_factors(oriented, plan.rank, init, plan.shape.name)
        if init in (Init.pissa, Init.olora):
            _check_rank(plan.rank, oriented, init, plan.shape.name)
            factors = _leading_factors(oriented, plan.rank, init, scaling)
        elif init is Init.loftq:
            factors = _error_factors(plan, oriented, scaling)
    stored = plan.base_layer.weight
    assert isinstance(stored, Tensor)
    lora_A, lora_B = (nn.Parameter(factor.to(data_device(stored))) for factor in factors)
    return lora_A, lora_B


def _weight_to_read(plan: LayerPlan, init: Init) -> Tensor:
    """The base weight, or an empty one of its shape where the start needs no more of it."""
    if init.reads_weight:
        return plan.weight()
    if blocks_of(plan.base_layer) is not None:
        return torch.empty(plan.shape.out_features, plan.shape.in_features, device="meta")
    return weight_of(plan.base_layer)


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
    if init in (Init.kaiming, Init.loftq) or init.is_subtracted:
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
def _leading_factors(
    weight: Tensor, rank: int, init: Init, scaling: float
) -> tuple[Tensor, Tensor]:
    """A₀ and B₀ from a decomposition of ``weight`` (out, in), in fp32 on its device.

    PiSSA: U√(S/s) and √(S/s)Vᵀ of the largest singular values, so that s·B₀A₀ is their part of W.
    OLoRA: the first columns of Q and rows of R.
    """
    weight = weight.float()
    if init is Init.olora:
        Q, R = torch.linalg.qr(weight)
        return R[:rank].contiguous(), Q[:, :rank].contiguous()
    U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
    roots = torch.diag(torch.sqrt(S[:rank] / scaling))
    return roots @ Vh[:rank], U[:, :rank] @ roots


@torch.no_grad()
def _error_factors(plan: LayerPlan, quantized: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A and B whose s·B A is the best rank-r approximation of W − W_q, in fp32.

    The singular vectors come from the Gram matrix of the narrow side, in fp64: the error's
    singular values lie close together, and a randomised decomposition would miss some of them.

    Raises:
        ModelError: if the layer is not quantized, or was read so from its files.
    """
    if plan.original is None:
        raise ModelError(
            "init loftq starts from what quantizing the layer lost, and that is not known of it",
            where=plan.shape.name,
            fix="set model.quantize=nf4 on a base that is not quantized, or adapter.init=kaiming",
        )
    _check_rank(plan.rank, quantized, Init.loftq, plan.shape.name)
    error = (plan.original().to(quantized.device).float() - quantized.float()).double()
    is_wide = error.shape[0] <= error.shape[1]
    narrow = error if is_wide else error.T
    vectors = torch.linalg.eigh(narrow @ narrow.T).eigenvectors[:, -plan.rank :]
    rows = vectors.T @ narrow
    roots = rows.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny).sqrt()
    left = vectors * (roots / math.sqrt(scaling))
    right = rows / (roots * math.sqrt(scaling))[:, None]
    A, B = (right, left) if is_wide else (left.T, right.T)
    return A.float().contiguous(), B.float().contiguous()


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
