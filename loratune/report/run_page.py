"""The report of one run."""

from __future__ import annotations

import shlex
from typing import Any

from loratune.report.page import Folded, Page, Section
from loratune.report.parameter_section import parameter_section
from loratune.report.records import RunRecords
from loratune.report.run_charts import curve_charts
from loratune.report.run_verdict import scored_rows, verdict
from loratune.report.scores import retention_table, score_table
from loratune.report.source_table import source_tables
from loratune.tables import Table, facts
from loratune.training.advice import Setup, advise
from loratune.units import byte_size, duration, significant


def run_page(run: RunRecords, footer: str) -> Page:
    """The page of a run: result first, then what it rests on."""
    advice = advise(run.history, Setup.of(run.recipe))
    warnings = [*run.data.get("warnings", []), *(one.text for one in advice)]
    if run.unreadable:
        warnings.append(f"Damaged, and left out here: {', '.join(run.unreadable)}.")
    return Page(
        kicker=f"loratune run · {run.path.name}",
        title=f"{run.variant} on {run.setting('model.path', 'a base model')}",
        verdict=tuple(verdict(run)),
        warnings=tuple(warnings),
        cards=tuple(_cards(run)),
        sections=(
            Section("curves", "Training", charts=curve_charts(run)),
            _evaluation(run),
            _samples(run),
            parameter_section(run),
            _merge(run),
            _data(run),
            _recipe(run),
            _provenance(run),
        ),
        footer=footer,
    )


def _cards(run: RunRecords) -> list[tuple[str, str]]:
    own, training = run.own_count, run.summary.get("training") or {}
    cards = []
    if own:
        share = significant(own["percent_of_base"], 3)
        cards.append((f"trained, {share} % of base", f"{own['trainable']:,}"))
        cards.append(("adapter file", byte_size(own["stored_bytes"])))
    if training.get("best_loss") is not None:
        name = f"lowest loss while evaluating, step {training['best_step']}"
        cards.append((name, significant(training["best_loss"])))
    elif training.get("loss") is not None:
        cards.append(("last training loss", significant(training["loss"])))
    if run.train_seconds:
        cards.append(("in optimizer steps", duration(run.train_seconds)))
    if run.peak_bytes is not None:
        where = "GPU" if "allocated" in run.memory_key else "process"
        cards.append((f"peak memory ({where})", byte_size(run.peak_bytes)))
    return cards


def _evaluation(run: RunRecords) -> Section:
    if not run.adapted:
        return Section("evaluation", "Evaluation")
    caption = f"{scored_rows(run)}, {run.adapted.get('tokens', 0):,} answer tokens"
    kept = retention_table(run.evaluation)
    tables = (score_table(run.evaluation, caption), *([kept] if kept else []))
    return Section("evaluation", "Evaluation", tables=tables)


def _samples(run: RunRecords) -> Section:
    keys = ("prompt", "base", "adapted", "reference")
    samples = tuple(
        tuple((key, str(sample.get(key, "")).strip()) for key in keys)
        for sample in run.evaluation.get("samples") or []
    )
    return Section("samples", "Before and after", samples=samples)


def _merge(run: RunRecords) -> Section:
    modules: list[dict[str, Any]] = run.merge.get("modules") or []
    if not modules:
        return Section("merge", "Merge certificate")
    pairs = [
        ("base", str(run.merge.get("base", ""))),
        ("adapter", ", ".join(map(str, run.merge.get("adapters", [])))),
        ("number format", str(run.merge.get("dtype", ""))),
        ("correction kept after rounding", f"{run.merge.get('delta_kept', 0):.4%}"),
    ]
    logits = run.merge.get("logits")
    if logits:
        pairs.append(
            (
                "logits against base + adapter",
                f"differ by {logits['max_difference']:.1e} at most (logits up to "
                f"{significant(logits['max_logit'], 3)}); same first choice on "
                f"{logits['top1_agreement']:.1%} of {logits['tokens']:,} probe tokens",
            )
        )
    folded = Folded(f"{len(modules)} modules", (_merged_modules(modules),), long=True)
    return Section("merge", "Merge certificate", tables=(facts(pairs),), folded=(folded,))


def _merged_modules(modules: list[dict[str, Any]]) -> Table:
    columns = (
        ("module", "module", str),
        ("‖ΔW‖", "delta_norm", "{:.4g}".format),
        ("‖(W′ − W) − ΔW‖ / ‖ΔW‖", "residual", "{:.1e}".format),
        ("ΔW kept", "delta_kept", "{:.4%}".format),
        ("error of the forward pass", "probe_error", "{:.1e}".format),
    )
    rows = tuple(tuple(module[key] for _, key, _ in columns) for module in modules)
    formats = {name: form for name, _, form in columns}
    return Table("modules", tuple(formats), rows, formats=formats)


def _data(run: RunRecords) -> Section:
    sides = [(name, side) for name in ("train", "eval") if (side := run.data.get(name))]
    if not sides:
        return Section("data", "Data")
    keys = (
        ("rows read", "rows"),
        ("rows used", "kept"),
        ("rows truncated", "truncated"),
        ("answer tokens cut off", "lost_target_tokens"),
        ("tokens", "tokens"),
        ("supervised tokens", "supervised_tokens"),
        ("longest row, tokens", "longest"),
    )
    rows = [(label, *(significant(side.get(key)) for _, side in sides)) for label, key in keys]
    for reason in dict.fromkeys(key for _, side in sides for key in side.get("dropped") or {}):
        counts = ((side.get("dropped") or {}).get(reason, 0) for _, side in sides)
        rows.append((f"dropped: {reason}", *map(significant, counts)))
    for share in sides[0][1].get("max_length_to_keep") or {}:
        lengths = ((side.get("max_length_to_keep") or {}).get(share) for _, side in sides)
        rows.append((f"max_length that keeps {share}", *map(significant, lengths)))
    overlap = significant(run.data.get("overlap", 0))
    rows.append(("rows in both", "", *([overlap] * (len(sides) - 1))))
    columns = ("", *(name for name, _ in sides))
    caption = "; ".join(map(str, run.data.get("notes") or []))
    tables = (Table("rows", columns, tuple(rows), caption=caption), *source_tables(run))
    return Section("data", "Data", tables=tables)


def _recipe(run: RunRecords) -> Section:
    recipe = Folded("recipe.yaml, as resolved", code=run.recipe_text)
    return Section("recipe", "Recipe", folded=(recipe,) if run.recipe_text else ())


def _provenance(run: RunRecords) -> Section:
    recorded = run.provenance
    if not recorded:
        return Section("provenance", "Provenance")
    git = recorded.get("git") or {}
    commit = f"{git.get('commit')}{' with uncommitted changes' if git.get('dirty') else ''}"
    pairs = [
        ("command", shlex.join(map(str, recorded.get("command", [])))),
        ("code", commit if git else "not a git checkout"),
        ("device", f"{recorded.get('device', '')}, base held in {recorded.get('dtype', '')}"),
        ("machine", f"{recorded.get('processor', '')}, {recorded.get('platform', '')}"),
        ("versions", ", ".join(f"{k} {v}" for k, v in (recorded.get("versions") or {}).items())),
    ]
    prints = run.fingerprints.items()
    pairs += [(f"fingerprint of {key}", str(value)) for key, value in prints if value]
    return Section("provenance", "Provenance", tables=(facts(pairs),))
