"""What a recipe may say of each method; the classes that do it, with sources and confidence, are named alike.

Every section is optional and adds its term to those of the others.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill.strict import Decay, Fraction, Steps, Strict


class Advantage(Strict):
    """Where a comes from: a reward, normalised within groups of samples of one prompt (AMD Eq. 12)."""

    reward: str = Field(description="folder of the reward")
    group: int = Field(4, ge=1, description="samples per prompt; 1 scores and logs the reward without advantages")
    sigma_floor: float = Field(0.0, ge=0, description="lower bound of a group's deviation, in points of the reward")
    baseline: Literal["mean", "leave-one-out"] = Field("mean", description="of the group; the paper's is the mean")
    squash: Literal["clip", "tanh"] = Field("clip", description="what makes ã of a; the paper clips")
    bound: float = Field(1.0, gt=0, description="ã lies in [−bound, bound]; 1 is inferred from the paper's weights")
    shrinkage: Fraction = Field(
        0.0, description="share of the running variance in σ²; the paper's σ is the group's own"
    )
    decay: Decay = Field(0.98, description="of that running variance")
    when: Literal["always", "student", "reuse", "last-step"] = Field(
        "always",
        description="what is decoded and scored: every sample, those of iterations with the student (student, reuse), "
        "or those of the last step of a grid. a is 0 for the others, which is DMD2; reuse repeats prompts and noise of "
        "the last iteration with the student in those without, and takes its a",
    )
    share: float = Field(
        1.0, gt=0, le=1, description="of the prompts of a micro-batch that are scored; a is 0 for others"
    )
    precision: Literal["float32", "bfloat16"] | None = Field(
        None, description="of decoding and judging; None decodes in the recipe's precision and judges in float32"
    )
    decoder: str | None = Field(
        None,
        description="folder or hub id of an AutoencoderTiny, such as madebyollin/taesdxl, that decodes what is judged; "
        "None: the family's own",
    )


class Adaptation(Strict):
    """AMD's dynamic score adaptation (Eq. 10, 12, 13): α, β = 1 ± s·ã. The paper's s is known at low confidence."""

    strength: float = Field(0.1, ge=0, lt=1, description="s")


class Sharpening(Strict):
    """AMD's repulsive landscape sharpening: the fake loss is weighted by W(a) = exp(−a)."""

    clipped: bool = Field(True, description="W of ã instead of a; the paper is silent")
    normalised: bool = Field(True, description="W scaled to mean 1 in its group; the paper is silent")


class Regression(Strict):
    """DMD: regression of the student's first step to the ends of the teacher's ODE."""

    weight: float = Field(0.25, ge=0)
    pairs: int = Field(1000, ge=1, description="size of the fixed set")
    steps: Steps = Field(50, description="of the teacher")
    features: str | None = Field(
        None, description="folder of a frozen network in whose feature maps pictures are compared; None: latents"
    )


class Gan(Strict):
    """DMD2: a discriminator on real data; its optimizer is the recipe's ``discriminator``."""

    weight: float = Field(5e-3, ge=0, description="of the student's loss")
    fake_weight: float = Field(1e-2, ge=0, description="of the classification in the fake's loss; 0: the head alone")
    source: Literal["fake", "teacher"] = Field("fake", description="whose features the head reads")
    tap: str = "mid"
    ramp: int = Field(0, ge=0, description="iterations in which weight grows from 0")
    r1: float = Field(0.0, ge=0, description="γ of (γ/2)·‖∇D‖² at real samples; DMD2 has none")
    r1_form: Literal["exact", "finite"] = Field("exact", description="second backward pass, or finite difference")
    r1_delta: float = Field(0.01, gt=0, description="of the finite difference")


class FoundationGan(Strict):
    """SenseFlow: a discriminator on a frozen tower's features of clean pictures; its optimizer is ``discriminator``."""

    features: str = Field(description="folder of the tower, a CLIPModel or a digit classifier")
    weight: float = Field(5e-3, ge=0, description="of the student's loss; the paper's is unknown, this is DMD2's")
    width: int = Field(64, ge=1, description="of the heads' hidden layer")
    ramp: int = Field(0, ge=0, description="iterations in which weight grows from 0")


class Decoupled(Strict):
    """D-DMD: guidance's part is re-noised between clean and the student's own step, matching's everywhere."""


class RewardWeighting(Strict):
    """Re-DMD: the student's displacement is multiplied by exp(κ·(r − centre)/scale)."""

    kappa: float = Field(2.0, ge=0)
    centre: float = Field(0.0, description="in points of the reward; the reference's reward is standardised already")
    scale: float = Field(1.0, gt=0, description="in points of the reward")
    bound: float | None = Field(None, gt=0, description="of |(r − centre)/scale|; None as the reference")


class RewardGradient(Strict):
    """DMDR: −λ·r(decode(x)) in the student's loss, differentiated."""

    weight: float = Field(0.05, ge=0, description="λ, per point of the reward")
    start: int = Field(0, ge=0, description="first iteration; the reference begins after its cold start")


class DynamicRenoising(Strict):
    """DMDR: re-noising times from Beta(a, b), annealed to uniform."""

    a: float = Field(4.0, gt=0)
    b: float = Field(1.5, gt=0)
    anneal: int = Field(10_000, ge=1, description="iterations")


