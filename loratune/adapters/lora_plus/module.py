"""LoRA+'s parameter groups (arXiv:2402.12354): LoRA's layer, a faster B."""

from __future__ import annotations

from torch import nn

from loratune.adapters.config import AdapterConfig, LayerKind
from loratune.adapters.lora.module import LoRA
from loratune.adapters.lora_plus.config import LoRAPlusConfig
from loratune.adapters.optimizer import (
    OptimizerSettings,
    ParamGroup,
    is_bias_or_norm,
    trainable_parameters,
)


class LoRAPlus(LoRA):
    """LoRA whose B learns ``lr_ratio`` times faster than A: η_B = λ·η_A."""

    @classmethod
    def param_groups(
        cls, model: nn.Module, config: AdapterConfig, settings: OptimizerSettings
    ) -> list[ParamGroup]:
        """Four groups as in PEFT's helper, less the empty ones.

        ``A`` (and modules trained in full) at lr, embeddings at ``embedding_lr``, ``B`` at
        lr·ratio, biases and norms at lr·ratio without decay.  Weight decay reaches all but the
        last: it is never dropped silently.
        """
        assert isinstance(config, LoRAPlusConfig)
        decay, fast = settings.weight_decay, settings.lr * config.lr_ratio
        groups: dict[str, ParamGroup] = {
            "A": {"lr": settings.lr, "weight_decay": decay},
            "embedding": {"lr": config.embedding_lr, "weight_decay": decay},
            "B": {"lr": fast, "weight_decay": decay},
            "B_no_decay": {"lr": fast, "weight_decay": 0.0},
        }
        members: dict[str, list[nn.Parameter]] = {name: [] for name in groups}
        for name, parameter in trainable_parameters(model):
            members[_group_of(model, name)].append(parameter)
        return [
            {"name": name, "params": members[name], **group}
            for name, group in groups.items()
            if members[name]
        ]


def _group_of(model: nn.Module, name: str) -> str:
    owner_name, _, attribute = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    if isinstance(owner, LoRA) and owner.shape.kind is LayerKind.embedding:
        return "embedding"
    if is_bias_or_norm(model, name):
        return "B_no_decay"
    return "B" if isinstance(owner, LoRA) and attribute == "lora_B" else "A"
