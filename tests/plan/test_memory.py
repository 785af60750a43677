"""Memory by component: exact where it can be, and held to what torch really allocates."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from loratune.adapters.registry import config_class
from loratune.config.schema import TargetsConfig
from loratune.counting.activations import measure_activations
from loratune.counting.parameters import count_variant
from loratune.models.architectures import architecture_from_numbers
from loratune.models.measure import measure_numbers
from loratune.plan.memory import block_count, hidden_size, predict, vocabulary
from loratune.plan.workload import MicroBatch
from loratune.targets.find import find_targets

NUMBERS = {
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 172,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ARCHITECTURE = architecture_from_numbers(NUMBERS)
TARGETS = TargetsConfig(modules="all_linear")


def predicted(batch: MicroBatch, variant: str = "lora", **options):
    config = config_class(variant)()
    matched = find_targets(ARCHITECTURE.layers, TARGETS, config, family="llama").shapes
    count = count_variant(ARCHITECTURE.base_parameters, matched, config)
    measured = measure_activations(ARCHITECTURE, TARGETS, config, tokens=32)
    return count, predict(ARCHITECTURE, count, measured, batch, bytes_per_weight=4, **options)


def test_sizes_are_read_off_the_architecture():
    assert (block_count(ARCHITECTURE), hidden_size(ARCHITECTURE)) == (6, 64)
    assert vocabulary(ARCHITECTURE) == 1000
    gpt2 = {"model_type": "gpt2", "vocab_size": 99, "n_embd": 8, "n_layer": 3, "n_positions": 16}
    other = architecture_from_numbers({**gpt2, "n_head": 2})
    assert (block_count(other), hidden_size(other), vocabulary(other)) == (3, 8, 99)


def test_counted_components_are_exact():
    count, memory = predicted(MicroBatch(2, 16, 16))
    assert memory.weights == 4 * ARCHITECTURE.base_parameters
    assert memory.adapters == 4 * count.trainable
    assert memory.gradients == 4 * count.trainable
    assert memory.optimizer == 8 * count.trainable
    assert memory.peak == sum(memory.components().values())


def test_activations_grow_with_tokens_and_shrink_when_recomputed():
    _, small = predicted(MicroBatch(2, 16, 16))
    _, large = predicted(MicroBatch(4, 32, 64))
    _, recomputed = predicted(MicroBatch(4, 32, 64), gradient_checkpointing=True)
    assert large.activations == pytest.approx(4 * small.activations, rel=1e-6)
    assert recomputed.activations < large.activations / 2
    assert recomputed.fixed == large.fixed


def test_frozen_a_keeps_less_than_lora():
    _, lora = predicted(MicroBatch(4, 32, 64))
    _, frozen_a = predicted(MicroBatch(4, 32, 64), variant="lora_fa")
    assert frozen_a.activations < lora.activations


def test_blocks_without_adapters_keep_only_the_bases_part():
    _, all_blocks = predicted(MicroBatch(4, 32, 64))
    _, two_blocks = predicted(MicroBatch(4, 32, 64), adapted_blocks=2)
    assert two_blocks.activations < all_blocks.activations


MEASURE = """
import torch
from loratune import library
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import causal_targets
from loratune.models.build import build_model
kept, seen = 0, set()
model = build_model({numbers})
wrapped = library.wrap(model, "{variant}", targets="{targets}")
model.train()
held = {{t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}}
def pack(tensor):
    global kept
    storage = tensor.untyped_storage()
    if storage.data_ptr() not in held | seen:
        seen.add(storage.data_ptr()); alive.append(tensor); kept += storage.nbytes()
    return tensor
alive = []
ids = torch.randint(4, 1000, (4, 32))
head = LanguageModelHead(model)
with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
    head(ids, causal_targets(ids)).total
print(kept)
"""


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "vera"])
def test_predicted_activations_are_what_autograd_keeps_in_the_whole_model(variant):
    code = MEASURE.format(numbers=NUMBERS, variant=variant, targets="all_linear")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, memory = predicted(MicroBatch(4, 32, 4 * 31), variant=variant)
    assert memory.activations == pytest.approx(int(done.stdout), rel=0.15)


PACKED = """
from loratune.data.collate import collate_together
from loratune.data.encoded_rows import EncodedRow
from loratune.training.forward import batch_loss
rows = [EncodedRow(list(range(4, 100)), ((1, 96),), 1, "") for _ in range(4)]
batch = collate_together(rows, [[0, 1], [2, 3]], 1, share=False)
"""


def test_the_masks_that_keep_packed_rows_apart_are_counted():
    code = MEASURE.format(numbers=NUMBERS, variant="lora", targets="all_linear")
    code = PACKED + code.replace("head(ids, causal_targets(ids)).total", "batch_loss(head, batch)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    _, memory = predicted(MicroBatch(2, 192, 4 * 95, 96, 4 * 96))
    _, alone = predicted(MicroBatch(4, 96, 4 * 95, 96, 4 * 96))
    masks = 4 * 6 * 2 * 192**2
    assert memory.activations - alone.activations == masks > memory.activations / 10
    assert memory.activations == pytest.approx(int(done.stdout), rel=0.15)


def test_the_weights_of_adapted_experts_are_counted_once_however_many_tokens():
    numbers = {**NUMBERS, "model_type": "mixtral", "num_local_experts": 16}
    mixture, config = measure_numbers(numbers), config_class("lora")()
    targets = TargetsConfig(modules="experts")
    matched = find_targets(mixture.layers, targets, config).shapes
    count = count_variant(mixture.base_parameters, matched, config)
    measured = measure_activations(mixture, targets, config, tokens=32)
    batch = MicroBatch(4, 32, 4 * 31)
    memory, recomputed = (
        predict(
            mixture,
            count,
            measured,
            batch,
            bytes_per_weight=4,
            adapted_experts=matched,
            gradient_checkpointing=recomputes,
        )
        for recomputes in (False, True)
    )
    code = MEASURE.format(numbers=numbers, variant="lora", targets="experts")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights = 4 * sum(shape.parameters for shape in matched)
    assert weights > int(done.stdout) / 2
    assert memory.activations == pytest.approx(int(done.stdout), rel=0.2)
    assert recomputed.activations < memory.activations - weights / 2


def test_half_precision_halves_the_base():
    config = config_class("lora")()
    full = measure_activations(ARCHITECTURE, TARGETS, config)
    half = measure_activations(ARCHITECTURE, TARGETS, config, dtype=torch.bfloat16)
    assert half.base < 0.8 * full.base
    assert half.added < full.added
