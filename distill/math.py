"""The method's mathematics as pure tensor functions: no modules, no devices, no randomness.

x0, latents and displacements are (B, …) float tensors in the model's latent scale; coefficients per sample are (B,).
Symbols follow "Optimizing Few-Step Generation with Adaptive Matching Distillation" (AMD, arXiv 2602.07345) and DMD2
(arXiv 2405.14867): x is the student's clean sample, x_c, x_u, x_f the clean predictions of the teacher with the
prompt, of the teacher without it and of the fake score.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expand(coefficient: Tensor, like: Tensor) -> Tensor:
    """(B,) to (B, 1, …) so that it multiplies a (B, …) tensor."""
    return coefficient.reshape(-1, *(1,) * (like.ndim - 1))


def convert(
    prediction: str, x_t: Tensor, output: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x0, ε, v) of a network's output m, float32; α, σ: (B,) float64, and all arithmetic is float64.

    epsilon: x0 = (x_t − σ·m)/α;  x0: ε = (x_t − α·m)/σ;  v: x0 = α·x_t − σ·m, ε = σ·x_t + α·m;
    flow (m = ε − x0, α = 1 − σ): x0 = x_t − σ·m, ε = x_t + α·m. Always v = α·ε − σ·x0.
    """
    a, s = expand(alpha.double(), x_t), expand(sigma.double(), x_t)
    x, m = x_t.double(), output.double()
    if prediction == "epsilon":
        eps, x0 = m, (x - s * m) / a
    elif prediction == "x0":
        x0, eps = m, (x - a * m) / s
    elif prediction == "v":
        x0, eps = a * x - s * m, s * x + a * m
    elif prediction == "flow":
        x0, eps = x - s * m, x + a * m
    else:
        raise ValueError(f"prediction is {prediction!r}; use epsilon, x0, v or flow")
    return x0.float(), eps.float(), (a * eps - s * x0).float()


