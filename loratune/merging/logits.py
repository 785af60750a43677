"""Whole-model proofs: a merged model's logits, or another form's, against base + adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import Verify
from loratune.errors import MergeError
from loratune.models.dtypes import torch_dtype
from loratune.models.fingerprint import base_fingerprint
from loratune.models.load import load_model
from loratune.models.weights import TensorEntry, tensor_entries
from loratune.surgery import WrappedModel, disabled, unwrap_model

AUTO_LIMIT_BYTES = 6 << 30
FP32_TOLERANCE = 3e-5
"""Of the largest logit, between two passes in fp32 that round differently.

A recurrent model (qwen3_5) was seen 1e-5 away from its own logits in float64, merged or not.
"""


@dataclass(frozen=True)
class LogitsProof:
    """Probe logits of two models that should be one, both computed in fp32.

    Attributes:
        tokens: probe tokens.
        max_difference: largest absolute difference.
        max_logit: largest absolute logit, for scale.
        adapter_effect: root mean square of what the adapter changes.
        rms_difference: root mean square difference.
        top1_agreement: share of positions whose most likely token is the same.
    """

    tokens: int
    max_difference: float
    max_logit: float
    adapter_effect: float
    rms_difference: float
    top1_agreement: float


def wants_logits(
    verify: Verify, adapters: Sequence[AdapterFolder], base: Mapping[str, TensorEntry]
) -> bool:
    """Whether to compare logits: when asked, or when the model is small enough to hold twice."""
    if len(adapters) != 1 or verify is Verify.weights:
        return False
    return verify is Verify.logits or sum(e.size for e in base.values()) <= AUTO_LIMIT_BYTES // 3


@torch.inference_mode()
def prove_logits(base_folder: Path, adapter: AdapterFolder, merged_folder: Path) -> LogitsProof:
    """Compare merged model and base + adapter on fixed random tokens.

    In fp32 the two must agree to 1e-5 of the logits' scale.  Where the merged weights were
    rounded to half precision, what the rounding changes must stay below half of what the adapter
    changes.

    Raises:
        MergeError: if they do not agree.
    """
    model: Any = load_model(base_folder, torch.float32)
    wrapped = wrap_for_loading(model, adapter)
    ids = _probe_ids(wrapped.model)
    adapted, base = adapted_and_base_logits(wrapped, ids)
    del model, wrapped
    merged_model: Any = load_model(merged_folder, torch.float32)
    merged: Tensor = merged_model(input_ids=ids, use_cache=False).logits
    proof = logits_proof(adapted, base, merged)
    _judge(proof, _stored_half(merged_folder), merged_folder)
    return proof


@torch.inference_mode()
def prove_same_logits(
    base_folder: Path, original: AdapterFolder, exported: AdapterFolder, *, exact: bool
) -> LogitsProof:
    """Compare an adapter's exported form with the original on the same base, in fp32.

    Args:
        base_folder: the base model's files.
        original: the adapter as trained.
        exported: its other form, as read back from disk.
        exact: the logits must be equal to the bit, else to 1e-5 of their scale.

    Raises:
        MergeError: if they are not.
        ModelError: if a number of the base is NaN or infinite.
    """
    model: Any = load_model(base_folder, torch.float32)
    wrapped = wrap_for_loading(model, original)
    ids = _probe_ids(wrapped.model)
    expected, base = adapted_and_base_logits(wrapped, ids)
    if not torch.isfinite(expected).all():
        base_fingerprint(base_folder)  # names the numbers, if they are the base's
    again = wrap_for_loading(unwrap_model(wrapped), exported)
    got, _ = adapted_and_base_logits(again, ids)
    proof = logits_proof(expected, base, got)
    limit = 0.0 if exact else FP32_TOLERANCE * max(1.0, proof.max_logit)
    if not proof.max_difference <= limit:
        raise MergeError(
            f"the exported form's logits differ by {proof.max_difference:.2g}",
            where=str(exported.path.name),
            fix="nothing was published; report this with the adapter's configuration",
        )
    return proof


def adapted_and_base_logits(wrapped: WrappedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with the adapter and without it."""
    model = wrapped.model.eval()
    adapted: Tensor = model(input_ids=ids, use_cache=False).logits
    with disabled(wrapped):
        base: Tensor = model(input_ids=ids, use_cache=False).logits
    return adapted, base


def logits_proof(adapted: Tensor, base: Tensor, other: Tensor) -> LogitsProof:
    """How far ``other`` is from ``adapted``; ``base`` gives the scale of the adapter's effect."""
    return LogitsProof(
        tokens=adapted.shape[0] * adapted.shape[1],
        max_difference=float((other - adapted).abs().max()),
        max_logit=float(adapted.abs().max()),
        adapter_effect=_rms(adapted - base),
        rms_difference=_rms(other - adapted),
        top1_agreement=float((other.argmax(-1) == adapted.argmax(-1)).float().mean()),
    )


def _rms(values: Tensor) -> float:
    return float(values.double().pow(2).mean().sqrt())


def _probe_ids(model: Any) -> Tensor:
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocabulary, (2, 24), generator=generator)


def _stored_half(folder: Path) -> torch.dtype | None:
    dtypes = {entry.dtype for entry in tensor_entries(folder).values()}
    return next((torch_dtype(dtype) for dtype in ("BF16", "F16") if dtype in dtypes), None)


def _judge(proof: LogitsProof, half: torch.dtype | None, folder: Path) -> None:
    scale = max(1.0, proof.max_logit)
    if half is None:
        passed = proof.max_difference <= FP32_TOLERANCE * scale
    else:
        noise = torch.finfo(half).eps * scale
        passed = proof.rms_difference <= max(0.5 * proof.adapter_effect, noise)
    if not passed:
        raise MergeError(
            f"merged logits differ from base + adapter by {proof.max_difference:.2g}",
            where=str(folder.name),
            fix="nothing was published; report this with merge_report.json's facts",
        )
