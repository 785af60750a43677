"""What is special about MiSS: a shard repeated along the inputs; equal to PEFT's to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from interchange.adapters import load_here, load_with_peft, tensors_of, write_with_peft
from parity.side_by_side import both_models, train_both
from support.peft_oracle import PEFT_ABOUT_ITSELF, our_model, our_optimizer, peft_parameters
from support.tiny_models import FAMILIES, UNEQUAL, load_plain, logits, save_base, tiny_gpt2
from support.tolerance import T0, T1, T2, largest
from torch import Tensor, nn

from adapters.test_saved_bytes import RANK, TOKENS, frozen_base, saved_bytes, wrapped
from loratune.adapter_files.peft_format import peft_notices, read_adapter, write_adapter
from loratune.adapters.config import LayerKind, LayerShape
from loratune.adapters.miss.config import MiSSConfig
from loratune.adapters.miss.module import MiSS
from loratune.config.schema import RunConfig
from loratune.config.value_checks import check_values
from loratune.errors import LoratuneError, ModelError
from loratune.merging.weight import merged_weight
from loratune.surgery import WrappedModel

pytestmark = PEFT_ABOUT_ITSELF
RANKS = [1, 4, 5, 16]
"""5 divides no layer's inputs: 16 and 24."""


def miss_config(family: str, **settings: Any) -> Any:
    from peft import MissConfig

    return MissConfig(task_type="CAUSAL_LM", target_modules=UNEQUAL[family], **settings)


def moved(family: str, **settings: Any) -> WrappedModel:
    """A model whose every shard is random."""
    model = our_model(FAMILIES[family](), "miss", UNEQUAL[family], **settings)
    torch.manual_seed(1)
    for layer in model.adapters.values():
        nn.init.normal_(layer.get_parameter("miss_block"), std=0.2)
    return model


def repeated(layer: MiSS) -> Tensor:
    """ΔW (out, in) number by number, from the formula."""
    D = layer.miss_block.detach()
    columns = [D[i % layer.rank] for i in range(layer.in_features)]
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rank", RANKS)
@torch.no_grad()
def test_outputs_rows_and_merged_weights_are_those_of_the_formula(family: str, rank: int) -> None:
    for layer in moved(family, rank=rank).adapters.values():
        assert isinstance(layer, MiSS)
        expected = repeated(layer)
        x = torch.randn(3, 7, layer.in_features)
        wide = x.double() @ expected.double().T + layer.base_layer(x).double()
        torch.testing.assert_close(layer(x).double(), wide, atol=1e-5, rtol=1e-5)
        stored = expected if layer.shape.kind is LayerKind.linear else expected.T
        T0.check(layer.delta_weight(), stored.contiguous())
        merged, proof = merged_weight(layer.weight.detach(), [layer], torch.float32)
        assert proof.probe_error < 1e-5
        T0.check(merged, layer.weight + stored)


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("rank", RANKS)
def test_loss_gradients_and_weights_equal_pefts_through_twenty_steps(
    family: str, rank: int, dropout: float
) -> None:
    theirs, ours = both_models(
        FAMILIES[family](), miss_config(family, r=rank, miss_dropout=dropout),
        "miss", UNEQUAL[family], rank=rank, dropout=dropout,
    )  # fmt: skip
    their_optimizer = torch.optim.AdamW(
        peft_parameters(theirs).values(), lr=1e-2, weight_decay=0.01
    )
    train_both(theirs, ours, their_optimizer, our_optimizer(ours, lr=1e-2, weight_decay=0.01))


@pytest.mark.parametrize("family", ["opt", "llama"])
@pytest.mark.parametrize("rank", [4, 5])
def test_what_peft_wrote_is_read_and_written_back_to_equal_logits(
    tmp_path: Path, family: str, rank: int
) -> None:
    base = save_base(tmp_path / "base", FAMILIES[family]())
    theirs = write_with_peft(base, miss_config(family, r=rank, miss_dropout=0.1), tmp_path / "peft")
    expected = logits(load_with_peft(base, theirs))
    assert largest(expected, logits(load_plain(base))) > 1e-2
    ours = load_here(base, theirs)
    assert (ours.config.rank, ours.config.dropout) == (rank, 0.1)
    T0.check(logits(ours.model), expected)
    (tmp_path / "ours").mkdir()
    write_adapter(tmp_path / "ours", ours, {}, str(base))
    T0.check(logits(load_with_peft(base, tmp_path / "ours")), expected)
    before, after = tensors_of(theirs), tensors_of(tmp_path / "ours")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    merged = load_with_peft(base, theirs).merge_and_unload()
    T2.check(logits(merged), expected)


def test_it_is_a_product_of_two_factors() -> None:
    for layer in moved("opt", rank=5).adapters.values():
        assert isinstance(layer, MiSS)
        A, B = layer.low_rank_factors()
        assert A.shape == (5, layer.in_features) and B.shape == (layer.out_features, 5)
        T1.check(B @ A, repeated(layer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_keeps_r_numbers_per_token_and_layer(dtype: torch.dtype) -> None:
    model = wrapped("llama", "miss", dtype)
    extra = saved_bytes(model.model) - saved_bytes(frozen_base("llama", dtype))
    assert extra == len(model.adapters) * TOKENS * RANK * 4


def test_where_peft_has_no_place_for_it_a_training_says_so() -> None:
    assert "no Conv1D" in peft_notices(our_model(tiny_gpt2(), "miss", ["c_attn"]))[0]
    assert peft_notices(moved("llama")) == []


@pytest.mark.parametrize("start", ["bat", "mini"])
def test_pefts_other_formulas_are_refused(tmp_path: Path, start: str) -> None:
    base = save_base(tmp_path / "base", FAMILIES["opt"]())
    config = miss_config("opt", r=4, init_weights=start, mini_r=2)
    folder = write_with_peft(base, config, tmp_path / "peft")
    with pytest.raises(ModelError, match=f"init_weights={start} is not supported"):
        read_adapter(folder)


def test_pefts_random_start_is_the_same_formula() -> None:
    peft = {**MiSSConfig(rank=4).to_peft(), "init_weights": False}
    assert MiSSConfig.from_peft(peft, {}) == MiSSConfig(rank=4)


def test_more_rank_than_inputs_and_embeddings_are_refused() -> None:
    narrow = LayerShape("layer", LayerKind.linear, 8, 100)
    assert MiSSConfig().check_layer(narrow, 8) == ""
    assert "there are 8" in MiSSConfig().check_layer(narrow, 9)
    with pytest.raises(LoratuneError, match="there are 16"):
        our_model(copy.deepcopy(FAMILIES["opt"]()), "miss", ["fc1"], rank=17)
    with pytest.raises(LoratuneError, match="embedding"):
        our_model(FAMILIES["opt"](), "miss", ["embed_tokens"], rank=4)


def test_a_rank_for_some_layers_is_refused() -> None:
    config = MiSSConfig(rank_pattern={"q_proj": 4})
    (error,) = [one for one in check_values(RunConfig(adapter=config)) if "adapter" in one.where]
    assert "'adapter.rank_pattern' has no effect with miss" in str(error)
