"""Faulty base models and tokenizers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .world import Tensors, World, refused, unchanged

WEIGHTS = "model.safetensors"


@pytest.mark.parametrize(
    ("words", "code", "named"),
    [
        pytest.param(["targets.modules=[gate_proj]"], 4, ["gate_proj", "q_proj"], id="target"),
        pytest.param(
            ["targets.modules=[q_proj,gate_proj]"], 4, ["gate_proj"], id="one-of-two-targets"
        ),
        pytest.param(["targets.modules='.*no_such.*'"], 4, ["no_such"], id="regex"),
        pytest.param(["targets.modules=[final_layer_norm]"], 4, ["LayerNorm"], id="kind-of-layer"),
        pytest.param(["targets.modules=[embed_positions]"], 4, ["embed_positions"], id="embed"),
        pytest.param(["model.dtype=float12"], 2, ["float12", "bfloat16"], id="unknown"),
        pytest.param(["model.dtype=float16", "trainer.precision=auto"], 2, ["CPU"], id="half"),
        pytest.param(["model.device=warp"], 2, ["warp"], id="device"),
        pytest.param(["model.device=mps"], 2, ["mps"], id="mps"),
        pytest.param(["model.attention=owner/kernel"], 2, ["model.attention"], id="kernel"),
        pytest.param(["adapter.rnak=8"], 2, ["adapter.rnak", "rank"], id="unknown-key"),
        pytest.param(["adapter=adalora"], 2, ["adalora", "lora"], id="unknown-variant"),
        pytest.param(["model.path=nowhere/at/all"], 4, ["nowhere"], id="missing-folder"),
    ],
)
def test_a_recipe_that_does_not_fit_the_model_is_refused(
    world: World, words: list[str], code: int, named: list[str]
) -> None:
    outcome = world.train(*words)
    refused(outcome, code, *named)
    assert world.left() == []


def test_a_model_id_without_a_network_is_one_line(world: World) -> None:
    """The hub switched off."""
    outcome = world.train(base="facebook/not-here", environment={"HF_HUB_OFFLINE": "1"})
    refused(outcome, 4, "facebook/not-here", "model.path")
    assert world.left() == []


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def file(name: str, content: str | bytes | None) -> dict[str, Callable[[Path], object]]:
    """The fault of one file: removed, or with other content."""

    def edit(folder: Path) -> None:
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return {"edit": edit}


NO_QUERY = {"tensors": without("layers.0.self_attn.q_proj.weight")}
CUT = {"edit": lambda folder: os.truncate(folder / WEIGHTS, 10**6)}
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 9\n"
HTML = "<html>404</html>" * 9


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        pytest.param(NO_QUERY, ["q_proj"], id="missing-tensor"),
        pytest.param({"config": {"ffn_dim": 256}}, ["[512, 128]", "[256, 128]"], id="shape"),
        pytest.param({"config": {"num_hidden_layers": 3}}, ["layers.3"], id="unexpected"),
        pytest.param({"config": {"num_hidden_layers": 5}}, ["layers.4"], id="missing"),
        pytest.param({"config": {"num_attention_heads": 3}}, ["num_heads"], id="heads"),
        pytest.param({"config": {"hidden_size": "big"}}, ["hidden_size"], id="type"),
        pytest.param({"config": {"model_type": "nonsense"}}, ["nonsense"], id="architecture"),
        pytest.param({"config": {"vocab_size": 64}}, ["739", "64"], id="vocabulary"),
        pytest.param(file("config.json", "{"), ["config.json"], id="broken"),
        pytest.param(file("config.json", "[]"), ["config.json"], id="list"),
        pytest.param(file("config.json", None), ["config.json"], id="none"),
        pytest.param(file("tokenizer.json", None), ["tokenizer"], id="no-tokenizer"),
        pytest.param(file("tokenizer.json", "{}"), ["tokenizer"], id="bad-tokenizer"),
        pytest.param(CUT, ["truncated", "1,000,000"], id="truncated"),
        pytest.param(file(WEIGHTS, b""), ["truncated"], id="empty"),
        pytest.param(file(WEIGHTS, LFS), ["git lfs pull"], id="lfs"),
        pytest.param(file(WEIGHTS, HTML), ["not a safetensors"], id="html"),
        pytest.param(file(WEIGHTS, None), ["no weights"], id="none"),
    ],
)
def test_a_broken_base_is_refused_before_training(
    world: World, fault: dict[str, object], named: list[str]
) -> None:
    outcome = world.train(base=world.new_base(**fault))  # type: ignore[arg-type]
    refused(outcome, 4, *named)
    assert world.left() == []


def sharded(folder: Path, shards: int = 3) -> dict[str, str]:
    """Spread a base's weights over several files with an index."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    names, weight_map = sorted(tensors), {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        own = {name: tensors[name] for name in names[number::shards]}
        save_file(own, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(own, file))
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_a_sharded_base_trains_like_the_whole_one(world: World) -> None:
    assert world.train(base=world.new_base(edit=sharded)).code == 0


def test_a_missing_shard_is_named_with_what_is_lost(world: World) -> None:
    base = world.new_base(edit=sharded)
    (base / "model-00003-of-00003.safetensors").unlink()
    outcome = world.train(base=base)
    refused(outcome, 4, "model-00003-of-00003", "tensors lost")
    assert world.left() == []


