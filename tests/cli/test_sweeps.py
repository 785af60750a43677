"""``-m``: many jobs, each in its own folder; one that fails takes nothing from the others."""

from __future__ import annotations

import json
from pathlib import Path

QUICK = ("recipe=smoke", "trainer.steps=2", "stages=[train]")


def test_every_job_has_a_folder_of_its_own_and_a_failed_one_spares_the_rest(cli):
    words = (*QUICK, "-m", "data.path=builtin:train,nope.jsonl", "adapter=lora,vera")
    code, _, err = cli("train", *words)
    assert code == 3
    lines = err.splitlines()
    assert len(lines) == 2 and all(
        line.startswith("error[3] no file 'nope.jsonl'") for line in lines
    )
    assert "job 2 (" in lines[0] and "adapter=lora" in lines[0]
    assert "job 3 (" in lines[1] and "adapter=vera" in lines[1]
    [sweep] = Path("outputs/sweeps").iterdir()
    adapters = sorted(sweep.glob("*/adapter/adapter_config.json"))
    kinds = [json.loads(path.read_text())["peft_type"] for path in adapters]
    assert kinds == ["LORA", "VERA"]
    assert all((path.parents[1] / "summary.json").is_file() for path in adapters)


def test_the_overrides_of_a_failed_job_keep_their_secrets(cli):
    words = (*QUICK, "-m", "data.path=nope.jsonl,no.jsonl", "name=hf_abcdefghijklmnopqrstuvwx")
    code, _, err = cli("train", *words)
    assert code == 3
    assert "hf_abcdefghijklmnopqrstuvwx" not in err


def test_an_interrupt_ends_the_whole_sweep(cli):
    faults = ["count@loratune.pipeline.run.run", "int@loratune.training.loop.train_step:1"]
    ended = cli("train", *QUICK, "-m", "adapter=lora,vera,lora_fa", faults=faults)
    assert ended.code == 130
    assert len(ended.calls) == 1


def test_several_values_without_m_say_how_to_sweep(cli):
    code, _, err = cli("train", "recipe=smoke", "adapter=lora,vera")
    assert code == 2
    assert "add -m" in err and err.count("\n") == 1
