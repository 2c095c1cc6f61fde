"""Priors and range coding: exact round trips, real bits against likelihoods, hostile sizes."""

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf
import tensorflow_compression as tfc
from hypothesis import given, settings
from hypothesis import strategies as st

from common import entropy
from common.bitstream import BitstreamError, Cursor, varint


@pytest.fixture(scope="module")
def prior():
  tf.random.set_seed(1)
  prior = entropy.FactorizedPrior(5)
  prior.calibrate(np.array([0.2, -3.4, 10.0, 0.0, 0.6]), np.array([0.01, 1.0, 5.0, 40.0, 0.5]))
  prior.prepare()
  return prior


def test_bits_are_those_of_tensorflow_compression(prior):
  y = tf.constant(np.random.default_rng(0).normal(0, 5, [3, 4, 4, 5]), tf.float32)
  model = tfc.ContinuousBatchedEntropyModel(prior.distribution, coding_rank=3)
  _, expected = model(y, training=False)
  quantized = tf.round(y - prior.offset) + prior.offset
  np.testing.assert_allclose(prior.bits(quantized), expected, rtol=2e-3)


@pytest.mark.parametrize("reach", [0.1, 3.0, 300.0])
def test_bits_and_their_gradients_are_those_of_tensorflow_compressions_density(prior, reach):
  """Also far out, where a difference of two sigmoids in float32 would be 0."""
  y = tf.constant(reach * np.random.default_rng(1).standard_cauchy([3, 4, 6, 5]), tf.float32)
  weights = prior.distribution.trainable_variables

  def run(bits):
    with tf.GradientTape() as tape:
      tape.watch(y)
      value = bits(y)
    return value, *tape.gradient(value, [y, *weights])

  def plain(y):
    return tf.reduce_sum(prior.distribution.log_prob(y), axis=[1, 2, 3]) / -np.log(2.0)

  for got, expected in zip(run(tf.function(prior.bits)), run(plain)):
    got, expected = got.numpy(), expected.numpy()
    assert np.all(np.isfinite(got))
    np.testing.assert_allclose(got, expected, rtol=2e-4, atol=2e-5 * np.abs(expected).max())


def test_tables_hold_the_priors_probabilities(prior):
  """Each row's probabilities are the prior's at the grid points, to the tables' precision."""
  rows = _rows(prior.tables)
  for c, (row, first) in enumerate(zip(rows, prior.tables.first)):
    pmf = np.diff(row) / 2**16
    grid = first + np.arange(len(pmf) - 1) + prior.offset.numpy()[c]
    points = np.tile(grid[:, None], [1, 5]).astype(np.float32)
    expected = prior.distribution.prob(points).numpy()[:, c]
    np.testing.assert_allclose(pmf[:-1], expected, atol=2.5 / 2**16 + 1e-3 * expected.max())
    assert row[0] == 0 and row[-1] == 2**16 and np.all(np.diff(row) > 0)


def _rows(tables):
  flat, rows = tables.cdf, []
  begin = 0
  for escape in tables.escape:
    assert flat[begin] == entropy.PRECISION
    rows.append(flat[begin + 1 : begin + escape + 3])
    begin += escape + 3
  assert begin == len(flat)
  return rows


@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  scale=st.sampled_from([0.0, 0.3, 5.0, 1e3, 1e6]),
  shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
)
def test_any_symbols_come_back(prior, seed, scale, shape):
  symbols = np.random.default_rng(seed).normal(0, scale + 1e-9, (*shape, 5)).astype(np.int32)
  data = entropy.encode(prior.tables, symbols)
  np.testing.assert_array_equal(entropy.decode(prior.tables, data, symbols.shape), symbols)


