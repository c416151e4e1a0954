"""The second stage of a fit: boosted trees of what the formula leaves, in compact arrays.

scikit-learn grows the trees; they are kept as four arrays (6 bytes a node) and evaluated by a
compiled loop, so that a calibration is small, loads without scikit-learn and prices millions of
operations a second.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from hwmodels.fitted.parts import Floats

LEAF = 255  # in place of a feature
MOST_LEAVES = 31  # so that a child's place in its tree fits a byte
LEARNING_RATE = 0.08
LEAST_IN_LEAF = 20


@dataclass(frozen=True, slots=True)
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


NO_TREES = Trees(
    np.zeros(0, np.uint8),
    np.zeros(0, np.float32),
    np.zeros(0, np.uint8),
    np.zeros(0, np.int32),
    0.0,
)


def grow(features: npt.NDArray[np.float32], target: Floats, n_trees: int, leaves: int) -> Trees:
    """Trees by least absolute error, which a few rows of a badly tuned kernel do not bend.

    features  float32[n, shapes]; target float64[n]
    leaves    of a tree, at most MOST_LEAVES
    """
    from sklearn.ensemble import HistGradientBoostingRegressor

    grown = HistGradientBoostingRegressor(
        loss="absolute_error",
        max_iter=n_trees,
        learning_rate=LEARNING_RATE,
        max_leaf_nodes=min(leaves, MOST_LEAVES),
        min_samples_leaf=LEAST_IN_LEAF,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=0,
    ).fit(features, target)
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
    """What the trees say of each row of features, float64[n]."""
    found = np.full(len(features), trees.baseline)
    if len(trees.roots):
        _add(trees.feature, trees.number, trees.left, trees.roots, features, found)
    return found


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
    return feature, number, left


@numba.njit(cache=True, nogil=True)
def _add(feature, number, left, roots, features, found):  # type: ignore[no-untyped-def]
    for row in range(features.shape[0]):
        total = 0.0
        for root in roots:
            node = root
            while feature[node] != 255:
                step = left[node]
                if features[row, feature[node]] > number[node]:
                    step += 1
                node = root + step
            total += number[node]
        found[row] += total
