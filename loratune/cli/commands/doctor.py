"""``loratune doctor``: examine the installation."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from loratune.cli.arguments import TableOrJson, read_arguments
from loratune.errors import ConfigError, LoratuneError, raise_together

if TYPE_CHECKING:
    from loratune.doctor.finding import Finding

HELP = """usage: loratune doctor [model.path=FOLDER_OR_HUB_ID] [format=table|json]

Examines the installation in under a minute: package versions against known advisories, the
machine, loading without a network, three training steps of every variant, two runs with the
same bytes, and a merge that proves itself.

With model.path also what training relies on about that base model, as `plan` and `train` measure
it, on shapes alone: which layers an adapter can help, whether it is causal, whether padded, packed
and shared rows are computed as single ones, gradient checkpointing, and batched generation.

Exit code 0 if nothing failed."""


def run(arguments: list[str]) -> None:
    """Print every finding as it is made; raise what failed."""
    settings = {"format": tuple(TableOrJson), "model.path": ()}
    plain, values = read_arguments(arguments, settings)
    form = values.get("format", "table")
    if plain:
        fix = "loratune doctor [model.path=FOLDER_OR_HUB_ID] [format=table|json]"
        raise ConfigError("unexpected arguments", where=" ".join(plain), fix=fix)
    from loratune.doctor import diagnose

    findings = []
    for finding in diagnose(values.get("model.path")):
        findings.append(finding)
        if form == "table":
            _show(finding)
    if form == "json":
        from loratune import files

        print(files.to_json([asdict(finding) for finding in findings]), end="")
    raise_together(_failure(finding) for finding in findings if finding.status == "fail")


def _show(finding: Finding) -> None:
    from loratune.console import say

    fix = f"  → {finding.fix}" if finding.fix else ""
    say(f"{finding.status:<5} {finding.name:<18} {finding.detail}{fix}")


def _failure(finding: Finding) -> LoratuneError:
    error = LoratuneError(finding.detail, where=finding.name, fix=finding.fix)
    error.exit_code = finding.code
    return error
