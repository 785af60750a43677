"""(f) Whole training steps on a CUDA device, of every variant and of PEFT in a plain loop.

A step is forward, loss, backward, clipping and AdamW.  Two models in bf16 and fp32 (TF32 off):
SmolLM2-135M, from a folder or with random weights of its shape, and a Llama of 1.3 billion random
parameters made on the device.  Peak memory is measured with one candidate on the device at a
time; afterwards all take their steps in turn.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from benchmarks.step import FLOOR
from loratune.adapters.config import AdapterConfig
from loratune.adapters.registry import variant_names
from loratune.config.schema import TargetsConfig, TrainerConfig
from loratune.data.collate import Batch
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import causal_targets
from loratune.models.devices import resolve_device
from loratune.surgery import wrap_model
from loratune.training.forward import checkpoint_activations
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step

Step = Callable[[], object]
RATE = 1e-5
"""Too small to move anything: every step computes the same."""


@dataclass(frozen=True)
class Model:
    """A model to measure, with its batch.

    Attributes:
        name: for the page.
        numbers: of its configuration.
        batch: rows of a step.
        length: tokens of each row.
        folder: real weights; random ones without.
    """

    name: str
    numbers: Mapping[str, Any]
    batch: int
    length: int
    folder: Path | None = None


@dataclass(frozen=True)
class Plan:
    """Models, ranks, and rounds in half and in full precision."""

    models: tuple[Model, ...]
    rank: int
    wide_rank: int
    rounds: dict[str, int]


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
LLAMA_1B = {
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}
MICRO_LLAMA = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def full_plan(folder: Path | None) -> Plan:
    """What is worth keeping; about two minutes on an H100."""
    small = "SmolLM2-135M" if folder else "SmolLM2-135M's shape, random weights"
    large = "Llama of 1.3 billion random parameters"
    chosen = (Model(small, SMOLLM2, 16, 512, folder), Model(large, LLAMA_1B, 4, 1024))
    return Plan(chosen, 16, 256, {"bfloat16": 12, "float32": 5})


MICRO = Plan(
    (Model("micro", MICRO_LLAMA, 2, 8), Model("micro too", MICRO_LLAMA, 1, 16)),
    4, 8, {"bfloat16": 1, "float32": 1},
)  # fmt: skip


def frozen(model: Model, dtype: torch.dtype, device: str) -> Any:
    """The frozen model on the device, in training mode."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if model.folder is not None:
        made = AutoModelForCausalLM.from_pretrained(model.folder, dtype=dtype).to(device)
    else:
        torch.manual_seed(0)
        config = LlamaConfig(**model.numbers, attn_implementation="sdpa")
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            with torch.device(device):
                made = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(default)
    return made.train().requires_grad_(False)


# -- candidates ----------------------------------------------------------------------------


def whole_batch(ids: Tensor) -> Batch:
    """Every token but the first of each row is supervised."""
    return Batch(ids, causal_targets(ids), tuple(range(len(ids))), ids.numel())


def floor_step(base: Any, ids: Tensor) -> Step:
    """Forward, loratune's loss head, and backward to the frozen model's inputs alone."""
    head = LanguageModelHead(models.sharing_weights(base))
    embedding = head.model.get_input_embeddings()  # type: ignore[operator]
    embedding.register_forward_hook(lambda _m, _i, output: output.detach().requires_grad_())

    targets = causal_targets(ids)

    def step() -> None:
        loss = head(ids, targets)
        (loss.total / loss.tokens).backward()

    return step


def own_step(
    base: Any, ids: Tensor, settings: AdapterConfig, *, recompute: bool = False, exact: bool = True
) -> Step:
    """A training step of loratune."""
    targets = TargetsConfig(modules="all_linear")
    wrapped = wrap_model(models.sharing_weights(base), settings, targets)
    wrapped.model.train()
    if recompute:
        checkpoint_activations(wrapped.model)
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=RATE))
    head, batch = LanguageModelHead(wrapped.model), whole_batch(ids)
    return lambda: train_step(head, [batch], optimizer, 1.0, 0, deterministic=exact)


