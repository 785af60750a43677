"""Predicted against measured peak memory: how far `loratune plan` may be trusted.

usage: python benchmarks/plan_memory.py [OUT.json]

Every case is planned and then trained for a few steps in a process of its own, whose peak
(resident memory, or what CUDA allocated) the prediction is compared with.  Model shapes come from
$LORATUNE_SHARED/make_model.py (random weights); without it only the demo is measured.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("LORATUNE_SHARED", "../shared")).resolve()
RESULT = Path(__file__).parent / "results" / "plan_memory.json"
STEPS = 4

TRAIN = """
import json, sys
from loratune.cli.dispatch import dispatch
from loratune.training.record import peak_resident_bytes
code = dispatch("train", sys.argv[1:])
import torch
allocated = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
print(json.dumps({"code": code, "resident": peak_resident_bytes(), "allocated": allocated}))
"""
COMMON = [f"trainer.steps={STEPS}", "trainer.eval_every=0", "trainer.save_every=0"]
COMMON += ["stages=[train]", "trainer.warmup_steps=0"]
E2E = ["recipe=e2e", "data.eval_fraction=0", "data.limit=400"]


def cases(folder: Path) -> Iterator[tuple[str, list[str]]]:
    yield "demo, lora, fp32", ["recipe=demo"]
    yield "demo, vera, fp32, batch 64", ["recipe=demo", "adapter=vera", "trainer.batch_size=64"]
    rows = SHARED / "data" / "e2e" / "train.jsonl"
    if not (SHARED / "make_model.py").is_file() or not rows.is_file():
        return
    for shape in ("opt-125m", "llama-150m"):
        path = folder / shape
        command = [sys.executable, str(SHARED / "make_model.py"), shape, str(path)]
        subprocess.run(command, check=True, capture_output=True)
        base = [*E2E, f"model.path={path}", f"data.path={rows}"]
        fp32 = [*base, "trainer.precision=fp32"]
        wide = ["targets=all_linear", "trainer.batch_size=16"]
        yield f"{shape}, lora q,v, fp32, batch 8", fp32
        yield f"{shape}, lora all, fp32, batch 16", [*fp32, *wide]
        yield f"{shape}, lora_fa all, fp32, batch 16", [*fp32, *wide, "adapter=lora_fa"]
        recomputed = "trainer.gradient_checkpointing=true"
        yield f"{shape}, lora all, fp32, batch 16, recomputed", [*fp32, *wide, recomputed]
        yield f"{shape}, lora all, bf16, batch 16", [*base, *wide, "trainer.precision=bf16"]


def run(code: str, words: list[str], cwd: Path) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    result = subprocess.run(
        [sys.executable, "-c", code, *words],
        capture_output=True, text=True, cwd=cwd, env=environment, timeout=900,
    )  # fmt: skip
    if result.returncode:
        raise RuntimeError(result.stderr[-2000:])
    lines = result.stdout.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("{"))
    content: dict[str, Any] = json.loads("\n".join(lines[start:]))
    return content


def measure(name: str, words: list[str], folder: Path) -> dict[str, Any]:
    plan_code = "import sys\nfrom loratune.cli.dispatch import dispatch\n"
    plan_code += "sys.exit(dispatch('plan', sys.argv[1:]))"
    plan = run(plan_code, [*words, *COMMON, "time=false", "format=json"], folder)
    out = folder / "runs" / str(time.time_ns())
    trained = run(TRAIN, [*words, *COMMON, f"out={out}"], folder)
    if trained["code"]:
        raise RuntimeError(f"{name}: training failed")
    on_gpu = plan["device"].startswith("cuda")
    measured = trained["allocated"] if on_gpu else trained["resident"]
    predicted = plan["memory"]["peak"]
    return {
        "case": name,
        "device": plan["device"],
        "dtype": plan["dtype"],
        "micro_batch": plan["largest_micro_batch"],
        "predicted": predicted,
        "measured": measured,
        "error": predicted / measured - 1,
        "components": {k: v for k, v in plan["memory"].items() if isinstance(v, int)},
    }


def main() -> None:
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULT
    target.parent.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for case, words in cases(folder):
            results.append(measure(case, words, folder))
            last = results[-1]
            print(
                f"{case:<50} predicted {last['predicted'] / 1e6:8.0f} MB, "
                f"measured {last['measured'] / 1e6:8.0f} MB, error {last['error']:+.1%}",
                flush=True,
            )
            write(target, results)


def write(target: Path, results: list[dict[str, Any]]) -> None:
    record = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "steps": STEPS,
        "largest_error": max(abs(result["error"]) for result in results),
        "results": results,
    }
    target.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
