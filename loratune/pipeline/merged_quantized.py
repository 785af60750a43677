"""Merging an adapter that was trained on a quantized base: into which weights, and what that costs.

A quantized base has two sets of plain weights: the quantized numbers, widened, which are what
training saw, and those that were quantized.  Merged into the first the model is what was trained;
merged into the second it is not, better or worse.  So the choice is the user's, and every result
is compared with quantized base + adapter on the run's own rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratune import files
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import MergeBase, RunConfig, Verify
from loratune.console import say
from loratune.data.encoded_rows import EncodedRow
from loratune.errors import ConfigError, MergeError
from loratune.models.fingerprint import base_fingerprint
from loratune.models.load import load_model
from loratune.models.quantized.format import Quantization, identity
from loratune.models.source import model_folder
from loratune.runs.drift import check_binding
from loratune.runs.manifest import CARD, describe_files
from loratune.runs.provenance import package_versions
from loratune.runs.run_dir import MERGE_REPORT
from loratune.stages.merge import Card, MergeReport, merge
from loratune.tables import Table, show

TOLERANCE = 1e-4
"""Of the largest logit: the merged model against quantized base + adapter, both in fp32."""
ROWS = 32
"""Rows that models are compared on."""
POSITIONS = 512
"""Supervised tokens that they are compared on: every logit of each is in memory."""


def quantization_of(adapter: AdapterFolder) -> Quantization | None:
    """How the base was quantized that an adapter was trained on, as it recorded it."""
    recorded = adapter.facts.get("quantization")
    return Quantization.from_dict(recorded) if recorded else None


@dataclass(frozen=True)
class Comparison:
    """A model against quantized base + adapter, on the same supervised tokens.

    Attributes:
        model: which one.
        loss: mean over the tokens, in nats.
        kl: mean divergence of its next-token distribution from what was trained, in nats.
        top1: share of tokens whose most likely one is the same.
        max_difference: largest difference of a logit.
        max_logit: largest logit, for scale.
        tokens: how many were compared.
    """

    model: str
    loss: float
    kl: float
    top1: float
    max_difference: float
    max_logit: float
    tokens: int


def merge_quantized(
    adapters: Sequence[AdapterFolder],
    base_folder: Path,
    tokenizer: str,
    out: Path,
    config: RunConfig,
    rows: Callable[[], Sequence[EncodedRow]],
    card: Card | None = None,
) -> tuple[MergeReport, list[Comparison]]:
    """Merge adapters of a quantized base into the weights that ``merge.base`` chooses.

    Args:
        adapters: all of the same base.
        base_folder: the base that the recipe names.
        tokenizer: fingerprint of its tokenizer.
        out: the folder to write; what lies there at the end is whole.
        config: the recipe.
        rows: gives rows of the run, or none; asked once the choice is made.
        card: writes the folder's README.md from the certificate.

    Raises:
        MergeError: no choice, another base, or a result that is not what was trained.
        LoratuneError: what else stands against it.
    """
    quantization = quantization_of(adapters[0])
    assert quantization is not None
    if any(quantization_of(adapter) != quantization for adapter in adapters):
        raise MergeError("the adapters were trained on bases quantized otherwise", where=str(out))
    choice = _chosen(config, adapters[0], quantization)
    compares = config.merge.verify is not Verify.weights and len(adapters) == 1
    trained = _Trained(adapters[0], base_folder, quantization, rows()) if compares else None
    comparisons = [trained.itself] if trained else []

    def compare(name: str, must_agree: bool, folder: Path) -> dict[str, Any]:
        if trained is not None:
            comparisons.append(trained.compare(name, folder, must_agree=must_agree))
        return {
            "merged_into": str(choice),
            "quantization": quantization.to_dict(),
            "comparisons": [asdict(one) for one in comparisons],
        }

    is_exact = choice is MergeBase.dequantized
    requantize = config.merge.requantize
    with _plain_base(choice, base_folder, quantization, out) as plain, _target(out, config) as into:
        report = merge(
            _bound_to(adapters, choice, plain, base_folder, quantization, tokenizer, config),
            plain,
            into,
            config.merge,
            tokenizer=tokenizer,
            allow_drift=config.allow_drift,
            recorded_as=partial(identity, quantization=quantization)
            if choice is MergeBase.original
            else None,
            compare=partial(compare, f"merged into the {choice} weights", is_exact),
            card=card,
        )
        if requantize is not None:
            again = Quantization(requantize, config.model.quantize_double, quantization.skip)
            same = partial(compare, f"the same in {requantize}", False)
            _write_again(into, again, out, report, same, card)
    return report, comparisons


def _chosen(config: RunConfig, adapter: AdapterFolder, quantization: Quantization) -> MergeBase:
    """What ``merge.base`` says.

    Raises:
        MergeError: if it says nothing, with both commands.
    """
    choice = config.merge.base
    if choice is None:
        command = f"loratune merge adapter_path={adapter.path} base="
        raise MergeError(
            f"the adapter was trained on a base in {quantization.kind}: into which weights?",
            where=str(adapter.path),
            fix=f"`{command}dequantized` keeps what training saw, `{command}original` takes the "
            "weights that were quantized",
        )
    return choice


@contextmanager
def _plain_base(
    choice: MergeBase, base_folder: Path, quantization: Quantization, out: Path
) -> Iterator[Path]:
    """A folder with the plain weights that are merged into."""
    from loratune.merging.quantized_folders import write_dequantized  # needs bitsandbytes
    from loratune.models.quantized.format import stored_quantization

    if choice is MergeBase.original:
        if stored_quantization(base_folder) is not None:
            raise MergeError(
                "the base's own files are quantized: they do not hold the original weights",
                where=str(base_folder),
                fix="set model.path to the original model and allow_drift=[base], or "
                "base=dequantized",
            )
        yield base_folder
        return
    with files.scratch_folder(out) as folder:
        write_dequantized(base_folder, quantization, folder)
        yield folder


@contextmanager
def _target(out: Path, config: RunConfig) -> Iterator[Path]:
    """Where the plain model is written: ``out``, or a folder that is gone when it is quantized."""
    if config.merge.requantize is None:
        yield out
        return
    with files.scratch_folder(out) as folder:
        yield folder / "plain"


def _bound_to(
    adapters: Sequence[AdapterFolder],
    choice: MergeBase,
    plain: Path,
    base_folder: Path,
    quantization: Quantization,
    tokenizer: str,
    config: RunConfig,
) -> list[AdapterFolder]:
    """The adapters, bound to the widened weights once it is sure that they are their base's."""
    if choice is MergeBase.original:
        return list(adapters)
    now = identity(base_fingerprint(base_folder), quantization)
    widened = base_fingerprint(plain)
    for adapter in adapters:
        where, allowed = str(adapter.path), config.allow_drift
        check_binding(adapter.facts, now, tokenizer, allowed, where=where, error=MergeError)
    return [replace(a, facts={**a.facts, "base": widened}) for a in adapters]


