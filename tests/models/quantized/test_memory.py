"""Memory of quantized bases: counted beforehand, while they are read, and in a training step."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_oracle import our_model
from support.quantized import KINDS, quantized_model, wide_base
from torch import Tensor

from loratune.config.schema import ModelConfig
from loratune.counting.variant_table import count_table
from loratune.doctor.environment import check_environment
from loratune.models.measure import find_architecture, measure_model
from loratune.models.quantized import library
from loratune.models.quantized.choice import base_bytes
from loratune.models.quantized.streaming import quantized_layers


def resident_bytes(model: Any) -> int:
    """Everything that the model's tensors hold, each once; tables of 16 numbers left out."""
    held = {p.data_ptr(): p.nbytes for p in model.parameters()}
    for _, layer in quantized_layers(model):
        state = getattr(layer.weight, "quant_state", None)
        scales = [layer.weight.SCB] if state is None else [state.absmax]
        if state is not None and state.nested:
            scales += [state.offset, state.state2.absmax, state.state2.code]
        held |= {one.data_ptr(): one.nbytes for one in scales}
    return sum(held.values())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_bytes_of_a_base_are_counted_before_it_is_read(
    kind: str, tied: bool, tmp_path: Path
) -> None:
    folder = wide_base(tmp_path, tied=tied)
    architecture = find_architecture(ModelConfig(path=str(folder)))
    counted = base_bytes(
        architecture.layers, architecture.base_parameters, KINDS[kind], torch.float32.itemsize
    )
    held = resident_bytes(quantized_model(folder, kind))
    assert abs(counted - held) <= 0.05 * held
    assert measure_model(quantized_model(folder, kind)).layers == architecture.layers


@pytest.mark.parametrize("variant", ["lora_fa", "vera"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_autograd_keeps_r_numbers_per_token(variant: str, kind: str, tmp_path: Path) -> None:
    """Beyond what the adapter itself holds; a plain base is the measure."""
    folder, rank, tokens = wide_base(tmp_path), 4, 40
    model = quantized_model(folder, kind)
    name = "model.layers.0.mlp.down_proj"
    wrapped = our_model(model, variant, ["down_proj"], rank=rank, kernel="auto")
    layer = wrapped.adapters[name]
    own = {t.data_ptr() for t in (*layer.parameters(), *layer.buffers())}
    kept: list[Tensor] = []
    x = torch.randn(tokens, layer.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = layer.train()(x)
    sizes = {t.data_ptr(): t.numel() for t in kept if t.data_ptr() not in own}
    assert 0 < sum(sizes.values()) <= rank * tokens
    y.sum().backward()


LOADING = """
import json, re, sys
from pathlib import Path
import torch
from loratune.models.build import meta_base
from loratune.models.load import load_model
from loratune.models.quantized import layers, streaming
from loratune.models.quantized.format import Quantization

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

torch.set_num_threads(1)
folder = Path(sys.argv[1])
meta_base(folder)
before = status("VmRSS")
quantization = Quantization.from_dict(json.loads(sys.argv[2]))
model = load_model(folder, torch.float32, quantization=quantization)
print(status("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_loading_needs_no_more_than_the_base_and_two_of_its_tensors(
    kind: str, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 8}
    folder = wide_base(tmp_path, vocab_size=20_000, **sizes)
    done = subprocess.run(
        [sys.executable, "-c", LOADING, str(folder), json.dumps(KINDS[kind].to_dict())],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    architecture = find_architecture(ModelConfig(path=str(folder)))
    base = base_bytes(architecture.layers, architecture.base_parameters, KINDS[kind], 4)
    largest = 20_000 * 768 * 4
    assert base < int(done.stdout) <= base + 2 * largest < 4 * architecture.base_parameters


def test_doctor_says_in_one_line_that_bitsandbytes_is_missing_or_has_no_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def found() -> tuple[str, str]:
        [one] = [f for f in check_environment() if f.name == "bitsandbytes"]
        return str(one.status), one.detail

    assert found()[0] == "ok"
    import bitsandbytes.cextension as compiled

    broken = copy.copy(object.__new__(compiled.ErrorHandlerMockBNBNativeLibrary))
    monkeypatch.setattr(compiled, "lib", broken)
    assert found()[0] == "warn" and "no compiled library" in found()[1]
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    assert found()[0] == "warn" and "need bitsandbytes" in found()[1]
    assert library.INSTALL.startswith("pip install")


def test_count_params_tells_the_stored_bits_and_leaves_out_what_cannot_train(
    tmp_path: Path,
) -> None:
    from loratune.adapters.registry import config_class
    from loratune.config.schema import Quantize, RunConfig, TargetsConfig

    model = ModelConfig(path=str(wide_base(tmp_path)), quantize=Quantize.nf4)
    config = RunConfig(
        model=model, targets=TargetsConfig(modules="all_linear"), adapter=config_class("lora")()
    )
    table = count_table(config)
    assert any("4.50 bits a weight" in note for note in table.notes)
    assert "full" not in {row.variant for row in table.report.variants}
    assert any(note.startswith("full is left out") for note in table.notes)
