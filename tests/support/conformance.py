"""The conformance cases: what each asks for, which tests prove it, and what does not apply.

Run as a program to print the table of docs/exactness.md; a test compares the two.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).resolve().parent.parent
SUITES = ("parity", "conformance", "interchange")

TITLES = {
    1: "default start: A uniform on ±1/√in, B zero",
    2: "gaussian start: standard deviation 1/rank",
    3: "random start changes the output",
    4: "embedding: A zero, B normal, whatever the flag",
    5: "scaling is alpha/rank everywhere",
    6: "rsLoRA: alpha/√rank, exactly",
    7: "rank and alpha patterns override independently",
    8: "the same with rsLoRA",
    9: "an untrained adapter leaves the logits as they are",
    10: "the same seed gives PEFT's numbers",
    11: "a rank below 1 is an error",
    12: "bias in lora_B",
    13: "VeRA's matrices are PEFT's, sized by the widest layer",
    14: "SVD start: AAᵀ = I, B = 0, W untouched",
    15: "every target name must match",
    16: "chosen blocks alone are adapted",
    17: "a wrong fan_in_fan_out is corrected",
    18: "no module both adapted and trained in full",
    19: "wrapped layers show in and out features",
    20: "only what the adapter created changes",
    21: "requires_grad follows the active adapter",
    22: "every trained number gets a gradient, the base none",
    23: "gradient checkpointing changes nothing",
    24: "gradients are the formulas, in fp64",
    25: "LoRA equals PEFT through 20 AdamW steps",
    26: "LoRA+ equals PEFT through 20 AdamW steps",
    27: "VeRA on unequal shapes equals PEFT through 20 AdamW steps",
    28: "projected LoRA-FA equals PEFT's optimizer through 20 steps",
    29: "dropout draws PEFT's masks; evaluation ignores it",
    30: "accumulation equals one batch",
    31: "LoRA-FA: every A frozen, every B trains",
    32: "LoRA-FA: A untouched after training, B not zero",
    33: "LoRA-FA: decay decoupled, after the step",
    34: "LoRA-FA: scaling per module",
    35: "LoRA-FA: recipe and optimizer disagree on rank or rsLoRA",
    36: "LoRA-FA: the closed form is a projection, free of scaling and basis",
    37: "LoRA-FA is LoRA with A's rate at zero",
    38: "LoRA-FA refuses embeddings",
    39: "LoRA-FA: unused modules do not crash",
    40: "LoRA-FA: state survives save, load, continue",
    41: "LoRA-FA keeps n·r numbers per module for the backward pass",
    42: "LoRA+: four groups with their rates",
    43: "LoRA+: embeddings in their own group",
    44: "LoRA+: a step on embedding and linear targets",
    45: "LoRA+: weight decay is never dropped",
    46: "LoRA+ with ratio 1 is LoRA",
    47: "LoRA+: the ratio holds through schedules and resumes",
    48: "every trained number in exactly one group",
    49: "VeRA: matrices shared, vectors not",
    50: "VeRA: a second adapter with another seed",
    51: "VeRA: stored matrices are used as stored",
    52: "VeRA without stored matrices reloads to the same outputs",
    53: "VeRA: a second, larger adapter",
    54: "fp32, fp16 and bf16 keep their dtype",
    55: "VeRA's alpha folded into lambda_b loads in PEFT",
    56: "adapted, merged, unmerged, unwrapped and reloaded agree",
    57: "the merged model serialises",
    58: "a NaN adapter is refused, the base stays",
    59: "merging twice changes nothing",
    60: "half precision merges on a CPU",
    61: "several adapters: at once, and one after the other",
    62: "Linear, Conv1D and Embedding merge to PEFT's weights",
    63: "tied embeddings part; logits stay",
    64: "disabled adapters give the base; the state comes back",
    65: "save and load give the same outputs with another seed",
    66: "save and load give the same parameters",
    67: "loratune to PEFT and PEFT to loratune",
    68: "load and save again: the same bytes",
    69: "a missing tensor is an error",
    70: "what trains after loading",
    71: "adapter dtype before and after a reload",
    72: "an adapted embedding's base weight in the file",
    73: "portable and plain-LoRA exports",
    74: "published parameter counts",
}

ELSEWHERE = {
    41: [("adapters/test_saved_bytes.py", "T0")],
    74: [("test_published_counts.py", "T0")],
}
"""Cases proved by a whole file outside the three suites."""

NOTES = {
    12: "not offered: no server reads it; an adapter that has it is refused by name",
    21: "one adapter per model, so none is inactive; a second is refused",
    35: "cannot happen: the optimizer reads rank and scaling from the layer",
    39: "a second adapter and lora_bias do not exist here",
    50: "one adapter per model; a second is refused",
    53: "one adapter per model; a second is refused",
    70: "loading leaves the adapter trainable; evaluation runs in inference mode",
    71: "the adapter is fp32 on every base: there is no switch to half precision",
    72: "never stored: the base has it; PEFT's copy is compared with the base when read",
}
"""What does not apply, or applies otherwise than in PEFT, and why."""


@dataclass(frozen=True)
class Proof:
    """One test that proves a case, to a tolerance class."""

    case: int
    tolerance: str
    test: str


def proofs() -> list[Proof]:
    """Every ``@case`` mark of the suites, in file order."""
    found = []
    for suite in SUITES:
        for path in sorted((TESTS / suite).glob("test_*.py")):
            for node in ast.parse(path.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.FunctionDef):
                    found += _marks(node, f"{suite}/{path.name}")
    return found


def _marks(function: ast.FunctionDef, file: str) -> list[Proof]:
    marks = []
    for mark in function.decorator_list:
        if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "case":
            number, tolerance = mark.args
            assert isinstance(number, ast.Constant) and isinstance(number.value, int)
            marks.append(Proof(number.value, ast.unparse(tolerance), f"{file}::{function.name}"))
    return marks


def table() -> str:
    """The conformance table in Markdown."""
    rows = ["| case | behaviour | class | proved by |", "|---|---|---|---|"]
    found = proofs()
    for number, title in TITLES.items():
        own = [proof for proof in found if proof.case == number]
        classes = sorted({p.tolerance for p in own} | {t for _, t in ELSEWHERE.get(number, [])})
        tests = [f"`{proof.test}`" for proof in own]
        tests += [f"`{file}`" for file, _ in ELSEWHERE.get(number, [])]
        tests += [f"*{NOTES[number]}*"] if number in NOTES else []
        rows.append(f"| {number} | {title} | {' '.join(classes) or '–'} | {'<br>'.join(tests)} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(table(), end="")
