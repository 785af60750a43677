"""Which kernels a backward pass may use: asked for on CUDA, given back afterwards."""

from __future__ import annotations

import pytest
import torch

from loratune.errors import TrainingError
from loratune.training.determinism import repeatable_kernels


def modes() -> tuple[int, bool]:
    memory = torch.utils.deterministic
    return torch.get_deterministic_debug_mode(), memory.fill_uninitialized_memory


def test_on_cuda_deterministic_kernels_are_asked_for_inside_alone() -> None:
    before = modes()
    with repeatable_kernels(torch.device("cuda")):
        assert modes() == (2, False)
    assert modes() == before == (0, True)
    with repeatable_kernels(torch.device("cpu")):
        assert modes() == before


def test_an_operation_without_such_a_kernel_is_told_in_a_line() -> None:
    with pytest.raises(TrainingError) as caught, repeatable_kernels(torch.device("cuda")):
        raise RuntimeError("put_ does not have a deterministic implementation, but\nyou set it")
    assert "put_ does not have a deterministic" in caught.value.cause
    assert caught.value.where == "trainer.deterministic"
    assert modes() == (0, True)


def test_other_errors_pass_through() -> None:
    kernels = repeatable_kernels(torch.device("cuda"))
    with pytest.raises(RuntimeError, match="shapes") as caught, kernels:
        raise RuntimeError("shapes do not fit")
    assert not isinstance(caught.value, TrainingError)
    assert modes() == (0, True)
