"""TRL's side of a comparison of training steps (_sides.py starts it): DPOTrainer on the job's pairs.

    python benchmarks/_trl_side.py JOB.json SETTINGS

It may run in an environment of its own, with torch, transformers and trl and without our package.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers
from _steps import Meter, metered, serve


def train(
    job: dict[str, Any], setting: dict[str, Any], tell: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """DPOTrainer over the job's pairs, in their order.

    setting : precompute (reference log-probs before the training, else a reference model in memory), passes
        (of a step), checkpointing.
    """
    import trl
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    class TokenDPOTrainer(DPOTrainer):  # type: ignore[misc]
        """Takes the job's tokens as they are: DPOTrainer would tokenize text. Times the pre-computation."""

        reference_seconds: float | None = None

        def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            found = super()._precompute_ref_logps(*args, **kwargs)
            self.reference_seconds = round(time.perf_counter() - began, 3)
            return found

    meter = Meter(tell)
    cuda = torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            output_dir=folder,
            num_train_epochs=1,
            learning_rate=job["learning_rate"],
            lr_scheduler_type="constant",
            optim="adamw_torch_fused",
            weight_decay=0.0,
            max_grad_norm=job["max_grad_norm"],
            bf16=job["precision"] == "bf16",
            activation_checkpointing=setting.get("checkpointing", False),
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=not cuda,
            dataloader_pin_memory=cuda,
            seed=0,
            beta=job["beta"],
            max_length=None,  # nothing is cut
            model_init_kwargs={"dtype": "float32"},  # as ours: bf16 is autocast
            per_device_train_batch_size=job["pairs_a_step"] // setting["passes"],
            gradient_accumulation_steps=setting["passes"],
            precompute_ref_log_probs=setting["precompute"],
            train_sampling_strategy="sequential",
        )
        with metered(TokenDPOTrainer, meter):
            trainer = TokenDPOTrainer(
                model=job["model"],
                args=arguments,
                train_dataset=Dataset.from_list(job["pairs"]),
                processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
            )
            trainer.train()
        seconds = trainer.reference_seconds
    found = meter.result() | {"trl": trl.__version__}
    del trainer
    gc.collect()
    return found if seconds is None else found | {"reference_seconds": seconds}


if __name__ == "__main__":
    serve(train)
