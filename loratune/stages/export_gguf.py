"""Write base + adapter, or the adapter alone, as GGUF, and ask llama.cpp the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.offline import attach, has_no_effect
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.adapter_files.tokenizer import own_tokenizer
from loratune.config.schema import DataConfig, Dtype, ExportFormat, GgufConfig, Verify
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.errors import MergeError
from loratune.generation import folder_stop_ids
from loratune.gguf_files.adapter_file import write_adapter
from loratune.gguf_files.llama_cpp import PACKAGE, is_installed
from loratune.gguf_files.model_file import write_model
from loratune.gguf_files.modelfile import write_modelfile
from loratune.gguf_files.proof import own_answers, prove_answers
from loratune.gguf_files.questions import prompt_ids
from loratune.gguf_files.reading import check_base
from loratune.gguf_files.tokenizer import read_tokenizer
from loratune.merging.folder import replaced_tokenizer
from loratune.merging.logits import wants_logits
from loratune.merging.plan import MergePlan
from loratune.models.fingerprint import base_fingerprint, tensors_fingerprint, tokenizer_fingerprint
from loratune.models.load import load_tokenizer
from loratune.models.weights import tensor_entries
from loratune.runs.drift import check_binding
from loratune.runs.manifest import describe_files
from loratune.runs.provenance import package_versions
from loratune.runs.run_dir import CERTIFICATE

MODEL, ADAPTER = "model.gguf", "adapter.gguf"


def export_gguf(
    adapter: AdapterFolder,
    base_folder: Path,
    out: Path,
    config: GgufConfig,
    *,
    alone: bool,
    verify: Verify = Verify.auto,
    allow_drift: Sequence[str] = (),
) -> dict[str, Any]:
    """Write base + adapter, or the adapter alone, as GGUF; whole or not at all.

    Args:
        adapter: as read from its folder.
        base_folder: its base model's files.
        out: must not exist, or be empty.
        config: number format, and a GGUF base that the adapter is to run on.
        alone: write the adapter without the base.
        verify: weights leaves llama.cpp out; auto asks it where the base fits in memory.
        allow_drift: recorded facts (base, tokenizer) allowed to differ.

    Returns:
        The certificate that was written beside it.

    Raises:
        ModelError: if llama.cpp would compute or tokenize something else, or ``config.base`` is
            another model.
        MergeError: another base than in training, or llama.cpp answers otherwise.
    """
    files.check_outside(out, base_folder, adapter.path)
    exported = _Export(adapter, base_folder)
    base = base_fingerprint(base_folder)
    check_binding(
        adapter.facts,
        base,
        exported.base_tokenizer,
        allow_drift,
        where=str(adapter.path),
        error=MergeError,
    )
    with files.published_folder(out) as target:
        write = _write_alone if alone else _write_merged
        written = write(exported, target, config)
        certificate = {
            "format": 1,
            "form": str(ExportFormat.gguf_lora if alone else ExportFormat.gguf),
            "base": base,
            "tokenizer": exported.base_tokenizer,
            "original": tensors_fingerprint(adapter.tensors),
            **written,
            "llama_cpp": _asked(exported, target, config, alone=alone, verify=verify),
            "versions": package_versions(),
            "files": describe_files(target.iterdir()),
        }
        files.write_sealed_json(target / CERTIFICATE, certificate)
    return certificate


class _Export:
    """An adapter on its base, with the tokenizer and the prompts that belong to it."""

    def __init__(self, adapter: AdapterFolder, base_folder: Path) -> None:
        self.adapter, self.base_folder = adapter, base_folder
        self.offline = attach(base_folder, adapter)
        if has_no_effect(self.offline):
            raise MergeError(
                "the adapter has no effect: every correction is zero",
                where=str(adapter.path),
                fix="train it first",
            )
        self.tokenizer: Tokenizer = load_tokenizer(base_folder)
        self.base_tokenizer = tokenizer_fingerprint(self.tokenizer)
        resized = self.offline.vocabulary is not None
        own, _ = own_tokenizer(adapter, self.offline.rows, resized=resized)
        if own is not None:
            self.tokenizer = replaced_tokenizer(base_folder, own)
        recorded = adapter.facts.get("prompt_format")
        self.prompt_format = PromptFormat.from_dict(recorded) if recorded else None
        self.stops = folder_stop_ids(base_folder, self.tokenizer, self.prompt_format)


def _write_merged(exported: _Export, target: Path, config: GgufConfig) -> dict[str, Any]:
    plan = MergePlan([exported.adapter], exported.base_folder, Dtype.float32)
    template = exported.prompt_format.chat_template if exported.prompt_format else None
    written = write_model(
        plan,
        exported.tokenizer,
        target / MODEL,
        config.dtype,
        stops=exported.stops,
        template=template,
    )
    note = _modelfile(exported, target, [f"FROM ./{MODEL}"])
    worst = max(written.proofs, key=lambda proof: proof.residual, default=None)
    return {
        "architecture": written.architecture,
        "tokenized_as": written.tokenizer,
        "types": written.types,
        "modules": len(written.proofs),
        "worst_module": None if worst is None else asdict(worst),
        "notes": [*written.notes, *filter(None, [note])],
    }


def _write_alone(exported: _Export, target: Path, config: GgufConfig) -> dict[str, Any]:
    architecture = write_adapter(exported.offline, target / ADAPTER)
    base = None if config.base is None else Path(config.base)
    if base is not None:
        words = read_tokenizer(exported.tokenizer, exported.offline.rows, str(exported.base_folder))
        check_base(base, exported.offline, words.tokens)
    name = "base.gguf" if base is None else base.name
    note = _modelfile(exported, target, [f"FROM ./{name}", f"ADAPTER ./{ADAPTER}"])
    return {"architecture": architecture, "notes": [note] if note else []}


def _modelfile(exported: _Export, target: Path, source: list[str]) -> str:
    return write_modelfile(
        target, source, exported.tokenizer, exported.prompt_format, exported.stops
    )


def _asked(
    exported: _Export, target: Path, config: GgufConfig, *, alone: bool, verify: Verify
) -> dict[str, Any] | str:
    """What llama.cpp answered, or why it was not asked."""
    reason = _why_not_asked(exported, config, alone=alone, verify=verify)
    if reason:
        return f"not run in llama.cpp: {reason}"
    prompts = prompt_ids(RowTokenizer(exported.tokenizer), exported.prompt_format, DataConfig())
    own = own_answers(
        exported.base_folder, exported.adapter, exported.tokenizer, prompts, exported.stops
    )
    if alone:
        proof = prove_answers(
            Path(str(config.base)), own, exported.tokenizer, None, target / ADAPTER
        )
    else:
        proof = prove_answers(target / MODEL, own, exported.tokenizer, config.dtype)
    return asdict(proof)


def _why_not_asked(exported: _Export, config: GgufConfig, *, alone: bool, verify: Verify) -> str:
    if not is_installed():
        return f"{PACKAGE} is not installed"
    if verify is Verify.weights:
        return "merge.verify=weights"
    if not wants_logits(verify, [exported.adapter], tensor_entries(exported.base_folder)):
        return "the base is too large to compute its answers here; merge.verify=logits asks it"
    if alone and config.base is None:
        return "gguf.base=FILE names the GGUF file that the adapter is to run on"
    return ""
