"""Every key that a recipe or the command line may set, with its type, default and meaning.

Plain dataclasses: Hydra composes YAML and overrides onto them, ``to_run_config`` turns the result
into these objects, and ``value_checks`` says which values are in range.  A recipe is data: nothing
here names a class or a function to call.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

from loratune.adapters.config import AdapterConfig


class Dtype(StrEnum):
    """Number format of the base model's weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantize(StrEnum):
    """Number format that the base's linear layers are quantized to as they are read."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class Attention(StrEnum):
    """Which implementation of attention the base model runs; auto is transformers' choice."""

    auto = "auto"
    eager = "eager"
    sdpa = "sdpa"
    flash_attention_2 = "flash_attention_2"


class Learn(StrEnum):
    """Which assistant turns of a conversation are supervised."""

    all = "all"
    last = "last"


class Reasoning(StrEnum):
    """What becomes of an assistant's reasoning: supervised, seen without loss, or left out."""

    learn = "learn"
    context = "context"
    drop = "drop"


class SpecialTokens(StrEnum):
    """What becomes of special tokens that are spelt in a row's text."""

    text = "text"
    parse = "parse"
    error = "error"


class Precision(StrEnum):
    """Number format of the base model's arithmetic in training; adapters stay in fp32."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"


class Schedule(StrEnum):
    """Shape of the learning rate after warm-up."""

    constant = "constant"
    linear = "linear"
    cosine = "cosine"


class Overlong(StrEnum):
    """What happens to a row longer than ``data.max_length``."""

    truncate = "truncate"
    drop = "drop"
    error = "error"


class SplitBy(StrEnum):
    """What stays together when evaluation rows are split off."""

    row = "row"
    prompt = "prompt"


class RowFormat(StrEnum):
    """Which columns make a row."""

    auto = "auto"
    text = "text"
    prompt = "prompt"
    instruction = "instruction"
    messages = "messages"


class Stage(StrEnum):
    """Stages that ``train`` runs after loading and wrapping."""

    train = "train"
    evaluate = "evaluate"
    merge = "merge"
    export = "export"


class Verify(StrEnum):
    """How a merge proves itself."""

    auto = "auto"
    weights = "weights"
    logits = "logits"


class MergeBase(StrEnum):
    """Which weights an adapter is merged into that was trained on a quantized base."""

    dequantized = "dequantized"
    """Those that training saw: the quantized numbers, widened."""
    original = "original"
    """Those that were quantized."""


class ExportFormat(StrEnum):
    """What ``export`` writes."""

    peft = "peft"
    merged = "merged"
    portable = "portable"
    lora = "lora"
    compact = "compact"
    gguf = "gguf"
    gguf_lora = "gguf-lora"


# OmegaConf looks members up by name, and no name in Python has a hyphen.
ExportFormat._member_map_["gguf-lora"] = ExportFormat.gguf_lora


class GgufDtype(StrEnum):
    """Number formats of a GGUF model's matrices."""

    f32 = "f32"
    f16 = "f16"
    bf16 = "bf16"
    q8_0 = "q8_0"


