"""What a run imports and reads before it does anything: the fork server does it once for all of them."""
# ruff: noqa: F401

from __future__ import annotations

import pandas  # pyarrow imports it at its first conversion
import pyarrow.dataset
import transformers.modeling_gguf_pytorch_utils
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama

import flows.precompute
import qrpo_core.engines.fake
import qrpo_core.engines.transformers
import qrpo_core.models.chat
import qrpo_core.pipeline.preflight
import qrpo_core.rewards.length
import qrpo_core.rewards.sentiment
import qrpo_core.rewards.weighted
from qrpo_core.config import StoreConfig
from qrpo_core.store.backends.opening import open_objects

open_objects(StoreConfig(path="s3://nothing", region="us-east-1"))  # asks nobody; botocore reads its tables
