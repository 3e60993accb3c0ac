"""Selection: the completions to train on, the preferred one of each pair, and the references to rank among.

A completion that is selected by its rank must not be ranked among the completions of its selection pool;
leaving out only itself is not enough (docs/reference/method.md, section 3.2). So `best_worst` ranks among
references outside the pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from qrpo_core.common.schemas import PAIRS
from qrpo_core.config.training import TrainingDataConfig

Status = dict[str, int]


@dataclass(frozen=True)
class Selection:
    """The selected completions, their pairs and their references.

    rows : REWARDS rows to train on, all with status ok. If labels decide, only the columns that rank counts
        need, with null rewards.
    pairs : PAIRS rows; both sides are among `rows`.
    references : REWARDS rows to rank among, all with status ok; None if nothing is ranked.
    in_pool : whether all of `rows` are among `references`; in mode mixed a bool for each row.
    facts : numbers of pairs that exist, are left out, have equal rewards, or contradict their label.
    """

    rows: pa.Table
    pairs: pa.Table
    references: pa.Table | None
    in_pool: bool | NDArray[np.bool_]
    facts: dict[str, int] = field(default_factory=dict)


def select(
    data: TrainingDataConfig,
    rewards: pa.Table,
    references: pa.Table | None,
    *,
    offline: pa.Table | None = None,
    own: pa.Table | None = None,
) -> Selection:
    """The selection of the mode `data.mode`.

    rewards, own : REWARDS rows of the candidates, with a column `cut` if `data.truncated` is leave_out; `own`
        are the data set's, only in mode mixed.
    references : REWARDS rows to rank among. The same table object as `rewards` if the candidates are the
        references themselves. None if nothing is ranked.
    offline : OFFLINE rows, which hold the pairs; only in mode offline.
    """
    shared = references is rewards
    if data.mode == "offline" and data.preference == "label":
        return _labelled(offline)
    scored = _ok(rewards)
    others = scored if shared else None if references is None else _ok(references)
    if data.truncated == "leave_out":  # only here: references without them would be another policy's
        scored = scored.filter(pc.invert(scored["cut"]))
    if data.mode == "offline":
        return _offline(Selection(scored, PAIRS.empty_table(), others, shared), offline)
    if own is not None:
        return _mixed(scored, others, _ok(own))
    if data.mode == "best_worst":
        return _best_worst(data, scored, others, shared)
    if data.mode == "pairs":
        return _neighbours(data, scored, others, shared)
    limit = data.count if shared and data.count is not None else None
    rows = scored if limit is None else scored.filter(pc.less(scored["sample_index"], limit))
    return Selection(rows, PAIRS.empty_table(), others, shared)


def expected_rows(data: TrainingDataConfig, count: int) -> range:
    """The sample indices of a prompt that are trained on if all of its `count` completions have a reward.

    An estimate for `qrpo plan`: best_worst trains on two completions of its pool, and the first two stand for
    them.
    """
    if data.mode == "best_worst":
        return range(min(2, count))
    if data.mode == "mixed":
        return range(min(1, count))
    limit = count if data.count is None else data.count
    if data.mode == "pairs":
        return range(2 * min(limit, count // 2) if data.count is not None else count // 2 * 2)
    return range(min(limit, count))


def _ok(rewards: pa.Table) -> pa.Table:
    return rewards.filter(pc.equal(rewards["status"], "ok"))


def _mixed(scored: pa.Table, others: pa.Table | None, own: pa.Table) -> Selection:
    """Sample 0 of each prompt and its completion of the data set with the smallest number, the samples first.

    That number is a digest of the text: a random choice, whatever the order of the data set. A prompt that
    lacks one of the two is left out.
    """
    drawn = scored.filter(pc.equal(scored["sample_index"], 0))
    own = own.filter(pc.greater(own["sample_index"], 0))  # one of 2^31 digests is sample 0's number
    own = own.sort_by([("prompt_id", "ascending"), ("sample_index", "ascending")])
    prompts = own["prompt_id"].to_numpy()
    own = own.filter(pa.array(np.append(True, prompts[1:] != prompts[:-1])[: len(own)], pa.bool_()))
    place = pc.index_in(own["prompt_id"], value_set=drawn["prompt_id"].combine_chunks())
    either = len(drawn) + len(own)
    own, place = own.filter(place.is_valid()), place.drop_null()
    drawn = drawn.take(place)
    names = ["prompt_id", "sample_index", "reward"]
    rows = pa.concat_tables([drawn.select(names), own.select(names)])
    left, right = np.arange(len(drawn)), np.arange(len(drawn), len(rows))
    reward = rows["reward"].to_numpy()
    better = np.where(reward[left] > reward[right], left, right)
    differs = reward[left] != reward[right]
    pairs = _pairs(rows, better[differs], (left + right - better)[differs])
    facts = {"unpaired_rows": either - len(rows), "tied_pairs": int((~differs).sum())}
    return Selection(rows, pairs, others, np.arange(len(rows)) < len(drawn), facts)


def _neighbours(
    data: TrainingDataConfig, scored: pa.Table, others: pa.Table | None, shared: bool
) -> Selection:
    """Pairs of completions 0 and 1, 2 and 3, ... of each prompt; random, because draws are exchangeable."""
    if shared and data.count is not None:
        scored = scored.filter(pc.less(scored["sample_index"], 2 * data.count))
    prompts, index, reward = _columns(scored)
    order = np.lexsort((index, prompts))
    prompts, index, reward = prompts[order], index[order], reward[order]
    left = np.flatnonzero(
        (prompts[1:] == prompts[:-1]) & (index[1:] == index[:-1] + 1) & (index[:-1] % 2 == 0)
    )
    whole = np.sort(np.concatenate([left, left + 1]))
    rows = scored.take(pa.array(order[whole]))
    pairs, tied = _by_reward(rows, reward[whole][0::2], reward[whole][1::2])
    facts = {"unpaired_rows": len(scored) - len(rows), "tied_pairs": tied}
    return Selection(rows, pairs, others, shared, facts)


def _best_worst(
    data: TrainingDataConfig, scored: pa.Table, others: pa.Table | None, shared: bool
) -> Selection:
    """The best and the worst of each prompt's pool; of equals the first is best, the last worst."""
    pool = scored
    if shared and others is not None:
        pool = scored.filter(pc.less(scored["sample_index"], data.pool))
        others = others.filter(pc.greater_equal(others["sample_index"], data.pool))
    worst, best = _ends(pool)
    rows = pool.take(pa.array(np.stack([best, worst], axis=1).ravel()))
    reward = rows["reward"].to_numpy()
    pairs, tied = _by_reward(rows, reward[0::2], reward[1::2])
    return Selection(rows, pairs, others, False, {"tied_pairs": tied})


