"""One base through the command line's own entry: train, merge, verify, and the numbers compared.

A trial runs in a child with a time limit: a base that hangs or crashes ends its own trial alone.
The children are forked from a server that has imported everything and computed nothing.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bases.tiny_base import write_base
from loratune.adapter_files.into_model import wrap_for_loading
from loratune.adapter_files.peft_format import read_adapter
from loratune.cli.dispatch import dispatch
from loratune.data.arrangement import Arrangement
from loratune.data.encoded_rows import EncodedRow
from loratune.data.prefix_tree import tree_order
from loratune.errors import ConfigError
from loratune.loss.causal_model import LanguageModelHead
from loratune.models.load import load_model
from loratune.models.measure import stacked_experts
from loratune.models.probes.batched_generation import probe_batched_generation
from loratune.models.probes.rows_alone import probe_rows_alone
from loratune.models.probes.rows_together import probe_rows_together
from loratune.surgery import WrappedModel
from loratune.training.forward import batch_loss, checkpoint_activations

SECONDS = 240.0
TOLERANCE = 1e-4
"""Of logits, where they are large relative to the largest; and of losses."""
SEEN = 1e-2
"""Least change of a logit by the adapter: less would prove nothing about it."""
STEPS = 3
_TESTS = Path(__file__).parents[1]
_NO_PEFT = "note: PEFT cannot use this adapter: "
_TOKENS = range(3, 740)
_WORDS = (
    "recipe=smoke", "data=local", "targets=all_linear", "adapter=lora", "adapter.lr=0.02",
    "trainer.lr_scale=1", f"trainer.steps={STEPS}", "data.max_length=250",
    "data.eval_fraction=0.25", "stages=[train]",
)  # fmt: skip


@dataclass
class Record:
    """What became of a base.

    Attributes:
        type: transformers' name of it.
        verdict: "works", "refused" before the first step, "not buildable" here, or "fails".
        reason: of every verdict but "works".
        train, merge, peft, padding, packing, sharing, checkpointing, generation, commands,
            experts: cells of the table, as far as the trial came.
    """

    type: str
    verdict: str = "fails"
    reason: str = ""
    train: str = ""
    merge: str = ""
    peft: str = ""
    padding: str = ""
    packing: str = ""
    sharing: str = ""
    checkpointing: str = ""
    generation: str = ""
    commands: str = ""
    experts: str = ""


@dataclass
class MultimodalRecord(Record):
    """What became of a base that reads more than text, trained on text.

    Attributes:
        towers: the parameters outside its language model in the merged folder.
    """

    towers: str = ""


class Ended(Exception):
    """A trial is over: its verdict and the reason."""


@dataclass
class _Output:
    """Where a child's commands write."""

    path: Path
    read: int = field(default=0)

    def since(self) -> str:
        """What came since the last call."""
        sys.stdout.flush()
        sys.stderr.flush()
        text = self.path.read_text(encoding="utf-8", errors="replace")
        new, self.read = text[self.read :], len(text)
        return new


# -- the child -----------------------------------------------------------------------------


def try_base(
    name: str,
    folder: Path,
    seconds: float = SECONDS,
    *,
    multimodal: bool = False,
    every_command: bool = True,
) -> dict[str, str]:
    """What becomes of a tiny base of type ``name``.

    Args:
        name: a type of transformers' causal language models, or of its multimodal ones.
        folder: an empty one, for the model, its run and what they print.
        seconds: after which the trial is ended.
        multimodal: the whole of a model that reads more than text.
        every_command: whether the commands beside training, merging and verifying are tried too.
    """
    empty = (MultimodalRecord if multimodal else Record)(name)
    child = _server().Process(target=_child, args=(empty, folder, every_command))
    child.start()
    child.join(seconds)
    if child.is_alive():
        child.kill()
        child.join()
        return asdict(replace(empty, reason=f"took more than {seconds:g} s"))
    written = folder / "record.json"
    if not written.exists():
        ended = f"the process ended with exit code {child.exitcode}"
        return asdict(replace(empty, reason=ended))
    record: dict[str, str] = json.loads(written.read_text(encoding="utf-8"))
    return record


