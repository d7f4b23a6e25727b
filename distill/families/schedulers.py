"""What the scheduler_config.json of a diffusers folder says of the model: its prediction and noise schedule."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from distill.sampling import Flow, ScaledLinear

PREDICTION_TYPES = {"epsilon": "epsilon", "x0": "sample", "v": "v_prediction"}
"""Our names and diffusers' of what discrete models predict."""


def read_config(path: Path) -> dict[str, Any]:
    """scheduler_config.json of a folder's ``scheduler``; {} where there is none."""
    return json.loads(path.read_text()) if path.is_file() else {}


def discrete(config: dict[str, Any], where: str) -> tuple[str, ScaledLinear]:
    """Prediction and schedule of a variance-preserving model. Raises ValueError for one that we do not have."""
    kind, spacing = config.get("prediction_type", "epsilon"), config.get("beta_schedule")
    names = {theirs: ours for ours, theirs in PREDICTION_TYPES.items()}
    if kind not in names or spacing not in ("scaled_linear", "linear"):
        raise ValueError(
            f"{where} says prediction_type {kind!r} and beta_schedule {spacing!r}; we have "
            f"{', '.join(list(names)[:-1])} or {list(names)[-1]} on scaled_linear or linear"
        )
    schedule = ScaledLinear(
        float(config["beta_start"]),
        float(config["beta_end"]),
        int(config["num_train_timesteps"]),
        bool(config.get("rescale_betas_zero_snr", False)),
        spacing == "linear",
    )
    return names[kind], schedule


def flow(config: dict[str, Any], where: str, shift: float | None = None, *, tokens: int | None = None) -> Flow:
    """Schedule of a flow-matching model. shift: in the place of the folder's (flow_shift of UniPC, shift of Euler).

    tokens: of a picture, where the shift depends on the resolution (Esser et al., arXiv 2403.03206, §5.3.2): e^μ, with
    μ linear in the tokens between ``base_image_seq_len`` and ``max_image_seq_len``, as FLUX and diffusers have it.
    """
    if not is_flow(config):
        raise ValueError(f"{where} is {config.get('_class_name')!r}, which is no flow-matching scheduler")
    if shift is not None:
        return Flow(shift)
    if config.get("use_dynamic_shifting"):
        return Flow(_dynamic_shift(config, where, tokens))
    return Flow(float(config.get("flow_shift", config.get("shift", 1.0))))


def _dynamic_shift(config: dict[str, Any], where: str, tokens: int | None) -> float:
    kind = config.get("time_shift_type", "exponential")
    if tokens is None or kind != "exponential" or config.get("shift_terminal"):
        raise ValueError(
            f"{where} shifts time by resolution (time_shift_type {kind!r}, shift_terminal "
            f"{config.get('shift_terminal')}) in a way that this family does not have; give shift in the recipe"
        )
    low, high = float(config.get("base_image_seq_len", 256)), float(config.get("max_image_seq_len", 4096))
    least, most = float(config.get("base_shift", 0.5)), float(config.get("max_shift", 1.15))
    return math.exp(least + (most - least) * (tokens - low) / (high - low))


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler integrates a flow: diffusers' FlowMatch classes, or multistep solvers told so."""
    named = str(config.get("_class_name", "")).startswith("FlowMatch")
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
