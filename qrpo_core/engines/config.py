"""How completions are drawn, by which engine, and what each engine needs to run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from qrpo_core.section import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section, Speed


class SamplingConfig(Section):
    """How reference completions are drawn from the policy."""

    references_per_prompt: PositiveInt = Field(
        8,
        description="The pre-computation budget: reference completions of every training prompt.",
        json_schema_extra=Speed,
    )
    temperature: PositiveFloat = Field(
        1.0,
        description="1 samples from the model as it is. Log-probs of training, its reference and KL are "
        "counted at this temperature too (see training.temperature).",
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="1 keeps the whole distribution; less is refused where qrpo ranks among samples, whose "
        "log-ratios would be those of another policy.",
    )
    max_new_tokens: PositiveInt = Field(64, description="Length limit; a completion cut by it is marked.")
    seed: int = Field(0, description="With prompt_id and sample_index it gives every sample its own seed.")
    engine: Literal["transformers", "vllm", "endpoint", "fake"] = Field(
        "transformers",
        description="Which engine draws: transformers in this process, vllm in processes of its own, a "
        "running endpoint (`vllm serve`), or fake, which needs no weights. Recorded with every row.",
        json_schema_extra=Speed,
    )
    batch_size: PositiveInt = Field(
        32, description="transformers: sequences drawn at a time.", json_schema_extra=Speed
    )
    batch_tokens: PositiveInt = Field(
        16384,
        description="transformers: tokens scored at a time for log-probs, padding included; halved where "
        "memory runs out.",
        json_schema_extra=Speed,
    )


class VllmConfig(Section):
    """How the engine vllm runs, where sampling.engine is vllm. Only `quantization` changes what is drawn."""

    python: str | None = Field(
        None,
        description="Interpreter of the environment that has vLLM; null: .venv-vllm/bin/python of the "
        "working directory where there is one, else this interpreter.",
    )
    quantization: str | None = Field(
        None, description="Such as fp8: then the rows are those of the quantised policy, and named so."
    )
    merged: bool = Field(
        True,
        description="Draw from a LoRA policy with its adapters merged; false: unmerged, beside the weights "
        "that they were trained on.",
    )
    tensor_parallel_size: PositiveInt = Field(1, description="GPUs that share one engine.")
    engines: PositiveInt | None = Field(
        None, description="Engines at once; null: as many as the visible GPUs hold, and one without GPUs."
    )
    memory_share: Fraction = Field(0.9, description="Share of each GPU's memory that an engine may take.")
    max_length: PositiveInt | None = Field(
        None, description="Longest sequence, prompt and completion; null: the model's own."
    )
    max_sequences: PositiveInt = Field(256, description="Sequences decoded at a time.")
    eager: bool = Field(False, description="Skip compilation: starts sooner, decodes slower.")
    startup_minutes: PositiveFloat = Field(15.0, description="Longest time to load the model and be ready.")


class EndpointConfig(Section):
    """A running OpenAI-compatible server of the reference policy, where sampling.engine is endpoint."""

    url: str | None = Field(None, description="Base URL, such as http://host:8000/v1.")
    model: str | None = Field(None, description="Name under which it serves the policy; null: the only one.")
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable with the key, if the server asks for one."
    )
    concurrency: PositiveInt = Field(64, description="Requests at a time.")
    timeout_seconds: PositiveFloat = Field(600.0, description="Longest time of one request.")
    retry_seconds: NonNegativeFloat = Field(
        120.0, description="Longest time that a request goes on trying against errors that pass."
    )


class FakeConfig(Section):
    """The engine fake, where sampling.engine is fake: to try a pipeline or a service at no cost."""

    seconds_per_row: NonNegativeFloat = Field(
        0.0, description="Time that drawing a row pretends to take.", json_schema_extra=Speed
    )


class ParityConfig(Section):
    """The comparison of the sampling engine with the training model, before the large work."""

    rows: Annotated[int, Field(ge=0)] = Field(
        16, description="Completions compared, of as many prompts; 0 compares none."
    )
    limit: Annotated[float, Field(gt=1, allow_inf_nan=False)] = Field(
        1.05, description="Largest mean of exp|difference of log-probs| of a token that is accepted."
    )
