"""The draws in vLLM's older runner: rows follow the batch, and have the frequencies of their distribution."""

from __future__ import annotations

import ast
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chi2_contingency, chisquare

from qrpo_core.engines import sampling, vllm_child, vllm_draw
from qrpo_core.engines.sampling import draw_tokens, uniforms
from qrpo_core.engines.vllm_draw import SEEDED, SeededDraw
from tests.contracts.engine_cases import probabilities

VOCAB = 300
LONGEST = 8


@dataclass
class Batch:
    """vLLM's batch as its interface describes it: places without gaps, changes told once a step."""

    draw: SeededDraw = field(default_factory=lambda: SeededDraw(None, torch.device("cpu"), False))
    rows: list[tuple[int, list[int]]] = field(default_factory=list)

    def change(self, leave: list[int], enter: list[int], swap: tuple[int, int] | None) -> None:
        """Rows at the places `leave` go, rows with the seeds `enter` come; gaps are filled from the end."""
        added, moved = [], []
        gaps = sorted(leave)
        rows: list[tuple[int, list[int]] | None] = [
            None if place in leave else row for place, row in enumerate(self.rows)
        ]
        for seed in enter:
            place = gaps.pop(0) if gaps else len(rows)
            tokens: list[int] = []
            rows[place : place + 1] = [(seed, tokens)]
            params = SimpleNamespace(extra_args={SEEDED: [seed, 1.3, 1.0]}, max_tokens=LONGEST)
            added.append((place, params, [1], tokens))
        removed = sorted(gaps, reverse=True)
        while gaps and rows:
            if rows[-1] is None:
                rows.pop()
                gaps = [gap for gap in gaps if gap < len(rows)]
                continue
            place = gaps.pop(0)
            moved.append((len(rows) - 1, place, SimpleNamespace(name="UNIDIRECTIONAL")))
            rows[place] = rows.pop()
        if swap is not None and max(swap) < len(rows):
            moved.append((*swap, SimpleNamespace(name="SWAP")))
            one, other = swap
            rows[one], rows[other] = rows[other], rows[one]
        self.rows = [row for row in rows if row is not None]
        if added or removed or moved:
            self.draw.update_state(SimpleNamespace(removed=removed, added=added, moved=moved))

    def step(self, logits: torch.Tensor) -> list[int]:
        """The most probable token of every row after the processor, appended to the row."""
        tokens: list[int] = self.draw.apply(logits.clone()).argmax(dim=-1).tolist()
        for (_, drawn), token in zip(self.rows, tokens, strict=True):
            drawn.append(token)
        return tokens


@given(data=st.data())
def test_every_row_has_its_own_numbers_wherever_it_stands(data: st.DataObject) -> None:
    """Rows come, go, fill gaps and swap: token t of each is that of number t of its seed."""
    batch = Batch()
    for step in range(LONGEST):
        count = len(batch.rows)
        places = st.integers(0, max(0, count - 1))
        leave = data.draw(st.lists(places, unique=True, max_size=count))
        enter = data.draw(st.lists(st.integers(0, 2**64 - 1), max_size=4))
        swap = data.draw(st.none() | st.tuples(places, places)) if count else None
        batch.change(leave, enter, swap)
        if not batch.rows:
            continue
        logits = torch.from_numpy(np.random.default_rng(step).normal(size=(1, VOCAB)).astype(np.float32))
        logits = logits.repeat(len(batch.rows), 1)
        numbers = [uniforms(seed, LONGEST)[len(drawn)] for seed, drawn in batch.rows]
        expected, _ = draw_tokens(logits, torch.tensor(numbers, dtype=torch.float64), 1.3, 1.0)
        assert batch.step(logits) == expected.tolist()


def apply(logits: np.ndarray, count: int, settings: tuple[float, float], steps: int) -> np.ndarray:
    """Tokens [count, steps] that rows with the seeds 0 to count - 1 draw, every time from the same logits."""
    draw = SeededDraw(None, torch.device("cpu"), False)
    tokens: list[list[int]] = [[] for _ in range(count)]
    added = [
        (row, SimpleNamespace(extra_args={SEEDED: [row, *settings]}, max_tokens=steps), [1], tokens[row])
        for row in range(count)
    ]
    draw.update_state(SimpleNamespace(removed=[], added=added, moved=[]))
    for _ in range(steps):
        drawn = draw.apply(torch.from_numpy(logits)[None].repeat(count, 1)).argmax(dim=-1)
        for row, token in zip(tokens, drawn.tolist(), strict=True):
            row.append(token)
    return np.array(tokens)


@pytest.mark.parametrize("settings", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8)])
def test_frequencies_and_independence(settings: tuple[float, float]) -> None:
    """Neighbouring seeds, the first two tokens: chi-square of each, and of both together."""
    logits = np.array([1.0, 0.5, 0.0, -0.5, -1.0, -1.5, -2.0], np.float32)
    drawn = apply(logits, 10_000, settings, 2)
    expected = probabilities(torch.from_numpy(logits).double().log_softmax(0).numpy(), *settings)
    kept = expected > 0
    for step in range(2):
        counts = np.bincount(drawn[:, step], minlength=len(logits))
        assert counts[~kept].sum() == 0
        assert chisquare(counts[kept], expected[kept] * len(drawn)).pvalue > 1e-3
    table = np.zeros((len(logits), len(logits)))
    np.add.at(table, (drawn[:, 0], drawn[:, 1]), 1)
    assert chi2_contingency(table[np.ix_(kept, kept)]).pvalue > 1e-3


def test_rows_without_a_seed_are_left_alone_and_no_mixture_is_drawn() -> None:
    draw = SeededDraw(None, torch.device("cpu"), False)
    plain = SimpleNamespace(extra_args=None, max_tokens=1)
    seeded = SimpleNamespace(extra_args={SEEDED: [1, 1.0, 1.0]}, max_tokens=1)
    draw.update_state(None)
    draw.update_state(SimpleNamespace(removed=[], added=[(0, plain, [1], [])], moved=[]))
    logits = torch.zeros(1, 3)
    assert draw.apply(logits) is logits
    assert (logits == 0).all()
    draw.update_state(SimpleNamespace(removed=[], added=[(1, seeded, [1], [])], moved=[]))
    with pytest.raises(RuntimeError, match="1 seeded rows of 1 kinds among 2"):
        draw.apply(torch.zeros(2, 3))


def test_what_vllm_loads_needs_no_package_of_ours() -> None:
    """These files run in vLLM's environment, loaded by their paths."""
    assert vllm_child.SEEDED == SEEDED
    assert f"{Path(vllm_draw.__file__).stem}:{SeededDraw.__name__}" == vllm_child.SEEDED_DRAW
    for module in (sampling, vllm_draw, vllm_child):
        for node in ast.walk(ast.parse(Path(str(module.__file__)).read_text())):
            names = [each.name for each in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.startswith(("qrpo_core", "tasks", "flows"))]
