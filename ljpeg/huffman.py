"""Huffman codes as JPEG holds them: at most 16 bits, canonical, none of ones only.

Symbols are bytes: for DC coefficients the bit length of the difference to the block before (0..11),
for AC coefficients 16 * run + bit length (ITU-T T.81, annex F.1.2).
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

MAX_BITS = 16


class HuffmanTable(NamedTuple):
  """A canonical code.

  Attributes:
    counts: int [16], how many codes there are of 1..16 bits.
    symbols: uint8 [n], the symbols by rising code.
    lengths: int64 [256], bits of each symbol's code; 0: it has none.
    codes: int64 [256], each symbol's code, in the low bits.
  """

  counts: np.ndarray
  symbols: np.ndarray
  lengths: np.ndarray
  codes: np.ndarray

  @property
  def num_bytes(self) -> int:
    """Its size within a DHT segment: class and number, counts, symbols."""
    return 17 + len(self.symbols)


def optimal_lengths(histogram: np.ndarray) -> np.ndarray:
  """Code lengths, int64 [256], with the fewest bits for a histogram of symbols.

  Of all codes of at most 16 bits that leave the word of ones free, as JPEG wants it.

  Args:
    histogram: int [256], how often each symbol occurs. Those that never do get no code (0).
  """
  histogram = np.asarray(histogram)
  used = np.flatnonzero(histogram)
  lengths = np.zeros(256, np.int64)
  if not len(used):
    return lengths
  # One more symbol, which never occurs, takes the word of ones: the last of the longest.
  weights = [*histogram[used].tolist(), 0]
  found = _huffman(weights)
  if max(found) > MAX_BITS:
    found = _package_merge(weights)
  lengths[used] = found[:-1]
  return lengths


def _huffman(weights: Sequence[int]) -> list[int]:
  """Code lengths without a limit, in the order of two weights or more."""
  heap = [(weight, i) for i, weight in enumerate(weights)]
  heapq.heapify(heap)
  parents = [0] * (2 * len(weights) - 1)
  for node in range(len(weights), 2 * len(weights) - 1):
    a = heapq.heappop(heap)
    b = heapq.heappop(heap)
    parents[a[1]] = parents[b[1]] = node
    heapq.heappush(heap, (a[0] + b[0], node))
  depths = [0] * len(parents)
  for node in range(len(parents) - 2, -1, -1):
    depths[node] = depths[parents[node]] + 1
  return depths[: len(weights)]


def _package_merge(weights: Sequence[int]) -> list[int]:
  """Code lengths of at most MAX_BITS (Larmore and Hirschberg 1990), in the order of `weights`."""
  leaves = sorted((weight, (i,)) for i, weight in enumerate(weights))
  packages: list[tuple[int, tuple[int, ...]]] = []
  for _ in range(MAX_BITS):
    merged = sorted([*leaves, *packages], key=lambda item: item[0])
    packages = [
      (a[0] + b[0], a[1] + b[1]) for a, b in zip(merged[0:-1:2], merged[1::2])
    ]  # fmt: skip
  lengths = [0] * len(weights)
  for _, members in packages[: len(weights) - 1]:
    for i in members:
      lengths[i] += 1
  return lengths


def table(lengths: np.ndarray) -> HuffmanTable:
  """The canonical code of code lengths [256] (0: no code).

  Raises:
    ValueError: No JPEG file can hold such a code.
  """
  lengths = np.asarray(lengths, np.int64)
  if lengths.shape != (256,) or lengths.min() < 0 or lengths.max() > MAX_BITS:
    raise ValueError(f"Code lengths must be [256] in 0..{MAX_BITS}.")
  symbols = np.flatnonzero(lengths)
  symbols = symbols[np.argsort(lengths[symbols], kind="stable")]
  counts = np.bincount(lengths[symbols], minlength=MAX_BITS + 1)[1:]
  codes = np.zeros(256, np.int64)
  code, at = 0, 0
  for bits, count in enumerate(counts, start=1):
    codes[symbols[at : at + count]] = code + np.arange(count)
    code, at = (code + int(count)) << 1, at + int(count)
    if code >> 1 > (1 << bits) - (1 if count else 0):
      raise ValueError("The code lengths break Kraft's inequality, or use the word of ones.")
  return HuffmanTable(counts, symbols.astype(np.uint8), lengths, codes)


def optimal(histogram: np.ndarray) -> HuffmanTable:
  """The best table for a histogram of symbols, int [256]; see `optimal_lengths`."""
  return table(optimal_lengths(histogram))