@settings(max_examples=60, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  shape=st.tuples(st.just(1), st.integers(0, 9), st.integers(1, 9)),
  at_most=st.sampled_from([1, 7, 40, 100]),
  with_rows=st.booleans(),
)
def test_symbols_of_many_streams_come_back(prior, normal, seed, shape, at_most, with_rows):
  random = np.random.default_rng(seed)
  shape = (*shape, 5)
  symbols = random.normal(0, 30, shape).astype(np.int32)
  rows = random.integers(0, 64, shape).astype(np.uint8) if with_rows else None
  tables = normal.tables if with_rows else prior.tables
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(entropy, "_SYMBOLS_A_STREAM", at_most)
    data = entropy.encode(tables, symbols, rows)
    np.testing.assert_array_equal(entropy.decode(tables, data, shape, rows), symbols)


@pytest.mark.parametrize("with_rows", [False, True])
def test_a_stream_is_what_its_band_gives_alone_on_any_number_of_threads(
  prior, normal, with_rows, monkeypatch
):
  random = np.random.default_rng(0)
  symbols = random.normal(0, 3, [1, 7, 9, 5]).astype(np.int32)
  symbols[0, 3, 2] = 70_000
  rows = random.integers(0, 64, symbols.shape).astype(np.uint8) if with_rows else None
  tables = normal.tables if with_rows else prior.tables
  flat, flat_rows = symbols.reshape(-1, 5), None if rows is None else rows.reshape(-1, 5)
  alone = [
    entropy.encode(tables, flat[part], None if flat_rows is None else flat_rows[part])
    for part in (slice(0, 21), slice(21, 42), slice(42, 63))
  ]
  monkeypatch.setattr(entropy, "_SYMBOLS_A_STREAM", 120)
  for threads in (1, 2, 8):
    monkeypatch.setattr(
      tf.config.threading, "get_intra_op_parallelism_threads", lambda n=threads: n
    )
    data = entropy.encode(tables, symbols, rows)
    assert data == varint(len(alone[0])) + varint(len(alone[1])) + b"".join(alone)
    np.testing.assert_array_equal(entropy.decode(tables, data, symbols.shape, rows), symbols)


def test_symbols_whose_rows_are_sure_come_back_and_cost_nothing_where_they_are_zero(normal):
  tables = normal.tables
  assert tables.num_sure == 3  # The scales of 0.11 to 0.14; the range coder never sees them.
  rows = np.random.default_rng(0).integers(0, tables.num_sure, [1, 40, 50, 8])
  symbols = np.zeros(rows.shape, np.int32)
  section = entropy.encode(tables, symbols, rows)
  assert len(section) <= 4
  np.testing.assert_array_equal(entropy.decode(tables, section, rows.shape, rows), symbols)
  flat = symbols.reshape(-1)
  flat[[0, 1, 7_000, -1]] = [1, -1, entropy.MAX_ABS_SYMBOL, -entropy.MAX_ABS_SYMBOL]
  section = entropy.encode(tables, symbols, rows)
  np.testing.assert_array_equal(entropy.decode(tables, section, rows.shape, rows), symbols)


def test_threads_may_ask_for_threads(monkeypatch):
  monkeypatch.setattr(tf.config.threading, "get_intra_op_parallelism_threads", lambda: 2)

  def inner(number):
    return entropy._in_threads(lambda n: 10 * number + n, range(3))

  assert entropy._in_threads(inner, range(4)) == [[10 * n + i for i in range(3)] for n in range(4)]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_an_error_in_any_stream_is_that_of_the_section(normal, monkeypatch, threads):
  """Whichever thread meets it; the next call finds the threads at work."""
  monkeypatch.setattr(entropy, "_SYMBOLS_A_STREAM", 100)
  monkeypatch.setattr(tf.config.threading, "get_intra_op_parallelism_threads", lambda: threads)
  rows = np.full([1, 8, 10, 5], 40)
  symbols = np.round(np.random.default_rng(0).normal(0, 3, rows.shape)).astype(np.int32)
  section = entropy.encode(normal.tables, symbols, rows)
  cursor = Cursor(section)
  sizes = [cursor.varint("length") for _ in range(3)]
  begin = len(section) - cursor.remaining
  for stream in range(4):
    damaged = bytearray(section)
    damaged[begin + sum(sizes[:stream])] = 77  # Exceptions, of which such rows have none.
    with pytest.raises(BitstreamError, match="exception"):
      entropy.decode(normal.tables, bytes(damaged), rows.shape, rows)
    np.testing.assert_array_equal(entropy.decode(normal.tables, section, rows.shape, rows), symbols)


