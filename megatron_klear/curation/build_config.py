"""What `klear curate build` is told: sources, and the steps from them to the sets that are trained on."""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from operator import or_
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, PositiveInt, create_model, model_validator

from megatron_klear.config.base import Settings

from .verbs import VERBS

if TYPE_CHECKING:
    Step = Settings
else:
    _OF_VERBS = [
        create_model(f"{name}_step", __base__=verb.settings, kind=(Literal[name], ...)) for name, verb in VERBS.items()
    ]
    # The settings of any verb, with its name as `kind`.
    Step = Annotated[reduce(or_, _OF_VERBS), Field(discriminator="kind")]


class SourceConfig(Settings):
    """One of `sources`: files that sets are made from."""

    name: str = Field(min_length=1)
    """Every row of the source gets it as its `curated_from`."""
    files: tuple[str, ...] = Field(min_length=1)
    """JSONL, JSON or Parquet files or globs."""


class SetConfig(Settings):
    """`[sft]`, `[math_rl]` and `[code_rl]`: a set to train on."""

    sources: tuple[str, ...] = Field(min_length=1)
    """Names of sources, in order: of equal problems the one of the first source stays."""
    steps: tuple[Step, ...] = ()
    """What is done to the rows, in order: tables with a `kind`, which is a verb, and the settings of that verb."""


class BuildConfig(Settings):
    """The SFT set, the maths RL set and the code RL set from their sources: `klear curate build`."""

    output: Path
    """Folder of the sets and of all steps. A build that was stopped goes on there."""
    force: bool = False
    """Replace what other settings or files gave, step by step."""
    strict: bool = False
    """Stop at a row that cannot be used."""
    max_row_mib: float = Field(default=16, gt=0, le=1024)
    """A longer row is left out."""
    workers: PositiveInt = 1
    """Processes; no file depends on how many."""
    engine: Literal["local", "ray"] = "local"
    """Whose processes the workers are: this command's own, or those of a Ray (`pip install "megatron-klear[ray]"`)."""
    ray_address: str = ""
    """Of a Ray to join and leave as it is: `host:port`, or `auto` for the one of this machine; empty is one that the
    command starts here and ends."""
    sources: tuple[SourceConfig, ...] = Field(min_length=1)
    sft: SetConfig | None = None
    math_rl: SetConfig | None = None
    code_rl: SetConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> BuildConfig:
        names = [source.name for source in self.sources]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"sources holds {twice[0]!r} twice")
        if self.ray_address and self.engine != "ray":
            raise ValueError(f'ray_address {self.ray_address!r} is for engine = "ray", which is {self.engine!r}')
        if not dict(self.sets()):
            raise ValueError("no set is asked for: give [sft], [math_rl] or [code_rl]")
        for name, wanted in self.sets():
            if absent := [source for source in wanted.sources if source not in names]:
                raise ValueError(f"{name}.sources names {absent[0]!r}, which is none of sources")
            if len(set(wanted.sources)) < len(wanted.sources):
                raise ValueError(f"{name}.sources names a source twice")
        return self

    def sets(self) -> Iterator[tuple[str, SetConfig]]:
        """The sets that are asked for, in the order in which they are made."""
        for name in ("sft", "math_rl", "code_rl"):
            wanted: SetConfig | None = getattr(self, name)
            if wanted is not None:
                yield name, wanted
