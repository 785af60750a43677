"""The models that are measured: random weights at a real shape, shared by all candidates."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loratune.library import wrap

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


def ours(base: nn.Module, variant: str, **settings: Any) -> Any:
    """Loratune's adapters on all linear layers, B (or λ_b) made non-zero as in mid-training."""
    targets = settings.pop("targets", "all_linear")
    wrapped = wrap(sharing_weights(base), variant, targets=targets, **settings)
    _perturb(wrapped.model, ("lora_B", "vera_lambda_b"))
    return wrapped.model.train()


def peft_lora(base: nn.Module, rank: int, *, frozen_A: bool = False, **settings: Any) -> Any:
    """PEFT's LoRA; with ``frozen_A`` only B trains, as in its LoRA-FA."""
    from peft import LoraConfig, get_peft_model

    targets = settings.pop("targets", LINEAR)
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM", **settings
    )
    model = get_peft_model(sharing_weights(base), config)
    for name, parameter in model.named_parameters():
        if frozen_A and "lora_A" in name:
            parameter.requires_grad_(False)
    _perturb(model, ("lora_B",))
    return model.train()


def peft_vera(base: nn.Module, rank: int, **settings: Any) -> Any:
    """PEFT's VeRA."""
    from peft import VeraConfig, get_peft_model

    targets = settings.pop("targets", LINEAR)
    config = VeraConfig(r=rank, target_modules=targets, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(sharing_weights(base), config)
    _perturb(model, ("vera_lambda_b",))
    return model.train()


@torch.no_grad()
def _perturb(model: nn.Module, names: tuple[str, ...]) -> None:
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and any(part in name for part in names):
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
