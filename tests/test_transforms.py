import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc

from common.layers import GDN, Conv2D
from common.transforms import (
  BLS2017Analysis,
  BLS2017Synthesis,
  Sequential,
  known_transforms,
  make_transform,
  register,
)


def _plain_bls2017(num_filters):
  """The published transforms, of tensorflow_compression's layers."""

  def conv(filters, kernel_size, use_bias=True, **kwargs):
    return tfc.SignalConv2D(
      filters,
      kernel_size,
      padding="same_zeros",
      use_bias=use_bias,
      kernel_parameter="variable",
      **kwargs,
    )

  n = num_filters
  analysis = [
    conv(n, 9, corr=True, strides_down=4),
    tfc.GDN(),
    conv(n, 5, corr=True, strides_down=2),
    tfc.GDN(),
    conv(n, 5, corr=True, strides_down=2, use_bias=False),
  ]
  synthesis = [
    conv(n, 5, corr=False, strides_up=2),
    tfc.GDN(inverse=True),
    conv(n, 5, corr=False, strides_up=2),
    tfc.GDN(inverse=True),
    conv(3, 9, corr=False, strides_up=4),
  ]
  return analysis, synthesis


def _variables(layers):
  """The variables of our layers or of tensorflow_compression's, in the same order."""
  variables = []
  for layer in layers:
    variables += sorted(layer.trainable_variables, key=lambda v: (v.shape.rank, tuple(v.shape)))
  return variables


@pytest.mark.parametrize("num_filters", [8, pytest.param(256, marks=pytest.mark.slow)])
def test_bls2017_equals_that_of_tensorflow_compression(num_filters):
  rng = np.random.default_rng(0)
  analysis, synthesis = BLS2017Analysis(num_filters), BLS2017Synthesis(num_filters)
  plain_analysis, plain_synthesis = _plain_bls2017(num_filters)
  size = (64, 96)
  x = tf.constant(rng.uniform(-0.5, 0.5, [2, *size, 3]), tf.float32)
  y_plain = tf.keras.Sequential(plain_analysis)(x)
  tf.keras.Sequential(plain_synthesis)(y_plain)
  ours = _variables(analysis.layers + synthesis.layers)
  plain = _variables(plain_analysis + plain_synthesis)
  for a, b in zip(ours, plain):
    a.assign(a + 0.03 * tf.constant(rng.standard_normal(a.shape), tf.float32))
    b.assign(a)

  def run(first, second, variables):
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = x
      for layer in first:
        y = layer(y)
      x_hat = y
      for layer in second:
        x_hat = layer(x_hat)
      loss = tf.reduce_mean(tf.math.squared_difference(x, x_hat)) + tf.reduce_mean(y**2)
    return [y, x_hat, *tape.gradient(loss, [x, *variables])]

  results = run(analysis.layers, synthesis.layers, ours)
  expected = run(plain_analysis, plain_synthesis, plain)
  assert len(results) == 2 + 1 + 9 + 10
  for a, b in zip(results, expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())


def test_bls2017_shapes_and_factors():
  analysis = make_transform("BLS2017Analysis", num_filters=4, output_channels=6)
  synthesis = make_transform("BLS2017Synthesis", num_filters=4, in_channels=6)
  assert (analysis.downsample_factor, analysis.upsample_factor) == (16, 1)
  assert (synthesis.downsample_factor, synthesis.upsample_factor) == (1, 16)
  assert (analysis.in_channels, analysis.out_channels) == (3, 6)
  assert (synthesis.in_channels, synthesis.out_channels) == (6, 3)
  y = analysis(tf.zeros([2, 32, 48, 3]))
  assert y.shape == (2, 2, 3, 6) and analysis.output_size(32, 48) == (2, 3)
  assert synthesis(y).shape == (2, 32, 48, 3) and synthesis.output_size(2, 3) == (32, 48)
  assert not analysis.layers[-1].use_bias
  assert all(layer.use_bias for layer in synthesis.layers[::2])


def test_unknown_shapes_give_the_same():
  analysis, synthesis = BLS2017Analysis(4), BLS2017Synthesis(4)

  @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
  def traced(x):
    return synthesis(analysis(x))

  for size in [(16, 32), (48, 16)]:
    x = tf.constant(np.random.default_rng(0).uniform(-0.5, 0.5, [1, *size, 3]), tf.float32)
    np.testing.assert_allclose(traced(x), synthesis(analysis(x)), atol=1e-5)


def test_initial_values_reach_the_layers():
  kernel = np.ones([5, 5, 4, 4], np.float32)
  analysis = BLS2017Analysis(
    4, kernel_initializers=[None, kernel, np.zeros], gdn_beta_init=2.0, gdn_gamma_init=0.5
  )
  convs = analysis.layers[::2]
  assert convs[0].kernel.numpy().std() > 0
  np.testing.assert_array_equal(convs[1].kernel, kernel)
  np.testing.assert_array_equal(convs[2].kernel, np.zeros([5, 5, 4, 4]))
  np.testing.assert_allclose(analysis.layers[1].beta, np.full(4, 2.0), rtol=1e-6)
  np.testing.assert_allclose(analysis.layers[3].gamma, 0.5 * np.eye(4), atol=1e-6)
  with pytest.raises(ValueError, match="3 convolutions"):
    BLS2017Synthesis(4, kernel_initializers=[None])


def test_variables_are_checkpointed_by_layer():
  names = [v.name for v in BLS2017Analysis(4).trainable_variables]
  assert len(names) == len(set(names)) == 9
  restored = BLS2017Analysis(4)
  original = BLS2017Analysis(4)
  x = tf.random.uniform([1, 32, 32, 3])
  for a, b in zip(restored.variables, original.variables):
    assert a.name == b.name and a.shape == b.shape
    a.assign(b)
  np.testing.assert_array_equal(restored(x), original(x))


def test_unknown_transform_lists_the_known():
  with pytest.raises(
    ValueError,
    match=r"BLS2017Analysi'.*Did you mean 'BLS2017Analysis'.*Known: .*"
    r"BLS2017Analysis, BLS2017Synthesis",
  ):
    make_transform("BLS2017Analysi")


def test_unknown_argument_lists_the_known():
  with pytest.raises(TypeError, match=r"'num_filter'. Did you mean 'num_filters'.*gdn_beta_init"):
    make_transform("BLS2017Analysis", num_filter=3)


def test_register():
  before = known_transforms()
  assert before == sorted(before) and "BLS2017Synthesis" in before
  with pytest.raises(ValueError, match="registered already"):
    register(BLS2017Analysis)


def test_layers_that_do_not_fit_are_refused():
  with pytest.raises(ValueError, match=r"Conv2D gives 4 channels; GDN after it takes 5"):
    Sequential([Conv2D(3, 4, 3), GDN(5)])
