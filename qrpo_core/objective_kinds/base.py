"""What an objective of training is: its texts, its settings, its items and its loss.

Tensors appear here only as arguments: the configuration imports these files, and it must not import torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from torch import Tensor

#: A batch of the collator: columns by name.
Batch: TypeAlias = "Mapping[str, Tensor]"

#: The classes that name a kind.
REGISTERED: dict[str, type[Objective]] = {}


class Setting(NamedTuple):
    """A setting of one kind. limits : as in pydantic's Field (gt, ge, lt, le, allow_inf_nan)."""

    name: str
    type: Any
    default: Any
    description: str
    limits: Mapping[str, Any] = {}


class Objective(ABC):
    """One objective with its configuration.

    kind : its name in the configuration. short, long : its name in titles, and spelled out.
    items : what the trainer takes: completions, pairs (rows 2i and 2i + 1), or of each pair the chosen one.
    good_training : the curves of a training that goes well.
    shares : the settings of `ObjectiveConfig` that it reads. settings : those that are its alone.
    needs_reference : whether ref_logprob is in the loss. fits_rewards : whether rewards decide rather than
    the data set's labels. has_target : whether each completion has a target, from the rewards of its prompt's
    references. zero_density : whether that target may be -inf, which asks for probability 0.
    needs_log_partition : whether log_partition is in the loss. only_logged : settings that metrics read and
    the loss does not.
    """

    kind: ClassVar[str]
    short: ClassVar[str]
    long: ClassVar[str]
    good_training: ClassVar[str]
    items: ClassVar[Literal["completions", "pairs", "chosen"]] = "completions"
    shares: ClassVar[frozenset[str]] = frozenset({"beta"})
    settings: ClassVar[tuple[Setting, ...]] = ()
    needs_reference: ClassVar[bool] = True
    fits_rewards: ClassVar[bool] = False
    has_target: ClassVar[bool] = False
    zero_density: ClassVar[bool] = False
    needs_log_partition: ClassVar[bool] = False
    only_logged: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, config: Any) -> None:
        self.config = config

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            if cls.kind in REGISTERED:
                raise TypeError(f"two objectives are called {cls.kind!r}: {REGISTERED[cls.kind]} and {cls}")
            REGISTERED[cls.kind] = cls

    @classmethod
    def takes(cls) -> frozenset[str]:
        """The settings of `ObjectiveConfig` that may be set with this kind."""
        return cls.shares | {own.name for own in cls.settings} | {"kind"}

    @property
    def pairwise(self) -> bool:
        """Whether an item is a pair."""
        return self.items == "pairs"

    @property
    def loss_unit(self) -> str:
        """The unit of the loss, before `loss_scale`."""
        return "nats"

    @property
    def beta(self) -> float:
        """The KL strength, reward units per nat; times the log-ratio it is the implicit reward."""
        return float(self.config.beta)

    @abstractmethod
    def losses(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        """One loss an item, [items], from log pi(y|x) [rows] in nats and the collator's batch."""

    def betas(self, batch: Batch) -> Tensor:
        """KL strength of each row, [rows]."""
        return batch["ref_logprob"].new_full(batch["ref_logprob"].shape, self.beta)

    def compared(self, policy_logprob: Tensor, batch: Batch) -> Tensor:
        """The quantity by which a pair's rows are compared, [rows]: the log-ratio, nats."""
        return policy_logprob - batch["ref_logprob"]

    def metrics(self, policy_logprob: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Numbers of each row that only this objective has, [rows] by name."""
        return {}

    def scaled(self, losses: Tensor, batch: Batch) -> Tensor:
        """The losses, divided by the completion's tokens where `loss_scale` says so (method, section 5)."""
        if self.config.loss_scale == "constant":
            return losses
        from qrpo_core.objective.losses import divide_by_length

        return divide_by_length(losses, batch["length"])


def sides(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Chosen and rejected, each [items], of adjacent rows."""
    return rows[0::2], rows[1::2]
