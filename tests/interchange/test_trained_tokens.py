"""Rows of single tokens, new ones too: trained here, read by PEFT, merged; nothing else moves."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.command_line import CommandLine
from support.tiny_models import VOCABULARY, load_plain, save_base, tiny_gpt2, tiny_llama
from support.tolerance import T1, T2
from torch import nn
from transformers import AutoTokenizer

from interchange.adapters import load_here, train_words
from loratune.adapter_files.peft_format import peft_notices
from loratune.adapters.registry import config_class, variant_names
from loratune.adapters.token_rows import TokenRows
from loratune.config.schema import TargetsConfig
from loratune.errors import ModelError
from loratune.surgery import adapter_state, disabled, merge_model, unwrap_model, wrap_model

NEW = ("<deep>", "</deep>")
ROWS = [
    {"prompt": f"Say {word}.", "completion": f" <deep> {word}</deep>"}
    for word in ("red", "blue", "green", "lime")
]
IDS = torch.tensor([[5, 7, 9, 7, 250, 11]])
TOLERANCES = {
    torch.float32: {"atol": 1e-5, "rtol": 1e-5},
    torch.bfloat16: {"atol": 0.2, "rtol": 0.05},
}
tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "two-embeddings"])


def rows_file(folder: Path) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def words_for(base: Path, rows: Path, out: str) -> list[str]:
    added = "model.add_tokens=" + json.dumps(NEW)
    more = (added, 'targets.tokens=["</s>"]', "trainer.steps=4", "trainer.save_every=2")
    return [*train_words(base, rows, out, *more), "stages=[train,evaluate,merge]"]


@tied_or_not
@pytest.mark.parametrize("vocabulary", [259, VOCABULARY], ids=["grows", "has room"])
def test_a_run_s_new_tokens_are_peft_s_and_the_merged_model_s(
    cli: CommandLine, tmp_path: Path, tied: bool, vocabulary: int
) -> None:
    base = save_base(tmp_path / "base", tiny_llama(tied=tied, vocab_size=vocabulary))
    plain = AutoTokenizer.from_pretrained(base)
    rows = max(vocabulary, len(plain) + len(NEW))
    assert (rows > vocabulary) is (vocabulary == len(plain))
    cli.succeeds(*words_for(base, rows_file(tmp_path), "run"))
    adapter, merged = tmp_path / "run/adapter", tmp_path / "run/merged"
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in NEW]
    assert ids == [len(plain), len(plain) + 1]
    assert tokenizer("<deep>x</deep>", add_special_tokens=False).input_ids[::2] == ids
    assert AutoTokenizer.from_pretrained(merged).convert_tokens_to_ids(NEW[0]) == ids[0]

    ours = load_here(base, adapter).model
    probe = torch.tensor([[3, ids[0], 40, ids[1], 7]])
    with torch.no_grad():
        expected = ours(input_ids=probe).logits
        model = load_plain(base)
        if rows > vocabulary:
            model.resize_token_embeddings(rows, mean_resizing=False)
        T1.check(peft_on(model, adapter)(input_ids=probe).logits, expected)
        T2.check(load_plain(merged)(input_ids=probe).logits, expected)
    config = json.loads((merged / "config.json").read_text())
    assert config["tie_word_embeddings"] is tied and config["vocab_size"] == rows
    assert_other_rows_are_the_base_s(base, merged, [*ids, plain.convert_tokens_to_ids("</s>")])


def peft_on(model: Any, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(model, adapter).eval()


def assert_other_rows_are_the_base_s(base: Path, merged: Path, trained: list[int]) -> None:
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    moved = set()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in before:
            old, new = before[name], after[name]
            same = [row for row in range(len(old)) if row not in trained]
            assert torch.equal(old[same], new[same])
            moved |= {row for row in range(len(old)) if not torch.equal(old[row], new[row])}
    # No answer begins with the end token: of two embeddings its input row stays.
    assert moved == {row for row in trained if row < len(before["model.embed_tokens.weight"])}


def test_it_resumes_evaluates_generates_exports_and_verifies(
    cli: CommandLine, tmp_path: Path
) -> None:
    base = save_base(tmp_path / "base", tiny_llama())
    rows = rows_file(tmp_path)
    evaluated = f"data.eval_path={rows}"
    own = "data.test_path=null"
    words = [word for word in words_for(base, rows, "whole") if "eval_path" not in word]
    cli.succeeds(*words, evaluated, own)
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    for name in ("adapter", "merged", "checkpoints/step_000004"):
        shutil.rmtree(tmp_path / "resumed" / name)
    for name in ("summary.json", "evaluation.json"):
        (tmp_path / "resumed" / name).unlink()
    again = [word for word in words if not word.startswith("out=")]
    cli.succeeds(*again, evaluated, own, "out=resumed", "resume=auto")
    for name in ("adapter/adapter_model.safetensors", "merged/model.safetensors", "metrics.jsonl"):
        one, other = (tmp_path / run / name for run in ("whole", "resumed"))
        assert one.read_bytes() == other.read_bytes(), name

    parameters = json.loads((tmp_path / "whole/parameters.json").read_text())
    (lora,) = [row for row in parameters["variants"] if row["variant"] == "lora"]
    tensors = load_file(tmp_path / "whole/adapter/adapter_model.safetensors")
    assert lora["stored"] == sum(tensor.numel() for tensor in tensors.values())
    in_training = json.loads((tmp_path / "whole/evaluation.json").read_text())
    scores = json.loads(cli.succeeds("evaluate", "run=whole", "format=json").out)
    assert scores["adapted"]["loss"] == pytest.approx(in_training["adapted"]["loss"], rel=1e-5)
    assert scores["base"]["loss"] == pytest.approx(in_training["base"]["loss"], rel=1e-5)
    answer = cli.succeeds("generate", "run=whole", "prompt=Say red.", "max_new_tokens=3")
    assert "adapted" in json.loads(answer.out)
    assert "nothing differs" in cli.succeeds("verify", "run=whole", f"model.path={base}").out
    cli.succeeds("export", "run=whole", "format=peft", "out=exported")
    tampered = tmp_path / "whole/adapter/tokenizer.json"
    tampered.write_text(tampered.read_text().replace("<deep>", "<seep>"))
    assert cli("verify", "run=whole").code != 0


@tied_or_not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_rows_compute_and_learn_as_rows_of_the_whole_weight(
    tied: bool, dtype: torch.dtype
) -> None:
    model = tiny_gpt2(tied=tied).to(dtype).eval()
    before = model(IDS).logits
    wrapped = wrap_model(
        model, config_class("lora")(), TargetsConfig(modules=["c_attn"]), tokens=[7, 250]
    )
    start = model(IDS).logits
    torch.testing.assert_close(start, before, **TOLERANCES[dtype])
    with disabled(wrapped):
        assert torch.equal(model(IDS).logits, before)
    embedding, head = wrapped.token_rows.values()
    assert (embedding.rows is head.rows) is tied and embedding.rows.dtype is torch.float32
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in {embedding.rows, head.rows}:
            parameter.add_(torch.randn(parameter.shape, generator=generator))
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    got = [rows.rows.grad for rows in (embedding, head)]
    expected_logits = model(IDS).logits
    state = adapter_state(wrapped)
    assert sum("trainable_tokens_delta" in name for name in state) == (1 if tied else 2)

    plain = merge_model(wrapped)
    ends = plain.get_input_embeddings(), plain.get_output_embeddings()
    assert (ends[0].weight is ends[1].weight) is tied
    plain.requires_grad_(True)
    logits = plain(IDS).logits
    torch.testing.assert_close(logits, expected_logits, **TOLERANCES[dtype])
    if dtype is torch.float32:
        plain(IDS, labels=IDS).loss.backward()
        for end, gradient in zip(ends, got, strict=True):
            torch.testing.assert_close(end.weight.grad[[7, 250]], gradient, atol=1e-6, rtol=1e-4)


def test_taken_out_the_base_is_as_it_was() -> None:
    model = tiny_gpt2()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    logits = model.eval()(IDS).logits
    wrapped = wrap_model(
        model, config_class("lora")(), TargetsConfig(modules=["c_attn"]), tokens=[7]
    )
    with torch.no_grad():
        next(iter(wrapped.token_rows.values())).rows.zero_()
    again = unwrap_model(wrapped)
    assert torch.equal(again(IDS).logits, logits)
    assert all(torch.equal(tensor, before[name]) for name, tensor in again.state_dict().items())


def test_a_head_with_a_bias_keeps_it() -> None:
    torch.manual_seed(0)
    head = nn.Linear(4, 6)
    rows = TokenRows(head, torch.tensor([5, 2]))
    with torch.no_grad():
        rows.rows.mul_(3)
    x = torch.randn(2, 3, 4)
    torch.testing.assert_close(rows(x), F.linear(x, rows.whole_weight(), head.bias))
    assert torch.equal(rows.weight[[5, 2]], rows.rows) and torch.equal(
        rows.weight[3], head.weight[3]
    )


@pytest.mark.parametrize(
    ("words", "code", "cause"),
    [
        (['targets.tokens=["<deep>"]'], 2, "'<deep>' is not a token of the vocabulary"),
        (['model.add_tokens=["</s>"]'], 2, "'</s>' is a token already"),
        (['model.add_tokens=[" "]'], 2, "a token cannot be empty"),
        (['targets.tokens=["</s>"]', "targets.modules=[embed_tokens]"], 4, "trained otherwise"),
        (['targets.tokens=["</s>"]', "targets.modules_to_save=[lm_head]"], 4, "trained otherwise"),
    ],
)
def test_what_cannot_be_trained_is_refused_in_a_line(
    cli: CommandLine, tmp_path: Path, words: list[str], code: int, cause: str
) -> None:
    base = save_base(tmp_path / "base", tiny_llama())
    outcome = cli(*train_words(base, rows_file(tmp_path), "run"), *words)
    assert outcome.code == code and cause in outcome.err and "Traceback" not in outcome.err


def test_a_token_that_no_row_has_is_named(cli: CommandLine, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tiny_llama())
    words = ['model.add_tokens=["<deep>","<never>"]', "trainer.steps=1"]
    outcome = cli(*train_words(base, rows_file(tmp_path), "run"), *words)
    assert outcome.code == 0, outcome.err
    assert "warning: no training row has the token '<never>'" in outcome.out + outcome.err


@pytest.mark.parametrize("variant", variant_names())
def test_where_peft_ignores_them_a_training_says_so(variant: str) -> None:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    config = config_class(variant)()
    wrapped = wrap_model(tiny_llama(), config, TargetsConfig(modules=["q_proj"]), tokens=[7])
    of_peft = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    theirs = of_peft.get(config.peft_type)
    reads = theirs is not None and "trainable_token_indices" in theirs.__dataclass_fields__
    said = peft_notices(wrapped)
    assert bool(said) is not reads
    assert reads or "PEFT cannot use this adapter" in said[0]
    if theirs is not None and not reads:
        assert "single tokens" in said[0]


def test_a_model_without_embeddings_has_no_tokens() -> None:
    with pytest.raises(ModelError, match="input embedding"):
        wrap_model(
            nn.Sequential(nn.Linear(2, 2)), config_class("lora")(), TargetsConfig(modules=["0"]),
            tokens=[1],
        )  # fmt: skip
