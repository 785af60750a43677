"""Which rows of a tensor are whose, against torch; a tensor that nobody shares out stays itself."""

from __future__ import annotations

import pytest
import torch

from loratune.runs import processes, sharded


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 16, 300])
def test_rows_are_split_as_torch_does_and_the_last_processes_may_have_none(
    monkeypatch: pytest.MonkeyPatch, world: int, rows: int
) -> None:
    monkeypatch.setattr(processes, "world_size", lambda: world)
    whole = torch.arange(rows)
    parts = [whole[sharded.rows_of(rows, rank)] for rank in range(world)]
    chunks = list(whole.chunk(world))
    expected = chunks + [whole[:0]] * (world - len(chunks))
    assert all(torch.equal(*pair) for pair in zip(parts, expected, strict=True))


def test_a_whole_tensor_is_its_own_part() -> None:
    tensor = torch.ones(3, 2)
    assert not sharded.is_shared_out(tensor)
    assert sharded.own_part(tensor) is sharded.gathered(tensor) is tensor
    assert sharded.part_of(tensor, tensor) is tensor
