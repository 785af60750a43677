"""What llama.cpp and loratune are both asked and given to tokenize, and the prompts made of it."""

from __future__ import annotations

from collections.abc import Sequence

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.encode import Encoder
from loratune.data.formats import parse_question, question_row
from loratune.data.rows import Row
from loratune.data.templates import PromptFormat, placeholders
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import ConfigError

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "I lost my card. What should I do?",
    "How do I boil an egg?",
    "Write a sentence about the sea.",
    "What is 12 + 30?",
    "Why is the sky blue?",
    "My transfer of 250 euros has not arrived yet.",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "Give me a name for a cat.",
    "Is 17 a prime number?",
    "Explain gravity to a child.",
    "What does HTTP stand for?",
    "Tell me a short joke.",
    "How many days has a leap year?",
    "Write a Python function that adds two numbers.",
    "What colour do blue and yellow make?",
    "List the planets.",
    "Where can I change my PIN?",
)
TEXTS = (
    "Plain words, and a dot.",
    "Numbers: 7, 42, 1999, 1234567 and 3.14159; x = 10^-6",
    "it's we'll I'M YOU'RE they'd 'tis",
    "  two spaces,\ttab\n\nnew lines \n  and more   ",
    "MiXeD_case snake_case camelCase #hashtag @name http://a.b/c?d=e&f=%20",
    "def f(a, b):\n    return {a: [b, (1, 2)]}  # comment\n",
    "Grüße aus Köln, à bientôt, ¿qué tal?, naïve Straße",
    "中文字符 日本語テキスト 한국어 русский עברית العربية हिन्दी ไทย",
    "emoji 😀👩‍👩‍👧 → ≠ ∑ ½ ² Ⅻ …—“quotes”",
)


def prompt_ids(
    tokenizer: RowTokenizer, prompt_format: PromptFormat | None, data: DataConfig
) -> list[list[int]]:
    """Every question as training would have written it.

    Args:
        tokenizer: of the model.
        prompt_format: of training; ``None`` asks as plain text.
        data: how special tokens and reasoning are written.
    """
    chosen = prompt_format or PromptFormat(RowFormat.text)
    encoder = Encoder(tokenizer, chosen, data)
    rows = [_row(question, chosen) for question in QUESTIONS]
    return [encoder.prompt_ids(parse_question(row, chosen)) for row in rows]


def _row(question: str, prompt_format: PromptFormat) -> Row:
    try:
        return question_row(question, None, prompt_format)
    except ConfigError:  # several placeholders: each gets the question
        names: Sequence[str] = placeholders(prompt_format.template or "")
        return Row(dict.fromkeys(names, question), "question")
