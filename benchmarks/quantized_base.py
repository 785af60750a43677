"""(h) Bases in 4 and 8 bits: products, memory while loading, training, a large model.

usage: LORATUNE_BASE=DIR python -m benchmarks.quantized_base [--parts products,loading,training]
       python -m benchmarks.quantized_base --parts large --large DIR

Every run is a process of its own, started like any user's.  Each part writes its own result file,
``quantized_PART.json``; ``benchmarks/quantized_page.py`` makes the page of them.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.e2e import shared_folder
from loratune.adapters.base import LayerPlan
from loratune.adapters.config import Kernel, LayerKind, LayerShape
from loratune.adapters.registry import adapter_class, config_class
from loratune.config.schema import Quantize
from loratune.files import sha256_file
from loratune.models.quantized.format import Quantization

KINDS = ("fp32", "int8", "nf4")
ROWS = {"banking77": "Banking77", "e2e": "E2E NLG"}
SHAPES = ((576, 576), (1536, 576), (2048, 2048), (8192, 2048))
PATIENCE = 0.05


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--parts", default="products,loading,training")
    found.add_argument(
        "--steps", type=int, nargs=len(ROWS), default=[150, 60], help=f"of {', '.join(ROWS)}"
    )
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--seeds", type=int, default=3)
    found.add_argument("--answers", type=int, default=100, help="rows evaluated and answered")
    found.add_argument("--large", type=Path, help="the folder of a large model")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    if options.is_micro:
        arguments.steps, arguments.seeds, arguments.answers = [3, 3], 1, 2
    for part in arguments.parts.split(","):
        common.say(part)
        content = PARTS[part](arguments, options)
        if content is not None:
            common.write_result(f"quantized_{part}", options, content)


def real_base() -> Path | None:
    base = os.environ.get("LORATUNE_BASE")
    if base is None or not Path(base).is_dir():
        common.say("no real model: set LORATUNE_BASE to a folder; nothing measured")
        return None
    return Path(base)


# -- products ------------------------------------------------------------------------------


def products(arguments: Namespace, options: common.Options) -> dict[str, Any]:
    """A LoRA layer forward and backward: blocks widened by us, or the product bitsandbytes'."""
    torch.set_num_threads(options.threads)
    rounds, tokens = (1, 32) if options.is_micro else (15, 512)
    rows = []
    for kind in (Quantize.nf4, Quantize.int8):
        for out_features, in_features in SHAPES[: 1 if options.is_micro else None]:
            candidates = product_candidates(kind, out_features, in_features, tokens)
            seconds = common.interleaved(candidates, rounds, now=options.now)
            measured = common.timing_rows(seconds, "plain fp32")
            rows.append({"kind": str(kind), "shape": [out_features, in_features], "rows": measured})
    return {"settings": {"tokens": tokens, "rank": 16}, "products": rows}


def product_candidates(
    kind: Quantize, out_features: int, in_features: int, tokens: int
) -> dict[str, Callable[[], object]]:
    import bitsandbytes as bnb

    from loratune.models.quantized.layers import quantized_linear

    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) / in_features**0.5
    plain = torch.nn.Linear(in_features, out_features, bias=False)
    plain.weight = torch.nn.Parameter(weight, requires_grad=False)
    ours, lent = (
        quantized_linear(weight, None, Quantization(kind), torch.float32) for _ in range(2)
    )
    sizes = in_features, out_features, False
    if kind is Quantize.int8:
        theirs: Any = bnb.nn.Linear8bitLt(*sizes, has_fp16_weights=False, device="meta")
    else:
        theirs = bnb.nn.Linear4bit(*sizes, compute_dtype=torch.float32, device="meta")
    theirs.weight = lent.weight
    x = torch.randn(tokens, in_features, requires_grad=True)
    handed_over = adapted(ours, Kernel.reference)
    handed_over.base_layer = theirs.train()
    layers = {
        "plain fp32": adapted(plain, Kernel.fused),
        "fused, block by block": adapted(ours, Kernel.fused),
        "handed over to bitsandbytes": handed_over,
    }
    return {name: lambda layer=layer: layer(x).sum().backward() for name, layer in layers.items()}


def adapted(layer: torch.nn.Linear, kernel: Kernel) -> torch.nn.Module:
    shape = LayerShape("layer", LayerKind.linear, layer.in_features, layer.out_features)
    config = config_class("lora")(rank=16, kernel=kernel)
    [adapter] = adapter_class("lora").build([LayerPlan(layer, shape, 16, None)], config)
    return adapter.train()


# -- loading -------------------------------------------------------------------------------

