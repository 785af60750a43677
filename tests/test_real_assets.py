"""What `make real` fetches and writes: the GGUF reader, and the help desk's rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(SCRIPTS), *sys.path])


def test_tensors_are_dequantised_as_ggufs_own_package_does(tmp_path: Path) -> None:
    gguf = pytest.importorskip("gguf", reason="the oracle is the package gguf")
    import numpy as np
    from read_gguf import GGUFFile

    draw = np.random.default_rng(0)
    values = draw.normal(size=(6, 64)).astype(np.float32)
    kinds: list[Any] = [getattr(gguf.GGMLQuantizationType, n) for n in ("F32", "Q4_1", "Q8_0")]
    stored = {kind.name: gguf.quants.quantize(values, kind) for kind in kinds}
    writer = gguf.GGUFWriter(tmp_path / "tiny.gguf", "llama")
    writer.add_block_count(7)
    writer.add_token_list(["a", "Ġb"])
    for kind in kinds:
        writer.add_tensor(kind.name, stored[kind.name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    read = GGUFFile(tmp_path / "tiny.gguf")
    assert read.settings["llama.block_count"] == 7
    assert read.settings["tokenizer.ggml.tokens"] == ["a", "Ġb"]
    for kind in kinds:
        expected = gguf.quants.dequantize(stored[kind.name], kind)
        assert read.shapes[kind.name] == (6, 64)
        assert np.array_equal(read.tensor(kind.name), expected), kind.name


def test_what_is_not_a_gguf_file_is_refused(tmp_path: Path) -> None:
    from read_gguf import GGUFFile

    (tmp_path / "no.gguf").write_bytes(b"PK\3\4" + bytes(40))
    with pytest.raises(ValueError, match="not a GGUF file"):
        GGUFFile(tmp_path / "no.gguf")


def test_rotary_halves_are_put_as_transformers_has_them() -> None:
    """Pair p of a head: rows 2p and 2p + 1 in GGUF, rows p and p + half in transformers."""
    import numpy as np
    from make_real_base import _halves_apart

    rows = np.arange(2 * 6)[:, None]  # two heads of six rows
    expected = [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]
    assert _halves_apart(rows, 2).ravel().tolist() == expected


def test_no_phrasing_of_the_help_desks_test_was_trained_on() -> None:
    from help_desk_rows import CORES, INTENTS, rows

    assert len(INTENTS) == 20 and all(len(set(ways)) == 12 for ways in INTENTS.values())
    every = [core for ways in INTENTS.values() for core in ways]
    assert len(set(every)) == len(every) == 240
    messages = {
        split: [row["messages"][0]["content"].lower() for row in rows(split)] for split in CORES
    }
    assert {split: len(texts) for split, texts in messages.items()} == {
        "train": 720, "dev": 40, "test": 80
    }  # fmt: skip
    held_out = [core.lower() for ways in INTENTS.values() for core in ways[CORES["test"]]]
    assert not [core for core in held_out if any(core in text for text in messages["train"])]
    assert rows("test") == rows("test") and not set(messages["train"]) & set(messages["test"])
