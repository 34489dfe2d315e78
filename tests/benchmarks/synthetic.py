"""Embeddings that behave like CLIP's where it matters to selection, from a seed.

    mean of all (a cone) + topic + sub-topic + concept + the row's own noise

Shares of topics, sub-topics and concepts go by Zipf; the first topic is a giant. Noise has a
power-law spectrum in directions of its own. GROUPED_SHARE of the rows stand in near-duplicate
groups of 2 to 5000 with a heavy tail: stars, trees and (small) chains. A member shares part of its
parent's noise, and a tenth are byte-identical copies. Groups lie within one part; topics are in
all parts. The same (seed, part, size) gives the same bytes on one machine.

Legend: N rows, D dimensions, T concepts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Float16s: TypeAlias = NDArray[np.float16]
Floats: TypeAlias = NDArray[np.float32]
Ints: TypeAlias = NDArray[np.int64]

DIM = 768
NUM_TOPICS, SUBTOPICS, CONCEPTS = 64, 12, 16
GIANT_SHARE = 0.13
LEVEL_SHARES = (0.30, 0.13, 0.12, 0.10)
"""Of a row's squared length: mean, topic, sub-topic, concept."""
NOISE_SHARE = 1.0 - sum(LEVEL_SHARES)
SPECTRUM_DECAY = 0.40  # amplitude of the i-th direction: i^-0.40
GROUPED_SHARE = 0.7
LARGEST_GROUP, LARGEST_CHAIN = 5000, 64
GROUP_TAIL = 1.4  # Pareto exponent of the sizes
LEAST_SIMILAR, MOST_SIMILAR, SIMILARITY_SKEW = 0.82, 0.99, 1.5
IDENTICAL_SHARE = 0.1
ROWS_PER_BLOCK = 8192
ROWS_PER_PART = 50_000


@dataclass(frozen=True, slots=True)
class World:
    """Concepts float32 [T, D], their shares of the rows [T] and topics [T]; noise_DD: see above."""

    seed: int
    concepts_TD: Floats
    share_T: NDArray[np.float64]
    topic_T: Ints
    noise_DD: Floats

    @classmethod
    def of(cls, seed: int = 0, dim: int = DIM) -> World:
        """Return the world of a seed."""
        rng = np.random.default_rng(seed)
        turned = np.linalg.qr(rng.standard_normal((dim, dim)))[0].astype(np.float32)
        spectrum = np.arange(1, dim + 1) ** -SPECTRUM_DECAY
        noise = (spectrum / np.linalg.norm(spectrum))[:, None].astype(np.float32) * turned
        counts = (1, NUM_TOPICS, SUBTOPICS, CONCEPTS)
        concepts, share = np.zeros((1, dim), np.float32), np.ones(1)
        for count, weight in zip(counts, LEVEL_SHARES, strict=True):
            steps = rng.standard_normal((len(concepts) * count, dim), np.float32) @ noise
            concepts = np.repeat(concepts, count, axis=0) + np.sqrt(weight) * unit(steps)
            share = np.outer(share, _zipf(count)).ravel()
        topic = np.arange(len(concepts)) // (SUBTOPICS * CONCEPTS)
        giant = share[topic == 0].sum()
        share = np.where(
            topic == 0, share * GIANT_SHARE / giant, share * (1 - GIANT_SHARE) / (1 - giant)
        )
        return cls(seed, concepts, share, topic, noise)

    def rows(self, num_rows: int, *, part: int = 0, topic: int | None = None) -> Float16s:
        """Return unit rows float16 [num_rows, D], of all topics or of one."""
        rng = np.random.default_rng((self.seed, part, 0 if topic is None else topic + 1))
        share = self.share_T * (1.0 if topic is None else self.topic_T == topic)
        parent, correlation = _groups(rng, num_rows)
        concept = rng.choice(len(share), num_rows, p=share / share.sum())
        noise = np.empty((num_rows, self.noise_DD.shape[0]), np.float32)
        for block in _blocks(num_rows):
            fresh = rng.standard_normal(noise[block].shape, np.float32)
            np.matmul(fresh, self.noise_DD, out=noise[block])
        for members in _generations(parent):
            share_N = correlation[members, None]
            noise[members] *= np.sqrt(1 - share_N**2)
            noise[members] += share_N * noise[parent[members]]
            concept[members] = concept[parent[members]]
        return self._finished(concept, noise, rng.permutation(num_rows))

    def _finished(self, concept: Ints, noise: Floats, order: Ints) -> Float16s:
        found = np.empty(noise.shape, np.float16)
        for block in _blocks(len(order)):
            few = order[block]
            rows = self.concepts_TD[concept[few]] + np.float32(np.sqrt(NOISE_SHARE)) * noise[few]
            found[block] = unit(rows)
        return found

    def parts(self, num_rows: int, *, topic: int | None = None) -> Float16s:
        """Return the rows of as many parts as that takes."""
        sizes = [min(ROWS_PER_PART, num_rows - at) for at in range(0, num_rows, ROWS_PER_PART)]
        parts = [self.rows(size, part=part, topic=topic) for part, size in enumerate(sizes)]
        return np.concatenate(parts)

    def cluster(self, num_rows: int) -> Float16s:
        """Return rows like those of one k-means cluster: of the giant topic."""
        return self.parts(num_rows, topic=0)


