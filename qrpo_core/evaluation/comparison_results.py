"""The result of a comparison as plain values, with a JSON form."""

from __future__ import annotations

from dataclasses import dataclass, field

from pydantic import with_config

from qrpo_core.evaluation.plain import PlainResult
from qrpo_core.evaluation.results import Estimate


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class VariantScore:
    """One variant by one scorer.

    mean : over prompts and seeds, of the variant's completions. gain : the same minus the reference policy's.
    rank : by gain, from 1; equal gains share one. best_rank, worst_rank : the ranks that the
        resolved differences leave open.
    """

    variant: str
    mean: float
    gain: Estimate
    rank: int
    best_rank: int
    worst_rank: int


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class PairDifference:
    """The difference of two variants by one scorer, paired by prompt and by training seed.

    difference : first - second. p_value : corrected for all pairs of the scorer by Holm's method.
    resolved : whether it is below 1 - confidence.
    """

    first: str
    second: str
    difference: Estimate
    p_value: float
    resolved: bool

    @property
    def names(self) -> tuple[str, str]:
        return self.first, self.second

    @property
    def better(self) -> str:
        """The variant with the larger mean."""
        return self.first if self.difference.value > 0 else self.second


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class ScorerResult:
    """All variants by one scorer: the reward of training, or a judge of the evaluation.

    prompts : prompts compared, those with a score from every policy; left_out counts the others.
    before : the reference policy's mean. variants : best first. pairs : every two variants. silent : variant
        → its trained policies without any score.
    """

    scorer: str
    prompts: int
    left_out: int
    before: Estimate
    variants: tuple[VariantScore, ...]
    pairs: tuple[PairDifference, ...]
    silent: dict[str, int] = field(default_factory=dict)

    def of(self, variant: str) -> VariantScore | None:
        """One variant's score; None if all of its trainings failed, or none has a score."""
        return next((each for each in self.variants if each.variant == variant), None)


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class VariantFacts:
    """What is the same for every scorer of a variant.

    seeds : trainings that succeeded. failed : training seed → error. kl : KL(pi || pi_ref), nats.
    tokens : mean length of its completions. cut : share that the length limit cut. None if all failed.
    """

    variant: str
    seeds: int
    failed: dict[str, str]
    kl: Estimate | None
    tokens: Estimate | None
    cut: float | None


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class Choice:
    """The setting of one group that did best on the validation prompts.

    candidates : variant → mean gain on the validation prompts; None if its trainings failed.
    """

    group: str
    chosen: str
    candidates: dict[str, float | None]


@with_config(extra="forbid", strict=True, allow_inf_nan=False)
@dataclass(frozen=True)
class ComparisonResult(PlainResult):
    """A whole comparison.

    seeds : the training seeds. scorers : `reward` first, then the judges. tokens_before : mean length of the
        reference policy's completions. length_slopes : by scorer, what a token more brings among them.
    choices : what the validation prompts chose; choosing : how, in words. Both empty where nothing is chosen.
    unbiased : whether the KL is one (top_p 1). training_rewards : judges that are the reward of
        training or a part of it.
    """

    what, remedy = "a comparison", "compare again"

    seeds: tuple[int, ...]
    confidence: float
    prompts: int
    samples_per_prompt: int
    variants: tuple[VariantFacts, ...]
    scorers: tuple[ScorerResult, ...]
    tokens_before: float
    length_slopes: dict[str, float | None]
    choices: tuple[Choice, ...]
    choosing: str
    unbiased: bool
    training_rewards: tuple[str, ...]

    @property
    def failed(self) -> int:
        """How many trainings failed."""
        return sum(len(each.failed) for each in self.variants)

    def facts_of(self, variant: str) -> VariantFacts:
        """The facts of a variant by its name."""
        return next(each for each in self.variants if each.variant == variant)
