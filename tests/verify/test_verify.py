"""``loratune verify``: one edited byte in any published file is found, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.command_line import CommandLine

from loratune.errors import ConfigError, LoratuneError
from loratune.files import write_sealed_json
from loratune.verify import Verification, kind_of, verify

DEMO = Path(__file__).parents[2] / "loratune" / "assets" / "demo-opt"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "base"
    shutil.copytree(DEMO, folder)
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, base: Path, cli: CommandLine) -> Path:
    """A run with two checkpoints, an adapter, a merged model and an export."""
    here = tmp_path_factory.mktemp("finished")
    cli.succeeds(
        "train", "recipe=smoke", f"model.path={base}", "trainer.steps=4", "trainer.save_every=2",
        "stages=[train,merge,export]", f"out={here / 'run'}", cwd=here,
    )  # fmt: skip
    return here / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


def flip(path: Path, place: int | None = None) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if place is None else place] ^= 1
    path.write_bytes(bytes(content))


def problems(result: Verification) -> list[str]:
    return [check.item for check in result.problems]


def test_an_untouched_run_verifies_alone_and_against_its_base(finished: Path, base: Path) -> None:
    for part in ("", "adapter", "merged", "export", "checkpoints/step_000002"):
        assert problems(verify(finished / part)) == []
        assert problems(verify(finished / part, base)) == []


def test_a_flipped_bit_is_found_in_every_file_of_the_run(finished: Path, tmp_path: Path) -> None:
    files = [p.relative_to(finished) for p in sorted(finished.rglob("*")) if p.is_file()]
    # The lock is no result, the report is drawn from the records again at any time, and a model
    # card is for people to edit.
    unsealed = (".lock", "report.html", "README.md")
    checked = [name for name in files if name.name not in unsealed]
    assert len(checked) >= 20
    for name in checked:
        copy = Path(shutil.copytree(finished, tmp_path / "copy"))
        flip(copy / name)
        assert str(name) in problems(verify(copy)) or any(
            str(name.parent) in item for item in problems(verify(copy))
        ), name
        shutil.rmtree(copy)


def test_every_kind_of_edit_is_named_on_the_command_line(
    cli: CommandLine, finished: Path, tmp_path: Path
) -> None:
    """One digit, one byte more, one less, nothing left, the file gone."""
    edits: dict[str, Callable[[Path], object]] = {
        "digit": digit,
        "longer": lambda path: path.write_bytes(path.read_bytes() + b"\n"),
        "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
        "empty": lambda path: path.write_bytes(b""),
        "gone": Path.unlink,
    }
    for number, name in enumerate(EDITED):
        what, edit = list(edits.items())[number % len(edits)]
        copy = Path(shutil.copytree(finished, tmp_path / what / "run", dirs_exist_ok=True))
        edit(copy / name)
        told = cli.refuses("verify", str(copy))
        assert name in told or f"{Path(name).parent}" in told, (what, name, told)
        shutil.rmtree(copy)


EDITED = [
    "adapter/adapter_config.json", "adapter/adapter_model.safetensors", "adapter/loratune.json",
    "checkpoints/step_000004/manifest.json", "checkpoints/step_000004/state.json",
    "checkpoints/step_000004/optimizer.safetensors", "checkpoints/step_000002/rng.safetensors",
    "merged/config.json", "merged/model.safetensors", "adapter/loratune.json",
    "merged/merge_report.json", "merged/tokenizer.json", "export/certificate.json",
    "data.json", "recipe.yaml", "metrics.jsonl", "provenance.json", "summary.json",
]  # fmt: skip
"""Files of every kind; ``loratune.json`` twice, the second time it is deleted."""


def digit(path: Path) -> None:
    """Change one digit, or one byte where there is none."""
    content = bytearray(path.read_bytes())
    places = [place for place, byte in enumerate(content) if chr(byte).isdecimal()]
    place = places[len(places) // 2] if places else 0
    content[place] = ord("7") if content[place] != ord("7") else ord("3")
    path.write_bytes(bytes(content))


def test_an_adapter_that_is_gone_from_a_finished_run_is_named(run: Path) -> None:
    shutil.rmtree(run / "adapter")
    assert problems(verify(run)) == ["adapter"]


@pytest.mark.parametrize("place", [0, 9, 200, -1])
def test_a_flipped_bit_is_found_wherever_it_lies(run: Path, place: int) -> None:
    flip(run / "merged" / "model.safetensors", place)
    assert problems(verify(run / "merged")) == ["model.safetensors"]


@pytest.mark.parametrize("part", ["adapter", "merged", "export", "checkpoints/step_000004"])
def test_missing_linked_and_planted_files_are_found(run: Path, tmp_path: Path, part: str) -> None:
    folder = run / part
    victim = next(path for path in sorted(folder.iterdir()) if path.suffix == ".safetensors")
    (folder / "planted.bin").write_bytes(b"x")
    assert problems(verify(folder)) == ["planted.bin"]
    (folder / "planted.bin").unlink()
    (folder / "README.md").write_text("A note does no harm.")
    assert problems(verify(folder)) == []
    elsewhere = tmp_path / "elsewhere"
    victim.rename(elsewhere)
    assert problems(verify(folder))
    victim.symlink_to(elsewhere)
    assert problems(verify(folder))


def test_a_certificate_of_other_weights_is_found(run: Path) -> None:
    def of_others(report: dict[str, Any]) -> None:
        report["files"]["model.safetensors"]["sha256"] = "0" * 64

    reseal(run / "merged", "merge_report.json", of_others)
    assert problems(verify(run / "merged")) == ["model.safetensors"]


def test_an_adapter_of_another_tool_that_does_not_fit_the_base_is_found(
    run: Path, base: Path
) -> None:
    adapter = run / "adapter"
    (adapter / "loratune.json").unlink()
    assert problems(verify(adapter, base)) == []
    tensors = load_file(adapter / "adapter_model.safetensors")
    del tensors[min(tensors)]
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert problems(verify(adapter)) == []
    assert problems(verify(adapter, base)) == ["adapter_model.safetensors"]


@pytest.mark.parametrize("name", ["adapter/loratune.json", "merged/merge_report.json"])
def test_a_link_in_place_of_a_sealed_record_is_found(run: Path, tmp_path: Path, name: str) -> None:
    (run / name).rename(tmp_path / "elsewhere")
    (run / name).symlink_to(tmp_path / "elsewhere")
    assert problems(verify(run)) == [name]


def recompute(run: Path, base: Path) -> Verification:
    return verify(run / "merged", base, [run / "adapter"])


def test_the_merge_is_computed_again_from_base_and_adapter(finished: Path, base: Path) -> None:
    result = recompute(finished, base)
    assert problems(result) == []
    assert any("computed again" in check.what for check in result.checks)


def reseal(folder: Path, name: str, edit: Callable[[dict[str, Any]], None]) -> None:
    """Forge a certificate: change it and give it a valid seal."""
    path = folder / name
    value = json.loads(path.read_text())
    value.pop("seal")
    edit(value)
    write_sealed_json(path, value)


def forged_merge(run: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """A merged model whose weights were changed and whose certificate was made to fit."""
    from loratune.files import sha256_file
    from loratune.models.fingerprint import base_fingerprint

    merged = run / "merged"
    tensors = load_file(merged / "model.safetensors")
    change(tensors)
    save_file(tensors, merged / "model.safetensors", metadata={"format": "pt"})

    def fit(value: dict[str, object]) -> None:
        file = merged / "model.safetensors"
        value["merged"] = base_fingerprint(merged)
        assert isinstance(value["files"], dict)
        value["files"][file.name] = {"sha256": sha256_file(file), "bytes": file.stat().st_size}

    reseal(merged, "merge_report.json", fit)


def test_a_forged_certificate_does_not_survive_the_recomputation(run: Path, base: Path) -> None:
    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("layers.1.fc1.weight"))
        tensors[name][3, 3] += 1

    forged_merge(run, nudge)
    assert problems(verify(run / "merged")) == []  # its own files agree with each other
    result = recompute(run, base)
    assert "layers.1.fc1.weight" in result.problems[0].problem


def test_a_module_moved_by_another_amount_is_found_without_the_adapter(
    run: Path, base: Path
) -> None:
    def double(tensors: dict[str, torch.Tensor]) -> None:
        name = next(name for name in tensors if name.endswith("layers.2.self_attn.q_proj.weight"))
        tensors[name] += 0.5

    forged_merge(run, double)
    [problem] = verify(run / "merged", base).problems
    assert "layers.2.self_attn.q_proj" in problem.problem


def test_another_base_is_named_by_both_fingerprints(run: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(DEMO, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    next(iter(tensors.values())).view(-1)[0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    for part in ("adapter", "merged", "export", "checkpoints/step_000002"):
        found = [check for check in verify(run / part, other).problems]
        assert found and found[0].what == "base weights" and "→" in found[0].problem


def test_the_wrong_adapter_is_not_taken_for_the_merged_one(run: Path, base: Path) -> None:
    other = Path(shutil.copytree(run / "adapter", run / "other"))
    tensors = load_file(other / "adapter_model.safetensors")
    save_file(
        {name: value * 2 for name, value in tensors.items()}, other / "adapter_model.safetensors"
    )
    [problem] = verify(run / "merged", base, [other]).problems
    assert problem.what == "adapters"


@pytest.mark.parametrize(
    ("name", "value"), [("files", [1]), ("files", None), ("modules", 3), ("adapters", {"a": 1})]
)
def test_a_forged_seal_over_nonsense_is_an_error_of_its_own(
    run: Path, base: Path, name: str, value: object
) -> None:
    reseal(run / "merged", "merge_report.json", lambda report: report.update({name: value}))
    codes = []
    for adapters in ([], [run / "adapter"]):
        try:
            verify(run / "merged", base, adapters).raise_problems()
        except LoratuneError as error:
            codes.append(error.exit_code)
    assert codes and set(codes) == {7}


def test_an_adapter_of_another_tool_is_checked_as_far_as_it_goes(run: Path, base: Path) -> None:
    (run / "adapter" / "loratune.json").unlink()
    result = verify(run / "adapter", base)
    assert problems(result) == []
    assert {check.status for check in result.checks} == {"ok", "not checked"}
    path = run / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    first = sorted(tensors)[0]
    tensors[first][0, 0] = float("nan")
    save_file(tensors, path)
    [problem] = verify(run / "adapter").problems
    assert first in problem.problem


def test_a_folder_without_anything_published_is_no_success(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing here"):
        kind_of(tmp_path)


def test_the_command_prints_a_table_and_exits_with_7_or_6(
    cli: CommandLine, run: Path, base: Path
) -> None:
    good = cli("verify", str(run), f"model.path={base}")
    assert (good.code, good.err) == (0, "")
    assert "nothing differs" in good.out and "computed again" in good.out
    flip(run / "checkpoints" / "step_000002" / "optimizer.safetensors")
    bad = cli("verify", str(run))
    assert bad.code == 6 and len(bad.errors) == 1
    assert "step_000002" in bad.last and "optimizer.safetensors" in bad.last
    flip(run / "adapter" / "adapter_model.safetensors")
    worse = cli("verify", str(run), "format=json")
    assert worse.code == 7 and len(worse.errors) >= 2
    assert json.loads(worse.out)["ok"] is False


@pytest.mark.parametrize(
    "words",
    [(), ("a", "b"), ("nowhere",), ("run", "modle.path=x"), ("run", "--json"), ("run", "format=x")],
)
def test_wrong_words_are_errors_of_usage(
    cli: CommandLine, run: Path, words: tuple[str, ...]
) -> None:
    outcome = cli("verify", *words, cwd=run.parent)
    assert outcome.code == 2 and outcome.last.startswith("error[2] ")
