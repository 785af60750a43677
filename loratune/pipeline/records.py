"""What a run leaves in its folder, written by the main process alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loratune import files
from loratune.adapter_files.peft_format import (
    TENSORS,
    AdapterFolder,
    peft_config,
    read_adapter,
    read_back,
    shared_fingerprint,
    write_adapter,
)
from loratune.adapters.optimizer import trainable_parameters
from loratune.config.convert import to_plain
from loratune.config.mixture import SOURCES
from loratune.config.schema import RunConfig
from loratune.config.secrets import redact
from loratune.counting.parameters import ParameterReport
from loratune.counting.tables import variant_table
from loratune.data.prepare import PreparedData
from loratune.models.fingerprint import hashes_in_memory, tensors_fingerprint
from loratune.models.weights import hash_tensors, read_header, read_one
from loratune.report.build import finished_report
from loratune.report.card import CardSubject, adapter_card
from loratune.report.records import read_run
from loratune.runs import processes
from loratune.runs.agreement import check_published
from loratune.runs.checkpoint import checkpoint_path
from loratune.runs.manifest import CARD
from loratune.runs.provenance import merged_before, package_versions, provenance
from loratune.runs.records import link_latest, recipe_record, write_recipe, write_summary
from loratune.runs.run_dir import RunDir
from loratune.runs.sharded import gather_for_main, is_shared_out, own_part, rows_of
from loratune.stages.load import BaseModel
from loratune.stages.train import TrainResult
from loratune.surgery import WrappedModel, adapter_state
from loratune.tables import show
from loratune.training.checkpoints import check_as_saved

_FINGERPRINTS = ("base", "tokenizer", "data", "encoded", "projection")


def run_facts(
    config: RunConfig, base: BaseModel, data: PreparedData, wrapped: WrappedModel, drift: list[str]
) -> dict[str, Any]:
    """What checkpoints and adapters record about what a run is made of."""
    return {
        "recipe": recipe_record(config),
        "base": base.fingerprint,
        **quantization_facts(base),
        "tokenizer": base.tokenizer_fingerprint,
        "data": data.fingerprint,
        **source_facts(data),
        "encoded": data.encoded,
        "clock": data.clock,
        "projection": shared_fingerprint(wrapped),
        "processes": processes.world_size(),
        "versions": package_versions(),
        "drift": drift,
    }


def quantization_facts(base: BaseModel) -> dict[str, Any]:
    """How the base was quantized, and the fingerprint of the weights that it was made of."""
    if base.quantization is None:
        return {}
    facts = base.quantization.to_dict() | {"weights": base.weights_fingerprint}
    return {"quantization": facts}


def source_facts(data: PreparedData) -> dict[str, str]:
    """Fingerprint of the rows of every source of a mixture: ``data.sources.NAME.rows``."""
    return {f"{SOURCES}.{n}.rows": data.fingerprints[f"sources.{n}"] for n in data.weights}


def _source_formats(data: PreparedData) -> dict[str, Any]:
    """How the prompts of a mixture's sources were written, to evaluate on their own rows again."""
    formats = {name: one.to_dict() for name, one in data.source_formats.items()}
    return {"source_formats": formats} if formats else {}


def _vocabulary(wrapped: WrappedModel) -> dict[str, int]:
    """Rows of the embeddings that trained tokens belong to: the base's files can have fewer."""
    first = next(iter(wrapped.token_rows.values()), None)
    return {} if first is None else {"vocabulary": int(first.weight.shape[0])}


def started_with(
    wrapped: WrappedModel, saved: AdapterFolder | None, final: PreparedData
) -> dict[str, str]:
    """Fingerprints of what else all processes must share: what will train, and the final rows.

    Of weights that they share out each holds its own rows, which no other has: what they were
    read from is compared, the base by its own fingerprint, a saved adapter here.
    """
    trained: dict[str, Tensor] = {
        name: parameter
        for name, parameter in trainable_parameters(wrapped.model)
        if not is_shared_out(parameter)
    }
    if saved is not None:
        state = adapter_state(wrapped)
        shared_out = saved.tensors.keys() & {n for n, one in state.items() if is_shared_out(one)}
        trained |= {name: saved.tensors[name] for name in shared_out}
    return {
        "adapter": tensors_fingerprint(trained),
        "test": final.fingerprint,
        "encoded_test": final.encoded,
    }


def _hashes_in_file(path: Path, state: Mapping[str, Tensor]) -> dict[str, str | list[str]]:
    """Hex sha256 of every tensor of an adapter's file, or of each process's rows of it."""
    entries = read_header(path)
    return hash_tensors(
        {name: entry for name, entry in entries.items() if not is_shared_out(state[name])}
    ) | {
        name: _hashes_of_rows(read_one(entry))
        for name, entry in entries.items()
        if is_shared_out(state[name])
    }


