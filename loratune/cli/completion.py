"""Tab completion: the shell asks ``loratune -sc query=bash`` with its line in the environment.

Hydra's script knows one program, not subcommands: the subcommand is taken out of the line before
Hydra sees it, and completed here.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from loratune.cli import COMMANDS


def complete(arguments: Sequence[str]) -> int:
    """Answer ``loratune -sc install=SHELL``, ``uninstall=SHELL`` or ``query=SHELL``."""
    from loratune.cli.dispatch import dispatch

    if not any(word.startswith("query=") for word in arguments):
        return dispatch("train", arguments)
    line = os.environ.get("COMP_LINE", "")
    words = line.split()
    command = words[1] if len(words) > 1 else ""
    if len(words) < 2 or (len(words) == 2 and not line.endswith(" ")):
        print(" ".join(name for name in COMMANDS if name.startswith(command)))
        return 0
    if command == "recipes":
        print(" ".join(_recipe_words(words[2:], fresh=line.endswith(" "))))
        return 0
    if command not in COMMANDS:
        return 0
    os.environ["COMP_LINE"] = line.replace(f" {command}", "", 1)
    # A broken recipe must not scribble over the line that is being typed.
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
        dispatch(command, arguments)
    return 0


def _recipe_words(typed: Sequence[str], *, fresh: bool) -> list[str]:
    """What may follow in ``loratune recipes``: an action, then a name."""
    from loratune.cli.commands.recipes import ACTIONS
    from loratune.config.recipes.folders import group_options, user_recipe_folders
    from loratune.config.settings import GROUPS

    last = "" if fresh or not typed else typed[-1]
    before = typed if fresh else typed[:-1]
    if not before:
        choices = list(ACTIONS)
    elif before[0] == "ls":
        choices = list(GROUPS)
    else:
        folders = user_recipe_folders()
        choices = sorted({name for group in GROUPS for name in group_options(group, folders)})
    return [choice for choice in choices if choice.startswith(last)]
