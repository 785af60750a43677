"""``generate``: the same reader, checks and prompts as training, and answers that end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import CommandLine
from support.tiny_models import save_base, tiny_opt, tiny_tokenizer

from loratune.config.schema import DataConfig, RowFormat
from loratune.data.encode import Encoder
from loratune.data.formats import parse_question, parse_row, question_row
from loratune.data.prepare import prepare_data
from loratune.data.rows import Row
from loratune.data.templates import INSTRUCTION_TEMPLATE, PromptFormat
from loratune.data.tokenizing import RowTokenizer
from loratune.errors import ConfigError
from loratune.generation import Sampling, answer_text, generate_answers, stop_ids
from loratune.stages.evaluate import references

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = PromptFormat(RowFormat.messages, chat_template=CHAT)


def tokenizer_with(*special: str) -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": list(special)})
    return tokenizer


# -- what is asked -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("columns", "prompt_format"),
    [
        (
            {"messages": [
                {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "SECRET"},
            ]},
            MESSAGES,
        ),
        ({"prompt": "Who?", "completion": "SECRET"},
         PromptFormat(RowFormat.prompt, "{prompt}", answer="completion")),
        ({"instruction": "Who?", "output": "SECRET"},
         PromptFormat(RowFormat.instruction, INSTRUCTION_TEMPLATE, answer="output")),
    ],
)  # fmt: skip
def test_a_reference_answer_never_reaches_the_prompt(
    columns: dict[str, Any], prompt_format: PromptFormat
) -> None:
    tokenizer = tokenizer_with("<|end|>")
    encoder = Encoder(RowTokenizer(tokenizer), prompt_format, DataConfig())
    row = Row(columns, "rows.jsonl:1")
    asked = encoder.prompt_ids(parse_question(row, prompt_format))
    assert "SECRET" not in tokenizer.decode(asked) and "Who?" in tokenizer.decode(asked)
    trained_on = parse_row(row, prompt_format)
    assert trained_on is not None
    [trained] = encoder.encode([trained_on], max_length=512, overlong=DataConfig().overlong).rows
    assert asked == trained.input_ids[: trained.prompt_length]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[Any]], Path]:
    """Makes a run of one step on rows, on a model with a chat template."""
    from loratune.cli.dispatch import dispatch

    base = tmp_path_factory.mktemp("base")
    save_base(base, tiny_opt(max_position_embeddings=400))
    tokenizer = tokenizer_with("<|end|>")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(base)

    def make(rows: list[Any]) -> Path:
        folder = tmp_path_factory.mktemp("run")
        write(folder / "rows.jsonl", rows * 2)
        words = ["data=local", f"data.path={folder}/rows.jsonl", "data.eval_fraction=0"]
        words += [f"model.path={base}", "stages=[train]", "trainer.steps=1", f"out={folder}/out"]
        assert dispatch("train", ["recipe=smoke", *words]) == 0
        return folder / "out"

    return make


def write(path: Path, rows: list[Any]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def chat(run: Callable[[list[Any]], Path]) -> Path:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    return run([{"messages": turns}])


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"content": "no role"}]},
        {"messages": "text"},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": []},
        {"other": "no messages"},
        {"messages": [{"role": "assistant", "content": "nothing was asked"}]},
    ],
)
def test_a_broken_row_is_one_line_with_its_place(cli: CommandLine, chat: Path, row: Any) -> None:
    good = {"messages": [{"role": "user", "content": "Who?"}]}
    write(Path("asked.jsonl"), [good, row])
    outcome = cli("generate", f"run={chat}", "prompts=asked.jsonl", "max_new_tokens=1")
    assert outcome.code == 3 and not outcome.has_traceback and not outcome.out
    [line] = outcome.errors
    assert "asked.jsonl:2" in line


def test_every_row_of_a_file_is_answered_and_a_prompt_is_shown_as_typed(
    cli: CommandLine, chat: Path
) -> None:
    good = {"messages": [{"role": "user", "content": "Who?"}]}
    write(Path("asked.jsonl"), [good, good])
    words = ("max_new_tokens=1", "base=false")
    lines = cli.succeeds("generate", f"run={chat}", "prompts=asked.jsonl", *words).out.splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == [good, good]
    one = cli.succeeds("generate", f"run={chat}", "prompt=Who?", "system=Be brief", *words).out
    assert json.loads(one)["prompt"] == "Who?"
    assert json.loads(one).keys() == {"prompt", "adapted"}


def test_an_instruction_adapter_is_asked_by_prompt(
    cli: CommandLine, run: Callable[[list[Any]], Path]
) -> None:
    out = run([{"instruction": "Add 1 and 2", "output": "3"}])
    cli.succeeds("generate", f"run={out}", "prompt=Add 1 and 3", "max_new_tokens=1")
    cli.succeeds("generate", f"run={out}", "prompt=x", "system=y", "max_new_tokens=1")


def test_a_system_text_is_refused_where_prompts_have_no_place_for_it(
    cli: CommandLine, run: Callable[[list[Any]], Path]
) -> None:
    out = run([{"prompt": "Add 1 and 2", "completion": "3"}])
    error = cli.refuses("generate", f"run={out}", "prompt=x", "system=y")
    assert "has no place for a system text" in error


# -- prompt= and system= under each format -------------------------------------------------


def template(text: str) -> PromptFormat:
    return PromptFormat(RowFormat.prompt, text, answer="completion")


def test_a_prompt_fills_the_one_placeholder() -> None:
    assert question_row("x", None, template("Q: {question}")).columns == {"question": "x"}
    filled = question_row("x", "s", template("{system}\n{question}")).columns
    assert filled == {"question": "x", "system": "s"}
    turns = question_row("x", "s", MESSAGES).columns["messages"]
    assert [turn["role"] for turn in turns] == ["system", "user"]


@pytest.mark.parametrize(
    ("text", "system", "said"),
    [
        ("{a} {b}", None, "fills one placeholder, the adapter's template has 'a', 'b'"),
        ("{system} {b}", None, "system=TEXT"),
        ("no place", None, "no columns"),
        ("{a}", "s", "place for a system text"),
    ],
)
def test_what_a_prompt_cannot_fill_is_said(text: str, system: str | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        question_row("x", system, template(text))


def test_a_system_text_needs_a_format_that_is_recorded() -> None:
    with pytest.raises(ConfigError, match="system text"):
        question_row("x", "s", None)


# -- where answers end ---------------------------------------------------------------------


class Scripted:
    """A model that writes the same ids after every prompt."""

    def __init__(self, *ids: int) -> None:
        self.ids = ids
        self.model = tiny_opt()
        self.config, self.parameters = self.model.config, self.model.parameters
        self.generation_config = self.model.generation_config
        self.ends: list[int] = []

    def named_modules(self) -> Any:
        return self.model.named_modules()

    def generate(self, input_ids: Any, generation_config: Any, **_: Any) -> Any:
        self.ends = generation_config.eos_token_id
        written = torch.tensor([self.ids] * len(input_ids))
        return torch.cat([input_ids, written], dim=1)


def test_generation_stops_at_every_end_that_anybody_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("loratune.generation.probe_cache", lambda model: True)
    tokenizer = tokenizer_with("<|end|>", "<|call|>")
    end, call = tokenizer.convert_tokens_to_ids(["<|end|>", "<|call|>"])
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.tool_calls %}"
        "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
        "{% endfor %}<|call|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    letters = tokenizer("ab", add_special_tokens=False)["input_ids"]
    for stop in (tokenizer.eos_token_id, 40, 41, end, call):
        model = Scripted(*letters, stop, *letters)
        model.config.eos_token_id = [40]
        model.generation_config.eos_token_id = [41]
        stops = stop_ids(model, tokenizer, PromptFormat(RowFormat.messages, chat_template=template))
        assert {stop} <= set(stops) == {tokenizer.eos_token_id, 40, 41, end, call}
        [answer] = generate_answers(model, tokenizer, [[5, 6]], Sampling(), 2, stops)
        assert answer == "ab" and model.ends == stops


def test_the_models_own_ends_survive_loading(tmp_path: Path) -> None:
    from loratune.models.load import load_model

    save_base(tmp_path / "base", tiny_opt())
    (tmp_path / "base/generation_config.json").write_text(
        json.dumps({"eos_token_id": [1, 7], "do_sample": True, "temperature": 0.3})
    )
    model: Any = load_model(tmp_path / "base", torch.float32)
    assert model.generation_config.eos_token_id == [1, 7]
    assert not model.generation_config.do_sample
    assert stop_ids(model, tiny_tokenizer(), None) == [1, 7]


@pytest.mark.parametrize("content", [None, "", "x,y"])
def test_a_file_that_cannot_be_asked_is_named_by_the_setting(
    cli: CommandLine, chat: Path, content: str | None
) -> None:
    name = "asked.txt" if content else "asked.jsonl"
    if content is not None:
        Path(name).write_text(content)
    for words in (["generate", f"prompts={name}"], ["evaluate", f"data.eval_path={name}"]):
        outcome = cli(words[0], f"run={chat}", words[1])
        assert outcome.code == 3 and not outcome.has_traceback
        assert f"; {words[1].partition('=')[0]}" in outcome.text and "data.path" not in outcome.text


# -- what is compared ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["text", "parse"])
def test_special_tokens_in_answers_are_compared_on_both_sides(kind: str) -> None:
    tokenizer = tokenizer_with("<file_sep>")
    Path("rows.jsonl").write_text('{"prompt": "q:", "completion": " <file_sep>main.py "}\n')
    config = DataConfig(eval_path="rows.jsonl", special_tokens_in_text=kind)  # type: ignore[arg-type]
    data = prepare_data(config, tokenizer, len(tokenizer), 0)
    [prompt] = data.prompts
    [row] = data.eval
    stops = [tokenizer.eos_token_id]
    written = answer_text(tokenizer, row.input_ids[row.prompt_length :], stops)
    assert references(prompt, tokenizer, stops) == ("<file_sep>main.py",)
    assert written.strip() in references(prompt, tokenizer, stops)


def test_a_row_that_was_cut_short_is_compared_with_its_whole_text() -> None:
    Path("rows.jsonl").write_text('{"prompt": "q:", "completion": "abcdefgh"}\n')
    config = DataConfig(eval_path="rows.jsonl", max_length=6)
    data = prepare_data(config, tiny_tokenizer(), 300, 0)
    assert references(data.prompts[0], tiny_tokenizer(), [1]) == ("abcdefgh",)


def test_evaluation_says_where_answers_end_and_what_is_compared(
    cli: CommandLine, chat: Path
) -> None:
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}]
    write(Path("rows.jsonl"), [{"messages": turns}])
    words = ("data.eval_path=rows.jsonl", "format=json", "evaluate.generate=true")
    scores = json.loads(cli.succeeds("evaluate", f"run={chat}", *words).out)
    assert scores["stop_tokens"] == ["</s>", "<|end|>"]
    assert "stop token" in scores["compared"]
    assert scores["samples"][0]["reference"] == "I."
    assert scores["adapted"]["exact_match"] is not None


def test_the_merged_folder_names_every_end(chat: Path, tmp_path: Path) -> None:
    from loratune.cli.dispatch import dispatch

    base = base_of(chat)
    before = {"eos_token_id": [1, 7], "do_sample": True, "temperature": 0.3}
    (base / "generation_config.json").write_text(json.dumps(before))
    assert dispatch("merge", [f"run={chat}", f"out={tmp_path / 'merged'}"]) == 0
    merged = json.loads((tmp_path / "merged/generation_config.json").read_text())
    end = tokenizer_with("<|end|>").convert_tokens_to_ids("<|end|>")
    assert merged == {**before, "eos_token_id": sorted({1, 7, end})}
    assert dispatch("verify", [str(tmp_path / "merged")]) == 0


def test_a_merged_folder_without_generation_settings_gets_its_ends(
    chat: Path, tmp_path: Path
) -> None:
    from transformers import GenerationConfig

    from loratune.cli.dispatch import dispatch

    (base_of(chat) / "generation_config.json").unlink(missing_ok=True)
    assert dispatch("merge", [f"run={chat}", f"out={tmp_path / 'merged'}"]) == 0
    merged = GenerationConfig.from_pretrained(tmp_path / "merged")
    config = json.loads((base_of(chat) / "config.json").read_text())
    end = tokenizer_with("<|end|>").convert_tokens_to_ids("<|end|>")
    assert merged.eos_token_id == sorted({config["eos_token_id"], end})
    assert (merged.bos_token_id, merged.pad_token_id) == (
        config["bos_token_id"],
        config["pad_token_id"],
    )


def test_greedy_answers_of_a_base_that_samples_are_greedy_and_silent(chat: Path, cli) -> None:
    words = ("generate", f"run={chat}", "prompt=Who?", "max_new_tokens=12")
    settings = base_of(chat) / "generation_config.json"
    settings.unlink(missing_ok=True)
    plain = cli.succeeds(*words)
    hot = {"do_sample": True, "temperature": 9.0, "top_k": 400, "top_p": 0.9}
    settings.write_text(json.dumps({**hot, "repetition_penalty": 5.0, "eos_token_id": 1}))
    sampled = [cli.succeeds(*words) for _ in range(2)]
    settings.unlink()
    assert [one.out for one in sampled] == [plain.out] * 2
    assert all(one.err == plain.err for one in sampled)


def base_of(run: Path) -> Path:
    """The folder of a run's base."""
    recipe = (run / "recipe.yaml").read_text()
    line = next(one for one in recipe.splitlines() if one.strip().startswith("path: /"))
    return Path(line.split(": ", 1)[1])
