"""The model card: ``README.md`` of an adapter's or a merged model's folder, for people and the hub.

Every figure comes from a record: the adapter's own, its run's, the certificate's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from loratune import __version__
from loratune.config.secrets import redact_text
from loratune.console import printable
from loratune.errors import ConfigError
from loratune.files import BUILTIN
from loratune.models.source import is_hub_id
from loratune.report.records import RunRecords, read_run
from loratune.report.scores import score_table
from loratune.runs.run_dir import RunDir
from loratune.tables import markdown_text
from loratune.units import percent
from loratune.verify.serving import Server, check_rules
from loratune.verify.serving.rules import PORTABLE, ServedAdapter
from loratune.verify.serving.vllm import RANK

_BASE, _THIS = "BASE", "THIS-FOLDER"
_REPOSITORY = re.compile(r"([A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*", re.ASCII)
_LLAMA_CPP = "llama-server -m EXPORT/model.gguf --jinja"


@dataclass(frozen=True)
class CardSubject:
    """What a card is about.

    Attributes:
        facts: the adapter's ``loratune.json``; empty for one that another tool wrote.
        peft: its ``adapter_config.json``.
        run: its run's records, where they lie beside it.
    """

    facts: Mapping[str, Any]
    peft: Mapping[str, Any]
    run: RunRecords | None = None

    @property
    def base(self) -> str:
        """The base as the run or the adapter names it."""
        named = self.run.setting("model.path") if self.run else None
        return str(named or self.facts.get("base_path") or self._hint or "")

    @property
    def hub_base(self) -> str:
        """The base where it is a repository on the hub, or an empty string."""
        on_hub = is_hub_id(self.base) and _REPOSITORY.fullmatch(self.base)
        return self.base if on_hub else ""

    @property
    def base_shown(self) -> str:
        """The base for strangers: of a folder its name, since the way to it is nobody's affair."""
        if not self.base:
            return "a base that is not recorded"
        public = self.hub_base or self.base.startswith(BUILTIN)
        return self.base if public else Path(self.base).name

    @property
    def _hint(self) -> str:
        return str(self.peft.get("base_model_name_or_path") or "")

    @property
    def variant(self) -> str:
        """The adapter variant, or PEFT's word for it."""
        return str(self.facts.get("variant") or self.peft.get("peft_type") or "").lower()


def subject_of(adapter: Path, facts: Mapping[str, Any], peft: Mapping[str, Any]) -> CardSubject:
    """An adapter, with the records of the run in whose folder it lies."""
    run = RunDir(adapter.parent)
    try:
        records = read_run(run.path) if adapter == run.adapter else None
    except ConfigError:  # another folder than a run's
        records = None
    return CardSubject(facts, peft, records)


def adapter_card(subject: CardSubject, tensors: Sequence[str], proof: Sequence[str] = ()) -> str:
    """The card of an adapter.

    Args:
        subject: the adapter.
        tensors: names in its file.
        proof: what an export proved, a sentence each.
    """
    served = ServedAdapter(subject.peft, tuple(tensors))
    return _card(subject, "adapter", proof, _adapter_use(subject, served))


def merged_card(subject: CardSubject, proof: Sequence[str]) -> str:
    """The card of a merged model.

    Args:
        subject: the adapter that was merged.
        proof: what the merge proved, a sentence each.
    """
    return _card(subject, "merged model", proof, _merged_use())


def _card(subject: CardSubject, kind: str, proof: Sequence[str], use: Sequence[str]) -> str:
    name = markdown_text(_shown(f"{subject.variant} {kind}"))
    base = markdown_text(_shown(subject.base_shown))
    parts = [
        _metadata(subject, kind),
        f"# {name}\n\nMade by loratune {__version__} on {base}.",
        _section("Training", _training(subject)),
        _section("Evaluation", _evaluation(subject.run)),
        _section("Proof", [f"- {markdown_text(_shown(line))}" for line in proof]),
        _section("Use", use),
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _metadata(subject: CardSubject, kind: str) -> str:
    """What the hub reads: YAML between two lines of dashes."""
    is_adapter = kind == "adapter"
    values: dict[str, Any] = {}
    if subject.hub_base:
        values["base_model"] = subject.hub_base
        values["base_model_relation"] = "adapter" if is_adapter else "finetune"
    values["library_name"] = "peft" if is_adapter else "transformers"
    values["pipeline_tag"] = "text-generation"
    values["tags"] = ["loratune", *([subject.variant] if subject.variant else [])]
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=False)
    return f"---\n{text}---"


def _section(title: str, lines: Sequence[str]) -> str:
    return "\n".join([f"## {title}", "", *lines]) if lines else ""


def _shown(text: str) -> str:
    """Text from records without secrets or control characters, on one line."""
    return " ".join(printable(redact_text(text)).split())


# -- what it was trained on ------------------------------------------------------------------


