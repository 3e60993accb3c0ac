"""TRL's side of training_vs_trl.py, and the meter that both sides carry.

    .venv-trl/bin/python benchmarks/_trl_side.py JOB.json OUT.json SETTINGS

Runs in an environment of its own, with torch, transformers, trl and psutil and without our package: all that
it knows of the job is in JOB.json (written by training_vs_trl.py). Our side imports `Meter` and
`shared_arguments` from here, so that both are timed by the same code and trained with the same arguments.
"""

from __future__ import annotations

import json
import platform
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from transformers import TrainerCallback


def shared_arguments(job: dict[str, Any], folder: str, *, checkpointing: bool) -> dict[str, Any]:
    """What both trainers are told; the rest is each library's own default.

    job : JOB.json. folder : output directory, in which nothing is saved. checkpointing : activations are
    computed again in the backward pass.
    """
    cuda = torch.cuda.is_available()
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "learning_rate": job["learning_rate"],
        "lr_scheduler_type": "constant",
        "optim": "adamw_torch_fused",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,  # the default of both; the norm is a number more that must agree
        "bf16": job["precision"] == "bf16",
        "activation_checkpointing": checkpointing,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not cuda,
        "dataloader_pin_memory": cuda,
        "seed": 0,
    }


class Meter(TrainerCallback):  # type: ignore[misc]
    """Time, tokens and memory of a Trainer's optimiser steps; the first step warms up and does not count.

    trainer : to be trained once. Its `compute_loss`, its accelerator's `backward` and hooks on the decoder
    tell where a step spends its time. Clocks are read on the CPU: on CUDA, whose kernels are not waited for,
    `parts` mean nothing and are left out.
    reference : a second model whose forward is part of a step, or None.
    """

    def __init__(self, trainer: Any, reference: Any = None) -> None:
        self._trainer = trainer
        self._cuda = torch.cuda.is_available()
        self._marks: list[float] = []
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._began = self._gradient_at_decoder = 0.0
        self._tokens = self._cells = 0
        self._before = self._after = 0.0
        trainer.add_callback(self)
        self._time_forward(trainer.model.base_model, "decoder_forward")
        if reference is not None:
            self._time_forward(reference, "reference_forward")
        self._time_loss(trainer)
        self._time_backward(trainer.accelerator)

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self._before = resident_gb()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        self._mark()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._began = time.perf_counter()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._parts["optimiser"] += time.perf_counter() - self._began

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._mark()
        self._after = resident_gb()
        if len(self._marks) == 2:
            self._parts.clear()
            self._tokens = self._cells = 0

    def result(self) -> dict[str, Any]:
        """Seconds, tokens/s (tokens that are not padding, of all rows), losses, decimal GB, parts.

        memory_before_first_step_gb : resident with the weights loaded. memory_between_steps_gb : resident
        after the last step: weights, optimiser, and what the allocator has not given back.
        """
        seconds = [end - start for start, end in zip(self._marks, self._marks[1:], strict=False)]
        total = sum(seconds[1:])
        logs = [entry for entry in self._trainer.state.log_history if "loss" in entry]
        found = {
            "tokens_per_second": round(self._tokens / total, 2),
            "peak_memory_gb": round(peak_gb(), 3),
            "memory_before_first_step_gb": round(self._before, 3),
            "memory_between_steps_gb": round(self._after, 3),
            "tokens": self._tokens,
            "padding_share": round(1 - self._tokens / self._cells, 3),
            "warm_up_seconds": round(seconds[0], 3),
            "seconds": [round(value, 3) for value in seconds[1:]],
            "losses": [entry["loss"] for entry in logs],
            "gradient_norms": [entry["grad_norm"] for entry in logs],
            "threads": torch.get_num_threads(),
        }
        if not self._cuda:
            parts = dict(self._parts) | {"rest": total - sum(self._parts.values())}
            found["parts"] = {name: round(value / total, 3) for name, value in parts.items()}
        return found

    def _mark(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()
        self._marks.append(time.perf_counter())

    def _time_forward(self, module: Any, part: str) -> None:
        began = 0.0

        def before(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        def after(_: Any, __: Any, output: Any) -> None:
            self._parts[part] += time.perf_counter() - began
            hidden = getattr(output, "last_hidden_state", None)
            if hidden is not None and hidden.requires_grad:
                # Its gradient is complete when head and loss are behind, and the decoder still ahead.
                hidden.register_hook(self._reach_decoder)

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)

    def _reach_decoder(self, _: torch.Tensor) -> None:
        self._gradient_at_decoder = time.perf_counter()

    def _time_loss(self, trainer: Any) -> None:
        compute = trainer.compute_loss

        def timed(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            self._tokens += int(inputs["attention_mask"].sum())
            self._cells += inputs["attention_mask"].numel()
            inner, began = self._forwards(), time.perf_counter()
            loss = compute(model, inputs, *args, **kwargs)
            own = time.perf_counter() - began - (self._forwards() - inner)
            self._parts["head_and_loss_forward"] += own
            return loss

        trainer.compute_loss = timed

    def _forwards(self) -> float:
        return self._parts["decoder_forward"] + self._parts["reference_forward"]

    def _time_backward(self, accelerator: Any) -> None:
        backward = accelerator.backward

        def timed(loss: torch.Tensor, **kwargs: Any) -> None:
            began = time.perf_counter()
            backward(loss, **kwargs)
            end = time.perf_counter()
            self._parts["head_and_loss_backward"] += self._gradient_at_decoder - began
            self._parts["decoder_backward"] += end - self._gradient_at_decoder

        accelerator.backward = timed


def resident_gb() -> float:
    """What this process holds now: CUDA's allocated memory where there is CUDA, else its resident size."""
    if torch.cuda.is_available():
        return float(torch.cuda.memory_allocated()) / 1e9
    return float(psutil.Process().memory_info().rss) / 1e9


def peak_gb() -> float:
    """The most that this process has held: on CUDA since training began, else since the process did."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated()) / 1e9
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size * (1 if sys.platform == "darwin" else 1024) / 1e9  # macOS counts bytes, Linux KiB


def versions(**more: str) -> dict[str, str]:
    """Of what computes."""
    import accelerate

    found = {"python": platform.python_version(), "torch": torch.__version__}
    return (
        found
        | {
            "transformers": transformers.__version__,
            "accelerate": accelerate.__version__,
        }
        | more
    )


def train(job: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """DPOTrainer over the job's pairs, in their order; see RUNS of training_vs_trl.py for the settings."""
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
            self.reference_seconds = time.perf_counter() - began
            return found

    rows = settings["pairs_a_pass"] or job["pairs_a_step"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            **shared_arguments(job, folder, checkpointing=settings["checkpointing"]),
            beta=job["beta"],
            max_length=None,  # nothing is cut
            model_init_kwargs={"dtype": "float32"},  # as ours: bf16 is autocast
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=job["pairs_a_step"] // rows,
            precompute_ref_log_probs=settings["precompute"],
            train_sampling_strategy="sequential",
        )
        trainer = TokenDPOTrainer(
            model=job["model"],
            args=arguments,
            train_dataset=Dataset.from_list(job["pairs"]),
            processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        )
        meter = Meter(trainer, trainer.ref_model)
        trainer.train()
    found = meter.result()
    if trainer.reference_seconds is not None:
        found["reference_seconds"] = round(trainer.reference_seconds, 3)
    return found | {"versions": versions(trl=trl.__version__)}


def main() -> None:
    job, out, settings = sys.argv[1:]
    found = train(json.loads(Path(job).read_text()), json.loads(settings))
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
