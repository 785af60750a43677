"""Adapters of resized vocabularies and of a few trained tokens, as PEFT stores them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine
from support.peft_oracle import lora_config, peft_model
from support.tiny_models import VOCABULARY, load_plain, logits, save_base, tiny_llama
from support.tolerance import T0, T1, T2, largest
from torch import Tensor
from transformers import AutoTokenizer

from interchange.adapters import load_here, tensors_of, train_words

ADDED = 2
LARGER = VOCABULARY + ADDED
NEW_TOKENS = [VOCABULARY, VOCABULARY + 1]


def base_of(folder: Path, *, tied: bool, rows: int = VOCABULARY) -> Path:
    model = tiny_llama(tied=tied)
    if rows != VOCABULARY:
        torch.manual_seed(7)
        model.resize_token_embeddings(rows, mean_resizing=False)
    return save_base(folder, model)


def written(base: Path, folder: Path, rows: int = VOCABULARY, **settings: Any) -> Tensor:
    """Write PEFT's adapter on the base, resized in memory; return its logits."""
    model = load_plain(base)
    if model.get_input_embeddings().weight.shape[0] != rows:
        torch.manual_seed(3)
        model.resize_token_embeddings(rows, mean_resizing=False)
    config = lora_config(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **settings})
    wrapped = peft_model(model, config, seed=0)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data.add_(torch.randn_like(parameter) * 0.05)
    wrapped.save_pretrained(folder)
    return logits_of(wrapped, rows)


@torch.no_grad()
def logits_of(model: Any, rows: int = LARGER) -> Tensor:
    ids = torch.tensor([[3, 40, 198, rows - 1, 200, 7, rows - 2]])
    result: Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return result


tied_or_not = pytest.mark.parametrize("tied", [True, False], ids=["tied", "two-embeddings"])


@tied_or_not
@pytest.mark.parametrize("rows", [LARGER, VOCABULARY - 5], ids=["larger", "smaller"])
def test_embeddings_that_peft_stored_by_itself_are_loaded_merged_and_exported(
    cli: CommandLine, tmp_path: Path, tied: bool, rows: int
) -> None:
    base = base_of(tmp_path / "base", tied=tied)
    expected = written(base, tmp_path / "adapter", rows)
    assert "base_model.model.model.embed_tokens.weight" in tensors_of(tmp_path / "adapter")
    T0.check(logits_of(load_here(base, tmp_path / "adapter").model, rows), expected)

    words = [f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}"]
    cli.succeeds("merge", *words, "out=merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["vocab_size"] == rows and config["tie_word_embeddings"] is tied
    assert ("lm_head.weight" in stored(tmp_path / "merged")) is not tied
    T2.check(logits_of(load_plain(tmp_path / "merged"), rows), expected)
    cli.succeeds("verify", "merged", f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}")

    cli.succeeds("export", *words, "format=peft", "out=exported")
    T0.check(logits_of(load_here(base, tmp_path / "exported").model, rows), expected)


def stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@tied_or_not
def test_on_the_base_as_it_was_resized_the_copies_add_nothing(
    cli: CommandLine, tmp_path: Path, tied: bool
) -> None:
    small, large = base_of(tmp_path / "small", tied=tied), tmp_path / "large"
    model = load_plain(small)
    torch.manual_seed(3)
    model.resize_token_embeddings(LARGER, mean_resizing=False)
    save_base(large, model)
    expected = written(small, tmp_path / "adapter", LARGER)
    wrapped = load_here(large, tmp_path / "adapter")
    T0.check(logits_of(wrapped.model), expected)
    assert not wrapped.saved_modules
    words = [f"model.path={large}", f"adapter_path={tmp_path / 'adapter'}"]
    cli.succeeds("merge", *words, "out=merged")
    T2.check(logits_of(load_plain(tmp_path / "merged")), expected)


@tied_or_not
@pytest.mark.parametrize(
    "settings",
    [
        {"trainable_token_indices": NEW_TOKENS},
        {"trainable_token_indices": {"embed_tokens": NEW_TOKENS}},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"modules_to_save": ["embed_tokens"]},
    ],
    ids=["tokens", "tokens-by-name", "tied-module", "module"],
)
def test_trained_tokens_and_tied_modules_give_pefts_logits(
    cli: CommandLine, tmp_path: Path, tied: bool, settings: dict[str, Any]
) -> None:
    base = base_of(tmp_path / "base", tied=tied, rows=LARGER)
    expected = written(base, tmp_path / "adapter", LARGER, **settings)
    assert largest(expected, logits_of(load_plain(base))) > 1e-3
    T0.check(logits_of(load_here(base, tmp_path / "adapter").model), expected)
    words = [f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}"]
    cli.succeeds("merge", *words, "out=merged")
    T2.check(logits_of(load_plain(tmp_path / "merged")), expected)
    cli.succeeds("verify", "merged", f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}")


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head", r".*(q_proj|embed_tokens)"])
@pytest.mark.parametrize(
    ("tied", "alpha"),
    [(True, {}), (True, {"alpha_pattern": {"lm_head": 3}}), (False, {})],
    ids=["tied", "two-alphas", "two-embeddings"],
)
def test_an_adapter_that_is_tied_on_both_embeddings_gives_pefts_logits(
    cli: CommandLine, tmp_path: Path, tied: bool, target: str, alpha: dict[str, Any]
) -> None:
    """PEFT's own merge adds the correction twice to a tied weight: its logits are the oracle.

    It multiplies by transposed views of one parameter, which may round otherwise.
    """
    base = base_of(tmp_path / "base", tied=tied, rows=LARGER)
    targets = target if "*" in target else ["q_proj", target]
    settings = {"target_modules": targets, "ensure_weight_tying": True, **alpha}
    expected = written(base, tmp_path / "adapter", LARGER, **settings)
    wrapped = load_here(base, tmp_path / "adapter")
    assert ({"lm_head", "model.embed_tokens"} <= set(wrapped.adapters)) is tied
    T1.check(logits_of(wrapped.model), expected)

    words = [f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}"]
    cli.succeeds("merge", *words, "out=merged")
    T2.check(logits_of(load_plain(tmp_path / "merged")), expected)
    assert ("lm_head.weight" in stored(tmp_path / "merged")) is not (tied and not alpha)
    cli.succeeds("verify", "merged", f"model.path={base}", f"adapter_path={tmp_path / 'adapter'}")

    cli.succeeds("export", *words, "format=peft", "out=exported")
    T1.check(logits_of(peft_from(base, tmp_path / "exported")), expected)


