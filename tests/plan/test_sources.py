"""Where each value of a composed recipe came from."""

from __future__ import annotations

import json
from pathlib import Path

from loratune.cli.dispatch import dispatch


def sources(capsys, *words: str) -> dict[str, dict]:
    capsys.readouterr()
    assert dispatch("plan", [*words, "time=false", "format=json"]) == 0
    content: dict[str, dict] = json.loads(capsys.readouterr().out)["values"]
    return content


def test_each_value_names_the_last_file_that_set_it_or_the_command_line(capsys):
    values = sources(capsys, "recipe=demo", "adapter=vera", "trainer.batch_size=4")
    assert values["trainer.batch_size"] == {"value": 4, "source": "command line"}
    assert values["trainer.steps"]["source"] == "recipe/demo.yaml"
    assert values["trainer.clip_norm"]["source"] == "trainer/default.yaml"
    assert values["adapter.rank"] == {"value": 256, "source": "adapter/vera.yaml"}
    assert values["adapter.kernel"]["source"] == "default"
    assert values["data.max_length"]["source"] == "data/demo.yaml"


def test_a_users_file_is_named_by_its_own_path(capsys):
    own = Path("recipes/adapter")
    own.mkdir(parents=True)
    (own / "wide.yaml").write_text("defaults: [lora, _self_]\nrank: 64\n", encoding="utf-8")
    values = sources(capsys, "recipe=demo", "adapter=wide")
    assert values["adapter.rank"] == {"value": 64, "source": "recipes/adapter/wide.yaml"}
    assert values["adapter.init"]["source"] == "adapter/lora.yaml"


def test_secrets_are_not_shown(capsys):
    values = sources(capsys, "recipe=demo", "name=hf_abcdefghijklmnopqrstuvwx")
    assert "hf_abc" not in json.dumps(values)
