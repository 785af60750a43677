from __future__ import annotations

import sys
import time

import pytest
import torch
from torch import nn

from loratune.cli import main
from loratune.errors import TrainingError
from loratune.plan.compiling import compile_advice, compile_trial


@pytest.mark.parametrize(
    ("eager", "compiled", "compiling", "said"),
    [
        (100.0, 60.0, 30.0, None),  # 40 s are saved for 30
        (100.0, 60.0, 80.0, "pays from 200 steps on, not in 100"),  # 0.4 s a step
        (100.0, 99.0, 0.1, "makes this model no faster here"),  # within the trial's noise
        (100.0, 130.0, 80.0, "makes this model no faster here"),
    ],
)
def test_compiling_is_worth_what_it_saves(eager, compiled, compiling, said) -> None:
    advice = compile_advice(eager, compiled, compiling, steps=100)
    assert advice is None if said is None else said in str(advice)


class _Backbone(nn.Module):
    """Compiles, in half a second for each of the first two lengths."""

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.fails, self.compiled, self.lengths = fails, False, []

    def compile(self) -> None:  # type: ignore[override]
        self.compiled = True

    def forward(self, ids: torch.Tensor) -> None:
        if self.fails:
            from torch._dynamo.exc import BackendCompilerFailed

            raise BackendCompilerFailed("inductor", RuntimeError("No C++ compiler"), None)
        if self.compiled and len(self.lengths) < 2:
            time.sleep(0.5)
        self.lengths.append(ids.shape[1])


def test_a_trial_compiles_for_every_length_before_it_is_timed() -> None:
    backbone = _Backbone()

    def timed(action) -> float:
        assert backbone.lengths == [8, 4]  # nothing is left to compile
        action()
        return 0.25

    seconds, compiling = compile_trial(backbone, backbone, torch.ones(1, 8), timed, eager=0.1)
    assert seconds == 0.25
    assert compiling >= 0.8
    assert backbone.lengths == [8, 4, 8]


def test_a_compiler_that_does_not_work_is_told_in_one_line() -> None:
    backbone = _Backbone(fails=True)
    with pytest.raises(TrainingError, match=r"torch\.compile failed: .*No C\+\+ compiler"):
        compile_trial(backbone, backbone, torch.ones(1, 8), lambda action: 0.0, eager=0.1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # the compiler's own
def test_a_plan_compiles_a_block_only_where_the_recipe_does(monkeypatch, capsys) -> None:
    for compiles in (False, True):
        words = ["recipe=smoke", "trainer.steps=2", f"trainer.compile={str(compiles).lower()}"]
        monkeypatch.setattr(sys, "argv", ["loratune", "plan", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        said = " ".join(capsys.readouterr().out.split())
        assert ("trainer.compile takes about" in said) is compiles