def peft_from(base: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load_plain(base), adapter)


def test_factors_that_are_tied_are_not_trained_further(
    cli: CommandLine, rows: Path, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", tied=True)
    settings = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    written(base, tmp_path / "adapter", **settings)
    said = cli.refuses(
        *train_words(base, rows, "run", f"adapter_path={tmp_path / 'adapter'}", "adapter=lora")
    )
    assert "ties its factors on both embeddings" in said and "merge it" in said


@pytest.mark.parametrize(
    "settings",
    [{"trainable_token_indices": NEW_TOKENS}, {"modules_to_save": ["embed_tokens"]}],
    ids=["tokens", "one-of-two"],
)
def test_what_a_resized_vocabulary_lacks_is_named_with_the_way_out(
    cli: CommandLine, tmp_path: Path, settings: dict[str, Any]
) -> None:
    small = base_of(tmp_path / "small", tied=False)
    large = base_of(tmp_path / "large", tied=False, rows=LARGER)
    written(large, tmp_path / "adapter", LARGER, **settings)
    said = cli.refuses(
        "merge", f"model.path={small}", f"adapter_path={tmp_path / 'adapter'}", "out=merged"
    )
    assert "the vocabulary was resized" in said and "resize_token_embeddings" in said
    assert not (tmp_path / "merged").exists()


def test_an_adapter_with_its_own_embeddings_is_not_trained_further(
    cli: CommandLine, rows: Path, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base", tied=True)
    written(base, tmp_path / "adapter", LARGER)
    said = cli.refuses(
        *train_words(base, rows, "run", f"adapter_path={tmp_path / 'adapter'}", "adapter=lora")
    )
    assert "brings its own" in said and "merge it" in said


def with_token(base: Path, folder: Path, token: int = LARGER - 1) -> None:
    """Put the base's tokenizer with one more token beside an adapter."""
    tokenizer = json.loads((base / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": token, "content": "<|tide|>", "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False},
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def words_of(base: Path, adapter: Path) -> list[str]:
    return [f"model.path={base}", f"adapter_path={adapter}"]


def scores_of(cli: CommandLine, base: Path, adapter: Path, folder: Path) -> Any:
    """The adapted model's scores: standard output is JSON and nothing else."""
    found = cli("evaluate", *words_of(base, adapter), *tide_rows(folder))
    assert found.code == 0, found
    return json.loads(found.out)["adapted"]


def tide_rows(folder: Path) -> list[str]:
    (folder / "tide.jsonl").write_text('{"prompt": "Say", "completion": " <|tide|> blue"}\n')
    settings = ["evaluate.generate=false", "trainer.precision=fp32", "format=json"]
    parsed = "data.special_tokens_in_text=parse"
    return ["data=local", f"data.eval_path={folder / 'tide.jsonl'}", parsed, *settings]


def test_a_tokenizer_beside_a_resized_adapter_goes_with_it(
    cli: CommandLine, tmp_path: Path
) -> None:
    base, adapter = base_of(tmp_path / "base", tied=True), tmp_path / "adapter"
    written(base, adapter, LARGER)
    with_token(base, adapter)
    cli.succeeds("merge", *words_of(base, adapter), "out=merged")
    assert "<|tide|>" in (tmp_path / "merged" / "tokenizer.json").read_text()
    cli.succeeds("export", *words_of(base, adapter), "format=peft", "out=exported")
    assert "<|tide|>" in (tmp_path / "exported" / "tokenizer.json").read_text()

    scores = scores_of(cli, base, adapter, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    answer = [*tokenizer(" <|tide|> blue")["input_ids"], tokenizer.eos_token_id]
    ids = torch.tensor([tokenizer("Say")["input_ids"] + answer])
    supervised = len(answer)
    assert tokenizer.convert_tokens_to_ids("<|tide|>") in ids and scores["tokens"] == supervised
    merged = load_plain(tmp_path / "merged")(input_ids=ids).logits[0, -supervised - 1 : -1]
    loss = torch.nn.functional.cross_entropy(merged, ids[0, -supervised:])
    assert scores["loss"] == pytest.approx(loss.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("token", "said"),
    [(None, "brings no tokenizer.json"), (LARGER, f"ids up to {LARGER}"), ("x", "is unreadable")],
    ids=["none", "beyond", "broken"],
)
def test_a_resized_adapter_without_a_tokenizer_that_fits_says_so(
    cli: CommandLine, tmp_path: Path, token: Any, said: str
) -> None:
    base, adapter = base_of(tmp_path / "base", tied=True), tmp_path / "adapter"
    written(base, adapter, LARGER)
    if token is not None:
        with_token(base, adapter, token)
    outcome = cli("evaluate", *words_of(base, adapter), *tide_rows(tmp_path))
    assert outcome.code == 0 and json.loads(outcome.out) and said in outcome.err
    answered = cli("generate", *words_of(base, adapter), "prompt=Say", "max_new_tokens=2")
    assert answered.code == 0 and said in answered.err
    assert said in cli.succeeds("merge", *words_of(base, adapter), "out=merged").out
    assert "<|tide|>" not in (tmp_path / "merged" / "tokenizer.json").read_text()


def test_the_tokenizer_of_trained_tokens_is_used_without_a_resize(
    cli: CommandLine, tmp_path: Path
) -> None:
    base, adapter = base_of(tmp_path / "base", tied=True, rows=LARGER), tmp_path / "adapter"
    written(base, adapter, LARGER, trainable_token_indices=NEW_TOKENS)
    plain = scores_of(cli, base, adapter, tmp_path)
    with_token(base, adapter)
    own = scores_of(cli, base, adapter, tmp_path)
    assert own["tokens"] < plain["tokens"]
    cli.succeeds("merge", *words_of(base, adapter), "out=merged")
    assert "<|tide|>" in (tmp_path / "merged" / "tokenizer.json").read_text()


def test_plain_adapters_still_give_the_same_logits(tmp_path: Path) -> None:
    base = base_of(tmp_path / "base", tied=True)
    written(base, tmp_path / "adapter")
    assert logits(load_here(base, tmp_path / "adapter").model).shape[-1] == VOCABULARY
