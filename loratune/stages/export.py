"""Write an adapter for other tools, each form checked against the original before it appears."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune import files
from loratune.adapter_files.forms import EXACT, FORMS
from loratune.adapter_files.offline import attach
from loratune.adapter_files.peft_format import AdapterFolder, write_adapter_files
from loratune.adapter_files.tokenizer import own_tokenizer
from loratune.config.schema import ExportFormat, Verify
from loratune.merging.export_proof import prove_export
from loratune.merging.folder import copy_side_files
from loratune.models.fingerprint import tensors_fingerprint
from loratune.runs.manifest import CARD, describe_files
from loratune.runs.provenance import package_versions
from loratune.runs.run_dir import CERTIFICATE

Card = Callable[[Mapping[str, Any], Sequence[str], Mapping[str, Any]], str]
"""``adapter_config.json``, names of tensors and proof to the text of a README.md."""


def export(
    adapter: AdapterFolder,
    base_folder: Path,
    out: Path,
    form: ExportFormat,
    verify: Verify = Verify.auto,
    card: Card | None = None,
) -> dict[str, Any]:
    """Write an adapter in another form; whole or not at all.

    Args:
        adapter: as read from its folder.
        base_folder: its base model: names and shapes, and weights for the logits' proof.
        out: must not exist, or be empty.
        form: peft, portable, lora or compact (``merged`` is the merge stage's work).
        verify: weights proves ΔW alone; logits the whole model too; auto if the base fits.
        card: writes its README.md from adapter_config.json, the names of tensors and the proof.

    Returns:
        The certificate that was written beside it.

    Raises:
        MergeError: if the result does not compute the same.
        LoratuneError: if the adapter or its base is unusable.
    """
    files.check_outside(out, base_folder, adapter.path)
    offline = attach(base_folder, adapter)
    config, tensors, facts = FORMS[form](offline)
    with files.published_folder(out) as target:
        write_adapter_files(target, config, tensors, facts)
        resized = offline.vocabulary is not None
        if own_tokenizer(adapter, offline.rows, resized=resized)[0] is not None:
            copy_side_files(adapter.path, target)
        proof = prove_export(offline, target, exact=form in EXACT, verify=verify)
        if card is not None:
            files.write_text(target / CARD, card(config, sorted(tensors), proof))
        certificate = _certificate(adapter, form, tensors, proof, target)
        files.write_sealed_json(target / CERTIFICATE, certificate)
    return certificate


def _certificate(
    adapter: AdapterFolder,
    form: ExportFormat,
    tensors: Mapping[str, Tensor],
    proof: Mapping[str, Any],
    target: Path,
) -> dict[str, Any]:
    return {
        "format": 1,
        "form": str(form),
        "base": adapter.facts.get("base"),
        "tokenizer": adapter.facts.get("tokenizer"),
        "original": tensors_fingerprint(adapter.tensors),
        "exported": tensors_fingerprint(tensors),
        "proof": dict(proof),
        "versions": package_versions(),
        "files": describe_files(target.iterdir()),
    }
