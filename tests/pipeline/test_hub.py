"""``export push=``: huggingface_hub's own client against a stand-in of the hub on this machine.

The stand-in answers the calls of that client's API as the hub does; the hub itself is not asked.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants
from support.command_line import CommandLine
from support.http_server import serving

from loratune.errors import ConfigError, LoratuneError, StorageError
from loratune.pipeline.hub import check_repository, push

REPOSITORY = "somebody/pirate"


@dataclass
class Hub:
    """What was uploaded to the stand-in.

    Attributes:
        url: its address.
        files: name to content of every committed file.
        status: what it answers with to whoever makes a repository.
        private: whether the repository is; None while there is none.
    """

    url: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    status: int = 200
    private: bool | None = None

    def reply(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        self.calls.append(f"{method} {path}")
        if path.startswith("/large/"):
            self.large[path.removeprefix("/large/")] = body
            return 200, b""
        if path == "/api/repos/create":
            status = self._create(json.loads(body)) if self.status == 200 else self.status
            return status, json.dumps({"url": f"{self.url}/{REPOSITORY}"}).encode()
        if path == f"/api/models/{REPOSITORY}" and self.private is not None:
            return 200, json.dumps({"id": REPOSITORY, "private": self.private}).encode()
        if path == "/api/validate-yaml":
            return 200, json.dumps({"errors": [], "warnings": []}).encode()
        if "/preupload/" in path:
            return 200, json.dumps(
                {"files": [_mode(one) for one in json.loads(body)["files"]]}
            ).encode()
        if path.endswith("/info/lfs/objects/batch"):
            objects = [self._place(one) for one in json.loads(body)["objects"]]
            return 200, json.dumps({"transfer": "basic", "objects": objects}).encode()
        if "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
            address = f"{self.url}/{REPOSITORY}/commit/{'0' * 40}"
            return 200, json.dumps({"commitUrl": address, "commitOid": "0" * 40}).encode()
        return 404, b"{}"

    def _create(self, wanted: dict[str, Any]) -> int:
        if self.private is not None:
            return 409
        self.private = wanted.get("visibility") == "private"
        return 200

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        href = f"{self.url}/large/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            if line["key"] == "lfsFile":
                self.files[value["path"]] = self.large[value["oid"]]


def _mode(wanted: dict[str, Any]) -> dict[str, Any]:
    large = wanted["path"].endswith(".safetensors")
    return {
        "path": wanted["path"],
        "uploadMode": "lfs" if large else "regular",
        "shouldIgnore": False,
    }


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    with serving(hub.reply) as url:
        hub.url = url
        yield hub


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, cli: CommandLine) -> Path:
    here = tmp_path_factory.mktemp("pushed")
    cli.succeeds(
        "train",
        "recipe=smoke",
        "trainer.steps=2",
        "stages=[train]",
        f"out={here / 'run'}",
        cwd=here,
    )
    return here / "run"


@pytest.fixture
def logged_in(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub as `HF_ENDPOINT`, `HF_TOKEN` and the like set it up when it is imported."""
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def test_every_file_of_the_export_is_uploaded_byte_by_byte(
    run: Path, hub: Hub, tmp_path: Path
) -> None:
    environment = {
        "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    }  # fmt: skip
    out = tmp_path / "out"
    words = ["export", f"run={run}", f"out={out}", f"push={REPOSITORY}"]
    done = subprocess.run(
        [sys.executable, "-m", "loratune", *words],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors"} <= hub.files.keys()
    content = hub.files["adapter_model.safetensors"]
    assert list(hub.large) == [hashlib.sha256(content).hexdigest()]
    assert f"pushed: {hub.url}/{REPOSITORY}/commit/" in done.stdout
    assert hub.private is True


def test_a_dry_run_names_the_files_and_sends_nothing(
    run: Path, cli: CommandLine, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nowhere = {"HF_ENDPOINT": "http://127.0.0.1:9"}
    done = cli.succeeds(
        "export", f"run={run}", f"out={out}", f"push={REPOSITORY}", "push_dry_run=true",
        environment=nowhere,
    )  # fmt: skip
    assert all(f"  {path.name}: " in done.out for path in out.iterdir())
    assert "nothing was sent" in done.out


@pytest.mark.parametrize("private", [True, False])
@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.usefixtures("logged_in")
def test_a_repository_is_public_only_where_that_was_asked_for(
    private: bool, run: Path, hub: Hub
) -> None:
    push(run / "adapter", REPOSITORY, private=private)
    assert hub.private is private and hub.files
    hub.files.clear()
    push(run / "adapter", REPOSITORY, private=private)  # it exists now
    assert hub.private is private and hub.files


@pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # huggingface_hub's own
@pytest.mark.usefixtures("logged_in")
def test_nothing_goes_to_a_public_repository_unasked(run: Path, hub: Hub) -> None:
    hub.private = False
    with pytest.raises(ConfigError, match=r"exists and is public; push; .*push_private=false"):
        push(run / "adapter", REPOSITORY)
    assert hub.files == {} and not hub.large
    push(run / "adapter", REPOSITORY, private=False)
    assert hub.files


@pytest.mark.parametrize(("status", "code"), [(401, 2), (403, 2), (500, 8)])
@pytest.mark.usefixtures("logged_in")
def test_a_refusal_is_one_line_without_the_token(
    status: int, code: int, run: Path, hub: Hub
) -> None:
    hub.status = status
    with pytest.raises(LoratuneError) as refused:
        push(run / "adapter", REPOSITORY)
    assert refused.value.exit_code == code and len(refused.value.lines()) == 1
    assert str(status) in str(refused.value) and "stays in" in str(refused.value)
    assert "hf_test" not in str(refused.value)
    assert hub.files == {}


@pytest.mark.usefixtures("logged_in")
def test_without_a_network_or_offline_it_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(StorageError, match="cannot be reached"):
        push(run / "adapter", REPOSITORY)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE"):
        push(run / "adapter", REPOSITORY)


@pytest.mark.parametrize("name", ["pirate", "a/b/c", "somebody/pi rate", "/pirate"])
def test_a_name_that_is_not_a_repository_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a repository"):
        check_repository(name)


def test_a_wrong_name_is_refused_before_anything_is_written(
    run: Path, cli: CommandLine, tmp_path: Path
) -> None:
    done = cli("export", f"run={run}", f"out={tmp_path / 'out'}", "push=pirate")
    assert done.code == 2 and "push=USER/NAME" in done.last
    assert not (tmp_path / "out").exists()
    done = cli("export", f"run={run}", f"out={tmp_path / 'out'}", "push_dry_run=true")
    assert done.code == 2 and "nothing to push" in done.last
