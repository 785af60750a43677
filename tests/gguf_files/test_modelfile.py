"""Ollama's template writes what the chat template of training writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import tiny_tokenizer

from gguf_files.go_templates import ollama, render
from loratune.config.schema import RowFormat
from loratune.data.templates import PromptFormat
from loratune.gguf_files.modelfile import NAME, write_modelfile

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are \"helpful\".<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA_3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 "
    "%}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}{% for message in messages %}{% set role = 'model' if message['role'] == "
    "'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' + message['content'] "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA_3 = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content']"
    " + '\n\n' %}{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = "
    "messages %}{% endif %}{% for message in turns %}{% set role = 'model' if message['role'] == "
    "'assistant' else message['role'] %}{{ '<start_of_turn>' + role + '\n' + (first if loop.first "
    "else '') + message['content'] + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
DATED = CHATML.replace('You are \\"helpful\\".', "x").replace("{% for", "{{ '[2026] ' }}{% for", 1)
TEMPLATES = {
    "chatml": CHATML, "llama 3": LLAMA_3, "gemma": GEMMA, "gemma 3": GEMMA_3, "dated": DATED,
}  # fmt: skip
ASKED = {"role": "user", "content": 'What is {{ "x" }}\nand \\n?'}
ANSWERED = {"role": "assistant", "content": "It's <b>y</b> –\n\n1."}
AGAIN = {"role": "user", "content": "Und 'z' 😀?"}
SYSTEM = {"role": "system", "content": 'Be "brief".'}


def written(tmp_path: Path, chat: str | None, **columns: Any) -> tuple[str, dict[str, str]]:
    """The remark, and the Modelfile's parts."""
    chosen = PromptFormat(RowFormat.messages, chat_template=chat)
    if chat is None:
        chosen = PromptFormat(RowFormat.prompt, **columns)
    note = write_modelfile(tmp_path, ["FROM ./model.gguf"], tiny_tokenizer(), chosen, [1])
    path = tmp_path / NAME
    if not path.exists():
        return note, {}
    text = path.read_text(encoding="utf-8")
    parts = {"all": text}
    for key in ("TEMPLATE", "SYSTEM"):
        if f'{key} """' in text:
            parts[key] = text.split(f'{key} """', 1)[1].split('"""', 1)[0]
    return note, parts


@pytest.mark.parametrize("name", TEMPLATES)
def test_ollama_sends_what_training_wrote(name: str, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    _, parts = written(tmp_path, TEMPLATES[name])
    conversations = [[ASKED], [ASKED, ANSWERED, AGAIN]]
    if name != "gemma":
        conversations += [[SYSTEM, *turns] for turns in conversations]
    for turns in conversations:
        expected = tokenizer.apply_chat_template(
            turns, chat_template=TEMPLATES[name], add_generation_prompt=True, tokenize=False
        )
        assert ollama(parts["TEMPLATE"], turns) == expected


def test_the_system_text_of_the_template_is_the_modelfile_s(tmp_path: Path) -> None:
    note, parts = written(tmp_path, CHATML)
    assert note == ""
    assert parts["SYSTEM"] == 'You are "helpful".'
    assert parts["all"].startswith("FROM ./model.gguf\n")
    assert 'PARAMETER stop "</s>"' in parts["all"].splitlines()
    own = {"role": "system", "content": parts["SYSTEM"]}  # Ollama puts it first
    assert ollama(parts["TEMPLATE"], [own, ASKED]) == ollama(parts["TEMPLATE"], [ASKED])


def test_spaces_that_only_the_template_takes_away_are_said(tmp_path: Path) -> None:
    note, parts = written(tmp_path, LLAMA_3)
    assert "spaces around messages" in note
    assert parts["all"].startswith(f"# {note}\n")


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ loop.index }}: {{ m['content'] }}\n{% endfor %}A:",
        "{{ messages[-1]['content'] }}{% if add_generation_prompt %} A:{% endif %}",
        CHATML.replace("message['content']", "message['content'] | upper"),
    ],
)
def test_a_template_that_is_more_than_turns_gets_no_modelfile(
    template: str, tmp_path: Path
) -> None:
    note, parts = written(tmp_path, template)
    assert note.startswith("no Modelfile: the chat template of training")
    assert not parts


def test_a_template_of_columns_takes_the_prompt_and_the_system_text(tmp_path: Path) -> None:
    _, parts = written(
        tmp_path, None, template='Q: {question}\n"A":', system_template="S: {system}\n"
    )
    template = parts["TEMPLATE"]
    assert render(template, {"System": "", "Prompt": "Why {x}?"}) == 'Q: Why {x}?\n"A":'
    assert render(template, {"System": "Yo", "Prompt": "Why?"}) == 'S: Yo\nQ: Why?\n"A":'


def test_several_columns_have_no_place_in_ollama(tmp_path: Path) -> None:
    note, parts = written(tmp_path, None, template="{a} and {b}")
    assert "several columns" in note
    assert not parts
