"""No key is dead.  Every setting, changed alone, changes what the run does or is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import pytest
from support.command_line import Outcome

from faults.conftest import Bench
from faults.harness import in_parallel, tree
from faults.tally import TALLY
from loratune.adapters.registry import adapter_class, config_class, variant_names
from loratune.config.schema import RunConfig


def leaves(schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Every key; a variant's own as `adapter[NAME].KEY`."""
    hints = typing.get_type_hints(schema)
    for item in dataclasses.fields(schema):
        kind = hints[item.name]
        if item.name == "adapter":
            for name in variant_names():
                yield from leaves(config_class(name), f"adapter[{name}].")
        elif dataclasses.is_dataclass(kind):
            assert isinstance(kind, type)
            yield from leaves(kind, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}"


@dataclass(frozen=True)
class Mutation:
    """One value for a key, in a recipe where the key means something.

    Attributes:
        words: the changed key.
        within: what both the plain and the changed run say besides.
        calls: a function whose calls tell the two apart where their bytes need not.
    """

    words: tuple[str, ...]
    within: tuple[str, ...] = ()
    calls: str = ""


def m(*words: str, within: tuple[str, ...] = (), calls: str = "") -> Mutation:
    return Mutation(words, within, calls)


EVALUATED = ("stages=[train,evaluate]",)
MERGED = ("stages=[train,merge]",)
TALK = ("model.path={chat}", "data.path={talk}", "data.eval_path={talk}")
SPLIT = ("data.eval_path=null", "data.eval_fraction=0.25", "trainer.eval_every=2")

