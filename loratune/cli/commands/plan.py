"""``loratune plan``: what a recipe takes, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hydra.core.hydra_config import HydraConfig

from loratune.cli.arguments import TableOrJson
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.files import to_json


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to find out about it."""

    fit: str | None = None
    """Memory to stay within (24GB, 900MiB): chooses micro-batch, checkpointing and length."""
    time: bool = True
    """Calibrate on one block of the architecture (seconds) to estimate the time."""
    format: TableOrJson = TableOrJson.table
    """table or json."""


def run(config: Config, command_line: CommandLine) -> None:
    """Print the plan; stop where ``train`` would stop on the rows."""
    from loratune.counting.variant_table import own_numbers
    from loratune.plan.fit import parse_size
    from loratune.plan.sources import sourced_values

    fit = parse_size(config.fit) if config.fit is not None else None
    config = replace(config, model=own_numbers(config.model, command_line.keys))
    choices = HydraConfig.get().runtime.choices
    values = sourced_values(config, command_line.keys, choices, command_line.folders)
    from loratune.plan.estimate import make_plan
    from loratune.plan.plan import show_plan

    plan = make_plan(config, values, fit, timed=config.time)
    if config.format is TableOrJson.json:
        print(to_json(plan.to_dict()), end="")
    else:
        show_plan(plan)
    if plan.work.audit is not None:
        plan.work.audit.raise_errors()
