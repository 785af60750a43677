"""Hidden states and head of a causal language model, taken apart only where that is exact."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from loratune.errors import ConfigError
from loratune.loss.routers import RouterLoss, router_loss
from loratune.loss.supervised import Targets, TokenLoss, logits_loss, supervised_loss


class LanguageModelHead(nn.Module):
    """A causal language model with its loss: a batch in, the supervised tokens' loss out.

    Where the model's logits are its head applied to its backbone's hidden states, the head runs
    on the supervised rows alone.  Where they are not (soft-capped or scaled logits), the model
    computes its full logits.  A model's loss for its routers is added only where it is asked for.

    Attributes:
        model: the whole model.
        split: backbone and head, or ``None`` where the model cannot be taken apart.
        chunk_size: rows of the head at a time; ``None`` chooses by the vocabulary.
        routers: the loss of the model's routers, where it is trained on as well.
    """

    def __init__(
        self, model: nn.Module, chunk_size: int | None = None, *, router_loss: bool = False
    ) -> None:
        """Take the model apart where that is exact.

        Raises:
            ConfigError: if a loss of its routers is asked for that the model does not have.
        """
        super().__init__()
        self.routers = require_router_loss(model) if router_loss else None
        self.model = model
        self.chunk_size = chunk_size
        # In a tuple, so that the parts are not registered a second time.
        self.split = backbone_and_head(model)

    def compile_backbone(self) -> None:
        """Let torch.compile the part that does the work; the loss stays eager."""
        (self.split[0] if self.split else self.model).compile()

    def forward(
        self,
        input_ids: Tensor,
        targets: Targets,
        *,
        count_correct: bool = False,
        keep_each: bool = False,
        computed: Tensor | None = None,
        **inputs: Any,
    ) -> TokenLoss:
        """Sum of the token losses, and the routers' loss where gradients are wanted of it.

        Args:
            input_ids: (B, T).
            targets: what is predicted where.
            count_correct: also count tokens that the model ranks first.
            keep_each: also keep every target's own loss.
            computed: (B, T) which tokens are not padding, for the routers' loss.
            **inputs: what else the model takes: ``attention_mask``, ``position_ids``.
        """
        rows, tokens = targets
        routers = self.routers if computed is not None and torch.is_grad_enabled() else None
        if routers is not None:
            inputs["output_router_logits"] = True
        run, head = self.split or (self.model, None)
        output = run(input_ids=input_ids, use_cache=False, **inputs)
        if head is None:
            loss = logits_loss(
                _rows(output.logits, rows), tokens, count_correct=count_correct, keep_each=keep_each
            )
        else:
            loss = supervised_loss(
                _rows(hidden_states(output), rows),
                head,
                tokens,
                chunk_size=self.chunk_size,
                count_correct=count_correct,
                keep_each=keep_each,
            )
        if routers is None or computed is None:
            return loss
        return loss._replace(routers=routers(output.router_logits, computed))


def require_router_loss(model: nn.Module) -> RouterLoss:
    """The loss of the model's routers.

    Raises:
        ConfigError: if it has none, or computes it in another way.
    """
    with _evaluating(model):
        loss = router_loss(model)
    if loss is None:
        raise ConfigError(
            "the model has no load-balancing loss for routers, or computes it in another way",
            where="trainer.router_loss=true",
            fix="trainer.router_loss=false",
        )
    return loss


def backbone_and_head(model: nn.Module) -> tuple[nn.Module, nn.Module] | None:
    """The parts whose composition is the model, or ``None``.

    One probe decides, not a list of names: on a few tokens the head must be called once, with
    exactly the backbone's hidden states, and whatever it returns must be the model's logits.
    """
    backbone = getattr(model, "base_model", None)
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    if not isinstance(backbone, nn.Module) or backbone is model or not isinstance(head, nn.Module):
        return None
    return (backbone, head) if _composes(model, backbone, head) else None


@torch.no_grad()
def _composes(model: nn.Module, backbone: nn.Module, head: nn.Module) -> bool:
    device = next(model.parameters()).device
    if device.type == "meta":
        return False
    probe = {"input_ids": torch.arange(1, 4, device=device)[None], "use_cache": False}
    fed: list[Tensor] = []
    returned: list[Tensor] = []

    def replace_output(_: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # A wide ramp: soft-capping hardly changes the small logits of an untrained model.
        ramp = torch.linspace(-100, 100, output.numel(), device=device).view_as(output)
        fed.append(arguments[0])
        returned.append(ramp.to(output.dtype))
        return returned[-1]

    with _evaluating(model):
        handle = head.register_forward_hook(replace_output)
        try:
            logits = model(**probe).logits
        finally:
            handle.remove()
        if len(fed) != 1 or not torch.equal(logits.float(), returned[0].float()):
            return False
        return torch.equal(hidden_states(backbone(**probe)), fed[0])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def hidden_states(output: Any) -> Tensor:
    """What a backbone returns before the head: (B, T, width)."""
    hidden = getattr(output, "last_hidden_state", None)
    return hidden if isinstance(hidden, Tensor) else output[0]


def _rows(states: Tensor, rows: Tensor) -> Tensor:
    """Flat rows of (B, T, width) states, by number."""
    return states.reshape(-1, states.shape[-1]).index_select(0, rows)