def _training(subject: CardSubject) -> list[str]:
    facts, run = subject.facts, subject.run
    lines = [
        f"- {what}: sha256 `{facts[key]}`"
        for key, what in (
            ("base", "base weights"),
            ("tokenizer", "tokenizer"),
            ("data", "rows"),
            ("encoded", "rows as tokens"),
        )
        if facts.get(key)
    ]
    lines += [f"- {line}" for line in _rows(run)]
    settings = {key: value for key, value in dict(facts.get("adapter") or {}).items() if value}
    if settings:
        written = ", ".join(f"{key}={value}" for key, value in settings.items())
        lines.append(f"- {markdown_text(_shown(f'{subject.variant}: {written}'))}")
    if facts.get("step"):
        lines.append(f"- optimizer step: {facts['step']:,}; seed {facts.get('seed')}")
    return [*lines, *_prompts(facts)]


def _rows(run: RunRecords | None) -> list[str]:
    """Counts of both sides of the data."""
    sides = {name: (run.data.get(name) or {}) if run else {} for name in ("train", "eval")}
    return [
        f"{name} rows: {side['kept']:,} of {side['rows']:,}, {side['tokens']:,} tokens, "
        f"{side['supervised_tokens']:,} supervised"
        for name, side in sides.items()
        if {"kept", "rows", "tokens", "supervised_tokens"} <= side.keys()
    ]


def _prompts(facts: Mapping[str, Any]) -> list[str]:
    """How a prompt is written."""
    written = facts.get("prompt_format") or {}
    if written.get("chat_template"):
        return ["- prompts: conversations in the chat template of training"]
    if written.get("template"):
        return ["- prompts:", "", *(f"      {line}" for line in _lines(written["template"]))]
    return []


def _lines(text: object) -> list[str]:
    return printable(redact_text(str(text))).split("\n")


# -- what it is worth -------------------------------------------------------------------------


def _evaluation(run: RunRecords | None) -> list[str]:
    if run is None or not run.adapted:
        return []
    lines = [score_table(run.evaluation).to_markdown().rstrip()]
    interval = run.exact_interval
    if interval is not None:
        low, high = map(percent, interval)
        prompts = run.adapted.get("prompts", 0)
        share = percent(run.adapted["exact_match"])
        lines += [
            "",
            f"Exact match {share} of {prompts:,} prompts: {low} to {high} (95 % interval, Wilson).",
        ]
    return lines


# -- how to load it -----------------------------------------------------------------------------


def _adapter_use(subject: CardSubject, served: ServedAdapter) -> list[str]:
    base = subject.hub_base or _BASE
    export = f"loratune export adapter_path={_THIS} model.path={base} out=EXPORT"
    return [
        *_code(
            "python",
            "from peft import PeftModel",
            "from transformers import AutoModelForCausalLM",
            "",
            f'base = AutoModelForCausalLM.from_pretrained("{base}")',
            f'model = PeftModel.from_pretrained(base, "{_THIS}")',
        ),
        *_titled("transformers alone, as one plain model", _merge(base)),
        *_titled("vLLM", *_vllm(base, served, export)),
        *_titled("llama.cpp", f"{export} format=gguf", _LLAMA_CPP),
    ]


def _merge(base: str) -> str:
    return f"loratune merge adapter_path={_THIS} model.path={base} out=MERGED"


def _vllm(base: str, served: ServedAdapter, export: str) -> list[str]:
    """How vLLM serves the adapter: as it is, as plain LoRA, or merged, by its own rules."""
    rank = max(served.largest_rank, 1)
    checks = check_rules(Server.vllm, served, export)
    if not any(check.problem for check in checks if check.what != RANK):
        options = f"--enable-lora --max-lora-rank {rank}"
        return [f"vllm serve {base} {options} --lora-modules adapter={_THIS}"]
    if served.export == PORTABLE:
        options = f"--enable-lora --max-lora-rank {rank}"
        serve = f"vllm serve {base} {options} --lora-modules adapter=EXPORT"
        return [f"{export} {PORTABLE}", serve]
    return [f"{export} {served.export}", "vllm serve EXPORT"]


def _merged_use() -> list[str]:
    return [
        *_code(
            "python",
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            f'model = AutoModelForCausalLM.from_pretrained("{_THIS}")',
            f'tokenizer = AutoTokenizer.from_pretrained("{_THIS}")',
        ),
        *_titled("vLLM", f"vllm serve {_THIS}"),
        *_titled(
            "llama.cpp, from the run that this was merged in",
            "loratune export run=DIR format=gguf out=EXPORT",
            _LLAMA_CPP,
        ),
    ]


def _titled(title: str, *commands: str) -> list[str]:
    return ["", f"{title}:", "", *_code("", *commands)]


def _code(language: str, *lines: str) -> list[str]:
    return [f"```{language}", *lines, "```"]
