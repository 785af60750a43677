"""``verify served=`` against llama.cpp's own server on a loopback port: right ones, wrong ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from gguf_files.bases import tiny_base
from support.served_model import CHAT, conversations, recorded
from transformers import AutoTokenizer

from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.registry import config_class
from loratune.config.schema import GgufConfig, GgufDtype, RowFormat, TargetsConfig, Verify
from loratune.data.templates import PromptFormat
from loratune.models.load import load_model
from loratune.runs.golden import write_golden
from loratune.stages.export_gguf import export_gguf
from loratune.surgery import WrappedModel, wrap_model
from loratune.verify import Verification
from loratune.verify.served import verify_served

pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
pytest.importorskip("llama_cpp.server.app", reason="llama-cpp-python's server is not installed")
pytestmark = pytest.mark.slow
PATIENCE = 120.0
TEMPLATE = "{{ bos_token }}" + CHAT
"""With the start token: llama-cpp-python puts none before what a template writes."""
FORMAT = PromptFormat(RowFormat.messages, chat_template=TEMPLATE)
DTYPES = [GgufDtype.f16, GgufDtype.q8_0]


@dataclass
class World:
    """A base with a chat template, and the golden prompts of an adapter on it."""

    folder: Path
    base: Path
    golden: Path

    def wrapped(self, seed: int = 1, factor: float = 1.0) -> WrappedModel:
        config = config_class("lora")(rank=4)
        targets = TargetsConfig(modules=["q_proj", "v_proj", "down_proj"])
        wrapped = wrap_model(load_model(self.base, torch.float32), config, targets)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in wrapped.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
                    parameter.mul_(factor if "lora_B" in name else 1.0)
        wrapped.model.eval()
        return wrapped

    def exported(self, name: str, dtype: GgufDtype = GgufDtype.f16, **changes: Any) -> Path:
        """The merged model of an adapter as GGUF."""
        out = self.folder / name
        if not out.is_dir():
            adapter = self.folder / f"{name}-adapter"
            adapter.mkdir()
            facts = {"prompt_format": FORMAT.to_dict()}
            write_adapter(adapter, self.wrapped(**changes), facts, str(self.base))
            export_gguf(
                read_adapter(adapter), self.base, out, GgufConfig(dtype=dtype), alone=False,
                verify=Verify.weights,
            )  # fmt: skip
        return out / "model.gguf"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("world")
    base = tiny_base(folder / "llama", "llama", initializer_range=0.3)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(base)
    world = World(folder, base, folder / "golden.json")
    write_golden(
        world.golden, recorded(world.wrapped(), tokenizer, conversations(folder, tokenizer))
    )
    return world


@contextmanager
def running(model: Path, *words: str) -> Iterator[str]:
    """llama-cpp-python's server; its URL."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [
            sys.executable, "-m", "llama_cpp.server", "--model", str(model), "--port", str(port),
            "--n_ctx", "256", "--logits_all", "true", "--n_threads", "1", *words,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {"HOST": "127.0.0.1"},
    )  # fmt: skip
    url, ends = f"http://127.0.0.1:{port}", time.monotonic() + PATIENCE
    try:
        while time.monotonic() < ends and process.poll() is None:
            try:
                urllib.request.urlopen(f"{url}/v1/models", timeout=5).read()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait(PATIENCE)


def asked(world: World, model: Path, *words: str) -> Verification:
    with running(model, *words) as url:
        return verify_served(url, world.golden, timeout=PATIENCE)


def problems(result: Verification) -> str:
    return "; ".join(check.problem for check in result.problems)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_right_server_is_not_accused(dtype: GgufDtype, world: World) -> None:
    result = asked(world, world.exported(f"right-{dtype}", dtype))
    assert [check.status for check in result.checks] == ["ok", "ok"], repr(result)


def test_the_base_is_told(world: World) -> None:
    result = asked(world, world.exported("base", factor=1e-6))
    assert "the base model" in problems(result)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_wrong_scale_is_told(factor: float, world: World) -> None:
    result = asked(world, world.exported(f"times-{factor}", factor=factor))
    assert "wrong scale" in problems(result)


def test_another_adapter_is_told(world: World) -> None:
    result = asked(world, world.exported("other", seed=2))
    assert "another adapter" in problems(result)


def test_another_template_is_told(world: World) -> None:
    right = world.exported(f"right-{GgufDtype.f16}", GgufDtype.f16)
    result = asked(world, right, "--chat_format", "llama-2")
    assert "another template" in problems(result)
