"""(d) Merging a sharded bf16 folder: against copying it, and against PEFT.

The floor copies the files, hashes both sides and syncs: what nobody can do without who writes a
folder and knows what is in it.  Every candidate runs in a process of its own, which times the
work after its imports; the parent sees wall time and peak memory.  Before each, all memory that
nobody uses is filled with pages of files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import common, models
from benchmarks.memory import fill_page_cache, run_measured

OPT_1_3B = models.Shape(hidden=2048, inner=8192, layers=24, heads=32)
TARGETS = {"all linear layers": "all_linear", "q and v": "attention_qv"}
BLOCK = 1 << 20


# -- what is merged ------------------------------------------------------------------------


def write_base(folder: Path, shape: models.Shape, shard: str) -> None:
    """A bf16 OPT folder in shards, random blocks for weights, with a tokenizer."""
    import torch
    from transformers import OPTForCausalLM

    import loratune

    with torch.device("meta"):
        model: Any = OPTForCausalLM(models.opt_config(shape)).to(torch.bfloat16)
    model = model.to_empty(device="cpu")
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(BLOCK, generator=generator) * 0.02).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            for start in range(0, flat.numel(), BLOCK):
                part = flat[start : start + BLOCK]
                part.copy_(block[: part.numel()])
    model.save_pretrained(folder, max_shard_size=shard)
    assets = Path(loratune.__file__).parent / "assets" / "demo-opt"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(assets / name, folder / name)


def write_adapters(folder: Path, shape: models.Shape, rank: int, base: Path) -> None:
    """One LoRA adapter per set of targets, with a B that is not zero."""
    import torch
    from transformers import OPTForCausalLM

    from loratune.adapter_files.peft_format import write_adapter
    from loratune.library import wrap

    for name, targets in TARGETS.items():
        with torch.device("meta"):
            model = OPTForCausalLM(models.opt_config(shape))
        wrapped = wrap(model, "lora", targets=targets, rank=rank)
        with torch.no_grad():
            for key, parameter in wrapped.model.named_parameters():
                if key.endswith("lora_B"):
                    parameter.normal_(std=0.01)
        target = folder / name.replace(" ", "_")
        target.mkdir(parents=True)
        write_adapter(target, wrapped, {}, str(base))


# -- the candidates, each in its own process -----------------------------------------------


def copy_files(base: Path, adapter: Path, out: Path) -> Callable[[], None]:
    """Copy, hash both sides, sync."""
    from loratune import files

    def work() -> None:
        out.mkdir()
        for path in sorted(base.iterdir()):
            shutil.copyfile(path, out / path.name)
            files.sync_file(out / path.name)
            assert files.sha256_file(path) == files.sha256_file(out / path.name)
        files.sync_folder(out)

    return work


def loratune_merge(base: Path, adapter: Path, out: Path) -> Callable[[], None]:
    """``loratune merge``: streamed, every module proved, hashed, synced, published by rename."""
    return _command("merge", f"adapter_path={adapter}", f"model.path={base}", f"out={out}")


def loratune_verify(base: Path, adapter: Path, out: Path) -> Callable[[], None]:
    """``loratune verify`` of what ``merge`` wrote: all hashes, and the merge computed again."""
    return _command("verify", str(out), f"model.path={base}", f"adapter_path={adapter}")


def _command(*words: str) -> Callable[[], None]:
    # Part of the imports, not of the work.
    import hydra  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM  # noqa: F401

    from loratune import verify  # noqa: F401
    from loratune.cli import main
    from loratune.pipeline import commands  # noqa: F401

    def work() -> None:
        sys.argv = ["loratune", *words]
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"exit code {end.code}") from end

    return work


def peft_merge(base: Path, adapter: Path, out: Path) -> Callable[[], None]:
    """Load, ``merge_and_unload``, ``save_pretrained``; no proof, no hash, no sync."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def work() -> None:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        merged.save_pretrained(out, max_shard_size="500MB")

    return work


KINDS = {
    "copy, hash, sync": copy_files,
    "loratune merge": loratune_merge,
    "loratune verify": loratune_verify,
    "PEFT merge_and_unload": peft_merge,
}


def work_alone(kind: str, paths: list[Path], options: common.Options) -> None:
    """What a candidate's process does: import, then time the work."""
    import torch

    from loratune.training.record import peak_resident_bytes

    torch.set_num_threads(options.threads)
    work = KINDS[kind](*paths)
    started = options.now()
    work()
    print("seconds", options.now() - started, peak_resident_bytes())


