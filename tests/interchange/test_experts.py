"""Adapters of experts that are stacked in one tensor: against PEFT, in files, merged, in a run."""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from support.command_line import CommandLine
from support.families import BUILDERS
from support.tiny_models import load_plain, logits, save_base
from support.tolerance import T2, largest
from torch import Tensor, nn

from interchange.adapters import load_here, load_with_peft, train_words
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import peft_notices, read_adapter, write_adapter
from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.registry import config_class, variant_names
from loratune.config.schema import MergeConfig, TargetsConfig
from loratune.models.stored_names import StoredNames
from loratune.models.weights import tensor_entries
from loratune.stages.merge import merge
from loratune.surgery import WrappedModel, disabled, peft_names, unwrap_model, wrap_model

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "jetmoe")
WORDS = ("experts", "all_linear_and_experts")
IDS = torch.randint(3, 40, (2, 9), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Adapted:
    """A base, and an adapter whose every number is random."""

    base: Path
    adapter: Path
    wrapped: WrappedModel


def adapt(base: Path, folder: Path, words: str, variant: str = "lora", **settings: Any) -> Adapted:
    config = config_class(variant)(rank=2, alpha=3.0, **settings)
    wrapped = wrap_model(load_plain(base), config, TargetsConfig(modules=words))
    torch.manual_seed(1)
    for adapter in wrapped.adapters.values():
        for tensor in adapter.adapter_tensors().values():
            nn.init.normal_(tensor.data, std=0.2)
    folder.mkdir()
    write_adapter(folder, wrapped, {}, "base")
    return Adapted(base, folder, wrapped)


@pytest.fixture(scope="module", params=[(f, w) for f in FAMILIES for w in WORDS], ids="-".join)
def adapted(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Adapted:
    family, words = request.param
    here = tmp_path_factory.mktemp(family)
    return adapt(save_base(here / "base", BUILDERS[family]()), here / "adapter", words)


def gradients(model: Any) -> dict[str, Tensor]:
    model.zero_grad()
    scores = model(input_ids=IDS).logits
    nn.functional.cross_entropy(scores[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_peft_computes_the_same_from_the_file_and_has_the_same_gradients(adapted: Adapted) -> None:
    assert peft_notices(adapted.wrapped) == []
    model = PeftModel.from_pretrained(load_plain(adapted.base), adapted.adapter, is_trainable=True)
    ours = adapted.wrapped.model
    T2.check(logits(model), logits(ours))
    assert largest(logits(ours), logits(load_plain(adapted.base))) > 1e-3
    theirs = {k.replace(".default", ""): v for k, v in gradients(model).items()}
    own = gradients(ours)
    names = peft_names(adapted.wrapped)
    compared = 0
    for name, adapter in adapted.wrapped.adapters.items():
        for key in adapter.adapter_tensors():
            mine = own.get(f"{name}.{key.removesuffix('.weight')}")
            peft = theirs.get(f"base_model.model.{names[name]}.{key}")
            assert (mine is None) == (peft is None), name
            if mine is not None and peft is not None:
                torch.testing.assert_close(mine, peft, rtol=1e-4, atol=1e-6)
                compared += bool(mine.abs().max() > 0)
    assert compared > 2


def test_what_trains_is_what_the_closed_form_counts(adapted: Adapted) -> None:
    wrapped = adapted.wrapped
    real = sum(p.numel() for p in wrapped.model.parameters() if p.requires_grad)
    counted = wrapped.config.count([(shape, 2) for shape in wrapped.match.shapes])
    assert real == counted.trainable > 0


def test_the_file_read_back_is_the_same_adapter(adapted: Adapted) -> None:
    again = wrap_for_loading(load_plain(adapted.base), read_adapter(adapted.adapter))
    assert torch.equal(logits(again.model), logits(adapted.wrapped.model))


def test_off_or_taken_away_the_base_is_bit_for_bit_what_it_was(adapted: Adapted) -> None:
    base = load_plain(adapted.base)
    wrapped = wrap_for_loading(load_plain(adapted.base), read_adapter(adapted.adapter))
    with disabled(wrapped):
        assert torch.equal(logits(wrapped.model), logits(base))
    plain = unwrap_model(wrapped)
    before, after = base.state_dict(), plain.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert torch.equal(logits(plain), logits(base))


def test_merged_files_are_base_plus_adapter_with_a_proof_each(
    adapted: Adapted, tmp_path: Path
) -> None:
    result = merge(
        [read_adapter(adapted.adapter)], adapted.base, tmp_path / "merged", MergeConfig()
    )
    T2.check(logits(load_plain(tmp_path / "merged")), logits(adapted.wrapped.model))
    proved = {proof.module for proof in result.modules}
    assert proved == adapted.wrapped.adapters.keys()
    names = StoredNames(load_plain(adapted.base), tensor_entries(adapted.base))
    merged = StoredNames(load_plain(adapted.base), tensor_entries(tmp_path / "merged"))
    for name, adapter in adapted.wrapped.adapters.items():
        parameter = adapter.shape.parameter
        difference = merged.read(parameter).double() - names.read(parameter).double()
        delta = adapter.delta_weight(names.read(parameter)).detach().double()
        torch.testing.assert_close(difference, delta, rtol=1e-5, atol=1e-6)
        assert difference.abs().max() > 0, name


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_pefts_own_adapter_of_parameters_is_loaded(family: str, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", BUILDERS[family]())
    config = LoraConfig(
        r=2,
        lora_alpha=5,
        init_lora_weights=False,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    torch.manual_seed(2)
    peft = get_peft_model(load_plain(base), config)
    peft.save_pretrained(tmp_path / "peft")
    ours = wrap_for_loading(load_plain(base), read_adapter(tmp_path / "peft"))
    assert len(ours.adapters) == 2 + 4
    T2.check(logits(ours.model), logits(peft))


def test_the_start_is_pefts_for_the_same_seed() -> None:
    base = BUILDERS["mixtral"]()
    names = ["mlp.experts.gate_up_proj"]
    torch.manual_seed(0)
    peft = get_peft_model(
        deepcopy(base), LoraConfig(r=2, target_modules=[], target_parameters=names)
    )
    wrapped = wrap_model(base, config_class("lora")(rank=2), TargetsConfig(modules=names), seed=0)
    theirs = dict(peft.named_parameters())
    for name, written in peft_names(wrapped).items():
        key = f"base_model.model.{written}.lora_A.default.weight"
        assert torch.equal(wrapped.adapters[name].adapter_tensors()["lora_A.weight"], theirs[key])


def adapts_experts(variant: str) -> bool:
    shape = LayerShape("experts", LayerKind.experts, 8, 8, experts=2)
    return not config_class(variant)().check_layer(shape, 8)


@pytest.mark.parametrize("variant", [*filter(adapts_experts, variant_names())])
def test_a_run_trains_merges_and_verifies_experts(
    cli: CommandLine, rows: Path, tmp_path: Path, variant: str
) -> None:
    base = save_base(tmp_path / "base", BUILDERS["qwen3_moe"]())
    words = ["targets.modules=all_linear_and_experts", f"adapter={variant}", "adapter.rank=2"]
    words.append("stages=[train,merge]")
    out = cli.succeeds(*train_words(base, rows, str(tmp_path / "run"), *words)).out
    assert "target experts: 4 layers" in out and "experts frozen" not in out
    assert "routers (coefficient 0.001) is left out; trainer.router_loss=true" in out
    cli.succeeds("verify", f"run={tmp_path / 'run'}")
    folder = tmp_path / "run" / "adapter"
    written = json.loads((folder / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.experts.gate_up_proj" in written["target_parameters"]
    ours = logits(load_here(base, folder).model)
    T2.check(logits(load_with_peft(base, folder)), ours)
    assert largest(ours, logits(load_plain(base))) > 1e-6


def test_a_run_trains_on_the_routers_loss_where_it_is_asked_to(
    cli: CommandLine, rows: Path, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", BUILDERS["mixtral"]())
    adapters = []
    for word in ("false", "true"):
        words = ["targets.modules=all_linear", f"trainer.router_loss={word}"]
        out = cli.succeeds(*train_words(base, rows, str(tmp_path / word), *words)).out
        assert ("is trained on as well" in out) == (word == "true")
        assert "all_linear leaves" in out and "parameters of experts frozen" in out
        adapters.append((tmp_path / word / "adapter" / "adapter_model.safetensors").read_bytes())
    assert adapters[0] != adapters[1]
