"""``rewind``: sweep a trained adapter's scale, and write it at the one that was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.peft_format import read_back, write_adapter
from loratune.config.convert import to_plain
from loratune.config.schema import RunConfig
from loratune.console import say
from loratune.data.arrangement import arrange
from loratune.data.prepare import PreparedData
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.fingerprint import tensors_fingerprint
from loratune.pipeline.commands import LoadedAdapter, final_rows_of, load_adapted
from loratune.pipeline.loading import retention_rows
from loratune.report.build import footer
from loratune.report.page import render
from loratune.report.rewind_page import rewind_page, rewind_table
from loratune.stages.evaluate import Metrics, evaluate
from loratune.stages.rewind import Strength, sweep
from loratune.tables import show

RECORD, PAGE = "rewind.json", "rewind.html"


@dataclass(frozen=True)
class Sweep:
    """What to try.

    Attributes:
        scales: 0 is the base and 1 the adapter.
        scale: the one to write; ``None`` chooses.
        keep: see ``choose_scale``.
        answers: whether prompts are answered at every scale.
    """

    scales: Sequence[float]
    scale: float | None
    keep: float
    answers: bool


@dataclass(frozen=True)
class ScalePoint:
    """What the model is worth at one scale of its adapter.

    Attributes:
        scale: 0 is the base and 1 the adapter as it was trained.
        dev: on the rows to choose by.
        retention: name of every file of ``evaluate.retention`` to the same on its rows.
    """

    scale: float
    dev: Metrics
    retention: dict[str, Metrics] = field(default_factory=dict)


def rewind(config: RunConfig, folder: Path, wanted: Sweep, out: Path, *, base_named: bool) -> None:
    """Measure an adapter at several scales, print the curve, and write the adapter at one of them.

    Args:
        config: the recipe; its evaluation rows choose, and never its test rows.
        folder: the adapter's.
        wanted: what to try.
        out: the folder to write: an adapter, with the record and the page beside it.
        base_named: whether ``model`` was chosen, by the user or by a run.

    Raises:
        LoratuneError: unusable rows, base or adapter; or a variant that cannot be scaled.
    """
    config = _choosing(config, answers=wanted.answers)
    loaded = load_adapted(config, folder, base_named)
    files.check_outside(out, loaded.base.folder, loaded.adapter.path)
    rows, kept = final_rows_of(config, loaded), retention_rows(config, loaded.base)
    scales = [*wanted.scales, *([] if wanted.scale is None else [wanted.scale])]
    points = sweep(loaded.wrapped, scales, _measure(config, loaded, rows, kept))
    scale = choose_scale(points, wanted.keep) if wanted.scale is None else wanted.scale
    record: dict[str, Any] = {
        "format": files.FORMAT,
        "adapter": tensors_fingerprint(loaded.adapter.tensors),
        "scale": scale,
        "reason": _reason(wanted, retention=bool(kept)),
        "points": [asdict(point) for point in points],
    }
    show(rewind_table(record["points"], scale))
    _write(loaded, scale, record, out)
    say(f"scale {scale:g}, {record['reason']}: {out}")


def _choosing(config: RunConfig, *, answers: bool) -> RunConfig:
    """The recipe whose final rows are those that may choose.

    Raises:
        ConfigError: if there are none.
    """
    data = config.data
    if data.eval_path is None and not data.eval_fraction:
        fix = "set data.eval_path=FILE; test rows must not choose"
        raise ConfigError("there are no rows to choose by", where="data.eval_path", fix=fix)
    return replace(
        config,
        data=replace(data, test_path=None),
        evaluate=replace(config.evaluate, base=False, generate=answers),
    )


def _measure(
    config: RunConfig,
    loaded: LoadedAdapter,
    rows: PreparedData,
    kept: dict[str, PreparedData],
) -> Callable[[float], ScalePoint]:
    wrapped, tokenizer = loaded.wrapped, loaded.base.tokenizer
    head = LanguageModelHead(wrapped.model)
    parts = {"": rows, **kept}
    arranged = {n: arrange(config, wrapped.model, d.pad_id, d.eval)[0] for n, d in parts.items()}

    def scores(name: str) -> Metrics:
        data, arrangement = parts[name], arranged[name]
        return evaluate(wrapped, head, tokenizer, data, arrangement, config.evaluate).adapted

    def measure(scale: float) -> ScalePoint:
        point = ScalePoint(scale, scores(""), {name: scores(name) for name in kept})
        say(f"scale {scale:g}: dev loss {point.dev.loss:.4f}")
        return point

    return measure


def choose_scale(points: Sequence[ScalePoint], keep: float) -> float:
    """The scale to take, by the rows to choose by and what else the model should still know.

    With retention rows: the smallest that keeps a share ``keep`` of the most that any gained over
    the smallest scale tried; without them the one with the lowest loss.
    """
    start, best = points[0].dev.loss, min(points, key=lambda point: point.dev.loss)
    if not best.retention:
        return best.scale
    enough = (1 - keep) * (start - best.dev.loss) + best.dev.loss
    return next(point.scale for point in points if point.dev.loss <= enough)


def _reason(wanted: Sweep, *, retention: bool) -> str:
    if wanted.scale is not None:
        return "as asked"
    if not retention:
        return "the lowest dev loss (evaluate.retention=[FILE] weighs what is forgotten)"
    return f"the smallest that keeps {wanted.keep:.0%} of what the best one gains"


def _write(loaded: LoadedAdapter, scale: float, record: dict[str, Any], out: Path) -> None:
    """The adapter at ``scale``, read back before it is published, with record and page."""
    adapter, base, wrapped = loaded
    Strength(wrapped).set(scale)
    settings = to_plain(wrapped.config)
    facts = {
        **{key: value for key, value in adapter.facts.items() if key not in ("seal", "files")},
        "variant": settings.pop("variant"),
        "adapter": settings,
        "rewound": {"adapter": record["adapter"], "scale": scale},
    }
    base_name = str(adapter.peft.get("base_model_name_or_path") or "")
    with files.published_folder(out) as target:
        files.write_json(target / RECORD, record)
        page = rewind_page(record, str(adapter.path), footer())
        files.write_text(target / PAGE, render(page))
        if wrapped.token_rows:
            base.tokenizer.save_pretrained(target)
        write_adapter(target, wrapped, facts, base_name)
        read_back(target, wrapped)
