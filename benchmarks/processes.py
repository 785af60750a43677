"""(g) Several processes: what a step costs each of them, and the bytes that it hands to the others.

Always the same rows a step, shared out over 1, 2 and 4 gloo processes as `train` does, at
OPT-125m's width.  The clock is each process's own CPU time: on a machine with fewer cores than
processes it still says what several processes cost beyond their share of the rows, which wall time
would not.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from torch import Tensor

from benchmarks import common, models
from loratune.config.recipes.variant_settings import variant_settings
from loratune.config.schema import TargetsConfig, TrainerConfig
from loratune.data.collate import Batch
from loratune.loss.causal_model import LanguageModelHead
from loratune.loss.supervised import causal_targets
from loratune.surgery import wrap_model
from loratune.training.optim import make_optimizer
from loratune.training.step import train_step


@dataclass(frozen=True)
class Plan:
    """What is trained, by how many processes."""

    shape: models.Shape
    rows: int
    length: int
    rank: int
    steps: int
    processes: tuple[int, ...]


FULL = Plan(replace(models.OPT_125M, layers=4, vocabulary=1024), 8, 128, 16, 7, (1, 2, 4))
MICRO = Plan(models.MICRO, 4, 8, 4, 1, (1, 2))


@contextmanager
def counted_messages() -> Iterator[list[int]]:
    """The bytes of every tensor that is handed to an all-reduce inside the block."""
    messages: list[int] = []
    reduce: Callable[..., Any] = dist.all_reduce

    def counted(tensor: Tensor, *words: Any, **options: Any) -> Any:
        messages.append(tensor.numel() * tensor.element_size())
        return reduce(tensor, *words, **options)

    with patch.object(dist, "all_reduce", counted):
        yield messages


def work(rank: int, processes: int, plan: Plan, folder: str) -> None:
    """One process: its share of the rows, step after step; writes what it measured."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
    base = models.frozen_opt(plan.shape)
    settings = variant_settings("lora").with_rank(plan.rank)
    wrapped = wrap_model(base, settings, TargetsConfig(modules="all_linear"))
    optimizer = make_optimizer(wrapped.model, wrapped.config, TrainerConfig(lr=1e-5))
    head = LanguageModelHead(wrapped.model)
    ids = models.token_ids(plan.shape, plan.rows, plan.length).chunk(processes)[rank]
    batch = Batch(ids, causal_targets(ids), tuple(range(len(ids))), ids.numel())
    seconds = []
    with counted_messages() as messages:
        for step in range(plan.steps + 1):
            messages.clear()
            dist.barrier()
            started = time.process_time()
            train_step(head, [batch], optimizer, 1.0, step)
            seconds.append(time.process_time() - started)
    trained = sum(p.numel() for p in wrapped.model.parameters() if p.requires_grad)
    found = {"seconds": seconds[1:], "messages": list(messages), "trained": trained}
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def measure(plan: Plan, processes: int) -> dict[str, Any]:
    """CPU seconds of a step (the busiest process's), and the bytes of its messages."""
    with tempfile.TemporaryDirectory() as folder:
        words = (processes, plan, folder)
        multiprocessing.start_processes(work, words, nprocs=processes, start_method="spawn")
        found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(processes)]
    busiest = [max(step) for step in zip(*(one["seconds"] for one in found), strict=True)]
    payload = sum(found[0]["messages"])
    return {
        "processes": processes,
        "trained": found[0]["trained"],
        "cpu_seconds": asdict(common.Spread.of(busiest)),
        "messages": found[0]["messages"],
        "payload_bytes": payload,
        # a ring sends and receives every byte twice, but for one process's share
        "sent_bytes": round(2 * (processes - 1) / processes * payload),
    }


def main() -> None:
    options = common.parse(__doc__)
    plan = MICRO if options.is_micro else FULL
    rows: list[dict[str, Any]] = []
    for processes in plan.processes:
        row = measure(plan, processes)
        seconds = row["cpu_seconds"]["median"]
        row["rows_per_cpu_second"] = plan.rows / processes / seconds
        rows.append(row)
        row["to_one"] = row["rows_per_cpu_second"] / rows[0]["rows_per_cpu_second"]
        common.say(
            f"{processes} processes: {seconds:.3f} CPU seconds a step, "
            f"{row['rows_per_cpu_second']:.2f} rows a CPU second ({row['to_one']:.2f} of one), "
            f"messages {row['messages']}, sent {row['sent_bytes']:,} bytes"
        )
    common.write_result("processes", options, {"plan": asdict(plan), "rows": rows})


if __name__ == "__main__":
    main()
