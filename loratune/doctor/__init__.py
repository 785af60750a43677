"""Whether this installation is safe, complete and exact, and what a base model allows.

Versions against advisories, the machine, offline use, and three steps of training with every
variant: under a minute on two cores.
"""

from __future__ import annotations

from collections.abc import Iterator

from loratune.doctor.finding import Finding
from loratune.doctor.floors import check_floors


def diagnose(model: str | None = None) -> Iterator[Finding]:
    """Every finding, as it is made; what needs torch is imported after the versions' check.

    Args:
        model: folder or hub id of a base model to examine as well.
    """
    yield from check_floors()
    from loratune.doctor.environment import check_environment
    from loratune.doctor.offline import check_offline
    from loratune.doctor.training import check_training

    yield from check_environment()
    yield check_offline()
    yield from check_training()
    if model is not None:
        from loratune.doctor.model import check_model

        yield from check_model(model)
