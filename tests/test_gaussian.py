"""The Gaussian conditional's likelihood and gradients against tensorflow_compression's."""

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc

from common import entropy

_MIN, _MAX = np.log(0.11), np.log(256.0)


def _ours(x, log_scale):
  # One image each, so that no sum over symbols hides an error.
  shape = [-1, 1, 1, 1]
  bits = entropy.GaussianConditional().bits(
    tf.reshape(x, shape) + 3.0, tf.constant(3.0), tf.reshape(log_scale, shape)
  )
  return bits * -np.log(2.0)


def _theirs(x, log_scale):
  zero = tf.zeros([], x.dtype)
  return tfc.NoisyNormal(loc=zero, scale=tf.exp(log_scale)).log_prob(x)


def _run(density, x, log_scale, dtype=tf.float32):
  """Log density and its gradients, in float64."""
  x, log_scale = tf.constant(x, dtype), tf.constant(log_scale, dtype)
  with tf.GradientTape() as tape:
    tape.watch([x, log_scale])
    y = density(x, log_scale)
  return [np.asarray(v, np.float64) for v in (y, *tape.gradient(y, [x, log_scale]))]


def _errors(actual, exact):
  """Largest error of each output, relative to 1 + its absolute value."""
  return np.array([np.max(np.abs(a - e) / (1 + np.abs(e))) for a, e in zip(actual, exact)])


@pytest.mark.slow
@pytest.mark.parametrize("deviations", [0.3, 1.0, 5.0, 30.0, 300.0])
@pytest.mark.parametrize("low,high", [(_MIN, -2.1), (-2.1, 0.0), (0.0, 2.0), (2.0, _MAX)])
def test_as_exact_as_tensorflow_compression(low, high, deviations):
  """From the middle to far tails, all scales: float32 errors like theirs, against float64."""
  random = np.random.default_rng(0)
  log_scale = random.uniform(low + 1e-6, high - 1e-6, 20_000).astype(np.float32)
  x = (random.normal(0, deviations, 20_000) * np.exp(log_scale)).astype(np.float32)
  x = np.round(x * 1024) / 1024  # So that the mean's addition and subtraction are exact.
  exact = _run(_theirs, x, log_scale, tf.float64)
  theirs = _errors(_run(_theirs, x, log_scale), exact)
  assert np.all(_errors(_run(_ours, x, log_scale), exact) < 1.5 * theirs + 1e-6)


def test_special_places():
  """The mean, a bin's edges, where the series takes over, and hopeless distances."""
  scale = 0.25  # Its multiples of sqrt(50) / sqrt(2) lie near (x + 0.5) / scale = -10.
  x = np.array([0, 0.5, -0.5, 1.5, 2.0, 2.9999, 3, 3.0001, -3, 1e3, -1e5, 1e6], np.float32)
  log_scale = np.full(x.shape, np.log(scale), np.float32)
  ours, theirs = _run(_ours, x, log_scale), _run(_theirs, x, log_scale)
  for a, b in zip(ours, theirs):
    assert np.all(np.isfinite(a))
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  assert ours[1][0] == 0


def test_beyond_the_tables_scales_only_gradients_that_lead_back_pass():
  x = np.array([0, 0, 9, 900], np.float32)
  log_scale = np.array([_MIN - 1, _MAX + 1, _MIN - 1, _MAX + 1], np.float32)
  value, _, gradient = _run(lambda x, s: -_ours(x, s), x, log_scale)
  inside = -_run(_theirs, x, np.clip(log_scale, _MIN, _MAX))[0]
  np.testing.assert_allclose(value, inside, rtol=1e-5, atol=1e-6)
  # Descent makes the scale smaller at x = 0, larger in the tails.
  assert gradient[0] == 0 and gradient[1] > 0 and gradient[2] < 0 and gradient[3] == 0