@dataclass(kw_only=True)
class ModelConfig:
    """The base model."""

    path: str = MISSING
    """A local folder, a hub id, or ``builtin:demo-opt``."""
    revision: str | None = None
    """Hub revision (branch, tag or commit)."""
    dtype: Dtype = Dtype.auto
    """auto keeps the file's dtype on CUDA and loads fp32 on a CPU unless precision says bf16."""
    quantize: Quantize | None = None
    """nf4, fp4 or int8: the base's linear layers in 4 or 8 bits (bitsandbytes' formats)."""
    quantize_double: bool = False
    """Quantize the scales of 4-bit blocks as well: 0.37 bits less for every weight."""
    quantize_skip: list[str] = field(default_factory=list)
    """Layers to leave as they are, by name or suffix; the output head always stays."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    add_tokens: list[str] = field(default_factory=list)
    """Texts that become one token each; they are trained as ``targets.tokens`` are."""
    attention: Attention = Attention.auto
    """auto, eager, sdpa or flash_attention_2."""
    architecture: dict[str, Any] | None = None
    """The numbers of ``config.json`` that counting needs, so that it works without the model."""


@dataclass(kw_only=True)
class TargetsConfig:
    """Which layers get an adapter."""

    modules: Any = "attention_qv"
    """attention_qv, attention, mlp, all_linear, experts, all_linear_and_experts; a list of names;
    or a regular expression."""
    exclude: list[str] = field(default_factory=list)
    """Names or suffixes to leave out."""
    layers: list[int] | None = None
    """Block numbers to adapt; null means every block."""
    modules_to_save: list[str] = field(default_factory=list)
    """Modules trained in full and stored with the adapter."""
    tokens: list[str] = field(default_factory=list)
    """Tokens whose own rows of embedding and output head train, such as new special tokens."""


@dataclass(kw_only=True)
class SourceConfig:
    """One source of a mixture (``data.sources``); what is null is as ``data`` itself has it."""

    path: str = MISSING
    """As ``data.path``."""
    name: str | None = None
    """What records and reports call it; null takes the file's name without its kind."""
    weight: float = 1.0
    """Its share of the rows drawn, relative to the other sources' weights."""
    split: str | None = None
    """Split to read (hub datasets)."""
    format: RowFormat | None = None
    """As ``data.format``."""
    columns: dict[str, str] | None = None
    """As ``data.columns``, in place of them."""
    template: str | None = None
    """As ``data.template``."""
    limit: int | None = None
    """Use only its first N rows."""


@dataclass(kw_only=True)
class DataConfig:
    """The rows to train and evaluate on."""

    path: str | None = None
    """jsonl, json, csv or parquet file, folder, glob, hub id, or ``builtin:NAME``."""
    sources: list[SourceConfig] | None = None
    """Several of them in place of ``path``: ``[{path: a.jsonl, weight: 3}, {path: b.jsonl}]``."""
    eval_path: str | None = None
    """Rows to evaluate on; null splits ``eval_fraction`` off the training rows."""
    test_path: str | None = None
    """Rows of the final evaluation; null takes the evaluation rows, which also chose the best."""
    split: str = "train"
    """Split to read where the source has several (hub datasets)."""
    format: RowFormat = RowFormat.auto
    """auto recognises the format from the columns."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our name to your column, for example ``data.columns.prompt=question``."""
    template: str | None = None
    """Prompt text with {column} placeholders; kept with the adapter and used by generate."""
    learn: Learn = Learn.all
    """Which assistant turns are supervised: all or last; a turn's own ``weight: 0`` wins."""
    reasoning: Reasoning = Reasoning.learn
    """Reasoning in assistant turns: learn, context (seen, not supervised) or drop.

    The last two need both its tags, or a template whose generation header opens it.
    """
    special_tokens_in_text: SpecialTokens = SpecialTokens.text
    """Special tokens spelt in a row: plain text, parse (as tokens) or error."""
    max_length: int = 512
    """Longest row in tokens."""
    overlong: Overlong = Overlong.truncate
    """truncate, drop or error for longer rows."""
    eval_fraction: float = 0.0
    """Share of training rows held out; used only while ``eval_path`` is null."""
    split_by: SplitBy = SplitBy.row
    """row, or prompt: rows that share a prompt stay on one side of the split."""
    limit: int | None = None
    """Use only the first N training rows, of each source."""
    eval_limit: int | None = None
    """Use only the first N evaluation rows, of each source."""
    group_by_length: bool = True
    """Rows of like length share a batch, so that little is spent on padding."""
    group_by_prefix: bool = False
    """Rows of one beginning share a batch instead, so that more of them is computed once."""
    packing: bool = False
    """Several rows share one sequence, without seeing each other."""
    cache: str | None = None
    """Folder that keeps the encoded rows: a later start reads them from there, not all at once."""
    share_prefixes: Any = "auto"
    """Compute once what a batch's rows begin with in common: true, false, or auto where exact."""


