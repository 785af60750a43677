"""(f) One training step on a CUDA device: Llama-3.2-3B's shape, bf16, rank 32 on q and v.

4 rows of 768 tokens, as in the public comparison of PEFT's methods.  Peak memory is measured
with one candidate on the device at a time, step time interleaved afterwards.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import common, models
from benchmarks.step import FLOOR, own_head_step

Step = Callable[[], object]
QV = ["q_proj", "v_proj"]


@dataclass(frozen=True)
class Plan:
    """Sizes and repetitions."""

    numbers: dict[str, Any]
    batch: int
    length: int
    rank: int
    vera_rank: int
    rounds: int


LLAMA_3_2_3B = {
    "vocab_size": 128256,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 28,
    "num_attention_heads": 24,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
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
FULL = Plan(LLAMA_3_2_3B, 4, 768, 32, 256, 20)
MICRO = Plan(MICRO_LLAMA, 2, 8, 4, 8, 1)


def frozen_llama(plan: Plan, device: str) -> Any:
    """A frozen Llama in bf16 with random weights, made on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = LlamaForCausalLM(LlamaConfig(**plan.numbers, attn_implementation="sdpa"))
        finally:
            torch.set_default_dtype(default)
    return model.train().requires_grad_(False)


def candidates(plan: Plan, base: Any, ids: Tensor) -> dict[str, Callable[[], Step]]:
    """Name → a function that builds the candidate and gives its step."""

    def loratune(variant: str, rank: int = plan.rank) -> Any:
        return models.ours(base, variant, rank=rank, targets=QV)

    def peft(frozen_A: bool) -> Any:
        return models.peft_lora(base, plan.rank, frozen_A=frozen_A, targets=QV)

    def step(build: Callable[[], Any]) -> Callable[[], Step]:
        return lambda: models.adapter_step(build(), ids)

    return {
        FLOOR: lambda: models.floor_step(base, ids),
        "loratune LoRA": step(lambda: loratune("lora")),
        "loratune LoRA-FA": step(lambda: loratune("lora_fa")),
        "loratune LoRA+": step(lambda: loratune("lora_plus")),
        "loratune VeRA": step(lambda: loratune("vera", plan.vera_rank)),
        "PEFT LoRA": step(lambda: peft(False)),
        "PEFT LoRA, A frozen": step(lambda: peft(True)),
        "PEFT VeRA": step(lambda: models.peft_vera(base, plan.vera_rank, targets=QV)),
        "loratune LoRA, own loss head": lambda: own_head_step(loratune("lora"), ids),
        "loratune LoRA-FA, own loss head": lambda: own_head_step(loratune("lora_fa"), ids),
        "loratune LoRA, compiled": step(lambda: torch.compile(loratune("lora"))),
        "loratune LoRA-FA, compiled": step(lambda: torch.compile(loratune("lora_fa"))),
        "PEFT LoRA, compiled": step(lambda: torch.compile(peft(False))),
        "loratune LoRA, checkpointing": step(lambda: checkpointing(loratune("lora"))),
        "loratune LoRA-FA, checkpointing": step(lambda: checkpointing(loratune("lora_fa"))),
        "PEFT LoRA, checkpointing": step(lambda: checkpointing(peft(False))),
    }


def checkpointing(model: nn.Module) -> Any:
    """The model with activations recomputed in the backward pass."""
    found: Any = model
    found.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return found


def settle(device: str) -> None:
    """Wait for the device and give back what nobody holds."""
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()


def peak_bytes(step: Step, device: str) -> int:
    """Peak allocated memory of a step, base and adapter included, after two steps to warm up."""
    for _ in range(2):
        step()
    if device != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def synchronised(step: Step, device: str) -> Step:
    """The step, and the wait for its end."""

    def run() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


def measure(plan: Plan, device: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of the table, and candidates that failed with the reason."""
    base = frozen_llama(plan, device)
    generator = torch.Generator().manual_seed(2)
    shape = (plan.batch, plan.length)
    ids = torch.randint(3, plan.numbers["vocab_size"], shape, generator=generator).to(device)
    peaks: dict[str, int] = {}
    failures: list[dict[str, str]] = []
    makers = candidates(plan, base, ids)
    if device != "cuda":  # compiling for the CPU takes minutes and says nothing here
        makers = {name: make for name, make in makers.items() if "compiled" not in name}
    for name, make in makers.items():
        try:
            peaks[name] = peak_bytes(make(), device)
            common.say(f"  {name}: {peaks[name] / 2**30:.2f} GiB")
        except Exception as error:  # a missing compiler must not cost the other rows
            failures.append({"name": name, "reason": str(error).strip().splitlines()[0][:200]})
            common.say(f"  {name} failed: {failures[-1]['reason']}")
        torch.compiler.reset()
        settle(device)
    steps = {name: synchronised(makers[name](), device) for name in peaks}
    rows = common.timing_rows(common.interleaved(steps, plan.rounds, warmup=3), FLOOR)
    for row in rows:
        row["peak_bytes"] = peaks[row["name"]]
        common.say(f"  {row['name']}: {row['seconds']['median'] * 1e3:.1f} ms")
    return rows, failures


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--device", default="cuda", help="cpu tries the script itself")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        common.say("no CUDA device")
        return
    torch.set_num_threads(options.threads)
    plan = MICRO if options.is_micro else FULL
    rows, failures = measure(plan, arguments.device)
    is_cuda = arguments.device == "cuda"
    content = {
        "device": torch.cuda.get_device_name() if is_cuda else "CPU, to try the script",
        "cuda": torch.version.cuda,
        "settings": asdict(plan),
        "rows": rows,
        "failures": failures,
    }
    common.write_result("cuda", options, content)


if __name__ == "__main__":
    main()
