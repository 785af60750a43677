"""Several adapters as one plain LoRA: the sum to the last bits, by PEFT's logits, or refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine
from support.peft_oracle import PEFT_ABOUT_ITSELF
from support.tiny_models import FAMILIES, UNEQUAL, load_plain, save_base, token_ids
from torch import Tensor

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.offline import attach
from loratune.adapter_files.peft_format import AdapterFolder, read_adapter, write_adapter
from loratune.adapters.registry import config_class
from loratune.config.convert import to_plain
from loratune.config.schema import TargetsConfig
from loratune.errors import ConfigError, LoratuneError, MergeError
from loratune.merging import export_proof
from loratune.models.fingerprint import base_fingerprint
from loratune.stages.combine import combine
from loratune.surgery import wrap_model
from loratune.verify.adapter import check_export
from loratune.verify.checks import Base

pytestmark = PEFT_ABOUT_ITSELF
MEMBERS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("lora", ["q_proj", "c_attn", "gate_proj", "fc1"], {"rank": 3, "alpha": 12.0}),
    ("vera", [], {"rank": 5}),
    ("lora_fa", ["wte", "embed_tokens"], {"rank": 2, "rslora": True}),
]
"""Variant, targets (of whichever family has them; all that the family tests if empty), settings."""


def member(folder: Path, base: Path, family: str, number: int) -> AdapterFolder:
    """An adapter whose every number is random, with the facts that bind it to its base."""
    variant, wanted, settings = MEMBERS[number]
    model = load_plain(base)
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    targets = [name for name in wanted if name in names] or UNEQUAL[family]
    if variant == "lora_fa":
        variant = "lora"
    config = config_class(variant)(**settings)
    wrapped = wrap_model(model, config, TargetsConfig(modules=targets))
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    plain = to_plain(config)
    facts = {
        "variant": plain.pop("variant"), "adapter": plain, "base": base_fingerprint(base),
        "projection": None,
    }  # fmt: skip
    folder.mkdir()
    write_adapter(folder, wrapped, facts, str(base))
    return read_adapter(folder)


def deltas(base: Path, adapter: AdapterFolder) -> dict[str, Tensor]:
    layers = attach(base, adapter).wrapped.adapters
    found = {}
    for name, layer in layers.items():
        A, B, scale = layer.factors()  # type: ignore[attr-defined]
        found[name] = (B.detach().double() @ A.detach().double()) * scale
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("weights", [(0.5, 0.5, 0.5), (1.0, 1.0, 1.0), (2.0, -0.75, 0.0)])
def test_the_sum_is_exact_and_one_folder_for_peft(
    tmp_path: Path, family: str, weights: Sequence[float]
) -> None:
    from peft import PeftModel

    base = save_base(tmp_path / "base", FAMILIES[family]())
    members = [member(tmp_path / f"m{n}", base, family, n) for n in range(len(MEMBERS))]
    out = tmp_path / "out"
    certificate = combine(members, weights, base, out)
    assert certificate["proof"]["worst_relative_difference"] <= 1e-6
    terms = [deltas(base, one) for one in members]
    combined = deltas(base, read_adapter(out))
    assert combined.keys() == {name for term in terms for name in term}
    for name, delta in combined.items():
        products = [w * term[name] for w, term in zip(weights, terms, strict=True) if name in term]
        largest = max(float(product.abs().max()) for product in products)
        assert float((delta - sum(products)).abs().max()) <= 1e-6 * largest, name
    ids = token_ids(0)
    ours = wrap_for_loading(load_plain(base), read_adapter(out)).model.eval()
    theirs: Any = PeftModel.from_pretrained(load_plain(base), out).eval()
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        torch.testing.assert_close(theirs(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(load_plain(base)(input_ids=ids).logits, expected, atol=1e-2)
    assert not [check for check in check_export(out, Base(base)) if check.problem]


def test_a_wrong_sum_is_never_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = save_base(tmp_path / "base", FAMILIES["llama"]())
    members = [member(tmp_path / f"m{n}", base, "llama", n) for n in (0, 1)]
    read = export_proof.read_adapter

    def tampered(folder: Path) -> AdapterFolder:
        path = folder / "adapter_model.safetensors"
        tensors = load_file(path)
        name = max(key for key in tensors if "lora_B" in key)
        tensors[name][0, 0] += 1e-3
        save_file(tensors, path, metadata={"format": "pt"})
        (folder / "loratune.json").unlink()
        return read(folder)

    monkeypatch.setattr(export_proof, "read_adapter", tampered)
    with pytest.raises(MergeError, match="the sum's ΔW differs"):
        combine(members, [0.5, 0.5], base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "cause"),
    [
        ([1.0], "1 weights for 2 adapters"),
        ([0.0, 0.0], "give no adapter"),
        ([1.0, float("nan")], "give no adapter"),
    ],
)
def test_weights_that_mean_nothing_are_refused(
    tmp_path: Path, weights: list[float], cause: str
) -> None:
    base = save_base(tmp_path / "base", FAMILIES["llama"]())
    one = member(tmp_path / "m", base, "llama", 0)
    with pytest.raises(ConfigError, match=cause):
        combine([one, one], weights, base, tmp_path / "out")


def test_another_base_is_refused(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", FAMILIES["llama"]())
    other = save_base(tmp_path / "other", FAMILIES["llama"](seed=1))
    members = [member(tmp_path / "a", base, "llama", 0), member(tmp_path / "b", other, "llama", 0)]
    with pytest.raises(LoratuneError, match="base: "):
        combine(members, [1.0, 1.0], base, tmp_path / "out")


def test_runs_are_combined_averaged_scaled_and_refused_by_name(
    cli: CommandLine, tmp_path: Path
) -> None:
    quick = ("recipe=smoke", "trainer.steps=2", "stages=[train]")
    cli.succeeds("train", *quick, "out=a")
    cli.succeeds("train", *quick, "adapter=lora_plus", "targets=mlp", "trainer.seed=1", "out=b")
    cli.succeeds("train", *quick, "adapter=full", "out=whole")
    said = cli.succeeds("combine", "run=[a,b]", "out=mean").out
    assert "0.5 · " in said and "rank 8" in said
    facts = json.loads((tmp_path / "mean/loratune.json").read_text())
    assert [term["weight"] for term in facts["combined"]] == [0.5, 0.5]
    cli.succeeds("verify", "mean", "model.path=builtin:demo-opt")
    cli.succeeds("evaluate", "adapter_path=mean", "evaluate.generate=false", "data=demo")
    cli.succeeds("combine", "run=a", "weights=[2]", "out=twice")
    once, twice = (
        load_file(tmp_path / folder / "adapter_model.safetensors")
        for folder in ("a/adapter", "twice")
    )
    assert all(torch.equal(twice[key], once[key] * (2 if "lora_B" in key else 1)) for key in once)
    for words, code, cause in [
        (["run=[a,whole]"], 4, "full is not a product of two factors"),
        (["run=[a,b]", "weights=[1,x]"], 2, "are not weights"),
        ([], 2, "which adapters?"),
        (["run=[a,nowhere]"], 2, "nowhere"),
    ]:
        outcome = cli("combine", *words, "out=refused")
        assert outcome.code == code and cause in outcome.err, outcome.err
        assert not (tmp_path / "refused").exists()
