"""The table of number formats agrees with torch's own."""

from __future__ import annotations

import pytest

from loratune.config.schema import Dtype
from loratune.models.dtypes import FLOATING, ITEM_BYTES, safetensors_name, torch_dtype


@pytest.mark.parametrize("name", ITEM_BYTES)
def test_a_format_has_torchs_size_and_name(name: str) -> None:
    dtype = torch_dtype(name)
    assert dtype.itemsize == ITEM_BYTES[name]
    assert safetensors_name(str(dtype).removeprefix("torch.")) == name
    assert (name in FLOATING) == (dtype.is_floating_point and not name.startswith("F8"))


@pytest.mark.parametrize("dtype", [dtype for dtype in Dtype if dtype is not Dtype.auto])
def test_every_dtype_of_a_recipe_can_be_stored(dtype: Dtype) -> None:
    assert str(torch_dtype(safetensors_name(dtype))) == f"torch.{dtype}"
