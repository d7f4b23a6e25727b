"""DMD2's two losses, with AMD's operator in the place of the displacement. Pure in everything but network calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from distill import math
from distill.families.base import Condition, Prediction, coefficients
from distill.objectives.plan import Hook, Matching, Rollout, Telemetry, fake_weight, student_weights
from distill.telemetry.sink import Some


def student_loss(
    family: Any,
    teacher: nn.Module,
    fake: nn.Module,
    rollout: Rollout,
    t: Tensor,
    noise: Tensor,
    *,
    guidance: float,
    hooks: Sequence[Hook] = (),
    ca: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Telemetry]:
    """L = ½·mean‖x − sg[x + H/n]‖² with H = β(x_c − x_f) + α(ω − 1)(x_c − x_u) at x_t = α_t·x + σ_t·ε.

    (DMD2 Eq. 7 with AMD Eq. 10; α = β = 1 without hooks.) t: (B,) in the model's time, noise like x. Gradients flow
    into rollout.x alone: teacher, fake and weights are detached. n is the per-sample normaliser of unmodified guidance.
    ca: times and noise of the alignment's part, if it is re-noised apart (D-DMD Eq. 8).
    """
    with torch.no_grad():
        matching = match(family, teacher, fake, rollout, t, noise, guidance=guidance, hooks=hooks, ca=ca)
        alpha, beta = student_weights(hooks, rollout, matching)
        h = math.operator(matching.dm, matching.ca, guidance=guidance, alpha=alpha, beta=beta)
        for more in (hook.displacement(rollout, matching) for hook in hooks):
            if more is not None:
                h = h + more
        step = h / math.expand(matching.scale, h)
    loss = math.pseudo_target_loss(rollout.x, step).mean()
    for extra in (hook.extra_student_loss(rollout) for hook in hooks):
        if extra is not None:
            loss = loss + extra
    dm, ca_ = matching.dm.flatten(1), matching.ca.flatten(1)
    telemetry: Telemetry = {
        "dm_norm": dm.norm(dim=1).mean(),
        "ca_norm": ca_.norm(dim=1).mean(),
        "dm_ca_cos": cosine_similarity(dm, ca_).mean(),
        "normaliser": matching.scale.mean(),
        "alpha": alpha,
        "beta": beta,
        "omega": 1.0 + alpha / beta.clamp_min(1e-6) * (guidance - 1.0),
        "x_std": rollout.samples.std(),
    }
    for hook in hooks:
        telemetry |= hook.student_telemetry(rollout, matching)
    return loss, telemetry


def match(
    family: Any,
    teacher: nn.Module,
    fake: nn.Module,
    rollout: Rollout,
    t: Tensor,
    noise: Tensor,
    *,
    guidance: float,
    hooks: Sequence[Hook] = (),
    ca: tuple[Tensor, Tensor] | None = None,
) -> Matching:
    """Both displacements and the normaliser, from one call of the teacher and one of the fake score (without a graph).

    With ``ca`` the teacher is called at both points and n = mean|x − (x_c + (ω − 1)·ca)|, which is the usual one when
    the points coincide (D-DMD does not print its normaliser; inferred).
    """
    for hook in hooks:
        teacher = hook.teacher(rollout, teacher)
    alpha_t, sigma_t = coefficients(family.schedule, t)
    x = rollout.samples
    x_t = math.add_noise(x, noise, alpha_t, sigma_t)
    if ca is None:
        conditional, empty = both(family, teacher, x_t, t, rollout.condition)
        x_c = conditional.x0
        alignment = math.ca_displacement(x_c, empty.x0)
        guided = math.guide(empty.x0, x_c, guidance)
    else:
        t_ca, noise_ca = ca
        x_ca = math.add_noise(x, noise_ca, *coefficients(family.schedule, t_ca))
        conditional, empty = both(family, teacher, x_ca, t_ca, rollout.condition)
        alignment = math.ca_displacement(conditional.x0, empty.x0)
        x_c = family.predict(teacher, x_t, t, rollout.condition).x0
        guided = x_c + (guidance - 1.0) * alignment
    x_f = family.predict(fake, x_t, t, rollout.condition).x0
    ones = torch.ones(len(x), device=x.device)
    scale = math.normaliser(x, guided)
    dm = math.dm_displacement(x_c, x_f)
    return Matching(t, x_t, x_c, x_f, dm, alignment, guidance, scale, ones, ones, teacher)


def fake_loss(
    family: Any, fake: nn.Module, rollout: Rollout, t: Tensor, noise: Tensor, *, hooks: Sequence[Hook] = ()
) -> tuple[Tensor, Telemetry]:
    """L = mean_i W_i·‖m_φ(x_t, t, c) − target‖² in the family's own parametrisation, on detached student samples.

    W = 1 without hooks (DMD2 Eq. 6); AMD's sharpening puts exp(−a) there.
    """
    alpha_t, sigma_t = coefficients(family.schedule, t)
    x = rollout.samples
    output = native(family, family.predict(fake, math.add_noise(x, noise, alpha_t, sigma_t), t, rollout.condition))
    errors = (output - math.target_for(family.prediction, x, noise, alpha_t, sigma_t)).pow(2).flatten(1).mean(1)
    weight = fake_weight(hooks, rollout, t)
    loss = (weight * errors).mean()
    for extra in (hook.extra_fake_loss(rollout) for hook in hooks):
        if extra is not None:
            loss = loss + extra
    telemetry: Telemetry = {
        "fake_error": errors.mean().detach(),
        "w": weight,
        "w_ess": math.effective_sample_size(weight),
        **by_noise("fake_error", errors.detach(), t / family.schedule.t_max),
    }
    for hook in hooks:
        telemetry |= hook.fake_telemetry(rollout, t, errors.detach(), weight)
    return loss, telemetry


def by_noise(name: str, values: Tensor, fraction: Tensor, bins: int = 5) -> Telemetry:
    """Means of values (B,) in equal bins of the time axis, by ``name/t0.2-0.4``; bins without a sample tell nothing."""
    bin_of = (fraction * bins).long().clamp(0, bins - 1)
    edges = [round(i / bins, 2) for i in range(bins + 1)]
    return {f"{name}/t{edges[i]:g}-{edges[i + 1]:g}": Some(values, bin_of == i) for i in range(bins)}


def native(family: Any, prediction: Prediction) -> Tensor:
    """A prediction in the parametrisation that the family's networks output."""
    outputs = {
        "epsilon": prediction.eps, "x0": prediction.x0, "v": prediction.v, "flow": prediction.eps - prediction.x0,
    }  # fmt: skip
    return outputs[family.prediction]


def both(
    family: Any, teacher: nn.Module, x_t: Tensor, t: Tensor, condition: Condition
) -> tuple[Prediction, Prediction]:
    """The teacher's estimates with and without the condition, in one call of twice the batch."""
    n, empty = len(x_t), family.unconditional(len(x_t))
    joined = {key: torch.cat((value, empty[key])) for key, value in condition.items()}
    p = family.predict(teacher, torch.cat((x_t, x_t)), torch.cat((t, t)), joined)
    return Prediction(p.x0[:n], p.eps[:n], p.v[:n], {}), Prediction(p.x0[n:], p.eps[n:], p.v[n:], {})
