"""One subcommand as a real Hydra application."""

from __future__ import annotations

import logging
import os
import secrets
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType

import hydra
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from loratune.cli import COMMANDS
from loratune.cli.submitit_job import continued_after_requeue, give_back
from loratune.config.command_line import CommandLine, read_command_line
from loratune.config.composition import check_composed, translate_composition_error
from loratune.config.convert import register_schemas, to_run_config
from loratune.config.overrides import check_overrides
from loratune.config.recipes.files import check_recipe_files, unused_problems
from loratune.config.recipes.folders import (
    builtin_recipes,
    group_options,
    register_user_recipes,
)
from loratune.config.recipes.reach import UsedFiles
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact_text
from loratune.config.settings import GROUPS
from loratune.console import printable
from loratune.errors import Interrupted, LoratuneError, Preempted, raise_together

_STOPPED = (KeyboardInterrupt, Interrupted, Preempted)
"""What ends a whole sweep, not one job of it."""

HELP_TEMPLATE = """loratune {command}: {summary}

usage: loratune {command} [group=choice ...] [key=value ...]

{own}Groups, and what to choose from (your ./recipes folder adds to them):

$APP_CONFIG_GROUPS

Settings and their values now (override any as key=value):

$CONFIG
Flags: --cfg job (composed recipe), --info defaults (where it comes from), -m (sweep: key=a,b,c),
--config-dir DIR (more recipes), -sc install=bash (completion)
"""


def run_app(command: str, module: ModuleType, arguments: list[str]) -> None:
    """Check the user's words and files, let Hydra compose, and run the command.

    Args:
        command: name of the subcommand.
        module: has ``Config`` (a ``RunConfig``) and ``run(config, command_line)``.
        arguments: the words after the subcommand.

    Raises:
        LoratuneError: every problem, before anything heavy is imported.
    """
    command_line = read_command_line(arguments, module.Config)
    completing = command_line.flags.shell_completion
    problems = [] if completing else _check_recipes(command_line, module.Config)
    raise_together([*problems, *check_overrides(command_line, module.Config)])
    register_user_recipes(command_line.folders)
    register_schemas(module.Config)
    if "hydra/launcher" in command_line.keys:
        from loratune.cli import ray_jobs

        ray_jobs.register()
    _register_help(command, module.Config, own=command_line.flags.help)
    failures: list[BaseException] = []
    here = _this_process()

    def task(composed: DictConfig) -> None:
        # Raised later: Hydra would print the overrides, secrets and all, beside the error.
        if any(isinstance(failure, _STOPPED) for failure in failures):
            return
        try:
            module.run(*_job(composed, module.Config, command_line))
        except (Exception, KeyboardInterrupt) as error:
            named = _named(error)
            if _this_process() == here:
                failures.append(named)
                return
            # A launcher's own process: nobody would look at the list, and what submitit starts
            # again begins with all that this closure holds.
            if isinstance(error, Preempted):
                give_back(error)
            raise

    words = [*_sweep_folder(command_line), *command_line.for_hydra(module.Config)]
    with _hydra_environment(command, words), _quick_hydra(command_line):
        try:
            recipes = str(builtin_recipes())
            hydra.main(version_base="1.3", config_path=recipes, config_name="config")(task)()
        except (LoratuneError, BrokenPipeError):
            raise
        except SystemExit as stop:  # after --help
            if stop.code:
                raise
        except Exception as error:
            raise translate_composition_error(error) from error
    _raise_failures(failures)


def _this_process() -> tuple[str, int]:
    """One of a sweep's processes on several machines, where numbers alone may be the same."""
    return socket.gethostname(), os.getpid()


def _check_recipes(command_line: CommandLine, schema: type) -> list[LoratuneError]:
    """The problems of the recipe files that Hydra will read; the others' are a warning."""
    folders = command_line.folders
    used = UsedFiles(command_line.overrides, folders)
    if os.environ.get("RANK", "0") == "0":
        for problem in unused_problems(folders, schema, used):
            line = f"warning: a recipe that is not used here is broken: {problem.where}: "
            print(printable(redact_text(line + problem.cause)), file=sys.stderr)
    return check_recipe_files(folders, schema, used)


