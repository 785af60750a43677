"""The models that are measured: random weights at a real shape, shared by all candidates."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratune.adapters.config import AdapterConfig, LayerKind, LayerShape
from loratune.adapters.registry import variant_names
from loratune.config.recipes.variant_settings import recipe_file, variant_settings
from loratune.config.schema import TargetsConfig
from loratune.surgery import wrap_model

LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
VOCABULARY = 50272


@dataclass(frozen=True)
class Shape:
    """An OPT model's numbers; OPT-125m's by default."""

    hidden: int = 768
    inner: int = 3072
    layers: int = 12
    heads: int = 12
    vocabulary: int = VOCABULARY


OPT_125M = Shape()
MICRO = Shape(hidden=32, inner=64, layers=2, heads=2, vocabulary=97)


def opt_config(shape: Shape) -> Any:
    """The transformers configuration; the model itself drops nothing."""
    from transformers import OPTConfig

    return OPTConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        word_embed_proj_dim=shape.hidden,
        ffn_dim=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        max_position_embeddings=2048,
        dropout=0.0,
        attention_dropout=0.0,
        bos_token_id=2,
        eos_token_id=2,
        pad_token_id=1,
    )


def frozen_opt(shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """A frozen OPT in training mode with random weights."""
    from transformers import OPTForCausalLM

    torch.manual_seed(seed)
    model = OPTForCausalLM(opt_config(shape)).to(dtype)
    return model.train().requires_grad_(False)


def sharing_weights(base: nn.Module) -> Any:
    """A copy of a frozen model around the very same parameter tensors."""
    kept: dict[int, Any] = {id(parameter): parameter for parameter in base.parameters()}
    return copy.deepcopy(base, kept)


def title(variant: str) -> str:
    """What its recipe's comment calls a variant: ``LoRA-FA`` of ``lora_fa``."""
    path = recipe_file("adapter", variant)
    assert path is not None
    described = path.read_text(encoding="utf-8").splitlines()[1]
    return re.split(r" \(|[,:]", described.removeprefix("# "))[0]


def settings_at(variant: str, rank: int, wide_rank: int) -> AdapterConfig:
    """A variant's settings as its recipe has them, at one of two ranks."""
    return variant_settings(variant).with_rank(wide_rank if is_wide(variant) else rank)


def is_wide(variant: str) -> bool:
    """Whether its own rank is far above LoRA's, since a rank costs it few numbers."""
    return variant_settings(variant).rank >= 64


def peft_counterparts() -> list[str]:
    """Variants that PEFT has too; one that trains what an earlier one does is left out."""
    layer = LayerShape("layer", LayerKind.linear, 64, 64)
    seen: dict[str, str] = {}
    for variant in variant_names():
        settings = variant_settings(variant)
        if not settings.why_not_in_peft(layer):
            alike = repr((settings.to_peft(), settings.count([(layer, settings.rank)])))
            seen.setdefault(alike, variant)
    return list(seen.values())


def ours(base: nn.Module, settings: AdapterConfig, targets: str = "all_linear") -> Any:
    """Loratune's adapters, nothing that trains left at zero: as in mid-training."""
    wrapped = wrap_model(sharing_weights(base), settings, TargetsConfig(modules=targets))
    _perturb(wrapped.model)
    return wrapped.model.train()


def theirs(base: nn.Module, settings: AdapterConfig, targets: Any = None) -> Any:
    """PEFT's adapter of the same settings; it freezes what loratune's variant does."""
    from peft import get_peft_config, get_peft_model

    targets = targets or LINEAR
    described = {**settings.to_peft(), "target_modules": targets, "task_type": "CAUSAL_LM"}
    with warnings.catch_warnings():  # of what it adjusts: block sizes that do not divide a width
        warnings.simplefilter("ignore")
        model = get_peft_model(sharing_weights(base), get_peft_config(described))
    trained = _trained_parts(settings)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in trained for part in name.split(".")))
    _perturb(model)
    return model.train()


def _trained_parts(settings: AdapterConfig) -> set[str]:
    """What PEFT calls the tensors that loratune's variant trains in a layer."""
    layers = wrap_model(nn.Sequential(nn.Linear(64, 64)), settings, TargetsConfig(modules=["0"]))
    [layer] = layers.adapters.values()
    tensors = layer.adapter_tensors().items()
    return {name.partition(".")[0] for name, tensor in tensors if tensor.requires_grad}


@torch.no_grad()
def _perturb(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            parameter.normal_(std=0.01)


def token_ids(shape: Shape, batch: int, length: int, device: str = "cpu") -> Tensor:
    """Random tokens (batch, length), always the same."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(3, shape.vocabulary, (batch, length), generator=generator).to(device)


def floor_step(base: Any, ids: Tensor) -> Callable[[], None]:
    """Forward with head and loss of the frozen model, and backward to its inputs alone.

    No training of anything inside the model can do without this.
    """
    embedding = base.get_input_embeddings()

    def step() -> None:
        inputs = embedding(ids).detach().requires_grad_()
        base(inputs_embeds=inputs, labels=ids, use_cache=False).loss.backward()

    return step


def adapter_step(model: Any, ids: Tensor) -> Callable[[], None]:
    """Forward with the same head and loss, and backward to the adapter's parameters."""

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        for parameter in model.parameters():
            parameter.grad = None

    return step