@pytest.mark.parametrize(
  "section,said",
  [
    (b"\x09\x00\x00\x00\x00", "more exceptions than room"),
    (b"\x01\x20\x00\x00", "exception of the section is out of range"),  # Beyond the last symbol.
    (b"\x01\x08\x00\x00", "symbol of the range coder is an exception"),  # Its row is not sure.
    (b"\x01\x00\xff\xff\xff\xff\x7f\x00", "exception of the section is out of range"),
    (b"\x01\x00\x80", "ends within its exception"),
  ],
)
def test_hostile_exceptions_are_refused(normal, section, said):
  rows = np.zeros([1, 2, 2, 4], int)
  rows[0, 1] = 40
  with pytest.raises(BitstreamError, match=said):
    entropy.decode(normal.tables, section, rows.shape, rows)


def test_streams_that_end_early_are_refused(normal, monkeypatch):
  monkeypatch.setattr(entropy, "_SYMBOLS_A_STREAM", 100)
  random = np.random.default_rng(0)
  rows = random.integers(30, 64, [1, 8, 8, 4])
  symbols = np.round(random.normal(0, SCALES[rows])).astype(np.int32)
  section = entropy.encode(normal.tables, symbols, rows)
  for forged in (
    bytes([255, 127]) + section[1:],
    b"\0" + section[1:],
    section[: len(section) // 2],
  ):
    with pytest.raises(BitstreamError):
      entropy.decode(normal.tables, forged, rows.shape, rows)


def test_extreme_values_come_back(prior):
  y = np.zeros([1, 2, 2, 5], np.float32)
  y[0, 0, 0] = [1e30, -1e30, np.inf, -np.inf, np.nan]
  symbols = prior.symbols(y)
  data = entropy.encode(prior.tables, symbols)
  np.testing.assert_array_equal(entropy.decode(prior.tables, data, symbols.shape), symbols)


def test_real_bits_are_the_likelihoods_within_a_fifth_of_a_percent(prior):
  """Samples of the prior itself: what its tables should be best at."""
  tf.random.set_seed(7)
  samples = tf.reshape(_sample(prior, 20_000), [1, 100, 200, 5])
  symbols = prior.symbols(samples)
  real = 8 * len(entropy.encode(prior.tables, symbols))
  estimate = float(prior.bits(prior.values(symbols))[0])
  assert abs(real / estimate - 1) < 0.002


def _sample(prior, count):
  """By inverting each channel's tables."""
  columns = []
  random = np.random.default_rng(0)
  for row, first, offset in zip(_rows(prior.tables), prior.tables.first, prior.offset.numpy()):
    u = random.integers(0, row[-2], count)  # Without the escape symbol.
    columns.append(first + np.searchsorted(row, u, side="right") - 1 + offset)
  return tf.constant(np.stack(columns, -1), tf.float32)


def test_symbols_beyond_the_bound_are_refused_rather_than_coded_without_end(prior):
  limit = np.full([1, 1, 1, 5], entropy.MAX_ABS_SYMBOL, np.int32)
  data = entropy.encode(prior.tables, limit)
  np.testing.assert_array_equal(entropy.decode(prior.tables, data, limit.shape), limit)
  with pytest.raises(ValueError, match="Symbols lie within"):
    entropy.encode(prior.tables, limit + 1)


@settings(max_examples=400, deadline=2000)
@given(
  data=st.one_of(
    st.binary(max_size=64),
    st.integers(0, 64).map(lambda n: b"\0" + b"\xff" * n),
    st.integers(0, 64).map(lambda n: b"\xff" * n),
    st.integers(0, 64).map(lambda n: bytes(n)),
  ),
  shape=st.tuples(st.just(1), st.integers(1, 12), st.integers(1, 12)),
)
def test_hostile_sections_end_soon_refused_or_decoded(prior, data, shape):
  try:
    symbols = entropy.decode(prior.tables, data, (*shape, 5))
  except BitstreamError:
    return
  assert symbols.shape == (*shape, 5) and np.abs(symbols).max() <= entropy.MAX_ABS_SYMBOL


def test_overflow_that_does_not_match_the_escapes_is_refused(prior):
  symbols = np.full([1, 1, 1, 5], 100_000, np.int32)
  data = entropy.encode(prior.tables, symbols)
  length = data[0]
  for forged in (
    bytes([length + 1]) + data[1 : 1 + length] + b"\0" + data[1 + length :],  # One too many.
    bytes([length - 3]) + data[4:],  # One too few.
    b"\0" + data[1 + length :],  # None.
  ):
    with pytest.raises(BitstreamError):
      entropy.decode(prior.tables, forged, symbols.shape)


def test_a_size_that_the_bytes_cannot_hold_is_refused_before_it_is_allocated(prior):
  with pytest.raises(BitstreamError, match="cannot hold"):
    entropy.decode(prior.tables, b"\0" + b"x" * 20, (1, 100_000, 100_000, 5))


def test_tables_are_a_function_of_the_weights_alone():
  def tables(seed):
    tf.random.set_seed(seed)
    prior = entropy.FactorizedPrior(3)
    prior.prepare()
    return prior.tables.cdf.tobytes()

  assert tables(1) == tables(1)
  assert tables(1) != tables(2)


def test_calibrated_prior_has_the_median_and_the_spread_of_the_data(prior):
  centre = np.array([[0.2, -3.4, 10.0, 0.0, 0.6]], np.float32)
  np.testing.assert_allclose(prior.distribution.base.cdf(centre)[0], 0.5, atol=1e-3)
  spread = np.array([0.1, 1.0, 5.0, 40.0, 0.5], np.float32)  # 0.1 is the least.
  np.testing.assert_allclose(prior.distribution.base.cdf(centre + spread)[0], 0.86, atol=0.05)


def test_the_grid_goes_through_the_median_or_through_the_integers(prior):
  grid = np.arange(-20, 20)[:, None] + prior.offset.numpy()
  nearest = np.abs(prior.distribution.base.cdf(grid.astype(np.float32)).numpy() - 0.5).min(axis=0)
  np.testing.assert_allclose(nearest, 0, atol=1e-3)
  plain = entropy.FactorizedPrior(2, offset_heuristic=False)
  plain.prepare()
  np.testing.assert_array_equal(plain.offset, 0)


def test_tables_before_prepare_are_refused():
  with pytest.raises(RuntimeError, match="prepare"):
    _ = entropy.FactorizedPrior(2).tables


def test_checkpoints_do_not_hold_what_is_derived(prior):
  names = [v.name for v in prior.variables]
  assert not any("offset" in name for name in names)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_quantized_counts_sum_up_and_leave_nothing_out(weights):
  pmf = np.array(weights) / max(sum(weights), 1.0)
  tables = entropy.make_tables([pmf], np.array([0]))
  counts = np.diff(_rows(tables)[0])
  assert counts.sum() == 2**16 and counts.min() >= 1


# --- Normal densities with a row a symbol ---------------------------------------------------------

SCALES = np.exp(entropy.LOG_SCALE_MIN + entropy.LOG_SCALE_STEP * np.arange(entropy.NUM_SCALES))


@pytest.fixture(scope="module")
def normal():
  return entropy.GaussianConditional()


def _normal_pmf(integers, scale):
  """P(integer) of a zero-mean normal in unit bins, float64, without cancellation."""
  magnitude = np.abs(integers)
  return scipy.stats.norm.sf((magnitude - 0.5) / scale) - scipy.stats.norm.sf(
    (magnitude + 0.5) / scale
  )


def test_the_scales_are_64_from_0_11_to_256_evenly_in_the_logarithm():
  assert entropy.NUM_SCALES == 64
  assert abs(entropy.LOG_SCALE_MIN - np.log(0.11)) < 1e-12
  largest = entropy.LOG_SCALE_MIN + 63 * entropy.LOG_SCALE_STEP
  assert abs(largest - np.log(256)) < 1e-12


def test_each_row_is_the_normal_of_its_scale(normal):
  rows = _rows(normal.tables)
  assert len(rows) == 64
  for row, first, scale in zip(rows, normal.tables.first, SCALES):
    pmf = np.diff(row) / 2**16
    integers = first + np.arange(len(pmf) - 1)
    assert integers[-1] == -first  # Symmetric, and the escape is last.
    np.testing.assert_allclose(pmf[:-1], _normal_pmf(integers, scale), atol=3 / 2**16)
    outside = 2 * scipy.stats.norm.sf((integers[-1] + 0.5) / scale)
    assert outside < 2.0**-15 and abs(pmf[-1] - outside) <= 2.0**-16 + outside
    assert row[0] == 0 and row[-1] == 2**16 and np.all(np.diff(row) > 0)


@settings(max_examples=100, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  shape=st.tuples(st.integers(1, 2), st.integers(0, 9), st.integers(1, 9), st.integers(1, 5)),
  spread=st.sampled_from([0.0, 1.0, 10.0, 1e4, 2.0**28]),
  row=st.one_of(st.none(), st.integers(0, 63)),
)
def test_any_symbols_come_back_with_any_rows(normal, seed, shape, spread, row):
  """Spreads of many scales: values far outside of their row are escaped."""
  random = np.random.default_rng(seed)
  rows = random.integers(0, 64, shape) if row is None else np.full(shape, row)
  symbols = np.round(random.normal(0, 1, shape) * SCALES[rows] * spread)
  symbols = np.clip(symbols, -entropy.MAX_ABS_SYMBOL, entropy.MAX_ABS_SYMBOL).astype(np.int32)
  data = entropy.encode(normal.tables, symbols, rows)
  np.testing.assert_array_equal(entropy.decode(normal.tables, data, shape, rows), symbols)


def test_the_edges_of_every_row_come_back(normal):
  last = normal.tables.first + normal.tables.escape - 1  # The last before the escape.
  symbols = np.stack(
    [normal.tables.first - 1, normal.tables.first, 0 * last, last, last + 1, last + 2]
  ).astype(np.int32)
  rows = np.broadcast_to(np.arange(64), symbols.shape)
  data = entropy.encode(normal.tables, symbols, rows)
  np.testing.assert_array_equal(entropy.decode(normal.tables, data, symbols.shape, rows), symbols)


def test_real_bits_with_rows_are_the_likelihoods_within_a_fifth_of_a_percent(normal):
  """Symbols as a hyperprior leaves them: more of them hardly vary than vary much."""
  random = np.random.default_rng(0)
  rows = np.minimum(random.geometric(0.06, [1, 200, 300, 2]) - 1, 63)
  symbols = np.round(random.normal(0, SCALES[rows])).astype(np.int32)
  real = 8 * len(entropy.encode(normal.tables, symbols, rows))
  ideal = -np.log2(_normal_pmf(symbols, SCALES[rows])).sum()
  assert abs(real / ideal - 1) < 0.002


@settings(max_examples=300, deadline=2000)
@given(
  data=st.one_of(
    st.binary(max_size=64),
    st.integers(0, 64).map(lambda n: b"\0" + b"\xff" * n),
    st.integers(0, 64).map(lambda n: b"\xff" * n),
    st.integers(0, 64).map(lambda n: bytes(n)),
  ),
  seed=st.integers(0, 2**32 - 1),
  shape=st.tuples(st.just(1), st.integers(1, 12), st.integers(1, 12), st.integers(1, 5)),
)
def test_hostile_sections_with_rows_end_soon_refused_or_decoded(normal, data, seed, shape):
  rows = np.random.default_rng(seed).integers(0, 64, shape)
  try:
    symbols = entropy.decode(normal.tables, data, shape, rows)
  except BitstreamError:
    return
  assert symbols.shape == shape and np.abs(symbols).max() <= entropy.MAX_ABS_SYMBOL


def test_a_section_that_is_changed_is_refused_or_decodes_to_something_else(normal):
  random = np.random.default_rng(0)
  rows = random.integers(0, 64, [1, 8, 8, 4])
  symbols = np.round(random.normal(0, 1.5 * SCALES[rows])).astype(np.int32)
  section = entropy.encode(normal.tables, symbols, rows)
  refused = 0
  for position in range(len(section)):
    damaged = bytearray(section)
    damaged[position] ^= 0x10
    try:
      decoded = entropy.decode(normal.tables, bytes(damaged), rows.shape, rows)
    except BitstreamError:
      refused += 1
      continue
    assert np.abs(decoded).max() <= entropy.MAX_ABS_SYMBOL
  assert refused > 0


def test_rows_that_the_bytes_cannot_hold_are_refused_before_they_are_decoded(normal):
  rows = np.full([1, 64, 64, 8], 40)
  with pytest.raises(BitstreamError, match="cannot hold the 32768 symbols"):
    entropy.decode(normal.tables, b"\0\0" + b"x" * 20, rows.shape, rows)


def test_normal_bits_are_those_of_scipy(normal):
  random = np.random.default_rng(0)
  log_scale = random.uniform(-3.5, 6.5, [2, 20, 20, 3]).astype(np.float32)  # Beyond both bounds.
  scale = np.clip(np.exp(log_scale.astype(np.float64)), 0.11, 256)
  mean = random.normal(0, 3, log_scale.shape).astype(np.float32)
  y = (mean + np.round(random.normal(0, 1.5, mean.shape) * scale)).astype(np.float32)
  expected = -np.log2(_normal_pmf(y.astype(np.float64) - mean, scale))
  for i in range(2):  # One number an image, and it is the sum.
    got = normal.bits(y, mean, log_scale)[i]
    np.testing.assert_allclose(got, expected[i].sum(), rtol=1e-4)
  each = normal.bits(*(a.reshape(-1, 1, 1, 1) for a in (y, mean, log_scale)))
  np.testing.assert_allclose(each, expected.ravel(), rtol=2e-3, atol=1e-4)


@pytest.mark.parametrize("log_scale", [-30.0, entropy.LOG_SCALE_MIN, -1.0, 0.0, 3.0, 5.5, 30.0])
def test_gradients_of_normal_bits_are_finite_however_far_the_value_lies(normal, log_scale):
  y = tf.constant([-1e4, -300.0, -20.0, -3.0, -0.5, 0.0, 0.3, 4.0, 25.0, 1e3, 1e4])
  y = tf.reshape(y, [-1, 1, 1, 1])
  mean, log_scales = tf.zeros_like(y), tf.fill(y.shape, log_scale)
  with tf.GradientTape() as tape:
    tape.watch([y, mean, log_scales])
    bits = normal.bits(y, mean, log_scales)
    total = tf.reduce_sum(bits)
  by_y, by_mean, by_scale = tape.gradient(total, [y, mean, log_scales])
  for values in (bits, by_y, by_mean, by_scale):
    assert np.all(np.isfinite(values))
  assert np.all(bits >= 0)
  far = np.abs(y) > 1
  assert np.all((np.sign(by_y) == np.sign(y))[far])  # Towards the mean: fewer bits.
  np.testing.assert_allclose(by_mean, -by_y, rtol=1e-5, atol=1e-6)


def test_a_scale_beyond_the_bounds_is_led_back_and_never_further_away(normal):
  """The gradient with respect to the log scale, where a step down its slope leads."""

  def gradient(y, log_scale):
    value = tf.fill([1, 1, 1, 1], log_scale)
    with tf.GradientTape() as tape:
      tape.watch(value)
      bits = normal.bits(tf.fill([1, 1, 1, 1], y), tf.zeros([1, 1, 1, 1]), value)
    return float(tape.gradient(bits, value)[0, 0, 0, 0])

  assert gradient(2.0, -4.0) < 0  # Too small a scale for this value: up.
  assert gradient(0.0, -4.0) == 0  # An even smaller one would be better: stays.
  assert gradient(1.0, 8.0) > 0  # Too large: down.
  assert gradient(2000.0, 8.0) == 0
  assert gradient(0.4, 0.0) > 0 > gradient(3.0, 0.0)


def _damaged_tables():
  whole = entropy.gaussian_tables().arrays()
  cdf, first = whole["cdf"], whole["first"]
  second = int(np.flatnonzero(cdf == 2**16)[0]) + 1

  def changed(position, value):
    copy = cdf.copy()
    copy[position] = value
    return copy

  return {
    "truncated": (cdf[:-1], first),
    "truncated in a row": (cdf[: second + 2], first),
    "nothing": (cdf[:0], first[:0]),
    "more rows than firsts": (cdf, first[:-1]),
    "more firsts than rows": (cdf, np.append(first, 0)),
    "wrong first entry": (changed(0, 12), first),
    "wrong entry of the second row": (changed(second, 15), first),
    "does not begin with zero": (changed(second + 1, 1), first),
    "negative": (changed(second + 2, -5), first),
    "equal counts": (changed(second + 3, cdf[second + 2]), first),
    "falling counts": (changed(second + 3, cdf[second + 2] - 1), first),
    "beyond the total": (changed(second + 3, 2**17), first),
    "a row of one symbol": (np.array([16, 0, 2**16]), np.array([0])),
    "an empty row": (np.array([16, 2**16]), np.array([0])),
    "a row without precision": (np.array([2**16]), np.array([0])),
    "first too far out": (cdf, np.where(first == first[3], -(2**31), first)),
  }


@pytest.mark.parametrize("damage", _damaged_tables())
def test_damaged_tables_are_refused(damage):
  cdf, first = _damaged_tables()[damage]
  with pytest.raises(ValueError, match=r"tables"):
    entropy.CodingTables.from_arrays({"cdf": cdf, "first": first})


def test_tables_come_back_from_their_arrays_and_share_nothing_with_them():
  """The normal tables are made once for all: who changes exported arrays must not change them."""
  tables = entropy.gaussian_tables()
  arrays = tables.arrays()
  again = entropy.CodingTables.from_arrays(arrays)
  for name in ("cdf", "first", "escape", "best_bits", "num_sure"):
    np.testing.assert_array_equal(getattr(again, name), getattr(tables, name))
  before = tables.cdf.tobytes()
  arrays["cdf"][3] += 1
  arrays["first"][0] += 1
  assert tables.cdf.tobytes() == again.cdf.tobytes() == before
  np.testing.assert_array_equal(again.first, tables.first)
  assert again.first[0] != arrays["first"][0]


def test_tables_of_another_number_of_rows_are_refused(prior, normal):
  with pytest.raises(ValueError, match="5 rows; a Gaussian conditional has 64"):
    entropy.GaussianConditional().use(prior.tables.arrays())
  with pytest.raises(ValueError, match="prior of 5 channels"):
    prior.use({**normal.tables.arrays(), "offset": np.zeros(5, np.float32)})
  with pytest.raises(ValueError, match="prior of 5 channels"):
    prior.use({**prior.derive(), "offset": np.zeros(4, np.float32)})


@pytest.mark.parametrize("offset", [np.nan, np.inf, 0.1, 0.75, -3.0])
def test_offsets_off_the_fixed_point_grid_are_refused(prior, offset):
  """Integer transforms take them as exact multiples of 2^-OFFSET_BITS."""
  derived = prior.derive()
  before = prior.offset.numpy()
  wrong = derived["offset"].copy()
  wrong[2] = offset
  with pytest.raises(ValueError, match="offset"):
    prior.use({**derived, "offset": wrong})
  np.testing.assert_array_equal(prior.offset, before)


def test_derived_offsets_are_exact_in_fixed_point(prior):
  scaled = prior.derive()["offset"].astype(np.float64) * 2**entropy.OFFSET_BITS
  np.testing.assert_array_equal(scaled, np.round(scaled))
  assert np.any(scaled) and np.abs(scaled).max() <= 2**entropy.OFFSET_BITS / 2
