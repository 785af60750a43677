"""Installed versions against the advisories that set the lowest safe ones.  No torch here."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from packaging.version import InvalidVersion, Version

from loratune.doctor.finding import Finding, Status


@dataclass(frozen=True)
class Floor:
    """The lowest version of a package without a known hole.

    Attributes:
        package: its name on the package index.
        lowest: the first version in which the advisories are fixed.
        advisories: their identifiers.
        danger: what they allow.
    """

    package: str
    lowest: str
    advisories: str
    danger: str


FLOORS = (
    Floor(
        "hydra-core", "1.3.8", "CVE-2026-68508, GHSA-37p2-j732-x8pj", "a configuration runs code"
    ),
    Floor("torch", "2.10", "CVE-2025-32434, CVE-2026-24747", "a loaded file runs code"),
    Floor(
        "transformers",
        "5.10",
        "CVE-2026-1839, CVE-2026-4372, CVE-2026-9856",
        "a model folder runs code or writes outside",
    ),
    Floor("jinja2", "3.1.6", "CVE-2025-27516", "a chat template leaves its sandbox"),
    Floor("safetensors", "0.5", "", "older releases read fewer number formats"),
)


def check_floors() -> list[Finding]:
    """One finding for every package with a floor."""
    return [_check(floor) for floor in FLOORS]


def _check(floor: Floor) -> Finding:
    fix = f"pip install '{floor.package}>={floor.lowest}'"
    try:
        installed = version(floor.package)
        old = Version(installed) < Version(floor.lowest)
    except PackageNotFoundError:
        return Finding(floor.package, Status.fail, "not installed", fix, code=2)
    except InvalidVersion:
        return Finding(floor.package, Status.warn, f"{installed}: cannot be compared", fix)
    if old:
        reason = f"{floor.advisories}: {floor.danger}" if floor.advisories else floor.danger
        detail = f"{installed} is older than {floor.lowest} ({reason})"
        return Finding(floor.package, Status.fail, detail, fix, code=9)
    return Finding(floor.package, Status.ok, installed)
