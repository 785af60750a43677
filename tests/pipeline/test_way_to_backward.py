"""How far it is from the command line to `backward()`, as README says."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import CodeType

import pytest
import torch

import loratune
from loratune.cli import main

PACKAGE = Path(loratune.__file__).parent
README = PACKAGE.parent / "README.md"


def our_functions_on_the_stack() -> set[CodeType]:
    """The functions of the package that wait for the caller to return."""
    frame, functions = sys._getframe(), set[CodeType]()
    while frame is not None:
        if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
            functions.add(frame.f_code)
        frame = frame.f_back
    return functions


def test_the_way_from_the_command_line_to_backward_is_as_long_as_readme_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[set[CodeType]] = []
    backward = torch.Tensor.backward

    def watched(loss: torch.Tensor, *arguments: object, **options: object) -> None:
        seen.append(our_functions_on_the_stack())
        backward(loss, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "backward", watched)
    words = ["train", "recipe=smoke", "stages=[train]", "trainer.steps=1", "out=run"]
    monkeypatch.setattr(sys, "argv", ["loratune", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    functions = seen[0]
    sentence = re.search(
        r"(\d+) of our own functions lie\s+between.*?in (\d+) files", README.read_text(), re.DOTALL
    )
    assert sentence is not None
    names = sorted(f"{Path(code.co_filename).name}:{code.co_name}" for code in functions)
    assert len(functions) == int(sentence[1]), names
    assert len({code.co_filename for code in functions}) == int(sentence[2]), names
