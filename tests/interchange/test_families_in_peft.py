"""Adapters that PEFT would read otherwise by the names of their layers: the form it reads right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.families import BUILDERS
from support.tiny_models import load_plain, logits, save_base
from support.tolerance import T2, largest
from torch import Tensor

from interchange.adapters import load_here, load_with_peft, train_here, train_words
from loratune.adapter_files.peft_format import read_adapter

RIGHT = {
    ("deepseek_v3", "lora"): ["targets=all_linear"],
    ("deepseek_v3", "lora_fa"): ["targets=all_linear"],
    ("deepseek_v3", "lora_plus"): [
        "targets=all_linear", "adapter.dropout=0.1", "adapter.rank_pattern={gate_proj: 2}",
        "adapter.alpha_pattern={down_proj: 7}",
    ],
    ("deepseek_v3", "vera"): ["targets=all_linear"],
    ("git", "lora"): [
        "targets.modules=['git.encoder.layer.0.attention.self.query',output]",
    ],
    ("hrm_text", "lora"): ["targets=all_linear"],
    ("zamba", "lora"): ["targets.modules=[feed_forward.up_proj,q_proj]"],
}  # fmt: skip
OURS_ALONE = {
    "mamba": ["targets.modules=[in_proj,out_proj]"],
    "laguna": ["targets.modules=[shared_experts.up_proj,o_proj]"],
}
RANK = "adapter.rank=4"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family to base folder."""
    root = tmp_path_factory.mktemp("families")
    used = {family for family, _ in RIGHT} | OURS_ALONE.keys()
    return {family: save_base(root / family, BUILDERS[family]()) for family in used}


# PEFT looks for the patterns' keys among modules alone, and uses them for parameters all the same.
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize(("family", "variant"), RIGHT)
def test_peft_computes_what_loratune_trained(
    cli: CommandLine, families: dict[str, Path], rows: Path, family: str, variant: str
) -> None:
    base, words = families[family], RIGHT[family, variant]
    folder = train_here(cli, base, rows, f"adapter={variant}", RANK, *words)
    ours = logits(load_here(base, folder).model)
    T2.check(logits(load_with_peft(base, folder)), ours)
    assert largest(ours, logits(load_plain(base))) > 1e-3


def test_layers_named_as_parameters_are_read_back_with_ranks_and_dropout(
    cli: CommandLine, families: dict[str, Path], rows: Path
) -> None:
    base, words = families["deepseek_v3"], RIGHT["deepseek_v3", "lora_plus"]
    folder = train_here(cli, base, rows, "adapter=lora_plus", RANK, *words)
    written = json.loads((folder / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.gate_proj.weight" in written["target_parameters"]
    assert written["lora_dropout"] == 0.0
    config = read_adapter(folder).config
    assert config.dropout == 0.1
    assert (config.rank_pattern, config.alpha_pattern["down_proj"]) == ({"gate_proj": 2}, 7)
    again = train_here(
        cli,
        base,
        rows,
        "adapter=lora_plus",
        f"adapter_path={folder}",
        "trainer.lr=1e-7",
        out="again",
    )
    T2.check(logits(load_here(base, again).model), logits(load_here(base, folder).model))


def test_every_exported_form_is_named_the_same_way(
    cli: CommandLine, families: dict[str, Path], rows: Path
) -> None:
    base = families["deepseek_v3"]
    words = ["adapter=vera", "targets.modules=[gate_proj,o_proj]", RANK]
    folder = train_here(cli, base, rows, *words)
    cli.succeeds("export", f"adapter_path={folder}", "format=lora", "out=plain")
    plain = logits(load_with_peft(base, Path.cwd() / "plain"))
    T2.check(plain, logits(load_here(base, folder).model))


@pytest.mark.parametrize("family", OURS_ALONE)
def test_what_peft_cannot_read_is_said_before_training_and_merges_all_the_same(
    cli: CommandLine, families: dict[str, Path], rows: Path, family: str
) -> None:
    base = families[family]
    words = [RANK, "adapter=lora", *OURS_ALONE[family]]
    folder = train_here(cli, base, rows, *words)
    lines = cli.succeeds(*train_words(base, rows, "second", *words)).out.splitlines()
    notes = [place for place, line in enumerate(lines) if "PEFT cannot use this adapter" in line]
    steps = next(place for place, line in enumerate(lines) if " steps of " in line)
    assert len(notes) == 1 and notes[0] < steps
    ours = logits(load_here(base, folder).model)
    assert _peft_fails(base, folder, ours)
    cli.succeeds("merge", f"model.path={base}", f"adapter_path={folder}", "out=merged")
    T2.check(logits(load_plain(Path.cwd() / "merged")), ours)


def _peft_fails(base: Path, folder: Path, ours: Tensor) -> bool:
    """Whether PEFT refuses the adapter, warns of its tensors, or computes something else."""
    try:
        return largest(logits(load_with_peft(base, folder)), ours) > 1e-4
    except (ValueError, UserWarning):
        return True
