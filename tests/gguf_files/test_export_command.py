"""`loratune export format=gguf` and `format=gguf-lora`, and what they refuse in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from gguf import GGUFReader

from gguf_files.bases import adapted, tiny_base
from loratune.gguf_files.reading import value_of

CHAT = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
FORMAT = {"format": "messages", "template": None, "chat_template": CHAT}
PLAIN = "merge.verify=weights"


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, an adapter on it, another base of the same sizes, and the first one's GGUF file."""
    folder = tmp_path_factory.mktemp("places")
    base = tiny_base(folder / "base", "llama")
    adapted(base, folder / "adapter", facts={"prompt_format": FORMAT, "variant": "lora"})
    tiny_base(folder / "wide", "llama", intermediate_size=128)
    tiny_base(folder / "qwen", "qwen3")
    return folder


def words(places: Path, base: str = "base") -> list[str]:
    return ["export", f"adapter_path={places}/adapter", f"model.path={places}/{base}", PLAIN]


def test_the_folder_holds_model_modelfile_and_certificate(places: Path, cli, tmp_path) -> None:
    outcome = cli.succeeds(*words(places), "format=gguf", "gguf.dtype=q8_0", "out=out")
    assert "not run in llama.cpp" in outcome.out + outcome.err
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {"model.gguf", "Modelfile", "certificate.json"}
    reader = GGUFReader(out / "model.gguf")
    assert value_of(reader, "tokenizer.chat_template") == CHAT
    assert value_of(reader, "tokenizer.ggml.eos_token_id") == 2
    assert value_of(reader, "tokenizer.ggml.add_bos_token") is True
    kinds = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert kinds["blk.0.attn_q.weight"] == kinds["token_embd.weight"] == "Q8_0"
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    certificate = json.loads((out / "certificate.json").read_text())
    assert certificate["types"] == {"Q8_0": 16, "F32": 5}
    assert certificate["modules"] == 8
    assert certificate["worst_module"]["residual"] < 1e-5
    assert 'PARAMETER stop "</s>"' in (out / "Modelfile").read_text().splitlines()
    cli.succeeds("verify", "out", f"adapter_path={places}/adapter", f"model.path={places}/base")
    with (out / "model.gguf").open("r+b") as file:
        file.seek(-5, 2)
        file.write(b"!")
    assert cli("verify", "out").code == 7


def test_an_adapter_is_checked_against_the_file_it_is_to_run_on(
    places: Path, cli, tmp_path
) -> None:
    lora = [*words(places), "format=gguf-lora", "out=alone"]
    cli.succeeds(*words(places), "format=gguf", "out=own")
    cli.succeeds(*lora, "gguf.base=own/model.gguf")
    assert {path.name for path in (tmp_path / "alone").iterdir()} == {
        "adapter.gguf", "Modelfile", "certificate.json",
    }  # fmt: skip
    modelfile = (tmp_path / "alone/Modelfile").read_text()
    assert modelfile.startswith("FROM ./model.gguf\nADAPTER ./adapter.gguf\n")


BROKEN = {
    "missing": "cannot read: No such file",
    "text": "not a GGUF file, or not a whole one",
    "header cut": "not a GGUF file, or not a whole one",
    "tensors cut": "not a whole one",
    "an adapter": "its general.type is 'adapter'",
    "another type": "its general.architecture is 'qwen3', the adapter's base needs 'llama'",
    "other sizes": "'blk.0.ffn_down.weight' is [64, 128], the base's [64, 96]",
    "other weights": "differs by",
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_not_the_base_is_refused_in_one_line(
    case: str, places: Path, cli, tmp_path
) -> None:
    file = tmp_path / "base.gguf"
    write_broken(case, file, places, cli, tmp_path)
    outcome = cli(*words(places), "format=gguf-lora", f"gguf.base={file}", "out=alone")
    errors = [line for line in outcome.err.splitlines() if line.startswith("error")]
    assert outcome.code == 4 and not outcome.has_traceback
    assert len(errors) == 1 and BROKEN[case] in errors[0] and str(file) in errors[0]
    assert not (tmp_path / "alone").exists()


def write_broken(case: str, file: Path, places: Path, cli, tmp_path: Path) -> None:
    if case == "missing":
        return
    if case == "text":
        file.write_text("GGUF is not what this is\n")
        return
    if case == "an adapter":
        cli.succeeds(*words(places), "format=gguf-lora", "out=other")
        shutil.copy(tmp_path / "other/adapter.gguf", file)
        return
    base = {"another type": "qwen", "other sizes": "wide"}.get(case, "base")
    folder = places / base
    if case == "other weights":
        folder = tiny_base(tmp_path / "random", "llama", initializer_range=0.05)
    adapted(folder, tmp_path / "some", targets=("q_proj",))
    export = ["export", f"adapter_path={tmp_path}/some", f"model.path={folder}", PLAIN]
    cli.succeeds(*export, "format=gguf", "out=other")
    content = (tmp_path / "other/model.gguf").read_bytes()
    ends = {"header cut": 3000, "tensors cut": len(content) - 40_000}
    file.write_bytes(content[: ends.get(case)])


REFUSED = {
    "opt": "architecture 'opt' cannot be written as GGUF",
    "window": "llama.cpp cannot compute a model with sliding_window=8",
    "activation": "llama.cpp cannot compute a model with hidden_act=gelu",
    "yarn": "rotary positions of type 'yarn'",
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_llama_cpp_would_compute_otherwise_is_named(
    case: str, places: Path, cli, tmp_path
) -> None:
    base = tmp_path / "base"
    rope = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    settings = {
        "window": ("qwen3", {"use_sliding_window": True, "sliding_window": 8}),
        "activation": ("llama", {"hidden_act": "gelu"}),
        "yarn": ("qwen2", {"rope_parameters": rope}),
    }
    if case == "opt":
        from support.tiny_models import save_base, tiny_opt

        save_base(base, tiny_opt())
    else:
        name, changes = settings[case]
        tiny_base(base, name, **changes)
    adapted(base, tmp_path / "adapter", targets=("q_proj",))
    outcome = cli(
        "export", "adapter_path=adapter", "model.path=base", PLAIN, "format=gguf", "out=out"
    )
    assert outcome.code == 4, outcome.err
    assert REFUSED[case] in outcome.err
    assert not (tmp_path / "out").exists()
