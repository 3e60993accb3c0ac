"""What a run imports and reads before it does anything: the fork server does it once for all of them."""

from __future__ import annotations

import botocore.session  # noqa: F401
import pandas  # noqa: F401 (pyarrow imports it at its first conversion)
import pyarrow.dataset  # noqa: F401
import transformers.modeling_gguf_pytorch_utils
import transformers.models.auto.tokenization_auto
import transformers.models.llama.modeling_llama  # noqa: F401

import qrpo_core.data.chat
import qrpo_core.engines.fake
import qrpo_core.engines.hf
import qrpo_core.preflight
import qrpo_core.rewards.dense  # noqa: F401
from qrpo_core.config import StoreConfig
from qrpo_core.store.objects import open_objects

open_objects(StoreConfig(path="s3://nothing", region="us-east-1"))  # asks nobody; botocore reads its tables