def _hashes_of_rows(whole: Tensor) -> list[str]:
    ranks = range(processes.world_size())
    parts = {str(rank): whole[rows_of(len(whole), rank)] for rank in ranks}
    return list(hashes_in_memory(parts).values())


class Records:
    """The files of one run.

    Attributes:
        config: the recipe.
        run_dir: the run's folder.
        facts: see ``run_facts``.
    """

    def __init__(self, config: RunConfig, run_dir: RunDir, facts: dict[str, Any]) -> None:
        self.config, self.run_dir, self.facts = config, run_dir, facts

    def begin(self, base: BaseModel, data: PreparedData, parameters: ParameterReport) -> None:
        """Recipe, provenance, parameters and rows."""
        if not processes.is_main():
            return
        self.run_dir.summary.unlink(missing_ok=True)  # a finished run that goes on is not finished
        write_recipe(self.run_dir, self.config)
        origin = redact(provenance(str(base.device)))
        keys = [*_FINGERPRINTS, *source_facts(data)]
        fingerprints = {key: self.facts[key] for key in keys}
        origin |= {"fingerprints": fingerprints, "dtype": str(base.dtype)}
        origin |= quantization_facts(base)
        merged = merged_before(base.folder)
        if merged is not None:
            processes.say_once(
                "note: the base is itself a model that loratune merged (see provenance.json)"
            )
            origin["merged_base"] = merged
        files.write_json(self.run_dir.provenance, origin)
        files.write_json(self.run_dir.parameters, parameters.to_dict())
        files.write_json(self.run_dir.data, data.report.to_dict())
        show(variant_table(parameters.to_dict()))

    def publish_adapter(
        self,
        wrapped: WrappedModel,
        data: PreparedData,
        tokenizer: Any,
        training: TrainResult | None,
    ) -> None:
        """The adapter with the facts that bind it to its base, whole or not at all.

        The tokenizer is put beside it where single tokens were trained.  Every process compares
        the file with what it holds before it is published, and that with its checkpoint where no
        other process holds the same.
        """
        state = adapter_state(wrapped)
        own = {}
        if processes.is_distributed():
            own = hashes_in_memory({name: own_part(tensor) for name, tensor in state.items()})
        if training is not None:
            check_as_saved(wrapped, checkpoint_path(self.run_dir.checkpoints, training.best_step))
        if not processes.is_main():
            gather_for_main(state.values())
            check_published({}, own)
            return
        settings = to_plain(wrapped.config)
        facts = {
            **{key: self.facts[key] for key in (*_FINGERPRINTS, "drift")},
            **{key: self.facts[key] for key in ("quantization",) if key in self.facts},
            "variant": settings.pop("variant"),
            "adapter": settings,
            "base_path": self.config.model.path,
            "prompt_format": data.prompt_format.to_dict(),
            **_source_formats(data),
            **_vocabulary(wrapped),
            "seed": self.config.trainer.seed if self.config.adapter_path is None else None,
            "step": training.best_step if training else None,
            "versions": self.facts["versions"],
        }
        with files.published_folder(self.run_dir.adapter, replace=True) as target:
            if wrapped.token_rows:
                tokenizer.save_pretrained(target)
            peft = peft_config(wrapped, self.config.model.path)
            unmeasured = replace(read_run(self.run_dir.path), evaluation={})
            subject = CardSubject(facts, peft, unmeasured)
            files.write_text(target / CARD, adapter_card(subject, sorted(state)))
            write_adapter(target, wrapped, facts, self.config.model.path)
            read_back(target, wrapped)
            if processes.is_distributed():
                check_published(_hashes_in_file(target / TENSORS, state), own)
        link_latest(self.run_dir, self.config.name)
        processes.say_once(f"adapter saved: {self.run_dir.adapter}")

    def finish(self, training: TrainResult | None) -> None:
        """The summary that seals the records, and the report."""
        if not processes.is_main():
            return
        record = {
            "training": asdict(training) if training else None,
            "stages": [str(stage) for stage in self.config.stages],
        }
        adapter = read_adapter(self.run_dir.adapter)
        subject = CardSubject(adapter.facts, adapter.peft, read_run(self.run_dir.path))
        card = adapter_card(subject, sorted(adapter.tensors))
        files.write_text(self.run_dir.adapter / CARD, card)
        write_summary(self.run_dir, record)
        processes.say_once(f"everything lies in {self.run_dir.path}")
        processes.say_once(f"report: {finished_report(self.run_dir.path)}")
