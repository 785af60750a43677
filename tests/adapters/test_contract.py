"""What every variant promises, whichever it is: found from the registry, none is named here."""

from __future__ import annotations

import copy

import pytest
import torch
from support.tiny_models import tiny_gpt2, tiny_llama
from support.variants import adapts, ranked
from torch import nn

import loratune
from loratune.adapters.base import Adapter
from loratune.adapters.config import Kernel, LayerKind, LayerShape
from loratune.adapters.low_rank import LowRank
from loratune.adapters.registry import adapter_class, config_class, variant_names
from loratune.config.convert import to_plain
from loratune.config.schema import TargetsConfig
from loratune.errors import ConfigError
from loratune.models.measure import layer_shapes
from loratune.stages.rewind import Strength
from loratune.surgery import (
    adapter_state,
    disabled,
    merge_model,
    wrap_model,
)
from loratune.targets.find import rank_for

VARIANTS = variant_names()


def wrapped_with_motion(model: nn.Module, variant: str, **settings: object):
    """A wrapped model whose trainable tensors are all random: nothing is zero any more."""
    config = config_class(variant)(**settings)
    wrapped = wrap_model(model, config, TargetsConfig(modules="all-linear"))
    torch.manual_seed(1)
    for parameter in wrapped.model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return wrapped


