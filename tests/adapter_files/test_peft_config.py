"""Settings of a stranger's file: what nobody knows is refused, what has no effect is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_oracle import lora_config, vera_config
from support.tiny_models import tiny_opt

from loratune import files
from loratune.adapter_files import peft_format
from loratune.adapter_files.checks import LISTED, misfits
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_config import configs_from_peft
from loratune.adapter_files.peft_format import read_adapter, read_back, write_adapter
from loratune.adapters.lora.config import LoRAConfig
from loratune.config.convert import to_plain
from loratune.config.schema import TargetsConfig
from loratune.errors import LoratuneError, ModelError
from loratune.surgery import WrappedModel, wrap_model

HERE = Path("here")


def peft_file(**settings: Any) -> dict[str, Any]:
    config = lora_config(r=4, lora_alpha=8, target_modules=["q_proj"]).to_dict()
    return json.loads(json.dumps({**config, **settings}, default=list))


def test_every_setting_that_peft_writes_by_itself_is_accounted_for() -> None:
    configs_from_peft(peft_file(), {}, HERE)
    vera = vera_config(r=4, target_modules=["q_proj"]).to_dict()
    configs_from_peft(json.loads(json.dumps(vera, default=list)), {}, HERE)


def test_settings_of_a_newer_peft_are_refused_by_name_with_the_file() -> None:
    values = {"use_sparkle": True, "sparkle_scaling": 3.0, "sparkle_zero": 0, "peft_version": "9.0"}
    with pytest.raises(ModelError) as caught:
        configs_from_peft(peft_file(**values), {}, HERE)
    line = caught.value.lines()[0]
    assert "'sparkle_scaling', 'sparkle_zero', 'use_sparkle'" in line
    assert "here/adapter_config.json" in line and "PEFT 9.0 wrote it" in line


@pytest.mark.parametrize("value", [None, False, {}, [], ""])
def test_settings_of_a_newer_peft_that_are_unset_change_nothing(value: object) -> None:
    configs_from_peft(peft_file(sparkle_config=value), {}, HERE)


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    written(tmp_path)
    return tmp_path


def written(folder: Path) -> WrappedModel:
    targets = TargetsConfig(modules=["q_proj", "v_proj"])
    wrapped = wrap_model(tiny_opt(), LoRAConfig(rank=4, alpha=8.0), targets)
    facts = {"variant": "lora", "adapter": to_plain(wrapped.config)}
    facts["adapter"].pop("variant")
    write_adapter(folder, wrapped, facts, "base")
    return wrapped


def edit(folder: Path, **settings: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))


def test_patterns_that_fit_nothing_have_no_effect_and_are_said(adapter: Path) -> None:
    (adapter / "loratune.json").unlink()
    edit(adapter, rank_pattern={"^v_proj": 7}, alpha_pattern={"^q_proj": 100, "v_proj": 32})
    wrapped = wrap_for_loading(tiny_opt(), read_adapter(adapter))
    assert {layer.rank for layer in wrapped.adapters.values()} == {4}
    said = " ".join(wrapped.match.notices)
    assert "rank_pattern '^v_proj'" in said and "alpha_pattern '^q_proj'" in said
    assert "'v_proj'" not in said and "adapter's file" in said


def test_an_edited_setting_is_named_with_both_values(adapter: Path) -> None:
    edit(adapter, lora_alpha=800)
    with pytest.raises(ModelError, match="edited: lora_alpha is 800, recorded 8"):
        read_adapter(adapter)
    edit(adapter, lora_alpha=8, base_model_name_or_path="other")
    with pytest.raises(ModelError, match="sha256 differs"):
        read_adapter(adapter)


def test_what_reads_back_otherwise_is_not_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    wrapped = written(tmp_path / "a")
    read_back(tmp_path / "a", wrapped)
    layer = next(iter(wrapped.adapters.values()))
    with torch.no_grad():
        next(p for p in layer.parameters() if p.requires_grad).add_(1)
    with pytest.raises(ModelError, match="reads back differently"):
        read_back(tmp_path / "a", wrapped)
    another = replace(wrapped, config=LoRAConfig(rank=4, alpha=9.0))
    with pytest.raises(ModelError, match="reads back differently"):
        read_back(tmp_path / "a", another)

    def refuse(*_: object) -> None:
        raise ModelError("not mine")

    monkeypatch.setattr(peft_format, "configs_from_peft", refuse)
    with pytest.raises(ModelError, match="not mine"):
        read_back(tmp_path / "a", wrapped)


def test_long_lists_name_the_first_layers_in_order() -> None:
    given = {f"layers.{n}.w": torch.ones(1) for n in reversed(range(300))}
    (error,) = misfits({}, given, set(), "here")
    names = [f"'layers.{n}.w'" for n in range(LISTED)]
    assert ", ".join(names) in error.cause and "'layers.64.w'" not in error.cause
    assert isinstance(error, LoratuneError) and files.TEMPORARY_PREFIX not in error.cause
