"""``loratune preview``: the first rows as the model sees them, and an audit of all of them."""

from __future__ import annotations

from dataclasses import dataclass

from loratune.cli.arguments import TableOrJson
from loratune.cli.inputs import require_rows
from loratune.config.command_line import CommandLine
from loratune.config.schema import RunConfig
from loratune.errors import ConfigError
from loratune.files import to_json


@dataclass(kw_only=True)
class Config(RunConfig):
    """A recipe, and how much of its data to show."""

    rows: int = 3
    """Training rows to show, of each source; all rows are audited."""
    format: TableOrJson = TableOrJson.table
    """table or json."""


def run(config: Config, command_line: CommandLine) -> None:
    """Print the preview; stop with exit code 3 where ``train`` would stop."""
    if config.rows < 0:
        raise ConfigError(f"{config.rows} is out of range", where="rows", fix="use >= 0")
    require_rows(config)
    from loratune.plan.preview import make_preview, show_preview

    preview = make_preview(config, config.rows)
    if config.format is TableOrJson.json:
        print(to_json(preview.to_dict()), end="")
    else:
        show_preview(preview)
    preview.audit.raise_errors()
