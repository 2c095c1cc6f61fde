import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

from common.layers import GDN
from common.transforms_shallow import (
  JPEGLikeHyperSynthesis,
  JPEGLikeSynthesis,
  TwoLayerResSynthesis,
  TwoLayerSynthesis,
)


@pytest.fixture(autouse=True)
def _seed():
  tf.random.set_seed(0)


def _randomize(module):
  """Gives all variables noise, so that biases count."""
  rng = np.random.default_rng(0)
  for v in module.trainable_variables:
    v.assign_add(0.1 * rng.standard_normal(v.shape).astype(np.float32))
  return module


def _noise(*shape):
  return tf.constant(np.random.default_rng(1).standard_normal(shape), tf.float32)


def _transposed(x, kernel, bias, stride):
  """tf.nn.conv2d_transpose with SAME padding; kernel [k,k,in,out]."""
  size = [x.shape[0], x.shape[1] * stride, x.shape[2] * stride, kernel.shape[3]]
  kernel = tf.transpose(kernel, [0, 1, 3, 2])
  return tf.nn.conv2d_transpose(x, kernel, size, stride, "SAME") + bias


def _igdn(layer, x):
  return x * (tf.tensordot(tf.abs(x), layer.gamma, 1) + layer.beta)


def _run(function, x, variables):
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = function(x)
    loss = tf.reduce_sum(tf.sin(y))
  return [y, *tape.gradient(loss, [x, *variables])]


def _assert_equal(layer, plain, x):
  variables = layer.trainable_variables
  expected = _run(plain, x, variables)
  for run in (_run, tf.function(_run)):
    for a, b in zip(run(layer, x, variables), expected):
      np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1, np.abs(b).max()))


# With many channels, a transposed convolution to an image takes another path.
@pytest.mark.parametrize("in_channels", [5, 64])
@pytest.mark.parametrize("kernel_size,strides", [(16, 16), (18, 16), (8, 8), (11, 8)])
def test_jpeg_like(in_channels, kernel_size, strides):
  transform = _randomize(JPEGLikeSynthesis(in_channels, kernel_size=kernel_size, strides=strides))
  conv = transform.layers[0]
  _assert_equal(
    transform,
    lambda y: _transposed(y, conv.kernel, conv.bias, strides),
    _noise(2, 3, 2, in_channels),
  )


@pytest.mark.parametrize("kernel_size", [16, 18])
def test_offset_is_a_latent_that_is_one(kernel_size):
  transform = _randomize(JPEGLikeSynthesis(4, kernel_size=kernel_size, use_offset=True))
  conv = transform.layers[-1]

  def plain(y):
    y = tf.concat([y, tf.ones([*y.shape[:3], 1])], axis=-1)
    return _transposed(y, conv.kernel, conv.bias, 16)

  _assert_equal(transform, plain, _noise(2, 3, 2, 4))
  if kernel_size == 16:
    blank = transform(tf.zeros([1, 2, 1, 4]))
    np.testing.assert_allclose(blank[0, :16], conv.kernel[:, :, 4] + conv.bias, atol=1e-6)
    np.testing.assert_allclose(blank[0, 16:], blank[0, :16], atol=1e-6)


def test_jpeg_like_hyper_synthesis():
  transform = _randomize(JPEGLikeHyperSynthesis(6, in_channels=5))
  conv = transform.layers[0]
  assert conv.kernel.shape == (6, 6, 5, 12)
  _assert_equal(transform, lambda z: _transposed(z, conv.kernel, conv.bias, 4), _noise(2, 3, 2, 5))


@pytest.mark.parametrize("in_channels", [5, 64])
@pytest.mark.parametrize("activation", ["igdn", "relu"])
def test_two_layers(in_channels, activation):
  transform = _randomize(TwoLayerSynthesis(activation_type=activation, in_channels=in_channels))
  first, middle, second = transform.layers

  def plain(y):
    y = _transposed(y, first.kernel, first.bias, 8)
    y = _igdn(middle, y) if isinstance(middle, GDN) else tf.nn.relu(y)
    return _transposed(y, second.kernel, second.bias, 2)

  _assert_equal(transform, plain, _noise(2, 3, 2, in_channels))


@pytest.mark.parametrize("in_channels", [5, 64])
def test_two_layers_with_a_parallel_convolution(in_channels):
  transform = _randomize(TwoLayerResSynthesis(channels=(6, 3), in_channels=in_channels))
  first, second = transform.layers
  kernels = tf.split(first.convolution.kernel, 2, axis=-1)
  biases = tf.split(first.convolution.bias, 2)

  def plain(y):
    kernels = tf.split(first.convolution.kernel, 2, axis=-1)
    biases = tf.split(first.convolution.bias, 2)
    activated = _igdn(first.activation, _transposed(y, kernels[0], biases[0], 8))
    return _transposed(
      activated + _transposed(y, kernels[1], biases[1], 8), second.kernel, second.bias, 2
    )

  assert kernels[0].shape == (13, 13, in_channels, 6) and biases[1].shape == 6
  _assert_equal(transform, plain, _noise(2, 3, 2, in_channels))


def test_two_layers_with_a_parallel_depth_to_space():
  transform = _randomize(
    TwoLayerResSynthesis(channels=(6, 3), activation_type="relu", res_type="d2s", in_channels=5)
  )
  first, second = transform.layers
  linear = first.linear.layers[0]

  def plain(y):
    activated = tf.nn.relu(_transposed(y, first.convolution.kernel, first.convolution.bias, 8))
    spread = tf.nn.depth_to_space(tf.nn.conv2d(y, linear.kernel, 1, "VALID") + linear.bias, 8)
    return _transposed(activated + spread, second.kernel, second.bias, 2)

  _assert_equal(transform, plain, _noise(2, 3, 2, 5))


def test_the_parallel_branch_is_linear():
  transform = TwoLayerResSynthesis(activation_type=tf.zeros_like, in_channels=5)
  y, y2 = _noise(1, 2, 2, 5), tf.reverse(_noise(1, 2, 2, 5), [3])
  np.testing.assert_allclose(transform(y + 2 * y2), transform(y) + 2 * transform(y2), atol=1e-4)
