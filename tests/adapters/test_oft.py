"""What is special about OFT: it rotates, block by block, and no length changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.peft_oracle import our_model
from support.tiny_models import tiny_gpt2, tiny_llama
from torch import nn

from adapters.test_saved_bytes import BATCH, LENGTH, frozen_base, saved_bytes, wrapped
from loratune.adapter_files.peft_format import peft_notices
from loratune.adapters.config import Kernel, LayerKind, LayerShape
from loratune.adapters.oft.config import OFTConfig
from loratune.adapters.oft.module import OFT
from loratune.errors import ConfigError
from loratune.merging.weight import merged_weight


def turned(build: Any, **settings: Any) -> list[OFT]:
    """The layers of a model, every angle random."""
    model = our_model(build(), "oft", "all-linear", **settings)
    layers = [layer for layer in model.adapters.values() if isinstance(layer, OFT)]
    torch.manual_seed(1)
    for layer in layers:
        nn.init.normal_(layer.oft_R.weight, std=0.1)
    return layers


def cayley(layer: OFT) -> torch.Tensor:
    """(I + Q)⁻¹(I − Q) of every block in fp64, as one matrix."""
    blocks = []
    for angles in layer.oft_R.weight.detach().double():
        Q = torch.zeros(layer.oft_R.block, layer.oft_R.block, dtype=torch.float64)
        Q[tuple(torch.triu_indices(*Q.shape, 1))] = angles
        Q = Q - Q.T
        eye = torch.eye(len(Q), dtype=torch.float64)
        blocks.append((eye - Q) @ torch.linalg.inv(eye + Q))
    return torch.block_diag(*blocks)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
@pytest.mark.parametrize("block", [4, 5, 32])
@pytest.mark.parametrize("kernel", [Kernel.reference, Kernel.fused])
def test_outputs_and_merged_weights_are_the_rotation_in_fp64(
    build: Any, block: int, kernel: Kernel
) -> None:
    for layer in turned(build, block_size=block, cayley_terms=0, kernel=kernel):
        weight = layer.weight.double()
        weight = weight if layer.shape.kind is LayerKind.linear else weight.T
        R = cayley(layer)
        torch.testing.assert_close(R @ R.T, torch.eye(len(R)).double(), atol=1e-12, rtol=0)
        x = torch.randn(7, layer.in_features)
        bias = 0.0 if layer.bias is None else layer.bias.double()
        expected = x.double() @ R @ weight.T + bias
        torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=1e-5)
        merged, proof = merged_weight(layer.weight.detach(), [layer], torch.float32)
        assert proof.probe_error < 1e-5
        by_output = merged if layer.shape.kind is LayerKind.linear else merged.T
        torch.testing.assert_close(by_output.double(), weight @ R.T, atol=1e-5, rtol=1e-5)
        lengths = by_output.double().norm(dim=1)
        torch.testing.assert_close(lengths, weight.norm(dim=1), atol=1e-5, rtol=1e-5)


def test_the_series_comes_closer_to_a_rotation_with_every_term() -> None:
    gaps = []
    for terms in (4, 5, 7, 9):
        (layer, *_) = turned(tiny_llama, block_size=8, cayley_terms=terms)
        series = torch.block_diag(*layer.oft_R.matrices().detach())
        gaps.append(float((series - cayley(layer).T).abs().max()))  # PEFT's turns the other way
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 0.2 * gaps[0]


@pytest.mark.parametrize(
    ("width", "wanted", "block"), [(64, 32, 32), (24, 32, 24), (24, 5, 4), (48, 7, 6), (7, 3, 1)]
)
def test_blocks_are_pefts_and_counted(width: int, wanted: int, block: int) -> None:
    from peft.tuners.oft.layer import OFTLayer

    config = OFTConfig(block_size=wanted)
    assert config.block_of(width) == block
    if width % wanted or wanted > width:
        assert OFTLayer.adjust_oft_parameters(None, width, wanted) == block
    shape = LayerShape("layer", LayerKind.linear, width, 9)
    layer = our_model(nn.Sequential(nn.Linear(width, 9)), "oft", ["0"], block_size=wanted)
    numbers = sum(p.numel() for p in layer.model.parameters() if p.requires_grad)
    assert config.count_layer(shape, 8).trainable == numbers == width * (block - 1) // 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_its_inputs_in_fp32_and_its_rotations(dtype: torch.dtype) -> None:
    model = wrapped("llama", "oft", dtype, block_size=8)
    layers = [layer for layer in model.adapters.values() if isinstance(layer, OFT)]
    inputs = sum(layer.in_features * BATCH * LENGTH * 4 for layer in layers)
    blocks = sum(layer.in_features * 8 * 4 for layer in layers)  # one matrix of every block
    extra = saved_bytes(model.model) - saved_bytes(frozen_base("llama", dtype))
    # Q, its power, R and the places of the angles; each layer's input once.
    indices = sum(2 * 28 * 8 for _ in layers)
    assert 0 < extra <= inputs + 5 * blocks + indices


def test_where_peft_has_no_place_for_it_a_training_says_so() -> None:
    assert "no Conv1D" in peft_notices(our_model(tiny_gpt2(), "oft", ["c_attn"]))[0]
    assert peft_notices(our_model(tiny_llama(), "oft", ["q_proj"])) == []


@pytest.mark.parametrize("setting", ["coft", "block_share", "r"])
def test_settings_of_pefts_that_are_not_here_are_refused(setting: str) -> None:
    with pytest.raises(ValueError, match=f"{setting}=2 is not supported"):
        OFTConfig.from_peft({**OFTConfig().to_peft(), setting: 2}, {})


def test_the_series_of_an_older_peft_is_refused() -> None:
    older = OFTConfig().to_peft()
    del older["peft_version"]
    with pytest.raises(ValueError, match="had another series"):
        OFTConfig.from_peft(older, {})
    assert OFTConfig.from_peft({**older, "use_cayley_neumann": False}, {}).cayley_terms == 0


@pytest.mark.parametrize("settings", [{"block_size": 1}, {"cayley_terms": -1}, {"cayley_terms": 2}])
def test_what_is_no_rotation_is_refused(settings: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        OFTConfig(**settings)
