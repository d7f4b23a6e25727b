"""A recipe's sections and the hooks that they become."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from distill.config import parse_recipe
from distill.objectives.amd import DynamicScoreAdaptation, RepulsiveSharpening, RewardWeight
from distill.objectives.build import hooks_of
from distill.objectives.decoupled import DecoupledRenoising
from distill.objectives.deviation import ShrunkDeviation
from distill.objectives.diversity import FirstStepAnchor
from distill.objectives.dmdr import BetaRenoising, RewardGradient
from distill.objectives.fdistill import DivergenceWeight
from distill.objectives.foundation import FoundationAdversary
from distill.objectives.gan import Adversary
from distill.objectives.plan import Hook, Roles
from distill.objectives.regression import OdeRegression
from distill.objectives.rtdmd import PolicyGradient, RewardTilt, ScoreConsistency
from distill.objectives.safeguards import CoherenceGate, DiversityWatch, GuidanceCeiling, Ramp, RewardGap, TwoKey
from distill.objectives.senseflow import ImplicitAlignment, IntraSegmentGuidance
from distill.objectives.tdm import SubIntervalMatching
from distill.objectives.weak_to_strong import SharedTeacher

REWARD: dict[str, Any] = {"advantage": {"reward": "r"}}


def hooks(roles: Roles, **sections: Any) -> list[Hook]:
    tree = {
        "task": "distill", "name": "toy", "output": "bundles/toy", "teacher": "models/toy", "iterations": 10,
        "batch_size": 8, "student": {"learning_rate": 1e-4}, "fake": {"learning_rate": 1e-4}, "fake_warmup": 7,
    }  # fmt: skip
    recipe = parse_recipe(tree | sections)
    return hooks_of(recipe, roles, object(), recipe.heldout_rewards)


@pytest.mark.parametrize(
    ("sections", "classes"),
    [
        ({}, []),
        (REWARD, []),
        ({**REWARD, "heldout_rewards": ["judge"]}, [RewardGap]),
        ({**REWARD, "adaptation": {}}, [DynamicScoreAdaptation]),
        ({**REWARD, "sharpening": {}}, [RepulsiveSharpening]),
        ({"regression": {"pairs": 4}}, [OdeRegression]),
        ({"gan": {}}, [Adversary]),
        ({"gan": {}, "divergence": {}}, [Adversary, DivergenceWeight]),
        ({"foundation_gan": {"features": "models/digits-reward"}}, [FoundationAdversary]),
        ({"regression": {"pairs": 4, "features": "models/digits-reward"}}, [OdeRegression]),
        ({"decoupled": {}}, [DecoupledRenoising]),
        ({**REWARD, "reward_weighting": {}}, [RewardWeight]),
        ({**REWARD, "reward_gradient": {}}, [RewardGradient]),
        ({**REWARD, "reward_tilt": {"beta": 1.0}}, [RewardTilt]),
        ({**REWARD, "policy_gradient": {"weight": 1.0}}, [PolicyGradient]),
        ({"advantage": {"reward": "r", "shrinkage": 0.5}, "adaptation": {}}, [ShrunkDeviation, DynamicScoreAdaptation]),
        ({"consistency": {}}, [ScoreConsistency]),
        ({"dynamic_renoising": {}}, [BetaRenoising]),
        ({"shared_teacher": {}}, [SharedTeacher]),
        ({"implicit_alignment": {}, "segment_guidance": {}}, [ImplicitAlignment, IntraSegmentGuidance]),
        ({"sub_interval": {}}, [SubIntervalMatching]),
        ({"first_step_anchor": {}}, [FirstStepAnchor]),
        (
            {
                **REWARD,
                "heldout_rewards": ["judge"],
                "safeguards": {
                    "ramp": 5, "guidance_ceiling": 1.5, "coherence": 0.0, "two_key": 1,
                    "reward_gap": {}, "diversity": {},
                },
            },
            [Ramp, TwoKey, RewardGap, DiversityWatch, CoherenceGate, GuidanceCeiling],
        ),
    ],
)  # fmt: skip
def test_each_section_is_its_hook(roles: Roles, sections: dict[str, Any], classes: list[type[Hook]]) -> None:
    assert [type(hook) for hook in hooks(roles, **sections)] == classes


def test_adaptation_alone_is_told_of_what_it_amplifies(roles: Roles, caplog: pytest.LogCaptureFixture) -> None:
    for beside in ({"sharpening": {}}, {"safeguards": {"coherence": 0.0}}):
        hooks(roles, **REWARD, adaptation={}, **beside)
        assert not caplog.messages
    hooks(roles, **REWARD, adaptation={})
    (told,) = caplog.messages
    assert told.startswith("adaptation alone enlarges the steps of poor samples")


def test_what_a_section_says_reaches_its_hook(roles: Roles) -> None:
    reward = {"advantage": {"reward": "r", "squash": "tanh", "bound": 2.0, "group": 2}}
    adaptation, sharpening, ramp = hooks(
        roles, **reward, adaptation={"strength": 0.3}, sharpening={"clipped": True}, safeguards={"ramp": 5}
    )
    assert isinstance(adaptation, DynamicScoreAdaptation) and isinstance(sharpening, RepulsiveSharpening)
    assert (adaptation.strength, sharpening.group) == (0.3, 2)
    for hook in (adaptation, sharpening):
        torch.testing.assert_close(hook.squash(torch.tensor([2.0])), 2 * torch.tanh(torch.tensor([1.0])))
    assert isinstance(ramp, Ramp) and (ramp.start, ramp.length) == (7, 5)
    (raw,) = hooks(roles, **reward, sharpening={"clipped": False, "normalised": False})
    assert isinstance(raw, RepulsiveSharpening) and (raw.clipped, raw.group) == (False, None)
    (interval,) = hooks(roles, sub_interval={"snr_cap": None}, sampler="deterministic")
    assert isinstance(interval, SubIntervalMatching) and interval.deterministic and interval.snr_cap is None
    (watching,) = hooks(roles, **REWARD, heldout_rewards=["judge"])
    (acting,) = hooks(
        roles, **REWARD, heldout_rewards=["judge"], safeguards={"reward_gap": {"tolerate": 0.1, "refuse": 0.2}}
    )
    assert isinstance(watching, RewardGap) and isinstance(acting, RewardGap)
    assert (watching.acts, acting.acts, acting.tolerate, acting.refuse) == (False, True, 0.1, 0.2)
    (gan,) = hooks(roles, gan={"source": "teacher", "r1": 0.5, "ramp": 3})
    assert isinstance(gan, Adversary) and gan.network is roles.teacher and (gan.r1, gan.ramp) == (0.5, 3)
