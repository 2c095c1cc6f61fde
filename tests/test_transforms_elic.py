import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf

from common import layers, precision
from common.layers import Sequential
from common.transforms_elic import (
  Attention,
  ElicAnalysis,
  ElicSynthesis,
  ResidualBottleneck,
  residual_blocks,
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


def _conv(conv, x):
  return tf.nn.conv2d(x, conv.kernel, conv.stride, "SAME") + conv.bias


def _plain_residual(block, x):
  reduce, middle, expand = block.branch.layers
  y = tf.nn.relu(_conv(reduce, x))
  y = tf.nn.relu(_conv(middle, y))
  return x + _conv(expand, y)


def _plain_attention(block, x):
  trunk = mask = x
  for residual in block.trunk.layers:
    trunk = _plain_residual(residual, trunk)
  *residuals, last = block.mask.layers
  for residual in residuals:
    mask = _plain_residual(residual, mask)
  return x + trunk * tf.sigmoid(_conv(last, mask))


def _plain(layer, x):
  """The formulas of He et al. 2022 and Cheng et al. 2020 in TensorFlow's own operations."""
  if isinstance(layer, ResidualBottleneck):
    return _plain_residual(layer, x)
  if isinstance(layer, Attention):
    return _plain_attention(layer, x)
  if layer.upsample == 1:
    return _conv(layer, x)
  size = [x.shape[0], x.shape[1] * 2, x.shape[2] * 2, layer.out_channels]
  kernel = tf.transpose(layer.kernel, [0, 1, 3, 2])
  return tf.nn.conv2d_transpose(x, kernel, size, 2, "SAME") + layer.bias


def _run(function, x, variables):
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = function(x)
    loss = tf.reduce_sum(tf.sin(y))
  return [y, *tape.gradient(loss, [x, *variables])]


def _assert_equal(layer, plain, x, tolerance=3e-5):
  """Also compiled, since graph optimisers change what runs."""
  variables = layer.trainable_variables
  expected = _run(plain, x, variables)
  for run in (_run, tf.function(_run)):
    for a, b in zip(run(layer, x, variables), expected):
      np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * max(1, np.abs(b).max()))


@pytest.mark.parametrize("make", [ResidualBottleneck, Attention])
def test_blocks_equal_their_formulas(make):
  block = _randomize(make(8))
  x = tf.constant(np.random.default_rng(1).standard_normal([2, 5, 7, 8]), tf.float32)
  _assert_equal(block, lambda x: _plain(block, x), x)
  assert block.output_size(5, 7) == (5, 7)


@pytest.mark.slow
@pytest.mark.parametrize("make,shape", [(ElicAnalysis, (32, 16, 3)), (ElicSynthesis, (2, 3, 10))])
def test_transforms_equal_their_formulas(make, shape):
  transform = _randomize(make((4, 6, 8, 10), num_residual_blocks=2))

  def plain(x):
    for layer in transform.layers:
      x = _plain(layer, x)
    return x

  x = tf.constant(np.random.default_rng(1).standard_normal([2, *shape]), tf.float32)
  # Gradients of biases are sums that cancel: the plain one is 4e-4 from that in float64.
  _assert_equal(transform, plain, x, tolerance=1e-3)


def test_blocks_that_are_alike_are_traced_once(monkeypatch):
  """To trace them all takes a third of a second of a training's start."""
  traced = []
  run = layers.Conv2D.run

  def seen(self, x, *weights):
    if self.kernel_size == 3:  # One in each block.
      traced.append(x.shape)
    return run(self, x, *weights)

  monkeypatch.setattr(layers.Conv2D, "run", seen)
  blocks = _randomize(Sequential([*residual_blocks(8, 3, "a"), Attention(8)]))
  x = tf.constant(np.random.default_rng(1).standard_normal([1, 8, 8, 8]), tf.float32)
  plain = tf.function(lambda x: _run(blocks, x, blocks.trainable_variables))(x)
  assert len(traced) == 9

  def in_graph(x):
    traced.clear()

    @tf.function
    def shared(x):
      with layers.tracing_once():
        return _run(blocks, x, blocks.trainable_variables)

    return shared(x)

  for a, b in zip(in_graph(x), plain):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * max(1, np.abs(b).max()))
  assert len(traced) == 1
  in_graph(x)
  assert len(traced) == 1  # For each graph: others may check numbers, or have another precision.

  # Not where it was not measured.
  with precision.computing_in("mixed_bfloat16"):
    in_graph(x)
  assert len(traced) == 3 + 1  # The last layer of a transform is in 32 bits.
  with tf.distribute.MirroredStrategy(["CPU:0"]).scope():
    in_graph(x)
  assert len(traced) == 9
  monkeypatch.setattr(layers, "_on_cpu", lambda: False)
  in_graph(x)
  assert len(traced) == 9


def test_where_the_blocks_are():
  def letters(transform):
    return "".join(type(layer).__name__[0] for layer in transform.layers)

  assert letters(ElicAnalysis((4, 6, 8, 10))) == "CRRRCRRRACRRRCA"
  assert letters(ElicSynthesis((4, 6, 8, 10))) == "ACRRRCARRRCRRRC"


def test_variables_of_blocks_have_names_of_their_own():
  names = {v.name for v in ElicAnalysis((4, 6, 8, 10)).trainable_variables}
  assert {"stage0_res1/middle/kernel:0", "attention3/mask_res2/expand/bias:0"} <= names
