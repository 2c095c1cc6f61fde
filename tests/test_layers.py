import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_compression as tfc
from hypothesis import given, settings
from hypothesis import strategies as st

from common import layers as layers_lib
from common import precision
from common.layers import (
  GDN,
  Conv2D,
  Conv2DTranspose,
  Pointwise,
  Sequential,
  at_most,
  default_origin,
)


def _array(seed, *shape):
  return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _run(layer, x, variables):
  """The output, and the gradients with respect to x and variables of its product with noise."""
  with tf.GradientTape() as tape:
    tape.watch(x)
    y = layer(x)
    loss = tf.reduce_sum(y * _array(99, *y.shape))
  return [y, *tape.gradient(loss, [x, *variables])]


def _assert_close(actual, expected, tolerance=2e-5):
  assert len(actual) == len(expected)
  for a, b in zip(actual, expected):
    assert a.shape == b.shape
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (1e-3 + np.abs(b).max()))


def _make_pair(transposed, in_channels, out_channels, kernel_size, stride, use_bias):
  """Our layer and tensorflow_compression's, with the same random weights."""
  ours = (Conv2DTranspose if transposed else Conv2D)(
    in_channels, out_channels, kernel_size, stride, use_bias=use_bias
  )
  strides = {"strides_up": stride} if transposed else {"strides_down": stride}
  theirs = tfc.SignalConv2D(
    out_channels,
    kernel_size,
    corr=not transposed,
    padding="same_zeros",
    use_bias=use_bias,
    kernel_parameter="variable",
    **strides,
  )
  theirs.build([None, None, None, in_channels])
  ours.kernel.assign(_array(1, *ours.kernel.shape))
  theirs.kernel_parameter.assign(ours.kernel)
  our_variables, their_variables = [ours.kernel], [theirs.kernel_parameter]
  if use_bias:
    ours.bias.assign(_array(2, out_channels))
    theirs.bias_parameter.assign(ours.bias)
    our_variables.append(ours.bias)
    their_variables.append(theirs.bias_parameter)
  return ours, our_variables, theirs, their_variables


def _check_convolution(transposed, channels, kernel_size, stride, height, width, use_bias):
  ours, our_variables, theirs, their_variables = _make_pair(
    transposed, *channels, kernel_size, stride, use_bias
  )
  x = tf.constant(_array(3, 2, height, width, channels[0]))
  _assert_close(_run(ours, x, our_variables), _run(theirs, x, their_variables))


