"""Rows that were prepared once, kept in a folder for every later start.

What is kept is what ``prepare_data`` and ``audit`` gave: a run from the cache has the same rows
in the same order, the same notes, and the same fingerprints.  An entry belongs to the bytes of
the files, the settings under ``data``, the tokenizer and the versions; anything else is another
entry, and a damaged one is made again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from loratune import files
from loratune.config.convert import to_plain
from loratune.config.mixture import training_paths
from loratune.config.schema import DataConfig
from loratune.data.audit import audit
from loratune.data.cached_rows import LENGTHS, ROWS, CachedRows, RowStore
from loratune.data.chat import chat_template_of
from loratune.data.clock import now, reads_clock
from loratune.data.findings import Audit, Finding, Severity
from loratune.data.prepare import GenerationPrompt, PreparedData, prepare_data
from loratune.data.report import DataReport
from loratune.data.sources import find_files, is_hub_id
from loratune.data.templates import PromptFormat
from loratune.data.tokenizing import Tokenizer
from loratune.errors import BusyError, ConfigError, DataError, LoratuneError
from loratune.models.fingerprint import tokenizer_fingerprint
from loratune.runs import processes
from loratune.runs.manifest import describe_files, file_problem
from loratune.runs.provenance import package_versions

MANIFEST = "prepared.json"
_SIDES = ("train", "eval")
_VERSIONS = ("loratune", "transformers", "tokenizers", "jinja2")


@dataclass(frozen=True)
class CheckedData:
    """Prepared rows and what is likely to be wrong with them."""

    data: PreparedData
    audit: Audit


def prepare_and_audit(
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int,
    *,
    clock: str | None = None,
) -> CheckedData:
    """``prepare_data`` and ``audit``, or what the cache keeps of them.

    Args:
        config: the recipe's ``data``; ``cache`` names the folder.
        tokenizer: the base model's.
        vocab_size: rows of the model's embedding.
        seed: of the split.
        clock: the moment that a chat template takes for now; null is the present one.

    Raises:
        LoratuneError: as ``prepare_data``; or rows that no file holds, which cannot be kept.
        StorageError: if the folder cannot be written.
    """
    if config.cache is None or not training_paths(config):
        return _checked(config, tokenizer, vocab_size, seed, clock)
    clock = clock or now()
    try:
        folder = Path(config.cache) / _key(config, tokenizer, vocab_size, seed, clock)
    except (DataError, OSError):  # prepare_data says which setting names what cannot be read
        return _checked(config, tokenizer, vocab_size, seed, clock)
    kept, problem = None, None
    if processes.is_main() and (kept := _read(folder)) is None:
        try:
            _write(folder, config, tokenizer, vocab_size, seed, clock)
        except BusyError:
            pass  # another run was faster
        except LoratuneError as error:
            problem = error
    if problem := processes.broadcast(problem):  # the others are not to wait for one that stopped
        problem.fix = problem.fix.replace("out=DIR", "data.cache=DIR")
        raise problem
    return kept or _read(folder) or _checked(config, tokenizer, vocab_size, seed, clock)


def _checked(
    config: DataConfig,
    tokenizer: Tokenizer,
    vocab_size: int,
    seed: int,
    clock: str | None,
    store: RowStore | None = None,
) -> CheckedData:
    data = prepare_data(config, tokenizer, vocab_size, seed, clock=clock, store=store)
    return CheckedData(data, audit(data, tokenizer, config))


def _key(config: DataConfig, tokenizer: Tokenizer, vocab_size: int, seed: int, clock: str) -> str:
    """Name of the entry: a hash of everything that the rows follow from."""
    settings = to_plain(replace(config, cache=None, test_path=None))
    versions = package_versions()
    template = chat_template_of(tokenizer) if tokenizer.chat_template else ""
    facts = {
        "settings": settings,
        "files": [_content(path) for path in (*training_paths(config), config.eval_path) if path],
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size,
        "seed": seed,
        "clock": clock if template and reads_clock(template) else None,
        "versions": {name: versions.get(name) for name in _VERSIONS},
    }
    return hashlib.sha256(files.to_json(facts).encode()).hexdigest()[:24]


def _content(path: str) -> list[tuple[str, str]]:
    """Name and sha256 of every file that a setting stands for."""
    if is_hub_id(path):
        raise ConfigError(
            f"'{path}' lies on the hub, and data.cache keeps rows of local files",
            where="data.cache",
            fix="download the files and set data.path to them, or set data.cache=null",
        )
    return [(file.label, files.sha256_file(file.path)) for file in find_files(path)]


# -- one entry -----------------------------------------------------------------------------


def _write(
    folder: Path, config: DataConfig, tokenizer: Tokenizer, vocab_size: int, seed: int, clock: str
) -> None:
    with files.published_folder(folder, replace=True) as target:
        for side in _SIDES:
            (target / side).mkdir()
        store = RowStore(target / "train")
        # Held-out rows and a source's shares are drawn from all rows.
        at_once = config.sources is not None or (config.eval_path is None and config.eval_fraction)
        made = _checked(config, tokenizer, vocab_size, seed, clock, None if at_once else store)
        data = made.data
        if at_once:
            store.add(data.train)
            store.finished()
        held_out = RowStore(target / "eval")
        held_out.add(data.eval)
        held_out.finished()
        values = {
            "format": files.FORMAT,
            "prompts": [asdict(prompt) for prompt in data.prompts],
            "prompt_format": data.prompt_format.to_dict(),
            "source_formats": {n: one.to_dict() for n, one in data.source_formats.items()},
            "weights": dict(data.weights),
            "report": data.report.to_dict(),
            "fingerprints": data.fingerprints,
            "encoded": data.encoded,
            "pad_id": data.pad_id,
            "audit": made.audit.to_dict(),
            "files": {side: describe_files((target / side).iterdir()) for side in _SIDES},
        }
        files.write_sealed_json(target / MANIFEST, values)
        if _key(config, tokenizer, vocab_size, seed, clock) != folder.name:
            cause = "a file of rows changed while it was read"
            raise DataError(cause, where="data.path", fix="start again once the file is complete")


def _read(folder: Path) -> CheckedData | None:
    """An entry, or ``None`` where there is none or a byte of it is not as it was written."""
    try:
        values = files.read_sealed_json(folder / MANIFEST)
    except (OSError, ValueError):
        return None
    names = [(side, name) for side in _SIDES for name in (ROWS, LENGTHS)]
    if any(file_problem(folder / s, n, values["files"][s].get(n)) for s, n in names):
        return None
    data = PreparedData(
        train=CachedRows(folder / "train"),
        eval=list(CachedRows(folder / "eval")),
        prompts=[_prompt(prompt) for prompt in values["prompts"]],
        prompt_format=PromptFormat.from_dict(values["prompt_format"]),
        report=DataReport.from_dict(values["report"]),
        fingerprints=values["fingerprints"],
        encoded=values["encoded"],
        pad_id=values["pad_id"],
        source_formats={
            name: PromptFormat.from_dict(one) for name, one in values["source_formats"].items()
        },
        weights=values["weights"],
    )
    return CheckedData(data, _audit(values["audit"]))


def _prompt(values: Mapping[str, Any]) -> GenerationPrompt:
    ids = tuple(tuple(one) for one in values["answer_ids"])
    lists = {key: tuple(values.get(key, ())) for key in ("references", "messages")}
    return GenerationPrompt(**{**values, **lists, "answer_ids": ids})


def _audit(values: Mapping[str, Any]) -> Audit:
    findings = (
        Finding(**{**one, "severity": Severity(one["severity"])}) for one in values["findings"]
    )
    return Audit(tuple(findings), tuple((source, n) for source, n in values["longest"]))
