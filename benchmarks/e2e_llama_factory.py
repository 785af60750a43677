"""LLaMA-Factory's own workflow, one step at a time; runs in an environment of its own.

It pins older versions of transformers, PEFT and TRL than the other contenders use, so its process
has another interpreter: the one that ``LORATUNE_LLAMA_FACTORY`` names, of an environment with
``llamafactory`` and ``hydra-core``.
"""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path
from typing import Any, Protocol

LLAMA_FACTORY = "llama_factory"
"""The kind of contender that runs here."""
INTERPRETER = "LORATUNE_LLAMA_FACTORY"


class Gate(Protocol):
    """Where a trainer waits between two steps."""

    def wait(self, model: Any, **facts: Any) -> None: ...


def run(job: dict[str, Any], gate: Gate) -> None:
    """Train the rows in LLaMA-Factory's own order, with its defaults where the task is silent."""
    from llamafactory.train.sft import workflow
    from llamafactory.train.tuner import run_exp
    from transformers import TrainerCallback

    counts: deque[dict[str, int]] = deque()

    class Counted(workflow.SFTDataCollatorWith4DAttentionMask):  # type: ignore[misc]
        def __call__(self, features: Any) -> Any:
            batch = super().__call__(features)
            tokens, padded = int(batch["attention_mask"].sum()), int(batch["input_ids"].numel())
            counts.append({"rows": len(features), "tokens": tokens, "padded": padded})
            return batch

    class Waiting(TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, **its: Any) -> None:
            if "loss" in (its["logs"] or {}):
                gate.wait(its["model"], loss=float(its["logs"]["loss"]), **counts.popleft())

    workflow.SFTDataCollatorWith4DAttentionMask = Counted
    run_exp(settings(job), [Waiting()])


def settings(job: dict[str, Any]) -> dict[str, Any]:
    """The task in LLaMA-Factory's words."""
    rows = Path(job["rows"])
    with rows.open(encoding="utf-8") as lines:
        described, template = _described(json.loads(next(lines)))
    facts = {"rows": {"file_name": rows.name, **described}}
    (rows.parent / "dataset_info.json").write_text(json.dumps(facts), encoding="utf-8")
    return {
        "stage": "sft",
        "do_train": True,
        "model_name_or_path": job["model"],
        "finetuning_type": "lora",
        "lora_rank": job["rank"],
        "lora_target": ",".join(job["targets"]),
        "dataset": "rows",
        "dataset_dir": str(rows.parent),
        "template": template,
        "cutoff_len": job["max_length"],
        "output_dir": job["out"],
        "per_device_train_batch_size": job["batch"],
        "learning_rate": 2e-4,
        "lr_scheduler_type": "linear",
        "max_steps": job["steps"],
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": job["precision"] != "fp32",
        "disable_tqdm": True,
    }


def _described(row: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """How a file's rows are to be read, and the template that writes them as the others do."""
    if "messages" not in row:
        return {"columns": {"prompt": "prompt", "response": "completion"}}, "empty"
    tags = {"role_tag": "role", "content_tag": "content"}
    tags |= {f"{role}_tag": role for role in ("user", "assistant", "system")}
    return {
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": tags,
    }, "smollm2"
