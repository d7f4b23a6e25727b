"""The model card of a published student: how to use it, its scores, what it cost and how it was made.

Everything comes from the bundle's manifest and the run's own log; what neither holds is said to be missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.bundle import Manifest
from distill.reward_names import overlaps

_TAGS = {"text-to-image": "text-to-image", "class-to-image": "unconditional-image-generation"}
_METHODS = {
    "adaptation": "AMD's score adaptation",
    "sharpening": "AMD's landscape sharpening",
    "gan": "a GAN on the fake score",
    "foundation_gan": "a GAN on a frozen tower",
    "regression": "regression to the teacher's ODE",
    "reward_gradient": "a reward's gradient",
    "policy_gradient": "a policy gradient",
}


@dataclass(frozen=True)
class Cost:
    """What a run took: seconds on the clock, CPU-seconds of the first process, samples that went forward per role.

    gpu_seconds: of all ranks together; 0 where the run had no GPU, or its log does not tell.
    """

    iterations: int
    seconds: float
    cpu_seconds: float
    forwards: dict[str, float]
    gpu_seconds: float = 0.0


def read_cost(run: Path, recipe: dict[str, Any]) -> Cost | None:
    """From a run's log; None where there is none, or where the run had another recipe."""
    log, own = run / "log.jsonl", run / "recipe.yaml"
    if not (log.is_file() and own.is_file()) or _plain(yaml.safe_load(own.read_text())) != _plain(recipe):
        return None
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.strip()]
    forwards: dict[str, float] = {}
    for line in lines:
        for key in (key for key in line if key.startswith("forwards/")):
            forwards[key.removeprefix("forwards/")] = forwards.get(key.removeprefix("forwards/"), 0.0) + (
                line[key] or 0
            )
    seconds, cpu, gpu = (
        sum(float(line.get(key) or 0) for line in lines) for key in ("seconds", "cpu_seconds", "gpu_seconds")
    )
    return Cost(max(line["iteration"] for line in lines), seconds, cpu, forwards, gpu) if seconds else None


def _plain(tree: Any) -> Any:
    return json.loads(json.dumps(tree))


