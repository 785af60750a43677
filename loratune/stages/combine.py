"""Several adapters as one: their weighted sum, proved before it appears."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.offline import attach
from loratune.adapter_files.peft_format import AdapterFolder, write_adapter_files
from loratune.adapter_files.plain_lora import plain_facts, plain_lora
from loratune.errors import ConfigError, MergeError
from loratune.merging.export_proof import prove_sum
from loratune.models.fingerprint import base_fingerprint, tensors_fingerprint
from loratune.runs.drift import check_binding
from loratune.runs.manifest import describe_files
from loratune.runs.provenance import package_versions
from loratune.runs.run_dir import CERTIFICATE


def combine(
    adapters: Sequence[AdapterFolder],
    weights: Sequence[float],
    base_folder: Path,
    out: Path,
    *,
    tokenizer: str | None = None,
    allow_drift: Sequence[str] = (),
) -> dict[str, Any]:
    """Write Σ weight · ΔW as one plain LoRA adapter; whole or not at all.

    Its rank is the sum of the adapters' ranks, so that nothing is approximated.

    Args:
        adapters: as read from their folders, all of one base.
        weights: one an adapter; may be negative, not all zero.
        base_folder: the base model's files.
        out: must not exist, or be empty.
        tokenizer: fingerprint of the base's tokenizer.
        allow_drift: recorded facts (base, tokenizer) allowed to differ.

    Returns:
        The certificate that was written beside it.

    Raises:
        ConfigError: unusable weights.
        ModelError: naming what of an adapter has no exact sum.
        MergeError: another base, or a result that does not prove itself.
    """
    _check_weights(weights, len(adapters))
    files.check_outside(out, base_folder, *(adapter.path for adapter in adapters))
    base = base_fingerprint(base_folder)
    for adapter in adapters:
        where = str(adapter.path)
        check_binding(adapter.facts, base, tokenizer, allow_drift, where=where, error=MergeError)
    offlines = [attach(base_folder, adapter) for adapter in adapters]
    config, tensors = plain_lora(offlines, weights)
    terms = [
        {"adapter": tensors_fingerprint(adapter.tensors), "weight": weight}
        for adapter, weight in zip(adapters, weights, strict=True)
    ]
    facts = {**plain_facts(offlines), "combined": terms}
    with files.published_folder(out) as target:
        write_adapter_files(target, config, tensors, facts)
        certificate = {
            "format": 1,
            "form": "combined",
            "base": base,
            "tokenizer": tokenizer,
            "terms": terms,
            "rank": config["r"],
            "exported": tensors_fingerprint(tensors),
            "proof": prove_sum(offlines, weights, target),
            "versions": package_versions(),
            "files": describe_files(target.iterdir()),
        }
        files.write_sealed_json(target / CERTIFICATE, certificate)
    return certificate


def _check_weights(weights: Sequence[float], adapters: int) -> None:
    if len(weights) != adapters:
        raise ConfigError(
            f"{len(weights)} weights for {adapters} adapters",
            where="weights",
            fix="give one an adapter",
        )
    if not all(math.isfinite(weight) for weight in weights) or not any(weights):
        raise ConfigError(
            f"weights {list(weights)} give no adapter",
            where="weights",
            fix="use finite numbers, one at least other than 0",
        )
