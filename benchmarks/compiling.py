"""(i) ``trainer.compile``: what torch's compiler takes, what its code saves, and when that pays.

SmolLM2-135M's shape with random weights, LoRA of rank 16 on all linear layers, eight rows a step.
The first two lengths are where the compiler works: for one length, then for any.  New lengths
after them must not make it work again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import common, models
from benchmarks.cuda import MICRO_LLAMA, SMOLLM2, Model, frozen, whole_batch
from loratune.adapters.config import AdapterConfig
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import TargetsConfig, TrainerConfig
from loratune.loss.causal_model import LanguageModelHead
from loratune.surgery import wrap_model
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step

LENGTHS = (128, 96, 160, 64, 200)
EAGER, COMPILED = "eager", "compiled"
Step = Callable[[Tensor], float]


@dataclass(frozen=True)
class Trial:
    """The compiler on one number format.

    Attributes:
        compiling: seconds beyond those of the steps in which it worked.
        recompiled: pieces that it compiled for lengths after the second.
        difference: largest difference of a loss from the same step without it.
        rows: by length and way the seconds of a step, and its ratio to the eager one.
    """

    compiling: float
    recompiled: int
    difference: float
    rows: list[dict[str, Any]]

    def pays_from(self) -> float | None:
        """Steps after which it has paid; ``None`` where it never does."""
        total = {
            way: sum(row["seconds"]["median"] for row in self.rows if row["name"] == way)
            for way in (EAGER, COMPILED)
        }
        saved = (total[EAGER] - total[COMPILED]) / len(LENGTHS)
        return self.compiling / saved if saved > 0 else None


def training_step(base: Any, settings: AdapterConfig, *, compiles: bool) -> Step:
    """A whole training step on token ids, giving its loss."""
    targets = TargetsConfig(modules="all_linear")
    torch.manual_seed(1)
    wrapped = wrap_model(models.sharing_weights(base), settings, targets)
    wrapped.model.train()
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=1e-4))
    head = LanguageModelHead(wrapped.model)
    if compiles:
        head.compile_backbone()
    return lambda ids: train_step(head, [whole_batch(ids)], optimizer, 1.0, 0).loss


def compiled_graphs() -> int:
    """Pieces of Python that the compiler has worked on so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def measure(model: Model, dtype: torch.dtype, rank: int, options: common.Options) -> Trial:
    """Both ways of one model, in turn, on rows of several lengths."""
    torch._dynamo.reset()  # what it learned of another number format would be taken up here
    base = frozen(model, dtype, "cpu")
    settings = variant_settings("lora").with_rank(rank)
    steps = {
        way: training_step(base, settings, compiles=way == COMPILED) for way in (EAGER, COMPILED)
    }
    generator = torch.Generator().manual_seed(2)
    lengths = [length if not options.is_micro else length // 8 for length in LENGTHS]
    vocabulary = model.numbers["vocab_size"]
    batches = [
        torch.randint(3, vocabulary, (model.batch, length), generator=generator)
        for length in lengths
    ]
    first = {way: [_timed(step, ids) for ids in batches[:2]] for way, step in steps.items()}
    again = {way: [_timed(step, ids) for ids in batches[:2]] for way, step in steps.items()}
    compiling = sum(first[COMPILED]) - sum(again[EAGER])
    before = compiled_graphs()
    rows, differences = [], [0.0]
    for length, ids in zip(lengths, batches, strict=True):
        losses: dict[str, list[float]] = {EAGER: [], COMPILED: []}
        timed = common.interleaved(_kept(steps, ids, losses), 1 if options.is_micro else 5)
        rows += [{**row, "length": length} for row in common.timing_rows(timed, EAGER)]
        pairs = zip(losses[EAGER], losses[COMPILED], strict=True)
        differences += [abs(one - other) for one, other in pairs]
        ratio = rows[-1]["ratio"]["median"]
        common.say(f"  {length} tokens a row: compiled / eager {ratio:.3f}")
    return Trial(compiling, compiled_graphs() - before, max(differences), rows)


def _kept(
    steps: Mapping[str, Step], ids: Tensor, losses: Mapping[str, list[float]]
) -> dict[str, Callable[[], object]]:
    """The steps on these rows; their losses are kept."""

    def keeping(way: str) -> Callable[[], object]:
        return lambda: losses[way].append(steps[way](ids))

    return {way: keeping(way) for way in steps}


def _timed(step: Step, ids: Tensor) -> float:
    started = time.perf_counter()
    step(ids)
    return time.perf_counter() - started


def main() -> None:
    options = common.parse(__doc__)
    torch.set_num_threads(options.threads)
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # or a second run would compile nothing
    model = Model("SmolLM2-135M's shape", SMOLLM2, 8, max(LENGTHS))
    if options.is_micro:
        model = Model("micro", MICRO_LLAMA, 2, max(LENGTHS) // 8)
    trials: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        common.say(str(dtype)[6:])
        trial = measure(model, dtype, 4 if options.is_micro else 16, options)
        trials[str(dtype)[6:]] = {**asdict(trial), "pays_from": trial.pays_from()}
        common.say(f"  compiling {trial.compiling:.1f} s, pays from {trial.pays_from()} steps")
        common.write_result("compiling", options, {"batch": model.batch, "trials": trials})


if __name__ == "__main__":
    main()