# -- the parent ----------------------------------------------------------------------------


def measure(
    kind: str, base: Path, adapter: Path, out: Path, options: common.Options
) -> dict[str, float]:
    """Run one candidate and return its times and peak memory."""
    os.sync()  # what others left to be written is not this one's time
    if not options.is_micro:
        fill_page_cache(base.parent, sorted(base.iterdir()))
    words = [sys.executable, "-m", "benchmarks.merge", "--worker", kind]
    words += [*options.arguments(), "--paths", str(base), str(adapter), str(out)]
    environment = {"PYTHONPATH": str(common.REPOSITORY), "OMP_NUM_THREADS": str(options.threads)}
    done = run_measured(words, environment)
    [line] = [line for line in done.output.splitlines() if line.startswith("seconds ")]
    _, seconds, peak = line.split()
    return {
        "seconds": float(seconds),
        "process_seconds": done.cpu_seconds if options.clock == "cpu" else done.seconds,
        "peak_bytes": float(peak),
    }


def has_verify() -> bool:
    """Whether this loratune can verify a merged folder."""
    from loratune.cli import COMMANDS

    return "verify" in COMMANDS


def rounds_of(
    base: Path, adapters: Path, work: Path, rounds: int, options: common.Options
) -> dict[str, list[dict[str, float]]]:
    """All candidates in turn, ``rounds`` times, after a first one that fills the page cache."""
    found: dict[str, list[dict[str, float]]] = {}
    out = work / "out"
    every = adapters / "all_linear_layers"
    plan = [
        ("copy, hash, sync", "copy, hash, sync", every),
        ("loratune merge, all linear layers", "loratune merge", every),
        ("loratune verify, all linear layers", "loratune verify", every),
        ("loratune merge, q and v", "loratune merge", adapters / "q_and_v"),
        ("PEFT merge_and_unload, all linear layers", "PEFT merge_and_unload", every),
    ]
    for number in range(rounds):
        for name, kind, adapter in plan:
            is_check = kind == "loratune verify"
            if is_check and not has_verify():
                continue
            if not is_check:
                shutil.rmtree(out, ignore_errors=True)
            try:
                values = measure(kind, base, adapter, out, options)
            except RuntimeError as error:
                if not is_check:
                    raise
                common.say(f"  {name} left out: {error}")
                continue
            found.setdefault(name, []).append(values)
            common.say(f"  {number + 1}. {name}: {values['seconds']:.1f} s")
    return found


def rows_of(found: dict[str, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """Spreads, and ratios to the copy of the same round."""
    floor = found["copy, hash, sync"]
    rows = []
    for name, values in found.items():
        pairs = zip(values, floor, strict=False)
        ratios = [own["seconds"] / least["seconds"] for own, least in pairs]
        rows.append(
            {
                "name": name,
                "seconds": asdict(common.Spread.of([v["seconds"] for v in values])),
                "process_seconds": asdict(common.Spread.of([v["process_seconds"] for v in values])),
                "ratio": asdict(common.Spread.of(ratios)),
                "peak_bytes": max(v["peak_bytes"] for v in values),
            }
        )
    return rows


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    found.add_argument("--paths", type=Path, nargs=3, help=argparse.SUPPRESS)
    arguments = found.parse_args()
    options = common.options_of(arguments)
    if arguments.worker:
        work_alone(arguments.worker, arguments.paths, options)
        return
    shape = models.MICRO if options.is_micro else OPT_1_3B
    if options.is_micro:
        shape = models.Shape(hidden=32, inner=64, layers=2, heads=2, vocabulary=1024)
    shard = "50KB" if options.is_micro else "500MB"
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as folder:
        base, adapters = Path(folder, "base"), Path(folder, "adapters")
        write_base(base, shape, shard)
        write_adapters(adapters, shape, 4 if options.is_micro else 16, base)
        shards = sorted(path.stat().st_size for path in base.glob("*.safetensors"))
        common.say(f"base: {sum(shards) / 1e9:.2f} GB in {len(shards)} files")
        rounds = 1 if options.is_micro else arguments.rounds
        results = rounds_of(base, adapters, Path(folder), rounds, options)
        settings = {"bytes": sum(shards), "files": len(shards), "largest_shard": shards[-1]}
    common.write_result("merge", options, {"settings": settings, "rows": rows_of(results)})


if __name__ == "__main__":
    main()
