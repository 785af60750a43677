"""Run the benchmarks one after the other and render docs/performance.md: what ``make bench`` does.

usage: python benchmarks/run_all.py [--parts step,merge] [--resume] [--size micro]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # also runs as a plain script

from benchmarks import common, render


def is_done(part: str, options: common.Options) -> bool:
    """Whether this very revision was measured here already, at this size."""
    path = options.results / f"{part}.json"
    if not path.is_file():
        return False
    record = json.loads(path.read_text(encoding="utf-8"))
    wanted = [options.size, common.revision(), common.versions()]
    return [record["size"], record["revision"], record["versions"]] == wanted


def run_part(part: str, options: common.Options) -> bool:
    """Run one benchmark in a process of its own; whether it ended well."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(common.REPOSITORY),
        "OMP_NUM_THREADS": str(options.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", f"benchmarks.{part}", *options.arguments()]
    return subprocess.run(command, env=environment, check=False).returncode == 0


def main() -> int:
    found = common.parser(__doc__)
    found.add_argument(
        "--parts", default=",".join(common.PARTS), help=f"of {','.join(common.PARTS)}"
    )
    found.add_argument("--resume", action="store_true", help="skip what is measured already")
    arguments = found.parse_args()
    options = common.options_of(arguments)
    parts = [part for part in arguments.parts.split(",") if part]
    unknown = sorted(set(parts) - set(common.PARTS))
    if unknown:
        found.error(f"no benchmark '{unknown[0]}'; choose of {', '.join(common.PARTS)}")
    failed = []
    for part in parts:
        if arguments.resume and is_done(part, options):
            common.say(f"== {part}: done already")
            continue
        common.say(f"== {part}")
        if not run_part(part, options):
            failed.append(part)
    if options.results.resolve() == common.RESULTS.resolve():
        common.say(f"wrote {render.write_page().relative_to(common.REPOSITORY)}")
    if failed:
        common.say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
