"""Everything here is marked ``gpu`` and skipped where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read at the first matrix product

import pytest
import torch

from gpu.setting import DEVICE, IS_CUDA
from loratune.models.devices import resolve_device

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = IS_CUDA and not torch.cuda.is_available()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            # What the libraries of this machine say about themselves is not what is tested.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if missing:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _as_the_command_line_leaves_it() -> Iterator[None]:
    """Libraries chosen as for every run; exact fp32 products; nothing left on the device."""
    resolve_device(str(DEVICE))
    torch.set_float32_matmul_precision("highest")
    yield
    if IS_CUDA:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
