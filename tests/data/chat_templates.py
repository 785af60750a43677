"""Chat templates of the field's kinds, and those that TRL ships."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .conftest import byte_level_tokenizer

LLAMA2 = """\
{%- if messages[0].role == 'system' -%}
{%- set rest = messages[1:] -%}
{%- set system = '<<SYS>>\\n' + messages[0].content + '\\n<</SYS>>\\n\\n' -%}
{%- else -%}{%- set rest = messages -%}{%- set system = '' -%}{%- endif -%}
{%- for m in rest -%}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('roles must alternate') }}
{%- endif -%}
{%- if m.role == 'user' -%}
{{ bos_token + '[INST] ' + ((system if loop.first else '') + m.content).strip() + ' [/INST]' }}
{%- else -%}{{ ' ' + m.content.strip() + ' ' + eos_token }}{%- endif -%}
{%- endfor -%}"""
MISTRAL = """\
{{- bos_token -}}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- elif m.role == 'assistant' -%}{{ ' ' + m.content + eos_token }}
{%- else -%}{{ raise_exception('only user and assistant') }}{%- endif -%}
{%- endfor -%}"""
PHI4 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}<|im_sep|>{{ m.content }}<|im_end|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_sep|>{% endif %}"
)
SMOLLM2 = """\
{%- for m in messages -%}
{%- if loop.first and m.role != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>' + '\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"""
GRANITE = (
    "{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>{{ m.content }}"
    "<|end_of_text|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start_of_role|>assistant<|end_of_role|>{% endif %}"
)
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_SPECIAL = re.compile(
    r"<\|[^|>\s]+\|>|<｜[^｜>]+｜>|<(?:start|end)_of_\w+>|<\|[a-z_\"]+>|<[a-z_\"]+\|>|\[e~\["
)


def trl_templates() -> dict[str, str]:
    """Name to source, of the templates in the installed package; nothing of it is imported."""
    spec = find_spec("trl")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    paths = [path for folder in folders for path in Path(folder, "chat_templates").glob("*.jinja")]
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(paths)}


def tokenizer_for(template: str) -> Any:
    """A tokenizer that knows the template's special tokens."""
    tokenizer = byte_level_tokenizer(start=False, pad=True, chat_template=template)
    tokenizer.bos_token = "<s>"
    tokenizer.add_tokens(sorted(set(_SPECIAL.findall(template))), special_tokens=True)
    return tokenizer
