"""(e) Start-up: how long until help, a count, an error message, and the first training step."""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from benchmarks import common
from benchmarks.memory import Finished, run_measured

SCRIPT = "from loratune.cli import main; main()"
"""What the installed ``loratune`` script runs."""
FIRST_STEP = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, OPTForCausalLM  # lazy until asked for
imported, worked = time.time(), time.process_time()
from loratune.cli import main
out = sys.argv[1]
sys.argv = ["loratune", "train", "recipe=smoke", "stages=[train]", "trainer.steps=1", "out=" + out]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
with open(out + "/timings.jsonl") as lines:
    first = json.loads(next(iter(lines)))["time"]
print("seconds", first - imported, time.process_time() - worked)
"""

BARE_HYDRA = """
import hydra
@hydra.main(version_base=None, config_path=None)
def app(config): pass
app()
"""

Measure = Callable[[], Finished]


def command(*words: str) -> Measure:
    """A loratune command, interpreter start included."""
    return lambda: run_measured([sys.executable, "-c", SCRIPT, *words])


def config_error() -> Finished:
    """Until a misspelt key is named."""
    words = ["train", "recipe=smoke", "adapter.rnak=8"]
    done = run_measured([sys.executable, "-c", SCRIPT, *words], expect=2)
    assert "did you mean" in done.output
    return done


def bare_hydra() -> Finished:
    """A ``hydra.main`` application with an empty configuration: the floor of every subcommand."""
    with tempfile.TemporaryDirectory(prefix="loratune-bench-") as folder:
        words = [f"hydra.run.dir={folder}", "hydra.output_subdir=null"]
        return run_measured([sys.executable, "-c", BARE_HYDRA, *words])


def bare_imports() -> Finished:
    """Importing torch and what training takes of transformers, for comparison."""
    imports = "import torch; from transformers import AutoTokenizer, OPTForCausalLM"
    return run_measured([sys.executable, "-c", imports])


def first_step() -> Finished:
    """From torch and transformers imported to the first optimizer step recorded.

    CPU time is that of the whole command after the imports, saving included.
    """
    folder = Path(tempfile.mkdtemp(prefix="loratune-bench-"))
    try:
        done = run_measured([sys.executable, "-c", FIRST_STEP, str(folder / "run")])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    [line] = [line for line in done.output.splitlines() if line.startswith("seconds ")]
    _, seconds, cpu_seconds = line.split()
    return replace(done, seconds=float(seconds), cpu_seconds=float(cpu_seconds))


MEASURED: dict[str, Measure] = {
    "loratune --help": command("--help"),
    "loratune train --help": command("train", "--help"),
    "loratune count-params model=opt_125m": command("count-params", "model=opt_125m"),
    "a misspelt key is named": config_error,
    "an empty hydra.main application": bare_hydra,
    "import torch, transformers": bare_imports,
    "first step of recipe=smoke, after those imports": first_step,
}


def main() -> None:
    found = common.parser(__doc__)
    found.add_argument("--rounds", type=int, default=5)
    arguments = found.parse_args()
    options = common.options_of(arguments)
    rounds = 1 if options.is_micro else arguments.rounds
    seconds: dict[str, list[float]] = {name: [] for name in MEASURED}
    for number in range(-1 if not options.is_micro else 0, rounds):
        for name, measure in MEASURED.items():
            done = measure()
            if number >= 0:  # the first round fills the page cache
                value = done.cpu_seconds if options.clock == "cpu" else done.seconds
                seconds[name].append(value)
    rows = [
        {"name": name, "seconds": asdict(common.Spread.of(values))}
        for name, values in seconds.items()
    ]
    for row in rows:
        common.say(json.dumps(row))
    common.write_result("startup", options, {"rows": rows})


if __name__ == "__main__":
    main()