LOADING = """
import json, re, sys
from pathlib import Path
import torch
from loratune.config.schema import Quantize
from loratune.models.build import meta_base
from loratune.models.load import load_model
from loratune.models.quantized import layers, streaming
from loratune.models.quantized.format import Quantization
from loratune.models.weights import tensor_entries

def status(key):
    return 1024 * int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
meta_base(folder)  # what transformers imports for it belongs to no base
before = status("VmRSS")
model = load_model(folder, torch.float32, quantization=Quantization(Quantize(sys.argv[2])))
peak = status("VmHWM") - before
held = {p.data_ptr(): p.nbytes for p in model.parameters()}
for _, layer in streaming.quantized_layers(model):
    for name, tensor in layers.stored_tensors(layer).items():
        if name in ("weight.absmax", "SCB"):
            held[tensor.data_ptr()] = tensor.nbytes
largest = max(entry.size for entry in tensor_entries(folder).values())
print(json.dumps({"peak": peak, "base": sum(held.values()), "largest": largest}))
"""


def loading(arguments: Namespace, options: common.Options) -> dict[str, Any] | None:
    """Peak memory while a base is quantized, in a process of its own, beside what remains."""
    base = real_base()
    if base is None:
        return None
    rows = []
    for kind in Quantize:
        done = subprocess.run(
            [sys.executable, "-c", LOADING, str(base), str(kind)],
            check=True, capture_output=True, text=True, env=environment(options),
        )  # fmt: skip
        rows.append({"kind": str(kind), **json.loads(done.stdout)})
    return {"loading": rows}


# -- training ------------------------------------------------------------------------------


def training(arguments: Namespace, options: common.Options) -> dict[str, Any] | None:
    """The real model on two sets of rows, in three formats and with several seeds."""
    base = real_base()
    if base is None:
        return None
    rows = []
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as folder:
        for data, steps in zip(ROWS, arguments.steps, strict=True):
            tests = shuffled(shared_folder() / "data" / data / "test.jsonl", Path(folder) / data)
            for seed in range(arguments.seeds):
                for kind in KINDS:
                    out = Path(folder) / f"{data}-{kind}-{seed}"
                    words = training_words(arguments, base, tests, kind, seed, out)
                    run([*words, f"trainer.steps={steps}"], options)
                    rows.append({"data": data, "kind": kind, "seed": seed, **figures(out)})
                    common.say(f"  {rows[-1]}")
                    if kind == "nf4" and seed == 0:
                        rows[-1]["merges"] = merges(out, options)
                        rows[-1]["answers"] = answers(out)
    settings = {
        "steps": dict(zip(ROWS, arguments.steps, strict=True)), "batch": arguments.batch,
        "answers": arguments.answers, "rank": 16, "lr": 1e-3, "targets": "all_linear",
    }  # fmt: skip
    return {"settings": settings, "training": rows}


def shuffled(source: Path, folder: Path) -> Path:
    """The rows in an order that says nothing: Banking77's lie sorted by intent."""
    rows = source.read_text(encoding="utf-8").splitlines(keepends=True)
    random.Random(0).shuffle(rows)
    folder.mkdir()
    (folder / source.name).write_text("".join(rows), encoding="utf-8")
    return folder / source.name


def training_words(
    arguments: Namespace, base: Path, tests: Path, kind: str, seed: int, out: Path
) -> list[str]:
    rows = shared_folder() / "data" / tests.parent.name
    return [
        "train", "recipe=e2e", "targets=all_linear", "adapter.rank=16", f"model.path={base}",
        "model.architecture=null", f"data.path={rows / 'train.jsonl'}",
        f"data.eval_path={tests}", f"data.eval_limit={arguments.answers}",
        f"evaluate.generate_limit={arguments.answers}", "data.max_length=256",
        f"trainer.batch_size={arguments.batch}", "trainer.lr=1e-3",
        "trainer.precision=fp32", f"trainer.seed={seed}", f"trainer.threads={arguments.threads}",
        f"model.quantize={'null' if kind == 'fp32' else kind}", f"out={out}",
    ]  # fmt: skip


def figures(out: Path) -> dict[str, Any]:
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    steps = [one["train/step_seconds"] for one in timings if "train/step_seconds" in one]
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [one["train/loss"] for one in metrics if "train/loss" in one]
    scores = json.loads((out / "evaluation.json").read_text())
    return {
        "peak_bytes": max(one.get("memory/peak_resident_bytes", 0) for one in timings),
        "step_seconds": common.Spread.of(steps[1:] or steps).median,
        "train_loss": sum(losses[-10:]) / len(losses[-10:]),
        "base": {key: scores["base"][key] for key in ("loss", "exact_match")},
        "adapted": {key: scores["adapted"][key] for key in ("loss", "exact_match")},
    }


