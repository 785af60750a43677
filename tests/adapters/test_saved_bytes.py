"""What a backward pass keeps in memory beyond the frozen model, byte for byte."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_opt
from support.tolerance import T0
from torch import Tensor, nn

from loratune.adapters.config import Kernel
from loratune.adapters.low_rank import LowRank
from loratune.adapters.registry import adapter_class, config_class, variant_names
from loratune.config.schema import TargetsConfig
from loratune.surgery import WrappedModel, wrap_model

BATCH, LENGTH, WIDTH, INNER, RANK = 2, 9, 32, 48, 4
TOKENS = BATCH * LENGTH
DISTINCT_INPUTS_PER_LAYER = 4  # of q, k, v together; of attention's output; of either MLP half


MODELS: dict[str, Callable[[], nn.Module]] = {
    "opt": lambda: tiny_opt(hidden_size=WIDTH, word_embed_proj_dim=WIDTH, ffn_dim=INNER),
    "gpt2": lambda: tiny_gpt2(n_embd=WIDTH, n_inner=INNER),
    "llama": lambda: tiny_llama(hidden_size=WIDTH, intermediate_size=INNER),
}


def saved_storages(model: nn.Module) -> dict[int, tuple[int, torch.UntypedStorage]]:
    """Address → bytes of every storage that the backward pass keeps, parameters excluded."""
    owned = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, tuple[int, torch.UntypedStorage]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            # Holding the storage keeps its address from being used again.
            kept[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    # The frozen model too must send a gradient to every layer's input.
    handle = embedding.register_forward_hook(
        lambda _module, _inputs, output: output.detach().requires_grad_()
    )
    torch.manual_seed(0)
    ids = torch.randint(VOCABULARY, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(input_ids=ids, use_cache=False).logits
    handle.remove()
    assert output.requires_grad
    return kept


def saved_bytes(model: nn.Module) -> int:
    return sum(size for size, _ in saved_storages(model).values())


def wrapped(name: str, variant: str, dtype: torch.dtype, **settings: Any) -> WrappedModel:
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype).train()
    config = config_class(variant)(rank=RANK, **settings)
    return wrap_model(model, config, TargetsConfig(modules="all-linear"))


def frozen_base(name: str, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().to(dtype).train().requires_grad_(False)


def distinct_inputs(model: WrappedModel) -> dict[int, Tensor]:
    """Storage address → input of the adapted layers, each tensor once (q, k and v share theirs)."""
    inputs: dict[int, Tensor] = {}
    handles = [
        adapter.register_forward_pre_hook(
            lambda _module, args: inputs.update({args[0].untyped_storage().data_ptr(): args[0]})
        )
        for adapter in model.adapters.values()
    ]
    kept = saved_storages(model.model)
    for handle in handles:
        handle.remove()
    assert all(address in kept for address in inputs)
    return inputs


@pytest.mark.case(41, T0)
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora_fa", "vera"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_fa_and_vera_keep_rank_numbers_per_token_and_layer(
    name: str, variant: str, dtype: torch.dtype, p: float
) -> None:
    model = wrapped(name, variant, dtype, dropout=p)
    # VeRA's layers share A: without dropout, layers that share their input share x Aᵀ as well.
    shares = variant == "vera" and p == 0
    products = 2 * DISTINCT_INPUTS_PER_LAYER if shares else len(model.adapters)
    narrow = products * TOKENS * RANK * dtype.itemsize
    assert saved_bytes(model.model) - saved_bytes(frozen_base(name, dtype)) == narrow


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", ["lora", "lora_plus"])
@pytest.mark.parametrize("name", MODELS)
def test_lora_keeps_its_rank_numbers_and_the_layers_own_inputs_uncopied(
    name: str, variant: str, dtype: torch.dtype, p: float
) -> None:
    model = wrapped(name, variant, dtype, dropout=p)
    narrow = len(model.adapters) * TOKENS * RANK * dtype.itemsize
    extra = saved_bytes(model.model) - saved_bytes(frozen_base(name, dtype))
    inputs = distinct_inputs(model).values()
    assert len(inputs) == 2 * DISTINCT_INPUTS_PER_LAYER
    assert {t.dtype for t in inputs} == {dtype}
    # Some inputs the frozen model keeps anyway; none is kept twice.
    assert narrow <= extra <= narrow + sum(t.untyped_storage().nbytes() for t in inputs)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", variant_names())
def test_the_fused_layers_keep_no_more_than_the_reference(
    variant: str, dtype: torch.dtype, p: float
) -> None:
    fused = saved_bytes(wrapped("opt", variant, dtype, dropout=p).model)
    reference = saved_bytes(
        wrapped("opt", variant, dtype, dropout=p, kernel=Kernel.reference).model
    )
    assert fused <= reference
    has_kernel = "kernel" not in config_class(variant).without_effect
    if (p and has_kernel and issubclass(adapter_class(variant), LowRank)) or variant == "vera":
        assert fused < reference


@pytest.mark.parametrize("variant", variant_names())
def test_evaluation_keeps_nothing(variant: str) -> None:
    model = wrapped("opt", variant, torch.float32).model.eval()
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model(input_ids=torch.zeros(1, 3, dtype=torch.int64), use_cache=False).logits
    assert not kept and not logits.requires_grad
