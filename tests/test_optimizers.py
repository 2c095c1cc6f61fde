"""Adam: Keras' own where nothing else is asked for, and a learning rate for each variable."""

import numpy as np
import pytest
import tensorflow as tf

from common import optimizers


def _variables():
  random = np.random.default_rng(0)
  return [
    tf.Variable(random.normal(0, 0.02, [3, 3, 8, 8]), dtype=tf.float32),
    tf.Variable(random.normal(0, 0.004, [3, 3, 8, 8]), dtype=tf.float32),
    tf.Variable(random.normal(0, 0.001, [8]), dtype=tf.float32),
  ]


def _steps(optimizer, variables, number=7):
  random = np.random.default_rng(1)
  for step in range(number):
    optimizer.learning_rate.assign(1e-3 * (1 + step))
    gradients = [tf.constant(random.normal(0, 1, v.shape), tf.float32) for v in variables]
    optimizer.apply_gradients(zip(gradients, variables))
  return [v.numpy() for v in variables]


@pytest.mark.parametrize("size", [1e-4, 1.0, 30.0, np.inf, np.nan])
@pytest.mark.parametrize("compiled", [False, True])
def test_clipping_is_that_of_tensorflow(compiled, size):
  random = np.random.default_rng(2)
  gradients = [tf.constant(random.normal(0, 0.1, s), tf.float32) for s in ([3, 3, 2], [5], [])]
  gradients = [gradients[0] * size, None, *gradients[1:]]
  expected, expected_norm = tf.clip_by_global_norm(gradients, 0.7)
  run = optimizers.clip_by_global_norm
  got, norm = (tf.function(run) if compiled else run)(gradients, 0.7)
  np.testing.assert_array_equal(norm, expected_norm)
  assert got[1] is None
  for one, other in zip(got, expected):
    if one is not None:
      np.testing.assert_array_equal(one, other)


def test_it_is_keras_adam():
  plain = tf.keras.optimizers.Adam(jit_compile=False)
  variables = _variables()
  plain.build(variables)
  expected = _steps(plain, variables)
  variables = _variables()
  for got, wanted in zip(_steps(optimizers.Adam(variables), variables), expected):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=5e-7)
  variables = _variables()
  ones = optimizers.Adam(variables, tf.Variable(tf.ones([4])), first=1)
  for got, wanted in zip(_steps(ones, variables), expected):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=5e-7)


def test_a_factor_scales_the_steps_of_its_variable_alone():
  starts = [v.numpy() for v in _variables()]
  variables = _variables()
  expected = _steps(optimizers.Adam(variables), variables)
  variables = _variables()
  factors = tf.Variable([9.0, 1.0, 0.25, 1.0])
  got = _steps(optimizers.Adam(variables, factors, first=1), variables)
  for start, one, other, factor in zip(starts, expected, got, factors.numpy()[1:]):
    np.testing.assert_allclose(other - start, factor * (one - start), rtol=1e-3, atol=1e-7)


def test_small_kernels_get_small_factors_and_nothing_else_does():
  variables = [
    *_variables(),
    tf.Variable(tf.zeros([3, 3, 2, 2])),
    tf.Variable(tf.ones([1, 1, 2, 2])),
  ]
  factors = optimizers.factors_by_size(variables)
  np.testing.assert_allclose(factors, [1.0, 0.2, 1.0, 1.0, 1.0], atol=0.02)


def test_checkpoints_are_keras_own():
  def names(optimizer):
    path = tf.train.Checkpoint(optimizer=optimizer).write(f"{folder}/x")
    return {name: shape for name, shape in tf.train.list_variables(path)}

  import tempfile

  with tempfile.TemporaryDirectory() as folder:
    variables = _variables()
    plain = tf.keras.optimizers.Adam(jit_compile=False)
    plain.build(variables)
    assert names(optimizers.Adam(variables, tf.Variable(tf.ones([3])))) == names(plain)
