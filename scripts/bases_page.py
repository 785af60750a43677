"""Write docs/bases.md from what the last trials of all base types left in tests/bases/results.json.

usage: python scripts/bases_page.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "tests" / "bases" / "results.json"
PAGE = ROOT / "docs" / "bases.md"

COLUMNS = {
    "type": "type",
    "train": "train",
    "merge": "merge",
    "peft": "PEFT",
    "padding": "padding",
    "packing": "packing",
    "sharing": "sharing",
    "generation": "batched generation",
    "experts": "experts",
}
MULTIMODAL_COLUMNS = {
    **{key: title for key, title in COLUMNS.items() if key != "experts"},
    "checkpointing": "checkpointing",
    "commands": "other commands",
    "towers": "outside the language model",
}
VERDICTS = {
    "works": "train, merge to base + adapter, and verify",
    "refused": "are refused before the first step",
    "not buildable": "cannot be built or loaded again as a tiny model by transformers",
    "fails": "fail",
}
INTRO = """\
# Base models

Every type of causal language model that transformers has, tried as a tiny random model by
`make test-bases`, which also wrote this page: three steps of LoRA on `all_linear`,
`loratune merge`, `loratune verify`, and the numbers compared.
"""
COLUMNS_EXPLAINED = """\
- **merge**: *proved* says that the merged folder, loaded by transformers alone, has the logits of
  base + adapter (1e-4 of the largest), and that `loratune verify` computed its tensors again.
- **PEFT**: *equal* says that PEFT, reading the same adapter, has those logits too; *no* that
  `train` said before the first step that PEFT cannot use this adapter, and why.
- **padding**, **packing** (`data.packing`), **sharing** (`data.share_prefixes`): *exact* says that
  the adapted model's loss over such a batch is that of its rows one by one. What is not exact was
  measured before training: padding and packing are then *refused*, sharing is *off*.
- **batched generation**: whether prompts of several lengths are answered together (*padded*) or
  those *of one length* only, and whether what they begin with is encoded once (*one prefix*).
- **experts**: the share of the parameters that lies in stacked experts, which `all_linear` leaves
  frozen (`all_linear_and_experts` adapts them).
"""


MULTIMODAL = """\
# The text of multimodal checkpoints

Models that read images or sound too (transformers' `AutoModelForMultimodalLM`) are loaded whole, by
the class that their `config.json` names, and trained on rows of text: `all_linear` and role words
mean the language model, layers that text never reaches are left out and named, and merging writes
the whole checkpoint again. PEFT reads the adapter on that class. Tried in the same way.
"""
MULTIMODAL_EXPLAINED = """\
- **checkpointing** (`trainer.gradient_checkpointing`): *exact* says that the gradients are those
  of activations that are kept.
- **other commands**: `plan`, `preview`, `count-params activations=true`, `evaluate`, `generate` and
  `export` on the run.
- **outside the language model**: tensors of towers and projectors, which are the base's bit for bit
  in the merged folder.
"""


def page(
    records: Sequence[dict[str, str]],
    multimodal: Sequence[dict[str, str]],
    versions: Mapping[str, str],
) -> str:
    """The page of these records, and of the versions that they were made with."""
    text = part(INTRO, COLUMNS_EXPLAINED, COLUMNS, records, versions)
    explained = MULTIMODAL_EXPLAINED
    return text + "\n" + part(MULTIMODAL, explained, MULTIMODAL_COLUMNS, multimodal, versions)


def part(
    intro: str,
    explained: str,
    columns: Mapping[str, str],
    records: Sequence[dict[str, str]],
    versions: Mapping[str, str],
) -> str:
    """What became of one kind of bases: counts, reasons, and the table of those that work."""
    by_verdict = {name: [r for r in records if r["verdict"] == name] for name in VERDICTS}
    counts = [
        f"- {len(of_one)} {said}" for (_, said), of_one in zip(
            VERDICTS.items(), by_verdict.values(), strict=True
        )
    ]  # fmt: skip
    made_with = ", ".join(f"{name} {number}" for name, number in versions.items())
    listed = "\n".join(counts)
    parts = [intro, f"Of {len(records)} types ({made_with}, CPU, fp32):\n\n{listed}\n"]
    for name, title in (
        ("fails", "Fail"),
        ("refused", "Refused before the first step"),
        ("not buildable", "Not buildable here"),
    ):
        if by_verdict[name]:
            rows = [[f"`{r['type']}`", r["reason"]] for r in by_verdict[name]]
            parts.append(f"## {title}\n\n{table(['type', 'reason'], rows)}")
    works = by_verdict["works"]
    cells = [[f"`{r['type']}`", *(r[key] for key in list(columns)[1:])] for r in works]
    parts.append(f"## Work\n\n{explained}\n{totals(works)}\n{table(columns.values(), cells)}")
    return "\n".join(parts)


def totals(records: Sequence[dict[str, str]]) -> str:
    """How many types have which cell, reasons and numbers left out."""
    lines = []
    for key in ("peft", "padding", "packing", "sharing", "generation"):
        cells = Counter(record[key].partition(":")[0] for record in records)
        listed = ", ".join(f"{cell} {count}" for cell, count in cells.most_common())
        lines.append(f"{COLUMNS[key]}: {listed}.  ")
    return "\n".join(lines) + "\n"


def table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    names = list(header)
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(map(_cell, line))} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page."""
    results = json.loads(RESULTS.read_text(encoding="utf-8"))
    text = page(results["records"], results["multimodal"], results["versions"])
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