IDS = torch.arange(12).reshape(2, 6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("variant", VARIANTS)
class TestEveryVariant:
    @pytest.fixture(autouse=True)
    def _takes_the_layers(self, variant: str, build) -> None:
        family = "gpt2" if build is tiny_gpt2 else "llama"
        if not adapts(variant, family):
            pytest.skip(f"{variant} refuses layers of {family}")

    def test_starts_exactly_as_the_base(self, variant: str, build) -> None:
        model = build()
        before = model(IDS).logits
        wrap_model(
            model,
            config_class(variant)(kernel=Kernel.reference),
            TargetsConfig(modules="all-linear"),
        )
        assert torch.equal(model(IDS).logits, before)

    def test_trains_what_it_counts_and_nothing_of_the_base(self, variant: str, build) -> None:
        model = build()
        config = config_class(variant)()
        base = {id(p) for p in model.parameters()}
        wrapped = wrap_model(model, config, TargetsConfig(modules="all-linear"))
        trained = [p for p in model.parameters() if p.requires_grad]
        assert not base & {id(p) for p in trained}
        planned = [(shape, rank_for(shape.name, config)) for shape in wrapped.match.shapes]
        count = config.count(planned)
        assert sum(p.numel() for p in trained) == count.trainable
        state = adapter_state(wrapped)
        assert sum(t.numel() for t in state.values()) == count.stored

    def test_only_its_own_parameters_move(self, variant: str, build) -> None:
        model = build()
        wrapped = wrap_model(model, config_class(variant)(), TargetsConfig(modules="all-linear"))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        optimizer = loratune.optimizer(wrapped, lr=1e-2)
        for _ in range(3):
            optimizer.zero_grad()
            model(IDS, labels=IDS).loss.backward()
            optimizer.step()
        for name, parameter in model.named_parameters():
            moved = not torch.equal(parameter, before[name])
            assert moved == parameter.requires_grad, name
            if not parameter.requires_grad:
                assert parameter.grad is None

    def test_merging_gives_the_same_outputs_and_a_plain_model(self, variant: str, build) -> None:
        plain_keys = set(build().state_dict())
        wrapped = wrapped_with_motion(build(), variant)
        expected = wrapped.model(IDS).logits
        with disabled(wrapped):
            base = wrapped.model(IDS).logits
        assert not torch.allclose(expected, base, atol=1e-3)
        merged = merge_model(wrapped)
        assert set(merged.state_dict()) == plain_keys
        torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=1e-5)

    def test_merge_and_unmerge_restore_the_base_bit_for_bit(self, variant: str, build) -> None:
        wrapped = wrapped_with_motion(build(), variant)
        for adapter in wrapped.adapters.values():
            before = adapter.weight.clone()
            adapter.merge()
            once = adapter.weight.clone()
            adapter.merge()
            assert torch.equal(adapter.weight, once)
            assert not torch.equal(once, before)
            adapter.unmerge()
            assert torch.equal(adapter.weight, before)

    def test_scale_0_is_the_base_and_scale_1_the_adapter_to_the_bit(
        self, variant: str, build
    ) -> None:
        for kernel in (Kernel.reference, Kernel.auto):
            model = build().eval()
            before = model(IDS).logits
            wrapped = wrapped_with_motion(model, variant, kernel=kernel)
            trained, state = model(IDS).logits, copy.deepcopy(adapter_state(wrapped))
            strength = Strength(wrapped)
            strength.set(0.5)
            assert not torch.equal(model(IDS).logits, trained)
            strength.set(0.0)
            assert torch.equal(model(IDS).logits, before)
            assert not any(bool(one.delta_weight().any()) for one in wrapped.adapters.values())
            strength.set(1.0)
            assert torch.equal(model(IDS).logits, trained)
            now = adapter_state(wrapped)
            assert all(torch.equal(now[key], tensor) for key, tensor in state.items())

    def test_a_low_rank_correction_scales_with_its_strength(self, variant: str, build) -> None:
        wrapped = wrapped_with_motion(build(), variant)
        if not all(isinstance(adapter, LowRank) for adapter in wrapped.adapters.values()):
            pytest.skip("its correction has a path of its own")
        whole = {n: a.delta_weight().clone() for n, a in wrapped.adapters.items()}
        Strength(wrapped).set(0.25)
        for name, adapter in wrapped.adapters.items():
            torch.testing.assert_close(adapter.delta_weight(), 0.25 * whole[name])

    def test_delta_equals_delta_weight(self, variant: str, build) -> None:
        wrapped = wrapped_with_motion(build(), variant)
        for adapter in wrapped.adapters.values():
            x = torch.randn(5, adapter.in_features)
            weight = adapter.delta_weight()
            oriented = weight if adapter.shape.kind is LayerKind.linear else weight.T
            delta = adapter.delta(x, adapter.base_layer(x))
            bias = adapter.delta_bias(adapter.bias) if adapter.corrects_bias else None
            expected = nn.functional.linear(x, oriented, bias)
            torch.testing.assert_close(delta, expected, atol=1e-5, rtol=1e-4)
            if isinstance(adapter, LowRank):
                A, B = adapter.low_rank_factors()
                torch.testing.assert_close(B @ A, oriented, atol=1e-5, rtol=1e-4)

    def test_rows_of_delta_weight_are_those_of_the_whole(self, variant: str, build) -> None:
        wrapped = wrapped_with_motion(build(), variant)
        for adapter in wrapped.adapters.values():
            whole, rows = adapter.delta_weight(), slice(3, 7)
            by_rows = adapter.delta_rows(adapter.weight, rows)
            torch.testing.assert_close(by_rows, whole[rows], atol=1e-6, rtol=1e-5)
            written = torch.empty_like(by_rows)
            with torch.no_grad():
                adapter.row_writer(adapter.weight)(rows, written)
            torch.testing.assert_close(written, whole[rows], atol=1e-6, rtol=1e-5)

    def test_fused_and_reference_kernels_agree(self, variant: str, build) -> None:
        reference = wrapped_with_motion(build(), variant, kernel=Kernel.reference)
        fused = wrapped_with_motion(build(), variant, kernel=Kernel.fused)
        for wrapped in (reference, fused):
            wrapped.model(IDS, labels=IDS).loss.backward()
        for (name, one), (_, other) in zip(
            reference.model.named_parameters(), fused.model.named_parameters(), strict=True
        ):
            if one.requires_grad:
                torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-4, msg=name)

    def test_keeps_the_dtype_of_a_half_precision_base(self, variant: str, build) -> None:
        model = build().to(torch.bfloat16)
        wrapped = wrapped_with_motion(model, variant)
        assert model(IDS).logits.dtype is torch.bfloat16
        assert all(t.dtype is torch.float32 for t in adapter_state(wrapped).values())

    def test_takes_a_batch_without_tokens(self, variant: str, build) -> None:
        """As an expert gets that no token chose: no output, and no gradient that is not zero."""
        both = (Kernel.reference, Kernel.fused)
        models = [wrapped_with_motion(build(), variant, kernel=kernel) for kernel in both]
        for adapter in (one for wrapped in models for one in wrapped.adapters.values()):
            for shape in ((0,), (2, 0)):
                x = torch.empty(*shape, adapter.in_features, requires_grad=True)
                y = adapter(x)
                assert y.shape == (*shape, adapter.out_features)
                y.sum().backward()
            gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
            assert not any(gradient.any() for gradient in gradients)

    def test_says_whether_it_has_a_kernel(self, variant: str, build) -> None:
        has_kernel = adapter_class(variant).fused_forward is not Adapter.fused_forward
        assert has_kernel is ("kernel" not in config_class(variant).without_effect)


