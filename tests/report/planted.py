"""Run folders and comparisons written by hand, so that what a page must say is known."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from loratune.compare.result import (
    BaseScores,
    ComparedSample,
    Comparison,
    Costs,
    CurvePoint,
    Difference,
    Estimate,
    Rows,
    SeedRun,
    Trial,
    VariantResult,
)

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "</textarea></style></svg></title><b onclick=x>",
    "javascript:alert(1)",
    "{{7*7}}{% raw %}",
    "' onmouseover='alert(1)",
    "<!--",
    "&lt;i&gt;",
    "\x1b[31mred\x07\r\x00\u202e",
    "]]><x>",
)
EVERYTHING_HOSTILE = " ".join(HOSTILE)

MODULES = [f"model.layers.{n}.self_attn.{p}_proj" for n in range(2) for p in ("q", "v")]


def write_run(
    folder: Path,
    *,
    variant: str = "lora",
    steps: int = 90,
    final: float = 0.4,
    text: str = "What is it?",
    name: str = "planted",
    module: str = "",
    seed: int = 0,
    recipe: dict[str, Any] | None = None,
) -> Path:
    """A finished run's folder; ``text`` stands wherever rows are shown."""
    folder.mkdir(parents=True)
    values = {
        "name": name,
        "model": {"path": text if module else "builtin:demo-opt"},
        "adapter": {"variant": variant, "rank": 8},
        "data": {"path": "rows.jsonl", "group_by_length": True},
        "trainer": {"steps": steps, "clip_norm": 1.0, "seed": seed},
        **(recipe or {}),
    }
    # JSON is YAML too, and keeps hostile text as it is.
    (folder / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")
    _write_history(folder, steps, final, seed)
    modules = [f"{m}{module}" for m in MODULES]
    _json(folder / "parameters.json", parameters(modules))
    side = {
        "rows": 96, "kept": 95, "dropped": {"empty": 1}, "truncated": 2, "lost_target_tokens": 3,
        "tokens": 2600, "supervised_tokens": 1400, "longest": 31,
        "max_length_to_keep": {"95%": 30, "99%": 31, "100%": 31},
    }  # fmt: skip
    warnings = [f"training rows beyond data.max_length=30: {text}"] if module else []
    data = {"train": side, "eval": {**side, "dropped": {}}, "overlap": 0, "warnings": warnings}
    _json(folder / "data.json", data)
    scores = {"perplexity": 1.5, "token_accuracy": 0.9, "tokens": 700, "prompts": 48}
    sample = {"prompt": text, "reference": f"{text} ref", "base": f"{text} b", "adapted": text}
    evaluation = {
        "rows": 48,
        "adapted": {**scores, "loss": final, "exact_match": 0.75},
        "base": {**scores, "loss": 4.2, "exact_match": 0.0},
        "samples": [sample] * 6,
    }
    _json(folder / "evaluation.json", evaluation)
    proofs = [
        {"module": m, "delta_norm": 1.2, "residual": 2e-7, "delta_kept": 1.0, "probe_error": 4e-7}
        for m in modules
    ]
    (folder / "merged").mkdir()
    merge = {
        "base": "b16c", "adapters": ["e005"], "dtype": "float32",
        "modules": proofs, "delta_kept": 0.99999, "logits": None,
    }  # fmt: skip
    _json(folder / "merged" / "merge_report.json", merge)
    training = {
        "steps": steps,
        "loss": final,
        "best_step": steps,
        "best_loss": final,
        "seconds": 9.0,
    }
    _json(folder / "summary.json", {"training": training, "stages": ["train"]})
    provenance = {
        "versions": {"torch": "2.13.0", "loratune": "0.1.0"}, "git": None, "device": "cpu",
        "platform": "Linux", "processor": text, "command": ["loratune", text],
        "fingerprints": {"base": "b16c", "data": "bbba"}, "dtype": "torch.float32",
    }  # fmt: skip
    _json(folder / "provenance.json", provenance)
    return folder


def _write_history(folder: Path, steps: int, final: float, seed: int) -> None:
    noise = random.Random(seed)
    metrics, timings = [], []
    for step in range(1, steps + 1):
        loss = final + (4.2 - final) * 0.95**step
        row = {"step": step, "train/loss": loss * noise.uniform(0.9, 1.1)}
        row |= {"train/grad_norm": loss / 3, "train/lr": 2e-3 * (1 - step / (steps + 1))}
        row["train/tokens"] = 240.0 * step
        if step % 10 == 0:
            row |= {"health/norm/lora_A": 5.0 + step / 100, "health/norm/lora_B": step / 40}
        metrics.append(row)
        if step % 30 == 0:
            metrics.append({"step": step, "eval/loss": loss, "eval/token_accuracy": 0.9})
        timing = {"step": step, "train/step_seconds": 0.1, "train/fill_rate": 0.98}
        timings.append({**timing, "memory/peak_resident_bytes": 4.2e8})
    for file, rows in (("metrics.jsonl", metrics), ("timings.jsonl", timings)):
        (folder / file).write_text(
            "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
        )


def parameters(modules: list[str]) -> dict[str, Any]:
    """A parameter report of four variants."""
    rows = [("lora", 8, 4096, 0), ("lora_fa", 8, 2048, 2048), ("lora_plus", 8, 4096, 0),
            ("vera", 256, 768, 65536)]  # fmt: skip
    return {
        "family": "opt",
        "base_parameters": 921088,
        "layers": len(modules),
        "bytes_per_number": 4,
        "variants": [
            {
                "variant": variant, "rank": rank, "trainable": trained * len(modules),
                "frozen": frozen, "shared": 0, "stored": trained * len(modules),
                "stored_bytes": 4 * trained * len(modules),
                "optimizer_bytes": 8 * trained * len(modules),
                "percent_of_base": 100 * trained * len(modules) / 921088, "percent_of_total": 1.0,
                "total": 999, "modules": [
                    {"name": m, "kind": "linear", "in_features": 128, "out_features": 128,
                     "rank": rank, "trainable": trained, "frozen": 0} for m in modules
                ],
            }
            for variant, rank, trained, frozen in rows
        ],
    }  # fmt: skip


def _json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


LOSSES = {"lora": 0.412, "lora_fa": 0.421, "lora_plus": 0.405, "vera": 0.633}
COSTS = {
    "lora": (8, 73728, 0), "lora_fa": (8, 36864, 36864), "lora_plus": (8, 73728, 0),
    "vera": (256, 10752, 262144),
}  # fmt: skip


def comparison(
    losses: dict[str, float] | None = None,
    *,
    text: str = "Which country is Sarney in?",
    label: str = "",
    seeds: int = 3,
    prompts: int = 240,
    significant_gap: float = 0.05,
) -> Comparison:
    """A comparison in which a difference above ``significant_gap`` is significant."""
    losses = LOSSES if losses is None else losses
    names = {name: f"{name}{label}" for name in losses}
    variants = [_variant(names[name], name, loss, seeds) for name, loss in losses.items()]
    return Comparison(
        name=f"demo{label}",
        created="2026-01-01T12:00:00Z",
        seconds=431.0,
        match="own",
        steps=150,
        seeds=list(range(seeds)),
        target_loss=0.7,
        base=BaseScores(
            path=f"builtin:demo-opt{label}", fingerprint="b16c", parameters=921088, loss=4.25,
            token_accuracy=0.58, exact_match=0.0, heldout_loss=1.1,
        ),
        rows=Rows(train=96, dev=48, test=240, prompts=prompts, heldout=20,
                  sources={"train": text}, fingerprints={"train": "bbba"}),
        variants=variants,
        differences=[
            d for metric in ("loss", "exact_match")
            for d in _differences(names, losses, metric, significant_gap)
        ],
        samples=[
            ComparedSample(prompt=f"{text}\nAnswer:", reference="Lorvania", base="Helland",
                           answers={names[name]: f"{text} {name}" for name in losses})
        ] * 6,
        findings=["VeRA is significantly worse than every other variant in loss.", text],
        recipe={"name": "demo", "data": {"path": text}},
        provenance={"versions": {"torch": "2.13.0"}, "command": ["loratune", text]},
    )  # fmt: skip


def _variant(label: str, variant: str, loss: float, seeds: int) -> VariantResult:
    rank, trainable, frozen = COSTS.get(variant, (8, 50000, 0))
    stored = 4 * (trainable + (frozen if variant == "vera" else 0))
    costs = Costs(
        rank=rank, trainable=trainable, frozen=frozen, percent_of_base=100 * trainable / 921088,
        stored_bytes=stored, optimizer_bytes=8 * trainable,
        activation_bytes_per_token=trainable / 9, base_activation_bytes_per_token=46000.0,
    )  # fmt: skip
    noise = random.Random(label)
    rates = [2e-4, 6e-4, 2e-3, 6e-3, 2e-2]
    search = [
        Trial(lr=rate, lr_ratio=16.0 if variant == "lora_plus" else None, steps=40,
              loss=loss + 0.3 + 0.25 * (number - 2) ** 2 * noise.uniform(0.5, 1.0))
        for number, rate in enumerate(rates)
    ]  # fmt: skip
    search.append(Trial(lr=6e-2, lr_ratio=None, steps=40, loss=None, reason="training diverged"))
    members = [
        SeedRun(seed=seed, loss=loss, exact_match=0.8, curve=[
            CurvePoint(step=step, tokens=240 * step, seconds=0.1 * step * noise.uniform(0.9, 1.1),
                       train_loss=None, dev_loss=loss + 3.8 * 0.96**step * noise.uniform(0.8, 1.2))
            for step in range(0, 151, 15)
        ])
        for seed in range(seeds)
    ]  # fmt: skip
    estimates = {
        "loss": Estimate(mean=loss, low=loss - 0.02, high=loss + 0.025, seeds=seeds, units=240),
        "exact_match": Estimate(
            mean=1 - loss, low=0.9 - loss, high=1.05 - loss, seeds=seeds, units=240
        ),
        "token_accuracy": Estimate(mean=0.93, low=None, high=None, seeds=seeds),
        "forgetting": Estimate(mean=0.012, low=-0.01, high=0.03, seeds=seeds, units=20),
        "step_seconds": Estimate(mean=0.09, low=None, high=None, seeds=seeds),
        "peak_bytes": Estimate(mean=3.1e7 + 18 * trainable, low=None, high=None, seeds=seeds),
        "seconds_to_target": Estimate(mean=4.2, low=None, high=None, seeds=seeds),
        "merge_residual": Estimate(mean=2.8e-7, low=None, high=None, seeds=seeds),
    }
    return VariantResult(
        label=label, variant=variant, adapter={"variant": variant, "rank": rank, "lr": 2e-3},
        costs=costs, lr=2e-3, lr_ratio=16.0 if variant == "lora_plus" else None,
        search=search, members=members, estimates=estimates,
    )  # fmt: skip


def _differences(
    names: dict[str, str], losses: dict[str, float], metric: str, gap: float
) -> list[Difference]:
    found = []
    listed = list(losses)
    for number, first in enumerate(listed):
        for second in listed[number + 1 :]:
            change = losses[first] - losses[second]
            change = change if metric == "loss" else -change
            sure = abs(change) > gap
            found.append(
                Difference(
                    metric=metric, first=names[first], second=names[second], difference=change,
                    low=change - 0.03, high=change + 0.03, p=0.0004 if sure else 0.3,
                    p_holm=0.0024 if sure else 0.6, significant=sure,
                    words=f"{names[first]} and {names[second]}: {'a' if sure else 'no'} difference",
                )
            )  # fmt: skip
    return found
