"""Planted pickles, links, escapes and sockets."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from .test_models import sharded, write_index
from .world import Tensors, World, refused, unchanged

PICKLES = (
    "pytorch_model.bin", "adapter_model.bin", "optimizer.pt", "rng_state.pth", "training_args.bin",
    "scheduler.pt", "model.ckpt", "state.pkl",
)  # fmt: skip


class _Touch:
    def __reduce__(self) -> tuple[object, ...]:
        return os.system, ("touch CANARY",)


def plant(folder: Path) -> None:
    for name in PICKLES:
        (folder / name).write_bytes(pickle.dumps(_Touch()))


WATCHED: dict[str, Any] = {
    "environment": {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"},
    "faults": [rf"audit@pickle\.find_class|open (.*/)?({'|'.join(map(re.escape, PICKLES))})"],
}
"""Torch told to trust pickles; every unpickling and every opening of a planted file is seen."""


def test_planted_pickles_are_never_opened(world: World) -> None:
    """In the base, the adapter and a checkpoint, with torch told to trust pickles."""
    base, adapter = world.new_base(edit=plant), world.new_adapter(sealed=True, edit=plant)
    trained = world.train("trainer.save_every=1", base=base, **WATCHED)
    out = world.path / "out"
    for checkpoint in (out / "checkpoints").iterdir():
        plant(checkpoint)
    plant(out / "adapter")
    shutil.rmtree(out / "checkpoints" / "step_000002")
    (out / "summary.json").unlink()
    resumed = world.cli("train", f"resume={out}", "trainer.steps=2", **WATCHED)
    merged = world.merge(adapter, base=base, **WATCHED)
    assert [done.code for done in (trained, resumed, merged)] == [0, 0, 0]
    verified = world.cli("verify", str(adapter), **WATCHED)
    refused(verified, 7, "never published", "optimizer.pt")
    assert not trained.calls + resumed.calls + merged.calls + verified.calls
    assert not world.canary.exists()


def test_only_pickled_weights_are_refused_unopened(world: World) -> None:

    def pickled(name: str) -> Callable[[Path], None]:
        def edit(folder: Path) -> None:
            plant(folder)
            (folder / name).unlink()

        return edit

    trained = world.train(base=world.new_base(edit=pickled("model.safetensors")), **WATCHED)
    refused(trained, 9, "pytorch_model.bin", "pickle")
    adapter = world.new_adapter(edit=pickled("adapter_model.safetensors"))
    merged = world.merge(adapter, **WATCHED)
    refused(merged, 9, "adapter_model.bin", "pickle")
    assert not trained.calls + merged.calls and not world.canary.exists()
    assert world.left() == []


def test_nothing_that_is_written_is_a_pickle(world: World) -> None:
    """Safetensors, JSON, YAML, HTML and text; no zip, no pickle opcode at the start."""
    assert world.train("stages=[train,evaluate,merge,export]").code == 0
    files = [path for path in (world.path / "out").rglob("*") if path.is_file()]
    assert len(files) > 15
    for path in files:
        text = (".json", ".jsonl", ".yaml", ".html", ".txt", ".md", "")
        assert path.suffix in (".safetensors", *text)
        assert not path.read_bytes().startswith((b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05"))


@pytest.mark.parametrize("escape", ["../other/model.safetensors", "/etc/passwd", "sub/../../x"])
def test_an_index_cannot_name_a_file_outside(world: World, escape: str) -> None:
    base = world.new_base(edit=sharded)
    other = world.path / "other"
    shutil.copytree(world.base, other)
    index = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    write_index(base, {**index, next(iter(index)): escape})
    refused(world.train(base=base), 9, escape)
    assert world.left() == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_link_cannot_lead_out_of_the_base(world: World, name: str) -> None:
    base, outside = world.new_base(), world.path / "outside"
    (base / name).rename(outside)
    (base / name).symlink_to(outside)
    refused(world.train(base=base), 9, "link", name)
    assert world.left() == []


def test_the_links_of_the_hubs_own_cache_are_followed(world: World) -> None:
    """snapshots/REVISION/FILE leads to blobs/HASH."""
    cache = world.path / "models--owner--name"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(world.base.iterdir())):
        shutil.copyfile(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    assert world.train(base=snapshot).code == 0


@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "adapter_config.json", "loratune.json"]
)
def test_a_link_cannot_lead_out_of_the_adapter(world: World, name: str) -> None:
    adapter, outside = world.new_adapter(sealed=True), world.path / "outside"
    (adapter / name).rename(outside)
    (adapter / name).symlink_to(outside)
    refused(world.merge(adapter), 9, "link", name)
    assert world.left() == []


@pytest.mark.parametrize(
    ("where", "values"),
    [
        ("config", {"auto_map": {"AutoModelForCausalLM": "evil.Model"}}),
        ("config", {"_attn_implementation_internal": "owner/kernel"}),
        ("config", {"_attn_implementation": "owner/kernel"}),
        ("config", {"attn_implementation": {"text": "owner/kernel:evil"}}),
        ("config", {"transformers_weights": "other.safetensors"}),
        ("tokenizer", {"auto_map": {"AutoTokenizer": ["evil.Tok", None]}}),
        ("tokenizer", {"vocab_file": "../../etc/passwd"}),
    ],
    ids=["auto_map", "private", "kernel", "nested", "weights", "tokenizer", "vocab_file"],
)
def test_a_base_cannot_ask_for_code_or_other_files(
    world: World, where: str, values: dict[str, Any]
) -> None:
    base = world.new_base(**{where: values})  # type: ignore[arg-type]
    (base / "evil.py").write_text("import os; os.system('touch CANARY')\n")
    refused(world.train(base=base), 9, next(iter(values)))
    refused(world.merge(world.new_adapter(), base=base), 9, next(iter(values)))
    assert not world.canary.exists() and world.left() == []


@pytest.mark.parametrize("library", ["os", "transformers_evil", "evil.module"])
def test_an_adapter_cannot_name_a_library(world: World, library: str) -> None:
    mapping = {"base_model_class": "Model", "parent_library": library}
    refused(world.merge(world.new_adapter(config={"auto_mapping": mapping})), 9, library)
    assert world.left() == []


@pytest.mark.parametrize("pattern", ["(([a-z0-9_.])+)+!", "(a|a)*b", "(.*)*(.*)*(.*)*!"])
def test_an_exponential_pattern_is_cut_short(world: World, pattern: str) -> None:
    outcome = world.merge(world.new_adapter(config={"target_modules": pattern}))
    assert outcome.code in (7, 9)
    refused(outcome, outcome.code, pattern)
    assert world.left() == []


# -- what is planted where we write --------------------------------------------------------


def test_a_linked_run_folder_is_refused(world: World) -> None:
    victim = world.path / "victim"
    victim.mkdir()
    (world.path / "out").symlink_to(victim)
    refused(world.train(), 9, "symbolic link")
    assert list(victim.iterdir()) == []


def test_rotation_and_publishing_never_follow_a_link(world: World) -> None:
    """A checkpoint, the adapter and the merged model planted as links to somebody's folder."""
    victim = world.path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    out = world.path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "step_000001").symlink_to(victim)
    (out / "adapter").symlink_to(victim)
    outcome = world.train("trainer.save_every=1", "trainer.keep_checkpoints=1")
    assert outcome.code in (6, 8, 9, 10), outcome.err
    refused(outcome, outcome.code)
    assert unchanged(victim) == {"mine": b"mine"}


