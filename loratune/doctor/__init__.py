"""Whether this installation is safe, complete and exact.

Versions against advisories, the machine, offline use, and three steps of training with every
variant: under a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratune.doctor.finding import Finding, Status
from loratune.doctor.floors import check_floors

__all__ = ["Finding", "Status", "diagnose"]


def diagnose() -> Iterator[Finding]:
    """Every finding, as it is made; what needs torch comes last."""
    yield from check_floors()
    for check in (_environment, _offline, _training):
        yield from check()


def _environment() -> list[Finding]:
    from loratune.doctor.environment import check_environment

    return check_environment()


def _offline() -> list[Finding]:
    from loratune.doctor.offline import check_offline

    return [check_offline()]


def _training() -> list[Finding]:
    from loratune.doctor.training import check_training

    return check_training()