def card(manifest: Manifest, usage: str, cost: Cost | None, notes: dict[str, Any] | None = None) -> str:
    """README.md as text. usage: Python that makes a picture; notes: further facts, such as a LoRA's fidelity."""
    recipe = manifest.provenance.get("recipe", {})
    parts = [
        _front(manifest, recipe),
        f"# {manifest.name}\n\n{_summary(manifest, recipe)}",
        f"## Use\n\n```python\n{usage.strip()}\n```\n\n{_steps(manifest)}",
        *([f"## About this file\n\n{_list(notes)}"] if notes else []),
        f"## Scores\n\n{_scores(manifest)}",
        f"## Cost\n\n{_cost(cost, manifest.provenance)}",
        f"## Recipe\n\n{_judges(recipe)}\n\n```yaml\n{_yaml(recipe)}```",
        f"## Provenance\n\n{_provenance(manifest)}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _front(manifest: Manifest, recipe: dict[str, Any]) -> str:
    facts = {
        "library_name": "diffusers",
        "pipeline_tag": _TAGS.get(manifest.task, manifest.task),
        "base_model": recipe.get("teacher"),
        "tags": ["distillation", "few-step", "leapfrog", manifest.family],
    }
    return f"---\n{_yaml({k: v for k, v in facts.items() if v})}---"


def _summary(manifest: Manifest, recipe: dict[str, Any]) -> str:
    steps = _words(sorted(manifest.samplers))
    used = [words for key, words in _METHODS.items() if recipe.get(key)]
    method = "distribution matching distillation" + (f" with {_words(used)}" if used else "")
    (width, height), *_ = manifest.sizes
    teacher = f" of `{recipe['teacher']}`" if recipe.get("teacher") else ""
    return (
        f"A student{teacher} that makes {width} × {height} pictures in {steps} step{'' if steps == '1' else 's'}, by "
        f"{method}. It inherits its teacher's licence. Use it at a guidance scale of "
        f"{manifest.guidance.scale:g}."
    )


def _steps(manifest: Manifest) -> str:
    lines = ["| steps | timesteps |", "|---|---|"]
    for steps, sampler in sorted(manifest.samplers.items()):
        chosen = " (default)" if steps == manifest.default_steps else ""
        lines.append(f"| {steps}{chosen} | {', '.join(f'{t:g}' for t in sampler.timesteps)} |")
    return "\n".join(lines)


def _scores(manifest: Manifest) -> str:
    rows = [
        (suite, steps, name, score)
        for suite, by_steps in sorted(manifest.scores.items())
        for steps, metrics in sorted(by_steps.items(), key=lambda item: int(item[0]))
        for name, score in sorted(metrics.items())
    ]
    if not rows:
        return "None are recorded in the bundle."
    lines = ["| suite | steps | metric | value | 95 % interval | n |", "|---|---|---|---|---|---|"]
    for suite, steps, name, score in rows:
        arrow = {"higher": "↑", "lower": "↓"}.get(score.get("direction", ""), "")
        flag = " (trained on)" if score.get("trained_on") else ""
        interval = f"{score['low']:.4g} to {score['high']:.4g}" if "low" in score and "high" in score else ""
        value = f"{score['value']:.4g} {score.get('unit', '')}".strip()
        lines.append(f"| {suite} | {steps} | {name}{flag} {arrow} | {value} | {interval} | {score.get('n', '')} |")
    return "\n".join(lines) + "\n\nA score marked *trained on* was the reward of the training and proves nothing."


def _cost(cost: Cost | None, provenance: dict[str, Any]) -> str:
    where = _machine(provenance)
    if cost is None:
        return "Not recorded: the run's log is not at hand." + (f" It ran on {where}." if where else "")
    roles = ", ".join(f"{role} {count:,.0f}" for role, count in sorted(cost.forwards.items()) if count)
    spent = f"{_duration(cost.cpu_seconds)} of processor time in the first process"
    if cost.gpu_seconds:
        spent = f"{_duration(cost.gpu_seconds)} of GPU time in all processes"
    return (
        f"{cost.iterations:,} iterations in {_duration(cost.seconds)} on the clock, {spent}"
        + (f", on {where}" if where else "")
        + (f"; samples that went forward: {roles}." if roles else ".")
        + _gpu_hours(cost, provenance)
    )


def _machine(provenance: dict[str, Any]) -> str:
    """The hardware of a run in words; empty where the bundle does not say."""
    machine, ranks = provenance.get("machine"), provenance.get("ranks")
    if not machine or not ranks:
        return ""
    gpus = [f"{count} × {name}" for name, count in (machine.get("gpus") or {}).items()]
    hardware = _words(gpus) if gpus else f"{machine.get('cores')} cores of {machine.get('processor') or 'a processor'}"
    return f"{ranks} rank{'' if ranks == 1 else 's'}, each node with {hardware}"


def _gpu_hours(cost: Cost, provenance: dict[str, Any]) -> str:
    """Where the log has no GPU time: a rank has one GPU to itself."""
    if cost.gpu_seconds or not (provenance.get("machine") or {}).get("gpus"):
        return ""
    return f" That is {cost.seconds / 3600 * provenance['ranks']:.3g} GPU-hours."


def _duration(seconds: float) -> str:
    size, unit = next(
        (size, unit) for size, unit in ((3600, "hours"), (60, "minutes"), (0, "seconds")) if seconds >= size
    )
    return f"{seconds / (size or 1):.3g} {unit}"


def _judges(recipe: dict[str, Any]) -> str:
    train = (recipe.get("advantage") or {}).get("reward")
    if not train:
        return "No reward was used in training."
    heldout = [str(name) for name in recipe.get("heldout_rewards") or ()]
    if not heldout:
        return f"Trained on the reward `{train}`; no other reward was held out to check it."
    told = f"Trained on the reward `{train}`, held out: {_words([f'`{name}`' for name in heldout])}."
    return " ".join([told, *(f"Note that {reason}." for reason in overlaps(train, heldout))])


def _provenance(manifest: Manifest) -> str:
    p = manifest.provenance
    teacher = p.get("teacher") or {}
    dirty = " with uncommitted changes" if p.get("dirty") else ""
    facts = {
        "code": f"{p['revision']}{dirty}" if p.get("revision") else None,
        "made": p.get("time"),
        "teacher": teacher.get("digest") or teacher.get("revision") or teacher.get("source"),
        "seed": p.get("recipe", {}).get("seed"),
        "packages": ", ".join(f"{k} {v}" for k, v in (p.get("packages") or {}).items()),
    }
    return _list({key: value for key, value in facts.items() if value not in (None, "")}) or "Not recorded."


def _list(facts: dict[str, Any]) -> str:
    return "\n".join(
        f"- {key}: {f'{value:.4g}' if isinstance(value, float) else value}" for key, value in facts.items()
    )


def _words(items: list[Any]) -> str:
    *first, last = [str(item) for item in items]
    joint = "or" if isinstance(items[0], int) else "and"
    return f"{', '.join(first)} {joint} {last}" if first else last


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=110)
