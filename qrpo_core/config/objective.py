"""The section of an experiment on the objective; the settings of a single kind stand in that kind's file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import Field, create_model, model_validator

from qrpo_core.config.section import (
    IN_CACHE_KEY_IF_SET,
    KLStrength,
    PositiveFloat,
    Section,
    changed_fields,
)
from qrpo_core.objective_kinds import KINDS, Setting

#: The kinds of qrpo_core/objective_kinds; mypy knows no Literal of names that are found at run time.
if TYPE_CHECKING:
    ObjectiveKind: TypeAlias = str
else:
    ObjectiveKind = Literal[tuple(KINDS)]


class _SharedObjectiveConfig(Section):
    """The settings of the objectives that are not one kind's alone."""

    kind: ObjectiveKind = Field("qrpo", title="Objective", description="QRPO, or an objective beside it.")
    beta: KLStrength = Field(
        0.1,
        description="KL strength. qrpo: targets are f(R_q) - beta log Z. best_of_n: candidates says it. sft: "
        "only in logged metrics.",
    )
    transform: Literal["identity", "log", "square", "sqrt", "power", "normal", "scaled_normal"] = Field(
        "identity", description="qrpo: f, applied to the quantile reward."
    )
    exponent: Annotated[float, Field(ge=1e-3, le=1e3)] | None = Field(
        None, description="qrpo, transform power: its exponent."
    )
    loss: Literal["mse", "mae"] = Field(
        "mse", description="qrpo, best_of_n, a_star: squared or absolute residual."
    )
    tie_method: Literal["weak", "mid", "strict", "randomized"] = Field(
        "weak",
        description="qrpo, best_of_n: how ties count in the quantile; weak is P(R' <= R), as in the paper.",
    )
    normaliser: Literal["auto", "population", "tie_aware", "finite", "empirical"] = Field(
        "auto",
        description="qrpo, best_of_n, tup: which log Z; auto is tie_aware, which is population where no "
        "rewards tie.",
    )
    tie_tolerance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01,
        description="qrpo, best_of_n, tup: share of tied references above which population and "
        "finite are refused; 1 never.",
    )
    beta_scale: Literal["constant", "by_length"] = Field(
        "constant", description="qrpo: by_length divides beta by the completion's tokens, also in log Z."
    )
    beta_max: KLStrength | None = Field(
        None,
        description="qrpo, beta_scale by_length: largest beta/length; the report counts how often it binds.",
    )
    loss_scale: Literal["constant", "by_length"] = Field(
        "constant", description="All but pairs: by_length divides the loss by the completion's tokens."
    )
    target_clip: PositiveFloat | None = Field(
        None,
        description="Objectives with targets: largest absolute target log-ratio, nats; the report counts how "
        "often it binds.",
        json_schema_extra=IN_CACHE_KEY_IF_SET,
    )
    gamma_beta_ratio: Annotated[float, Field(ge=0, le=1e6)] = Field(
        0.5, description="simpo: target margin gamma over beta."
    )

    @model_validator(mode="after")
    def _needs(self) -> _SharedObjectiveConfig:
        kind = KINDS[self.kind]
        for field in sorted(changed_fields(self) - kind.takes()):
            raise ValueError(f"objective.{field} does not belong to kind {self.kind!r}; remove it")
        if (self.exponent is None) == (self.transform == "power"):
            raise ValueError("objective.exponent and objective.transform 'power' come together")
        if self.beta_max is not None and self.beta_scale == "constant":
            raise ValueError("objective.beta_max bounds beta/length; it needs objective.beta_scale by_length")
        return self

    @property
    def pairwise(self) -> bool:
        """Whether an example is a pair (chosen, rejected)."""
        return KINDS[self.kind].items == "pairs"

    @property
    def has_targets(self) -> bool:
        """Whether each completion has a target, from the rewards of its prompt's references."""
        return KINDS[self.kind].has_target

    @property
    def fits_rewards(self) -> bool:
        """Whether rewards decide, and the labels of a data set do not."""
        return KINDS[self.kind].fits_rewards


def _field(own: Setting) -> Any:
    """A setting of a kind as pydantic takes it."""
    extra = IN_CACHE_KEY_IF_SET
    return own.type, Field(own.default, description=own.description, json_schema_extra=extra, **own.limits)


if TYPE_CHECKING:
    ObjectiveConfig = _SharedObjectiveConfig
else:
    ObjectiveConfig = create_model(
        "ObjectiveConfig",
        __base__=_SharedObjectiveConfig,
        __module__=__name__,
        __doc__="The objective of the policy (docs/reference/method.md, sections 1, 6 and 9).",
        **{own.name: _field(own) for kind in KINDS.values() for own in kind.settings},
    )
