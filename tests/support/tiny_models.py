"""Tiny random models, alike whenever they are built with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, POSITIONS = 300, 128


def tiny_opt(*, seed: int = 0, tied: bool = True, dropout: float = 0.0, **changes: Any) -> Any:
    """OPT, with other settings of its configuration where ``changes`` has them."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24,
        num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=POSITIONS,
        dropout=dropout, attention_dropout=0.0, tie_word_embeddings=tied, init_std=0.2,
        bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    return OPTForCausalLM(OPTConfig(**(settings | changes)))


def tiny_gpt2(*, seed: int = 0, tied: bool = True, dropout: float = 0.0, **changes: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY, n_embd=16, n_inner=24, n_layer=2, n_head=2, n_positions=POSITIONS,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=0.0, tie_word_embeddings=tied,
        initializer_range=0.2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(GPT2Config(**(settings | changes)))


def tiny_llama(*, seed: int = 0, tied: bool = False, dropout: float = 0.0, **changes: Any) -> Any:
    """Grouped-query attention: the value projection is narrower than the query's."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = dict(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=POSITIONS,
        attention_dropout=dropout, tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=0,
        eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def tiny_mistral(**changes: Any) -> Any:
    """Its attention looks no further back than ``sliding_window``."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    settings = _DECODER | {"initializer_range": 0.2, "sliding_window": 6} | changes
    return MistralForCausalLM(MistralConfig(**settings))


def tiny_rwkv(**changes: Any) -> Any:
    """Recurrent: a padded prompt leaves another state behind."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    settings = dict(
        vocab_size=740, hidden_size=16, attention_hidden_size=16, intermediate_size=24,
        num_hidden_layers=2, context_length=POSITIONS, initializer_range=0.2,
    )  # fmt: skip
    model = RwkvForCausalLM(RwkvConfig(**(settings | changes)))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def tiny_gemma2(**changes: Any) -> Any:
    """Its logits are soft-capped where ``final_logit_softcapping`` is set."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**(_DECODER | changes)))


def tiny_cohere(**changes: Any) -> Any:
    """Its logits are scaled."""
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "logit_scale": 0.25}
    return CohereForCausalLM(CohereConfig(**(_DECODER | ids | changes)))


def tiny_images_and_text(**changes: Any) -> Any:
    """Qwen3-VL: a language model and a tower that reads images, whole."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    torch.manual_seed(0)
    ids = {"image_token_id": 290, "video_token_id": 291,
           "vision_start_token_id": 292, "vision_end_token_id": 293}  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
    text = _DECODER | {"initializer_range": 0.2, "rope_parameters": rope}
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4,
        "out_hidden_size": 16, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **(ids | changes))
    return Qwen3VLForConditionalGeneration(config)


def small_model(name: str, **settings: Any) -> Any:
    """A causal language model of any type that transformers has, in evaluation mode.

    A setting that is None is left to the type.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    common = dict(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, initializer_range=0.2,
        max_position_embeddings=POSITIONS, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    )  # fmt: skip
    values = {key: value for key, value in (common | settings).items() if value is not None}
    config = AutoConfig.for_model(name, **values)
    return AutoModelForCausalLM.from_config(config).eval()


_DECODER: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "max_position_embeddings": POSITIONS, "pad_token_id": 0,
}  # fmt: skip

FAMILIES: dict[str, Callable[..., Any]] = {
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
    "llama": tiny_llama,
}
"""Family to builder."""

ATTENTION = {
    "opt": ["q_proj", "v_proj"],
    "gpt2": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
}
"""Attention layers to adapt, per family."""

UNEQUAL = {
    "opt": ["q_proj", "fc1", "fc2"],
    "gpt2": ["c_attn", "c_fc"],
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
}
"""Layers of several shapes, per family."""

EMBEDDING = {"opt": "embed_tokens", "gpt2": "wte", "llama": "embed_tokens"}
"""Name of the input embedding, per family."""


def token_ids(step: int = 0, rows: int = 2, length: int = 7) -> Tensor:
    """Token ids that depend on ``step`` alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    return torch.randint(3, VOCABULARY, (rows, length), generator=generator)


@torch.no_grad()
def logits(model: Any, step: int = 0) -> Tensor:
    """Logits on fixed tokens, in eval mode."""
    output: Tensor = model.eval()(input_ids=token_ids(step), use_cache=False).logits
    return output


def tiny_tokenizer() -> Any:
    """A byte-level tokenizer with fewer tokens than the tiny models know."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {word: place for place, word in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def save_base(folder: Path, model: Any, **options: Any) -> Path:
    """A complete model folder, tokenizer and all."""
    model.save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def load_plain(folder: Path) -> Any:
    """The model of a folder as transformers alone loads it, in fp32, nothing missing."""
    import transformers

    [written_as] = transformers.AutoConfig.from_pretrained(folder).architectures
    model, info = getattr(transformers, written_as).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"], info
    return model.eval()
