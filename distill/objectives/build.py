"""From a recipe to its hooks: one per section, in the order in which their limits apply."""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

from distill.config import DistillRecipe
from distill.math import squash
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening, RewardWeight
from distill.objectives.decoupled import DecoupledRenoising
from distill.objectives.deviation import ShrunkDeviation
from distill.objectives.diversity import FirstStepAnchor
from distill.objectives.dmdr import BetaRenoising, RewardGradient
from distill.objectives.fdistill import DivergenceWeight
from distill.objectives.features import load_perception
from distill.objectives.foundation import FoundationAdversary
from distill.objectives.gan import Adversary
from distill.objectives.options import GapGuard
from distill.objectives.plan import Hook, Roles
from distill.objectives.regression import OdeRegression
from distill.objectives.rtdmd import PolicyGradient, RewardTilt, ScoreConsistency
from distill.objectives.safeguards import CoherenceGate, DiversityWatch, GuidanceCeiling, Ramp, RewardGap, TwoKey
from distill.objectives.senseflow import ImplicitAlignment, IntraSegmentGuidance
from distill.objectives.step_aware import StepAwareFake
from distill.objectives.tdm import SubIntervalMatching
from distill.objectives.weak_to_strong import SharedTeacher

log = logging.getLogger(__name__)


def hooks_of(recipe: DistillRecipe, roles: Roles, reward: Any = None, heldout: tuple[str, ...] = ()) -> list[Hook]:
    """The hooks that a recipe names; none is DMD2. reward: the training reward; heldout: names of the others."""
    hooks = _amd(recipe)
    if regression := recipe.regression:
        hooks.append(
            OdeRegression(
                roles,
                weight=regression.weight,
                pairs=regression.pairs,
                steps=regression.steps,
                guidance=recipe.guidance,
                seed=recipe.seed,
                look=load_perception(regression.features) if regression.features else None,
                context=recipe.parallel.context,
            )
        )
    if gan := recipe.gan:
        adversary = Adversary(roles, **gan.model_dump(), seed=recipe.seed)
        hooks.append(adversary)
        if divergence := recipe.divergence:
            hooks.append(
                DivergenceWeight(
                    roles,
                    adversary,
                    divergence=divergence.kind,
                    bounds=divergence.bounds,
                    bins=divergence.bins,
                    decay=divergence.decay,
                )
            )
    if recipe.step_aware_fake:
        hooks.append(StepAwareFake(roles, recipe.steps))
    if foundation := recipe.foundation_gan:
        look = load_perception(foundation.features)
        hooks.append(FoundationAdversary(roles, look, **foundation.model_dump(exclude={"features"}), seed=recipe.seed))
    if recipe.decoupled:
        hooks.append(DecoupledRenoising())
    if weighting := recipe.reward_weighting:
        hooks.append(RewardWeight(**weighting.model_dump()))
    if gradient := recipe.reward_gradient:
        hooks.append(RewardGradient(roles, reward, **gradient.model_dump()))
    if tilt := recipe.reward_tilt:
        hooks.append(RewardTilt(roles, reward, **tilt.model_dump()))
    if (policy := recipe.policy_gradient) and recipe.advantage:
        hooks.append(PolicyGradient(roles, reward, group=recipe.advantage.group, **policy.model_dump()))
    if consistency := recipe.consistency:
        hooks.append(ScoreConsistency(roles, **consistency.model_dump()))
    if renoising := recipe.dynamic_renoising:
        hooks.append(BetaRenoising(**renoising.model_dump()))
    if shared := recipe.shared_teacher:
        hooks.append(SharedTeacher(roles, **shared.model_dump()))
    if alignment := recipe.implicit_alignment:
        hooks.append(ImplicitAlignment(roles, **alignment.model_dump()))
    if segment := recipe.segment_guidance:
        hooks.append(IntraSegmentGuidance(roles, guidance=recipe.guidance, **segment.model_dump()))
    if interval := recipe.sub_interval:
        deterministic = recipe.sampler == "deterministic"
        hooks.append(SubIntervalMatching(roles, deterministic=deterministic, **interval.model_dump()))
    if anchor := recipe.first_step_anchor:
        hooks.append(FirstStepAnchor(roles, guidance=recipe.guidance, **anchor.model_dump()))
    return hooks + _safeguards(recipe, roles, heldout)


def _amd(recipe: DistillRecipe) -> list[Hook]:
    hooks: list[Hook] = []
    advantage = recipe.advantage
    if advantage is None:
        return hooks
    if advantage.shrinkage and advantage.group > 1:
        hooks.append(
            ShrunkDeviation(
                group=advantage.group,
                shrinkage=advantage.shrinkage,
                decay=advantage.decay,
                floor=advantage.sigma_floor,
            )
        )
    squashed = partial(squash, kind=advantage.squash, bound=advantage.bound)
    if recipe.adaptation and not recipe.sharpening and recipe.safeguards.coherence is None:
        log.warning(
            "adaptation alone enlarges the steps of poor samples, also where the teacher knows nothing; "
            "add sharpening, which gives them a direction, or safeguards.coherence, which spares those without one"
        )
    if recipe.adaptation:
        hooks.append(DynamicScoreAdaptation(recipe.adaptation.strength, squash=squashed))
    if recipe.sharpening:
        group = advantage.group if recipe.sharpening.normalised else None
        hooks.append(RepulsiveSharpening(clipped=recipe.sharpening.clipped, group=group, squash=squashed))
    return hooks


def _safeguards(recipe: DistillRecipe, roles: Roles, heldout: tuple[str, ...]) -> list[Hook]:
    guards, hooks = recipe.safeguards, list[Hook]()
    group = recipe.advantage.group if recipe.advantage else 1
    if guards.ramp:
        hooks.append(Ramp(start=recipe.fake_warmup, length=guards.ramp))
    if guards.two_key:
        hooks.append(TwoKey(roles, group=group, draws=guards.two_key, time_range=recipe.time_range))
    if heldout:
        hooks.append(RewardGap(heldout, **(guards.reward_gap or GapGuard()).model_dump(), acts=bool(guards.reward_gap)))
    if guards.diversity:
        hooks.append(DiversityWatch(recipe.steps, group=group, **guards.diversity.model_dump()))
    if guards.coherence is not None:
        hooks.append(CoherenceGate(roles, threshold=guards.coherence))
    if guards.guidance_ceiling:
        hooks.append(GuidanceCeiling(guards.guidance_ceiling))
    return hooks
