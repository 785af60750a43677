"""The command line: dispatch, errors, exit codes.  Nothing heavy is imported at the top."""

from __future__ import annotations

import os
import sys

COMMANDS = {
    "train": "adapt a model: load, wrap, train, evaluate (and merge, export if the recipe says so)",
    "evaluate": "measure base and adapted model side by side",
    "generate": "answer a prompt or a file of rows, base beside adapted",
    "chat": "talk to the adapted model, several turns, base beside it on request",
    "merge": "write base + adapter as one plain model, with proof",
    "export": "write an adapter for other tools: peft, merged, portable, lora, compact",
    "rewind": "sweep a trained adapter's scale, and fold in the one that forgets less",
    "gate": "exit 0 if a run gains enough, forgets little and its merge is proved, else 11",
    "combine": "add, average or scale adapters: one plain LoRA, with proof",
    "recipes": "list, show and copy recipe files: ls, show NAME, copy NAME",
    "preview": "the first rows as the model sees them, and an audit of all of them",
    "plan": "steps, memory, disk and time of a recipe before any weight is read; fit=24GB",
    "count-params": "compare the variants' parameters, bytes and budgets",
    "compare": "try the variants on one task: search, several seeds, intervals, costs",
    "tune": "find the learning rate of one variant and write a recipe with it",
    "report": "one HTML page about a run, a comparison or several runs",
    "verify": "check a run, adapter, merge, export or checkpoint again, from its files alone",
    "doctor": "check the installation: versions, offline use, determinism, every variant",
}

HELP = """loratune {version}: fine-tune causal language models with LoRA, LoRA-FA, LoRA+ and VeRA.

usage: loratune COMMAND [key=value ...]

{commands}

Every command takes --help; those with a recipe also --cfg job (show it composed), --info defaults
(where it comes from) and -m (sweep: key=a,b,c).  Completion: eval "$(loratune -sc install=bash)"
Start with:  loratune train recipe=demo
"""


def main() -> None:
    """Entry point of the ``loratune`` script."""
    code = 0
    try:
        code = _run(sys.argv[1:])
        if sys.stdout is not None:
            sys.stdout.flush()  # a reader that has gone is noticed here, not when Python ends
    except BrokenPipeError:
        discard_output()
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version", "version"):
        from loratune import __version__

        print(__version__)
        return 0
    if arguments[0] in ("-sc", "--shell-completion"):
        from loratune.cli.completion import complete

        return complete(arguments)
    from loratune.cli.dispatch import dispatch

    return dispatch(arguments[0], arguments[1:])


def discard_output() -> None:
    """The reader (head, less) has gone: not an error of ours, and what is left goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _help() -> str:
    from loratune import __version__

    width = max(len(name) for name in COMMANDS)
    lines = [f"  {name:<{width}}  {summary}" for name, summary in COMMANDS.items()]
    return HELP.format(version=__version__, commands="\n".join(lines)).rstrip()