@pytest.mark.parametrize("kernel_size", [1, 3, 5, 9])
@pytest.mark.parametrize("stride", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_equals_signal_conv(transposed, stride, kernel_size):
  unit = 1 if transposed else stride
  _check_convolution(transposed, (3, 5), kernel_size, stride, 3 * unit, 4 * unit, use_bias=True)


# From many channels to few, a transposed convolution takes another path.
@pytest.mark.parametrize("kernel_size,stride", [(9, 4), (5, 2), (3, 1)])
def test_transposed_to_an_image_equals_signal_conv(kernel_size, stride):
  _check_convolution(True, (64, 3), kernel_size, stride, 3, 4, use_bias=True)


@settings(max_examples=12, deadline=None)
@given(
  st.booleans(),
  st.integers(1, 70),
  st.integers(1, 20),
  st.sampled_from([1, 3, 5, 7, 9, 13]),
  st.sampled_from([1, 2, 3, 4, 8]),
  st.integers(1, 5),
  st.integers(1, 5),
  st.booleans(),
)
def test_equals_signal_conv_for_any_sizes(
  transposed, in_channels, out_channels, kernel_size, stride, height, width, use_bias
):
  unit = 1 if transposed else stride
  _check_convolution(
    transposed,
    (in_channels, out_channels),
    kernel_size,
    stride,
    height * unit,
    width * unit,
    use_bias,
  )


def test_conv_equals_signal_conv_where_the_size_is_no_multiple_of_the_stride():
  _check_convolution(False, (3, 5), 5, 2, 7, 5, use_bias=True)


@pytest.mark.parametrize("kernel_size,stride", [(4, 2), (6, 4), (8, 8)])
@pytest.mark.parametrize("transposed", [False, True])
def test_even_kernel_with_the_origin_of_signal_conv_equals_it(transposed, kernel_size, stride):
  layer, _, theirs, _ = _make_pair(transposed, 2, 3, kernel_size, stride, use_bias=True)
  ours = type(layer)(
    2, 3, kernel_size, stride, kernel_initializer=layer.kernel, origin=kernel_size // 2
  )
  ours.bias.assign(layer.bias)
  x = tf.constant(_array(3, 2, 3 * stride, 2 * stride, 2))
  _assert_close([ours(x)], [theirs(x)])


@pytest.mark.parametrize("kernel_size,stride", [(16, 16), (18, 16), (6, 4), (5, 2), (9, 4), (2, 1)])
def test_the_two_directions_are_adjoint(kernel_size, stride):
  kernel = _array(0, kernel_size, kernel_size, 2, 3)
  down = Conv2D(2, 3, kernel_size, stride, use_bias=False, kernel_initializer=kernel)
  up = Conv2DTranspose(
    3, 2, kernel_size, stride, use_bias=False, kernel_initializer=kernel.transpose(0, 1, 3, 2)
  )
  image, latent = _array(1, 1, 3 * stride, 2 * stride, 2), _array(2, 1, 3, 2, 3)
  np.testing.assert_allclose(np.vdot(down(image), latent), np.vdot(image, up(latent)), rtol=1e-4)


@pytest.mark.parametrize("channels", [3, 64])
def test_transposed_with_kernel_equal_to_stride_paints_separate_blocks(channels):
  kernel = _array(0, 8, 8, channels, 3)
  layer = Conv2DTranspose(channels, 3, 8, 8, use_bias=False, kernel_initializer=kernel)
  latent = np.zeros([1, 2, 3, channels], np.float32)
  latent[0, 1, 2, 1] = 1
  expected = np.zeros([1, 16, 24, 3], np.float32)
  expected[0, 8:16, 16:24] = kernel[:, :, 1]
  np.testing.assert_allclose(layer(latent), expected, atol=1e-6)


@pytest.mark.parametrize("channels", [3, 64])
def test_even_kernel_reaches_as_far_into_both_neighbouring_blocks(channels):
  kernel = _array(0, 10, 10, channels, 3)
  layer = Conv2DTranspose(channels, 3, 10, 8, use_bias=False, kernel_initializer=kernel)
  latent = np.zeros([1, 3, 3, channels], np.float32)
  latent[0, 1, 1, 1] = 1
  expected = np.zeros([1, 24, 24, 3], np.float32)
  expected[0, 7:17, 7:17] = kernel[:, :, 1]
  np.testing.assert_allclose(layer(latent), expected, atol=1e-6)


def test_default_origin():
  sizes = [(5, 2), (9, 4), (3, 1), (16, 16), (18, 16), (6, 4)]
  assert [default_origin(k, s) for k, s in sizes] == [2, 4, 1, 0, 1, 1]
  with pytest.raises(ValueError, match="origin"):
    default_origin(2, 4)
  with pytest.raises(ValueError, match="from 0 to 4"):
    Conv2D(1, 1, 5, 2, origin=5)


@pytest.mark.slow
@pytest.mark.parametrize(
  "layer",
  [
    Conv2D(3, 4, 9, 4),
    Conv2D(3, 4, 5, 2),
    Conv2D(3, 4, 3, 1),
    Conv2DTranspose(3, 4, 5, 2),
    Conv2DTranspose(3, 4, 18, 16),
    Conv2DTranspose(64, 3, 9, 4),
    GDN(3),
    GDN(3, inverse=True),
  ],
)
def test_unknown_shapes_give_the_same(layer):
  spec = tf.TensorSpec([None, None, None, layer.in_channels])
  traced = tf.function(layer, input_signature=[spec])
  assert traced.get_concrete_function().output_shapes[-1] == layer.out_channels
  for height, width in [(8, 12), (16, 4)]:
    x = tf.constant(_array(0, 2, height, width, layer.in_channels))
    _assert_close([traced(x)], [layer(x)])
    assert traced(x).shape[1:3] == layer.output_size(height, width)


@pytest.mark.parametrize("inverse", [False, True])
def test_gdn_equals_that_of_tensorflow_compression(inverse):
  x = tf.constant(_array(0, 2, 4, 3, 6))
  ours, theirs = GDN(6, inverse=inverse), tfc.GDN(inverse=inverse)
  theirs.build(x.shape)
  # Some entries below their bounds, where the gradient passes in one direction only.
  variables = [v for v in ours.trainable_variables if v.shape.rank == 1]
  variables += [v for v in ours.trainable_variables if v.shape.rank == 2]
  variables[0].assign(_array(1, 6) + 1)
  variables[1].assign(_array(2, 6, 6) * 0.3)
  theirs.beta_parameter.variable.assign(variables[0])
  theirs.gamma_parameter.variable.assign(variables[1])
  their_variables = [theirs.beta_parameter.variable, theirs.gamma_parameter.variable]
  assert np.any(variables[1].numpy() < 0)
  _assert_close(_run(ours, x, variables), _run(theirs, x, their_variables))
  _assert_close([ours.beta, ours.gamma], [theirs.beta, theirs.gamma], 1e-6)


def test_gdn_initial_values():
  layer = GDN(3)
  np.testing.assert_allclose(layer.beta, np.ones(3), rtol=1e-6)
  np.testing.assert_allclose(layer.gamma, 0.1 * np.eye(3), atol=1e-7)
  gamma = np.abs(_array(0, 3, 3))
  layer = GDN(3, beta_init=[1, 2, 3], gamma_init=gamma)
  np.testing.assert_allclose(layer.beta, [1, 2, 3], rtol=1e-6)
  np.testing.assert_allclose(layer.gamma, gamma, rtol=1e-5)
  with pytest.raises(ValueError, match=r"\(3, 3\)"):
    GDN(3, gamma_init=np.ones([2, 2]))


def test_initial_kernels():
  kernel = _array(0, 3, 3, 2, 4)
  np.testing.assert_array_equal(Conv2D(2, 4, 3, kernel_initializer=kernel).kernel, kernel)
  shapes = []
  Conv2DTranspose(
    2, 4, 5, 2, kernel_initializer=lambda shape: shapes.append(shape) or np.zeros(shape)
  )
  assert shapes == [(5, 5, 2, 4)]
  with pytest.raises(ValueError, match=r"\(3, 3, 2, 5\)"):
    Conv2D(2, 5, 3, kernel_initializer=kernel)


@pytest.mark.parametrize(
  "layer", [Conv2D(32, 64, 5, 2), Conv2DTranspose(32, 64, 5, 2), Conv2DTranspose(64, 32, 9, 4)]
)
def test_default_kernel_keeps_the_variance_of_white_inputs(layer):
  y = layer(_array(0, 4, 32, 32, layer.in_channels)).numpy()
  assert 0.7 < y[:, 4:-4, 4:-4].std() < 1.3


def test_activations():
  x = tf.constant(_array(0, 1, 4, 4, 2))
  plain = Conv2D(2, 3, 3)
  for activation, expected in [
    ("relu", tf.nn.relu),
    ("leaky_relu", tf.nn.leaky_relu),
    (tf.tanh, tf.tanh),
  ]:
    layer = Conv2D(2, 3, 3, activation=activation, kernel_initializer=plain.kernel)
    _assert_close([layer(x)], [expected(plain(x))])
  with pytest.raises(ValueError, match="leaky_relu"):
    Conv2D(2, 3, 3, activation="rely")


def test_counts():
  conv = Conv2D(3, 192, 5, 2)
  assert conv.macs(64, 32) == 32 * 16 * 25 * 3 * 192
  assert conv.flops(64, 32) == 2 * conv.macs(64, 32)
  assert conv.elementwise(64, 32) == 32 * 16 * 192
  assert conv.num_parameters() == 25 * 3 * 192 + 192
  up = Conv2DTranspose(192, 3, 9, 4, use_bias=False)
  assert up.macs(8, 4) == 8 * 4 * 81 * 192 * 3
  assert up.elementwise(8, 4) == 0
  assert up.output_size(8, 4) == (32, 16)
  assert GDN(192).macs(8, 4) == 8 * 4 * 192**2
  assert GDN(192).num_parameters() == 192 + 192**2


# Between many channels, a strided convolution has a gradient of its own.
@pytest.mark.slow
@pytest.mark.parametrize(
  "transposed,kernel_size,stride,origin,height,width",
  [
    (False, 5, 2, 2, 6, 8),
    (False, 5, 2, 1, 6, 8),
    (False, 5, 2, 2, 2, 130),  # From 64 columns on, in parts.
    (False, 5, 2, 2, 5, 7),
    (False, 5, 3, 2, 7, 9),
    (False, 4, 2, 1, 4, 6),
    (False, 4, 4, 0, 8, 5),
    (False, 2, 3, 0, 5, 6),
    (True, 5, 2, 2, 3, 4),
    (True, 5, 2, 1, 3, 4),
    (True, 5, 2, 1, 1, 97),
    (True, 6, 4, 1, 2, 3),
    (True, 2, 3, 0, 2, 3),
  ],
)
def test_gradients_between_many_channels(transposed, kernel_size, stride, origin, height, width):
  """Against TensorFlow's gradients of the same products, tap by tap; also for unknown sizes."""
  kernel = 0.1 * _array(0, kernel_size, kernel_size, 66, 64)
  layer = (Conv2DTranspose if transposed else Conv2D)(
    66, 64, kernel_size, stride, origin=origin, kernel_initializer=kernel
  )

  def plain(x):
    rows, columns = -(-height // stride), -(-width // stride)
    reach = stride * max(rows, columns, height, width) + kernel_size
    total = 0.0
    for i in range(kernel_size):
      for j in range(kernel_size):
        if transposed:
          # Upsampled by zeros, then moved to where this tap paints.
          spread = tf.einsum("bhwi,io->bhwo", x, layer.kernel[i, j])
          spread = tf.reshape(
            tf.pad(
              spread[:, :, None, :, None],
              [[0, 0], [0, 0], [0, stride - 1], [0, 0], [0, stride - 1], [0, 0]],
            ),
            [2, height * stride, width * stride, 64],
          )
          ends = [[i, kernel_size - 1 - i], [j, kernel_size - 1 - j]]
          y = tf.pad(spread, [[0, 0], *ends, [0, 0]])
          total += y[:, origin : origin + height * stride, origin : origin + width * stride]
        else:
          padded = tf.pad(x, [[0, 0], [origin, reach], [origin, reach], [0, 0]])
          here = padded[:, i : i + stride * rows : stride, j : j + stride * columns : stride]
          total += tf.einsum("bhwi,io->bhwo", here, layer.kernel[i, j])
    return total + layer.bias

  x = tf.constant(_array(3, 2, height, width, 66))
  variables = [layer.kernel, layer.bias]
  expected = _run(plain, x, variables)
  _assert_close(_run(layer, x, variables), expected)
  unknown = tf.function(layer, input_signature=[tf.TensorSpec([None, None, None, 66])])
  _assert_close(_run(unknown, x, variables), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
  "transposed,kernel_size,stride", [(False, 3, 1), (False, 5, 2), (True, 5, 2)]
)
@pytest.mark.parametrize("channels", [(3, 64), (64, 64)])
def test_a_compiled_step_has_the_gradients_of_the_plain_formula(
  transposed, kernel_size, stride, channels
):
  """Graph optimisation merges operations forwards and backwards; that must change nothing."""
  layer = (Conv2DTranspose if transposed else Conv2D)(
    *channels, kernel_size, stride, origin=(kernel_size - stride) // 2, activation="relu"
  )
  layer.bias.assign(_array(0, channels[1]))
  x = tf.constant(_array(1, 2, 8, 6, channels[0]))

  def plain(x):
    if transposed:
      kernel = tf.transpose(layer.kernel, [0, 1, 3, 2])
      size = [2, 8 * stride, 6 * stride, channels[1]]
      y = tf.nn.conv2d_transpose(x, kernel, size, stride, "SAME")
    else:
      y = tf.nn.conv2d(x, layer.kernel, stride, "SAME")
    return tf.nn.relu(y + layer.bias)

  variables = [layer.kernel, layer.bias]
  compiled = tf.function(lambda: _run(layer, x, variables))()
  _assert_close(compiled, _run(plain, x, variables))


def test_a_gpu_has_tensorflows_plain_operations(monkeypatch):
  model = Sequential([Conv2D(3, 64, 5, 2), Conv2D(64, 64, 5, 2)])

  def numbers():
    @tf.function
    def run(x):
      return _run(model, x, model.trainable_variables)

    graph = run.get_concrete_function(tf.TensorSpec([1, 32, 32, 3])).graph
    types = [o.type for o in graph.get_operations()]
    return types.count("Conv2DBackpropFilter"), types.count("ReverseV2")

  gradients, mirrors = numbers()
  assert gradients > 2 and mirrors > 0
  monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind=None: ["a GPU"])
  assert numbers() == (2, 0)


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_parts_of_a_kernels_gradient_are_added_in_32_bits(policy):
  """Of 16 bits: as near to the float32 gradient as that of one part."""
  layer = Conv2D(64, 64, 3, 1)
  x = tf.constant(_array(0, 1, 2, 192, 64))
  exact = _run(layer, x, [layer.kernel])[2].numpy()

  def error():
    with precision.computing_in(policy):
      got = _run(layer, x, [layer.kernel])[2].numpy()
    return np.sqrt(np.mean(np.square(got - exact)) / np.mean(np.square(exact)))

  in_parts = error()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layers_lib, "_COLUMNS", 1000)
    whole = error()
  assert in_parts <= 1.25 * whole


