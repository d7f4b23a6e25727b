"""Published methods as sections of a recipe, and the table that shows them as one operator (AMD's Table 1 and Eq. 7).

H = β·(d_real − d_fake) + α·(ω − 1)·d_ca,    L_fake = E[W·‖x̂_f(x_τ) − x‖²]
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening, RewardWeight
from distill.objectives.decoupled import DecoupledRenoising
from distill.objectives.diversity import FirstStepAnchor
from distill.objectives.dmdr import BetaRenoising, RewardGradient
from distill.objectives.fdistill import DivergenceWeight
from distill.objectives.foundation import FoundationAdversary
from distill.objectives.gan import Adversary
from distill.objectives.plan import Hook
from distill.objectives.regression import OdeRegression
from distill.objectives.rtdmd import PolicyGradient, RewardTilt, ScoreConsistency
from distill.objectives.senseflow import ImplicitAlignment, IntraSegmentGuidance
from distill.objectives.step_aware import StepAwareFake
from distill.objectives.tdm import SubIntervalMatching
from distill.objectives.weak_to_strong import SharedTeacher

HOOKS: dict[str, type[Hook]] = {
    "adaptation": DynamicScoreAdaptation,
    "sharpening": RepulsiveSharpening,
    "regression": OdeRegression,
    "gan": Adversary,
    "foundation_gan": FoundationAdversary,
    "divergence": DivergenceWeight,
    "decoupled": DecoupledRenoising,
    "reward_weighting": RewardWeight,
    "reward_gradient": RewardGradient,
    "reward_tilt": RewardTilt,
    "policy_gradient": PolicyGradient,
    "consistency": ScoreConsistency,
    "dynamic_renoising": BetaRenoising,
    "shared_teacher": SharedTeacher,
    "implicit_alignment": ImplicitAlignment,
    "segment_guidance": IntraSegmentGuidance,
    "sub_interval": SubIntervalMatching,
    "step_aware_fake": StepAwareFake,
    "first_step_anchor": FirstStepAnchor,
}
"""The hook of each section of a recipe."""


@dataclass(frozen=True)
class Method:
    """A method as what its recipe says beyond DMD2's; ``reward``: its recipe needs advantage.reward as well."""

    title: str
    paper: str
    sections: dict[str, Any] = field(default_factory=dict)
    reward: bool = False

    @property
    def hooks(self) -> list[type[Hook]]:
        return [HOOKS[key] for key in self.sections if key in HOOKS]


METHODS: dict[str, Method] = {
    "dmd2": Method("DMD2 without its GAN", "2405.14867"),
    "dmd2-gan": Method("DMD2", "2405.14867", {"gan": {}}),
    "dmd": Method("DMD", "2311.18828", {"fake_per_student": 1, "regression": {}}),
    "d-dmd": Method("D-DMD", "2511.22677", {"decoupled": {}}),
    "magic": Method("MagicDistillation", "2503.13319", {"shared_teacher": {}}),
    "dmdr": Method(
        "DMDR",
        "2511.13649",
        {"shared_teacher": {"share": 0.375, "anneal": 10_000}, "dynamic_renoising": {}, "reward_gradient": {}},
        reward=True,
    ),
    "re-dmd": Method("Re-DMD", "Reward Forcing", {"reward_weighting": {}}, reward=True),
    "tdm": Method("TDM", "2503.06674", {"fake_per_student": 1, "sampler": "deterministic", "sub_interval": {}}),
    "tdm-any": Method(
        "TDM for several numbers of steps",
        "2503.06674",
        {"fake_per_student": 1, "sampler": "deterministic", "sub_interval": {}, "step_aware_fake": True},
    ),
    "senseflow": Method(
        "SenseFlow",
        "2506.00523",
        {
            "implicit_alignment": {},
            "segment_guidance": {},
            "foundation_gan": {"features": "models/scenes-clip"},
        },
    ),
    "dp-dmd": Method("DP-DMD", "2602.03139", {"first_step_anchor": {}}),
    "ac-dmd": Method("AC-DMD", "2605.26108", {"sub_interval": {}, "consistency": {}}),
    "rtdmd": Method(
        "RTDMD",
        "2605.26108",
        {"sub_interval": {}, "consistency": {}, "policy_gradient": {"weight": 1.0}, "reward_gradient": {}},
        reward=True,
    ),
    "tilted": Method("RTDMD's target in one displacement", "2605.26108", {"reward_tilt": {"beta": 1.0}}, reward=True),
    "f-distill": Method("f-distill", "2502.15681", {"gan": {}, "divergence": {}}),
    "dsa": Method("AMD, adaptation alone", "2602.07345", {"adaptation": {}}, reward=True),
    "rls": Method("AMD, sharpening alone", "2602.07345", {"sharpening": {}}, reward=True),
    "amd": Method("AMD", "2602.07345", {"adaptation": {}, "sharpening": {}}, reward=True),
}

COLUMNS = ("method", "β", "α", "W", "d_real from", "τ of DM and fake", "τ of CA", "further terms", "sections")


def table() -> str:
    """The methods as Markdown, one row each."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(row(method) for method in METHODS.values())]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def row(method: Method) -> Sequence[str]:
    """What a method's hooks put into each slot of the operator."""
    seen = [hook.terms_in(method.sections) for hook in method.hooks]

    def slot(key: str, default: str, joint: str) -> str:
        return joint.join(text for terms in seen if (text := getattr(terms, key))) or default

    return (
        method.title,
        slot("beta", "1", " · "),
        slot("alpha", "1", " · "),
        slot("weight", "1", " · "),
        slot("real", "teacher", ", "),
        slot("times", "uniform", ", "),
        slot("ca_times", "that of DM", ", "),
        slot("extra", "–", "; "),
        _keys(method.sections),
    )


def _keys(sections: Iterable[str]) -> str:
    return ", ".join(f"`{key}`" for key in sections) or "–"
