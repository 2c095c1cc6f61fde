import functools
import itertools
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc

from common.layers import GDN, Conv2D, Conv2DTranspose
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


@pytest.mark.slow
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


def _plain_mbt2018(channels_base, output_channels):
  """The published transforms, of tensorflow_compression's layers."""
  conv = functools.partial(
    tfc.SignalConv2D, padding="same_zeros", use_bias=True, kernel_parameter="variable"
  )
  down = [conv(channels_base, 5, corr=True, strides_down=2) for _ in range(3)]
  down.append(conv(output_channels, 5, corr=True, strides_down=2))
  up = [conv(channels_base, 5, corr=False, strides_up=2) for _ in range(3)]
  up.append(conv(3, 5, corr=False, strides_up=2))
  analysis = [*itertools.chain(*((layer, tfc.GDN()) for layer in down))][:-1]
  synthesis = [*itertools.chain(*((layer, tfc.GDN(inverse=True)) for layer in up))][:-1]
  return analysis, synthesis


@pytest.mark.slow
def test_mbt2018_equals_that_of_tensorflow_compression():
  rng = np.random.default_rng(0)
  analysis = make_transform("MBT2018Analysis", channels_base=6, output_channels=5)
  synthesis = make_transform("MBT2018Synthesis", channels_base=6, in_channels=5)
  plain_analysis, plain_synthesis = _plain_mbt2018(6, 5)
  x = tf.constant(rng.uniform(-0.5, 0.5, [2, 32, 48, 3]), tf.float32)
  tf.keras.Sequential(plain_synthesis)(tf.keras.Sequential(plain_analysis)(x))
  for a, b in zip(
    _variables(analysis.layers + synthesis.layers), _variables(plain_analysis + plain_synthesis)
  ):
    a.assign(a + 0.03 * tf.constant(rng.standard_normal(a.shape), tf.float32))
    b.assign(a)
  y, y_plain = analysis(x), tf.keras.Sequential(plain_analysis)(x)
  np.testing.assert_allclose(y, y_plain, rtol=0, atol=1e-5)
  x_hat, x_hat_plain = synthesis(y), tf.keras.Sequential(plain_synthesis)(y_plain)
  np.testing.assert_allclose(x_hat, x_hat_plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu", None])
def test_cnn_equals_keras_layers(activation):
  analysis = make_transform(
    "CNNAnalysis", channels_base=6, output_channels=5, activation_type=activation
  )
  synthesis = make_transform(
    "CNNSynthesis", channels_base=6, in_channels=5, activation_type=activation
  )
  function = getattr(tf.nn, activation) if activation else None
  _assert_equals_keras(analysis, (32, 48, 3), function)
  _assert_equals_keras(synthesis, (2, 3, 5), function)


def test_hyper_transforms_equal_keras_layers():
  _assert_equals_keras(make_transform("HyperAnalysis", bottleneck_size=6), (8, 12, 6), tf.nn.relu)
  synthesis = make_transform("HyperSynthesis", bottleneck_size=6, in_channels=4)
  assert [layer.out_channels for layer in synthesis.layers] == [4, 6, 12]
  _assert_equals_keras(synthesis, (2, 3, 4), tf.nn.relu)


def _assert_equals_keras(transform, shape, activation):
  """Compares with Keras's layers of the same weights, padding SAME, outputs and gradients."""
  convs = [c for c in transform.layers if isinstance(c, (Conv2D, Conv2DTranspose))]
  for i, conv in enumerate(convs):
    conv.kernel.assign(0.1 * np.random.default_rng(i).standard_normal(conv.kernel.shape))
  x = tf.constant(np.random.default_rng(0).standard_normal([2, *shape]), tf.float32)
  plain = tf.keras.Sequential()
  for i, conv in enumerate(convs):
    conv.bias.assign(np.random.default_rng(i).standard_normal(conv.bias.shape))
    up = isinstance(conv, Conv2DTranspose)
    plain.add(
      (tf.keras.layers.Conv2DTranspose if up else tf.keras.layers.Conv2D)(
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        padding="same",
        activation=activation if conv is not convs[-1] else None,
      )
    )
  plain.build(x.shape)
  for conv, layer in zip(convs, plain.layers):
    kernel = conv.kernel.numpy()
    if isinstance(conv, Conv2DTranspose):
      kernel = kernel.swapaxes(2, 3)
    layer.set_weights([kernel, conv.bias.numpy()])
  outputs = []
  for function in (transform, plain):
    with tf.GradientTape() as tape:
      tape.watch(x)
      y = function(x)
      loss = tf.reduce_sum(tf.sin(y))
    outputs.append([y, *tape.gradient(loss, [x, *(v for v in _biases(function))])])
  for a, b in zip(*outputs):
    np.testing.assert_allclose(a, b, rtol=0, atol=2e-5 * max(1, np.abs(b).max()))


def _biases(function):
  return [v for v in function.trainable_variables if v.shape.rank == 1]


def test_small_hyper_transforms():
  analysis = make_transform("HyperAnalysisSmall", bottleneck_size=6, in_channels=4)
  synthesis = make_transform("HyperSynthesisSmall", bottleneck_size=6)
  assert [layer.use_bias for layer in analysis.layers] == [True, False]
  assert [layer.out_channels for layer in synthesis.layers] == [9, 12]
  y = tf.random.normal([1, 2, 2, 4])  # of an image of 32x32
  z = analysis(y)
  assert z.shape == (1, 1, 1, 6) and synthesis(z).shape == (1, 2, 2, 12)


# Name, arguments, in and out channels, downsampling or upsampling.
_ALL = [
  ("BLS2017Analysis", dict(num_filters=4), 3, 4, 16),
  ("BLS2017Synthesis", dict(num_filters=4), 4, 3, 1 / 16),
  ("MBT2018Analysis", dict(channels_base=4), 3, 4, 16),
  ("MBT2018Analysis", dict(channels_base=4, n_layers=3, output_channels=6), 3, 6, 8),
  ("MBT2018Synthesis", dict(channels_base=4), 4, 3, 1 / 16),
  ("MBT2018Synthesis", dict(channels_base=4, n_layers=5, in_channels=6), 6, 3, 1 / 32),
  ("CNNAnalysis", dict(channels_base=4), 3, 4, 16),
  ("CNNAnalysis", dict(channels_base=4, activation_type="gdn"), 3, 4, 16),
  ("CNNSynthesis", dict(channels_base=4, activation_type="igdn"), 4, 3, 1 / 16),
  ("ElicAnalysis", dict(channels=(4, 6, 8, 10)), 3, 10, 16),
  ("ElicSynthesis", dict(channels=(4, 6, 8, 10)), 10, 3, 1 / 16),
  ("HyperAnalysis", dict(bottleneck_size=4, in_channels=6), 6, 4, 4),
  ("HyperSynthesis", dict(bottleneck_size=6, in_channels=4), 4, 12, 1 / 4),
  ("HyperAnalysisSmall", dict(bottleneck_size=4), 4, 4, 2),
  ("HyperSynthesisSmall", dict(bottleneck_size=4), 4, 8, 1 / 2),
  ("JPEGLikeSynthesis", dict(in_channels=5), 5, 3, 1 / 16),
  ("JPEGLikeSynthesis", dict(in_channels=5, kernel_size=18, use_offset=True), 5, 3, 1 / 16),
  ("JPEGLikeHyperSynthesis", dict(bottleneck_size=4, in_channels=5), 5, 8, 1 / 4),
  ("TwoLayerSynthesis", dict(in_channels=5), 5, 3, 1 / 16),
  ("TwoLayerSynthesis", dict(in_channels=5, strides=(4, 4), kernel_sizes=(9, 9)), 5, 3, 1 / 16),
  ("TwoLayerResSynthesis", dict(in_channels=5), 5, 3, 1 / 16),
  ("TwoLayerResSynthesis", dict(in_channels=5, res_type="d2s"), 5, 3, 1 / 16),
]


def test_all_transforms_are_tested():
  assert {name for name, *_ in _ALL} == set(known_transforms())


@pytest.mark.slow
@pytest.mark.parametrize("name,arguments,in_channels,out_channels,factor", _ALL)
def test_what_a_transform_states_is_what_it_does(
  name, arguments, in_channels, out_channels, factor
):
  transform = make_transform(name, **arguments)
  assert (transform.in_channels, transform.out_channels) == (in_channels, out_channels)
  assert transform.downsample_factor / transform.upsample_factor == factor
  names = [v.name for v in transform.trainable_variables]
  assert len(names) == len(set(names))
  assert transform.num_parameters() > 0 and transform.flops(64, 64) > 0

  @tf.function(input_signature=[tf.TensorSpec([None, None, None, in_channels])])
  def traced(x):
    return transform(x)

  sizes = [(64, 32), (32, 64)] if factor > 1 else [(2, 3), (1, 1)]
  for size in sizes:
    x = tf.constant(np.random.default_rng(0).uniform(-1, 1, [2, *size, in_channels]), tf.float32)
    expected = transform(x)
    height, width = (int(s / factor) for s in size)
    assert expected.shape == (2, height, width, out_channels)
    assert transform.output_size(*size) == (height, width)
    y = traced(x)
    np.testing.assert_allclose(y, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_errors_name_the_known():
  with pytest.raises(ValueError, match=r"'gdn1'. Known: gdn, igdn, leaky_relu, relu"):
    make_transform("CNNAnalysis", activation_type="gdn1")
  with pytest.raises(ValueError, match=r"'none'. Known: conv, d2s"):
    make_transform("TwoLayerResSynthesis", res_type="none")
  with pytest.raises(ValueError, match="two layers need two numbers"):
    make_transform("TwoLayerSynthesis", channels=(3,))
  with pytest.raises(ValueError, match="4 stages"):
    make_transform("ElicAnalysis", channels=(192, 192, 320))
  with pytest.raises(ValueError, match="even channels"):
    make_transform("ElicSynthesis", channels=(192, 192, 191, 320))
  with pytest.raises(ValueError, match="at least 1"):
    make_transform("MBT2018Analysis", n_layers=0)
  with pytest.raises(TypeError, match=r"'stride'. Did you mean 'strides'"):
    make_transform("JPEGLikeSynthesis", stride=8)


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