def placeholders(num_rows: int, *, seed: int = 0, dim: int = DIM) -> Float16s:
    """Return rows of which 90% are noisy copies of 3 pictures, the others like nothing."""
    rng = np.random.default_rng(seed)
    pictures = unit(rng.standard_normal((3, dim), np.float32))
    found = np.empty((num_rows, dim), np.float16)
    for block in _blocks(num_rows):
        rows = unit(rng.standard_normal(found[block].shape, np.float32))
        is_copy = rng.random(len(rows)) < 0.9
        chosen = pictures[rng.integers(3, size=int(is_copy.sum()))]
        rows[is_copy] = unit(chosen + 0.2 * rows[is_copy])
        found[block] = rows
    return found


def unit(rows: Floats) -> Floats:
    """Return the rows at length 1."""
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def _groups(rng: np.random.Generator, num_rows: int) -> tuple[Ints, Floats]:
    """Return each row's parent, itself for the first of a group, and the share of its noise."""
    wanted = int(GROUPED_SHARE * num_rows)
    largest = max(2, min(LARGEST_GROUP, num_rows // 8))
    size = (2 * rng.random(wanted) ** (-1 / GROUP_TAIL)).clip(max=largest).astype(np.int64)
    size = size[np.cumsum(size) <= wanted]
    group = np.repeat(np.arange(len(size)), size)
    first = (np.cumsum(size) - size)[group]
    member = np.arange(len(group)) - first
    kind = rng.integers(3, size=len(size))[group]
    kind[(kind == 2) & (size[group] > LARGEST_CHAIN)] = 1
    drawn = (rng.random(len(group)) * member).astype(np.int64)
    parent = np.arange(num_rows)
    parent[: len(group)] = first + np.choose(kind, [0, drawn, np.maximum(member - 1, 0)])
    spread = rng.random(num_rows) ** SIMILARITY_SKEW
    similarity = MOST_SIMILAR - (MOST_SIMILAR - LEAST_SIMILAR) * spread
    similarity[rng.random(num_rows) < IDENTICAL_SHARE] = 1.0
    return parent, (1.0 - (1.0 - similarity) / NOISE_SHARE).astype(np.float32)


def _generations(parent: Ints) -> list[Ints]:
    """Return the rows that have a parent, parents before children."""
    depth, here = np.zeros(len(parent), np.int64), np.arange(len(parent))
    while (moves := parent[here] != here).any():
        depth += moves
        here = parent[here]
    return [np.flatnonzero(depth == level) for level in range(1, int(depth.max()) + 1)]


def _zipf(count: int) -> NDArray[np.float64]:
    share = 1.0 / np.arange(1, count + 1)
    return share / share.sum()


def _blocks(num_rows: int) -> list[slice]:
    return [slice(at, at + ROWS_PER_BLOCK) for at in range(0, num_rows, ROWS_PER_BLOCK)]
