"""What `klear ablate` is told: arms that differ in a few settings, the claims they test, and the scales they run at."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from megatron_klear.config.base import Settings

MainStage = Literal["sft", "gppo"]


class Claim(Settings):
    """One of `claims`: an arm that should end above another."""

    better: str
    than: str
    paper: str
    """What the paper found, in a few words."""


class Arm(Settings):
    """One of `arms`: a name, and what it changes."""

    name: str
    settings: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """By stage, dotted settings: `[arms.settings.gppo]`, `"loss.kind" = "ppo"`."""
    values: dict[str, str] = Field(default_factory=dict)
    """What `{name}` stands for in the commands of `prepare` and `stages`."""


class Stage(Settings):
    """One of `stages`: a command of `klear`, once for every arm and seed."""

    command: Literal["sft", "gppo", "evaluate"]
    flags: tuple[str, ...]
    """Its arguments; `{run}`, `{runs}`, `{seed}` and the arm's values are filled in."""


class Prepared(Settings):
    """One of `prepare`: a command of `klear` whose file or folder all runs share."""

    creates: str
    """What it makes, below the folder of all ablations; the command is given as `{output}`, and left out where that
    exists."""
    command: str


class Scale(Settings):
    """One of `scales`: models, data and seeds that the arms are tried with."""

    what: str
    design: str = ""
    """Instead of the experiment's, where this scale is set up otherwise."""
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] = ()
    """Names of the arms that are run at this scale, and of whose claims it speaks; all where there are none."""
    values: dict[str, str] = Field(default_factory=dict)
    """What `{name}` stands for, as an arm's values."""
    prepare: tuple[Prepared, ...] = ()
    stages: tuple[Stage, ...] = Field(min_length=1)
    result: str = "{run}/gppo"
    """The folder whose accuracies count: of a run with validations, or of an evaluation."""


class AblationConfig(Settings):
    """Settings of `klear ablate`."""

    title: str
    paper: str
    """What the paper did and found."""
    design: str
    """What the small experiment does, and why its effect can show there."""
    measure: Literal["end", "mean"] = "end"
    """Held-out accuracy that claims speak of: after the last step, or the mean over all validations but the first."""
    arms: tuple[Arm, ...] = Field(min_length=2)
    claims: tuple[Claim, ...] = Field(min_length=1)
    scales: dict[str, Scale] = Field(min_length=1)

    @model_validator(mode="after")
    def _check(self) -> AblationConfig:
        names = [arm.name for arm in self.arms]
        if repeated := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"arms holds {', '.join(sorted(repeated))} twice")
        for claim in self.claims:
            if unknown := {claim.better, claim.than} - set(names):
                raise ValueError(f"claims speak of {', '.join(sorted(unknown))}; arms are {', '.join(names)}")
        for name, scale in self.scales.items():
            if unknown := set(scale.arms) - set(names):
                raise ValueError(f"scale {name} names arms {', '.join(sorted(unknown))}; there are {', '.join(names)}")
            if scale.arms and not any({claim.better, claim.than} <= set(scale.arms) for claim in self.claims):
                raise ValueError(f"scale {name} has no two arms that a claim compares")
            for arm in self.arms:
                if unknown := set(arm.settings) - {stage.command for stage in scale.stages}:
                    raise ValueError(f"arm {arm.name} sets {', '.join(sorted(unknown))}, no stage of scale {name}")
        return self

    def at(self, scale: Scale) -> AblationConfig:
        """The experiment at one of its scales: the arms that are run there, and the claims that compare them."""
        names = set(scale.arms or (arm.name for arm in self.arms))
        arms = tuple(arm for arm in self.arms if arm.name in names)
        claims = tuple(claim for claim in self.claims if {claim.better, claim.than} <= names)
        return self.model_copy(update={"arms": arms, "claims": claims})
