"""Priors and range coding: exact round trips, real bits against likelihoods, hostile sizes."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc
from hypothesis import given, settings
from hypothesis import strategies as st

from common import entropy
from common.bitstream import BitstreamError


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
