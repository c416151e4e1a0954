"""The second stage of a fit: boosted trees of what the formula leaves, in compact arrays.

scikit-learn grows the trees; they are kept as four arrays (6 bytes a node), so that a calibration
is small and loads without scikit-learn. A compiled loop walks all rows of a block down one tree, a
level at a time: no branch depends on a row, which is quicker than walking row by row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numba
import numpy as np
import numpy.typing as npt

from hwmodels.fitted.parts import Floats

LEAF = 255  # in place of a feature
MOST_LEAVES = 31  # so that a child's place in its tree fits a byte
LEARNING_RATE = 0.12
MOST_LEVELS = 6
MANTISSA_BITS = 11
LEAST_IN_LEAF = 20


@dataclass(frozen=True)
class Trees:
    """Boosted trees; a node's left child comes first, its right child next.

    feature   uint8[nodes], LEAF where the node is one
    number    float32[nodes]: go left at values <= it; at a leaf, what the tree adds
    left      uint8[nodes], place of the left child from the root of the tree
    roots     int32[trees], ascending
    baseline  what all trees add to
    """

    feature: npt.NDArray[np.uint8]
    number: npt.NDArray[np.float32]
    left: npt.NDArray[np.uint8]
    roots: npt.NDArray[np.int32]
    baseline: float

    @cached_property
    def full(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as full binary trees of `levels` levels: node k has children 2k + 1, 2k + 2.

        returns  uint32[trees, inner] feature, float32[trees, inner] threshold (infinite below a
                 leaf, so that a walk goes left to its copy), float32[trees, inner + 1] of leaves
        """
        levels = _levels(self)
        inner = (1 << levels) - 1
        at = np.repeat(self.roots[:, None], 2 * inner + 1, axis=1)  # our node at each full place
        for k in range(inner):
            node = at[:, k]
            leaf = self.feature[node] == LEAF
            left = np.where(leaf, node, self.roots + self.left[node])
            at[:, 2 * k + 1], at[:, 2 * k + 2] = left, np.where(leaf, node, left + 1)
        leaf = self.feature[at[:, :inner]] == LEAF
        return (
            np.where(leaf, 0, self.feature[at[:, :inner]]).astype(np.uint32),
            np.where(leaf, np.inf, self.number[at[:, :inner]]).astype(np.float32),
            self.number[at[:, inner:]],
        )


NO_TREES = Trees(
    np.zeros(0, np.uint8),
    np.zeros(0, np.float32),
    np.zeros(0, np.uint8),
    np.zeros(0, np.int32),
    0.0,
)


def grow(features: npt.NDArray[np.float32], target: Floats, n_trees: int, leaves: int) -> Trees:
    """Trees by least absolute error, which a few rows of a badly tuned kernel do not bend.

    features  float32[shapes, n]; target float64[n]
    leaves    of a tree, at most MOST_LEAVES
    """
    from sklearn.ensemble import HistGradientBoostingRegressor
    from threadpoolctl import threadpool_limits

    unfitted = HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=n_trees,
        learning_rate=LEARNING_RATE,
        max_leaf_nodes=min(leaves, MOST_LEAVES),
        max_depth=MOST_LEVELS,
        min_samples_leaf=LEAST_IN_LEAF,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=0,
    )
    with threadpool_limits(1):  # more wait for each other, and sums would depend on how many
        grown = unfitted.fit(features.T, target)
    parts = [_flat(of_step[0].nodes) for of_step in grown._predictors]
    sizes = [len(feature) for feature, _, _ in parts]
    return Trees(
        np.concatenate([feature for feature, _, _ in parts]),
        np.concatenate([number for _, number, _ in parts]),
        np.concatenate([left for _, _, left in parts]),
        np.cumsum([0, *sizes[:-1]]).astype(np.int32),
        float(np.ravel(grown._baseline_prediction)[0]),
    )


def evaluate(trees: Trees, features: npt.NDArray[np.float32]) -> Floats:
    """What the trees say of each column of features float32[shapes, n], float64[n]."""
    found = np.full(features.shape[1], trees.baseline)
    if len(trees.roots):
        _add(*trees.full, np.ascontiguousarray(features), found)
    return found


def _levels(trees: Trees) -> int:
    """Steps from a root to the deepest leaf; a node comes before its children."""
    deepest = 0
    depth = np.zeros(len(trees.feature), np.int64)
    root = np.repeat(trees.roots, np.diff(np.append(trees.roots, len(trees.feature))))
    for node in np.flatnonzero(trees.feature != LEAF):
        left = root[node] + trees.left[node]
        depth[left : left + 2] = depth[node] + 1
        deepest = max(deepest, int(depth[node]) + 1)
    return deepest


def _flat(nodes: np.ndarray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float32], np.ndarray]:
    """One grown tree in breadth-first order, the children of a node side by side."""
    order = [0]
    left = np.zeros(len(nodes), np.uint8)
    for place, node in enumerate(order):  # grows while it is read
        if not nodes[node]["is_leaf"]:
            left[place] = len(order)
            order += [int(nodes[node]["left"]), int(nodes[node]["right"])]
    ordered = nodes[order]
    is_leaf = ordered["is_leaf"].astype(bool)
    feature = np.where(is_leaf, LEAF, ordered["feature_idx"]).astype(np.uint8)
    number = np.where(is_leaf, ordered["value"], ordered["num_threshold"]).astype(np.float32)
    return feature, short(number), left


def short(numbers: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """The numbers to MANTISSA_BITS of their mantissa, so that files are smaller."""
    dropped = 23 - MANTISSA_BITS
    bits = numbers.view(np.uint32) + np.uint32(1 << (dropped - 1))
    return (bits & np.uint32(0xFFFFFFFF << dropped & 0xFFFFFFFF)).view(np.float32)


@numba.njit(cache=True, nogil=True)
def _add(feature, threshold, value, features, found):  # type: ignore[no-untyped-def]
    n_trees, inner = feature.shape
    n_rows = features.shape[1]
    block = 512  # its places stay in the first-level cache
    place = np.empty(block, np.uint32)  # unsigned: an index that cannot be negative is not checked
    one = np.uint32(1)
    for start in range(0, n_rows, block):
        n = min(block, n_rows - start)
        columns = features[:, start : start + n]
        for tree in range(n_trees):
            which, most = feature[tree], threshold[tree]
            place[:] = 0
            level = 0
            while (1 << level) <= inner:
                level += 1
                for row in range(n):
                    node = place[row]
                    over = columns[which[node], row] > most[node]
                    place[row] = (node << one) + one + np.uint32(over)
            leaves = value[tree]
            for row in range(n):
                found[start + row] += leaves[place[row] - np.uint32(inner)]
