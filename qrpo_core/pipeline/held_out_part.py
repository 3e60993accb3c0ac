"""The part of the held-out prompts that an evaluation is for: choosing settings, or comparing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qrpo_core.common.hashing import split_fraction
from qrpo_core.config.comparison import ComparisonConfig

Part = Literal["validation", "test"]
PARTS: tuple[Part, ...] = ("validation", "test")

#: A prompt is in the validation part by its hash with this seed; 0 decides which prompts are held out.
_SPLIT_SEED = 1


@dataclass(frozen=True)
class HeldOutPart:
    """Some of the held-out prompts, by the hash of each. share : of the validation part, in (0, 1)."""

    part: Part
    share: float

    @classmethod
    def of(cls, comparison: ComparisonConfig, part: Part) -> HeldOutPart | None:
        """A part of the prompts of a comparison; None, all of them, where nothing is chosen."""
        return None if comparison.choose_on == "nothing" else cls(part, comparison.validation_share)

    def __str__(self) -> str:
        return f"{self.part} part, {self.share!r} validate"

    def mask(self, prompts: Sequence[str]) -> list[bool]:
        """Which of these held-out prompts are in the part."""
        return [
            (split_fraction(each, _SPLIT_SEED) < self.share) == (self.part == "validation")
            for each in prompts
        ]
