"""Range coding: common.entropy beside tensorflow_compression's own operations in one thread.

  python -m benchmarks.coding [--rounds 9] [--no_large]

Three sets of symbols, drawn by a seeded generator: y of a Kodak picture (32x48x320) and of a larger
one (128x192x320) with the 64 Gaussian tables, whose rows vary smoothly over the picture and from
channel to channel as a hyperprior's do; and latents of a factorized prior (32x48x192), a table a
channel. Sizes are about 0.7 bits a pixel, as files of trained models have.

The peer gets symbols that are made relative to their tables before the clock starts, with escapes
for those outside, and calls create, encode and finalize of one range coder, which runs in one
thread. Ours is `entropy.encode` and `entropy.decode` as files use them, with escapes, overflow and
checks. They take turns; a symbol is one latent value.

How many times as fast the peer itself is in as many threads, each with an equal section, stands
beside its rate: what sections in parallel can bring where every symbol goes through the coder.
(With Gaussian tables ours leaves out those that are 0 all but surely.)
"""

from __future__ import annotations

import os
import statistics
import time
from concurrent import futures
from typing import TYPE_CHECKING, Any, Callable, NamedTuple, Optional

import numpy as np

from benchmarks import ceilings, rows

if TYPE_CHECKING:
  from common import entropy

_FASTER = 2.0  # Than the peer.
_DECODE_RATE = 20.0  # Msymbol/s.


class Case(NamedTuple):
  """What is coded; `rows` are of the tables, None for a table a channel."""

  label: str
  tables: entropy.CodingTables
  symbols: np.ndarray
  rows: Optional[np.ndarray]


