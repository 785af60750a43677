"""Every variant's layers on the GPU: against double precision, their masks, their memory."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from support.tiny_models import VOCABULARY
from torch import Tensor, nn

from gpu.setting import (
    DEVICE,
    IS_CUDA,
    KERNELS,
    RANK,
    VARIANTS,
    distance,
    model,
    wrapped,
)
from loratune.adapters.config import Kernel
from loratune.adapters.kernels.dropout import Dropout
from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.surgery import wrap_model

IN, OUT, TOKENS = 192, 128, 320
LONGEST_SUM = max(IN, OUT, TOKENS)
FP32 = 8 * math.sqrt(LONGEST_SUM) * 2**-24
"""Rounding errors of a sum of K products grow like √K units in the last place; eight for the chain
of up to four products and for what is not quite random in them."""
BF16 = 5 * 2**-9
"""Operands, factors, the narrow product, its gradient and the result are rounded once each."""
BOUND = {torch.float32: FP32, torch.bfloat16: BF16, torch.float64: 1e-12}


def layer(
    variant: str, kernel: Kernel, dtype: torch.dtype, device: torch.device | str, p: float = 0.0
) -> nn.Module:
    """One adapted layer with a bias, all of its numbers rounded to bf16, so that all agree."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(IN, OUT))
    base[0].weight.data = base[0].weight.data.bfloat16().float()
    base[0].bias.data = base[0].bias.data.bfloat16().float()
    config = config_class(variant)(rank=RANK, kernel=kernel, dropout=p)
    made = wrap_model(base.to(dtype).to(device), config, TargetsConfig(modules=["0"]), seed=0)
    if dtype is torch.float64:
        made.model.double()
    generator = torch.Generator().manual_seed(1)
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return made.model.train()


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def tokens(dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Input and upstream gradient, (2, T, in) and (2, T, out)."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, TOKENS // 2, IN, generator=generator).bfloat16()
    upstream = torch.randn(2, TOKENS // 2, OUT, generator=generator).bfloat16()
    return x.to(dtype).to(device).requires_grad_(), upstream.to(dtype).to(device)


def outcome(module: nn.Module, x: Tensor, upstream: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of everything that trains."""
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *trained(module)], upstream)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_forward_and_gradients_are_as_near_to_double_precision_as_on_a_cpu(
    variant: str, kernel: Kernel, dtype: torch.dtype
) -> None:
    exact = outcome(
        layer(variant, Kernel.reference, torch.float64, "cpu"), *tokens(torch.float64, "cpu")
    )
    for device in ("cpu", DEVICE):
        got = outcome(layer(variant, kernel, dtype, device), *tokens(dtype, device))
        assert len(got) == len(exact)
        for one, other in zip(got, exact, strict=True):
            assert one.device.type == torch.device(device).type
            assert distance(one, other) < BOUND[dtype], (device, list(one.shape))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backward_pass_draws_the_mask_of_the_forward_pass_again(
    variant: str, kernel: Kernel
) -> None:
    module = layer(variant, kernel, torch.float64, DEVICE, p=0.3)
    x, upstream = tokens(torch.float64, DEVICE)

    def value() -> Tensor:
        torch.manual_seed(7)
        return module(x)

    y = value()
    again = value()
    assert torch.equal(y, again)
    torch.manual_seed(8)
    assert not torch.equal(y, module(x))
    gradients = torch.autograd.grad(y, [x, *trained(module)], upstream)
    generator = torch.Generator().manual_seed(3)
    for tensor, gradient in zip([x, *trained(module)], gradients, strict=True):
        direction = torch.randn(tensor.shape, generator=generator).to(tensor) * 1e-4
        with torch.no_grad():
            tensor += direction
            above = value()
            tensor -= 2 * direction
            below = value()
            tensor += direction
        measured = float(((above - below) * upstream).sum() / 2)
        # Central differences: exact in a layer that is linear in the tensor, else to 1e-8.
        assert measured == pytest.approx(float((gradient * direction).sum()), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_mask_of_several_blocks_is_the_same_twice_and_keeps_its_share(dtype: torch.dtype) -> None:
    like = torch.empty((1 << 13) + 5, 4096, dtype=dtype, device=DEVICE)
    dropout = Dropout(0.1, seed=11)
    kept, blocks = 0.0, 0
    for (rows, one), (_, other) in zip(dropout.masks(like), dropout.masks(like), strict=True):
        assert torch.equal(one, other) and one.shape == like[rows].shape
        kept += float(one.float().mean()) * len(one)
        blocks += 1
    assert blocks > 1
    assert kept / len(like) == pytest.approx(0.9, abs=5 * (0.09 / like.numel()) ** 0.5 + 2**-16)


def kept_bytes(module: nn.Module, device: torch.device | str) -> int:
    """Bytes of every storage that a backward pass through a whole model keeps, weights apart."""
    owned = {t.untyped_storage().data_ptr() for t in [*module.parameters(), *module.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage  # held, so that its address is not used again
        return tensor

    find: Callable[[], nn.Module] = module.get_input_embeddings  # type: ignore[assignment]
    handle = find().register_forward_hook(lambda _m, _i, out: out.detach().requires_grad_())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (2, 16), generator=generator).to(device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = module(input_ids=ids, use_cache=False).logits
    handle.remove()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def added_bytes(
    variant: str, kernel: Kernel, dtype: torch.dtype, p: float, device: torch.device | str
) -> int:
    """What the adapters keep beyond the frozen model."""
    frozen = model().to(dtype).to(device).train().requires_grad_(False)
    adapted = wrapped(variant, dtype, device, kernel=kernel, dropout=p).model
    return kept_bytes(adapted, device) - kept_bytes(frozen, device)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_backward_pass_keeps_the_bytes_that_it_keeps_on_a_cpu(
    variant: str, dtype: torch.dtype, p: float
) -> None:
    fused = added_bytes(variant, Kernel.fused, dtype, p, DEVICE)
    assert fused == added_bytes(variant, Kernel.fused, dtype, p, "cpu")
    assert 0 < fused <= added_bytes(variant, Kernel.reference, dtype, p, DEVICE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapters_lie_with_their_base_and_start_alike(variant: str) -> None:
    here, there = (wrapped(variant, device=place, moved=False) for place in ("cpu", DEVICE))
    state = there.model.state_dict()
    assert all(tensor.device.type == DEVICE.type for tensor in state.values())
    assert all(torch.equal(tensor, state[name].cpu()) for name, tensor in
               here.model.state_dict().items())  # fmt: skip
    assert any(tensor.is_cuda for tensor in state.values()) == IS_CUDA
