"""A candidate: log Z and quantiles from masses of atoms that are shrunk towards those of all prompts.

The line of rewards is cut into cells: each value that ties within a prompt (an atom), and the open stretches
between them. A prompt's masses of the cells get a Dirichlet prior. Its mean is the pooled share of each cell,
its strength is the most likely one given all prompts (empirical Bayes). The posterior means stand in for the
prompt's own shares. Without ties there is one stretch, and log Z is the population's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from _lab_world import Floats, TieMethod
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import gammaln

#: Where in an atom's mass its quantile is.
PLACE_AT_ATOMS: dict[TieMethod, float] = {"weak": 1.0, "mid": 0.5}


def atoms(references: Floats) -> Floats:
    """The values that two references [P, n] of one prompt share, ascending."""
    ordered = np.sort(references, axis=-1)
    return np.unique(ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]])


@dataclass(frozen=True, eq=False)
class Cells:
    """The cells of one world and its prompts' counts [P, cells]; odd cells are atoms, even ones stretches.

    prior : kappa times the pooled shares, [cells].
    """

    values: Floats
    counts: NDArray[np.int64]
    prior: Floats

    def index(self, rewards: Floats) -> NDArray[np.int64]:
        """The cell of each reward."""
        at = np.searchsorted(self.values, rewards)
        padded = np.append(self.values, np.inf)
        return 2 * at + (padded[at] == rewards)


def make_cells(references: Floats) -> Cells:
    """The cells of references [P, n], and their prior."""
    values = atoms(references)
    empty = Cells(values, np.empty(0, np.int64), np.empty(0))
    where = empty.index(references)
    counts = np.stack([(where == cell).sum(axis=1) for cell in range(2 * len(values) + 1)], axis=1)
    share = counts.sum(axis=0) / counts.sum()
    return Cells(values, counts, _strength(counts, share) * share)


def _strength(counts: NDArray[np.int64], share: Floats) -> float:
    """kappa that makes the counts most likely, each prompt's masses being Dirichlet(kappa share)."""
    used = share > 0
    some, part, total = counts[:, used], share[used], counts.sum(axis=1)

    def surprise(log_kappa: float) -> float:
        kappa = np.exp(log_kappa)
        of_cells = (gammaln(some + kappa * part) - gammaln(kappa * part)).sum(axis=1)
        return float(-(of_cells + gammaln(kappa) - gammaln(total + kappa)).sum())

    return float(np.exp(minimize_scalar(surprise, bounds=(-3.0, 8.0), method="bounded").x))


def shrunken_log_partition(cells: Cells, beta: float, tie_method: TieMethod = "weak") -> Floats:
    """log Z of each prompt from the posterior means of the masses, [P], nats; transform identity."""
    mass = _posterior(cells.counts, cells.prior)
    right = mass.cumsum(axis=1)
    left = right - mass
    atom = np.arange(mass.shape[1]) % 2 == 1
    between = beta * np.exp((left - 1.0) / beta) * np.expm1(mass / beta)
    at_atoms = left + PLACE_AT_ATOMS[tie_method] * mass
    return 1.0 / beta + np.log(np.where(atom, mass * np.exp((at_atoms - 1.0) / beta), between).sum(axis=1))


def shrunken_quantiles(
    cells: Cells, samples: Floats, references: Floats, in_pool: bool, tie_method: TieMethod = "weak"
) -> Floats:
    """R_q of samples [P, k] from the posterior means, each sample left out if it is a reference.

    Within a stretch a sample's place is its rank among the references there, 1/2 if there is none.
    """
    own = cells.index(samples)
    where = cells.index(references)
    out = np.empty(samples.shape)
    for column in range(samples.shape[1]):
        here = own[:, column, None]
        counts = cells.counts.astype(np.float64)
        if in_pool:
            np.put_along_axis(counts, here, np.take_along_axis(counts, here, axis=1) - 1, axis=1)
        mass = _posterior(counts, cells.prior)
        right = np.take_along_axis(mass.cumsum(axis=1), here, axis=1)[:, 0]
        inside = where == here
        below = (inside & (references < samples[:, column, None])).sum(axis=1)
        others = inside.sum(axis=1) - in_pool
        place = np.where(others > 0, below / np.maximum(others, 1), 0.5)
        place = np.where(here[:, 0] % 2 == 1, PLACE_AT_ATOMS[tie_method], place)
        out[:, column] = right - (1.0 - place) * np.take_along_axis(mass, here, axis=1)[:, 0]
    return np.clip(out, 0.0, 1.0)


def _posterior(counts: NDArray[np.generic], prior: Floats) -> Floats:
    total = counts + prior
    return np.asarray(total / total.sum(axis=1, keepdims=True))
