"""What a recipe may say of its telemetry. Means, histograms and counts are always logged; probes cost passes."""

from __future__ import annotations

from pydantic import Field

from distill.strict import Fraction, Steps, Strict


class Probing(Strict):
    """Probes: the same noise and prompts are sampled and measured again every so many iterations."""

    every: int | None = Field(100, ge=1, description="iterations between probes; None: no probes")
    prompts: int = Field(8, ge=1)
    samples: int = Field(4, ge=2, description="per prompt")
    level: Fraction = Field(
        0.5,
        gt=0,
        lt=1,
        description="of noise, as a fraction of the time axis; with sub_interval, of the last step's part",
    )
    teacher_steps: Steps = Field(20, description="of the teacher's own samples, drawn once, which are the yardstick")