@dataclass(kw_only=True)
class TrainerConfig:
    """How the adapter is trained."""

    steps: int | None = None
    """Optimizer steps; give this or ``epochs``."""
    epochs: float | None = None
    """Passes over the training rows; of a mixture, each draws as many rows as its sources hold."""
    batch_size: int = 8
    """Rows per micro-batch over all processes; memory grows with it."""
    grad_accum_steps: int = 1
    """Micro-batches per optimizer step: 4 of 2 rows equal 1 of 8."""
    lr: float | None = None
    """Learning rate; null takes the variant's own ``adapter.lr``."""
    lr_scale: float = 1.0
    """Factor on the learning rate: lets a recipe adjust it for every variant."""
    schedule: Schedule = Schedule.linear
    """constant, linear (to zero) or cosine (to zero) after the warm-up."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from zero; 0 takes ``warmup_ratio``."""
    warmup_ratio: float = 0.0
    """Share of all steps over which it rises, where ``warmup_steps`` is 0."""
    weight_decay: float = 0.0
    """Decoupled decay of the adapter's matrices."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """AdamW's decay rates of the moments."""
    eps: float | None = None
    """AdamW's denominator guard; null takes the optimizer's own (1e-8; projected LoRA-FA 1e-6)."""
    clip_norm: float = 1.0
    """Largest gradient norm; 0 turns clipping off."""
    eval_every: int = 0
    """Evaluate every N steps; 0 evaluates at the end only."""
    save_every: int = 0
    """Checkpoint every N steps; 0 saves at the end only."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; the best and the last verified one always stay."""
    early_stop_patience: int = 0
    """Stop after N evaluations without a better loss; 0 never stops early."""
    precision: Precision = Precision.auto
    """auto, fp32 or bf16; auto takes bf16 on CUDA and on CPUs that compute it natively."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    router_loss: bool = False
    """Mixtures of experts: also train on the model's own load-balancing loss for its routers."""
    compile: bool = False
    """torch.compile the model."""
    deterministic: bool = True
    """On CUDA, kernels that give the same bits every time, as resuming needs; a CPU's do."""
    seed: int = 0
    """Seed of initialisation, order and dropout."""
    log_every: int = 1
    """Steps between two lines of metrics."""
    threads: int | None = None
    """CPU threads; null leaves torch's choice."""


@dataclass(kw_only=True)
class EvaluateConfig:
    """What is measured after training."""

    batch_size: int = 16
    """Rows per batch."""
    generate: bool = True
    """Measure exact match by greedy generation (prompt formats only)."""
    generate_limit: int | None = 200
    """Rows to generate answers for; null means all."""
    max_new_tokens: int = 64
    """Longest generated answer."""
    metrics: list[str] = field(default_factory=lambda: ["exact_match"])
    """Of generated answers: exact_match, bleu, chrf, rouge_l, or one that a package brings."""
    retention: list[str] = field(default_factory=list)
    """Files of text, or of another task's rows, that forgetting is measured on."""
    base: bool = True
    """Measure the base model beside the adapted one."""


@dataclass(kw_only=True)
class LaunchConfig:
    """Several processes on this machine."""

    nproc: int = 1
    """Processes, started through torch's elastic launcher."""
    shard: bool = False
    """Shard the base, and weights that train themselves, over the processes (FSDP2)."""
    max_restarts: int = 0
    """Starts of all processes from the newest checkpoint after one of them died."""
    timeout: int = 1800
    """Seconds that a process waits for one that hangs or is cut off, or that saves meanwhile."""


@dataclass(kw_only=True)
class MergeConfig:
    """How the merged model is written."""

    base: MergeBase | None = None
    """Where the base was quantized: dequantized (what training saw) or original."""
    requantize: Quantize | None = None
    """Write the merged model in nf4, fp4 or int8 once more."""

    dtype: Dtype = Dtype.auto
    """Number format of the merged weights; auto keeps the base's."""
    verify: Verify = Verify.auto
    """weights proves each module; logits also compares whole-model outputs; auto if it fits."""
    min_delta_kept: float = 0.0
    """Refuse the merge if rounding leaves less than this share of the correction."""