def test_a_truncated_shard_and_a_broken_index_are_named(world: World) -> None:
    base = world.new_base(edit=sharded)
    os.truncate(base / "model-00002-of-00003.safetensors", 5000)
    refused(world.train(base=base), 4, "model-00002-of-00003", "truncated")
    (base / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    refused(world.train(base=base), 4, "index")
    assert world.left() == []


def duplicate_key(path: Path) -> None:
    """Give a safetensors header one key twice, which the library itself accepts."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].decode().rstrip()
    name, entry = next(item for item in json.loads(header).items() if item[0] != "__metadata__")
    text = f"{header[:-1]},{json.dumps({name: entry})[1:-1]}}}"
    text += " " * (-len(text) % 8)
    path.write_bytes(len(text).to_bytes(8, "little") + text.encode() + raw[8 + length :])


@pytest.mark.parametrize("fault", ["duplicate", "trailing", "overlap"])
def test_what_two_readers_could_read_differently_is_refused(world: World, fault: str) -> None:
    """Duplicate keys, bytes after the last tensor, tensors that share bytes."""

    def edit(folder: Path) -> None:
        path = folder / WEIGHTS
        if fault == "duplicate":
            duplicate_key(path)
        elif fault == "trailing":
            path.write_bytes(path.read_bytes() + b"\0" * 8)
        else:
            raw = path.read_bytes()
            length = int.from_bytes(raw[:8], "little")
            header = json.loads(raw[8 : 8 + length])
            same = [k for k, v in header.items() if k != "__metadata__" and v["shape"] == [128]]
            header[same[1]]["data_offsets"] = header[same[0]]["data_offsets"]
            text = json.dumps(header, separators=(",", ":")).ljust(length)
            path.write_bytes(raw[:8] + text.encode()[:length] + raw[8 + length :])

    refused(world.train(base=world.new_base(edit=edit)), 4, WEIGHTS)
    assert world.left() == []


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ["train", "merge", "export"])
def test_a_number_of_the_base_that_is_not_finite_is_named_before_any_work(
    world: World, number: float, act: str
) -> None:
    def poison(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if name.endswith("layers.0.fc1.weight"))
        tensors[name][3, 4:6] = number
        return tensors

    base = world.new_base(tensors=poison)
    if act == "train":
        outcome = world.train(base=base)
    elif act == "merge":
        words = ["merge.verify=weights", "allow_drift=[base]"]
        outcome = world.merge(world.new_adapter(sealed=True), *words, base=base)
    else:
        words = [f"adapter_path={world.new_adapter(sealed=True)}", f"model.path={base}"]
        outcome = world.run_here("export", *words, f"out={world.path / 'export'}")
    refused(outcome, 4, "2 of 65,536 numbers", "layers.0.fc1.weight", "[3, 4]")
    assert world.left() == []


def test_a_base_that_computes_nan_is_blamed_itself(world: World) -> None:
    def poison(tensors: Tensors) -> Tensors:
        name = next(name for name in tensors if name.endswith("layers.0.fc1.weight"))
        tensors[name] = torch.full_like(tensors[name], 3e38)
        return tensors

    outcome = world.train(base=world.new_base(tensors=poison))
    refused(outcome, 5, "step 1", "base model itself")
    assert not (world.path / "out" / "adapter").exists()


def test_a_base_with_an_adapter_beside_it_is_refused(world: World) -> None:
    base = world.new_base()
    (base / "adapter_config.json").write_text("{}")
    refused(world.train(base=base), 4, "a base model and an adapter")
    assert world.left() == []


def test_an_adapter_as_base_is_named_for_what_it_is(world: World) -> None:
    refused(world.train(base=world.run / "adapter"), 4, "this is an adapter", "adapter_path")
    assert world.left() == []


def test_a_merged_base_is_trained_on_and_recorded(world: World) -> None:
    assert world.merge(world.new_adapter(sealed=True)).code == 0
    outcome = world.train(base=world.path / "merged")
    assert outcome.code == 0 and "itself a model that loratune merged" in outcome.text
    record = json.loads((world.path / "out" / "provenance.json").read_text())["merged_base"]
    report = json.loads((world.path / "merged" / "merge_report.json").read_text())
    assert record == {key: report[key] for key in ("base", "adapters")}


@pytest.mark.parametrize("act", ["train", "merge"])
def test_nothing_is_written_among_the_base_files(world: World, act: str) -> None:
    base = world.new_base()
    (world.path / "through").symlink_to(base)
    before = unchanged(base)
    for out in (f"out={base}", f"out={base / 'run'}", f"out={world.path / 'through' / 'run'}"):
        if act == "train":
            outcome = world.train(out, base=base)
        else:
            outcome = world.merge(world.new_adapter(sealed=True), out, base=base)
        refused(outcome, 10, "lies inside")
    assert unchanged(base) == before


def test_everything_wrong_is_told_in_one_go(world: World) -> None:
    outcome = world.train("adapter.rnak=8", "trainer.stepps=3", "model.dtype=float12")
    refused(outcome, 2, "adapter.rnak", "trainer.stepps", "float12")
    assert len(outcome.errors) == 3


def test_bases_in_two_formats_agree_on_the_resolved_dtype(world: World) -> None:
    """What is used is printed; adapters stay fp32 on a bf16 base."""
    outcome = world.train("model.dtype=bfloat16", "trainer.precision=auto")
    assert outcome.code == 0 and "torch.bfloat16" in outcome.out
    saved = load_file(world.path / "out" / "adapter" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    shutil.rmtree(world.path / "out")
