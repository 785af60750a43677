"""One run: load, wrap, train, evaluate, merge, export, in this order."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from loratune import files
from loratune.adapters.registry import config_class, variant_names
from loratune.checkpoint import Checkpoint
from loratune.config.convert import run_fields, to_plain
from loratune.config.schema import RunConfig, Stage
from loratune.console import say
from loratune.data.batches import BatchPlan
from loratune.data.prepare import PreparedData, prepare_data
from loratune.data.templates import PromptFormat
from loratune.loss import LanguageModelHead
from loratune.measure import measure_model
from loratune.model_source import model_folder, read_model_config
from loratune.optim import describe_groups, learning_rate, make_optimizer
from loratune.parameters import ParameterReport, count_variants
from loratune.peft_format import AdapterFolder, projection_fingerprint, read_adapter, write_adapter
from loratune.provenance import package_versions, provenance
from loratune.resume import find_checkpoint, refuse_drift
from loratune.run_dir import RunDir
from loratune.stages.evaluate import Evaluation, evaluate, evaluation_loss
from loratune.stages.export import export
from loratune.stages.load import BaseModel, load, load_tokenizer
from loratune.stages.merge import MergeReport, merge
from loratune.stages.train import TrainingSet, TrainResult, train
from loratune.stages.wrap import wrap, wrap_existing
from loratune.surgery import WrappedModel
from loratune.tables import evaluation_table, parameter_table, show
from loratune.training import processes
from loratune.training.state import seed_everything
from loratune.trackers import open_trackers


@dataclass(frozen=True)
class RunSummary:
    """What a run came to.

    Attributes:
        path: its folder.
        parameters: the parameter report of all variants.
        training: steps and losses, if it trained.
        evaluation: base and adapted scores, if it evaluated.
        merge: the merge's proof, if it merged.
    """

    path: Path
    parameters: ParameterReport
    training: TrainResult | None = None
    evaluation: Evaluation | None = None
    merge: MergeReport | None = None


def run(config: RunConfig) -> RunSummary | None:
    """Run a recipe's stages in its own folder.

    Returns ``None`` where the run was already complete.

    Raises:
        LoratuneError: whatever stopped it; published results stay whole.
    """
    with _run_folder(config) as run_dir:
        checkpoint = find_checkpoint(config, run_dir)
        if checkpoint is None and _is_complete(run_dir, config):
            say(f"already complete: {run_dir.path}")
            return None
        return _run_stages(config, run_dir, checkpoint)
