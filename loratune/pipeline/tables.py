"""The tables that a run prints."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from loratune.console import console, printable
from loratune.stages.evaluate import Evaluation, Metrics, Sample
from loratune.stages.merge import MergeReport

SAMPLES_SHOWN = 4
SAMPLE_WIDTH = 200


def evaluation_table(evaluation: Evaluation) -> Table:
    """Base and adapted scores side by side."""
    table = Table(title=f"evaluation on {evaluation.rows:,} rows", title_justify="left")
    table.add_column("")
    sides = [("base", evaluation.base), ("adapted", evaluation.adapted)]
    shown = [(name, metrics) for name, metrics in sides if metrics is not None]
    for name, _ in shown:
        table.add_column(name, justify="right")
    for label, key, form in _SCORES:
        values = [getattr(metrics, key) for _, metrics in shown]
        if any(value is not None for value in values):
            table.add_row(label, *(_formatted(value, form) for value in values))
    return table


_SCORES = (
    ("loss (nats/token)", "loss", "{:.4f}"),
    ("perplexity", "perplexity", "{:.4g}"),
    ("token accuracy", "token_accuracy", "{:.1%}"),
    ("exact match", "exact_match", "{:.1%}"),
)


def _formatted(value: float | None, form: str) -> str:
    return "-" if value is None else form.format(value)


def sample_table(samples: list[Sample]) -> Table:
    """A few prompts with the answers before and after."""
    table = Table(title="answers before and after", title_justify="left", show_lines=True)
    for name in ("prompt", "base", "adapted", "reference"):
        table.add_column(name, overflow="fold")
    # One step more than an even spread: rows often come in groups of a few per subject.
    step = len(samples) // SAMPLES_SHOWN + 1
    for sample in samples[::step][:SAMPLES_SHOWN]:
        row = (sample.prompt, sample.base, sample.adapted, sample.reference)
        table.add_row(*(Text(_shortened(printable(text.strip()))) for text in row))
    return table


def _shortened(text: str) -> str:
    return text if len(text) <= SAMPLE_WIDTH else text[: SAMPLE_WIDTH - 1] + "…"


def merge_lines(report: MergeReport) -> list[str]:
    """What the merge proved, in words."""
    worst = report.worst
    lines = [
        f"merged {len(report.modules)} modules; W' - W = ΔW to {worst.residual:.1e} of ΔW at worst "
        f"({worst.module}); {report.delta_kept:.2%} of the correction survived rounding"
    ]
    if report.logits is not None:
        lines.append(
            f"logits of the merged model against base + adapter: largest difference "
            f"{report.logits.max_difference:.1e} (logits up to {report.logits.max_logit:.3g}), "
            f"same first choice on {report.logits.top1_agreement:.1%} of "
            f"{report.logits.tokens} tokens"
        )
    if report.untied:
        lines.append("input embedding and head were tied; the merged model has one copy each")
    return lines


def show(table: Table) -> None:
    """Print a table."""
    console().print(table)


def metrics_line(name: str, metrics: Metrics) -> str:
    """Scores on one line."""
    pairs = [f"{label} {_formatted(getattr(metrics, key), form)}" for label, key, form in _SCORES]
    return f"{name}: " + ", ".join(pairs)
