"""(h) How a row's time grows, or does not, with the rows that begin as it does.

OPT-125m's width, four layers, a small vocabulary, LoRA of rank 16.  Every row has 32 tokens of its
own, half of them supervised, behind a beginning of 0, 64 or 512 tokens that all rows of a batch
share.  A step is forward, backward and AdamW; with sharing, the beginning is computed once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks import common, models
from loratune.config.recipes.variant_settings import variant_settings
from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.probes.rows_together import probe_rows_together
from loratune.training.step import train_step

PREFIXES, ROWS, OWN = (0, 64, 512), (1, 4, 16), 32
SHARED, ALONE = "shared", "each row alone"


def make_rows(prefix: int, count: int, own: int, vocabulary: int) -> list[EncodedRow]:
    """Rows of random tokens, always the same, that share their first ``prefix`` ones."""
    generator = torch.Generator().manual_seed(3)

    def tokens(number: int) -> list[int]:
        drawn: list[int] = torch.randint(3, vocabulary, (number,), generator=generator).tolist()
        return drawn

    beginning, length = tokens(prefix), prefix + own
    supervised = ((length - own // 2, length),)
    return [
        EncodedRow(beginning + tokens(own), supervised, length - own // 2, f"rows:{number}")
        for number in range(count)
    ]


def measure(
    model: Any, rows: list[EncodedRow], first_position: int, options: common.Options
) -> dict[str, Any]:
    """Seconds and computed tokens of a step on all rows, laid out in both ways."""
    head = LanguageModelHead(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    alone = Arrangement(pad_id=1, first_position=first_position)
    batches = {
        SHARED: replace(alone, share="always").batch(rows),
        ALONE: alone.batch(rows),
    }
    steps: dict[str, Callable[[], object]] = {
        name: partial(train_step, head, [batch], optimizer, 1.0, 0)
        for name, batch in batches.items()
    }
    seconds = common.interleaved(steps, 1 if options.is_micro else 5, now=options.now)
    timed = common.timing_rows(seconds, ALONE)
    return {
        row["name"]: {**row, "computed": batches[row["name"]].input_ids.numel()} for row in timed
    }


def main() -> None:
    options = common.parse(__doc__)
    torch.set_num_threads(options.threads)
    shape = replace(models.OPT_125M, vocabulary=1024, layers=4)
    prefixes: tuple[int, ...] = PREFIXES
    counts: tuple[int, ...] = ROWS
    own = OWN
    if options.is_micro:
        shape, prefixes, counts, own = models.MICRO, (0, 8), (1, 2), 4
    model = models.ours(models.frozen_opt(shape), variant_settings("lora").with_rank(16))
    longest = max(prefixes) + own
    first = probe_rows_together(model, longest, list(range(3, 100))).first_position
    points = []
    for prefix in prefixes:
        for count in counts:
            found = measure(model, make_rows(prefix, count, own, shape.vocabulary), first, options)
            points.append({"prefix": prefix, "rows": count, **found})
            a_row = {name: found[name]["seconds"]["median"] / count for name in (SHARED, ALONE)}
            common.say(f"{prefix} shared tokens, {count} rows: {a_row[SHARED] * 1e3:.0f} ms a row, "
                       f"{a_row[ALONE] * 1e3:.0f} alone")  # fmt: skip
    common.write_result("growth", options, {"settings": {"own": own}, "points": points})


if __name__ == "__main__":
    main()