def target_for(prediction: str, x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a network should output for x_t = α·x0 + σ·ε: ε, x0, v = α·ε − σ·x0 or ε − x0."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    if prediction == "v":
        return expand(alpha, x0).to(x0) * noise - expand(sigma, x0).to(x0) * x0
    if prediction == "flow":
        return noise - x0
    raise ValueError(f"prediction is {prediction!r}; use epsilon, x0, v or flow")


def add_noise(x0: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t = α·x0 + σ·ε with per-sample coefficients (B,)."""
    return expand(alpha, x0).to(x0) * x0 + expand(sigma, x0).to(x0) * noise


def guide(x_u: Tensor, x_c: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance in the standard form: x_u + ω·(x_c − x_u)."""
    return x_u + scale * (x_c - x_u)


def ode_target(x_t: Tensor, x_s: Tensor, at_t: tuple[Tensor, Tensor], at_s: tuple[Tensor, Tensor]) -> Tensor:
    """The clean estimate from which one deterministic step leads from x_t to x_s (Salimans & Ho, arXiv 2202.00512).

    x̂ = (σ_t·x_s − σ_s·x_t)/(σ_t·α_s − σ_s·α_t) solves x_t = α_t·x̂ + σ_t·ε̂ with x_s = α_s·x̂ + σ_s·ε̂ for t > s, and
    holds for α_t = 0. For flows ε̂ − x̂ is (x_t − x_s)/(t − s), the mean velocity. at_t, at_s: (α, σ), each (B,).
    """
    (a_t, s_t), (a_s, s_s) = [[expand(c.double(), x_t) for c in pair] for pair in (at_t, at_s)]
    return ((s_t * x_s.double() - s_s * x_t.double()) / (s_t * a_s - s_s * a_t)).to(x_t.dtype)


def min_snr_weight(prediction: str, alpha: Tensor, sigma: Tensor, cap: float) -> Tensor:
    """What turns the loss of a parametrisation into min(SNR, cap)·‖x̂0 − x0‖², SNR = α²/σ²; (B,), finite for α or σ = 0.

    ‖Δε‖² = SNR·‖Δx0‖², and ‖Δv‖² = ‖Δx0‖²/σ² for v (with α² + σ² = 1) as for flows.
    """
    bounded = torch.minimum(alpha**2, cap * sigma**2)
    if prediction == "epsilon":
        return torch.where(alpha > 0, bounded / alpha.clamp_min(1e-12) ** 2, 1.0)
    if prediction == "x0":
        return torch.where(sigma > 0, bounded / sigma.clamp_min(1e-12) ** 2, cap)
    return bounded


def dm_displacement(x_c: Tensor, x_f: Tensor) -> Tensor:
    """Distribution matching: d_real − d_fake = x_c − x_f (the student's own x cancels; AMD Eq. 10)."""
    return x_c - x_f


def ca_displacement(x_c: Tensor, x_u: Tensor) -> Tensor:
    """Conditional alignment: d_ca = x_c − x_u (AMD Eq. 10; the guidance part of D-DMD Eq. 6)."""
    return x_c - x_u


def operator(dm: Tensor, ca: Tensor, *, guidance: float, alpha: Tensor, beta: Tensor) -> Tensor:
    """H = β·(d_real − d_fake) + α·(ω − 1)·d_ca  (AMD Eq. 10). α, β: (B,). α = β = 1 is DMD2.

    Identity: H_i = β_i·[guide(x_u, x_c, ω_i) − x_f] with ω_i = 1 + (α_i/β_i)(ω − 1).
    """
    return expand(beta, dm) * dm + expand(alpha, ca) * (guidance - 1.0) * ca


def normaliser(x: Tensor, x_guided: Tensor, *, floor: float = 1e-6) -> Tensor:
    """DMD2's per-sample scale n_i = mean |x_i − x_guided_i| over all but the batch; (B,), never below ``floor``.

    AMD keeps the unmodified guidance here, otherwise the adaptation would partly cancel.
    """
    return (x - x_guided).abs().flatten(1).mean(1).clamp_min(floor)


def pseudo_target_loss(x: Tensor, displacement: Tensor) -> Tensor:
    """½·mean‖x − sg[x + d]‖² per sample: (B,). Its gradient with respect to x is −d / (elements per sample)."""
    target = (x.detach().float() + displacement.detach().float()).float()
    return 0.5 * (x.float() - target).pow(2).flatten(1).mean(1)


def group_advantage(
    rewards: Tensor, group: int, *, sigma_floor: float = 0.0, eps: float = 1e-6, leave_one_out: bool = False
) -> Tensor:
    """a_i = (r_i − μ_g)/(σ_g + ε) within consecutive groups of ``group`` samples of one prompt (AMD Eq. 12). (B,).

    sigma_floor: lower bound of σ_g, against bang-bang weights where all samples of a group score alike.
    leave_one_out: the baseline of a sample is the mean of the others, r_i − μ_{−i} = G/(G − 1)·(r_i − μ_g): unbiased,
    and larger by that factor, so that more advantages reach a clip.
    """
    if group < 2 or len(rewards) % group:
        raise ValueError(f"{len(rewards)} rewards do not form groups of {group}; use a batch that is a multiple of it")
    # In float32 the mean of equal rewards may differ from them, and their tiny deviation would blow that up to |a| ≈ 1.
    r = rewards.double().reshape(-1, group)
    deviation = r.std(1, unbiased=False, keepdim=True).clamp_min(sigma_floor)
    advantage = ((r - r.mean(1, keepdim=True)) / (deviation + eps)).flatten()
    if leave_one_out:
        advantage = advantage * (group / (group - 1))
    return advantage.to(rewards.dtype)


def squash(advantage: Tensor, kind: str = "clip", bound: float = 1.0) -> Tensor:
    """ã in [−bound, bound]: clip(a), or bound·tanh(a/bound), which keeps the order of extreme samples."""
    if kind == "clip":
        return advantage.clamp(-bound, bound)
    if kind == "tanh":
        return bound * torch.tanh(advantage / bound)
    raise ValueError(f"squash is {kind!r}; use clip or tanh")


def adaptive_weights(squashed: Tensor, strength: float) -> tuple[Tensor, Tensor]:
    """(α, β) = (1 + s·ã, 1 − s·ã) of squashed advantages (AMD Eq. 13; the linear form is inferred). α + β = 2."""
    return 1.0 + strength * squashed, 1.0 - strength * squashed


def sharpening_weight(advantage: Tensor, *, group: int | None = None) -> Tensor:
    """W(a) = exp(−a) on the fake loss (AMD, repulsive landscape sharpening). (B,).

    group: scale W to mean 1 within groups of this size, which keeps the fake score's effective learning rate.
    """
    weight = torch.exp(-advantage)
    if group is None:
        return weight
    grouped = weight.reshape(-1, group)
    return (grouped / grouped.mean(1, keepdim=True)).flatten()


def effective_sample_size(weight: Tensor) -> Tensor:
    """(Σw)²/Σw² as a fraction of the number of samples: 1 for equal weights, 0 where all are 0."""
    return weight.sum().square() / (weight.square().sum() * len(weight)).clamp_min(1e-30)
