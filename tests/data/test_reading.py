from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from loratune.data.reading import read_rows
from loratune.data.rows import Row, data_fingerprint
from loratune.data.templates import as_text
from loratune.errors import LoratuneError

GOOD = '{"prompt": "a", "completion": " b"}\n'


def error_of(path: Path | str, **options: object) -> LoratuneError:
    with pytest.raises(LoratuneError) as caught:
        read_rows(str(path), **options)  # type: ignore[arg-type]
    assert caught.value.exit_code == 3
    return caught.value


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "train.jsonl"


def test_rows_come_in_order_with_their_lines(file: Path) -> None:
    file.write_text('\n{"text": "one"}\r\n\n{"text": "two"}', encoding="utf-8")
    rows = read_rows(str(file))
    assert [(row.columns["text"], row.source) for row in rows] == [
        ("one", f"{file}:2"),
        ("two", f"{file}:4"),
    ]


def test_a_byte_order_mark_is_not_part_of_the_first_row(file: Path) -> None:
    file.write_bytes(b"\xef\xbb\xbf" + GOOD.encode())
    assert read_rows(str(file))[0].columns == {"prompt": "a", "completion": " b"}


def test_a_malformed_line_is_named_with_its_column(file: Path) -> None:
    file.write_text(GOOD * 2 + '{"prompt": "a", "completion": "b"\n' + GOOD)
    text = str(error_of(file))
    assert "train.jsonl:3, column 34" in text and "not valid JSON" in text


def test_all_malformed_lines_are_reported_in_one_go(file: Path) -> None:
    file.write_text("nonsense\n" + GOOD + "[1]\n" + GOOD)
    lines = error_of(file).lines()
    assert len(lines) == 2
    assert "train.jsonl:1" in lines[0] and "train.jsonl:3" in lines[1] and "list" in lines[1]


def test_a_limit_does_not_hide_a_malformed_line_before_it(file: Path) -> None:
    file.write_text(GOOD + "nonsense\n" + GOOD * 5)
    assert "train.jsonl:2" in str(error_of(file, limit=3))
    assert len(read_rows(str(file), limit=1)) == 1


def test_a_cut_last_line_is_called_unterminated(file: Path) -> None:
    file.write_text((GOOD * 3)[:-5])
    text = str(error_of(file))
    assert "unterminated" in text and "train.jsonl:3" in text


def test_a_byte_that_is_not_utf8_is_named_with_line_and_offset(file: Path) -> None:
    bad = GOOD.encode().replace(b" b", b" \xe9")
    file.write_bytes(GOOD.encode() * 4 + bad)
    text = str(error_of(file))
    place = bad.index(b"\xe9")
    assert "0xE9" in text and "train.jsonl:5" in text
    assert f"byte {place + 1} of the line" in text
    assert f"offset {4 * len(GOOD) + place}" in text


@pytest.mark.parametrize("content", ["", "\n", "\n \n\n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_a_file_without_rows_has_0_rows(tmp_path: Path, content: str, name: str) -> None:
    (tmp_path / name).write_text(content)
    assert "0 rows" in str(error_of(tmp_path / name))


@pytest.mark.parametrize("line", ["[" * 100_000, "9" * 5000, "1"])
def test_json_that_is_no_row_never_escapes_as_another_error(file: Path, line: str) -> None:
    file.write_text(line + "\n")
    assert "train.jsonl:1" in str(error_of(file))


def test_a_json_list_gives_rows_with_their_numbers(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([{"text": "a"}, {"text": "b"}], indent=1))
    assert [row.source for row in read_rows(str(path))] == [f"{path}, row 1", f"{path}, row 2"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "rows.json:3, column 7"),
        ('[\n{"a": 1}\n{"a": 2}]', "rows.json:3"),
        ('[\n{"a": 1},\n{"a": 2', "unterminated"),
        ('[\n{"a": 1}\n', "unterminated"),
        ('[\n{"a": 1}, 2]', "rows.json, row 2"),
        ('[\n{"a": 1}] x', "Extra data; "),
        ('{\n "data": []\n}', "one object"),
    ],
)
def test_a_malformed_json_list_is_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    assert expected in str(error_of(path))


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(GOOD * 2)
    assert [row.source for row in read_rows(str(path))] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
@pytest.mark.parametrize(
    "literal",
    ["2.71828182845904523536", "5e2", "7.250", "-0", "1E-7", "0.30", "12", "9" * 30, "1e999"],
)
def test_numbers_stay_as_the_file_writes_them(tmp_path: Path, name: str, literal: str) -> None:
    path = tmp_path / name
    row = f'{{"prompt": "a", "completion": {literal}}}'
    path.write_text(f"[{row}]" if name == "rows.json" else row + "\n")
    (found,) = read_rows(str(path))
    assert as_text(found.columns["completion"], "completion") == literal


def test_an_integer_of_any_length_in_a_column_does_not_stop_the_file(file: Path) -> None:
    file.write_text('{"prompt": "a", "completion": "b", "count": ' + "3" * 9000 + "}\n" + GOOD)
    assert len(read_rows(str(file))) == 2


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
def test_what_json_does_not_call_a_number_is_refused_by_name(tmp_path: Path, word: str) -> None:
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(GOOD + f'{{"prompt": "a", "completion": {word}}}\n')
    listed.write_text(f'[{GOOD},\n{{"prompt": "a",\n"completion": [{word}]}}]')
    assert f"{word} is not a number in JSON; {lines}:2" in str(error_of(lines))
    assert f"{word} is not a number in JSON; {listed}:3" in str(error_of(listed))


