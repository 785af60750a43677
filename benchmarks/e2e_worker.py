"""One trainer in a process of its own, one step at a time, on the driver's word.

The driver writes a line to let a step happen; the worker answers with one JSON line about it.  So
several trainers that are all set up can take their steps in turn on the same cores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any, TextIO

import torch

from benchmarks import e2e_llama_factory
from benchmarks.dev_loss import EVERY, DevLoss
from benchmarks.e2e_llama_factory import LLAMA_FACTORY
from loratune.training.record import peak_resident_bytes


class Gate:
    """Where a trainer waits between two steps."""

    def __init__(self, channel: TextIO, clock: str, dev: DevLoss | None) -> None:
        self._channel, self._dev, self._steps = channel, dev, 0
        self._now = time.process_time if clock == "cpu" else time.perf_counter
        self._released = self._now()

    def wait(self, model: Any, **facts: Any) -> None:
        """Report the step that just ended, then wait for the next word.

        Every few steps the loss on rows that nobody trains on is part of it, and no part of any
        step's seconds.
        """
        report = {"seconds": self._now() - self._released, "peak_bytes": peak_resident_bytes()}
        report |= facts
        self._steps += 1
        if self._dev is not None and self._steps % EVERY == 1:
            report["dev"] = self._dev.of(model)
        print(json.dumps(report), file=self._channel, flush=True)
        if not sys.stdin.readline():
            os._exit(0)  # the driver has what it wanted
        self._released = self._now()


def run_loratune(job: dict[str, Any], gate: Gate) -> None:
    """The whole ``loratune train`` command, with a tracker that waits."""
    from loratune.cli import main
    from loratune.stages import train as stage
    from loratune.training import trackers

    counts = deque(job["plan"])
    models: list[Any] = []
    train = stage.train

    def remembering(wrapped: Any, *rest: Any, **words: Any) -> Any:
        models.append(wrapped.model)
        return train(wrapped, *rest, **words)

    class Waiting:
        def log(self, step: int, values: dict[str, float]) -> None:
            step_counts = counts.popleft()
            computed = round(step_counts["tokens"] / values["train/fill_rate"])
            facts = {**step_counts, "padded": computed, "loss": values["train/loss"]}
            gate.wait(models[0], **facts)

        def close(self) -> None: ...

    # Before the command imports the names from here.
    stage.train = remembering
    trackers.open_trackers = lambda *_: [Waiting()]  # type: ignore[assignment]
    words = ["recipe=e2e", f"model.path={job['model']}", f"data.path={job['rows']}"]
    words += [f"out={job['out']}", f"trainer.steps={job['steps']}", "trainer.lr=2e-4"]
    words += [f"trainer.precision={job['precision']}", f"data.packing={job['packing']}"]
    words += [f"data.max_length={job['max_length']}", "data.eval_fraction=0", "stages=[train]"]
    words += [f"trainer.batch_size={job['rows_per_step']}", "trainer.warmup_steps=0"]
    words += [f"targets.modules={json.dumps(job['targets'])}", f"adapter.rank={job['rank']}"]
    words += [
        "trainer.save_every=0",
        f"data.share_prefixes={'auto' if job['sharing'] else 'false'}",
    ]
    words += [f"trainer.threads={torch.get_num_threads()}"]
    sys.argv = ["loratune", "train", *words]
    main()


class Counted:
    """A collator that remembers how many rows and tokens each of its batches holds."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner
        self.counts: deque[dict[str, int]] = deque()

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.inner(examples)
        rows = sum(len(e["seq_lengths"]) if "seq_lengths" in e else 1 for e in examples)
        tokens = sum(len(e["input_ids"]) for e in examples)
        padded = int(batch["input_ids"].numel())
        self.counts.append({"rows": rows, "tokens": tokens, "padded": padded})
        return batch


def run_hugging_face(job: dict[str, Any], gate: Gate) -> None:
    """TRL's SFTTrainer or transformers' Trainer with PEFT's LoRA."""
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoTokenizer, TrainerCallback

    disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    encoded = json.loads(Path(job["encoded"]).read_text(encoding="utf-8"))
    rows = encoded["in_our_order" if job["same_order"] else "as_they_are"]
    dataset = Dataset.from_dict(
        {"input_ids": [row["ids"] for row in rows], "labels": [row["labels"] for row in rows]}
    )
    make = _trl if job["kind"] == "trl" else _trainer
    trainer = make(job, dataset, tokenizer)
    counted = trainer.data_collator = Counted(trainer.data_collator)

    class Waiting(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **its: Any) -> None:
            if "loss" in (its["logs"] or {}):
                gate.wait(its["model"], loss=float(its["logs"]["loss"]), **counted.counts.popleft())

    trainer.add_callback(Waiting())
    trainer.train()


def _settings(job: dict[str, Any]) -> dict[str, Any]:
    """What both trainers take; their own defaults decide the rest."""
    settings: dict[str, Any] = {
        "output_dir": job["out"],
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "seed": 0,
        "disable_tqdm": True,
        "bf16": job["precision"] != "fp32",
    }
    if job["same_order"]:
        settings["train_sampling_strategy"] = "sequential"
    if not job["as_shipped"]:
        settings["gradient_checkpointing"] = False
    return settings


def _base(job: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    half = job["precision"] == "bf16 weights"
    dtype = torch.bfloat16 if half else torch.float32
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)


def _lora(job: dict[str, Any]) -> Any:
    from peft import LoraConfig

    rank, targets = job["rank"], job["targets"]
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")


def _adapted(job: dict[str, Any]) -> Any:
    from peft import get_peft_model

    base = _base(job)
    torch.manual_seed(0)  # A starts as loratune's does
    return get_peft_model(base, _lora(job))


def _trl(job: dict[str, Any], dataset: Any, tokenizer: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(packing=job["packing"], max_length=job["max_length"], **_settings(job))
    options: dict[str, Any] = {"args": config, "train_dataset": dataset}
    if job["as_shipped"]:
        return SFTTrainer(_base(job), processing_class=tokenizer, peft_config=_lora(job), **options)
    return SFTTrainer(_adapted(job), processing_class=tokenizer, **options)


def _trainer(job: dict[str, Any], dataset: Any, tokenizer: Any) -> Any:
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    collator = DataCollatorForSeq2Seq(tokenizer)
    arguments = TrainingArguments(**_settings(job))
    return Trainer(_adapted(job), args=arguments, train_dataset=dataset, data_collator=collator)


def main() -> None:
    job = json.loads(sys.argv[1])
    torch.set_num_threads(job["threads"])
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever the trainers print goes to the log
    encoded = Path(job["encoded"])
    gate = Gate(channel, job["clock"], DevLoss(encoded) if job["looks"] else None)
    runners = {"loratune": run_loratune, LLAMA_FACTORY: e2e_llama_factory.run}
    runners.get(job["kind"], run_hugging_face)(job, gate)


if __name__ == "__main__":
    main()
