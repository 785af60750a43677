"""``loratune doctor``: a sound installation passes; each fault is named."""

from __future__ import annotations

import json
import socket

import pytest
from support.command_line import CommandLine, Outcome

from loratune.adapters.registry import variant_names
from loratune.doctor import floors
from loratune.doctor.finding import Status, examine
from loratune.doctor.offline import blocked_sockets
from loratune.errors import MergeError, SecurityError


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory, cli: CommandLine) -> Outcome:
    here = tmp_path_factory.mktemp("doctor")
    outcome = cli("doctor", "format=json", cwd=here)
    assert list(here.iterdir()) == []  # the doctor leaves nothing behind
    return outcome


def test_a_sound_installation_passes(sound: Outcome) -> None:
    assert (sound.code, sound.err) == (0, "")


def test_every_variant_learns_and_a_merge_proves_itself(sound: Outcome) -> None:
    found = {finding["name"]: finding for finding in json.loads(sound.out)}
    expected = {"determinism", "merge", "offline", *(f"learns {name}" for name in variant_names())}
    assert expected <= found.keys()
    assert {found[name]["status"] for name in expected} == {"ok"}
    for name in variant_names():
        first, *_, last = found[f"learns {name}"]["detail"].removeprefix("loss ").split(" → ")
        assert float(last) < float(first)


@pytest.mark.parametrize(
    ("package", "installed", "named"),
    [
        ("hydra-core", "1.3.7", "GHSA-37p2-j732-x8pj"),
        ("torch", "2.9.1", "CVE-2026-24747"),
        ("transformers", "5.9.0", "CVE-2026-9856"),
        ("jinja2", "3.1.5", "CVE-2025-27516"),
        ("safetensors", "0.4.5", "safetensors>=0.5"),
    ],
)
def test_a_version_below_the_floor_fails_and_names_the_advisory(
    monkeypatch: pytest.MonkeyPatch, package: str, installed: str, named: str
) -> None:
    real = floors.version
    monkeypatch.setattr(
        floors, "version", lambda name: installed if name == package else real(name)
    )
    failed = [finding for finding in floors.check_floors() if finding.status is Status.fail]
    assert [finding.name for finding in failed] == [package]
    assert named in failed[0].detail + failed[0].fix and installed in failed[0].detail


@pytest.mark.parametrize("installed", ["1.3.8", "1.4.0", "1.10"])
def test_the_floor_itself_and_later_versions_pass(
    monkeypatch: pytest.MonkeyPatch, installed: str
) -> None:
    monkeypatch.setattr(floors, "version", lambda name: installed)
    [hydra] = [finding for finding in floors.check_floors() if finding.name == "hydra-core"]
    assert hydra.status is Status.ok


def test_the_command_exits_with_the_failure_and_prints_its_fix(cli: CommandLine) -> None:
    place = [floor.package for floor in floors.FLOORS].index("jinja2") + 1
    older = f"old@loratune.doctor.floors.version:{place}"
    outcome = cli("doctor", faults=[older, "empty@loratune.doctor.training.check_training:1"])
    assert outcome.code == 9
    assert outcome.last.startswith("error[9] 0.0.1 is older than 3.1.6 (CVE-2025-27516")
    assert "fail  jinja2" in outcome.out and "pip install" in outcome.out


def test_a_check_that_raises_is_a_failure_with_the_errors_own_code() -> None:
    def broken() -> str:
        raise MergeError("it does not fit", fix="mend it")

    finding = examine("merge", broken)
    assert (finding.status, finding.detail, finding.code) == (Status.fail, "it does not fit", 7)

    def bug() -> str:
        raise ZeroDivisionError("no")

    assert examine("x", bug).detail == "ZeroDivisionError: no"


def test_blocked_sockets_refuse_and_are_open_again_afterwards() -> None:
    with blocked_sockets():
        with pytest.raises(SecurityError, match="network"):
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        with pytest.raises(SecurityError, match="network"):
            socket.getaddrinfo("example.org", 443)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


def test_a_harmful_variable_is_a_warning_not_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    from loratune.doctor.environment import check_environment

    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    found = {finding.name: finding for finding in check_environment()}
    assert found["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"].status is Status.warn
    assert all(finding.status is not Status.fail for finding in found.values())


@pytest.mark.parametrize("words", [("x",), ("format=yaml",), ("--json",), ("fromat=json",)])
def test_wrong_words_are_errors_of_usage(cli: CommandLine, words: tuple[str, ...]) -> None:
    assert cli("doctor", *words).code == 2
