"""PEFT's adapter format, read and written: the native format of loratune's adapters.

``adapter_config.json`` and ``adapter_model.safetensors`` are what ``PeftModel.from_pretrained``
loads; ``loratune.json`` beside them keeps what PEFT has no place for: the variant, its
training-only settings, and the fingerprints that bind the adapter to its base.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratune import files
from loratune.adapter_files.checks import misfits, unfit_tensors
from loratune.adapter_files.peft_config import (
    CONFIG,
    PREFIX,
    check_rank,
    configs_from_peft,
    edited_settings,
)
from loratune.adapter_files.peft_targets import as_modules, peft_targets
from loratune.adapters.config import AdapterConfig, LayerKind
from loratune.config.convert import to_plain
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError, SecurityError, raise_together
from loratune.models.fingerprint import tensors_fingerprint
from loratune.models.weights import inside, read_all
from loratune.runs.manifest import describe_files
from loratune.runs.sharded import gathered, own_part, part_of
from loratune.surgery import WrappedModel, adapter_state, peft_names

TENSORS = "adapter_model.safetensors"
FACTS = "loratune.json"


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter read from disk, before it is put into a model.

    Attributes:
        path: its folder.
        config: the variant's settings.
        targets: which layers it adapts.
        tensors: keys and values as in the file.
        facts: ``loratune.json``, empty for an adapter that PEFT wrote.
        peft: ``adapter_config.json``, weights of layers named as the layers.
    """

    path: Path
    config: AdapterConfig
    targets: TargetsConfig
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any] = field(default_factory=dict)
    peft: Mapping[str, Any] = field(default_factory=dict)


# -- writing -------------------------------------------------------------------------------


def write_adapter(
    folder: Path, wrapped: WrappedModel, facts: Mapping[str, Any], base_name: str
) -> None:
    """Write a wrapped model's adapter into an (unpublished) folder.

    Args:
        folder: an existing folder, usually a temporary one about to be published.
        wrapped: the model.
        facts: what ``loratune.json`` keeps beside the variant's settings.
        base_name: ``base_model_name_or_path``.

    Raises:
        ModelError: if a tensor is empty or not finite: such an adapter is never published.
    """
    tensors = {name: gathered(tensor).cpu() for name, tensor in adapter_state(wrapped).items()}
    if wrapped.config.leaves_shared_to_seed():
        shared = shared_keys(wrapped)
        tensors = {name: tensor for name, tensor in tensors.items() if name not in shared}
    write_adapter_files(folder, peft_config(wrapped, base_name), tensors, facts)


def write_adapter_files(
    folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
) -> None:
    """Write the three files of an adapter folder, after checking every tensor.

    What lies there already, a tokenizer, is recorded with them.
    """
    raise_together(unfit_tensors(tensors, str(folder / TENSORS)))
    plain = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    save_file(plain, folder / TENSORS, metadata={"format": "pt"})
    files.write_json(folder / CONFIG, dict(config))
    described = describe_files(folder.iterdir())
    hashes = {name: one["sha256"] for name, one in described.items()}
    files.write_sealed_json(folder / FACTS, {**facts, "format": files.FORMAT, "files": hashes})


def check_readable(wrapped: WrappedModel, base_name: str) -> None:
    """Whether our own reader takes the settings that will be written, before anything is trained.

    Raises:
        LoratuneError: if it does not.
    """
    settings = to_plain(wrapped.config)
    facts = {"variant": settings.pop("variant"), "adapter": settings}
    written = json.loads(files.to_json(peft_config(wrapped, base_name)))
    config, _ = configs_from_peft(
        as_modules(written, {"adapter": settings}), facts, Path(TENSORS).parent
    )
    if config.to_peft() != wrapped.config.to_peft():
        raise ModelError(f"{CONFIG} would read back differently", fix="report this with the recipe")


def read_back(folder: Path, wrapped: WrappedModel) -> None:
    """Read a written adapter as any reader would, before it is published.

    Headers, hashes, settings and finite numbers as ``read_adapter`` checks them; then names,
    shapes and, for one module, the values.

    Raises:
        LoratuneError: if it is not what was meant to be written.
    """
    saved = read_adapter(folder)
    state = adapter_state(wrapped)
    shared = shared_keys(wrapped) if wrapped.config.leaves_shared_to_seed() else set()
    where = str(folder / TENSORS)
    raise_together(misfits(state, saved.tensors, shared, where))
    first = next(iter(wrapped.adapters))
    wrong = [
        key
        for key, tensor in saved.tensors.items()
        if key.startswith(f"{PREFIX}{peft_names(wrapped)[first]}.")
        and not torch.equal(part_of(tensor, state[key]), own_part(state[key]).cpu())
    ]
    if saved.config.to_peft() != wrapped.config.to_peft() or wrong:
        what = f"'{wrong[0]}'" if wrong else CONFIG
        raise ModelError(
            f"{what} reads back differently", where=where, fix="report this with the recipe"
        )


