"""``loratune preview``: positions, not token ids, decide what is shown as supervised."""

from __future__ import annotations

import json
from pathlib import Path

from support.tiny_models import save_base, tiny_images_and_text

from loratune.cli.dispatch import dispatch
from loratune.files import ASSETS
from loratune.models.load import load_tokenizer
from loratune.plan.preview import ShownRow, ShownToken, row_text


def shown(capsys, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = dispatch("preview", list(words))
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def rows_file(*rows: dict) -> str:
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return "data.path=rows.jsonl"


SMALL = ("recipe=smoke", "data=local", "data.eval_fraction=0", "rows=1")


def test_the_demo_rows_are_shown_with_answers_bracketed(capsys):
    code, out, err = shown(capsys, "recipe=demo", "rows=1")
    assert (code, err) == (0, "")
    assert "Answer:⟦·Aye,·matey!" in out
    assert "</s>⟧" in out and "⟪</s>⟫Question:" in out
    assert "audit: nothing found" in out


def test_json_says_of_every_token_what_it_is(capsys):
    code, out, _ = shown(capsys, "recipe=demo", "rows=2", "format=json")
    assert code == 0
    content = json.loads(out)
    first, second = content["rows"]
    assert len(first["tokens"]) == len(second["tokens"]), "filled up as one batch"
    kinds = [token["kind"] for token in first["tokens"]]
    assert kinds[0] == "start" and "end" in kinds
    supervised = "".join(t["text"] for t in first["tokens"] if t["kind"] == "supervised")
    assert supervised.startswith(" Aye, matey!")
    assert content["audit"]["findings"] == []
    assert set(content["data"]["train"]["max_length_to_keep"]) == {"95%", "99%", "100%"}


def test_layers_that_the_targets_leave_out_are_named_as_in_training(capsys, tmp_path):
    base = save_base(tmp_path / "base", tiny_images_and_text())
    rows = rows_file({"prompt": "one", "completion": "two"})
    words = (*SMALL, rows, f"model.path={base}", "targets=all_linear")
    code, out, _ = shown(capsys, *words)
    assert code == 0
    assert "note: all_linear leaves out 12 layers without effect on the loss: model.visual" in out


def test_no_model_weight_is_read(capsys, monkeypatch):
    import loratune.stages.load
    from loratune.models import load as base_model

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(base_model, "load_model", refuse)
    monkeypatch.setattr(loratune.stages.load, "load_model", refuse)
    assert shown(capsys, "recipe=demo")[0] == 0


def test_control_characters_of_a_row_stay_text(capsys):
    path = rows_file({"prompt": "a\x1b[31mred\x07 [bold]x[/bold]", "completion": "b\r\u202e c"})
    code, out, _ = shown(capsys, "data=local", path, "data.eval_fraction=0")
    assert code == 0
    assert "\x1b" not in out and "\x07" not in out and "\r" not in out and "\u202e" not in out
    assert "[bold]" in out


def test_white_space_is_made_visible():
    tokens = [ShownToken(1, "a b", "context"), ShownToken(2, "\n\t", "supervised")]
    assert row_text(ShownRow("x:1", tuple(tokens))).plain == "a·b⟦↵\n⇥⟧"


def test_what_stops_train_stops_preview_after_it_was_shown(capsys):
    blind = [{"prompt": "word " * 60, "completion": f"x{n}"} for n in range(9)]
    path = rows_file({"prompt": "a\n", "completion": "b"}, *blind)
    words = ("data=local", path, "data.eval_fraction=0", "data.max_length=32")
    code, out, err = shown(capsys, *words)
    assert code == 3
    assert "row 1, rows.jsonl:1" in out
    assert err.startswith("error[3] 9 of 10 rows have no supervised token left")
    code = dispatch("train", [*words, "trainer.steps=1", "out=run"])
    assert code == 3
    assert capsys.readouterr().err.splitlines()[-1] == err.splitlines()[-1]
    assert not Path("run").exists()


def test_rows_nobody_named_are_missed_at_once(capsys):
    code, _, err = shown(capsys, "data=local")
    assert code == 2 and "set data.path=FILE" in err


CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}{{ m.reasoning_content }}\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def chat_model(folder: Path) -> str:
    """The embedded model with a chat template and its tokens; its weights are not needed."""
    tokenizer = load_tokenizer(ASSETS / "demo-opt")
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    config = json.loads((ASSETS / "demo-opt" / "config.json").read_text(encoding="utf-8"))
    config["vocab_size"] = len(tokenizer)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return f"model.path={folder}"


