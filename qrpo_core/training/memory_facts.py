"""What a parameter takes in memory while it is trained, for each setting of `training`."""

from __future__ import annotations

from dataclasses import dataclass

from qrpo_core.config import TrainingConfig


@dataclass(frozen=True)
class ParameterBytes:
    """Bytes of one parameter in a process that holds it (parallel fsdp: shared by the processes).

    weight : what the model computes with. gradient : kept from the first microbatch to the step. moments :
    AdamW's two. low_bits : what a bfloat16 weight lacks of its float32 value. cast : the bfloat16 copy that
    autocast makes of a float32 matrix in a microbatch.
    """

    weight: int
    gradient: int = 0
    moments: int = 0
    low_bits: int = 0
    cast: int = 0

    @property
    def state(self) -> int:
        """Bytes held throughout a step, without casts."""
        return self.weight + self.gradient + self.moments + self.low_bits


def trained_matrix(training: TrainingConfig) -> ParameterBytes:
    """Of a matrix that is trained: all of the model's, or the adapters with lora_rank."""
    if training.trained_dtype == "bfloat16":
        return ParameterBytes(weight=2, gradient=2, moments=8, low_bits=2)
    return ParameterBytes(weight=4, gradient=4, moments=8, cast=_cast(training))


def frozen_matrix(training: TrainingConfig) -> ParameterBytes:
    """Of a matrix under adapters (lora_rank)."""
    if training.lora_base == "bfloat16":
        return ParameterBytes(weight=2)
    return ParameterBytes(weight=4, cast=_cast(training))


def _cast(training: TrainingConfig) -> int:
    return 2 if training.precision == "bf16" else 0
