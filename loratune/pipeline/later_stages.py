"""Evaluate, merge and export, each with what it prints: for a run and for the commands alike."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from loratune import files
from loratune.adapter_files.peft_format import AdapterFolder
from loratune.config.schema import ExportFormat, Quantize, RunConfig
from loratune.console import say
from loratune.data.arrangement import arrange
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prepare import PreparedData
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.pipeline.merged_quantized import (
    check_choice,
    merge_quantized,
    quantization_of,
    show_comparisons,
)
from loratune.report.card import CardSubject, adapter_card, merged_card, subject_of
from loratune.report.scores import retention_table, score_table
from loratune.runs import processes
from loratune.runs.golden import Golden, write_golden
from loratune.stages.evaluate import Evaluation, Sample, evaluate
from loratune.stages.export import export
from loratune.stages.golden import golden_prompts
from loratune.stages.merge import MergeReport, merge
from loratune.surgery import WrappedModel
from loratune.tables import Table, show

SAMPLES_SHOWN = 4
SAMPLE_WIDTH = 200


def evaluate_and_show(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    tokenizer: Any,
    rows: PreparedData,
    retention: Mapping[str, PreparedData],
    config: RunConfig,
    out: Path,
    golden: Path,
) -> None:
    """Measure base and adapted model; write the scores to ``out``, and print them.

    Where there are no evaluation rows, nothing is measured.  A few of the prompts that were
    answered become the golden prompts in ``golden``.

    Raises:
        StorageError: if a file cannot be written.
    """
    if not rows.eval:
        return
    result = evaluate_with_retention(wrapped, head, tokenizer, rows, retention, config)
    kept = golden_of(result, wrapped, tokenizer, rows, config)
    if not processes.is_main():
        return
    files.write_json(out, result.as_dict())
    if kept is not None:
        write_golden(golden, kept)
    show_evaluation(result)


def golden_of(
    result: Evaluation,
    wrapped: WrappedModel,
    tokenizer: Any,
    rows: PreparedData,
    config: RunConfig,
) -> Golden | None:
    """The golden prompts, of those that an evaluation answered; ``None`` if it answered none."""
    answers = [(sample.base, sample.adapted) for sample in result.samples]
    longest = config.evaluate.max_new_tokens
    return golden_prompts(wrapped, tokenizer, rows, answers, longest)


def evaluate_with_retention(
    wrapped: WrappedModel,
    head: LanguageModelHead,
    tokenizer: Any,
    rows: PreparedData,
    retention: Mapping[str, PreparedData],
    config: RunConfig,
) -> Evaluation:
    """Base and adapted model on the rows, and on those that forgetting is measured on.

    Args:
        wrapped: the model, in eval mode.
        head: its loss head.
        tokenizer: decodes answers.
        rows: the final ones.
        retention: name to rows.
        config: the recipe.
    """

    def measured(data: PreparedData) -> Evaluation:
        arrangement, notes = arrange(config, wrapped.model, data.pad_id, data.eval)
        processes.say_once(*notes)
        return evaluate(wrapped, head, tokenizer, data, arrangement, config.evaluate)

    result = measured(rows)
    return replace(result, retention={name: measured(data) for name, data in retention.items()})


def show_evaluation(result: Evaluation) -> None:
    """Print the scores, what was forgotten, and a few answers."""
    show(score_table(result.as_dict()))
    if (kept := retention_table(result.as_dict())) is not None:
        show(kept)
    if result.samples:
        show(_sample_table(result.samples))


def merge_and_show(
    adapters: Sequence[AdapterFolder],
    base_folder: Path,
    tokenizer: str,
    out: Path,
    config: RunConfig,
    rows: Callable[[], Sequence[EncodedRow]] = tuple,
) -> None:
    """Merge adapters into their base and print the proof.

    Args:
        adapters: the adapters.
        base_folder: their base.
        tokenizer: fingerprint of its tokenizer.
        out: the folder to write.
        config: the recipe.
        rows: gives rows of the run, on which models are compared where the base was quantized.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """

    def card(report: MergeReport) -> str:
        return merged_card(card_subject(adapters[0]), _merge_lines(report))

    if any(quantization_of(adapter) for adapter in adapters):
        report, comparisons = merge_quantized(
            adapters, base_folder, tokenizer, out, config, rows, card
        )
    else:
        check_choice(config)
        comparisons = []
        report = merge(
            adapters,
            base_folder,
            out,
            config.merge,
            tokenizer=tokenizer,
            allow_drift=config.allow_drift,
            card=card,
        )
    for line in _merge_lines(report):
        say(line)
    if comparisons:
        show_comparisons(comparisons)
    say(f"merged model: {out}")


def export_and_show(
    adapter: AdapterFolder, base_folder: Path, out: Path, form: ExportFormat, config: RunConfig
) -> None:
    """Export an adapter in another form and print what was proved.

    Raises:
        LoratuneError: what stands against it; nothing is published then.
    """
    if form in (ExportFormat.gguf, ExportFormat.gguf_lora):
        _export_gguf_and_show(adapter, base_folder, out, form, config)
        return

    def card(settings: Mapping[str, Any], tensors: Sequence[str], proof: Mapping[str, Any]) -> str:
        subject = replace(card_subject(adapter), peft=settings)
        return adapter_card(subject, tensors, [f"{form}: {_proved(proof)}"])

    certificate = export(adapter, base_folder, out, form, config.merge.verify, card)
    say(f"exported {form}: {out} ({_proved(certificate['proof'])})")


def card_subject(adapter: AdapterFolder) -> CardSubject:
    """What the card of an adapter, or of what is made of it, is about."""
    return subject_of(adapter.path, adapter.facts, adapter.peft)


def _proved(proof: Mapping[str, Any]) -> str:
    """What an export proved, in words."""
    proved = f"ΔW differs from the original's by {proof['worst_relative_difference']:.1e} at most"
    logits = proof["logits"]
    if logits is not None:
        proved += f", logits by {logits['max_difference']:.1e} on {logits['tokens']} tokens"
    return proved


def _export_gguf_and_show(
    adapter: AdapterFolder, base_folder: Path, out: Path, form: ExportFormat, config: RunConfig
) -> None:
    if find_spec("gguf") is None:
        fix = "pip install 'loratune[gguf]'"
        raise ConfigError(f"format={form} needs the package gguf", where="format", fix=fix)
    from loratune.stages.export_gguf import export_gguf

    certificate = export_gguf(
        adapter,
        base_folder,
        out,
        config.gguf,
        alone=form is ExportFormat.gguf_lora,
        verify=config.merge.verify,
        allow_drift=config.allow_drift,
    )
    say(f"exported {form}: {out}")
    for line in (*_llama_cpp_lines(certificate["llama_cpp"]), *certificate["notes"]):
        say(line)


def _llama_cpp_lines(asked: dict[str, Any] | str) -> list[str]:
    """What llama.cpp answered to loratune's prompts."""
    if isinstance(asked, str):
        return [asked]
    gap = ""
    if asked["answered_alike"] < asked["prompts"]:
        bound = asked["gap_bound"]
        limit = "" if bound is None else f" (at most {bound:g} allowed)"
        gap = f"; largest gap of logits where it first differs {asked['largest_gap']:.2g}{limit}"
    otherwise = [
        f"note: this file tokenizes {text!r} otherwise than the tokenizer of training"
        for text in asked["texts_tokenized_otherwise"]
    ]
    return [
        f"{asked['version']} answers {asked['answered_alike']} of {asked['prompts']} prompts token "
        f"by token alike, same first choice at {asked['agreement']:.1%} of {asked['tokens']} "
        f"steps, mean KL {asked['mean_kl']:.1e} nats ({asked['mean_kl_base']:.1e} against the "
        f"base){gap}",
        *otherwise,
    ]


def _sample_table(samples: list[Sample]) -> Table:
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


def _merge_lines(report: MergeReport) -> list[str]:
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
    if report.dtype in set(Quantize):
        lines.append(f"quantized to {report.dtype} once merged, which changes what it answers")
    return [*lines, *(f"note: {note}" for note in report.notes)]
