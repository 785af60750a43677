"""Adapters with an effect, written by PEFT or by loratune's own training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine
from support.peft_oracle import (
    ia3_config,
    lora_config,
    oft_config,
    peft_model,
    peft_parameters,
    vera_config,
)
from support.tiny_models import ATTENTION, EMBEDDING, UNEQUAL, load_plain
from support.variants import in_peft, pefts_config, structures_in_peft
from torch import Tensor

TENSORS = "adapter_model.safetensors"


@torch.no_grad()
def write_with_peft(base: Path, config: Any, folder: Path) -> Path:
    """A PEFT adapter on ``base`` whose every trained number is random, saved by PEFT."""
    model = peft_model(load_plain(base), config, seed=4)
    generator = torch.Generator().manual_seed(5)
    for tensor in peft_parameters(model).values():
        tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.2)
    model.save_pretrained(folder)
    return folder


def peft_configs(family: str) -> dict[str, Any]:
    """Kind to PEFT configuration: what a user of PEFT may bring along."""
    attention, several, embedding = ATTENTION[family], UNEQUAL[family], EMBEDDING[family]
    last = several[-1]
    flip = {"fan_in_fan_out": family == "gpt2"}
    chosen = {
        "lora": lora_config(r=4, lora_alpha=8, target_modules=attention, **flip),
        "rslora": lora_config(r=4, lora_alpha=8, target_modules=several, use_rslora=True, **flip),
        "patterns": lora_config(
            r=4, lora_alpha=8, target_modules=several, rank_pattern={last: 2},
            alpha_pattern={last: 3}, **flip,
        ),
        "one block": lora_config(
            r=4, lora_alpha=8, target_modules=several, layers_to_transform=[1], **flip
        ),
        "excluded": lora_config(
            r=4, lora_alpha=8, target_modules=several, exclude_modules=rf".*\.0\..*{last}", **flip
        ),
        "expression": lora_config(
            r=4, lora_alpha=8, target_modules=rf".*\.1\..*({'|'.join(several)})", **flip
        ),
        "embedding": lora_config(r=4, lora_alpha=8, target_modules=[embedding, *attention], **flip),
        "modules_to_save": lora_config(
            r=4, lora_alpha=8, target_modules=attention, modules_to_save=["lm_head"], **flip
        ),
        "dora": lora_config(r=4, lora_alpha=8, target_modules=several, use_dora=True, **flip),
        "dora, embedding": lora_config(
            r=4, lora_alpha=6, target_modules=[embedding, *attention], use_dora=True, **flip
        ),
        "ia3": ia3_config(
            target_modules=several, feedforward_modules=[several[-1]],
            fan_in_fan_out=family == "gpt2",
        ),
        "oft": oft_config(target_modules=several, oft_block_size=8),
        "oft, exact": oft_config(
            target_modules=several, oft_block_size=4, use_cayley_neumann=False
        ),
        "vera": vera_config(r=8, target_modules=several, projection_prng_key=3, **flip),
        "vera, projections not saved": vera_config(
            r=8, target_modules=several, projection_prng_key=3, save_projection=False, **flip
        ),
    }  # fmt: skip
    others = [name for name in structures_in_peft() if name not in chosen]
    return chosen | {name: pefts_config(name, several) for name in others if in_peft(name, family)}


KINDS = (
    "rslora", "patterns", "one block", "excluded", "expression", "embedding", "modules_to_save",
    "dora, embedding", "oft, exact", "vera, projections not saved", *structures_in_peft(),
)  # fmt: skip
"""Those with settings of their own, and every variant that PEFT has, as it is by default."""


def variant_of(kind: str) -> str:
    """The variant that a kind is named after; LoRA's kinds are named after their setting."""
    return next((name for name in structures_in_peft() if kind.partition(",")[0] == name), "lora")


def load_with_peft(base: Path, folder: Path) -> Any:
    """The adapter as PEFT loads it; missing and unexpected keys are warnings, so errors here."""
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(base), folder).eval()


def load_here(base: Path, folder: Path, *, reference: bool = True) -> Any:
    """The adapter as loratune loads it."""
    from dataclasses import replace

    from loratune.adapter_files.into_model import wrap_for_loading
    from loratune.adapter_files.peft_format import read_adapter
    from loratune.adapters.config import Kernel

    adapter = read_adapter(folder)
    if reference:
        adapter = replace(adapter, config=replace(adapter.config, kernel=Kernel.reference))
    wrapped = wrap_for_loading(load_plain(base), adapter)
    wrapped.model.eval()
    return wrapped


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """The adapter file's tensors."""
    return dict(load_file(folder / TENSORS))


def rewrite_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into an adapter that PEFT wrote."""
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def train_words(base: Path, rows: Path, out: str, *words: str) -> list[str]:
    """Words of a short training run whose learning rate gives the adapter an effect."""
    return [
        "train", f"model.path={base}", f"data.path={rows}", "data.eval_path=null",
        "trainer.steps=3", "trainer.epochs=null", "trainer.batch_size=4", "trainer.precision=fp32",
        "trainer.lr=0.05", "evaluate.generate=false", "stages=[train]", f"out={out}", *words,
    ]  # fmt: skip


def train_here(cli: CommandLine, base: Path, rows: Path, *words: str, out: str = "run") -> Path:
    """A run folder's adapter, trained through the command line."""
    cli.succeeds(*train_words(base, rows, out, *words))
    return Path.cwd() / out / "adapter"