def _raise_failures(failures: list[BaseException]) -> None:
    """One error for all failed jobs; the others' results stay."""
    for failure in failures:
        if not isinstance(failure, LoratuneError):
            raise failure
    raise_together(failure for failure in failures if isinstance(failure, LoratuneError))


def _named(error: BaseException) -> BaseException:
    """The error, saying which job of a sweep it was."""
    if HydraConfig.get().mode != RunMode.MULTIRUN or not isinstance(error, LoratuneError):
        return error
    words = redact_text(" ".join(HydraConfig.get().overrides.task))
    for one in getattr(error, "errors", [error]):
        one.where = f"{one.where}; job {HydraConfig.get().job.num} ({words})".lstrip("; ")
    return error


def _job(
    composed: DictConfig, config_type: type[RunConfig], command_line: CommandLine
) -> tuple[RunConfig, CommandLine]:
    """The typed configuration and the words of one job: the only one, or one of a sweep."""
    raise_together(check_composed(composed))
    config = to_run_config(composed, config_type)
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return config, command_line
    config = replace(config, out=config.out or hydra_config.runtime.output_dir)
    config = continued_after_requeue(config)
    return config, command_line.job(hydra_config.overrides.task)


def _register_help(command: str, config: type[RunConfig], *, own: bool) -> None:
    """Tell Hydra the text of ``--help``; ``own``: with the settings that the command adds."""
    added = ""
    if own:
        from loratune.cli.settings_help import own_settings

        if settings := own_settings(config):
            added = f"Settings of this command:\n\n{settings}\n\n".replace("$", "$$")
    template = HELP_TEMPLATE.format(command=command, summary=COMMANDS[command], own=added)
    node = {"app_name": f"loratune {command}", "header": "", "footer": "", "template": template}
    ConfigStore.instance().store(group="hydra/help", name="loratune", node=node)


@contextmanager
def _hydra_environment(command: str, arguments: list[str]) -> Iterator[None]:
    """Hydra reads ``sys.argv`` and the environment, and ``--info`` turns its debug log on.

    All of it is as before afterwards.
    """
    argv, environment = sys.argv, dict(os.environ)
    handlers, level = list(logging.root.handlers), logging.root.level
    sys.argv = [f"loratune {command}", *arguments]  # as a run records its command
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise, so that we can explain
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler announces itself on stderr
    os.environ["HYDRA_MAIN_MODULE"] = f"loratune_{command.replace('-', '_')}"
    try:
        yield
    finally:
        logging.root.handlers[:] = handlers
        logging.root.setLevel(level)
        sys.argv = argv
        os.environ.clear()
        os.environ.update(environment)


@contextmanager
def _quick_hydra(command_line: CommandLine) -> Iterator[None]:
    """Hydra without its second composition and without its slow listing of groups.

    Hydra composes everything twice, the first time to read ``hydra.mode``, which here only a word
    of the command line sets; and its ``--help`` copies the whole configuration for every folder.

    Processor time of the whole process, Hydra's import included, median of five: the listing of
    groups brings ``loratune train --help`` from 0.94 s to 0.33 s; without the second composition
    every start takes another 0.02 to 0.04 s less (5 to 8 %).
    """
    originals = Hydra.get_mode, Hydra.format_config_groups
    if "hydra.mode" not in command_line.keys:
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    if not command_line.flags.hydra_help:
        options = {name: group_options(name, command_line.folders) for name in GROUPS}
        listing = "\n".join(f"  {name}: {', '.join(names)}" for name, names in options.items())
        Hydra.format_config_groups = lambda *_, **__: listing  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode, Hydra.format_config_groups = originals  # type: ignore[method-assign]


def _sweep_folder(command_line: CommandLine) -> list[str]:
    """A sweep folder that two sweeps started in the same second do not share."""
    if not command_line.flags.multirun or "hydra.sweep.dir" in command_line.keys:
        return []
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    return [f"hydra.sweep.dir=outputs/sweeps/{stamp}-{secrets.token_hex(3)}"]
