"""Tokenizer, architecture and pretraining of the demo's base model."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import torch
from demo_world import documents
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

PRETRAINING_SEED = 1
VOCABULARY_SIZE = 740
ROW_TOKENS = 96
ROWS_PER_BATCH = 32
PEAK_LEARNING_RATE = 3e-3
WARMUP_SHARE = 0.05
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
PAD_ID = 1
END_ID = 2
_TOKENIZER_DOCUMENTS = 20_000
_IGNORED_LABEL = -100

Documents = Callable[[int], Iterator[str]]
"""Seed to an endless stream of documents."""


def train_tokenizer(texts: Documents = documents) -> PreTrainedTokenizerFast:
    """A byte-level BPE set up as OPT's: the same special ids, ``</s>`` put before every text.

    OPT uses ``</s>`` (id 2) for the start and the end of a text and never ``<s>``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = itertools.islice(texts(PRETRAINING_SEED), _TOKENIZER_DOCUMENTS)
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A",
        pair="</s> $A </s> $B",
        special_tokens=[("</s>", END_ID)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        unk_token="</s>",
        pad_token="<pad>",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )


def build_model(vocabulary_size: int) -> OPTForCausalLM:
    """An untrained OPT of about 0.92 M parameters, input and output embeddings tied."""
    config = OPTConfig(
        vocab_size=vocabulary_size,
        hidden_size=128,
        word_embed_proj_dim=128,
        ffn_dim=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=256,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        layerdrop=0.0,
        tie_word_embeddings=True,
        bos_token_id=END_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    return OPTForCausalLM(config)


def packed_rows(
    tokenizer: PreTrainedTokenizerFast, row_tokens: int, texts: Documents = documents
) -> Iterator[list[int]]:
    """Rows ``</s> document </s> document </s> <pad> ...`` of whole documents only."""
    row = [END_ID]
    for document in texts(PRETRAINING_SEED):
        tokens = [*tokenizer.encode(document, add_special_tokens=False), END_ID]
        if len(row) + len(tokens) > row_tokens:
            yield row + [PAD_ID] * (row_tokens - len(row))
            row = [END_ID]
        if len(tokens) >= row_tokens:
            raise ValueError(f"a document of {len(tokens)} tokens does not fit a row: {document!r}")
        row += tokens


def pretrain(
    model: OPTForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    steps: int,
    texts: Documents = documents,
) -> None:
    """Train ``model`` in place with AdamW, linear warm-up and a cosine to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        PEAK_LEARNING_RATE,
        total_steps=steps,
        pct_start=WARMUP_SHARE,
        cycle_momentum=False,
    )
    rows = packed_rows(tokenizer, ROW_TOKENS, texts)
    started = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        batch = torch.tensor(list(itertools.islice(rows, ROWS_PER_BATCH)))
        labels = batch.masked_fill(batch == PAD_ID, _IGNORED_LABEL)
        loss = model(input_ids=batch, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == 1:
            seconds = time.perf_counter() - started
            print(f"step {step}/{steps}  loss {loss.item():.3f}  {seconds:.0f} s", flush=True)
    model.eval()  # type: ignore[no-untyped-call]
