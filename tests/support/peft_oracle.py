"""PEFT as the oracle: the same adapter built by it, its numbers under the names of its files."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratune.adapters.optimizer import OptimizerSettings
from loratune.adapters.registry import adapter_class, config_class
from loratune.config.schema import TargetsConfig
from loratune.surgery import WrappedModel, wrap_model

PEFT_ABOUT_ITSELF = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:Specified to not (save|load) vera_A:UserWarning"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file in:UserWarning"),
]
"""What PEFT warns about that is right here: Conv1D, tied weights, seeds instead of matrices."""


def peft_model(model: nn.Module, config: Any, seed: int | None = None) -> Any:
    """PEFT's model; ``seed`` is set just before, since its start draws from the global state."""
    from peft import get_peft_model

    if seed is not None:
        torch.manual_seed(seed)
    return get_peft_model(model, config)


def lora_config(**settings: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(task_type="CAUSAL_LM", **settings)


def vera_config(**settings: Any) -> Any:
    from peft import VeraConfig

    return VeraConfig(task_type="CAUSAL_LM", **settings)


def ia3_config(**settings: Any) -> Any:
    from peft import IA3Config

    return IA3Config(task_type="CAUSAL_LM", **settings)


def oft_config(**settings: Any) -> Any:
    from peft import OFTConfig

    return OFTConfig(task_type="CAUSAL_LM", **settings)


def peft_parameters(model: Any) -> dict[str, nn.Parameter]:
    """Every trainable parameter under its name in PEFT's file, in the model's order."""
    return {
        _file_key(name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def peft_lora_tensors(model: Any) -> dict[str, Tensor]:
    """Every adapter tensor, frozen ones too, under its name in the file."""
    marks = ("lora_", "vera_lambda")
    return {
        _file_key(name): parameter
        for name, parameter in model.named_parameters()
        if any(mark in name for mark in marks)
    }


def _file_key(name: str) -> str:
    name = name.replace(".modules_to_save.default", "").replace(".default", "")
    return name.replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def our_model(
    model: nn.Module,
    variant: str,
    targets: list[str] | str,
    *,
    seed: int | None = 0,
    modules_to_save: tuple[str, ...] = (),
    layers: list[int] | None = None,
    **settings: Any,
) -> WrappedModel:
    """loratune's model; the reference kernel unless another is asked for."""
    settings.setdefault("kernel", "reference")
    from loratune.adapters.config import Kernel

    settings["kernel"] = Kernel(settings["kernel"])
    config = config_class(variant)(**settings)
    wanted = TargetsConfig(modules=targets, modules_to_save=list(modules_to_save), layers=layers)
    return wrap_model(model, config, wanted, seed=seed)


def our_parameters(wrapped: WrappedModel) -> dict[str, nn.Parameter]:
    """Every trainable parameter under its name in PEFT's file."""
    found: dict[str, nn.Parameter] = {}
    for name, layer in wrapped.adapters.items():
        for suffix, tensor in layer.adapter_tensors().items():
            if tensor.requires_grad:
                assert isinstance(tensor, nn.Parameter)
                found[f"base_model.model.{name}.{suffix}"] = tensor
    for name, saved in wrapped.saved_modules.items():
        for suffix, parameter in saved.trained_module.named_parameters():
            found[f"base_model.model.{name}.{suffix}"] = parameter
    return found


def our_optimizer(wrapped: WrappedModel, **settings: Any) -> torch.optim.Optimizer:
    """The variant's own optimizer."""
    return adapter_class(wrapped.config.variant).make_optimizer(
        wrapped.model, wrapped.config, OptimizerSettings(**settings)
    )
