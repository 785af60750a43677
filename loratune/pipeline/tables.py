"""What a run prints of its results."""

from __future__ import annotations

from loratune.report.scores import score_table
from loratune.stages.evaluate import Evaluation, Sample
from loratune.stages.merge import MergeReport
from loratune.tables import Table

SAMPLES_SHOWN = 4
SAMPLE_WIDTH = 200


def evaluation_table(evaluation: Evaluation) -> Table:
    """Base and adapted scores side by side."""
    return score_table(evaluation.as_dict())


def sample_table(samples: list[Sample]) -> Table:
    """A few prompts with the answers before and after."""
    # One step more than an even spread: rows often come in groups of a few per subject.
    step = len(samples) // SAMPLES_SHOWN + 1
    rows = tuple(
        tuple(map(_shortened, (sample.prompt, sample.base, sample.adapted, sample.reference)))
        for sample in samples[::step][:SAMPLES_SHOWN]
    )
    columns = ("prompt", "base", "adapted", "reference")
    return Table("answers before and after", columns, rows, numeric=(False,) * 4, ruled=True)


def _shortened(text: str) -> str:
    text = text.strip()
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