def merges(run_folder: Path, options: common.Options) -> list[dict[str, Any]]:
    """Both merges of a run, and each in 4 bits again, as their certificates have them."""
    rows = []
    for base in ("dequantized", "original"):
        out = run_folder / f"merged-{base}"
        words = ["merge", f"run={run_folder}", f"base={base}", "requantize=nf4", f"out={out}"]
        run(words, options)
        report = json.loads((out / "merge_report.json").read_text())
        rows.append({"base": base, "comparisons": report["quantized"]["comparisons"]})
    return rows


def answers(run_folder: Path) -> list[dict[str, str]]:
    samples = json.loads((run_folder / "evaluation.json").read_text())["samples"]
    return [
        {key: one[key] for key in ("prompt", "base", "adapted", "reference")} for one in samples[:3]
    ]


# -- a large model -------------------------------------------------------------------------


def large(arguments: Namespace, options: common.Options) -> dict[str, Any] | None:
    """Ten steps in nf4; killed after the fourth, resumed, compared; merged both ways."""
    if arguments.large is None or not arguments.large.is_dir():
        common.say("no large model: --large DIR; nothing measured")
        return None
    with tempfile.TemporaryDirectory(
        prefix="loratune-bench-", dir=arguments.large.parent
    ) as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        words = large_words(arguments.large, arguments.threads)
        peak = run([*words, f"out={whole}"], options)
        run([*words, f"out={killed}"], options, kill_at=killed / "checkpoints" / "step_000004")
        resumed = run([*words, f"out={killed}", "resume=auto"], options)
        same = [contents(one / "adapter") for one in (whole, killed)]
        content = {
            "peak_bytes": peak,
            "peak_bytes_resumed": resumed,
            "same_bytes": same[0] == same[1],
            "figures": figures_of_steps(whole),
            "merges": [merge_large(whole, base, options) for base in ("dequantized", "original")],
        }
    config = json.loads((arguments.large / "config.json").read_text())
    return {"settings": {"model": config["model_type"], "steps": 10, "batch": 2}, "large": content}


def large_words(base: Path, threads: int) -> list[str]:
    return [
        "train", "recipe=demo", f"model.path={base}", "model.quantize=nf4", "targets=attention_qv",
        "trainer.steps=10", "trainer.batch_size=2", "trainer.save_every=2", "trainer.eval_every=0",
        "stages=[train]", "data.eval_path=null", "data.test_path=null", "data.limit=40",
        f"trainer.threads={threads}", "trainer.precision=fp32",
    ]  # fmt: skip


def figures_of_steps(out: Path) -> dict[str, float]:
    timings = [json.loads(line) for line in (out / "timings.jsonl").read_text().splitlines()]
    seconds = [one["train/step_seconds"] for one in timings if "train/step_seconds" in one]
    return {"step_seconds": common.Spread.of(seconds[1:]).median}


def contents(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}


def merge_large(run_folder: Path, base: str, options: common.Options) -> dict[str, Any]:
    out = run_folder.parent / base
    run(["merge", f"run={run_folder}", f"base={base}", f"out={out}"], options)
    report = json.loads((out / "merge_report.json").read_text())
    for file in out.glob("*.safetensors"):
        file.unlink()
    return {"base": base, "comparisons": report["quantized"]["comparisons"]}


# -- processes -----------------------------------------------------------------------------


def environment(options: common.Options) -> dict[str, str]:
    threads, path = str(options.threads), str(common.REPOSITORY)
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def run(words: list[str], options: common.Options, kill_at: Path | None = None) -> int:
    """Run ``loratune WORDS``; gives its peak of resident bytes.

    Args:
        words: what follows ``loratune``.
        options: of the benchmark.
        kill_at: kill it when this appears.
    """
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "loratune", *words],
            stdout=output, stderr=subprocess.STDOUT, env=environment(options),
        )  # fmt: skip
        peak = 0
        for now in peaks(process):
            peak = now
            if kill_at is not None and kill_at.exists():
                process.send_signal(signal.SIGKILL)
        wanted = -signal.SIGKILL if kill_at is not None else 0
        if process.wait() != wanted:
            output.seek(0)
            raise SystemExit(output.read().decode()[-2000:])
    return peak


def peaks(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """The peak so far, until the process has ended."""
    peak = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            text = ""
        found = re.search(r"VmHWM:\s+(\d+)", text)
        peak = max(peak, 1024 * int(found[1]) if found else 0)
        yield peak
        time.sleep(PATIENCE)


PARTS: dict[str, Callable[[Namespace, common.Options], dict[str, Any] | None]] = {
    "products": products,
    "loading": loading,
    "training": training,
    "large": large,
}

if __name__ == "__main__":
    main()
