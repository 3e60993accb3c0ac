"""Canonical JSON, digests, prompt ids and seeds: the only module that calls a hash function.

All names by content or recipe come from here, so these few functions define what "the same" means.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

#: Hex characters of a shortened digest: 128 bits, enough against collisions at any size of a store.
ID_LENGTH = 32

_CHUNK = 1 << 20


def canonical_json(value: Any) -> str:
    """The only JSON text of a value: keys sorted, no spaces, UTF-8 kept.

    Raises ValueError for NaN or infinity and TypeError for values that JSON does not have.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest_bytes(data: bytes) -> str:
    """The sha256 of the bytes, 64 hex characters."""
    return hashlib.sha256(data).hexdigest()


def digest_pieces(pieces: Iterable[bytes]) -> str:
    """The sha256 of the joined pieces, 64 hex characters, without holding them all."""
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def digest_json(value: Any) -> str:
    """The digest of a JSON value: the first 32 hex characters of the sha256 of its canonical text."""
    return digest_bytes(canonical_json(value).encode())[:ID_LENGTH]


def digest_file(path: Path | str) -> str:
    """The sha256 of a local file, 64 hex characters, read in pieces."""
    with open(path, "rb") as file:
        return digest_pieces(iter(lambda: file.read(_CHUNK), b""))


def prompt_id(messages: Sequence[Mapping[str, str]]) -> str:
    """The id of a prompt: the digest of its whole conversation, system turns included.

    Equal conversations are one prompt wherever they are in a data set.
    """
    return digest_json([{"role": m["role"], "content": m["content"]} for m in messages])


def sample_seed(seed: int, prompt: str, sample_index: int) -> int:
    """The seed of one sample, an unsigned 64-bit integer.

    It is a function of (seed, prompt_id, sample_index) alone, so a sample does not depend on its block,
    batch, shard or budget.
    """
    return _uint64(f"sample|{seed}|{prompt}|{sample_index}")


def tie_seed(prompt: str, sample_index: int) -> int:
    """The seed with which `randomized` quantiles break a sample's ties (unsigned 64 bits)."""
    return _uint64(f"tie|{prompt}|{sample_index}")


def completion_index(text: str) -> int:
    """The sample_index of a data set's completion: a number in [0, 2^31).

    It is a function of the text alone, so a completion keeps its identity when the data set changes. Two
    texts of one prompt collide with a probability of 5e-10; callers check for that.
    """
    return _uint64(f"completion|{text}") >> 33


def rounding_seed(weight: str) -> int:
    """The seed with which a weight is rounded at random, by its name (unsigned 64 bits)."""
    return _uint64(f"round|{weight}")


def split_fraction(prompt: str, seed: int = 0) -> float:
    """A number in [0, 1) that depends on the prompt and the seed; prompts below a threshold are held out.

    Hashing (not row order) keeps every prompt in its split when others are added or removed.
    """
    return _uint64(f"split|{seed}|{prompt}") / math.ldexp(1.0, 64)


def _uint64(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
