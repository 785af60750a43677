"""Run one subcommand and turn what it raises into a line and an exit code."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from types import ModuleType

from loratune.cli import COMMANDS, discard_output
from loratune.console import printable
from loratune.errors import ConfigError, LoratuneError, StorageError, TrainingError, choose_one
from loratune.files import restrict_modes


def dispatch(command: str, arguments: Sequence[str]) -> int:
    """Run ``command`` with ``arguments``; return the exit code.

    Every ``LoratuneError`` becomes its lines on stderr, the highest exit code last; anything else
    is a bug, exit code 1, and keeps its traceback.
    """
    restrict_modes()
    try:
        module = _command_module(command)
        if hasattr(module, "Config"):
            from loratune.cli.hydra_app import run_app

            run_app(command, module, list(arguments))
        elif {"-h", "--help"} & set(arguments):
            print(module.HELP.rstrip())
        else:
            module.run(list(arguments))
    except LoratuneError as error:
        _print_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        print("error[130] interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        discard_output()
        return 0
    except MemoryError:
        fix = "lower trainer.batch_size or data.max_length"
        _print_error(TrainingError("out of memory", fix=fix))
        return TrainingError.exit_code
    except OSError as error:
        place = str(error.filename or "")
        _print_error(StorageError(error.strerror or str(error), where=place))
        return StorageError.exit_code
    except Exception:
        _print_bug()
        return 1
    return 0


def _command_module(command: str) -> ModuleType:
    if command not in COMMANDS:
        fix = choose_one(command, COMMANDS)
        raise ConfigError(f"no command '{command}'", where="loratune", fix=fix)
    return import_module(f"loratune.cli.commands.{command.replace('-', '_')}")


def _print_error(error: LoratuneError) -> None:
    from loratune.config.secrets import redact_text

    for line in error.lines():
        print(printable(redact_text(line)), file=sys.stderr)


def _print_bug() -> None:
    """The traceback of a bug, without the secrets that its message may hold."""
    import traceback

    from loratune.config.secrets import redact_text

    print(printable(redact_text(traceback.format_exc())), file=sys.stderr, end="")
    print("error[1] this is a bug of loratune; please report the lines above", file=sys.stderr)
