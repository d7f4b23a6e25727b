"""What the scheduler_config.json of a diffusers folder says of the model: its prediction and noise schedule."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from distill.sampling import Flow, ScaledLinear

PREDICTION_TYPES = {"epsilon": "epsilon", "v": "v_prediction"}
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
            f"{' or '.join(names)} on scaled_linear or linear"
        )
    schedule = ScaledLinear(
        float(config["beta_start"]),
        float(config["beta_end"]),
        int(config["num_train_timesteps"]),
        bool(config.get("rescale_betas_zero_snr", False)),
        spacing == "linear",
    )
    return names[kind], schedule


def flow(config: dict[str, Any], where: str, shift: float | None = None) -> Flow:
    """Schedule of a flow-matching model. shift: in the place of the folder's (flow_shift of UniPC, shift of Euler)."""
    if not is_flow(config):
        raise ValueError(f"{where} is {config.get('_class_name')!r}, which is no flow-matching scheduler")
    return Flow(float(config.get("flow_shift", config.get("shift", 1.0))) if shift is None else shift)


def is_flow(config: dict[str, Any]) -> bool:
    """Whether a scheduler integrates a flow: diffusers' FlowMatch classes, or multistep solvers told so."""
    named = str(config.get("_class_name", "")).startswith("FlowMatch")
    return named or bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