class SharedTeacher(Strict):
    """MagicDistillation (constant) and DMDR (annealed): the real teacher takes a share of the fake score."""

    share: float = Field(0.25, ge=0, lt=1, description="of the fake's difference from the teacher; DMDR 0.375")
    anneal: int | None = Field(None, ge=1, description="iterations to zero along a cosine; DMDR 10,000")


class ImplicitAlignment(Strict):
    """SenseFlow: the fake score follows the student after each of its steps."""

    decay: Decay = Field(0.97, description="λ in φ ← λ·φ + (1 − λ)·θ")


class SegmentGuidance(Strict):
    """SenseFlow: the student's step agrees with the teacher's and its own through a time in between."""

    weight: float = Field(0.5, ge=0)
    margin: Fraction = Field(0.05, description="kept free at both ends of a segment")


class SubInterval(Strict):
    """TDM: each step is matched within its own segment of time."""

    snr_cap: float | None = Field(5.0, gt=0, description="fake loss min(SNR, cap)·‖Δx0‖²; None: the family's own")


class FirstStepAnchor(Strict):
    """DP-DMD: the first step learns where the teacher's trajectories lead, without distribution matching."""

    weight: float = Field(0.05, ge=0)
    anchor: int = Field(5, ge=1, description="steps of the teacher")
    steps: Steps = Field(30, description="of the teacher's whole grid")
    matching: bool = Field(False, description="match distributions on the first step as well")

    @model_validator(mode="after")
    def _inside(self) -> FirstStepAnchor:
        if self.anchor > self.steps:
            raise ValueError(f"anchor {self.anchor} lies beyond the {self.steps} steps of the teacher; use fewer")
        return self


class RewardTilt(Strict):
    """RTDMD: the teacher's target is tilted by e^{βr} through the reward's gradient."""

    beta: float = Field(gt=0, description="per point of the reward; one over its deviation is AMD's temperature")
    deviation: float = Field(1.0, gt=0, description="of the data per dimension, in latents")


class Consistency(Strict):
    """RTDMD's cold start: the fake score agrees with itself along the reverse process."""

    weight: float = Field(0.01, ge=0)
    span: Fraction = Field(0.2, gt=0, description="longest step back, as a fraction of the time axis")


class PolicyGradient(Strict):
    """RTDMD's and DMDR's reward term without the reward's gradient: SubGRPO on the student's stochastic steps."""

    weight: float = Field(gt=0, description="of −a·log p, log p being −mean‖x_{k+1} − α·x̂‖²")
    bound: float = Field(5.0, gt=0, description="|a| at most")


class Divergence(Strict):
    """f-distill: the displacement times h of the density ratio that the discriminator estimates."""

    kind: Literal[
        "reverse-kl", "forward-kl", "jensen-shannon", "softened-reverse-kl", "squared-hellinger", "jeffreys", "neyman"
    ] = "jensen-shannon"
    bounds: tuple[float, float] = Field((0.1, 20.0), description="of the ratio")
    bins: int = Field(10, ge=1, description="of time, each with its mean ratio")
    decay: Decay = Field(0.9, description="of those means; the reference keeps none")

    @model_validator(mode="after")
    def _ordered(self) -> Divergence:
        if not 0 < self.bounds[0] < self.bounds[1]:
            raise ValueError(f"bounds is {self.bounds}; give two positive numbers, the smaller first")
        return self


class GapGuard(Strict):
    """s falls from all to nothing as the training reward's progress exceeds the held-out rewards'."""

    tolerate: float = Field(0.5, ge=0, description="gap in standard deviations up to which s is whole")
    refuse: float = Field(1.5, gt=0, description="gap from which s is 0")
    window: int = Field(50, ge=1, description="first iterations, which are the reference")
    decay: Decay = 0.98

    @model_validator(mode="after")
    def _ordered(self) -> GapGuard:
        if self.tolerate >= self.refuse:
            raise ValueError(f"tolerate {self.tolerate} is not below refuse {self.refuse}; s falls between them")
        return self


class DiversityGuard(Strict):
    """s falls from all to nothing as the samples of a prompt become alike."""

    tolerate: Fraction = Field(0.8, description="share of the first diversity down to which s is whole")
    refuse: Fraction = Field(0.5, description="share below which s is 0")
    window: int = Field(20, ge=1, description="first iterations of each step, which are the reference")
    decay: Decay = 0.95

    @model_validator(mode="after")
    def _ordered(self) -> DiversityGuard:
        if self.refuse >= self.tolerate:
            raise ValueError(f"refuse {self.refuse} is not below tolerate {self.tolerate}; s falls between them")
        return self


class Safeguards(Strict):
    """Brakes on AMD's reward signal, each off by default (distill.objectives.safeguards)."""

    ramp: int | None = Field(None, ge=1, description="iterations in which s grows from 0 after fake_warmup")
    guidance_ceiling: float | None = Field(None, ge=1, description="ω_i ≤ this times ω, such as 1.5")
    coherence: float | None = Field(None, ge=-1, le=1, description="cosine below which β is not raised, such as 0")
    two_key: int | None = Field(None, ge=1, description="draws of the teacher's residual, which must agree with a")
    reward_gap: GapGuard | None = None
    diversity: DiversityGuard | None = None