class _Trained:
    """What quantized base + adapter says on some rows."""

    def __init__(
        self,
        adapter: AdapterFolder,
        base_folder: Path,
        quantization: Quantization,
        rows: Sequence[EncodedRow],
    ) -> None:
        self._rows = list(rows[:ROWS]) or [_probe_row(base_folder)]
        self._targets = _targets(self._rows)
        folder = base_folder
        if quantization.in_files:  # the base that is named now may be the original
            folder = model_folder(str(adapter.facts.get("base_path") or base_folder))
        asked = None if quantization.in_files else quantization
        model = load_model(folder, torch.float32, quantization=asked)
        self._logits = _logits(wrap_for_loading(model, adapter).model.eval(), self._rows)

    def compare(self, name: str, folder: Path, *, must_agree: bool) -> Comparison:
        """A plain or quantized model folder against what was trained.

        Raises:
            MergeError: if they must agree and do not.
        """
        got = _logits(load_model(folder, torch.float32), self._rows)
        comparison = _comparison(name, self._logits, got, self._targets)
        limit = TOLERANCE * max(1.0, comparison.max_logit)
        if must_agree and not comparison.max_difference <= limit:
            raise MergeError(
                f"the merged model's logits differ from quantized base + adapter by "
                f"{comparison.max_difference:.2g}",
                where=str(folder.name),
                fix="merge.dtype=float32 keeps what half precision rounds away",
            )
        return comparison

    @property
    def itself(self) -> Comparison:
        """Its own loss, in the form of a comparison."""
        name = "quantized base + adapter"
        return _comparison(name, self._logits, self._logits, self._targets)


