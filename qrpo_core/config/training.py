"""The sections of an experiment on training: data, optimisation and rounds."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from qrpo_core.config.section import (
    IN_CACHE_KEY_IF_SET,
    NOT_IN_CACHE_KEY,
    ClosedFraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Temperature,
    changed_fields,
)

#: What `TrainingConfig.hides_movements` means for a result.
HIDDEN_MOVEMENTS = (
    "Weights are trained in float32 under bfloat16 autocast, which rounds small movements away: the loss "
    "does not see them, and the policy overshoots. In benchmarks/results/weights_dtype.json it stands "
    "18 nats from its targets, with bfloat16 weights 1.1 (learning rate 5e-6)"
)


class TrainingDataConfig(Section):
    """The training completions, and the references that rank them (docs/reference/method.md, section 3)."""

    mode: Literal["random", "pairs", "best_worst", "offline", "mixed"] = Field(
        "random",
        title="Training completions",
        description="random: the first of the references (they are exchangeable, so the first are a "
        "random choice that stays when more are drawn). pairs: the same, two by two. best_worst: the best "
        "and the worst of a selection pool, ranked among references outside it. offline: the data set's own "
        "completions. mixed: of each prompt the first of the references and one completion of the data set.",
    )
    count: PositiveInt | None = Field(
        None, description="random: completions a prompt; pairs: pairs a prompt. null takes every reference."
    )
    pool: Annotated[int, Field(ge=2)] | None = Field(
        None, description="best_worst: completions a prompt to pick from; the rest are the references."
    )
    preference: Literal["auto", "reward", "label"] = Field(
        "auto",
        description="offline: the chosen side of a pair follows from its reward, or from the data set's "
        "label, which needs no rewards. auto: the label for dpo, simpo and sft on chosen/rejected data "
        "without grades, else the reward. The other objectives always fit rewards.",
    )
    max_contradicted: ClosedFraction = Field(
        0.5,
        description="offline, where rewards decide: share of labels that they may contradict, among pairs of "
        "unequal rewards. Above one half, a coin agrees better with the data set.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    min_scored: ClosedFraction = Field(
        0.5,
        description="Share of the completions, and of the references, that must have a reward. Below it a "
        "run stops before training and lists the statuses of the others; 0 never stops.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    rewards: Literal["scored", "given"] = Field(
        "scored",
        description="offline, mixed: score the data set's completions, or take the rewards that it gives.",
    )
    references: Literal["sampled", "offline"] = Field(
        "sampled",
        description="offline: rank among samples of the policy, or among the prompt's own completions with "
        "each left out (right only if the policy drew them).",
    )
    reference_logprobs: Literal["policy", "sampler"] = Field(
        "policy",
        description="Whose log-probs of the first round's completions are the reference log-probs. policy: "
        "the training model's, computed before training. sampler: those that the engine gave when it drew; "
        "only parity.reference_rows rows of each engine are computed, and nothing is trained if the two "
        "differ by more than parity.reference_limit.",
        # The recipe of the training set holds it: the rank counts do not depend on it.
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    truncated: Literal["keep", "leave_out", "wrong"] = Field(
        "keep",
        description="Completions that the length limit cut. keep: they are training completions like others. "
        "leave_out: they are not, but stay among the references. wrong: they have the lowest reward, also "
        "among the references.",
    )
    truncated_reward: Annotated[float, Field(allow_inf_nan=False)] | None = Field(
        None,
        description="truncated wrong: their reward, at most the lowest of a whole completion. null: 0, for "
        "rewards that give a wrong answer 0 (number, exact, math, code, reasoning_gym); others must set it.",
    )
    truncated_warning: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2,
        description="Share of cut completions above which the result starts with a warning; 1: only if all "
        "are.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )

    @property
    def uses_data_set(self) -> bool:
        """Whether the data set's own completions are trained on."""
        return self.mode in ("offline", "mixed")

    @model_validator(mode="after")
    def _needs(self) -> TrainingDataConfig:
        shared = {"mode", "min_scored", "truncated", "truncated_reward", "truncated_warning"}
        own = {
            "random": {"count", "reference_logprobs"},
            "pairs": {"count", "reference_logprobs"},
            "best_worst": {"pool", "reference_logprobs"},
            "offline": {"preference", "rewards", "references", "max_contradicted"},
            "mixed": {"rewards"},
        }[self.mode]
        for field in sorted(changed_fields(self) - own - shared):
            raise ValueError(
                f"training_data.{field} does not belong to mode {self.mode!r}; remove it, or set it to null"
            )
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
    epochs: Annotated[float, Field(gt=0, le=1e6)] = Field(
        1.0, description="Passes over the training set; fractions are allowed."
    )
    batch_size: PositiveInt = Field(
        128, description="Examples an optimiser step, over all processes: completions, or pairs of them."
    )
    micro_batch_tokens: PositiveInt = Field(
        8192,
        description="Tokens of a microbatch, equal prompts counted once; a batch takes as few as it needs.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.1,
        description="Share of the steps in which the learning rate rises from 0 to its peak; a single step "
        "has the peak.",
    )
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = Field(
        "cosine", description="How the learning rate falls after the warm-up; cosine and linear end at 0."
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="AdamW's decoupled weight decay; 0 is none.")
    max_grad_norm: NonNegativeFloat = Field(0.0, description="0 clips nothing, as published.")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="bf16: products in bfloat16 (autocast). Reference log-probs use it too."
    )
    weights_dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="bfloat16: matrices and their gradients are bfloat16, and the optimiser keeps the 16 "
        "bits that weights lack: no update is lost, and a parameter takes 14 bytes instead of 16. Reference "
        "log-probs use it too. float32 under bf16 hides small movements from the loss, and the training "
        "overshoots. auto: bfloat16 with precision bf16, float32 with lora_rank, parallel fsdp or deepspeed.",
        # The recipes of log-probs and training hold what this resolves to.
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    temperature: Temperature | None = Field(
        None,
        description="The trained policy is softmax(logits / temperature), and so is the reference policy. "
        "null: sampling.temperature where training uses samples of the policy or ranks among them, and 1 on "
        "a data set's own completions.",
        # The recipes of log-probs and training hold the number that this resolves to.
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    save_dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Precision of the saved policy. float32 is the precision of training. bfloat16 rounds at "
        "random, so that the training survives in the mean; a policy that lost too much is refused.",
    )
    lora_rank: PositiveInt | None = Field(None, description="Train adapters of this rank; null trains all.")
    lora_alpha: PositiveFloat = Field(32.0, description="lora_rank: adapters count alpha/rank times.")
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="lora_rank: dropout before the adapters."
    )
    lora_targets: tuple[str, ...] = Field(
        ("all-linear",),
        description="lora_rank: names of the layers with adapters; all-linear leaves out the head.",
    )
    lora_base: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="lora_rank: the frozen matrices in memory. The policy is merged from unrounded ones. "
        "Reference log-probs use it too.",
        json_schema_extra=IN_CACHE_KEY_IF_SET,
    )
    activation_checkpointing: ClosedFraction = Field(
        0.0,
        description="Share of the decoder layers whose activations are computed again in the backward pass: "
        "less memory, slower. 0.5 takes every second layer.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    compile: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Compile the decoder layers: the first steps take a minute longer, the others less time. "
        "auto: on a GPU where a trial works (it needs Triton and a C compiler).",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    processes: PositiveInt = Field(
        1,
        description="Training processes on this machine, one a GPU, by torchrun.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        "ddp",
        description="processes > 1: whole copies, or shards of the weights.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    deepspeed: str | None = Field(
        None, description="Path of a DeepSpeed JSON config.", json_schema_extra=NOT_IN_CACHE_KEY
    )
    checkpoint_minutes: NonNegativeFloat = Field(
        30.0,
        description="Minutes between checkpoints, in the store as well: the most that a kill or a lost "
        "machine can cost; 0 writes one every step.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    report_to: tuple[Literal["wandb", "tensorboard", "mlflow"], ...] = Field(
        (),
        description="Trackers that get every step's metrics; see docs/how-to/trackers.md.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(0, description="Order of the examples, and dropout.")

    @model_validator(mode="after")
    def _needs(self) -> TrainingConfig:
        if len(set(self.report_to)) < len(self.report_to):
            raise ValueError("training.report_to names a tracker twice; name it once")
        lora = sorted(field for field in changed_fields(self) if field.startswith("lora_"))
        if self.lora_rank is None and lora:
            raise ValueError(f"training.{lora[0]} has no effect without training.lora_rank; remove it")
        if self.deepspeed is not None and self.parallel == "fsdp":
            raise ValueError("training.deepspeed and training.parallel 'fsdp' exclude each other")
        if self.compile == "always" and (self.parallel == "fsdp" or self.deepspeed is not None):
            raise ValueError("training.compile always works in whole copies of the model; set it to auto")
        if self.weights_dtype == "bfloat16" and self.lora_rank is not None:
            raise ValueError(
                "training.weights_dtype bfloat16 trains all weights; with lora_rank set lora_base"
            )
        for field in ("weights_dtype", "lora_base"):
            if getattr(self, field) != "bfloat16":
                continue
            if self.precision == "fp32":
                raise ValueError(f"training.{field} {getattr(self, field)} needs training.precision bf16")
            if self.deepspeed is not None or self.parallel == "fsdp":
                raise ValueError(
                    f"training.{field} {getattr(self, field)} works in whole copies of the model: remove "
                    "training.deepspeed, and training.parallel 'fsdp'"
                )
        return self

    @property
    def trained_dtype(self) -> Literal["float32", "bfloat16"]:
        """The dtype of the trained matrices: weights_dtype, with `auto` resolved.

        `auto` is bfloat16 wherever bfloat16 is allowed: weights of published models lie on the bfloat16 grid,
        and autocast of float32 weights rounds small movements back to it (docs/reference/method.md).
        """
        if self.weights_dtype != "auto":
            return self.weights_dtype
        whole = self.parallel == "ddp" and self.deepspeed is None
        return "bfloat16" if self.precision == "bf16" and self.lora_rank is None and whole else "float32"

    @property
    def hides_movements(self) -> bool:
        """Whether all weights are trained in float32 under autocast, which rounds small movements away."""
        return self.precision == "bf16" and self.lora_rank is None and self.trained_dtype == "float32"

    @property
    def arithmetic(self) -> str:
        """How log-probs are computed: "fp32", "bf16" (float32 weights, autocast), "bf16-weights".

        Reference log-probs are computed in the arithmetic of the training, so that log-ratios start at 0.
        """
        rounded = "bfloat16" in (self.trained_dtype, self.lora_base)
        return "bf16-weights" if rounded else self.precision


class RoundsConfig(Section):
    """Online training: sample from the trained policy, rank among the same references, train again."""

    count: PositiveInt = Field(
        1,
        description="Rounds of training; the first is on training_data.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    samples_per_prompt: PositiveInt = Field(
        4, description="Training completions a prompt that each later round draws from the policy."
    )
