"""Ollama's Modelfile: the training template in Go's language, the ends, the system text."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from loratune import files
from loratune.data.rendering import TemplateRenderer
from loratune.data.templates import PromptFormat, placeholders
from loratune.data.tokenizing import RowTokenizer, Tokenizer
from loratune.gguf_files.turn_texts import TurnTexts, strips_spaces, turn_texts

NAME = "Modelfile"


def write_modelfile(
    folder: Path,
    source: Sequence[str],
    tokenizer: Tokenizer,
    prompt_format: PromptFormat | None,
    stops: Sequence[int],
) -> str:
    """Write a Modelfile, or say why there is none.

    Args:
        folder: to write into.
        source: its first lines, ``FROM`` and ``ADAPTER``.
        tokenizer: of the adapted model.
        prompt_format: how training wrote prompts.
        stops: every id that ends an answer.

    Returns:
        What to know about it, or an empty text.
    """
    template, system, note = _template(tokenizer, prompt_format)
    if template is None:
        return f"no Modelfile: {note}"
    lines = [f"# {note}"] if note else []
    lines += [*source, f'TEMPLATE """{template}"""']
    if system:
        lines.append(f'SYSTEM """{system}"""')
    names = tokenizer.convert_ids_to_tokens(list(stops))
    lines += [f"PARAMETER stop {json.dumps(name, ensure_ascii=False)}" for name in names]
    lines.append("PARAMETER temperature 0")
    files.write_text(folder / NAME, "\n".join(lines) + "\n")
    return note


def _template(
    tokenizer: Tokenizer, prompt_format: PromptFormat | None
) -> tuple[str | None, str, str]:
    """The template in Go's language, the system text of training, and a remark."""
    if prompt_format is None:
        return None, "", "the adapter does not say how prompts were written in training"
    if prompt_format.chat_template is None:
        return _plain_template(prompt_format)
    renderer = TemplateRenderer(tokenizer, prompt_format.chat_template, prompt_format.clock)
    start = "".join(tokenizer.convert_ids_to_tokens(RowTokenizer(tokenizer).start_ids))

    def render(turns: object, generation: bool) -> str:
        return renderer.text(turns, generation=generation, tools=None)  # type: ignore[arg-type]

    texts = turn_texts(render, start)
    if texts is None:
        return None, "", "the chat template of training has no equal in Ollama's language"
    system = texts.default_system if '"""' not in texts.default_system else ""
    remark = "The template of training takes spaces around messages away; Ollama leaves them."
    return go_template(texts), system, remark if strips_spaces(render) else ""


def go_template(texts: TurnTexts) -> str:
    """A chat template in the language of Go's ``text/template``, as Ollama runs it.

    Fixed texts are string literals, so that no space of the file counts.
    """
    user, assistant = texts.user, texts.assistant
    before_user = _literal(user[0])
    if texts.system_in_user:
        before_user = "{{ if not (and $.System (eq $i 1)) }}" + before_user + "{{ end }}"
    parts = [
        "{{ if not .System }}" + _literal(texts.without_system) + "{{ end }}"
        if texts.without_system
        else "",
        "{{ range $i, $m := .Messages }}",
        '{{ if eq $m.Role "user" }}' + before_user + "{{ $m.Content }}" + _literal(user[1]),
        '{{ else if eq $m.Role "assistant" }}' + _between(assistant, "$m.Content"),
    ]
    if texts.system is not None:
        parts.append('{{ else if eq $m.Role "system" }}' + _between(texts.system, "$m.Content"))
    return "".join([*parts, "{{ end }}{{ end }}", _literal(assistant[0])])


def _plain_template(prompt_format: PromptFormat) -> tuple[str | None, str, str]:
    """A template of columns: Ollama has one text for it, and the system text."""
    written = prompt_format.template or "{prompt}"
    names = placeholders(written)
    if len(names) != 1 or "{{" in written or "}}" in written:
        return None, "", "the template of training has several columns, Ollama one prompt"
    before, after = written.split("{" + names[0] + "}", 1)
    system = prompt_format.system_template
    parts = _literal(before) + "{{ .Prompt }}" + _literal(after)
    if system and placeholders(system) == ["system"]:
        own = tuple(system.split("{system}", 1))
        parts = "{{ if .System }}" + _between((own[0], own[1]), ".System") + "{{ end }}" + parts
    return parts, "", ""


def _between(texts: tuple[str, str], field: str) -> str:
    return _literal(texts[0]) + "{{ " + field + " }}" + _literal(texts[1])


def _literal(text: str) -> str:
    """A fixed text as a string literal of Go; JSON's are the same."""
    return "{{ " + json.dumps(text, ensure_ascii=False) + " }}" if text else ""