@functools.cache
def _server() -> Any:
    """Where children come from; it reads the environment at its start and never again."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bases.trial", "bases.imports"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(_TESTS), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _child(record: Record, folder: Path, every_command: bool) -> None:
    torch.set_num_threads(1)
    output = _Output(folder / "output")
    handle = os.open(output.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(folder)
    try:
        _trial(record, folder, output)
        if every_command:
            record.commands = _other_commands(folder, output)
        record.verdict = "works"
    except Ended as end:
        record.verdict, record.reason = end.args
    except Exception as error:
        record.reason = f"comparing ended in {_first_line(error)}"
    text = json.dumps(asdict(record))
    (folder / "record.part").write_text(text, encoding="utf-8")
    (folder / "record.part").rename(folder / "record.json")


def _trial(record: Record, folder: Path, output: _Output) -> None:
    base = folder / "base"
    _build(record, base)
    printed = _train(record, folder, output)
    record.merge = _merge_and_verify(base, output)
    model = load_model(base, torch.float32)
    _read_probes(record, model)
    before = _logits(model)
    wrapped = wrap_for_loading(model, read_adapter(folder / "run/adapter"))
    wrapped.model.eval()
    _compare_rows(record, wrapped.model)
    record.checkpointing = _compare_checkpointing(wrapped)
    wrapped.model.eval()
    adapted = _logits(wrapped.model)
    if float((adapted - before).abs().max()) < SEEN:
        raise Ended("fails", "the adapter changes no logits")
    _check_logits("merged", _logits(_plain(folder / "run/merged")), adapted)
    record.peft = _compare_peft(base, folder / "run/adapter", adapted, printed)
    if isinstance(record, MultimodalRecord):
        record.towers = _compare_towers(_plain(base), _plain(folder / "run/merged"))


# -- the steps -----------------------------------------------------------------------------


def _build(record: Record, base: Path) -> None:
    """Write the base; transformers itself must load what it saved."""
    try:
        write_base(record.type, base, multimodal=isinstance(record, MultimodalRecord))
        _, info = _loaded(base)
    except Exception as error:  # every type has its own
        raise Ended("not buildable", _first_line(error)) from error
    if missing := sorted(info["missing_keys"]):
        reason = f"transformers does not load its own folder again: '{missing[0]}' is missing"
        raise Ended("not buildable", reason)


def _rows() -> list[dict[str, str]]:
    """Rows of 30 to 150 tokens, all with another beginning and several with one prompt."""
    places = ["Halney", "Brisk Bay", "Old Torrin", "Wexley under the hill"]
    return [
        {
            "prompt": f"{'name : ' * (1 + number % 3)}{place} | food : {number} | area : river",
            "completion": f" There is a place called {place}, number {number}." * (1 + number % 2),
        }
        for number in range(4)
        for place in places
    ]


def _train(record: Record, folder: Path, output: _Output) -> str:
    """Train; in batches of one row where the base is refused for padding alone."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in _rows()), encoding="utf-8")
    words = [*_WORDS, f"data.path={rows}", f"model.path={folder / 'base'}"]
    code, text = _command(output, "train", *words, "out=run", *_batches_of(2))
    padding = "exact"
    if code == 2 and "filled up on the right" in text:
        padding = "refused"
        shutil.rmtree(folder / "run", ignore_errors=True)
        code, text = _command(output, "train", *words, "out=run", *_batches_of(1))
    if code:
        _require_refusal(code, text, folder / "run/metrics.jsonl")
        raise Ended("refused", _cause(text))
    record.train, record.padding = "yes", padding
    return text


def _batches_of(size: int) -> list[str]:
    return [f"trainer.batch_size={size}", f"evaluate.batch_size={size}"]


def _require_refusal(code: int, text: str, metrics: Path) -> None:
    """A refusal has words, and comes before the first step."""
    if code == 1 or "Traceback" in text:
        raise Ended("fails", f"train ended in a traceback: {_cause(text)}")
    if metrics.exists() and metrics.read_text().strip():
        raise Ended("fails", f"refused after the first step: {_cause(text)}")


def _merge_and_verify(base: Path, output: _Output) -> str:
    code, text = _command(output, "merge", "run=run")
    if code:
        raise Ended("fails", f"trains, then cannot merge: {_cause(text)}")
    words = ["run/merged", f"model.path={base}", "adapter_path=run/adapter"]
    code, text = _command(output, "verify", *words)
    if code:
        raise Ended("fails", f"the merged folder does not verify: {_cause(text)}")
    return "proved"


def _other_commands(folder: Path, output: _Output) -> str:
    """What else a user does with a base and a run."""
    rows, base = f"data.path={folder / 'rows.jsonl'}", f"model.path={folder / 'base'}"
    for words in (
        ("plan", *_WORDS, rows, base, *_batches_of(1)),
        ("preview", *_WORDS, rows, base, "rows=1"),
        ("count-params", "recipe=smoke", base, "targets=all_linear", "activations=true"),
        ("evaluate", "run=run"),
        ("generate", "run=run", "prompt=name : Halney |", "max_new_tokens=4"),
        ("export", "run=run", "format=peft"),
    ):
        code, text = _command(output, *words)
        if code:
            raise Ended("fails", f"trains, but `loratune {words[0]}` does not: {_cause(text)}")
    return "all"


def _read_probes(record: Record, model: nn.Module) -> None:
    """What the tool finds out about the base by itself."""
    together = probe_rows_together(model, 120, _TOKENS)
    record.packing = "exact" if together.packs else "refused"
    record.sharing = "exact" if together.shares else "off"
    batches = probe_batched_generation(model, 60, _TOKENS)
    record.generation = "padded" if batches.padded else "of one length"
    record.generation += ", one prefix" if batches.prefixed else ""
    stacked = sum(stacked_experts(model).values())
    total = sum(parameter.numel() for parameter in model.parameters())
    record.experts = f"{stacked / total:.0%} frozen" if stacked else ""


