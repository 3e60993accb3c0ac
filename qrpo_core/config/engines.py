"""Settings of sampling and of the engines."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qrpo_core.config.section import (
    NOT_IN_CACHE_KEY,
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    Temperature,
)


class SamplingConfig(Section):
    """How completions are drawn from the policy."""

    references_per_prompt: PositiveInt = Field(
        8,
        description="The pre-computation budget: reference completions for each training prompt.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    temperature: Temperature = Field(
        1.0,
        description="1 samples from the model's own distribution. Training's log-probs, reference log-probs "
        "and KL are at this temperature too (see training.temperature).",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="1 keeps the whole distribution. Less is refused where QRPO ranks among samples, because "
        "their log-ratios would belong to another policy.",
    )
    max_new_tokens: PositiveInt = Field(
        64, description="Longest completion in tokens; completions cut by it are marked."
    )
    seed: int = Field(0, description="Together with prompt_id and sample_index it gives every sample a seed.")
    engine: Literal["transformers", "vllm", "endpoint", "fake"] = Field(
        "transformers",
        description="Which engine draws: transformers (in this process), vllm (in child processes), endpoint "
        "(a running server such as `vllm serve`), or fake (without weights). Stored with every row.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    batch_size: PositiveInt | None = Field(
        None,
        description="transformers: sequences drawn at a time on a GPU; null: as many as its memory holds, at "
        "most 1,024. On a CPU the number follows from a row's length.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )
    batch_tokens: PositiveInt = Field(
        16384,
        description="transformers: tokens of a microbatch of log-probs, equal prompts counted once; halved "
        "when memory runs out.",
        json_schema_extra=NOT_IN_CACHE_KEY,
    )


class VllmConfig(Section):
    """How the engine vllm runs (sampling.engine: vllm). Only `quantization` changes the completions."""

    python: str | None = Field(
        None,
        description="Interpreter of the environment with vLLM; null: .venv-vllm/bin/python in the working "
        "directory if it exists, else this interpreter.",
    )
    quantization: str | None = Field(
        None,
        description="Such as fp8; the rows are then those of the quantised policy, and recorded as such.",
    )
    merged: bool = Field(
        True,
        description="Sample a LoRA policy with its adapters merged into the weights; false: unmerged.",
    )
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs for each engine.")
    engines: PositiveInt | None = Field(
        None, description="Number of engines; null: as many as fit on the visible GPUs, and one without GPUs."
    )
    gpu_memory_fraction: Fraction = Field(
        0.9, description="Fraction of each GPU's memory that an engine may use."
    )
    max_length: PositiveInt | None = Field(
        None, description="Longest sequence (prompt and completion) in tokens; null: the model's limit."
    )
    max_sequences: PositiveInt | None = Field(
        None,
        description="Sequences decoded at a time; null: vLLM's choice by the GPU's memory (1024 from 70 GiB, "
        "else 256), of which those run that fit into the cache of keys and values.",
    )
    batch_invariant: bool = Field(
        False,
        description="Compute a row the same way in any company, with vLLM's batch-invariant kernels: slower, "
        "and only on NVIDIA GPUs of compute capability 8.0 or more.",
    )
    eager: bool = Field(False, description="Skip compilation: faster start, slower decoding.")
    startup_minutes: PositiveFloat = Field(15.0, description="Longest time to load the model, in minutes.")


class EndpointConfig(Section):
    """A running OpenAI-compatible server of the reference model (sampling.engine: endpoint)."""

    url: str | None = Field(None, description="Base URL, such as http://host:8000/v1.")
    model: str | None = Field(None, description="The model's name on the server; null: its only model.")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the API key, if the server needs one."
    )
    concurrency: PositiveInt = Field(64, description="Requests at a time.")
    timeout_seconds: PositiveFloat = Field(600.0, description="Longest time of one try of a request.")
    retry_seconds: NonNegativeFloat = Field(
        120.0, description="How long a request is retried after its first failure."
    )


class FakeConfig(Section):
    """The engine fake (sampling.engine: fake), for trying out a pipeline or a service."""

    seconds_per_row: NonNegativeFloat = Field(
        0.0, description="Seconds to sleep for each row.", json_schema_extra=NOT_IN_CACHE_KEY
    )


class ParityConfig(Section):
    """The comparison of the sampling engine with the training model, before sampling starts."""

    rows: Annotated[int, Field(ge=0)] = Field(
        16, description="Completions to compare, each of another prompt; 0 skips the comparison."
    )
    limit: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        1.05, description="Largest accepted mean over tokens of exp(|difference of log-probs|)."
    )
    reference_rows: PositiveInt = Field(
        64,
        description="training_data.reference_logprobs sampler: completions of each engine whose log-probs "
        "the training model computes, too.",
    )
    reference_limit: PositiveFloat = Field(
        0.05,
        description="training_data.reference_logprobs sampler: largest accepted root mean square of beta "
        "times the difference of the log-probs of a completion, over the standard deviation of the targets.",
    )
