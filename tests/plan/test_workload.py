"""Steps, tokens and batches are those that training lays out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from loratune.config.schema import DataConfig, ModelConfig, RunConfig, TrainerConfig
from loratune.data.batches import BatchPlan
from loratune.plan.workload import divided, read_workload_rows, workload


def config(**trainer: object) -> RunConfig:
    from loratune.adapters.registry import config_class

    return RunConfig(
        model=ModelConfig(path="builtin:demo-opt"),
        data=DataConfig(path="builtin:train", eval_path="builtin:dev", max_length=64),
        trainer=TrainerConfig(**trainer),  # type: ignore[arg-type]
        adapter=config_class("lora")(),
    )


def test_tokens_are_those_of_every_micro_batch_of_every_step():
    recipe = config(steps=20, batch_size=8, grad_accum_steps=2)
    recipe.data.share_prefixes = False
    rows = read_workload_rows(recipe)
    work = workload(recipe, rows)
    lengths = [len(row) for row in rows.data.train]
    plan = BatchPlan.from_config(lengths, recipe.data, recipe.trainer)
    batches = [b for step in range(20) for b in plan.micro_batches(step)]
    shapes = [(len(b), max(lengths[n] for n in b)) for b in batches]
    assert work.tokens == sum(count * length for count, length in shapes)
    assert work.largest.tokens == max(count * length for count, length in shapes)
    assert work.steps == 20 and work.epochs == pytest.approx(20 * 16 / 96)
    supervised = sum(rows.data.train[n].supervised for b in batches for n in b)
    assert work.supervised == supervised


def test_what_rows_share_is_counted_once():
    recipe = config(steps=20, batch_size=8, grad_accum_steps=2)
    rows = read_workload_rows(recipe)
    work = workload(recipe, rows)
    plan = BatchPlan.from_config([len(r) for r in rows.data.train], recipe.data, recipe.trainer)
    batches = [b for step in range(20) for b in plan.micro_batches(step)]
    ids = [row.input_ids for row in rows.data.train]
    beginnings = [
        {tuple(ids[n][:k]) for n in b for k in range(1, len(ids[n]) + 1)} for b in batches
    ]
    assert work.row_tokens == sum(len(ids[n]) for b in batches for n in b)
    once = sum(map(len, beginnings))
    # A batch of two shorter trees, where attention takes less so, computes a beginning twice.
    assert once <= work.tokens <= 1.02 * once < 0.9 * work.row_tokens


def test_a_long_run_is_extrapolated_from_its_beginning():
    recipe = config(epochs=1000, batch_size=1)
    work = workload(recipe, read_workload_rows(recipe))
    exact = 1000 * sum(len(row) for row in read_workload_rows(recipe).data.train)
    assert work.steps == 96_000
    assert work.tokens == pytest.approx(exact, rel=0.02)


def test_packed_rows_share_sequences():
    recipe = config(steps=6, batch_size=16)
    recipe.data.packing = True
    packed = workload(recipe, read_workload_rows(recipe)).largest
    assert packed.sequences < 16
    assert packed.length <= recipe.data.max_length


def test_a_model_that_is_not_here_leaves_rows_assumed(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = config(steps=3, batch_size=4)
    recipe.model.path = "nobody/nothing"
    Path("rows.jsonl").write_text(json.dumps({"text": "a"}) + "\n", encoding="utf-8")
    recipe.data.path = "rows.jsonl"
    work = workload(recipe, read_workload_rows(recipe))
    assert work.tokens == 3 * 4 * 64
    assert "tokenizer is not here" in work.assumed


def test_smaller_micro_batches_keep_the_rows_per_step():
    trainer = TrainerConfig(batch_size=6, grad_accum_steps=2)
    assert divided(trainer) == [(6, 2), (4, 3), (3, 4), (2, 6), (1, 12)]
