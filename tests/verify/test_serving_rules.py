"""``verify target=``: every rule is broken by a fixture, and satisfied by the fix it names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine
from support.tiny_models import save_base, tiny_llama

from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import ExportFormat, TargetsConfig, Verify
from loratune.errors import ConfigError
from loratune.models.load import load_model
from loratune.stages.export import export
from loratune.surgery import wrap_model
from loratune.verify.serving import Server, served_adapter, verify_target
from loratune.verify.serving.rules import ServedAdapter

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", tiny_llama(tied=True))


def adapter(
    folder: Path, base: Path, variant: str = "lora", modules: Any = "all_linear",
    saved: tuple[str, ...] = (), **settings: Any,
) -> Path:  # fmt: skip
    """An adapter with numbers in it."""
    config = config_class(variant)(**settings)
    targets = TargetsConfig(modules=modules, modules_to_save=list(saved))
    wrapped = wrap_model(load_model(base, torch.float32), config, targets)
    with torch.no_grad():
        for parameter in wrapped.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    folder.mkdir()
    write_adapter(folder, wrapped, {"base_path": str(base)}, str(base))
    return folder


def edited(folder: Path, **settings: Any) -> Path:
    """The same with other settings, as another tool would have written them."""
    (folder / "loratune.json").unlink(missing_ok=True)
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return folder


def with_tensor(folder: Path, name: str) -> Path:
    (folder / "loratune.json").unlink(missing_ok=True)
    tensors = load_file(folder / TENSORS)
    save_file({**tensors, name: torch.ones(4)}, folder / TENSORS)
    return folder


Make = Callable[[Path, Path], Path]
PLAIN: Make = lambda folder, base: adapter(folder, base, rank=4, alpha=8)  # noqa: E731
MADE: dict[str, Make] = {
    "vera": lambda folder, base: adapter(folder, base, "vera", "attention_qv", rank=8),
    "ia3": lambda folder, base: adapter(folder, base, "ia3"),
    "oft": lambda folder, base: adapter(folder, base, "oft"),
    "dora": lambda folder, base: adapter(folder, base, "dora", rank=4),
    "bias": lambda folder, base: edited(PLAIN(folder, base), bias="lora_only"),
    "saved": lambda folder, base: adapter(folder, base, saved=("embed_tokens",), rank=4),
    "tokens": lambda folder, base: edited(PLAIN(folder, base), trainable_token_indices=[3]),
    "rank 32": lambda folder, base: adapter(folder, base, rank=32),
    "rank 32 in one place": lambda folder, base: adapter(
        folder, base, rank=4, rank_pattern={"q_proj": 32}
    ),
    "rank pattern": lambda folder, base: adapter(folder, base, rank=4, rank_pattern={"q_proj": 2}),
    "alpha pattern": lambda folder, base: adapter(
        folder, base, rank=4, alpha_pattern={"q_proj": 2.0}
    ),
    "rslora": lambda folder, base: adapter(folder, base, rank=4, rslora=True),
    "half an alpha": lambda folder, base: adapter(folder, base, rank=4, alpha=2.5),
    "head": lambda folder, base: adapter(folder, base, modules=["lm_head", "q_proj"], rank=4),
    "magnitude": lambda folder, base: with_tensor(
        PLAIN(folder, base), "base_model.model.model.norm.lora_magnitude_vector"
    ),
}  # fmt: skip
BROKEN: list[tuple[Server, str, str, str]] = [
    (Server.vllm, "vera", "kind of adapter", "format=portable"),
    (Server.vllm, "ia3", "kind of adapter", "format=merged"),
    (Server.vllm, "dora", "DoRA", "format=merged"),
    (Server.vllm, "bias", "biases", "bias=none"),
    (Server.vllm, "saved", "modules trained in full", "format=merged"),
    (Server.vllm, "tokens", "rows of embeddings", "format=merged"),
    (Server.vllm, "rank 32", "rank", "--max-lora-rank 32"),
    (Server.vllm, "rank 32 in one place", "rank", "--max-lora-rank 32"),
    (Server.vllm, "rank pattern", "patterns", "format=portable"),
    (Server.vllm, "alpha pattern", "patterns", "format=portable"),
    (Server.sglang, "oft", "kind of adapter", "format=merged"),
    (Server.sglang, "dora", "DoRA", "format=merged"),
    (Server.sglang, "bias", "biases", "bias=none"),
    (Server.sglang, "saved", "modules trained in full", "format=merged"),
    (Server.sglang, "tokens", "rows of embeddings", "format=merged"),
    (Server.sglang, "alpha pattern", "patterns", "format=portable"),
    (Server.sglang, "rslora", "rsLoRA", "format=portable"),
    (Server.llama_cpp, "vera", "tensors", "format=gguf-lora"),
    (Server.llama_cpp, "magnitude", "tensors", "format=gguf"),
    (Server.llama_cpp, "saved", "tensors", "format=gguf"),
    (Server.llama_cpp, "bias", "biases", "bias=none"),
    (Server.llama_cpp, "alpha pattern", "patterns", "format=portable"),
    (Server.llama_cpp, "rslora", "rsLoRA", "format=portable"),
    (Server.llama_cpp, "head", "tied head", "format=gguf"),
    (Server.ollama, "vera", "kind of adapter", "format=portable"),
    (Server.ollama, "dora", "DoRA", "format=merged"),
    (Server.ollama, "bias", "biases", "bias=none"),
    (Server.ollama, "saved", "modules trained in full", "format=merged"),
    (Server.ollama, "tokens", "rows of embeddings", "format=merged"),
    (Server.ollama, "alpha pattern", "patterns", "format=portable"),
    (Server.ollama, "rslora", "rsLoRA", "format=portable"),
    (Server.ollama, "half an alpha", "lora_alpha", "format=portable"),
]


@pytest.mark.parametrize(("server", "name", "subject", "fix"), BROKEN)
def test_a_rule_is_broken_and_its_fix_named(
    server: Server, name: str, subject: str, fix: str, base: Path, tmp_path: Path
) -> None:
    folder = MADE[name](tmp_path / "adapter", base)
    broken = {check.what: check for check in verify_target(server, folder).problems}
    assert subject in broken, broken
    assert fix in broken[subject].fix
    if "format=" in fix and "--max" not in fix:
        assert f"loratune export adapter_path={folder} {fix}" in broken[subject].fix


@pytest.mark.parametrize(
    ("server", "name"), [(s, n) for s, n, _, fix in BROKEN if fix == "format=portable"]
)
def test_the_portable_export_satisfies_the_rule(
    server: Server, name: str, base: Path, tmp_path: Path
) -> None:
    folder = MADE[name](tmp_path / "adapter", base)
    form = ExportFormat.portable
    export(read_adapter(folder), base, tmp_path / "out", form, Verify.weights)
    assert verify_target(server, tmp_path / "out", base).problems == []


@pytest.mark.parametrize("server", Server)
def test_a_plain_adapter_breaks_no_rule(server: Server, base: Path, tmp_path: Path) -> None:
    assert verify_target(server, PLAIN(tmp_path / "adapter", base)).problems == []


def test_every_rule_has_a_fixture() -> None:
    from loratune.verify import serving

    rules = {(server, rule.subject) for server, own in serving._RULES.items() for rule in own}
    elsewhere = {(Server.llama_cpp, "architecture"), (Server.ollama, "architecture")}
    assert rules == {(server, subject) for server, _, subject, _ in BROKEN} | elsewhere


def test_bases_that_llama_cpp_and_ollama_do_not_convert(base: Path, tmp_path: Path) -> None:
    folder = PLAIN(tmp_path / "adapter", base)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "qwen3"}))
    (problem,) = verify_target(Server.ollama, folder, other).problems
    assert "the base is qwen3" in problem.problem and "format=gguf-lora" in problem.fix
    del config["architectures"]
    (other / "config.json").write_text(json.dumps(config))
    (problem,) = verify_target(Server.llama_cpp, folder, other).problems
    assert "names no architectures" in problem.problem


def test_without_a_base_what_needs_it_is_not_checked(base: Path, tmp_path: Path) -> None:
    folder = edited(MADE["head"](tmp_path / "adapter", base))
    checks = {check.what: check for check in verify_target(Server.llama_cpp, folder).checks}
    assert checks["tied head"].status == "not checked" and "model.path" in checks["tied head"].note
    checks = {check.what: check for check in verify_target(Server.llama_cpp, folder, base).checks}
    assert checks["tied head"].status == "differs"


def test_whether_plain_lora_holds_a_variant_is_asked_of_the_variant() -> None:
    from loratune.adapters.low_rank import LowRank
    from loratune.adapters.registry import adapter_class
    from loratune.verify.serving import _is_low_rank

    for name in variant_names():
        if (
            hasattr(config_class(name), "peft_type")
            and not config_class(name)().trains_whole_model()
        ):
            expected = issubclass(adapter_class(name), LowRank)
            assert _is_low_rank(_peft(name)) is expected, name


def _peft(name: str) -> dict[str, Any]:
    config = config_class(name)()
    return {"peft_type": config.peft_type, **dict.fromkeys(config.peft_switches, True)}


def test_the_largest_rank_and_the_export_of_what_is_more_than_factors() -> None:
    assert ServedAdapter({"r": 4, "rank_pattern": {"a": 9}}).largest_rank == 9
    assert ServedAdapter({}).largest_rank == 0
    assert ServedAdapter({"modules_to_save": ["lm_head"]}).export == "format=merged"
    assert ServedAdapter({"trainable_token_indices": [1]}).export == "format=merged"
    assert ServedAdapter({}).export == "format=portable"


def test_what_is_not_an_adapter(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no adapter here"):
        served_adapter(base)
    with pytest.raises(ConfigError, match="no adapter here"):
        served_adapter(tmp_path / "nothing")


def test_the_command(base: Path, tmp_path: Path, cli: CommandLine) -> None:
    folder = MADE["alpha pattern"](tmp_path / "adapter", base)
    done = cli("verify", str(folder), "target=vllm")
    assert done.code == 7 and "format=portable" in done.last and len(done.errors) == 1
    done = cli("verify", str(folder), "target=vllm", "format=json")
    checks = json.loads(done.out)["checks"]
    assert [c["what"] for c in checks if c["status"] == "differs"] == ["patterns"]
    assert "did you mean 'ollama'" in cli("verify", str(folder), "target=olama").last
