"""Steps on the GPU: as near to double precision as a CPU's, repeatable, and hardly ever waiting."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import VOCABULARY

from gpu.setting import (
    DEVICE,
    IS_CUDA,
    KERNELS,
    VARIANTS,
    distance,
    model,
    rows,
    switches,
    training_set,
    wrapped,
)
from loratune.adapters.config import Kernel
from loratune.config.schema import TrainerConfig
from loratune.data.collate import Batch
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import causal_targets
from loratune.runs.checkpoint import load_checkpoint, save_checkpoint
from loratune.surgery import WrappedModel
from loratune.training.forward import batch_loss, checkpoint_activations
from loratune.training.loop import prefetched, start, steps
from loratune.training.state import Progress, adapter_tensors, capture, restore

TRAINER = TrainerConfig(steps=20, batch_size=4, lr=2e-3, seed=5)


def losses(adapted: WrappedModel, trainer: TrainerConfig = TRAINER, **data: Any) -> list[float]:
    head, optimizer = LanguageModelHead(adapted.model), start(adapted, trainer)
    taken = steps(head, training_set(trainer, **data), optimizer, trainer)
    return [metrics.loss for metrics in taken]


def apart(one: list[float], other: list[float]) -> float:
    assert len(one) == len(other)
    return max(abs(a - b) / b for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_twenty_steps_stay_as_near_to_double_precision_as_on_a_cpu(
    variant: str, kernel: Kernel
) -> None:
    """No further than ten times a CPU's own distance, and what rounding alone may do.

    Of a loss that is a sum over the width and 20 steps: fp32 20 · √192 · 2⁻²⁴ = 1.7e-5; bf16
    rounds every state to 2⁻⁹, and 2⁻⁷ is two doublings of that.
    """
    exact = losses(wrapped(variant, torch.float64, "cpu", kernel=Kernel.reference))
    for dtype, floor in ((torch.float32, 1.7e-5), (torch.bfloat16, 2**-7)):
        on_cpu = apart(losses(wrapped(variant, dtype, "cpu", kernel=kernel)), exact)
        here = apart(losses(wrapped(variant, dtype, kernel=kernel)), exact)
        print(f"{variant} {kernel} {dtype}: CPU {on_cpu:.1e}, {DEVICE} {here:.1e}")
        assert here < 10 * on_cpu + floor
    assert len(set(exact)) == len(exact)


def state_of(adapted: WrappedModel) -> dict[str, torch.Tensor]:
    return {
        name: tensor.detach().cpu().clone() for name, tensor in adapter_tensors(adapted).items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("variant", "switched"), switches(), ids=str)
def test_a_resumed_training_ends_in_the_same_bits(
    variant: str, switched: dict[str, bool], dtype: torch.dtype, tmp_path: Path
) -> None:
    # Longer than a block of keys: attention then adds up several parts of a gradient.
    trainer = replace(TRAINER, steps=8, grad_accum_steps=2)
    data = training_set(trainer, rows(16, 200, 420), max_length=512)

    def built() -> tuple[WrappedModel, LanguageModelHead, torch.optim.Optimizer]:
        adapted = wrapped(variant, dtype, moved=False, dropout=0.1, **switched)
        head = LanguageModelHead(adapted.model)
        return adapted, head, start(adapted, trainer)

    whole, head, optimizer = built()
    for metrics in steps(head, data, optimizer, trainer):
        if metrics.step == 4:
            progress = Progress(step=4)
            save_checkpoint(tmp_path, 4, capture(whole, optimizer), asdict(progress), {})
    again, head, optimizer = built()
    torch.rand(3, device=DEVICE)
    progress = restore(again, optimizer, load_checkpoint(tmp_path / "step_000004"))
    for _ in steps(head, data, optimizer, trainer, done=progress.step):
        pass
    expected, got = state_of(whole), state_of(again)
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


def values(batch: Batch) -> list[Any]:
    fields = asdict(batch)
    return [*fields.pop("targets"), *fields.values()]


def test_batches_arrive_as_they_were_encoded() -> None:
    trainer = replace(TRAINER, steps=40, grad_accum_steps=2)
    for how in ({}, {"packing": True}, {"share_prefixes": True}):
        data = training_set(trainer, max_length=128, **how)
        busy = torch.randn(*([2048] * 2 if IS_CUDA else [64] * 2), device=DEVICE)
        arrived: list[list[Batch]] = []
        for batches in prefetched(data.micro_batches, range(40), DEVICE):
            for _ in range(8):
                busy = torch.tanh(busy @ busy)  # the copies queue behind these
            arrived.append(batches)
        for step, batches in enumerate(arrived):
            expected = data.micro_batches(step)
            assert [batch.row_ids for batch in batches] == [batch.row_ids for batch in expected]
            for got, want in zip(batches, expected, strict=True):
                for one, other in zip(values(got), values(want), strict=True):
                    if isinstance(one, torch.Tensor):
                        assert one.device.type == DEVICE.type and torch.equal(one.cpu(), other)
                    else:
                        assert one == other


def gradients(adapted: WrappedModel, batches: list[Batch]) -> tuple[float, list[torch.Tensor]]:
    """Summed loss and its gradients."""
    torch.manual_seed(4)
    head, total = LanguageModelHead(adapted.model), 0.0
    for batch in batches:
        loss = batch_loss(head, batch.to(DEVICE)).total
        loss.backward()
        total += float(loss.detach())
    found = [p.grad for p in adapted.model.parameters() if p.requires_grad]
    assert all(grad is not None for grad in found)
    return total, [grad for grad in found if grad is not None]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("how", [{"packing": True}, {"share_prefixes": True}], ids=str)
def test_rows_together_have_the_gradients_of_rows_apart(variant: str, how: dict[str, Any]) -> None:
    trainer = replace(TRAINER, steps=1, batch_size=16)
    together, plain = (
        training_set(trainer, max_length=256, group_by_length=False, **layout)
        for layout in (how, {})
    )
    assert len(together.micro_batches(0)[0].input_ids) < 16
    one, other = (gradients(wrapped(variant), data.micro_batches(0)) for data in (together, plain))
    assert one[0] == pytest.approx(other[0], rel=1e-5)
    for got, expected in zip(one[1], other[1], strict=True):
        assert distance(got, expected) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_recomputed_activations_change_no_gradient(variant: str, dtype: torch.dtype) -> None:
    batches = training_set(replace(TRAINER, steps=1)).micro_batches(0)
    plain = wrapped(variant, dtype, dropout=0.1)
    again = wrapped(variant, dtype, dropout=0.1)
    checkpoint_activations(again.model)
    one, other = gradients(plain, batches), gradients(again, batches)
    assert one[0] == other[0]
    for kept, recomputed in zip(one[1], other[1], strict=True):
        assert distance(recomputed, kept) < 1e-6


SYNCHRONISED = [
    {},
    {"dropout": 0.1},
    {"packing": True},
    {"share_prefixes": True},
    {"recompute": True, "dropout": 0.1},
    {"grad_accum_steps": 2},
]


@pytest.mark.skipif(not IS_CUDA, reason="a CPU has nothing to wait for")
@pytest.mark.parametrize("how", SYNCHRONISED, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_waits_for_the_device_once(variant: str, how: dict[str, Any]) -> None:
    """For loss and norm together.  transformers asks once a forward whether rows are packed."""
    trainer = replace(TRAINER, steps=9, grad_accum_steps=how.get("grad_accum_steps", 1))
    together = {key: how[key] for key in ("packing", "share_prefixes") if key in how}
    data = training_set(trainer, max_length=256, **together)
    adapted = wrapped(variant, dropout=how.get("dropout", 0.0))
    if how.get("recompute"):
        checkpoint_activations(adapted.model)
    head, optimizer = LanguageModelHead(adapted.model), start(adapted, trainer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            for metrics in steps(head, data, optimizer, trainer):
                if metrics.step == 3:  # libraries and the optimizer's state are there
                    torch.cuda.synchronize()
                    caught.clear()
                    torch.cuda.set_sync_debug_mode("warn")
        finally:
            torch.cuda.set_sync_debug_mode("default")
    places = Counter(
        "/".join(Path(warning.filename).parts[-2:])
        for warning in caught
        if "called a synchronizing" in str(warning.message)
    )
    asked = 0 if together else 6 * trainer.grad_accum_steps
    assert places.pop("training/step.py", 0) == 6, places
    assert places.pop("transformers/masking_utils.py", 0) <= asked
    assert not places


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_model_is_taken_apart_at_its_head(dtype: torch.dtype) -> None:
    head = LanguageModelHead(model().to(dtype).to(DEVICE))
    assert head.split is not None
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 40), generator=generator).to(DEVICE)
    logits = head.model.eval()(input_ids=ids, use_cache=False).logits[:, :-1].float()
    whole = torch.nn.functional.cross_entropy(
        logits.reshape(-1, VOCABULARY), ids[:, 1:].reshape(-1), reduction="sum"
    )
    own = head(ids, causal_targets(ids)).total
    assert float(own.detach()) == pytest.approx(float(whole.detach()), rel=1e-5)