def test_a_linked_output_of_a_merge_is_refused(world: World) -> None:
    victim = world.path / "victim"
    victim.mkdir()
    (world.path / "merged").symlink_to(victim)
    refused(world.merge(world.new_adapter(sealed=True)), 9, "merged", "symbolic link")
    assert list(victim.iterdir()) == []


# -- the network ---------------------------------------------------------------------------


def test_a_whole_run_opens_no_socket(world: World) -> None:
    sockets = [r"deny@socket\.(connect|getaddrinfo|gethostbyname|sendto)"]
    outcome = world.train("stages=[train,evaluate,merge,export]", faults=sockets)
    assert outcome.code == 0, outcome.err
    assert outcome.calls == []


def _can_unshare() -> bool:
    command = ["unshare", "-rn", "true"]
    return bool(shutil.which("unshare")) and subprocess.run(command, check=False).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_unshare(), reason="no user namespaces here")
def test_a_run_without_any_network_interface_succeeds(tmp_path: Path) -> None:
    command = ["unshare", "-rn", sys.executable, "-m", "loratune", "train", "recipe=smoke"]
    done = subprocess.run([*command, "out=run"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()


def test_the_dependency_floors_are_the_doctors() -> None:
    from packaging.requirements import Requirement

    from loratune.doctor.floors import FLOORS

    project = Path(__file__).parents[2] / "pyproject.toml"
    declared = tomllib.loads(project.read_text())["project"]["dependencies"]
    lowest = {
        (wanted := Requirement(line)).name: {str(part) for part in wanted.specifier}
        for line in declared
    }
    for floor in FLOORS:
        assert f">={floor.lowest}" in lowest[floor.package]


def test_a_saved_tensor_file_reads_back(tmp_path: Path, world: World) -> None:
    """The links of these tests are real: the same bytes inside the folder are accepted."""
    base = world.new_base()
    real = base / "real.safetensors"
    (base / "model.safetensors").rename(real)
    (base / "model.safetensors").symlink_to("real.safetensors")
    assert world.train(base=base).code == 0
    assert save_file is not None and Tensors is not None