MUTATIONS: dict[str, Mutation] = {
    "name": m("name=other", within=("out=null",)),
    "model.path": m("model.path={base2}"),
    "model.revision": m("model.revision=main"),
    "model.dtype": m(
        "model.dtype=bfloat16", within=("trainer.precision=auto", "model.dtype=float32")
    ),
    "model.device": m("model.device=cuda"),
    "model.attention": m(
        "model.attention=eager", calls="torch.nn.functional.scaled_dot_product_attention"
    ),
    "targets.modules": m("targets.modules=[fc1]"),
    "targets.exclude": m("targets.exclude=[layers.0.self_attn.v_proj]"),
    "targets.layers": m("targets.layers=[0]"),
    "model.add_tokens": m('model.add_tokens=["<new>"]'),
    "targets.tokens": m('targets.tokens=["</s>"]'),
    "targets.modules_to_save": m("targets.modules_to_save=[final_layer_norm]"),
    "data.path": m("data.path={rows}"),
    "data.eval_path": m("data.eval_path={rows}", within=EVALUATED),
    "data.test_path": m("data.test_path={rows}", within=EVALUATED),
    "data.format": m("data.format=text"),
    "data.columns": m("+data.columns.prompt=completion"),
    "data.sources": m("data.path=null", "data.sources=[{{path: {rows}}}]"),
    "data.share_prefixes": m("data.share_prefixes=true", within=("adapter.dropout=0",)),
    "data.template": m("data.template='Q: {{prompt}} A: '"),
    "data.learn": m("data.learn=last", within=TALK),
    "data.reasoning": m("data.reasoning=drop", within=TALK),
    "data.special_tokens_in_text": m("data.special_tokens_in_text=parse", within=TALK),
    "data.max_length": m("data.max_length=16"),
    "data.overlong": m("data.overlong=drop", within=("data.max_length=16",)),
    "data.eval_fraction": m("data.eval_fraction=0.5", within=SPLIT),
    "data.split_by": m("data.split_by=row", within=("data.path={repeated}", *SPLIT)),
    "data.limit": m("data.limit=9"),
    "data.eval_limit": m("data.eval_limit=2", within=EVALUATED),
    "data.group_by_length": m("data.group_by_length=false"),
    "data.group_by_prefix": m("data.group_by_prefix=true"),
    "data.packing": m("data.packing=true"),
    "data.cache": m("data.cache={cache}", calls="loratune.data.cache.RowStore"),
    "trainer.steps": m("trainer.steps=5"),
    "trainer.epochs": m("trainer.epochs=2", within=("trainer.steps=null", "trainer.epochs=1")),
    "trainer.batch_size": m("trainer.batch_size=3"),
    "trainer.grad_accum_steps": m("trainer.grad_accum_steps=3"),
    "trainer.lr": m("trainer.lr=0.02"),
    "trainer.lr_scale": m("trainer.lr_scale=3", within=("trainer.lr=null",)),
    "trainer.schedule": m("trainer.schedule=cosine"),
    "trainer.warmup_steps": m("trainer.warmup_steps=2"),
    "trainer.warmup_ratio": m("trainer.warmup_ratio=0.5"),
    "trainer.weight_decay": m("trainer.weight_decay=0.5"),
    "trainer.betas": m("trainer.betas=[0.5,0.9]"),
    "trainer.eps": m("trainer.eps=0.1"),
    "trainer.clip_norm": m("trainer.clip_norm=0.01"),
    "trainer.eval_every": m("trainer.eval_every=1"),
    "trainer.save_every": m("trainer.save_every=1"),
    "trainer.keep_checkpoints": m("trainer.keep_checkpoints=1"),
    "trainer.early_stop_patience": m(
        "trainer.early_stop_patience=1",
        within=("trainer.eval_every=1", "trainer.lr=3", "trainer.steps=12"),
    ),
    "trainer.precision": m("trainer.precision=bf16"),
    "trainer.gradient_checkpointing": m(
        "trainer.gradient_checkpointing=true",
        calls="loratune.pipeline.training.checkpoint_activations",
    ),
    "trainer.router_loss": m("trainer.router_loss=true"),
    "trainer.compile": m("trainer.compile=true", calls="torch.compile"),
    "trainer.deterministic": m(
        "trainer.deterministic=false", calls="loratune.training.step.repeatable_kernels"
    ),
    "trainer.seed": m("trainer.seed=1"),
    "trainer.log_every": m("trainer.log_every=2"),
    "trainer.threads": m("trainer.threads=1", calls="torch.set_num_threads"),
    "evaluate.batch_size": m(
        "evaluate.batch_size=1", within=EVALUATED, calls="loratune.data.arrangement.collate"
    ),
    "evaluate.generate": m("evaluate.generate=true", within=EVALUATED),
    "evaluate.generate_limit": m(
        "evaluate.generate_limit=2", within=(*EVALUATED, "evaluate.generate=true")
    ),
    "evaluate.max_new_tokens": m(
        "evaluate.max_new_tokens=1", within=(*EVALUATED, "evaluate.generate=true")
    ),
    "evaluate.base": m("evaluate.base=false", within=EVALUATED),
    "evaluate.metrics": m("evaluate.metrics=[bleu]", within=(*EVALUATED, "evaluate.generate=true")),
    "evaluate.retention": m("evaluate.retention=[{rows}]", within=EVALUATED),
    "merge.dtype": m("merge.dtype=bfloat16", within=MERGED),
    "merge.verify": m("merge.verify=weights", within=MERGED),
    "merge.min_delta_kept": m("merge.min_delta_kept=2", within=(*MERGED, "merge.dtype=bfloat16")),
    "export.format": m("export.format=portable", within=("stages=[train,export]",)),
    "launch.nproc": m("launch.nproc=2"),
    "launch.shard": m("launch.shard=true"),
    "launch.max_restarts": m("launch.max_restarts=1", calls="loratune.pipeline.launch.launch"),
    "stages": m("stages=[train,merge]"),
    "out": m("out=elsewhere"),
    "adapter_path": m("adapter_path={adapter}"),
    "trackers": m("trackers=[tensorboard]"),
    "adapter.variant": m("adapter=lora_fa"),
    "adapter.rank": m("adapter.rank=3"),
    "adapter.alpha": m("adapter.alpha=7"),
    "adapter.dropout": m("adapter.dropout=0.5"),
    "adapter.lr": m("adapter.lr=0.05", within=("trainer.lr=null",)),
    "adapter.kernel": m("adapter.kernel=reference", calls="loratune.adapters.KERNEL"),
    "adapter.rank_pattern": m("+adapter.rank_pattern.q_proj=4"),
    "adapter.alpha_pattern": m("+adapter.alpha_pattern.q_proj=9"),
    "adapter.init": m("adapter.init=gaussian"),
    "adapter.block_size": m("adapter.block_size=4"),
    "adapter.feedforward_layers": m("adapter.feedforward_layers=[q_proj]"),
    "adapter.embedding_lr": m(
        "adapter.embedding_lr=0.5", within=("targets.modules=[q_proj,embed_tokens]",)
    ),
}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning_content }}{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TURNS = [
    {"role": "user", "content": "a</s>?"},
    {"role": "assistant", "reasoning_content": "hm", "content": "b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "reasoning_content": "so", "content": "d"},
]
ELSEWHERE = {
    "model.architecture": "count-params without the model",
    "data.split": "sources with several splits, which come from the hub",
    "resume": "a run that was stopped",
    "allow_drift": "resumes that differ",
    "launch.timeout": "several processes of which one hangs",
    "model.quantize": "bases in 4 or 8 bits, which need a package that may not be here",
    "model.quantize_double": "likewise",
    "model.quantize_skip": "likewise",
    "merge.base": "merges of an adapter that was trained on such a base",
    "merge.requantize": "likewise",
    "gguf.dtype": "exports of bases that llama.cpp has a graph for",
    "gguf.base": "exports of adapters to a GGUF file of such a base",
}
"""Keys that a plain `train` does not read, and what does; their tests lie there."""


def is_read_elsewhere(leaf: str) -> bool:
    """Whether another command than `train` gives the key its meaning."""
    return leaf in ELSEWHERE or leaf.startswith(("compare.", "gate."))


def mutation_of(leaf: str) -> tuple[str, Mutation]:
    """Variant and mutation of a key."""
    if not leaf.startswith("adapter["):
        return "lora", MUTATIONS[leaf]
    variant, _, key = leaf.removeprefix("adapter[").partition("].")
    mutation = MUTATIONS.get(f"adapter.{key}") or another_value(variant, key)
    if key == "variant" and variant == "lora_fa":
        mutation = m("adapter=lora")
    return variant, mutation


def another_value(variant: str, key: str) -> Mutation:
    """Another value of a variant's own setting that is not listed: a number, a switch, a choice."""
    value = getattr(config_class(variant)(), key)
    if isinstance(value, Enum):
        other: object = next(choice for choice in type(value) if choice is not value)
    elif isinstance(value, bool):
        other = str(not value).lower()
    else:
        assert isinstance(value, int | float), f"give adapter.{key} a mutation here"
        other = value + 1 if isinstance(value, int) else 2 * value or 0.5
    return m(f"adapter.{key}={other}")


def kernel_of(variant: str) -> str:
    """What ``kernel=reference`` does not call."""
    classes = adapter_class(variant).__mro__
    owner = next(cls for cls in classes if "fused_forward" in vars(cls))
    return f"{owner.__module__.removeprefix('loratune.adapters.')}.{owner.__name__}.fused_forward"


def what_the_bench_may_not_set(variant: str) -> tuple[str, ...]:
    """Words that put back what the bench sets and the variant has no use for."""
    config = config_class(variant)()
    names = {"rank", "dropout"} & set(config.without_effect)
    return tuple(f"adapter.{name}={getattr(config, name)}" for name in sorted(names))


def test_every_key_of_the_schema_has_a_mutation_here() -> None:
    known = {leaf for leaf in leaves(RunConfig) if not is_read_elsewhere(leaf)}
    plain = {leaf for leaf in known if not leaf.startswith("adapter[")}
    own = {"adapter." + leaf.partition("].")[2] for leaf in known - plain}
    assert plain <= set(MUTATIONS) <= plain | own


@dataclass
class Liveness:
    """Runs a recipe and a mutation of it, and says whether they differ."""

    bench: Bench
    known: dict[tuple[str, ...], tuple[Outcome, dict[str, str]]] = field(default_factory=dict)
    runs: Iterator[int] = field(default_factory=itertools.count)

    def unchanged(self, words: tuple[str, ...], calls: str) -> tuple[Outcome, dict[str, str]]:
        """As `observe`, once for the same words."""
        key = (*words, calls)
        if key not in self.known:
            self.known[key] = self.observe(words, calls)
        return self.known[key]

    def observe(self, words: tuple[str, ...], calls: str) -> tuple[Outcome, dict[str, str]]:
        """What a run does, without what merely repeats its recipe or the time."""
        folder = self.bench.folder / f"case{next(self.runs)}"
        folder.mkdir()
        given = {word.lstrip("+").partition("=")[0] for word in words}
        defaults = ("trainer.steps=4", "trainer.save_every=2")
        extra = [word for word in defaults if word.partition("=")[0] not in given]
        everything = self.bench.words("run", *extra, *words)
        faults = [f"count@{calls}"] if calls else []
        # torch.compile is called and seen; what it would compile is not waited for.
        outcome = self.bench.loratune(
            *everything, cwd=folder, faults=faults, environment={"TORCHDYNAMO_DISABLE": "1"}
        )
        seen = {
            STAMP.sub("TIME", name): value
            for name, value in tree(folder).items()
            if not name.endswith((*REPEATING, "latest"))
        }
        for path in folder.rglob("loratune.json"):
            values = json.loads(path.read_text())
            seen["prompt_format"] = json.dumps(values.get("prompt_format"))
        for path in folder.rglob("merge_report.json"):
            seen["logits proof"] = str(json.loads(path.read_text())["logits"] is not None)
        return outcome, seen


ALLOWED = {"data.format": (3,), "merge.min_delta_kept": (7,)}
"""Exit codes of mutations that are meant to stop the run."""
STAMP = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d-[0-9a-f]+")
"""Name of a run folder that was not chosen: its time and a random part."""
REPEATING = (
    "recipe.yaml", "manifest.json", "provenance.json", "report.html", "timings.jsonl",
    "loratune.json", "merge_report.json", "summary.json", "data.json", ".lock", "certificate.json",
)  # fmt: skip


def test_every_key_changed_alone_changes_the_run_or_is_refused(bench: Bench) -> None:
    places = {
        "base2": bench.shared / "base2",
        "rows": bench.folder / "other.jsonl",
        "repeated": bench.folder / "repeated.jsonl",
        "adapter": bench.folder / "before" / "adapter",
        "chat": bench.folder / "chat",
        "talk": bench.folder / "talk.jsonl",
        "cache": bench.folder / "cache",
    }
    shutil.copytree(bench.shared / "base", places["chat"])
    (places["chat"] / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    places["talk"].write_text((json.dumps({"messages": TURNS}) + "\n") * 6)
    lines = (bench.shared / "train.jsonl").read_text().splitlines(keepends=True)
    places["rows"].write_text("".join(lines[9:14]))
    places["repeated"].write_text("".join(lines[:6] + lines[:6]))
    assert bench.train("before", "adapter.dropout=0", "trainer.steps=4").code == 0
    live = Liveness(bench)
    dead: list[str] = []

    def mutate(leaf: str) -> None:
        variant, mutation = mutation_of(leaf)
        within = tuple(word.format(**places) for word in mutation.within)
        words = tuple(word.format(**places) for word in mutation.words)
        first = words[0].partition("=")[0]
        fitting = what_the_bench_may_not_set(variant)
        within = (*(() if first == "adapter" else (f"adapter={variant}",)), *fitting, *within)
        changed = {word.lstrip("+").partition("=")[0] for word in words}
        kept = tuple(word for word in within if word.partition("=")[0] not in changed)
        reference = within if first != "adapter" else (f"adapter={variant}", *within)
        calls = mutation.calls.replace("KERNEL", kernel_of(variant))
        plain, before = live.unchanged(reference, calls)
        if plain.code != 0:
            dead.append(f"{leaf}: the plain run failed: {plain.last}")
            return
        outcome, after = live.observe((*kept, *words), calls)
        TALLY.add("keys mutated")
        same = before == after and len(plain.calls) == len(outcome.calls)
        is_dead = outcome.code != 2 and same
        TALLY.add("keys without effect", int(is_dead))
        if is_dead or outcome.has_traceback or outcome.code not in ALLOWED.get(leaf, (0, 2)):
            dead.append(f"{leaf} ({outcome.code}: {outcome.last})")

    in_parallel(mutate, [leaf for leaf in leaves(RunConfig) if not is_read_elsewhere(leaf)])
    assert dead == []


@pytest.mark.parametrize("variant", variant_names())
def test_optimizer_groups_carry_the_recipes_numbers(variant: str) -> None:
    import torch
    from support.tiny_models import tiny_opt

    from loratune.config.schema import TargetsConfig, TrainerConfig
    from loratune.surgery import wrap_model
    from loratune.training.optim import make_optimizer

    torch.manual_seed(0)
    config = config_class(variant)()
    wrapped = wrap_model(tiny_opt(), config, TargetsConfig(), seed=0)
    trainer = TrainerConfig(lr=0.03, weight_decay=0.07, betas=[0.8, 0.95], eps=1e-5)
    groups = make_optimizer(wrapped.model, config, trainer).param_groups
    assert sum(len(group["params"]) for group in groups) == len(
        [p for p in wrapped.model.parameters() if p.requires_grad]
    )
    ratio = getattr(config, "lr_ratio", 1)
    for group in groups:
        assert group["lr"] in (0.03, 0.03 * ratio)
        assert tuple(group["betas"]) == (0.8, 0.95)
        assert group["eps"] == 1e-5
        assert group["weight_decay"] == 0.07
