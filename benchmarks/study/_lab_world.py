"""The lab's worlds: prompts with features, 48 classes of completions, and what is exact about them.

A completion is an action a (a class of completions that the policy cannot tell apart) and a number u. The
reference policy is p(a|x): a small pretrained network on the prompt's features, plus a structure of each
prompt that no network sees. The score of an action is partly a function of the features, which a policy can
learn for prompts that it has not seen, and partly noise of its own. Four laws make rewards of the score:

continuous - the score, moved by u so little that it orders completions of one action only: no ties.
clipped    - the same below a ceiling, on which a third of all completions lie.
graded     - five grades, equally frequent over all prompts.
binary     - pass or fail; the success rates of prompts are uniform on (0, 1).

So everything is known exactly: quantiles, log Z, and the expectations of any policy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Law = Literal["continuous", "clipped", "graded", "binary"]
TieMethod = Literal["weak", "mid"]
LAWS: tuple[Law, ...] = get_args(Law)
FEATURES, HIDDEN, ACTIONS = 12, 64, 48
MOST_REFERENCES = 64

#: Standard deviation of a prompt's difficulty over that of scores within a prompt.
DIFFICULTY: dict[Law, float] = {"continuous": 0.0, "clipped": 0.5, "graded": 0.5, "binary": 1.0}
#: Quantiles of the standard normal distribution: the ceiling, the steps between grades.
CEILING = 0.4307272992954576
GRADES = (-0.8416212335729143, -0.2533471031357997, 0.2533471031357997, 0.8416212335729143)
JITTER = 1e-9


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of S worlds. features [S, P, d]; structure, log_reference, reward and atom [S, P, A].

    structure : logits of the reference policy beside its network's. log_reference : log p(a|x).
    reward : R of each action without u. atom : whether all completions of the action have this very reward.
    """

    features: Floats
    structure: Floats
    log_reference: Floats
    reward: Floats
    atom: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class World:
    """S worlds of one law: weights of the pretrained networks, prompts to train on, held-out prompts."""

    seeds: tuple[int, ...]
    law: Law
    first: Floats
    second: Floats
    train: Prompts
    held_out: Prompts


@dataclass(frozen=True, eq=False)
class Samples:
    """Completions of the training prompts, [S, P, m]: actions and rewards."""

    action: NDArray[np.int64]
    reward: Floats

    def take(self, first: int, stop: int) -> Samples:
        """Completions first to stop of each prompt."""
        return Samples(self.action[..., first:stop], self.reward[..., first:stop])

    def pick(self, index: NDArray[np.int64]) -> Samples:
        """Completions by index [S, P, k] within their prompt."""
        return Samples(*(np.take_along_axis(each, index, axis=-1) for each in (self.action, self.reward)))


def make_world(seeds: tuple[int, ...], law: Law, prompts: int, held_out: int) -> World:
    """The worlds of these seeds; features, policies and scores are the same under every law."""
    made = [_one(seed, law, prompts, held_out) for seed in seeds]
    first, second = (np.stack([each[part] for each in made]) for part in (0, 1))

    def stack(part: int) -> Prompts:
        names = Prompts.__dataclass_fields__
        return Prompts(**{name: np.stack([getattr(each[part], name) for each in made]) for name in names})

    return World(seeds, law, first, second, stack(2), stack(3))


def _one(seed: int, law: Law, prompts: int, held_out: int) -> tuple[Floats, Floats, Prompts, Prompts]:
    rng = np.random.default_rng([seed, 0])
    first = rng.normal(size=(FEATURES, HIDDEN)) / np.sqrt(FEATURES)
    second = rng.normal(size=(HIDDEN, ACTIONS)) * 0.8 / np.sqrt(HIDDEN)
    inner, outer = rng.normal(size=(FEATURES, 16)), rng.normal(size=(16, ACTIONS))
    parts = []
    for count in (prompts, held_out):
        features = rng.normal(size=(count, FEATURES))
        structure = 0.5 * rng.normal(size=(count, ACTIONS))
        logits = np.tanh(features @ first) @ second + structure
        learnable = np.tanh(features @ inner / np.sqrt(FEATURES)) @ outer
        learnable /= learnable.std()
        within = np.sqrt(0.75) * learnable + 0.5 * rng.normal(size=(count, ACTIONS))
        difficulty = np.sqrt(0.5) * (features[:, :1] + rng.normal(size=(count, 1)))
        spread = DIFFICULTY[law]
        reward, atom = rewards((within + spread * difficulty) / np.hypot(1.0, spread), law)
        parts.append(Prompts(features, structure, log_softmax(logits), reward, atom))
    return first, second, parts[0], parts[1]


