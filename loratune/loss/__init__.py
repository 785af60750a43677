"""The loss over supervised tokens, and how to get it from a causal language model."""

from loratune.loss.causal_model import LanguageModelHead, backbone_and_head
from loratune.loss.supervised import (
    IGNORED,
    Targets,
    TokenLoss,
    causal_targets,
    logits_loss,
    supervised_loss,
)

__all__ = [
    "IGNORED",
    "LanguageModelHead",
    "Targets",
    "TokenLoss",
    "backbone_and_head",
    "causal_targets",
    "logits_loss",
    "supervised_loss",
]
