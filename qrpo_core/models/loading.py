"""Load models and tokenizers from a policy's directory, and convert GGUF files into such directories."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qrpo_core.common.errors import ModelError
from qrpo_core.common.extras import require
from qrpo_core.models.gguf_tokenizer import restore_pre_tokenizer
from qrpo_core.models.source import ModelSource, check_directory

_logger = logging.getLogger("qrpo.policy")


def load_model(directory: Path, dtype: str, *, device: str = "cpu") -> Any:
    """The causal language model in a directory, in evaluation mode.

    dtype : of the weights; "auto" takes the dtype of the directory's config.

    Raises ModelError if weights are missing or have another shape; transformers would only warn and fill them
    with random numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    weights = load_weights(AutoModelForCausalLM, directory, "model", dtype=getattr(torch, dtype, dtype))
    return weights.to(device).eval()


def load_weights(auto: Any, directory: Path, what: str, **options: Any) -> Any:
    """The model that a class of transformers' loads, with all of its weights; see `load_model`.

    what : the model's name in errors, such as "reward model". options : of `from_pretrained`.
    """
    with no_progress_bars():
        try:
            model, info = auto.from_pretrained(
                directory, local_files_only=True, output_loading_info=True, **options
            )
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot load the {what}: {error}", where=str(directory)) from None
    for problem in ("missing_keys", "mismatched_keys"):
        if keys := sorted(map(str, info[problem])):
            raise ModelError(
                f"{len(keys)} weights are {problem.split('_')[0]}, the first is {keys[0]}",
                where=str(directory),
                remedy=f"give the complete checkpoint of this {what}, its head included",
            )
    return model


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer in a directory, with its chat template. Does not use the network."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot load the tokenizer: {error}", where=str(directory)) from None


def convert_gguf(source: ModelSource, dtype: str, out_dir: Path) -> dict[str, str]:
    """Write a GGUF source as a directory for `from_pretrained`: safetensors, tokenizer, template.

    dtype : "bfloat16" or "float32", of the weights written. Quantised weights are dequantised, so the policy
        is the quantised model, not the original.

    Returns the facts from `restore_pre_tokenizer`; a `note` among them is also logged as a warning.
    """
    if source.kind != "gguf":
        raise ModelError(f"a {source.kind} source needs no conversion", where=source.location)
    require("gguf", "reading a GGUF file", where="model.path")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = Path(source.location)
    with no_progress_bars():
        model = AutoModelForCausalLM.from_pretrained(
            str(file.parent),
            gguf_file=file.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=getattr(torch, dtype),
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(
            str(file.parent), gguf_file=file.name, local_files_only=True
        )
        split = restore_pre_tokenizer(tokenizer, file)
        model.save_pretrained(out_dir)
        tokenizer.save_pretrained(out_dir)
    check_directory(out_dir, source.location)
    if note := split.get("note"):
        _logger.warning("%s: %s", file.name, note)
    return split


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hide the progress bars of loading; warnings are still shown."""
    from transformers import modeling_gguf_pytorch_utils as gguf_loader
    from transformers.utils import logging

    shown, plain_bar = logging.is_progress_bar_enabled(), gguf_loader.tqdm
    logging.disable_progress_bar()
    gguf_loader.tqdm = logging.tqdm  # the GGUF loader's bar ignores that setting
    try:
        yield
    finally:
        gguf_loader.tqdm = plain_bar
        if shown:
            logging.enable_progress_bar()