def _ends(pool: pa.Table) -> tuple[Any, Any]:
    """Row numbers of the worst and the best completion of each prompt that has at least two."""
    prompts, index, reward = _columns(pool)
    order = np.lexsort((-index, reward, prompts))
    held = prompts[order]
    first = np.flatnonzero(np.append(True, held[1:] != held[:-1])) if len(held) else np.empty(0, np.int64)
    last = np.append(first[1:], len(held)) - 1 if len(held) else first
    several = last > first
    return order[first[several]], order[last[several]]


def _by_reward(rows: pa.Table, left: Any, right: Any) -> tuple[pa.Table, int]:
    """Pairs of the rows 2i and 2i + 1, the better one chosen, and the number of pairs with equal rewards.

    Pairs with equal rewards are left out.
    """
    differs = left != right
    number = np.arange(0, len(rows), 2)
    better = np.where(left > right, number, number + 1)[differs]
    other = np.where(left > right, number + 1, number)[differs]
    return _pairs(rows, better, other), int((~differs).sum())


def _pairs(rows: pa.Table, chosen: Any, rejected: Any) -> pa.Table:
    sides = [rows["sample_index"].take(pa.array(side, pa.int64())) for side in (chosen, rejected)]
    return pa.table([rows["prompt_id"].take(pa.array(chosen, pa.int64())), *sides], schema=PAIRS)


