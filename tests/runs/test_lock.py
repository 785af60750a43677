"""A folder that another process holds: refused at once, or waited for where that was asked."""

from __future__ import annotations

from pathlib import Path
from threading import Timer

import pytest

from loratune.errors import BusyError
from loratune.runs.lock import FolderLock


def test_a_folder_is_waited_for_as_long_as_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = FolderLock(tmp_path / ".lock"), FolderLock(tmp_path / ".lock")
    first.hold()
    with pytest.raises(BusyError, match="in use by process"):
        second.hold()
    assert capsys.readouterr().out == ""
    with pytest.raises(BusyError):
        second.hold(patience=0.1)
    Timer(0.3, first.release).start()
    second.hold(patience=30)
    assert "waiting up to 30 s for process" in capsys.readouterr().out
    with pytest.raises(BusyError):
        first.hold()
    second.release()
