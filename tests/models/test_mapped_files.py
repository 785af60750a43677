"""Mapped files: what lies in them is not copied, is given back, and reaches nobody else."""

from __future__ import annotations

import mmap
import threading
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratune.merging.threads import WORKERS, in_order, tensor_threads
from loratune.models.weights import drop_pages, hash_tensors, mapped, read_header, read_one

STATUS = Path("/proc/self/status")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    torch.manual_seed(0)
    save_file({"a": torch.randn(5, 7), "b": torch.randn(4 << 20).bfloat16()}, path)
    return path


def test_a_tensor_in_a_mapped_file_is_the_files_and_cannot_change_it(file: Path) -> None:
    before = load_file(file)
    for name, entry in read_header(file).items():
        value = read_one(entry)
        assert torch.equal(value, before[name])
        value.zero_()
        assert torch.equal(load_file(file)[name], before[name])


@pytest.mark.skipif(not STATUS.exists(), reason="resident memory is read from /proc")
def test_pages_given_back_leave_the_process_and_are_read_again(file: Path) -> None:
    def resident() -> int:
        lines = STATUS.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssFile"))

    content = mapped(file)
    size = len(content)
    assert size > 100 * mmap.PAGESIZE
    start = resident()
    first = bytes(content)
    assert resident() - start > 0.9 * size
    drop_pages(content, 0, size)
    assert resident() - start < 0.1 * size
    assert bytes(content) == first


def test_hashing_gives_back_what_it_read_and_hashes_all_of_it(file: Path) -> None:
    hashes = hash_tensors(read_header(file))
    changed = {**load_file(file)}
    changed["a"][-1, -1] += 1
    save_file(changed, file)
    again = hash_tensors(read_header(file))
    assert (hashes["a"] == again["a"], hashes["b"] == again["b"]) == (False, True)


def test_results_come_in_order_with_few_in_the_making() -> None:
    made: list[int] = []
    lock = threading.Lock()

    def make(number: int) -> int:
        with lock:
            made.append(number)
        return number

    threads = torch.get_num_threads()
    with tensor_threads() as pool:
        assert torch.get_num_threads() == 1
        taken = []
        for number in in_order(pool, (partial(make, number) for number in range(50))):
            taken.append(number)
            assert len(made) <= len(taken) + WORKERS
    assert taken == list(range(50))
    assert torch.get_num_threads() == threads


def test_a_job_that_fails_is_raised_and_the_threads_setting_restored() -> None:
    threads = torch.get_num_threads()

    def fail() -> int:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), tensor_threads() as pool:
        list(in_order(pool, [fail]))
    assert torch.get_num_threads() == threads
