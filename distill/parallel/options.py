"""What a recipe may say of several ranks."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from distill.strict import Strict


class Parallel(Strict):
    """How the ranks of torchrun hold the networks; one process holds them whole."""

    strategy: Literal["ddp", "fsdp", "hsdp"] = Field(
        "ddp", description="whole copies on each rank, shards over all ranks, or shards within groups of ranks"
    )
    replicas: int = Field(1, ge=1, description="hsdp: groups that hold a whole copy each, such as one per machine")

    context: int = Field(1, ge=1, description="ranks that share the tokens of one sample; for the wan family")

    @model_validator(mode="after")
    def _coherent(self) -> Parallel:
        if self.replicas > 1 and self.strategy != "hsdp":
            raise ValueError(f"replicas is {self.replicas} under strategy {self.strategy}; use strategy: hsdp")
        return self
