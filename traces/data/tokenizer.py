"""A byte-level byte-pair tokenizer, trained here so that the bundled trace needs nobody's files."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable

N_BYTES = 256
_PIECE = re.compile(r" ?[^\W\d_]{1,16}| ?\d{1,3}| ?(?:[^\w\s]|_){1,8}|\s+(?!\S)|\s+")

Pair = tuple[int, int]


class BytePairTokenizer:
    """Ids 0..255 are bytes, id 256+i is the i-th merge; decoding is the exact inverse."""

    def __init__(self, merges: list[Pair]) -> None:
        self.merges = merges
        self._rank = {pair: N_BYTES + i for i, pair in enumerate(merges)}
        self._cache: dict[str, list[int]] = {}
        self._bytes = [bytes([i]) for i in range(N_BYTES)]
        for left, right in merges:
            self._bytes.append(self._bytes[left] + self._bytes[right])

    @property
    def vocab_size(self) -> int:
        """Number of ids."""
        return N_BYTES + len(self.merges)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        ids: list[int] = []
        for piece in _PIECE.findall(text):
            known = self._cache.get(piece)
            if known is None:
                known = self._cache[piece] = self._encode_piece(piece)
            ids += known
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; a cut UTF-8 character becomes the replacement character."""
        return b"".join(self._bytes[i] for i in ids).decode("utf-8", errors="replace")

    def _encode_piece(self, piece: str) -> list[int]:
        ids = list(piece.encode())
        while len(ids) > 1:
            pair = min(
                zip(ids, ids[1:], strict=False),
                key=lambda p: self._rank.get(p, self.vocab_size),
            )
            if pair not in self._rank:
                break
            ids = _merged(ids, pair, self._rank[pair])
        return ids


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, max_pieces: int = 40_000
) -> BytePairTokenizer:
    """Merge the most frequent pair until vocab_size ids exist; ties go to the smaller pair.

    max_pieces  only so many of the most frequent pieces are looked at, for speed
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_PIECE.findall(text))
    common = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:max_pieces]
    words = [list(piece.encode()) for piece, _ in common]
    weights = [count for _, count in common]
    total, where = _count_pairs(words, weights)
    merges: list[Pair] = []
    while len(merges) < vocab_size - N_BYTES and total:
        best = min(total, key=lambda pair: (-total[pair], pair))
        _apply_merge(best, N_BYTES + len(merges), words, weights, total, where)
        merges.append(best)
    return BytePairTokenizer(merges)


def _count_pairs(
    words: list[list[int]], weights: list[int]
) -> tuple[Counter[Pair], defaultdict[Pair, set[int]]]:
    total: Counter[Pair] = Counter()
    where: defaultdict[Pair, set[int]] = defaultdict(set)
    for index, word in enumerate(words):
        for pair in zip(word, word[1:], strict=False):
            total[pair] += weights[index]
            where[pair].add(index)
    return total, where


def _apply_merge(
    pair: Pair,
    new_id: int,
    words: list[list[int]],
    weights: list[int],
    total: Counter[Pair],
    where: defaultdict[Pair, set[int]],
) -> None:
    for index in where.pop(pair):
        word = words[index]
        merged = _merged(word, pair, new_id)
        for old in zip(word, word[1:], strict=False):
            total[old] -= weights[index]
        for new in zip(merged, merged[1:], strict=False):
            total[new] += weights[index]
            where[new].add(index)
        words[index] = merged
    del total[pair]


def _merged(ids: list[int], pair: Pair, new_id: int) -> list[int]:
    out: list[int] = []
    i = 0
    while i < len(ids):
        if i + 1 < len(ids) and (ids[i], ids[i + 1]) == pair:
            out.append(new_id)
            i += 2
        else:
            out.append(ids[i])
            i += 1
    return out