def test_a_transform_whose_mirrors_cost_more_than_they_spare_runs_as_it_is():
  last = Conv2D(64, 64, 5, 2)
  for model, is_mirrored in (
    (Sequential([last]), False),
    (Sequential([Conv2D(3, 64, 5, 2), last]), True),
  ):
    assert model.mirroring_gains(32, 32) > 0
    spec = tf.TensorSpec([1, 32, 32, model.in_channels])
    run = tf.function(model).get_concrete_function(spec)
    assert any(o.type == "ReverseV2" for o in run.graph.get_operations()) == is_mirrored


@settings(max_examples=25, deadline=None)
@given(
  transposed=st.booleans(),
  kernel_size=st.integers(1, 6),
  stride=st.integers(1, 3),
  origin=st.integers(0, 5),
  blocks=st.tuples(st.integers(1, 4), st.integers(1, 4)),
)
def test_mirrored_layers_are_the_layers_between_two_mirrors(
  transposed, kernel_size, stride, origin, blocks
):
  if origin >= kernel_size:
    return
  layer = (Conv2DTranspose if transposed else Conv2D)(
    3, 2, kernel_size, stride, origin=origin, activation="relu"
  )
  layer.bias.assign(_array(0, 2))
  size = blocks if transposed else (blocks[0] * stride, blocks[1] * stride)
  gains = layer.mirroring_gains(*size)
  assert (gains is None) == (kernel_size - stride - origin < 0)
  if not transposed and stride > 1:
    assert layer.mirroring_gains(size[0], size[1] + 1) is None
  if gains is not None:
    x = tf.constant(_array(1, 2, *size, 3))
    mirrored = tf.reverse(layer.mirrored(tf.reverse(x, [1, 2])), [1, 2])
    _assert_close([mirrored], [layer(x)])