OTHER_VALUES = {
    "rank": 3,
    "alpha": 32.0,
    "dropout": 0.5,
    "kernel": Kernel.reference,
    "rank_pattern": {"0": 3},
    "alpha_pattern": {"0": 32.0},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_library_refuses_a_setting_that_has_no_effect(variant: str) -> None:
    for name in config_class(variant).without_effect:
        model = nn.Sequential(nn.Linear(8, 8))
        with pytest.raises(ConfigError, match=f"'adapter.{name}' has no effect with {variant}"):
            loratune.wrap(model, variant, targets=["0"], **{name: OTHER_VALUES[name]})
        assert isinstance(model[0], nn.Linear)


@pytest.mark.parametrize("variant", VARIANTS)
def test_settings_survive_peft_s_configuration_file(variant: str) -> None:
    cls = config_class(variant)
    config = cls(rank=5, dropout=0.1, lr=0.5)

    again = cls.from_peft(config.to_peft(), to_plain(config))
    assert again.to_peft() == config.to_peft()
    assert again.lr == config.lr and again.kernel == config.kernel


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_thousand_by_thousand_layer_at_rank_eight(variant: str) -> None:
    expected = {"lora": 16_000, "lora_fa": 8_000, "lora_plus": 16_000, "vera": 1_008}
    shape = LayerShape("layer", LayerKind.linear, 1000, 1000)
    count = config_class(variant)(rank=8).count([(shape, 8)])
    model = nn.Sequential(nn.Linear(1000, 1000))
    wrapped = loratune.wrap(model, variant, targets=["0"], **ranked(variant, 8))
    trained = sum(p.numel() for p in wrapped.model.parameters() if p.requires_grad)
    assert count.trainable == trained == expected.get(variant, trained)


def test_works_on_any_module_in_three_lines() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    wrapped = loratune.wrap(model, "lora", targets=["0", "2"], rank=2)
    optimizer = loratune.optimizer(wrapped, lr=0.1)
    model(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    assert [shape.name for shape in layer_shapes(nn.Sequential(nn.Linear(1, 1)))] == ["0"]
    assert set(wrapped.adapters) == {"0", "2"}


def test_a_tied_head_and_embedding_part_when_one_is_adapted() -> None:
    model = tiny_gpt2()
    wrapped = loratune.wrap(model, "lora", targets=["wte"], rank=4)
    torch.manual_seed(2)
    nn.init.normal_(wrapped.adapters["transformer.wte"].lora_A)
    expected = model(IDS).logits
    merged = merge_model(wrapped)
    assert merged.config.tie_word_embeddings is False
    assert merged.lm_head.weight.data_ptr() != merged.transformer.wte.weight.data_ptr()
    torch.testing.assert_close(merged(IDS).logits, expected, atol=2e-5, rtol=1e-5)


def test_modules_to_save_train_in_full_and_merge() -> None:
    model = tiny_llama()
    config = config_class("lora")()
    wrapped = wrap_model(
        model, config, TargetsConfig(modules=["q_proj"], modules_to_save=["lm_head"])
    )
    trained = copy.deepcopy(wrapped.saved_modules["lm_head"].trained_module.weight)
    optimizer = loratune.optimizer(wrapped, lr=1e-2)
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert not torch.equal(wrapped.saved_modules["lm_head"].trained_module.weight, trained)
    expected = model(IDS).logits
    torch.testing.assert_close(merge_model(wrapped)(IDS).logits, expected, atol=1e-5, rtol=1e-5)