def _probe_row(base_folder: Path) -> EncodedRow:
    """Random tokens, where there are no rows."""
    from loratune.models.source import read_config

    numbers = read_config(base_folder)
    words = int((numbers.get("text_config") or numbers)["vocab_size"])
    ids = torch.randint(0, words, (48,), generator=torch.Generator().manual_seed(0)).tolist()
    return EncodedRow(ids, ((1, len(ids)),), 1, "random tokens")


@torch.inference_mode()
def _logits(model: Any, rows: Sequence[EncodedRow]) -> Tensor:
    """Logits (tokens, vocabulary) that predict the supervised tokens, row by row."""
    parts, left = [], POSITIONS
    for row in rows:
        places = [place - 1 for start, end in row.spans for place in range(start, end)][:left]
        if places:
            logits = model(input_ids=torch.tensor([row.input_ids]), use_cache=False).logits
            parts.append(logits[0, places].float())
            left -= len(places)
    return torch.cat(parts)


def _targets(rows: Sequence[EncodedRow]) -> Tensor:
    tokens = [
        row.input_ids[p] for row in rows for start, end in row.spans for p in range(start, end)
    ]
    return torch.tensor(tokens[:POSITIONS])


def _comparison(name: str, trained: Tensor, got: Tensor, targets: Tensor) -> Comparison:
    words = min(trained.shape[-1], got.shape[-1])
    before, after = (one[:, :words].log_softmax(-1) for one in (trained, got))
    return Comparison(
        model=name,
        loss=float(-after.gather(1, targets[:, None]).mean()),
        kl=float((before.exp() * (before - after)).sum(-1).mean().clamp(min=0)),
        top1=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
        max_difference=float((trained[:, :words] - got[:, :words]).abs().max()),
        max_logit=float(trained.abs().max()),
        tokens=len(targets),
    )


def _write_again(
    plain: Path,
    quantization: Quantization,
    out: Path,
    report: MergeReport,
    compare: Callable[[Path], dict[str, Any]],
    card: Card | None,
) -> None:
    """Write a merged model in 4 or 8 bits, with the merge's certificate and what it cost."""
    from loratune.merging.quantized_folders import write_quantized  # needs bitsandbytes

    with files.published_folder(out) as target:
        write_quantized(plain, quantization, target)
        (target / MERGE_REPORT).unlink(missing_ok=True)
        report = replace(report, dtype=str(quantization.kind), quantized=compare(target))
        if card is not None:
            files.write_text(target / CARD, card(report))
        facts = {
            **asdict(report),
            "merged": base_fingerprint(target),
            "versions": package_versions(),
            "files": describe_files(target.iterdir()),
        }
        files.write_sealed_json(target / MERGE_REPORT, {"format": 1, **facts})


def show_comparisons(comparisons: Sequence[Comparison]) -> None:
    """Print them."""
    tokens = comparisons[0].tokens
    table = Table(
        f"against quantized base + adapter, on {tokens} supervised tokens",
        ("model", "loss", "KL", "same first choice", "largest difference"),
        tuple(
            (c.model, f"{c.loss:.4f}", f"{c.kl:.2e}", f"{c.top1:.1%}", f"{c.max_difference:.1e}")
            for c in comparisons
        ),
        numeric=(False, True, True, True, True),
    )
    show(table)
    say("loss in nats per token; KL of what was trained from the model, in nats")


def check_choice(config: RunConfig) -> None:
    """Check that ``merge`` settings that need a quantized base have one.

    Raises:
        ConfigError: if they do not.
    """
    for key in ("base", "requantize"):
        value = getattr(config.merge, key)
        if value is not None:
            raise ConfigError(
                "the adapter was not trained on a quantized base",
                where=f"merge.{key}={value}",
                fix="remove it",
            )
