"""What is trained on, towards which objective, how, and in how many rounds: sections of an experiment."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qrpo_core.section import (
    ClosedFraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Speed,
    changed_fields,
)

ObjectiveKind = Literal["qrpo", "dpo", "simpo", "rebel", "sft"]

_QRPO_ONLY = {
    "transform",
    "exponent",
    "loss",
    "convention",
    "normaliser",
    "tie_tolerance",
    "beta_scale",
    "beta_max",
}


class ObjectiveConfig(Section):
    """What the policy is fitted to, and how strongly the reference holds (method.md 1 and 6)."""

    kind: ObjectiveKind = Field("qrpo", title="Objective", description="QRPO, or a baseline to compare with.")
    beta: PositiveFloat = Field(
        0.1, description="KL strength. qrpo: targets are f(R_q) - beta log Z. sft: only in logged metrics."
    )
    transform: Literal["identity", "log", "square", "sqrt", "power", "normal", "scaled_normal"] = Field(
        "identity", description="qrpo: f, applied to the quantile reward."
    )
    exponent: PositiveFloat | None = Field(None, description="qrpo, transform power: its exponent.")
    loss: Literal["mse", "mae"] = Field("mse", description="qrpo: squared or absolute residual.")
    convention: Literal["weak", "mid", "strict", "randomized"] = Field(
        "weak", description="qrpo: how ties count in the quantile; weak is P(R' <= R), the paper's."
    )
    normaliser: Literal["auto", "population", "finite", "empirical"] = Field(
        "auto",
        description="qrpo: which log Z; auto takes empirical where rewards tie and population otherwise.",
    )
    tie_tolerance: Annotated[float, Field(ge=0, le=1)] = Field(
        0.01,
        description="qrpo: tied share of references above which population and finite are refused; 1 never.",
    )
    beta_scale: Literal["constant", "by_length"] = Field(
        "constant", description="qrpo: by_length divides beta by the completion's tokens, also in log Z."
    )
    beta_max: PositiveFloat | None = Field(
        None, description="qrpo, beta_scale by_length: largest beta/length; how often it binds is counted."
    )
    loss_scale: Literal["constant", "by_length"] = Field(
        "constant", description="qrpo, sft: by_length divides the loss by the completion's tokens."
    )
    gamma_beta_ratio: NonNegativeFloat = Field(0.5, description="simpo: target margin gamma over beta.")

    @model_validator(mode="after")
    def _needs(self) -> ObjectiveConfig:
        own = {
            "qrpo": _QRPO_ONLY | {"loss_scale"},
            "sft": {"loss_scale"},
            "simpo": {"gamma_beta_ratio"},
        }.get(self.kind, set())
        for field in sorted(changed_fields(self) - own - {"kind", "beta"}):
            raise ValueError(f"objective.{field} does not belong to kind {self.kind!r}; remove it")
        if (self.exponent is None) == (self.transform == "power"):
            raise ValueError("objective.exponent and objective.transform 'power' come together")
        if self.beta_max is not None and self.beta_scale == "constant":
            raise ValueError("objective.beta_max bounds beta/length; it needs objective.beta_scale by_length")
        return self

    @property
    def pairwise(self) -> bool:
        """Whether an example is a pair (chosen, rejected)."""
        return self.kind in ("dpo", "simpo", "rebel")


class TrainingDataConfig(Section):
    """Which completions are trained on, and which references they are ranked among (method.md 3)."""

    mode: Literal["random", "pairs", "best_worst", "offline"] = Field(
        "random",
        title="Training completions",
        description="random: the first of the references (exchangeable, so the first are as random as any, "
        "and stay when more are drawn). pairs: the same, two by two. best_worst: the best and the worst "
        "of a selection pool, ranked among references outside it. offline: the data set's own completions.",
    )
    count: PositiveInt | None = Field(
        None, description="random: completions a prompt; pairs: pairs a prompt. null takes every reference."
    )
    pool: Annotated[int, Field(ge=2)] | None = Field(
        None, description="best_worst: completions a prompt to pick from; the rest are the references."
    )
    preference: Literal["auto", "reward", "label"] = Field(
        "auto",
        description="offline: which of a pair is chosen: by its reward, or by the data set's label, which "
        "needs no rewards. auto: the label for dpo, simpo and sft on chosen/rejected data without grades, "
        "else the reward. qrpo and rebel fit rewards whatever stands here.",
    )
    max_contradicted: ClosedFraction = Field(
        0.5,
        description="offline: where rewards decide, the share of labels that they may contradict, of the "
        "pairs that they tell apart. Above one half, a coin would agree better with the data set.",
        json_schema_extra=Speed,
    )
    min_scored: ClosedFraction = Field(
        0.5,
        description="Share of the completions, and of the references, that must have a reward. Below it a "
        "run stops before training and says what became of the others; 0 never stops.",
        json_schema_extra=Speed,
    )
    rewards: Literal["scored", "given"] = Field(
        "scored",
        description="offline: score the completions, or take the rewards that the data set gives them.",
    )
    references: Literal["sampled", "offline"] = Field(
        "sampled",
        description="offline: rank among samples of the policy, or among the prompt's own completions with "
        "each left out (right only if the policy drew them).",
    )
    truncated: Literal["keep", "leave_out", "wrong"] = Field(
        "keep",
        description="Completions that the length limit cut. keep: they are trained on like others. "
        "leave_out: they are not, and stay among the references. wrong: they count with the lowest reward, "
        "also among the references.",
    )
    truncated_reward: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        description="truncated wrong: that reward, at most the lowest of a whole completion. null: 0, for "
        "rewards that give a wrong answer 0 (number, exact, math, code, reasoning_gym); others need it.",
    )
    truncated_warning: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2,
        description="Share of cut completions above which the result says so in its first lines; 1: only if "
        "all are.",
        json_schema_extra=Speed,
    )

    @model_validator(mode="after")
    def _needs(self) -> TrainingDataConfig:
        shared = {"mode", "min_scored", "truncated", "truncated_reward", "truncated_warning"}
        own = {
            "random": {"count"},
            "pairs": {"count"},
            "best_worst": {"pool"},
            "offline": {"preference", "rewards", "references", "max_contradicted"},
        }[self.mode]
        for field in sorted(changed_fields(self) - own - shared):
            raise ValueError(f"training_data.{field} does not belong to mode {self.mode!r}; remove it")
        if self.mode == "best_worst" and self.pool is None:
            raise ValueError("training_data.pool is missing; mode 'best_worst' picks from it")
        if self.truncated_reward is not None and self.truncated != "wrong":
            raise ValueError("training_data.truncated_reward needs training_data.truncated 'wrong'")
        return self


class TrainingConfig(Section):
    """The optimisation of the policy on the stored targets."""

    learning_rate: PositiveFloat = Field(
        1e-6, description="Peak of the schedule. Small models, LoRA and few steps want larger ones."
    )
    epochs: PositiveFloat = Field(1.0, description="Passes over the training set; fractions are allowed.")
    batch_size: PositiveInt = Field(
        128, description="Examples an optimiser step, over all processes: completions, or pairs of them."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192,
        description="Tokens of a forward pass, padding included; a batch takes as many passes as it needs.",
        json_schema_extra=Speed,
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="Share of the steps in which the learning rate rises from 0 to its peak; an only step "
        "has the peak.",
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls after the warm-up; cosine and linear end at 0."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled weight decay; 0 is none.")
    max_grad_norm: NonNegativeFloat = Field(0.0, description="0 clips nothing, as published.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: float32 weights under bfloat16 autocast. Reference log-probs use it too."
    )
    temperature: PositiveFloat | None = Field(
        None,
        description="The policy that is trained is softmax(logits / temperature), and so is its reference. "
        "null: sampling.temperature where training takes samples of the policy or ranks among them, and 1 on "
        "a data set's own completions.",
        json_schema_extra=Speed,  # what it comes to stands in the recipes of log-probs and training
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the saved policy. float32 is what is trained; bfloat16 rounds at random, "
        "so that the training survives in the mean, and is refused where it does not.",
    )
    lora_rank: PositiveInt | None = Field(None, description="Train adapters of this rank; null trains all.")
    lora_alpha: PositiveFloat = Field(32.0, description="lora_rank: adapters count alpha/rank times.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="lora_rank: dropout before them."
    )
    lora_targets: tuple[str, ...] = Field(
        ("all-linear",),
        description="lora_rank: names of the layers that get one; all-linear leaves out the head.",
    )
    gradient_checkpointing: bool = Field(
        False, description="Compute activations again in the backward pass.", json_schema_extra=Speed
    )
    processes: PositiveInt = Field(
        1, description="Training processes on this machine, one a GPU, by torchrun.", json_schema_extra=Speed
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp", description="processes > 1: whole copies, or shards of the weights.", json_schema_extra=Speed
    )
    deepspeed: str | None = Field(
        None, description="Path of a DeepSpeed JSON config.", json_schema_extra=Speed
    )
    checkpoint_minutes: NonNegativeFloat = Field(
        30.0,
        description="Minutes between checkpoints, what a kill can cost; 0 writes one every step.",
        json_schema_extra=Speed,
    )
    seed: int = Field(0, description="Order of the examples, and dropout.")

    @model_validator(mode="after")
    def _needs(self) -> TrainingConfig:
        lora = sorted(field for field in changed_fields(self) if field.startswith("lora_"))
        if self.lora_rank is None and lora:
            raise ValueError(f"training.{lora[0]} is of no use without training.lora_rank; remove it")
        if self.deepspeed is not None and self.parallel == "fsdp":
            raise ValueError("training.deepspeed and training.parallel 'fsdp' exclude each other")
        return self


class RoundsConfig(Section):
    """Online use: train, sample from the trained policy, rank among the same references, train on."""

    count: PositiveInt = Field(
        1, description="Rounds of training; the first is on training_data.", json_schema_extra=Speed
    )
    samples_per_prompt: PositiveInt = Field(
        4, description="Completions that each later round draws from the policy and trains on."
    )