def rewards(score: Floats, law: Law) -> tuple[Floats, NDArray[np.bool_]]:
    """(reward, atom) of standardised scores."""
    if law == "continuous":
        return score, np.zeros(score.shape, dtype=bool)
    if law == "clipped":
        return np.minimum(score, CEILING), score >= CEILING
    if law == "graded":
        return np.searchsorted(GRADES, score) / len(GRADES), np.ones(score.shape, dtype=bool)
    return (score > 0).astype(np.float64), np.ones(score.shape, dtype=bool)


def log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def draw(world: World, log_policy: Floats, count: int, stream: int) -> Samples:
    """count completions of each training prompt from a policy [S, P, A]; a larger count adds to them.

    stream : names the draw; it is independent of other draws, and the same under every law.
    """
    cumulative = np.exp(log_policy).cumsum(axis=-1)
    uniforms = np.stack(
        [
            np.random.default_rng([seed, stream]).random((MOST_REFERENCES, 2, log_policy.shape[1]))
            for seed in world.seeds
        ]
    )[:, :count]
    where = uniforms[:, :, 0].transpose(0, 2, 1)[..., None] * cumulative[:, :, None, -1:]
    action = (where > cumulative[:, :, None, :]).sum(axis=-1)
    jitter = JITTER * uniforms[:, :, 1].transpose(0, 2, 1)
    reward = np.take_along_axis(world.train.reward, action, axis=-1)
    atom = np.take_along_axis(world.train.atom, action, axis=-1)
    return Samples(action, np.where(atom, reward, reward + jitter))


def true_quantiles(prompts: Prompts, tie_method: TieMethod = "weak") -> Floats:
    """E[R_q | a], [S, P, A], u averaged over."""
    order, mass, left, at_atoms = _by_reward(prompts, tie_method)
    atom = np.take_along_axis(prompts.atom, order, axis=-1)
    values = np.where(atom, at_atoms, left + 0.5 * mass)
    return np.take_along_axis(values, np.argsort(order, axis=-1), axis=-1)


def true_log_partition(prompts: Prompts, beta: float, tie_method: TieMethod = "weak") -> Floats:
    """log E_ref exp(R_q/beta) of each prompt, [S, P], in nats, transform identity.

    Atoms give mass exp(F/beta), all other stretches of quantiles the integral.
    """
    order, mass, left, at_atoms = _by_reward(prompts, tie_method)
    atom = np.take_along_axis(prompts.atom, order, axis=-1)
    sums = mass * np.exp((at_atoms - 1.0) / beta)
    integrals = beta * np.exp((left - 1.0) / beta) * np.expm1(mass / beta)
    return 1.0 / beta + np.log(np.where(atom, sums, integrals).sum(axis=-1))


def _by_reward(prompts: Prompts, tie_method: TieMethod) -> tuple[NDArray[np.int64], Floats, Floats, Floats]:
    """The actions' order by reward; in it their mass, the mass before each, and the quantile of its tie."""
    order = np.argsort(prompts.reward, axis=-1, kind="stable")
    mass = np.take_along_axis(np.exp(prompts.log_reference), order, axis=-1)
    value = np.take_along_axis(prompts.reward, order, axis=-1)
    total = mass.cumsum(axis=-1)
    left = np.append(np.zeros_like(total[..., :1]), total[..., :-1], axis=-1)
    changes = value[..., 1:] != value[..., :-1]
    always = np.ones_like(changes[..., :1])
    # The end of a run of equal rewards: the smallest cumulative mass, from the right, at a change of value.
    ends = np.where(np.append(changes, always, axis=-1), total, np.inf)
    upto = np.minimum.accumulate(ends[..., ::-1], axis=-1)[..., ::-1]
    below = np.maximum.accumulate(np.where(np.append(always, changes, axis=-1), left, 0.0), axis=-1)
    return order, mass, left, {"weak": upto, "mid": 0.5 * (below + upto)}[tie_method]


def optimum(prompts: Prompts, quantiles: Floats, beta: float) -> Floats:
    """log of the policy that maximises E[R_q] - beta KL of each prompt, [S, P, A]: p exp(E[R_q|a]/beta)/Z."""
    return log_softmax(prompts.log_reference + quantiles / beta)


def measures(prompts: Prompts, quantiles: Floats, log_policy: Floats, beta: float) -> dict[str, Floats]:
    """Exact expectations over a policy [S, P, A], averaged over prompts: [S] each.

    reward : E[R]. quantile : E[R_q]. kl : KL(pi || p) in nats. objective : E[R_q] - beta KL.
    """
    policy = np.exp(log_policy)
    reward = (policy * prompts.reward).sum(axis=-1).mean(axis=-1)
    quantile = (policy * quantiles).sum(axis=-1).mean(axis=-1)
    kl = (policy * (log_policy - prompts.log_reference)).sum(axis=-1).mean(axis=-1)
    return {"reward": reward, "quantile": quantile, "kl": kl, "objective": quantile - beta * kl}
