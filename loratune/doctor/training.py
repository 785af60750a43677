"""Three steps of every variant on the embedded model: it learns, it repeats, it merges."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from loratune import files
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapters.registry import config_class, variant_names
from loratune.config.convert import to_plain
from loratune.config.schema import (
    DataConfig,
    Dtype,
    MergeConfig,
    ModelConfig,
    Precision,
    Schedule,
    TargetsConfig,
    TrainerConfig,
    Verify,
)
from loratune.data.arrangement import Arrangement
from loratune.data.prepare import prepare_data
from loratune.data.training_set import TrainingSet
from loratune.doctor.finding import Finding, examine
from loratune.errors import MergeError, TrainingError
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.fingerprint import tensors_fingerprint
from loratune.stages.load import BaseModel, load
from loratune.stages.merge import merge
from loratune.surgery import WrappedModel, adapter_state, wrap_model
from loratune.training.loop import start, steps
from loratune.verify import verify

STEPS = 3
_ROWS = 8
_TRAINER = TrainerConfig(steps=STEPS, batch_size=_ROWS, lr_scale=10, schedule=Schedule.constant)


@dataclass(frozen=True)
class ShortRun:
    """Three steps on one batch.

    Attributes:
        base: the model.
        wrapped: the model with its trained adapter.
        losses: before every step.
        adapter: fingerprint of the trained adapter.
    """

    base: BaseModel
    wrapped: WrappedModel
    losses: list[float]
    adapter: str


def check_training() -> list[Finding]:
    """Overfit, determinism and merge, one finding each and per variant."""
    return [
        *(examine(f"learns {name}", partial(_learns, name)) for name in variant_names()),
        examine("determinism", _repeats, "set trainer.threads=1"),
        examine("merge", _merges),
    ]


def short_run(variant: str, device: str = "cpu", dropout: float = 0.0) -> ShortRun:
    """Train a fresh adapter for three steps on the same eight rows."""
    base = load(ModelConfig(path="builtin:demo-opt", device=device), Precision.fp32)
    data_config = DataConfig(path="builtin:train", limit=_ROWS, max_length=64)
    data = prepare_data(data_config, base.tokenizer, base.vocab_size, seed=0)
    config = config_class(variant)(dropout=dropout)
    wrapped = wrap_model(base.model, config, TargetsConfig(), seed=0)
    rows = TrainingSet.from_config(data.train, Arrangement(data.pad_id), data_config, _TRAINER)
    head, optimizer = LanguageModelHead(wrapped.model), start(wrapped, _TRAINER)
    wrapped.model.train()
    losses = [metrics.loss for metrics in steps(head, rows, optimizer, _TRAINER)]
    wrapped.model.eval()
    return ShortRun(base, wrapped, losses, tensors_fingerprint(adapter_state(wrapped)))


def _learns(variant: str) -> str:
    losses = short_run(variant, "auto").losses
    text = " → ".join(f"{loss:.3f}" for loss in losses)
    if losses[-1] >= losses[0]:
        raise TrainingError(f"the loss does not fall: {text}", fix="report it with `pip list`")
    return f"loss {text}"


def _repeats() -> str:
    first, second = (short_run("lora", dropout=0.1).adapter for _ in range(2))
    if first != second:
        raise TrainingError(
            f"two equal runs differ: {first[:12]} → {second[:12]}", fix="set trainer.threads=1"
        )
    return f"{STEPS} steps twice: the same bytes ({first[:12]})"


def _merges() -> str:
    done = short_run("lora")
    with tempfile.TemporaryDirectory(prefix="loratune-doctor-") as place:
        adapter, merged = Path(place) / "adapter", Path(place) / "merged"
        settings = to_plain(done.wrapped.config)
        facts = {
            "variant": settings.pop("variant"),
            "adapter": settings,
            "base": done.base.fingerprint,
            "tokenizer": done.base.tokenizer_fingerprint,
        }
        with files.published_folder(adapter) as target:
            write_adapter(target, done.wrapped, facts, done.base.name)
        how = MergeConfig(dtype=Dtype.float32, verify=Verify.logits)
        report = merge(
            [read_adapter(adapter)],
            done.base.folder,
            merged,
            how,
            tokenizer=done.base.tokenizer_fingerprint,
        )
        result = verify(merged, done.base.folder, [adapter])
    if result.problems or report.logits is None:
        raise MergeError("the merged model does not verify", fix="report it with `pip list`")
    return f"logits differ by {report.logits.max_difference:.1e}; {len(result.checks)} checks pass"