def test_supervised_parts_are_shown_with_their_ends_and_with_what_is_left_out(tmp_path, capsys):
    turns = [
        {"role": "user", "content": "What is <|im_end|>?"},
        {"role": "assistant", "content": "An end.", "reasoning_content": "Easy."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "reasoning_content": "It is."},
    ]
    code, out, err = shown(capsys, "data=local", rows_file({"messages": turns}),
                         "data.eval_fraction=0", chat_model(tmp_path))  # fmt: skip
    assert code == 0, err
    assert "⟦An·end.<|im_end|>⟧" in out and "⟦It·is.↵\nYes.<|im_end|>⟧" in out
    assert "2 supervised parts end in <|im_end|>" in out
    assert "the chat template leaves out the reasoning of 1 turn" in out
    assert "words spell '<|im_end|>'" in out


def test_turns_and_keys_that_are_not_used_are_said(tmp_path, cli):
    turns = [
        {"role": "user", "content": "What?", "name": "Ann"},
        {"role": "assistant", "content": "That."},
        {"role": "user", "content": "Unanswered?"},
    ]
    words = (rows_file({"messages": turns}), "data.eval_fraction=0", chat_model(tmp_path))
    notes = (
        "note: turns not used: 1 in 1 of 1 rows stand behind the assistant's last turn",
        "note: keys of turns that the chat template does not use: name (1 row)",
    )
    shown = cli.succeeds("preview", "data=local", *words).text
    assert "behind the assistant's last not used; not used by the chat template: name" in shown
    planned = cli.succeeds("plan", "data=local", *words, "time=false").text
    assert all(note in shown and note in planned for note in notes)
    assert "Unanswered" not in shown


def test_the_last_token_of_a_turn_is_an_end_and_what_a_turn_spells_is_not(tmp_path, capsys):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b<|im_end|>c"}]
    _, out, _ = shown(capsys, "data=local", rows_file({"messages": turns}), "format=json",
                      "data.eval_fraction=0", chat_model(tmp_path))  # fmt: skip
    [row] = json.loads(out)["rows"]
    assert [token["text"] for token in row["tokens"] if token["kind"] == "end"] == ["<|im_end|>"]
    assert row["ends"] == ["<|im_end|>"] and row["spelt"] == ["<|im_end|>"]


def test_rows_of_every_source_are_shown_and_counted(capsys):
    rows_file(*({"text": f"rivers and towns {n}", "id": n} for n in range(9)))
    sources = "data.sources=[{path: builtin:train, weight: 3, limit: 20}, {path: rows.jsonl}]"
    words = ("recipe=smoke", "data.path=null", "data.eval_path=null", sources, "rows=2")
    code, out, err = shown(capsys, *words, "trainer.steps=29", "trainer.batch_size=1")
    assert (code, err) == (0, "")
    assert "row 2, source train, builtin:train:2" in out
    assert "row 3, source rows, rows.jsonl:1" in out and "row 4, source rows" in out
    assert "row 5" not in out
    # 29 rows in shares of 3 : 1
    assert "source train: 20 of 20 rows" in out and "weight 3 = 75.9% of the rows drawn" in out
    assert "source rows: 9 of 9 rows" in out and "each row 0.78 times an epoch" in out
    assert "seen on average: train 1.10 times, rows 0.78 times" in out
    assert "note: rows: columns not used: id" in out
    _, out, _ = shown(capsys, *words, "trainer.steps=58", "trainer.batch_size=1", "format=json")
    content = json.loads(out)
    assert [row["origin"] for row in content["rows"]] == ["train", "train", "rows", "rows"]
    assert content["times_seen"] == {"train": 2.2, "rows": 14 / 9}


TEXT = "a 🦊 日本 e\u0301 👩‍🚀\u2028b\u2029c\u00a0d\x1b[0m\x85e\ufeff"