@pytest.mark.parametrize("transposed,inner", [(False, 2), (True, 2), (False, 1)])
def test_a_transform_runs_mirrored_where_that_spares_copies(transposed, inner, monkeypatch):
  """Paddings of 2 before and 1 after are SAME in the mirror; 1 and 2 are that as they are."""
  convolution = Conv2DTranspose if transposed else Conv2D
  layers = [
    convolution(3, 64, 5, 2, origin=inner),
    GDN(64, gamma_init=np.abs(_array(2, 64, 64)) / 64),
    Sequential([convolution(64, 65, 5, 2, origin=inner), Pointwise(65, "leaky_relu")]),
    convolution(65, 64, 5, 2, origin=inner, use_bias=False),
  ]
  if transposed:  # To a picture, which has its own way.
    layers.append(Conv2DTranspose(64, 3, 5, 2, origin=inner))
  model = Sequential(layers)
  calls = []
  run = Conv2D._run if not transposed else Conv2DTranspose._run
  monkeypatch.setattr(
    convolution, "_run", lambda self, x, kernel, origin: calls.append(origin) or run(
      self, x, kernel, origin)
  )  # fmt: skip

  def plain(x):
    for layer in [*layers[:2], *layers[2].layers, *layers[3:]]:
      x = layer(x)
    return x

  variables = model.trainable_variables
  x = tf.constant(_array(3, 2, *((2, 3) if transposed else (16, 8)), 3))
  got = _run(model, x, variables)
  assert calls[:3] == [1, 1, 1]
  _assert_close(got, _run(plain, x, variables))
  calls.clear()
  if not transposed:
    other = x[:, :15]  # No multiple of the strides: as it is.
    _assert_close([model(other)], [plain(other)])
    assert calls[:3] == [inner] * 3
    calls.clear()
  unknown = tf.function(model, input_signature=[tf.TensorSpec([None, None, None, 3])])
  _assert_close([unknown(x)], [plain(x)])
  assert calls[:3] == [inner] * 3


def test_layers_beyond_the_weights_that_were_announced_are_refused_before_they_are_made():
  with at_most(3 * 3 * 4 * 4 + 4**2):
    Conv2D(4, 4, 3, 1)
    GDN(4)
    with pytest.raises(ValueError, match="1 weights, where 0 are left"):
      Conv2D(1, 1, 1, 1)
    with at_most(10), pytest.raises(ValueError, match="100000000 weights"):
      GDN(10_000)
  Conv2D(4, 4, 3, 1)  # Without a limit again.
