"""The Arrow schemas of all tables. Every stage checks its input against them.

Rows are joined by (prompt_id, sample_index), never by row order.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from qrpo_core.common.errors import DataError

MESSAGES = pa.list_(
    pa.struct([pa.field("role", pa.string(), False), pa.field("content", pa.string(), False)])
)


def _field(name: str, kind: pa.DataType, about: str, *, nullable: bool = False) -> pa.Field:
    return pa.field(name, kind, nullable=nullable, metadata={"about": about})


PROMPTS = pa.schema(
    [
        _field("prompt_id", pa.string(), "first 32 hex of sha256 over canonical JSON of the messages"),
        _field("messages", MESSAGES, "the whole conversation, system turns included"),
        _field("ground_truth", pa.string(), "JSON that the verifier checks against", nullable=True),
        _field("ground_truth_digest", pa.string(), "digest of `ground_truth`; empty without one"),
        _field("source", pa.string(), "where the row came from: file and line, task and index"),
        _field("split", pa.string(), "train or held_out, by hash of prompt_id"),
    ]
)

#: Completions that the data set brings. Pairs: one row a side, so a text that stands in several pairs of a
#: prompt has several rows with one (prompt_id, sample_index). Graded: one row a completion.
OFFLINE = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt that is answered"),
        _field(
            "sample_index",
            pa.int32(),
            "function of `text` alone (hashing.completion_index); with prompt_id the completion's identity, "
            "which in pairs may occur in several rows, also once as chosen and once as rejected",
        ),
        _field("text", pa.string(), "the completion, undecorated"),
        _field("label", pa.string(), "chosen or rejected; empty for a completion that is in no pair"),
        _field(
            "pair",
            pa.int32(),
            "0-based number of the pair within its prompt, in source order: joins its two rows, and names "
            "nothing outside this table; null for a completion that is in no pair",
            nullable=True,
        ),
        _field("reward", pa.float64(), "the grade that the data set gives; null for none", nullable=True),
        _field("source", pa.string(), "the row where it first stands; and the field, if not in a pair"),
    ]
)

COMPLETIONS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt that is answered"),
        _field("sample_index", pa.int32(), "0-based; with prompt_id the row's identity"),
        _field("seed", pa.uint64(), "function of (seed, prompt_id, sample_index)"),
        _field("token_ids", pa.list_(pa.int32()), "completion tokens, end token included when it was drawn"),
        _field("text", pa.string(), "decoded without special tokens"),
        _field("finish_reason", pa.string(), "stop (an end token was drawn) or length (cut by the limit)"),
        _field("num_tokens", pa.int32(), "len(token_ids)"),
        _field("logprob", pa.float64(), "sum of log-probs under the sampler, nats", nullable=True),
        _field("engine", pa.string(), "which engine drew the row"),
    ]
)

REWARDS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt that is answered"),
        _field("sample_index", pa.int32(), "the completion that is scored"),
        _field(
            "ground_truth_digest", pa.string(), "what it was checked against; empty without a ground truth"
        ),
        _field("reward", pa.float64(), "null unless status is ok", nullable=True),
        _field("status", pa.string(), "ok, or why there is no reward: one of STATUSES"),
        _field("detail", pa.string(), "why a row is not ok; empty otherwise"),
    ]
)

LOGPROBS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt that is answered"),
        _field("sample_index", pa.int32(), "the completion"),
        _field("logprob", pa.float64(), "sum over completion tokens, computed in float32, nats"),
        _field("num_tokens", pa.int32(), "completion tokens in the sum, end token included"),
    ]
)

RANK_COUNTS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("sample_index", pa.int32(), "the training completion"),
        _field(
            "reward", pa.float64(), "its reward; null where labels decide and none is needed", nullable=True
        ),
        _field("below", pa.int64(), "references with a smaller reward"),
        _field("equal", pa.int64(), "references with an equal reward, itself left out"),
        _field("n", pa.int64(), "references compared with, itself left out; 0 where nothing is ranked"),
        _field("in_pool", pa.bool_(), "whether the completion is itself a reference"),
    ]
)

PAIRS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("chosen", pa.int32(), "sample_index of the preferred completion"),
        _field("rejected", pa.int32(), "sample_index of the other"),
    ]
)

REFERENCE_REWARDS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("rewards", pa.list_(pa.float64()), "sorted rewards of its reference completions"),
    ]
)

TRAINING_SET = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("sample_index", pa.int32(), "the completion"),
        _field("prompt_token_ids", pa.list_(pa.int32()), "chat template applied, generation prompt included"),
        _field("token_ids", pa.list_(pa.int32()), "completion tokens; all of them are in the loss"),
        *[RANK_COUNTS.field(name) for name in ("reward", "below", "equal", "n", "in_pool")],
        _field("ref_logprob", pa.float64(), "log pi_ref of the completion, nats"),
    ]
)

#: training_data.reference_logprobs sampler: the completions whose log-probs the training model has, too.
COMPARED_LOGPROBS = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("sample_index", pa.int32(), "the completion"),
        _field("engine", pa.string(), "which engine drew the row"),
        _field("sampler", pa.float64(), "log pi_ref of the completion, by the engine that drew it, nats"),
        _field("policy", pa.float64(), "log pi_ref of the completion, by the training model, nats"),
    ]
)

#: Prompts, and completions of the data set, that a run leaves out because it cannot use them.
LEFT_OUT = pa.schema(
    [
        _field("prompt_id", pa.string(), "the prompt"),
        _field("sample_index", pa.int32(), "its own completion; null: the prompt itself", nullable=True),
        _field("split", pa.string(), "train or held_out"),
        _field("where", pa.string(), "file and line, or what else the source calls the row"),
        _field("kind", pa.string(), "what such problems are counted as"),
        _field("problem", pa.string(), "what is wrong"),
    ]
)

STATUSES = ("ok", "timeout", "sandbox_error", "parse_error", "too_long", "endpoint_error", "refused")

#: Retryable statuses: the next run computes such a row again.
RETRYABLE = ("timeout", "sandbox_error", "endpoint_error")

#: The largest size of a reward: squares of larger numbers, in intervals and losses, soon leave float64.
LARGEST_REWARD = 1e100


def check_table(table: pa.Table, schema: pa.Schema, where: str) -> pa.Table:
    """The table cast to its schema; DataError for a missing column, a wrong type or a forbidden null.

    The message names the column and, for a null, the first row with one.
    """
    missing = [name for name in schema.names if name not in table.column_names]
    if missing:
        raise DataError(
            f"missing column {missing[0]!r}", where=where, remedy=f"columns are {', '.join(schema.names)}"
        )
    table = table.select(schema.names)
    for field in schema:
        column = table.column(field.name)
        if not field.nullable and column.null_count:
            row = pc.index(column.is_null(), True).as_py()
            raise DataError(
                f"column {field.name!r} is null in row {row}", where=where, remedy="fill or drop that row"
            )
    try:
        return table.cast(schema)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, ValueError) as error:
        raise DataError(f"a column has the wrong type: {error}", where=where) from None