def _columns(table: pa.Table) -> tuple[Any, Any, Any]:
    """Prompt codes in order of appearance, sample indices, rewards."""
    codes = table["prompt_id"].combine_chunks().dictionary_encode().indices
    return (
        codes.to_numpy(zero_copy_only=False).astype(np.int64),
        table["sample_index"].to_numpy().astype(np.int64),
        table["reward"].to_numpy().astype(np.float64),
    )


def _labelled(offline: pa.Table | None) -> Selection:
    """Every pair of the data set as labelled, without rewards."""
    if offline is None:
        raise TypeError("labels need the data set's own completions")
    keys = dict.fromkeys(
        zip(offline["prompt_id"].to_pylist(), offline["sample_index"].to_pylist(), strict=True)
    )
    rows = pa.table(
        {
            "prompt_id": pa.array([prompt for prompt, _ in keys], pa.string()),
            "sample_index": pa.array([index for _, index in keys], pa.int32()),
            "reward": pa.nulls(len(keys), pa.float64()),
        }
    )
    place = {key: at for at, key in enumerate(keys)}
    both = _sides(offline, place)
    pairs = _pairs(rows, both[:, 0], both[:, 1])
    return Selection(rows, pairs, None, False, {"labelled_pairs": len(pairs)})


def _sides(offline: pa.Table, place: Mapping[tuple[str, int], int]) -> Any:
    """Row numbers (chosen, rejected) of the pairs whose two sides are in `place`, [pairs, 2].

    place : the row number of each (prompt_id, sample_index).
    """
    sides: dict[tuple[str, int], dict[str, int]] = {}
    names = ("prompt_id", "pair", "label", "sample_index")
    for prompt, pair, label, index in zip(*(offline[name].to_pylist() for name in names), strict=True):
        at = place.get((prompt, index))
        if at is not None:
            sides.setdefault((prompt, pair), {})[label] = at
    whole = [(side["chosen"], side["rejected"]) for side in sides.values() if len(side) == 2]
    return np.array(whole, np.int64).reshape(-1, 2)


def _offline(found: Selection, offline: pa.Table | None) -> Selection:
    """All scored completions, with pairs in which the side with the higher reward is chosen.

    The pairs are the data set's; without any, the best and the worst completion of each prompt.
    """
    rows = found.rows
    if offline is None or not offline["pair"].is_valid().to_numpy().any():
        worst, best = _ends(rows)
        reward = rows["reward"].to_numpy()
        ends = rows.take(pa.array(np.stack([best, worst], axis=1).ravel()))
        pairs, tied = _by_reward(ends, reward[best], reward[worst])
        return replace(found, pairs=pairs, facts={"tied_pairs": tied})
    keys = zip(rows["prompt_id"].to_pylist(), rows["sample_index"].to_pylist(), strict=True)
    both = _sides(offline, {key: at for at, key in enumerate(keys)})
    reward = rows["reward"].to_numpy()
    labelled, other = reward[both[:, 0]], reward[both[:, 1]]
    differs = labelled != other
    chosen = np.where(labelled > other, both[:, 0], both[:, 1])[differs]
    rejected = np.where(labelled > other, both[:, 1], both[:, 0])[differs]
    labelled_pairs = len(set(zip(offline["prompt_id"].to_pylist(), offline["pair"].to_pylist(), strict=True)))
    facts = {
        "labelled_pairs": labelled_pairs,
        "label_contradicts_reward": int((labelled < other).sum()),
        "pairs_with_an_unscored_side": labelled_pairs - len(both),
        "tied_pairs": int((~differs).sum()),
    }
    return replace(found, pairs=_pairs(rows, chosen, rejected), facts=facts)