def test_a_key_given_twice_is_refused_wherever_it_stands(tmp_path: Path) -> None:
    lines, listed = tmp_path / "rows.jsonl", tmp_path / "rows.json"
    lines.write_text(GOOD + '{"prompt": "a", "prompt": "c", "completion": "b"}\n')
    listed.write_text('[{"messages": [{"role": "user", "role": "assistant"}]}]')
    assert f"the key 'prompt' is given twice; {lines}:2" in str(error_of(lines))
    assert f"the key 'role' is given twice; {listed}:1" in str(error_of(listed))


def test_a_number_survives_being_copied_and_sent(file: Path) -> None:
    file.write_text('{"a": 7.250}\n')
    (row,) = read_rows(str(file))
    again = pickle.loads(pickle.dumps(row.columns["a"]))
    assert (str(again), again, json.dumps(again)) == ("7.250", 7.25, "7.25")


def test_csv_rows_know_the_line_they_begin_on(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb", c\nd,"e, ""f"""\n')
    rows = read_rows(str(path))
    assert [(dict(row.columns), row.source) for row in rows] == [
        ({"prompt": "a\nb", "completion": " c"}, f"{path}:2"),
        ({"prompt": "d", "completion": 'e, "f"'}, f"{path}:4"),
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a,b\n1,2\n1,2,3\n", "rows.csv:3"),
        ('a,b\n1,"2\n', "unterminated"),
        ("a,a\n1,2\n", "twice"),
    ],
)
def test_a_malformed_csv_is_named(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(content)
    assert expected in str(error_of(path))


def test_a_missing_file_names_close_names(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(GOOD)
    text = str(error_of(tmp_path / "trian.jsonl"))
    assert "trian.jsonl" in text and "did you mean 'train.jsonl'" in text


def test_a_pattern_that_matches_nothing_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none*.jsonl" in str(error_of(f"{tmp_path}/none*.jsonl"))


def test_folders_and_patterns_read_their_files_in_name_order(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "README.md").write_text("not data")
    for path in (tmp_path, tmp_path / "*.jsonl"):
        assert [row.columns["text"] for row in read_rows(str(path))] == ["a", "b", "c"]


def test_gzipped_rows_are_read_and_a_damaged_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = gzip.compress(GOOD.encode() * 50)
    path.write_bytes(packed)
    assert len(read_rows(str(path))) == 50
    path.write_bytes(packed[:-12])
    assert "rows.jsonl.gz" in str(error_of(path))
    path.write_bytes(b"no gzip")
    assert "rows.jsonl.gz" in str(error_of(path))


def test_a_named_pipe_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    assert "named pipe" in str(error_of(tmp_path / "pipe.jsonl"))
    assert "device" in str(error_of("/dev/null"))


def test_symbolic_links_that_form_a_loop_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "a.jsonl")
    for path in (tmp_path / "a.jsonl", tmp_path):
        assert "loop" in str(error_of(path))


def test_a_folder_that_links_to_itself_is_read_once(tmp_path: Path, file: Path) -> None:
    file.write_text(GOOD)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(read_rows(str(tmp_path))) == 1


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_one_line(file: Path) -> None:
    file.write_text(GOOD)
    file.chmod(0)
    assert "Permission denied" in str(error_of(file))


def test_a_refused_open_is_one_line(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.write_text(GOOD)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(file))

    monkeypatch.setattr(Path, "open", refuse)
    text = str(error_of(file))
    assert "Permission denied" in text and "train.jsonl" in text


def test_an_unknown_kind_of_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.xml").write_text("<a/>")
    assert ".xml" in str(error_of(tmp_path / "rows.xml"))


def test_built_in_rows_are_found_and_a_wrong_name_is_helped() -> None:
    assert read_rows("builtin:train", limit=1)[0].source == "builtin:train:1"
    assert "did you mean 'train'" in str(error_of("builtin:trian"))
    assert "built-in" in str(error_of("builtin:../../errors"))


def test_a_hub_id_without_a_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nTraceback and more")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    error = error_of("owner/no-such-name")
    assert len(error.lines()) == 1
    assert "owner/no-such-name" in str(error) and "Couldn't reach the hub" in str(error)


@pytest.mark.filterwarnings("ignore")
def test_parquet_rows_equal_the_rows_written(tmp_path: Path) -> None:
    import datasets

    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]
    path = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    assert [dict(row.columns) for row in read_rows(str(path))] == rows
    path.write_bytes(b"PAR1 broken")
    assert "rows.parquet" in str(error_of(path))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_a_line_of_50_mb_costs_bounded_memory(file: Path) -> None:
    with file.open("w") as stream:
        stream.write(GOOD + '{"prompt": "p", "completion": "' + "a" * 50_000_000 + '"}\n')
    script = (
        "import sys; from loratune.data.reading import read_rows;"
        f"rows = read_rows({str(file)!r}); assert len(rows) == 2;"
        "assert 'torch' not in sys.modules and 'datasets' not in sys.modules;"
        # Not ru_maxrss, which begins with the size of the process that started this one.
        "print(next(line for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=20
    )
    assert int(done.stdout.split()[1]) < 400_000


def test_the_fingerprint_follows_contents_and_order_only() -> None:
    one, two = Row({"a": 1, "b": 2}, "x:1"), Row({"a": 3}, "x:2")
    moved = [Row({"b": 2, "a": 1}, "elsewhere:7"), Row({"a": 3}, "elsewhere:9")]
    assert data_fingerprint([one, two]) == data_fingerprint(moved)
    assert data_fingerprint([one, two]) != data_fingerprint([two, one])
    assert data_fingerprint([one, two]) != data_fingerprint([one])
    assert data_fingerprint([Row({"a": "1"}, "")]) != data_fingerprint([Row({"a": 1}, "")])
