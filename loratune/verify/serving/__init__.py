"""Whether a server would load an adapter and apply it as it was trained, by the server's rules.

    loratune verify target=vllm run=DIR

Each server has a file of its rules, as read in its sources.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.peft_config import CONFIG
from loratune.adapter_files.peft_format import FACTS, TENSORS
from loratune.adapters.config import AdapterConfig
from loratune.adapters.low_rank import LowRank
from loratune.adapters.registry import adapter_class, config_class, variant_names
from loratune.config.convert import read_recipe
from loratune.errors import ConfigError, LoratuneError, ModelError
from loratune.models.source import model_folder
from loratune.models.weights import read_header
from loratune.runs.run_dir import RunDir
from loratune.verify.checks import Check, Verification
from loratune.verify.serving import llama_cpp, ollama, sglang, vllm
from loratune.verify.serving.rules import Rule, ServedAdapter

__all__ = ["Server", "check_rules", "served_adapter", "verify_target"]


class Server(StrEnum):
    """A program that serves adapters."""

    vllm = "vllm"
    sglang = "sglang"
    llama_cpp = "llama.cpp"
    ollama = "ollama"


_RULES: dict[Server, tuple[Rule, ...]] = {
    Server.vllm: vllm.RULES,
    Server.sglang: sglang.RULES,
    Server.llama_cpp: llama_cpp.RULES,
    Server.ollama: ollama.RULES,
}


def verify_target(server: Server, folder: Path, base: Path | None = None) -> Verification:
    """Every rule of a server, checked on an adapter.

    Args:
        server: which.
        folder: a run, an adapter or an export.
        base: the base model's folder; by default the one that the run or the adapter names.

    Raises:
        ConfigError: if there is no adapter in the folder.
        ModelError: if its files cannot be read.
    """
    adapter = served_adapter(folder, base)
    key = "run" if RunDir(folder).recipe.is_file() else "adapter_path"
    checks = check_rules(server, adapter, f"loratune export {key}={folder}")
    return Verification(f"adapter for {server}", folder, checks)


def check_rules(server: Server, adapter: ServedAdapter, export: str) -> list[Check]:
    """One check for each rule of a server.

    Args:
        server: which.
        adapter: what its loader reads.
        export: the command that a rule's ``format=...`` completes.
    """
    checks = []
    for rule in _RULES[server]:
        note = ""
        if not adapter.base and rule.needs_base(adapter):
            note = "needs the base's config.json: set model.path=BASE"
        problem = rule.broken_by(adapter)
        fix = rule.fix(adapter).replace("format=", f"{export} format=")
        checks.append(Check(CONFIG, rule.subject, problem, "" if problem else note, fix=fix))
    return checks


def served_adapter(folder: Path, base: Path | None = None) -> ServedAdapter:
    """What a server reads of the adapter in a folder.

    Raises:
        ConfigError: if there is none.
        ModelError: if its files cannot be read.
    """
    run = RunDir(folder)
    place = run.adapter if run.recipe.is_file() else folder
    if not (place / CONFIG).is_file():
        fix = "name a run, an adapter or an export with its own adapter_config.json"
        raise ConfigError("no adapter here", where=str(folder), fix=fix)
    try:
        peft = files.read_json(place / CONFIG)
    except (OSError, ValueError) as error:
        cause = "the adapter's configuration is unreadable"
        raise ModelError(cause, where=str(place / CONFIG)) from error
    if not isinstance(peft, dict):
        raise ModelError("the adapter's configuration is not a mapping", where=str(place / CONFIG))
    names = tuple(sorted(read_header(place / TENSORS)))
    return ServedAdapter(peft, names, _base_config(run, place, base), _is_low_rank(peft))


def _is_low_rank(peft: Mapping[str, Any]) -> bool:
    """Whether the variants with such a file correct weights by a product of two factors."""

    def reads(variant: type[AdapterConfig]) -> bool:
        switches = all(peft.get(key) for key in variant.peft_switches)
        return variant.peft_type == peft.get("peft_type") and switches

    names = [name for name in variant_names() if reads(config_class(name))]
    most = max((len(config_class(name).peft_switches) for name in names), default=0)
    own = [name for name in names if len(config_class(name).peft_switches) == most]
    return bool(own) and all(issubclass(adapter_class(name), LowRank) for name in own)


def _base_config(run: RunDir, adapter: Path, base: Path | None) -> Mapping[str, Any]:
    """``config.json`` of the base, or nothing where it cannot be found."""
    try:
        folder = base or model_folder(_base_name(run, adapter))
        config = files.read_json(folder / "config.json")
    except (LoratuneError, OSError, ValueError):
        if base is not None:
            raise
        return {}
    return config if isinstance(config, dict) else {}


def _base_name(run: RunDir, adapter: Path) -> str:
    """The base that the run trained on, or that the adapter's record names."""
    if run.recipe.is_file():
        return str(read_recipe(run.recipe)["model"]["path"])
    name = str(files.read_sealed_json(adapter / FACTS).get("base_path") or "")
    if not (name.startswith(files.BUILTIN) or Path(name).is_dir()):
        raise ConfigError("no base", where="model.path")  # a hub id is never fetched unasked
    return name
