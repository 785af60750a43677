"""A lock that says whose folder it is; a dead holder blocks nobody."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from loratune import files
from loratune.console import say
from loratune.errors import BusyError

_POLL = 1.0


class FolderLock:
    """The lock file of a folder; it names the process that holds it.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def hold(self, patience: float = 0) -> None:
        """Hold the folder until ``release`` or the end of this process.

        Args:
            patience: seconds to wait for another holder to end.

        Raises:
            BusyError: naming the holder's process, machine and start.
        """
        with files.storage_errors(self.path.parent):
            file = files.open_own(self.path, os.O_RDWR)
        self._wait(file, patience)
        self._lock(file)
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {started}")
        file.flush()
        os.fsync(file.fileno())  # another machine may look for it
        self._file = file

    def check_free(self) -> None:
        """Stop if a living process holds the folder; take nothing, change nothing.

        Raises:
            BusyError: naming the holder's process, machine and start.
        """
        try:
            file = self.path.open(encoding="utf-8")
        except OSError:
            return
        with file:
            self._lock(file)

    def release(self) -> None:
        """Let another process have the folder."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _wait(self, file: IO[str], patience: float) -> None:
        """Wait while another process holds the folder, but not longer than ``patience`` seconds."""
        deadline, is_said = time.monotonic() + patience, False
        while time.monotonic() < deadline and not _take(file):
            if not is_said:
                say(f"waiting up to {patience:.0f} s for {_holder(file)} to leave the run folder")
            is_said = True
            time.sleep(_POLL)

    def _lock(self, file: IO[str]) -> None:
        if not _take(file):
            holder = _holder(file)
            file.close()
            raise BusyError(
                f"the run folder is in use by {holder}",
                where=str(self.path.parent),
                fix="wait for it, or choose another out=DIR",
            )


def _take(file: IO[str]) -> bool:
    """Lock an open file, unless another process has; what this process has, it keeps."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _holder(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip() or "unknown process"