def gaussian_case(height: int, width: int, channels: int) -> Case:
  """y of a hyperprior: few channels vary much, and more so where the picture has detail."""
  from common import entropy

  rng = np.random.default_rng(0)
  of_channel = np.sort(rng.normal(-1.75, 1.2, channels))
  coarse = rng.normal(0, 0.5, [-(-height // 8), -(-width // 8), 1])
  detail = np.kron(coarse, np.ones([8, 8, 1]))[:height, :width]
  log_scale = of_channel + detail + rng.normal(0, 0.3, [height, width, channels])
  steps = (log_scale - entropy.LOG_SCALE_MIN) / entropy.LOG_SCALE_STEP
  index = np.clip(np.round(steps), 0, entropy.NUM_SCALES - 1).astype(np.uint8)
  # A latent rarely uses all of the scale that it is given where that is the least one.
  scale = np.where(index > 0, np.exp(log_scale), 0.6 * np.exp(entropy.LOG_SCALE_MIN))
  symbols = np.round(rng.normal(0, 1, index.shape) * scale).astype(np.int32)
  label = f"{height}x{width}x{channels}, Gaussian tables"
  return Case(label, entropy.gaussian_tables(), symbols[None], index[None])


def factorized_case(height: int, width: int, channels: int) -> Case:
  """Latents of a factorized prior: Laplace densities, a width of its own for each channel."""
  from common import entropy

  rng = np.random.default_rng(1)
  widths = np.exp(np.sort(rng.normal(-1.3, 1.0, channels)))
  pmfs, first = [], []
  for scale in widths:
    reach = max(1, int(np.ceil(11 * scale)))
    edges = np.arange(-reach, reach + 2) - 0.5
    below = np.where(edges < 0, 0.5 * np.exp(edges / scale), 1 - 0.5 * np.exp(-edges / scale))
    pmfs.append(np.diff(below))
    first.append(-reach)
  symbols = np.round(rng.laplace(0, 1, [1, height, width, channels]) * widths).astype(np.int32)
  label = f"{height}x{width}x{channels}, a table a channel"
  return Case(label, entropy.make_tables(pmfs, np.array(first)), symbols, None)


def peer_calls(case: Case) -> tuple[Callable[[], bytes], Callable[[bytes], Any]]:
  """tensorflow_compression's encoding and decoding of the case's symbols."""
  import tensorflow as tf
  import tensorflow_compression as tfc

  tables = case.tables
  chosen: Any = slice(None) if case.rows is None else case.rows
  relative = case.symbols - tables.first[chosen]
  escape = np.broadcast_to(tables.escape[chosen], relative.shape)
  outside = (relative < 0) | (relative > escape)
  values = tf.constant(np.where(outside, escape, relative), tf.int32)
  index = None if case.rows is None else tf.constant(case.rows, tf.int32)
  shape = list(case.symbols.shape)

  def encode() -> bytes:
    handle = tfc.create_range_encoder([], tables.cdf)
    if index is None:
      handle = tfc.entropy_encode_channel(handle, values)
    else:
      handle = tfc.entropy_encode_index(handle, index, values)
    return tfc.entropy_encode_finalize(handle).numpy()

  def decode(data: bytes) -> Any:
    handle = tfc.create_range_decoder(data, tables.cdf)
    if index is None:
      handle, decoded = tfc.entropy_decode_channel(handle, shape, tf.int32)
    else:
      handle, decoded = tfc.entropy_decode_index(handle, index, shape, tf.int32)
    if not tfc.entropy_decode_finalize(handle).numpy():
      raise AssertionError(f"{case.label}: the peer's decoder ends out of step.")
    return decoded

  if not np.array_equal(decode(encode()).numpy(), values.numpy()):
    raise AssertionError(f"{case.label}: the peer decodes other symbols.")
  return encode, decode


def in_threads(
  case: Case, pool: futures.ThreadPoolExecutor, number: int
) -> tuple[Callable[[], list[bytes]], Callable[[list[bytes]], list[Any]]]:
  """`peer_calls` of `number` equal sections of the case, each in a thread."""
  symbols = np.array_split(case.symbols.reshape(-1, case.symbols.shape[-1]), number)
  chosen: list[Any] = [None] * number
  if case.rows is not None:
    chosen = np.array_split(case.rows.reshape(-1, case.rows.shape[-1]), number)
  calls = [peer_calls(case._replace(symbols=s, rows=r)) for s, r in zip(symbols, chosen)]

  def encode() -> list[bytes]:
    return list(pool.map(lambda call: call[0](), calls))

  def decode(data: list[bytes]) -> list[Any]:
    return list(pool.map(lambda call, part: call[1](part), calls, data))

  return encode, decode


def measure(
  case: Case,
  rounds: int,
  probes: dict[str, Callable[[], float]],
  ceiling: dict[str, list[float]],
) -> list[rows.Figure]:
  """Times both coders in turn; the figures of one case."""
  import tensorflow as tf

  from common import entropy

  peer_encode, peer_decode = peer_calls(case)
  threads = tf.config.threading.get_intra_op_parallelism_threads() or os.cpu_count() or 1
  pool = futures.ThreadPoolExecutor(threads)
  encode_in_threads, decode_in_threads = in_threads(case, pool, threads)
  parts = encode_in_threads()
  theirs, ours = peer_encode(), entropy.encode(case.tables, case.symbols, case.rows)
  shape = case.symbols.shape
  if not np.array_equal(entropy.decode(case.tables, ours, shape, case.rows), case.symbols):
    raise AssertionError(f"{case.label}: other symbols come back.")
  calls: dict[str, Callable[[], Any]] = {
    "encode": lambda: entropy.encode(case.tables, case.symbols, case.rows),
    "tfc encode": peer_encode,
    "decode": lambda: entropy.decode(case.tables, ours, shape, case.rows),
    "tfc decode": lambda: peer_decode(theirs),
    "all encode": encode_in_threads,
    "all decode": lambda: decode_in_threads(parts),
  }
  millions = case.symbols.size / 1e6
  rates: dict[str, list[float]] = {name: [] for name in calls}  # Msymbol/s.
  for turn in range(rounds + 1):
    for name, call in calls.items():
      began = time.perf_counter()
      call()
      if turn:  # The first is a warm-up.
        rates[name].append(millions / (time.perf_counter() - began))
    for name, probe in probes.items():
      ceiling[name].append(probe())
  pool.shutdown()
  print(
    f"{case.label}: {len(ours):,} bytes, tfc {len(theirs):,} ({len(ours) / len(theirs) - 1:+.3%})"
  )
  figures = []
  for name in ("encode", "decode"):
    ratio, in_sections = (
      statistics.median(a / b for a, b in zip(rates[of], rates[f"tfc {name}"]))
      for of in (name, f"all {name}")
    )
    label = f"{name}, {case.label}"
    against = f"tfc, one thread, {rows.spread(rates[f'tfc {name}'])}"
    against += f"; it alone, {threads} threads, {in_sections:.2f} x"
    figures.append(rows.Figure(6, label, rates[name], "Msymbol/s", against, ratio, _FASTER))
  decode = rates["decode"]
  share = statistics.median(decode) / _DECODE_RATE
  figures.append(rows.Figure(6, label, decode, "Msymbol/s", f"{_DECODE_RATE:.0f}", share, 1.0))
  return figures


def main() -> None:
  parser = rows.parser(__doc__)
  parser.add_argument("--rounds", type=int, default=9, help="how often each is timed")
  parser.add_argument("--no_large", action="store_true", help="without the larger picture")
  args = parser.parse_args()
  cases = [gaussian_case(32, 48, 320), factorized_case(32, 48, 192)]
  if not args.no_large:
    cases.append(gaussian_case(128, 192, 320))
  figures: list[rows.Figure] = []
  probes = {rows.MATMUL: ceilings.make_matmul_probe(), rows.COPY: ceilings.make_copy_probe()}
  ceiling: dict[str, list[float]] = {name: [] for name in probes}
  for case in cases:
    figures += measure(case, args.rounds, probes, ceiling)
  rows.report(figures, ceiling, args.json)


if __name__ == "__main__":
  main()
