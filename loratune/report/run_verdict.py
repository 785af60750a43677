"""What a run came to, in sentences, and how sure that is."""

from __future__ import annotations

from loratune.report.records import RunRecords
from loratune.units import percent, significant


def verdict(run: RunRecords) -> list[str]:
    """What the run came to, in sentences, and how sure that is."""
    return [text for text in (_trained(run), _gained(run), _sureness(run), _merged(run)) if text]


def _trained(run: RunRecords) -> str:
    rows = (run.data.get("train") or {}).get("kept")
    steps = (run.summary.get("training") or {}).get("steps")
    steps = steps or run.last_step
    names = [str(source.get("name")) for source in run.data.get("sources") or []]
    source = " and ".join(names) or run.setting("data.path", "its rows")
    amount = f" ({rows:,} rows)" if isinstance(rows, int) else ""
    done = "" if run.summary else " The run is not complete."
    return f"Trained for {steps:,} steps on {source}{amount}.{done}"


def _gained(run: RunRecords) -> str:
    adapted, base = run.adapted, run.evaluation.get("base")
    if not adapted:
        losses = run.history.pairs("eval/loss")
        if losses:
            step, loss = min(losses, key=lambda pair: pair[1])
            return f"Best evaluation loss {significant(loss)} nats per token, at step {int(step)}."
        return "Nothing was evaluated: this run says nothing about quality."
    rows = scored_rows(run)
    if not base:
        return f"On {rows} the loss is {significant(adapted['loss'])} nats per token."
    verb = "fell" if adapted["loss"] < base["loss"] else "did not fall: it went"
    text = (
        f"On {rows} the loss {verb} from {significant(base['loss'])} (base) to "
        f"{significant(adapted['loss'])} nats per token"
    )
    if adapted.get("exact_match") is not None:
        before, after = percent(base.get("exact_match")), percent(adapted["exact_match"])
        text += f", and exact answers went from {before} to {after}"
    return text + "."


def scored_rows(run: RunRecords) -> str:
    """How many rows the scores come from, and of which kind."""
    kind = "test" if run.setting("data.test_path") else "evaluation"
    return f"{run.evaluation.get('rows', 0):,} {kind} rows"


def _sureness(run: RunRecords) -> str:
    texts = []
    if run.exact_interval is not None:
        low, high = run.exact_interval
        texts.append(
            f"With {run.adapted['prompts']:,} prompts, the 95 % interval of exact match is "
            f"{low:.0%} to {high:.0%}."
        )
    if run.adapted:
        texts.append(
            "One run is one seed: to choose between variants, use loratune compare, which repeats "
            "seeds and tests the differences."
        )
    if run.adapted and run.history.values("eval/loss") and not run.setting("data.test_path"):
        texts.append(
            "The same rows chose the best step, so these scores are a little too good; "
            "data.test_path keeps others aside."
        )
    if run.data.get("overlap"):
        texts.append("Training and evaluation rows overlap, so these scores are too good.")
    return " ".join(texts)


def _merged(run: RunRecords) -> str:
    modules = run.merge.get("modules") or []
    if not modules:
        return ""
    worst = max(module["residual"] for module in modules)
    return (
        f"The merged model was proved: W′ − W equals ΔW to {worst:.1e} of ΔW in the worst of "
        f"{len(modules)} modules."
    )
