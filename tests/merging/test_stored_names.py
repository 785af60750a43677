"""Merging where files name weights unlike modules: renamed, fused, nested, shared."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.families import BUILDERS
from support.tiny_models import load_plain, logits, save_base, tiny_llama
from support.tolerance import T2, largest
from torch import Tensor, nn

from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter, write_adapter
from loratune.adapter_files.writing_back import parted_names, require_places
from loratune.adapters.registry import config_class
from loratune.config.schema import MergeConfig, TargetsConfig
from loratune.errors import ModelError
from loratune.files import read_sealed_json, write_sealed_json
from loratune.models.stored_names import StoredNames
from loratune.models.weights import tensor_entries
from loratune.runs.manifest import describe_files
from loratune.runs.run_dir import MERGE_REPORT
from loratune.stages.merge import merge
from loratune.surgery import merge_model, trained_values, wrap_model
from loratune.verify.checks import Base
from loratune.verify.merged import check_merged

TEXT = r".*(q_proj|v_proj|o_proj|mlp\.(gate|up|down)_proj)"


@dataclass(frozen=True)
class Kind:
    """One way in which files and modules differ.

    Attributes:
        targets: layers to adapt.
        saved: modules trained in full.
        added: tensors that the merged model has and the base has not.
        same: beginning of the names of tensors that must stay as they are; nothing if empty.
    """

    targets: str | list[str]
    saved: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    same: str = ""


HEAD = "cls.predictions.decoder"
SHARED = "model.layers.3.shared_transf"
KINDS = {
    "bert": Kind([HEAD, "query"], added=(f"{HEAD}.weight", f"{HEAD}.bias")),
    "gemma3": Kind(rf".*language_model.{TEXT}", same="vision_tower."),
    "hrm_text": Kind(TEXT, saved=("H_module.layers.1.self_attn.k_proj",)),
    "zamba": Kind(
        ["feed_forward.up_proj", "q_proj"],
        added=(
            "lm_head.weight",
            *(f"{SHARED}.feed_forward.{name}_proj.weight" for name in ("gate", "up", "down")),
            *(f"{SHARED}.self_attn.{name}_proj.weight" for name in ("q", "k", "v", "o")),
            f"{SHARED}.input_layernorm.weight",
            f"{SHARED}.pre_ff_layernorm.weight",
        ),
    ),
    "laguna": Kind(["shared_experts.gate_proj", "o_proj"], same="model.layers.1.mlp.experts."),
    "qwen3_5": Kind(["q_proj", "in_proj_qkv", "up_proj"], same="model.visual."),
}


@dataclass(frozen=True)
class World:
    """A base, an adapter whose every trained number is random, and the two merged."""

    kind: Kind
    base: Path
    adapter: Path
    merged: Path


@pytest.fixture(scope="module", params=KINDS)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    kind = KINDS[request.param]
    here = tmp_path_factory.mktemp(request.param)
    save_base(here / "base", BUILDERS[request.param]())
    targets = TargetsConfig(modules=kind.targets, modules_to_save=list(kind.saved))
    wrapped = wrap_model(load_plain(here / "base"), config_class("lora")(rank=3), targets)
    torch.manual_seed(1)
    for parameter in wrapped.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    (here / "adapter").mkdir()
    write_adapter(here / "adapter", wrapped, {}, "base")
    merge([read_adapter(here / "adapter")], here / "base", here / "merged", MergeConfig())
    return World(kind, here / "base", here / "adapter", here / "merged")


def stored(folder: Path) -> dict[str, Tensor]:
    return dict(load_file(folder / "model.safetensors"))


def test_the_merged_model_is_base_plus_adapter_in_transformers(world: World) -> None:
    adapted = wrap_for_loading(load_plain(world.base), read_adapter(world.adapter)).model
    merged = logits(load_plain(world.merged))
    T2.check(merged, logits(adapted))
    assert largest(merged, logits(load_plain(world.base))) > 1e-2


def test_it_holds_the_bases_own_names_and_what_had_to_part(world: World) -> None:
    kind = world.kind
    before, after = stored(world.base), stored(world.merged)
    assert after.keys() - before.keys() == set(kind.added)
    assert not before.keys() - after.keys()
    same = [name for name in before if kind.same and name.startswith(kind.same)]
    assert bool(same) == bool(kind.same)
    assert all(torch.equal(before[name], after[name]) for name in same)


def test_every_adapted_module_has_its_proof(world: World) -> None:
    wrapped = wrap_for_loading(load_plain(world.base), read_adapter(world.adapter))
    proofs = read_sealed_json(world.merged / MERGE_REPORT)["modules"]
    trained = {name.removesuffix(".weight") for name in trained_values(wrapped)}
    assert {proof["module"] for proof in proofs} == {*wrapped.adapters, *trained}
    assert all(proof["residual"] < 1e-5 and proof["probe_error"] < 1e-5 for proof in proofs)


@pytest.mark.parametrize("with_adapter", [True, False], ids=["with the adapter", "base alone"])
def test_it_verifies_and_a_changed_tensor_does_not(
    world: World, tmp_path: Path, with_adapter: bool
) -> None:
    base, adapters = Base(world.base), [world.adapter] if with_adapter else []
    checks = check_merged(world.merged, base, adapters)
    assert not [check for check in checks if check.problem]
    before, after = stored(world.base), stored(world.merged)
    name = max(n for n in before if n in after and not torch.equal(before[n], after[n]))
    forged = Path(shutil.copytree(world.merged, tmp_path / "forged"))
    after[name][0] += 0.5
    save_file(after, forged / "model.safetensors", metadata={"format": "pt"})
    reseal(forged)
    assert [check for check in check_merged(forged, base, adapters) if check.problem]


def reseal(folder: Path) -> None:
    """A certificate of whatever the folder holds, as a forger would write it."""
    report = read_sealed_json(folder / MERGE_REPORT)
    files = describe_files(path for path in folder.iterdir() if path.name != MERGE_REPORT)
    report |= {"files": files}
    report.pop("sha256", None)
    write_sealed_json(folder / MERGE_REPORT, report)


# -- the names alone -----------------------------------------------------------------------


@pytest.mark.parametrize("family", BUILDERS)
def test_every_parameter_reads_as_transformers_loads_it(family: str, tmp_path: Path) -> None:
    save_base(tmp_path, BUILDERS[family]())
    model = load_plain(tmp_path)
    names = StoredNames(model, tensor_entries(tmp_path))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert not names.problem_of(name)
        assert torch.equal(names.read(name), parameter), name


@pytest.mark.parametrize("family", ["hrm_text", "deepseek_v3"])
def test_what_is_converted_on_loading_is_restored_to_the_bit(family: str, tmp_path: Path) -> None:
    save_base(tmp_path, BUILDERS[family]())
    model, tensors = load_plain(tmp_path), stored(tmp_path)
    names = StoredNames(model, tensor_entries(tmp_path))
    groups = {id(g): g for g in (names.own(name) for name in model.state_dict()) if g is not None}
    converted = [group for group in groups.values() if group.conversion is not None]
    assert converted
    for group in converted:
        values = {name: tensors[name] for name in group.stored}
        again = group.to_stored(group.to_parameters(values))
        assert again.keys() == values.keys()
        assert all(torch.equal(again[name], values[name]) for name in values)


def test_files_without_the_models_prefix_are_understood(tmp_path: Path) -> None:
    save_base(tmp_path, tiny_llama())
    tensors = {name.removeprefix("model."): value for name, value in stored(tmp_path).items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    group = StoredNames(tiny_llama(), tensor_entries(tmp_path)).own("model.norm.weight")
    assert group is not None and group.stored == ("norm.weight",)


# -- before anything is trained ------------------------------------------------------------


def test_a_layer_without_a_place_is_refused_before_training_with_the_reason(
    cli, tmp_path: Path
) -> None:
    """``Chunk`` is undone by ``Concatenate``; without it, no fused tensor can be written."""
    save_base(tmp_path / "base", BUILDERS["hrm_text"]())
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 4)
    line = cli.refuses(
        "train", f"model.path={tmp_path / 'base'}", f"data.path={tmp_path / 'rows.jsonl'}",
        "targets.modules=[q_proj,o_proj]", "data.eval_path=null", "trainer.precision=fp32",
        "trainer.steps=2", "trainer.epochs=null", "stages=[train]", "out=run",
        faults=["raise@transformers.core_model_loading.Concatenate:1+"],
    )  # fmt: skip
    assert line.startswith("error[4]") and "self_attn.q_proj.weight" in line
    assert "cannot undo its conversion (Chunk)" in line and "o_proj" not in line
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_layer_that_the_files_lack_is_refused(tmp_path: Path) -> None:
    save_base(tmp_path, tiny_llama())
    entries = {n: e for n, e in tensor_entries(tmp_path).items() if n != "lm_head.weight"}
    names = StoredNames(tiny_llama(), entries)
    targets = TargetsConfig(modules=["lm_head"])
    wrapped = wrap_model(tiny_llama(), config_class("lora")(rank=2), targets)
    with pytest.raises(ModelError, match=r"'lm_head\.weight': no tensor of the files becomes it"):
        require_places(tmp_path, names, wrapped)


def test_one_module_in_two_places_is_adapted_once_and_parts_from_nothing(tmp_path: Path) -> None:
    save_base(tmp_path, tiny_llama())
    model = tiny_llama()
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = StoredNames(model, tensor_entries(tmp_path))
    wrapped = wrap_model(model, config_class("lora")(rank=2), TargetsConfig(modules=["up_proj"]))
    require_places(tmp_path, names, wrapped)
    assert list(wrapped.adapters) == ["model.layers.0.mlp.up_proj"]
    assert not parted_names(tmp_path, names, wrapped)


def test_layers_that_no_setting_parts_cannot_be_adapted_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that shares a layer whatever ``tie_word_embeddings`` says."""
    from transformers import LlamaModel

    save_base(tmp_path, tiny_llama())
    plain = LlamaModel.__init__

    def sharing(self: LlamaModel, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs)
        self.layers[1].mlp.up_proj.weight = self.layers[0].mlp.up_proj.weight

    monkeypatch.setattr(LlamaModel, "__init__", sharing)
    names = StoredNames(model := tiny_llama(), tensor_entries(tmp_path))
    wrapped = wrap_model(model, config_class("lora")(rank=2), TargetsConfig(modules=["up_proj"]))
    with pytest.raises(ModelError, match="are one tensor in this model"):
        require_places(tmp_path, names, wrapped)


@pytest.mark.parametrize("family", ["bert", "zamba"])
def test_a_model_merged_in_memory_is_saved_with_what_had_to_part(
    family: str, tmp_path: Path
) -> None:
    save_base(tmp_path / "base", BUILDERS[family]())
    config = config_class("lora")(rank=2, init="random")
    targets = TargetsConfig(modules=KINDS[family].targets)
    wrapped = wrap_model(load_plain(tmp_path / "base"), config, targets)
    expected = logits(wrapped.model)
    merge_model(wrapped).save_pretrained(tmp_path / "merged")
    T2.check(logits(load_plain(tmp_path / "merged")), expected)
