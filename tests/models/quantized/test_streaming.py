"""Whole bases in 4 and 8 bits: what is quantized, what is refused, what other libraries read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.quantized import KINDS, quantized_model, wide_base
from support.tiny_models import logits, save_base, tiny_gpt2, tiny_llama, tiny_opt

from loratune.adapters.kernels.blocks import weight_of
from loratune.config.schema import ModelConfig, Quantize
from loratune.errors import ConfigError, LoratuneError, ModelError
from loratune.merging.quantized_folders import write_dequantized, write_quantized
from loratune.models.load import load_model
from loratune.models.measure import count_numbers
from loratune.models.quantized.format import Quantization, find_quantization
from loratune.models.quantized.streaming import quantized_layers

kinds = pytest.mark.parametrize("kind", KINDS)


def base_of(family: str, folder: Path) -> Path:
    build = {
        "llama": lambda: tiny_llama(hidden_size=64, intermediate_size=128),
        "opt": lambda: tiny_opt(hidden_size=64, word_embed_proj_dim=64, ffn_dim=128),
        "gpt2": lambda: tiny_gpt2(n_embd=64, n_inner=128),
    }[family]
    return save_base(folder, build())


@kinds
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_model_is_the_plain_one_with_its_linear_layers_rounded(
    family: str, kind: str, tmp_path: Path
) -> None:
    folder = base_of(family, tmp_path / "base")
    plain, model = load_model(folder, torch.float32), quantized_model(folder, kind)
    layers = dict(quantized_layers(model))
    assert layers
    assert model.get_output_embeddings() not in layers.values()
    for name, layer in layers.items():
        module: Any = plain.get_submodule(name)
        wide = weight_of(layer)
        turned = type(module).__name__ == "Conv1D"
        with torch.no_grad():
            difference = (wide.T if turned else wide) - module.weight
            assert 0 < difference.norm() < 0.2 * module.weight.norm()
            module.weight.copy_(wide.T if turned else wide)
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    assert count_numbers(model) == sum(p.numel() for p in plain.parameters())


@kinds
@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_the_dequantized_folder_holds_what_the_quantized_model_computes_with(
    family: str, kind: str, tmp_path: Path
) -> None:
    folder = base_of(family, tmp_path / "base")
    target = tmp_path / "plain"
    target.mkdir()
    write_dequantized(folder, KINDS[kind], target)
    plain, model = load_model(target, torch.float32), quantized_model(folder, kind)
    for name, layer in quantized_layers(model):
        module: Any = plain.get_submodule(name)
        turned = type(module).__name__ == "Conv1D"
        assert torch.equal(module.weight.T if turned else module.weight, weight_of(layer)), name
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-5, atol=1e-5)


@kinds
def test_transformers_and_we_read_a_quantized_folder_alike(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it to read such a folder")
    from transformers import AutoModelForCausalLM

    folder, target = wide_base(tmp_path / "base"), tmp_path / "quantized"
    target.mkdir()
    write_quantized(folder, KINDS[kind], target)
    ours, asked = load_model(target, torch.float32), quantized_model(folder, kind)
    assert torch.equal(logits(ours), logits(asked))
    theirs = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32)
    for name, layer in quantized_layers(ours):
        other = theirs.get_submodule(name).weight
        assert torch.equal(other.data.view(-1), layer.weight.data.view(-1)), name
    again = tmp_path / "plain"
    again.mkdir()
    found = find_quantization(target)
    assert found is not None and found.in_files and found.kind == KINDS[kind].kind
    write_dequantized(target, found, again)
    torch.testing.assert_close(
        logits(load_model(again, torch.float32)), logits(ours), rtol=1e-5, atol=1e-5
    )


def test_layers_are_skipped_by_name(tmp_path: Path) -> None:
    folder = wide_base(tmp_path)
    asked = Quantization(Quantize.nf4, skip=("down_proj",))
    names = [
        name for name, _ in quantized_layers(load_model(folder, torch.float32, quantization=asked))
    ]
    assert names and not [name for name in names if name.endswith("down_proj")]


def test_bad_input_is_told_in_one_line_with_a_way_out(tmp_path: Path) -> None:
    narrow = save_base(tmp_path / "narrow", tiny_llama(hidden_size=64, intermediate_size=24))
    with pytest.raises(
        ModelError, match="reads 24 numbers, which blocks of 64 do not divide"
    ) as told:
        load_model(narrow, torch.float32, quantization=KINDS["nf4"])
    assert told.value.exit_code == 4 and "model.quantize_skip=[down_proj]" in told.value.fix
    load_model(narrow, torch.float32, quantization=KINDS["int8"])
    unknown = Quantization(Quantize.nf4, skip=("down_prj", "down_proj"))
    with pytest.raises(ModelError, match="no linear layer is named 'down_prj'"):
        load_model(narrow, torch.float32, quantization=unknown)


def with_config(folder: Path, **entry: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    return folder


@pytest.mark.parametrize("method", ["gptq", "awq", "fp8", "compressed-tensors"])
def test_other_formats_are_refused_by_name(method: str, tmp_path: Path) -> None:
    folder = with_config(wide_base(tmp_path), quant_method=method)
    with pytest.raises(ModelError, match=f"quantized by '{method}'") as told:
        load_model(folder, torch.float32)
    assert "model.quantize=nf4" in told.value.fix


def test_a_quantized_folder_is_not_quantized_again(tmp_path: Path) -> None:
    folder = with_config(wide_base(tmp_path), quant_method="bitsandbytes", load_in_8bit=True)
    with pytest.raises(ConfigError, match=r"quantized already \(int8\)"):
        find_quantization(folder, ModelConfig(path=str(folder), quantize=Quantize.nf4))


@pytest.mark.parametrize("fault", ["missing", "shape", "left over", "scales"])
def test_files_that_do_not_fit_are_refused(fault: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = wide_base(tmp_path / "base")
    if fault == "scales":
        (tmp_path / "q").mkdir()
        write_quantized(folder, KINDS["nf4"], tmp_path / "q")
        folder = tmp_path / "q"
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.mlp.down_proj.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:, :64].contiguous()
    elif fault == "left over":
        tensors["model.layers.0.mlp.other.weight"] = torch.ones(2, 2)
    else:
        del tensors[f"{name}.absmax"]
    save_file(tensors, file, metadata={"format": "pt"})
    asked = None if fault == "scales" else KINDS["nf4"]
    with pytest.raises(LoratuneError, match=r"down_proj|mlp\.other"):
        load_model(folder, torch.float32, quantization=asked)