def _compare_rows(record: Record, model: nn.Module) -> None:
    """The adapted model's loss over rows in one batch, as it is allowed, against row by row."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 740, (130,), generator=draw).tolist()
    texts = [ids[:52], ids[:30] + ids[60:77], ids[80:89], ids[90:127]]
    unordered = [EncodedRow(text, ((1, len(text)),), 1, "") for text in texts]
    rows = [unordered[place] for place in tree_order(unordered)]
    first = probe_rows_together(model, 120, _TOKENS).first_position
    ways = {
        "padded": (probe_rows_alone(model, 60, _TOKENS).pads, Arrangement(1)),
        "packed": (record.packing == "exact", Arrangement(1, 200, "never", first)),
        "sharing": (record.sharing == "exact", Arrangement(1, 0, "always", first)),
    }
    head = LanguageModelHead(model)
    alone = _loss(head, [[row] for row in rows], Arrangement(1))
    for name, (allowed, arrangement) in ways.items():
        if allowed and abs(_loss(head, [rows], arrangement) - alone) > TOLERANCE * max(1, alone):
            raise Ended("fails", f"{name} rows are silently computed otherwise than single ones")


def _compare_checkpointing(wrapped: WrappedModel) -> str:
    """The adapter's gradients with recomputed activations, where the model can, against those
    with activations that are kept.
    """
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 740, (60,), generator=draw).tolist()
    batch, model = Arrangement(1).batch([EncodedRow(ids, ((1, 60),), 1, "")]), wrapped.model

    def gradients() -> Tensor:
        model.zero_grad()
        batch_loss(LanguageModelHead(model.train()), batch).total.backward()
        trained = [p.grad for p in model.parameters() if p.requires_grad and p.grad is not None]
        return torch.cat([grad.flatten() for grad in trained])

    torch.manual_seed(0)
    kept = gradients()
    try:
        checkpoint_activations(model)
    except ConfigError:
        return "refused"
    torch.manual_seed(0)
    if (off := float((gradients() - kept).abs().max())) > TOLERANCE * float(kept.abs().max()):
        raise Ended("fails", f"gradients of recomputed activations are off by {off:.1g}")
    return "exact"


@torch.no_grad()
def _loss(
    head: LanguageModelHead, batches: Sequence[Sequence[EncodedRow]], arrangement: Arrangement
) -> float:
    """Mean over the supervised tokens of all batches."""
    sums = sum(float(batch_loss(head, arrangement.batch(rows)).total) for rows in batches)
    return sums / sum(len(row.input_ids) - 1 for rows in batches for row in rows)


def _compare_peft(base: Path, adapter: Path, adapted: Tensor, printed: str) -> str:
    from peft import PeftModel

    said = " ".join(printed.split()).partition(_NO_PEFT)[2]
    if said:
        return f"no: {said.partition('; loratune')[0]}"
    try:
        model = PeftModel.from_pretrained(_plain(base), str(adapter)).eval()
    except Exception as error:
        raise Ended("fails", f"PEFT refuses the adapter: {_first_line(error)}") from error
    _check_logits("PEFT's", _logits(model), adapted)
    return "equal"


def _compare_towers(base: Any, merged: Any) -> str:
    """Whether all outside the language model is what it was; transformers says where that is."""
    text = {id(p) for p in merged.get_decoder().parameters()}
    text |= {id(p) for p in merged.get_output_embeddings().parameters()}
    before = dict(base.named_parameters())
    towers = {name: p for name, p in merged.named_parameters() if id(p) not in text}
    changed = [name for name, p in towers.items() if not torch.equal(p, before[name])]
    if changed:
        raise Ended("fails", f"'{changed[0]}' outside the language model has changed")
    return f"{len(towers)} tensors equal" if towers else "none"


# -- what they share -----------------------------------------------------------------------


def _command(output: _Output, *words: str) -> tuple[int, str]:
    """Exit code and both streams of ``loratune WORDS``."""
    output.since()
    code = dispatch(words[0], words[1:])
    return code, output.since()


def _loaded(folder: Path) -> tuple[nn.Module, Any]:
    import transformers

    (kind,) = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    model, info = getattr(transformers, kind).from_pretrained(
        str(folder), dtype=torch.float32, output_loading_info=True
    )
    return model.eval(), info


def _plain(folder: Path) -> nn.Module:
    return _loaded(folder)[0]


@torch.no_grad()
def _logits(model: nn.Module) -> Tensor:
    """Of two rows of 64 ids: some types take no other length than a multiple of their chunks."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 740, (2, 64), generator=draw)
    logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


def _check_logits(whose: str, logits: Tensor, adapted: Tensor) -> None:
    off = float((logits - adapted).abs().max())
    if not off <= TOLERANCE * max(1.0, float(adapted.abs().max())):
        raise Ended("fails", f"{whose} logits differ from base + adapter by {off:.1g}")


def _cause(text: str) -> str:
    """The first error line without its code, place and fix; or the last line of a traceback."""
    lines = text.strip().splitlines()
    errors = [line for line in lines if line.startswith("error[")]
    if errors and not errors[0].startswith("error[1]"):
        return errors[0].partition("] ")[2].split("; ")[0]
    rest = [line for line in lines if not line.startswith("error[")]
    return (rest or [""])[-1][:200]


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[:2])}"[:200]
