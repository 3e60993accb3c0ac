"""Memory that is free in the heap goes back to the system, so that steps of other sizes do not add up."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path

import psutil
import pytest

from qrpo_core.models.heap import give_back_free_memory
from tests.core.training.runs import load, make_trainer, simple_examples

MANY, SIZE = 4_000, 20_000  # below the size from which the C library asks the system for each piece


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_holes_between_pieces_in_use_are_given_back() -> None:
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [libc.malloc(SIZE) for _ in range(MANY)]
    for piece in pieces:
        ctypes.memset(piece, 1, SIZE)
    resident = psutil.Process().memory_info().rss
    kept = pieces[::10]
    for place, piece in enumerate(pieces):
        if place % 10:
            libc.free(piece)
    give_back_free_memory()
    given = resident - psutil.Process().memory_info().rss
    for piece in kept:
        libc.free(piece)
    # Nine tenths are free; a page at either end of each hole is in use.
    assert given > 0.8 * MANY * SIZE


def test_losses_do_not_depend_on_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit over 20 steps, each of which asks for it."""
    losses, asked = [], []
    for called in (give_back_free_memory, lambda: asked.append(1)):
        monkeypatch.setattr("qrpo_core.models.forward.give_back_free_memory", called)
        trainer = make_trainer(
            simple_examples(16), load(tiny_model), tmp_path, num_train_epochs=5, optim="adamw_torch"
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 20
    assert len(asked) >= 20
    assert losses[0] == losses[1]
