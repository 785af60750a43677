"""What differs from what was saved stops the resume, or is allowed and really applied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from faults.conftest import Bench, write_rows
from faults.harness import in_parallel, result, tree
from faults.tally import TALLY
from faults.test_resume import cut
from faults.verify import check_told

PROJECTION = "loratune.adapters.vera.module.SharedProjection"

# Every case: words that change one thing, and the key that must be named.
CHANGES: dict[str, tuple[tuple[str, ...], str]] = {
    "learning rate": (("trainer.lr=0.02",), "trainer.lr: 0.01 → 0.02"),
    "steps": (("trainer.steps=24",), "trainer.steps: 12 → 24"),
    "seed": (("trainer.seed=1",), "trainer.seed: 0 → 1"),
    "rank": (("adapter.rank=4",), "adapter.rank: 2 → 4"),
    "alpha": (("adapter.alpha=8",), "adapter.alpha: null → 8"),
    "dropout": (("adapter.dropout=0",), "adapter.dropout: 0.1 → 0"),
    "targets": (("targets=all_linear",), "targets.modules: attention_qv → all_linear"),
    "batch size": (("trainer.batch_size=4",), "trainer.batch_size: 2 → 4"),
    "accumulation": (("trainer.grad_accum_steps=1",), "trainer.grad_accum_steps: 2 → 1"),
    "schedule": (("trainer.schedule=constant",), "trainer.schedule: linear → constant"),
    "weight decay": (("trainer.weight_decay=0.1",), "trainer.weight_decay: 0.0 → 0.1"),
    "clipping": (("trainer.clip_norm=0",), "trainer.clip_norm: 1.0 → 0"),
    "longest row": (("data.max_length=32",), "data.max_length: 64 → 32"),
    "variant": (("adapter=lora_fa",), "adapter.variant: lora → lora_fa"),
}


@pytest.fixture(scope="module")
def halfway(session_bench: Bench) -> Path:
    """A run as a kill after step 6 left it."""
    done = session_bench.train("drift-whole")
    assert done.code == 0, done.err
    return cut(session_bench.folder / "drift-whole", session_bench.folder / "halfway", 6)


def refused(bench: Bench, halfway: Path, name: str, *words: str) -> str:
    """The resume with these words is refused and changes nothing; what was said."""
    run = bench.folder / f"run-{name}"
    shutil.copytree(halfway, run)
    before = tree(run)
    outcome = bench.train(run, *words, "resume=auto")
    TALLY.add("changes between save and resume")
    TALLY.add("changes not noticed", 0 if outcome.code == 6 else 1)
    check_told(outcome, 6, "→")
    after = tree(run)
    assert {**after, ".lock": ""} == {**before, ".lock": ""}
    return outcome.err


def test_every_change_of_the_recipe_stops_the_resume_and_is_named(
    bench: Bench, halfway: Path
) -> None:
    def change(name: str) -> None:
        words, line = CHANGES[name]
        assert line in refused(bench, halfway, name, *words), name

    in_parallel(change, CHANGES)


def test_changed_rows_order_base_and_tokenizer_stop_the_resume(bench: Bench, halfway: Path) -> None:
    rows = bench.copy("train.jsonl")
    lines = rows.read_text().splitlines(keepends=True)
    rows.write_text("".join([lines[0].replace("q0", "Q0"), *lines[1:]]))
    swapped = bench.folder / "swapped.jsonl"
    swapped.write_text("".join([lines[1], lines[0], *lines[2:]]))
    tokenizer = bench.copy("base")
    settings = json.loads((tokenizer / "tokenizer.json").read_text())
    vocabulary = settings["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (tokenizer / "tokenizer.json").write_text(json.dumps(settings))
    cases = {
        "content": (f"data.path={rows}", "data: "),
        "order": (f"data.path={swapped}", "data: "),
        "base": (f"model.path={bench.shared / 'base2'}", "base: "),
        "tokenizer": (f"model.path={tokenizer}", "tokenizer: "),
    }

    def change(name: str) -> None:
        word, key = cases[name]
        assert f"] {key}" in refused(bench, halfway, name, word), name

    in_parallel(change, cases)


def test_a_change_of_one_weight_of_the_base_stops_the_resume(bench: Bench, halfway: Path) -> None:
    base = bench.copy("base")
    weights = base / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    weights.write_bytes(bytes(content))
    assert "] base: " in refused(bench, halfway, "one", f"model.path={base}")


def test_all_changes_are_named_in_one_go(bench: Bench, halfway: Path) -> None:
    said = refused(bench, halfway, "both", "trainer.lr=0.02", "trainer.seed=1")
    assert "trainer.lr: 0.01 → 0.02" in said and "trainer.seed: 0 → 1" in said


def test_an_allowed_change_is_applied_and_recorded(bench: Bench, halfway: Path) -> None:
    run = bench.folder / "run"
    shutil.copytree(halfway, run)
    words = ("trainer.lr=0.02", "resume=auto", "allow_drift=[trainer.lr]")
    outcome = bench.train(run, *words)
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = {record["step"]: record["train/lr"] for record in records}
    assert rates[6] == pytest.approx(0.01 * (1 - 5 / 12))
    assert rates[7] == pytest.approx(0.02 * (1 - 6 / 12))
    line = "trainer.lr: 0.01 → 0.02"
    for place in ("checkpoints/step_000012/manifest.json", "adapter/loratune.json"):
        assert json.loads((run / place).read_text())["drift"] == [line], place
    assert json.loads((run / "checkpoints/step_000006/manifest.json").read_text())["drift"] == []


def test_allowed_rows_are_really_used(bench: Bench, halfway: Path) -> None:
    rows = bench.folder / "other.jsonl"
    write_rows(rows, range(50, 66))
    words = (f"data.path={rows}", "resume=auto", "allow_drift=[data]")
    for name in ("first", "second"):
        run = bench.folder / name
        shutil.copytree(halfway, run)
        outcome = bench.train(run, *words)
        assert outcome.code == 0, outcome.err
    plain = bench.folder / "plain"
    shutil.copytree(halfway, plain)
    assert bench.train(plain, "resume=auto").code == 0
    first, second, without = (result(bench.folder / n) for n in ("first", "second", "plain"))
    assert first == second
    weights = "adapter/adapter_model.safetensors"
    assert first[weights] != without[weights]


def test_allowing_one_change_does_not_allow_another(bench: Bench, halfway: Path) -> None:
    said = refused(
        bench, halfway, "run", "trainer.lr=0.02", "trainer.seed=1", "allow_drift=[trainer.lr]"
    )
    assert "trainer.seed" in said and "trainer.lr" not in said


def test_projections_that_come_out_differently_stop_the_resume(bench: Bench) -> None:
    run = bench.folder / "run"
    words = ("adapter=vera", "adapter.rank=4")
    assert bench.train(run, *words).code == 0
    again = cut(run, bench.folder / "again", 6)
    outcome = bench.train(
        again,
        *words,
        "resume=auto",
        faults=[f"scale@{PROJECTION}.__init__:1"],
    )
    check_told(outcome, 6, "projection: ")