@dataclass(kw_only=True)
class ExportConfig:
    """What ``export`` writes."""

    format: ExportFormat = ExportFormat.peft
    """peft, merged, portable, lora, compact, gguf or gguf-lora."""


@dataclass(kw_only=True)
class GgufConfig:
    """How ``export format=gguf`` and ``format=gguf-lora`` write."""

    dtype: GgufDtype = GgufDtype.f16
    """Number format of the model's matrices: f32, f16, bf16 or q8_0; an adapter's are fp32."""
    base: str | None = None
    """A GGUF file of the base, quantized or not, that the adapter is to run on: it is checked."""


@dataclass(kw_only=True)
class GateConfig:
    """What ``gate`` demands of a run, on its test rows."""

    metric: str = "loss"
    """What the gain is measured in: loss, or a metric of ``evaluate.metrics``."""
    min_gain: float = 0.0
    """The whole 95 % interval of what was gained over the base must lie above it."""
    max_forgetting: float | None = None
    """The whole 95 % interval of what was forgotten, in nats per token, must lie below it."""
    max_bytes: str | None = None
    """Largest adapter file, such as 5MB."""
    merge: bool = True
    """There must be a merged model, and it must prove itself again."""


@dataclass(kw_only=True)
class CompareConfig:
    """How ``compare`` and ``tune`` search, and what they measure on."""

    contenders: dict[str, Any] = field(default_factory=dict)
    """What is compared, each by a label and what it changes:
    ``{narrow: {adapter: lora, adapter.rank: 4}, mlp: {targets: mlp}, full: {adapter: full}}``."""
    heldout_path: str | None = None
    """Text rows that forgetting is measured on; null leaves it out."""
    dev_fraction: float = 0.2
    """Training prompts set aside to search by, as a share, while ``data.test_path`` is null."""
    steps: int | None = None
    """Optimizer steps of every training; null takes ``trainer.steps``."""
    seeds: int = 3
    """Final trainings of each variant; more of them narrow the intervals."""
    lr_points: int = 7
    """Learning rates tried for each variant, around its own."""
    lr_factor: float = 2.0
    """Each rate tried is this many times the one before."""
    rungs: int = 3
    """Rounds of the search: each has twice the steps of the one before, for half the rates."""
    target_loss: float | None = None
    """Loss of the time-to-target column; null takes what every variant reaches in the end."""
    margin: float = 0.01
    """Differences below this share of the best one's gain over the base count as none."""
    train_twins: bool = False
    """Also train what is the same training as another contender, up to rounding."""


@dataclass(kw_only=True)
class RunConfig:
    """A whole recipe."""

    name: str = "run"
    """Names the run's folder."""
    model: ModelConfig = field(default_factory=ModelConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)
    adapter: AdapterConfig = MISSING
    data: DataConfig = field(default_factory=DataConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    merge: MergeConfig = field(default_factory=MergeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    gguf: GgufConfig = field(default_factory=GgufConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    stages: list[Stage] = field(default_factory=lambda: [Stage.train, Stage.evaluate])
    """Stages to run after load and wrap, in this order: train, evaluate, merge, export."""
    out: str | None = None
    """The run folder; null makes one under outputs/."""
    resume: str | None = None
    """A run or checkpoint folder to resume, or auto for this run folder's newest checkpoint."""
    adapter_path: str | None = None
    """An existing adapter to continue from."""
    allow_drift: list[str] = field(default_factory=list)
    """Keys allowed to differ from what was recorded; the change is applied and noted."""
    trackers: list[str] = field(default_factory=list)
    """Trackers beside metrics.jsonl: tensorboard, wandb, trackio."""


def trained_tokens(config: RunConfig) -> list[str]:
    """The tokens whose own rows train: those that the targets name, and the added ones."""
    return list(dict.fromkeys([*config.targets.tokens, *config.model.add_tokens]))
