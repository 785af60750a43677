"""The curves of one run."""

from __future__ import annotations

from itertools import accumulate

from loratune.report.charts.chart_frame import Chart, drawn
from loratune.report.charts.line import line_chart
from loratune.report.charts.series import Series, condensed
from loratune.report.records import RunRecords

_LOSS = "loss, nats per token"
_MANY = "Line: mean of a stretch of steps; band: lowest to highest in it."


def curve_charts(run: RunRecords) -> tuple[Chart, ...]:
    """Losses against steps, tokens and seconds, then learning rate, gradients and health."""
    steps = {float(row["step"]): float(row["step"]) for row in run.history.metrics}
    return drawn(
        _losses(run, "Loss against steps", "optimizer steps", steps),
        _losses(run, "Loss against tokens", "answer tokens seen", _tokens(run)),
        _losses(run, "Loss against time", "seconds in optimizer steps", _seconds(run)),
        _source_losses(run, "train", "Training loss of each source"),
        _source_losses(run, "eval", "Evaluation loss of each source"),
        _single(run, "Learning rate", "learning rate", "train/lr", log=False),
        _single(run, "Gradient norm before clipping", "gradient norm", "train/grad_norm"),
        _norms(run),
    )


def _losses(run: RunRecords, title: str, across: str, place: dict[float, float]) -> Chart | None:
    train = [(place[step], y) for step, y in run.history.pairs("train/loss") if step in place]
    held_out = [(place[step], y) for step, y in run.history.pairs("eval/loss") if step in place]
    series = [
        Series("training", condensed(train)),
        Series("evaluation", condensed(held_out), 1, markers=True),
    ]
    note = _MANY if any(point.low is not None for point in series[0].points) else ""
    return line_chart(title, across, _LOSS, series, note=note)


def _source_losses(run: RunRecords, side: str, title: str) -> Chart | None:
    """One line for each source of a mixture."""
    prefix = f"{side}/loss/"
    names = [key.removeprefix(prefix) for key in run.history.quantities() if key.startswith(prefix)]
    series = [
        Series(name, condensed(run.history.pairs(prefix + name)), number, markers=side == "eval")
        for number, name in enumerate(names)
    ]
    return line_chart(title, "optimizer steps", _LOSS, series)


def _tokens(run: RunRecords) -> dict[float, float]:
    return {step: tokens for step, tokens in run.history.pairs("train/tokens")}


def _seconds(run: RunRecords) -> dict[float, float]:
    timed = run.history.pairs("train/step_seconds")
    clock = accumulate(seconds for _, seconds in timed)
    return {step: seconds for (step, _), seconds in zip(timed, clock, strict=True)}


def _single(
    run: RunRecords, title: str, up: str, key: str, *, log: bool | None = None
) -> Chart | None:
    series = [Series(title.lower(), condensed(run.history.pairs(key)))]
    return line_chart(title, "optimizer steps", up, series, log_up=log)


def _norms(run: RunRecords) -> Chart | None:
    prefix = "health/norm/"
    keys = sorted(key for key in run.history.quantities() if key.startswith(prefix))
    series = [
        Series(
            f"‖{key.removeprefix(prefix)}‖", condensed(run.history.pairs(key)), number, markers=True
        )
        for number, key in enumerate(keys)
    ]
    note = "Frobenius norm over all adapted layers."
    return line_chart("Size of what is trained", "optimizer steps", "norm", series, note=note)
