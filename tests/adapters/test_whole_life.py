"""A training's whole life by the command line, for variants and starts that are not LoRA's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from interchange.adapters import load_with_peft
from safetensors.torch import load_file
from support.peft_oracle import PEFT_ABOUT_ITSELF
from support.tiny_models import FAMILIES, UNEQUAL, load_plain, logits, save_base
from support.tolerance import T2, largest

from adapters.test_sixth_variant import ROWS, Outcome, cut_after_step_2, run
from loratune.adapters.low_rank import LowRank
from loratune.adapters.registry import adapter_class

pytestmark = PEFT_ABOUT_ITSELF
LIVES = {
    "dora, opt": ("opt", ["adapter=dora", "adapter.alpha=6"]),
    "dora, gpt2, exact gradient, dropout": (
        "gpt2", ["adapter=dora", "adapter.exact_gradient=true", "adapter.dropout=0.1"],
    ),
    "ia3, gpt2": ("gpt2", ["adapter=ia3", "adapter.feedforward_layers=[c_fc]"]),
    "oft, opt": ("opt", ["adapter=oft", "adapter.block_size=8"]),
    "miss, llama": ("llama", ["adapter=miss", "adapter.rank=5"]),
    "pissa, gpt2": ("gpt2", ["adapter=lora", "adapter.init=pissa", "adapter.rank=4"]),
    "olora, llama": ("llama", ["adapter=lora_plus", "adapter.init=olora", "adapter.rank=4"]),
}  # fmt: skip
COUNTED = ("model.", "adapter", "targets.")
LEFT_OUT = ("adapter", "stages")
DOUBLED = ("pissa", "olora")
"""Those whose file holds their start beside what trained."""


@dataclass(frozen=True)
class Life:
    """What the commands left behind, and how they ended."""

    label: str
    family: str
    base: Path
    before: bytes
    folder: Path
    outcomes: dict[str, Outcome]


def is_low_rank(life: Life) -> bool:
    """Whether a plain LoRA file can hold the adapter."""
    return issubclass(adapter_class(variant_of(life)), LowRank)


def variant_of(life: Life) -> str:
    return LIVES[life.label][1][0].removeprefix("adapter=")


@pytest.fixture(scope="module", params=LIVES)
def life(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Life:
    family, chosen = LIVES[request.param]
    folder = tmp_path_factory.mktemp("life")
    base = save_base(folder / "base", FAMILIES[family]())
    before = (base / "model.safetensors").read_bytes()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    words = [
        f"model.path={base}", *chosen, f"targets.modules=[{','.join(UNEQUAL[family])}]",
        f"data.path={rows}", f"data.eval_path={rows}", "trainer.steps=4", "trainer.epochs=null",
        "trainer.batch_size=4", "trainer.precision=fp32", "trainer.lr=0.02",
        "trainer.save_every=2", "evaluate.generate=false", "stages=[train,evaluate,merge]",
    ]  # fmt: skip
    trained = run(folder, {"train": ["train", *words, "out=whole"]})
    assert trained["train"].code == 0, trained["train"].err
    cut_after_step_2(folder / "whole", folder / "resumed")
    outcomes = run(folder, later_commands(words))
    return Life(request.param, family, base, before, folder, trained | outcomes)


def later_commands(train: list[str]) -> dict[str, list[str]]:
    adapter = [train[0], "adapter_path=whole/adapter"]
    return {
        "resume": ["train", *train, "out=resumed", "resume=auto"],
        "continue": ["train", *train, adapter[1], "out=continued", "stages=[train]"],
        "evaluate": ["evaluate", "run=whole"],
        "merge": ["merge", *adapter, "out=merged", "merge.verify=logits"],
        "verify merged": ["verify", "merged", *adapter],
        "verify run": ["verify", "whole"],
        "export": ["export", *adapter, "format=peft", "out=exported"],
        "verify exported": ["verify", "exported", *adapter],
        "plain lora": ["export", *adapter, "format=lora", "out=plain"],
        "compact": ["export", *adapter, "format=compact", "out=compact"],
        "count-params": [
            "count-params", *(word for word in train if word.startswith(COUNTED)), "format=json",
        ],
        "plan": ["plan", *train],
        "compare": [
            "compare", *(word for word in train if not word.startswith(LEFT_OUT)),
            "compare.steps=3", "compare.rungs=1", "lr_grid=[0.02]", "out=compared", "seeds=2",
            "variants=[dora,ia3]",
        ],
    }  # fmt: skip


def test_every_command_succeeds_or_says_why_not(life: Life) -> None:
    refused = {"compact": (4, "nothing to leave out")}
    if not is_low_rank(life):
        refused["plain lora"] = (4, "is not a product of two factors")
    for name, outcome in life.outcomes.items():
        code, cause = refused.get(name, (0, ""))
        assert outcome.code == code, f"{name}: {outcome.err}"
        assert cause in outcome.err and "Traceback" not in outcome.err


def test_the_base_is_left_as_it_was(life: Life) -> None:
    assert (life.base / "model.safetensors").read_bytes() == life.before


def test_a_resumed_run_has_the_same_bytes(life: Life) -> None:
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl"):
        whole, resumed = (life.folder / run / name for run in ("whole", "resumed"))
        assert whole.read_bytes() == resumed.read_bytes(), name


def test_training_lowers_the_loss_and_continuing_moves_what_trains_only(life: Life) -> None:
    scores = json.loads((life.folder / "whole/evaluation.json").read_text())
    assert scores["adapted"]["loss"] < scores["base"]["loss"]
    first, second = (
        load_file(life.folder / run / "adapter/adapter_model.safetensors")
        for run in ("whole", "continued")
    )
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        is_double = life.label.startswith(DOUBLED)
        parts = [tensor, second[name]]
        if is_double:
            dim = 0 if "lora_A" in name else 1
            halves = [part.chunk(2, dim) for part in parts]
            assert halves[0][1].equal(halves[1][1]), f"the start of {name} moved"
            parts = [half[0] for half in halves]
        assert not parts[0].equal(parts[1]), name


def test_peft_and_the_merged_model_give_the_same_logits(life: Life) -> None:
    theirs = logits(load_with_peft(life.base, life.folder / "whole/adapter"))
    merged = logits(load_plain(life.folder / "merged"))
    T2.check(merged, theirs)
    assert largest(merged, logits(load_plain(life.base))) > 1e-3
    if is_low_rank(life):
        T2.check(logits(load_with_peft(life.base, life.folder / "plain")), theirs)


def test_counted_numbers_are_those_in_the_file(life: Life) -> None:
    counted = json.loads(life.outcomes["count-params"].out)["variants"]
    (row,) = [one for one in counted if one["variant"] == variant_of(life)]
    tensors = load_file(life.folder / "whole/adapter/adapter_model.safetensors")
    assert row["stored"] == sum(tensor.numel() for tensor in tensors.values())
