"""``loratune plan``: what a recipe takes, before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli.commands.evaluate import check_format
from loratune.cli.hydra_app import given_keys
from loratune.config.recipes.folders import UserRecipes
from loratune.config.schema import RunConfig


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and what to find out about it."""

    fit: str | None = None
    """Memory to stay within (24GB, 900MiB): chooses micro-batch, checkpointing and length."""
    time: bool = True
    """Calibrate on one block of the architecture (seconds) to estimate the time."""
    format: str = "table"
    """table or json."""


def run(config: Config, overrides: list[str]) -> None:
    """Print the plan; stop where ``train`` would stop on the rows."""
    check_format(config.format, ("table", "json"))
    from hydra.core.hydra_config import HydraConfig

    from loratune.counting.variant_table import own_numbers
    from loratune.plan.fit import parse_size
    from loratune.plan.sources import sourced_values

    given = given_keys(overrides)
    fit = parse_size(config.fit) if config.fit is not None else None
    config.model = own_numbers(config.model, given)
    choices = HydraConfig.get().runtime.choices
    values = sourced_values(config, given, choices, UserRecipes.folders)
    from loratune.files import to_json
    from loratune.plan.estimate import make_plan
    from loratune.plan.show import show_plan

    plan = make_plan(config, values, fit, timed=config.time)
    if config.format == "json":
        print(to_json(plan.to_dict()), end="")
    else:
        show_plan(plan)
    if plan.work.audit is not None:
        plan.work.audit.raise_errors()