def peft_config(
    wrapped: WrappedModel, base_name: str, settings: AdapterConfig | None = None
) -> dict[str, Any]:
    """The ``adapter_config.json`` that makes PEFT build the same adapter.

    Args:
        wrapped: the model.
        base_name: ``base_model_name_or_path``.
        settings: of the variant, by default the model's own.
    """
    own = (settings or wrapped.config).to_peft()
    if "fan_in_fan_out" in own:  # PEFT warns of it where its variant has no such setting
        own["fan_in_fan_out"] = stores_input_first(wrapped)
    config = {
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "modules_to_save": list(wrapped.saved_modules) or None,
        "task_type": "CAUSAL_LM",
        **_token_settings(wrapped),
        **own,
    }
    return {**config, **peft_targets(wrapped, config).settings}


def _token_settings(wrapped: WrappedModel) -> dict[str, Any]:
    """Whose rows train, by embedding; a tied head is PEFT's own affair."""
    own: dict[int, tuple[str, list[int]]] = {}
    for name, rows in wrapped.token_rows.items():
        own.setdefault(id(rows.rows), (name, rows.token_ids.tolist()))
    return {"trainable_token_indices": dict(own.values())} if own else {}


def peft_notices(wrapped: WrappedModel) -> list[str]:
    """What to say before training, where PEFT will not read the adapter as it is meant."""
    problem = peft_targets(wrapped, wrapped.config.to_peft()).problem
    if not problem:
        return []
    return [f"PEFT cannot use this adapter: {problem}; loratune evaluates, merges and exports it"]


def stores_input_first(wrapped: WrappedModel) -> bool:
    """Whether the adapted weights are (in, out), as GPT-2's are; PEFT wants to be told."""
    kinds = {layer.shape.kind for layer in wrapped.adapters.values()}
    return kinds - {LayerKind.embedding} == {LayerKind.conv1d}


# -- reading -------------------------------------------------------------------------------


def read_adapter(folder: Path) -> AdapterFolder:
    """Read an adapter folder, PEFT's or ours.

    Raises:
        ModelError: missing, empty, edited, non-finite or unsupported.
        SecurityError: pickled tensors, or a configuration that is more than data.
    """
    peft = _read_config(folder)
    facts = _read_facts(folder, peft)
    peft = as_modules(peft, facts)
    config, targets = configs_from_peft(peft, facts, folder)
    tensors = _read_tensors(folder)
    check_rank(config, tensors, folder)
    return AdapterFolder(folder, config, targets, tensors, facts, peft)


def _read_config(folder: Path) -> dict[str, Any]:
    path = inside(folder, CONFIG)
    try:
        peft = files.read_json(path)
    except FileNotFoundError as error:
        cause = f"no adapter here: {CONFIG} is missing"
        raise ModelError(cause, where=str(folder), fix=_instead_of_an_adapter(folder)) from error
    except (OSError, ValueError) as error:
        raise ModelError("the adapter's configuration is unreadable", where=str(path)) from error
    if not isinstance(peft, dict):
        raise ModelError("the adapter's configuration is not a mapping", where=str(path))
    return peft


def _instead_of_an_adapter(folder: Path) -> str:
    """What to name instead of a folder that holds something else."""
    if (folder / "recipe.yaml").exists():
        return "this is a run folder: set run=DIR, or adapter_path=DIR/adapter"
    if (folder / "manifest.json").exists():
        return "this is a checkpoint: set adapter_path to the adapter folder of its run"
    if (folder / "config.json").exists():
        return "this is a model: set model.path to it, and adapter_path to an adapter"
    return "set adapter_path to a folder that holds one"


def _read_facts(folder: Path, peft: Mapping[str, Any]) -> dict[str, Any]:
    path = inside(folder, FACTS)
    if not path.exists():
        return {}
    try:
        facts = files.read_sealed_json(path)
    except files.NewerFormatError as error:
        raise ModelError(
            f"the adapter was {error}",
            where=str(path),
            fix="use that version of loratune; to use it as PEFT would, delete loratune.json",
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError("the adapter was edited", where=str(path), fix=_RESTORE) from error
    for name, recorded in dict(facts.get("files", {})).items():
        if name not in (CONFIG, TENSORS):
            continue
        file = folder / name
        if not file.is_file() or files.sha256_file(file) != recorded:
            changes = edited_settings(peft, facts) if name == CONFIG else ""
            raise ModelError(
                f"the adapter was edited: {changes or 'sha256 differs from the recorded one'}",
                where=str(file),
                fix=_RESTORE,
            )
    return facts


_RESTORE = "restore the file; to use it as it is, delete loratune.json"


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = inside(folder, TENSORS)
    if not path.exists() and (folder / "adapter_model.bin").exists():
        raise SecurityError(
            "the adapter is pickled, and pickle can run code",
            where=str(folder / "adapter_model.bin"),
            fix="convert it to safetensors where you trust it",
        )
    tensors = read_all(path)
    raise_together(unfit_tensors(tensors, str(path)))
    return tensors


def shared_keys(wrapped: WrappedModel) -> set[str]:
    """File keys of the tensors that adapters share."""
    return {key for layer in wrapped.adapters.values() for key in layer.shared_tensors()}


def shared_fingerprint(wrapped: WrappedModel) -> str | None:
    """Fingerprint of the tensors that adapters share, or ``None`` where they share none."""
    for adapter in wrapped.adapters.values():
        shared = adapter.shared_tensors()
        return tensors_fingerprint(shared) if shared else None
    return None