def peft_step(model: Any, ids: Tensor, *, recompute: bool = False) -> Step:
    """The same step as a plain loop around a PEFT model."""
    if recompute:
        checkpoint_activations(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0, fused=ids.is_cuda or None)

    def step() -> float:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def candidates(plan: Plan, base: Any, ids: Tensor) -> dict[str, Callable[[], Step]]:
    """Name → a function that builds the candidate and gives its step."""

    def own(variant: str, **options: bool) -> Callable[[], Step]:
        settings = models.settings_at(variant, plan.rank, plan.wide_rank)
        return lambda: own_step(base, ids, settings, **options)

    def peft(variant: str, **options: bool) -> Callable[[], Step]:
        settings = models.settings_at(variant, plan.rank, plan.wide_rank)
        return lambda: peft_step(models.theirs(base, settings, "all-linear"), ids, **options)

    return {
        FLOOR: lambda: floor_step(base, ids),
        **{f"loratune {models.title(name)}": own(name) for name in variant_names()},
        "loratune LoRA, trainer.deterministic=false": own("lora", exact=False),
        "loratune LoRA, checkpointing": own("lora", recompute=True),
        **{f"PEFT {models.title(name)}": peft(name) for name in models.peft_counterparts()},
        "PEFT LoRA, checkpointing": peft("lora", recompute=True),
    }


# -- measuring -----------------------------------------------------------------------------


@contextmanager
def attention_of(name: str) -> Iterator[None]:
    """Without cuDNN's attention for loratune, which turns it off; as torch has it for others."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(not name.startswith("loratune"))
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def settle(device: str) -> None:
    """Wait for the device and give back what nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def finished(name: str, step: Step, device: str) -> Step:
    """The step, and the wait for its end."""

    def run() -> None:
        with attention_of(name):
            step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def peak_bytes(step: Step, device: str) -> int:
    """Peak allocated memory of a step, base and adapter included, after two steps to warm up."""
    for _ in range(2):
        step()
    if device != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated()


def measure(plan: Plan, model: Model, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """One table: rows, and the candidates that failed with the reason."""
    base = frozen(model, dtype, device)
    generator = torch.Generator().manual_seed(2)
    shape = (model.batch, model.length)
    ids = torch.randint(3, model.numbers["vocab_size"], shape, generator=generator).to(device)
    makers, kind = candidates(plan, base, ids), str(dtype)[6:]
    common.say(f"{model.name}, {kind}")
    peaks: dict[str, int] = {}
    failures: list[dict[str, str]] = []
    for name, make in makers.items():
        try:
            peaks[name] = peak_bytes(finished(name, make(), device), device)
        except Exception as error:  # one that fails must not cost the other rows
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
            failures.append({"name": name, "reason": reason})
            common.say(f"  {name} failed: {reason}")
        settle(device)
    steps = {name: finished(name, makers[name](), device) for name in peaks}
    rows = common.timing_rows(common.interleaved(steps, plan.rounds[kind], warmup=2), FLOOR)
    for row in rows:
        row["peak_bytes"] = peaks[row["name"]]
        row["tokens_per_second"] = ids.numel() / row["seconds"]["median"]
        gib = row["peak_bytes"] / 2**30
        common.say(f"  {row['name']}: {row['seconds']['median'] * 1e3:.1f} ms, {gib:.2f} GiB")
    return {
        "model": model.name,
        "dtype": kind,
        "batch": model.batch,
        "length": model.length,
        "rows": rows,
        "failures": failures,
    }


def markdown(tables: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as the page shows them."""
    from benchmarks.render import cuda_table

    return "\n\n".join(cuda_table(found) for found in tables.values())


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--device", default="cuda", help="cpu tries the script itself")
    found.add_argument(
        "--model",
        type=Path,
        default=os.environ.get("LORATUNE_SMOLLM2"),
        help="SmolLM2-135M's folder ($LORATUNE_SMOLLM2); random weights of its shape without",
    )
    arguments = found.parse_args()
    options = common.options_of(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        common.say("no CUDA device")
        return
    resolve_device(arguments.device)
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("highest")
    plan = MICRO if options.is_micro else full_plan(arguments.model)
    is_cuda = arguments.device == "cuda"
    tables: dict[str, Any] = {}
    content = {
        "device": torch.cuda.get_device_name() if is_cuda else "CPU, to try the script",
        "cuda": torch.version.cuda,
        "settings": {"rank": plan.rank, "wide_rank": plan.wide_rank},
        "tables": tables,
    }
    for number, model in enumerate(plan.models):
        for dtype in (torch.bfloat16, torch.float32):
            key = f"{('small', 'large')[number]}_{str(dtype)[6:]}"
            tables[key] = measure(plan, model, dtype, arguments.device)
            settle(arguments.device)
            common.write_result("cuda", options, content)  # should a later part be cut off
    common.say(markdown(tables))


if __name__ == "__main__":
    main()