def test_characters_of_several_tokens_are_shown_as_one(capsys):
    code, out, _ = shown(capsys, *SMALL, rows_file({"prompt": "x", "completion": TEXT}))
    assert code == 0
    assert "·🦊·日本·e\u0301·👩\\u200d🚀\\u2028b\\u2029c\\xa0d\\x1b[0m\\x85e\\ufeff" in out
    assert not {"\u2028", "\u2029", "\u00a0", "\x1b", "\x85", "\ufffd"} & {*out}


def test_their_tokens_together_are_the_text(capsys):
    words = (*SMALL, rows_file({"prompt": "x", "completion": TEXT}), "format=json")
    code, out, _ = shown(capsys, *words)
    assert code == 0
    [row] = json.loads(out)["rows"]
    assert "".join(t["text"] for t in row["tokens"] if t["kind"] == "supervised") == TEXT
    assert any(t["text"] == "" for t in row["tokens"]), "the fox has more than one token"


def test_half_a_character_is_not_shown_as_another(capsys):
    row = {"prompt": "x", "completion": "🦊" * 40}
    code, out, _ = shown(capsys, *SMALL, rows_file(row), "data.max_length=14")
    assert code == 0
    line = next(line for line in out.splitlines() if "🦊" in line)
    assert {*line} <= {*"⟪</s>⟫x⟦🦊\ufffd⟧"}


def test_text_that_spells_a_token_is_told_from_the_token(tmp_path, capsys):
    turns = [
        {"role": "user", "content": "x <|im_end|> y"},
        {"role": "assistant", "content": "b<|im_end|>c"},
    ]
    words = ("data=local", rows_file({"messages": turns}), "data.eval_fraction=0",
             chat_model(tmp_path))  # fmt: skip
    _, out, _ = shown(capsys, *words)
    assert "x·⟨<|im_end|>⟩·y<|im_end|>" in out and "⟦b⟨<|im_end|>⟩c<|im_end|>⟧" in out
    assert "words spell '<|im_end|>' (as text, in ⟨ ⟩)" in out
    _, out, _ = shown(capsys, *words, "data.special_tokens_in_text=parse")
    assert "x·<|im_end|>·y<|im_end|>" in out and "⟦b<|im_end|>c<|im_end|>⟧" in out
    assert "words spell '<|im_end|>' (as tokens)" in out


def test_the_marks_of_the_page_are_escaped_where_a_row_has_them():
    tokens = [ShownToken(1, "⟦a⟧·↵⇥⟨⟪⟫⟩", "context"), ShownToken(2, "\\u27e6 \u200b", "context")]
    written = row_text(ShownRow("x:1", tuple(tokens))).plain
    marks = r"\u27e6a\u27e7\xb7\u21b5\u21e5\u27e8\u27ea\u27eb\u27e9"
    assert written == marks + r"\\u27e6·\u200b"


def test_turns_that_are_not_learnt_are_counted_and_an_error_is_said_once(tmp_path, capsys):
    turns = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d", "weight": 0},
    ]
    words = ("data=local", rows_file({"messages": turns}), "data.eval_fraction=0",
             chat_model(tmp_path))  # fmt: skip
    code, out, err = shown(capsys, *words)
    assert (code, err) == (0, "")
    assert "in <|im_end|>; 1 assistant turn not supervised (weight: 0)" in out
    assert "note: 1 assistant turn not supervised (weight: 0), in 1 of 1 rows" in out
    assert "data.max_length=512; to keep rows whole" in out
    code, out, err = shown(capsys, *words, "data.learn=last")
    assert code == 3 and "every turn that would be is masked (data.learn=last, weight: 0)" in err
    assert "***" not in err and "rows.jsonl:1" in err


def test_what_is_an_error_is_not_a_line_of_the_audit_too(capsys):
    blind = [{"prompt": "word " * 60, "completion": f"x{n}"} for n in range(9)]
    path = rows_file({"prompt": "a\n", "completion": "b"}, *blind)
    words = ("data=local", path, "data.eval_fraction=0", "data.max_length=32")
    for command in ("preview", "plan"):
        code = dispatch(command, [*words])
        captured = capsys.readouterr()
        said = captured.out + captured.err
        assert code == 3 and said.count("9 of 10 rows have no supervised token left") == 1
