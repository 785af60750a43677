"""Measure the largest difference from PEFT over twenty steps, per variant and family.

Run as a program in tests/ (python -m parity.table) to print the table of docs/exactness.md.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from support.peft_oracle import (
    ia3_config,
    lora_config,
    oft_config,
    our_optimizer,
    our_parameters,
    peft_parameters,
    vera_config,
)
from support.tiny_models import FAMILIES, UNEQUAL
from support.tolerance import largest
from support.variants import in_peft, pefts_config, structures_in_peft

from loratune.config.recipes.folders import builtin_recipes
from parity.side_by_side import STEPS, both_models, one_backward

RATE, DECAY = 1e-2, 0.01


def adamw(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(peft_parameters(model).values(), lr=RATE, weight_decay=DECAY)


def lora_plus(model: Any) -> torch.optim.Optimizer:
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=RATE, loraplus_lr_ratio=16, loraplus_weight_decay=DECAY
    )


def lora_fa(model: Any) -> torch.optim.Optimizer:
    import peft.optimizers.lorafa as lorafa

    lorafa.is_bf16_available = lambda: False
    return lorafa.create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=RATE, weight_decay=DECAY)


def freeze_a(model: Any) -> torch.optim.Optimizer:
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return adamw(model)


PEFT_CONFIGS: dict[str, Callable[..., Any]] = {
    "vera": vera_config,
    "ia3": ia3_config,
    "oft": oft_config,
}
LORA_SIZE = {"r": 4, "lora_alpha": 8}
PEFT_SIZES: dict[str, dict[str, Any]] = {"vera": {"r": 8}, "ia3": {}, "oft": {}}
LORA: dict[str, Any] = {"rank": 4, "alpha": 8.0}
# label: variant, our settings, PEFT's settings, PEFT's optimizer
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], Callable[[Any], Any]]] = {
    "LoRA": ("lora", LORA, {}, adamw),
    "LoRA, dropout 0.3": ("lora", {**LORA, "dropout": 0.3}, {"lora_dropout": 0.3}, adamw),
    "LoRA, rsLoRA": ("lora", {**LORA, "rslora": True}, {"use_rslora": True}, adamw),
    "LoRA+": ("lora_plus", LORA, {}, lora_plus),
    "LoRA-FA, plain": ("lora_fa", LORA, {}, freeze_a),
    "LoRA-FA, projected": ("lora_fa", {**LORA, "projected": True}, {}, lora_fa),
    "DoRA": ("dora", LORA, {"use_dora": True}, adamw),
    "DoRA, dropout 0.3": (
        "dora",
        {**LORA, "dropout": 0.3},
        {"use_dora": True, "lora_dropout": 0.3},
        adamw,
    ),
    "IA3": ("ia3", {"feedforward_layers": []}, {"feedforward_modules": []}, adamw),
    "OFT": ("oft", {"block_size": 8}, {"oft_block_size": 8}, adamw),
    "VeRA": ("vera", {"rank": 8}, {}, adamw),
}


def runs() -> dict[str, tuple[str, Any]]:
    """Label to variant and PEFT's configuration, which takes a family's layers.

    A variant without a line above comes as it is by default, told to PEFT as its own file does.
    """
    written: dict[str, tuple[str, Any]] = {}
    for label, (variant, _, peft_settings, _) in RUNS.items():
        make, sizes = PEFT_CONFIGS.get(variant, lora_config), PEFT_SIZES.get(variant, LORA_SIZE)
        written[label] = variant, partial(make, **sizes, **peft_settings)
    named = {variant for variant, _ in written.values()}
    others = [name for name in structures_in_peft() if name not in named]
    return written | {written_name(one): (one, partial(pefts_config, one)) for one in others}


def written_name(variant: str) -> str:
    """A variant's name as people write it: what its recipe file says first of it."""
    path = builtin_recipes() / "adapter" / f"{variant}.yaml"
    return path.read_text().splitlines()[1].removeprefix("# ").partition(" ")[0].rstrip(":")


def measure(family: str, label: str) -> tuple[float, float, float]:
    """Largest difference of losses, gradients and weights."""
    variant, of_peft = runs()[label]
    _, settings, _, make = RUNS.get(label, (variant, {}, {}, adamw))
    config = of_peft(target_modules=UNEQUAL[family])
    theirs, ours = both_models(
        FAMILIES[family](), config, variant, UNEQUAL[family], check=False, **settings
    )
    optimizers = make(theirs), our_optimizer(ours, lr=RATE, weight_decay=DECAY)
    expected, got = peft_parameters(theirs), our_parameters(ours)
    worst = [0.0, 0.0, 0.0]
    for step in range(STEPS):
        losses = [
            one_backward(model, optimizer, step)
            for model, optimizer in zip((theirs, ours.model), optimizers, strict=True)
        ]
        gradients = [largest(got[name].grad, expected[name].grad) for name in expected]
        for optimizer in optimizers:
            optimizer.step()
        weights = [largest(got[name], expected[name]) for name in expected]
        now = (largest(*losses), max(gradients), max(weights))
        worst = [max(pair) for pair in zip(worst, now, strict=True)]
    return worst[0], worst[1], worst[2]


def table() -> str:
    """The parity table in Markdown."""
    names = {"opt": "OPT", "gpt2": "GPT-2", "llama": "Llama (grouped queries)"}
    rows = [f"| | {' | '.join(names.values())} |", "|---|" + "---|" * len(names)]
    for label, (variant, _) in runs().items():
        cells = [
            "PEFT has none"
            if not in_peft(variant, family)
            else " · ".join(f"{value:g}" for value in measure(family, label))
            for family in names
        ]
        rows.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(table(), end="")
