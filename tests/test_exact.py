"""Integer convolutions: the integers of plain arithmetic, near the float layers, or refused."""

import fractions
import functools
import os
import platform

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from common import exact
from common.layers import GDN, Conv2D, Conv2DTranspose, Sequential, same_origin

ONE = 2**exact.FRACTION_BITS
LIMIT = 2**22  # Of outputs.
MOST = 127 * 2**6  # Of inputs: what they are clipped to.
SIGNED, UNSIGNED = 127, 255  # Activations of at most so much.
HALF = fractions.Fraction(1, 2)
OFFSET = np.array([0.25, -511 / 1024, 0.0])  # Of the stacks' inputs.

# The layers of each stack; sizes below are odd, and smaller than the kernels.
STACKS = {
  "hyper-synthesis": lambda: [
    Conv2DTranspose(3, 4, 5, 2, activation="relu", origin=same_origin(5, 2)),
    Conv2DTranspose(4, 6, 5, 2, activation="relu", origin=same_origin(5, 2)),
    Conv2DTranspose(6, 4, 3),
  ],
  "one layer, kernel 6, stride 4": lambda: [
    Conv2DTranspose(3, 4, 6, 4, origin=same_origin(6, 4)),
  ],
  "SignalConv2D alignment": lambda: [
    Conv2DTranspose(3, 4, 5, 2, activation="relu"),
    Conv2DTranspose(4, 4, 3, use_bias=False),
  ],
  "down and up": lambda: [
    Conv2D(3, 5, 3, activation="relu"),
    Conv2D(5, 4, 5, 2, activation="relu"),
    Conv2DTranspose(4, 3, 6, 2, activation="relu"),
    Conv2D(3, 4, 6, 1),
  ],
  "gaps between kernels": lambda: [Conv2DTranspose(3, 4, 3, 4), Conv2D(4, 4, 3, 4)],
  "first and last taps": lambda: [
    Conv2DTranspose(3, 4, 5, 2, origin=0),
    Conv2DTranspose(4, 3, 6, 1, origin=5, activation="relu"),
    Conv2D(3, 4, 5, 2, origin=4),
    Conv2D(4, 4, 6, 4, origin=0),
  ],
  "1x1": lambda: [Conv2D(3, 4, 1, activation="relu"), Conv2DTranspose(4, 4, 1)],
  "1x1, stride 2": lambda: [Conv2D(3, 4, 1, 2), Conv2DTranspose(4, 4, 1, 2, activation="relu")],
  "late origins": lambda: [
    Conv2DTranspose(3, 4, 4, 4, activation="relu", origin=3),
    Conv2DTranspose(4, 3, 5, 2, activation="relu", origin=4),
    Conv2DTranspose(3, 4, 3, 2, origin=1, activation="relu"),
  ],
}


def _randomize(layers, seed=0):
  """Kernels that keep the variance, and biases that count."""
  random = np.random.default_rng(seed)
  for layer in layers:
    fan_in = np.prod(layer.kernel.shape[:3]) / layer.upsample**2
    layer.kernel.assign(random.normal(0, max(fan_in, 1) ** -0.5, layer.kernel.shape))
    if layer.use_bias:
      layer.bias.assign(random.normal(0, 0.3, layer.bias.shape))
  return layers


def _integers(shape, seed=1, spread=20):
  return np.round(np.random.default_rng(seed).normal(0, spread, shape)).astype(np.int32)


def _floats(layers, x, offset=0.0):
  """What the float layers make of it."""
  return Sequential(layers)(tf.constant(x + offset, tf.float32)).numpy()


def _plain(layers, arrays, x):
  """What the stack computes, in Python's own integers, sum by sum from the layers' definition."""
  return np.concatenate([_plain_image(layers, arrays, x[i : i + 1]) for i in range(len(x))])


def _plain_image(layers, arrays, x):
  two = fractions.Fraction(2)
  x = np.vectorize(int, otypes=[object])(x)
  coarser = min(k for k in range(7) if abs(x).max() <= SIGNED * 2**k or k == 6)
  x = np.vectorize(lambda v: (v * two**-coarser + HALF).__floor__(), otypes=[object])(x)
  x, finer = np.clip(x, -SIGNED, SIGNED), -coarser
  offset = np.broadcast_to(arrays["t/offset"].astype(object), x.shape) * two**-10
  for i, layer in enumerate(layers):
    kernel, bias, bits, out = (arrays[f"t/{i}/{k}"] for k in ("kernel", "bias", "bits", "out"))
    sums = _convolution(layer, x, kernel.astype(object)) * two**-finer
    if i == 0:
      sums = sums + _convolution(layer, offset, kernel.astype(object))
    sums = sums + bias.astype(object) * two**-15
    sums = sums * [two ** int(o - b) for o, b in zip(out, bits)]  # Of `out` fractional bits.
    if i + 1 == len(layers):
      finer, limit = 0, LIMIT
    else:
      limit = SIGNED if layer.activation is None else UNSIGNED
      most = (sums if layer.activation is not None else abs(sums)).max()
      finer = sum(most * 2**k <= limit for k in range(1, 16))
    x = np.vectorize(lambda v, k=finer: (v * 2**k + HALF).__floor__(), otypes=[object])(sums)
    x = np.clip(x, -limit if layer.activation is None else 0, limit)
  return x.astype(np.float64)


def _convolution(layer, x, kernel):
  batch, height, width, _ = x.shape
  down, up, origin, size = layer.downsample, layer.upsample, layer.origin, layer.kernel_size
  y = np.zeros([batch, -(-height // down) * up, -(-width // down) * up, kernel.shape[3]], object)
  taps = [(i, j) for i in range(size) for j in range(size)]
  if isinstance(layer, Conv2D):
    for row in range(y.shape[1]):
      for column in range(y.shape[2]):
        for i, j in taps:
          m, n = down * row + i - origin, down * column + j - origin
          if 0 <= m < height and 0 <= n < width:
            y[:, row, column] += x[:, m, n] @ kernel[i, j]
  else:
    for row in range(height):
      for column in range(width):
        for i, j in taps:
          m, n = up * row + i - origin, up * column + j - origin
          if 0 <= m < y.shape[1] and 0 <= n < y.shape[2]:
            y[:, m, n] += x[:, row, column] @ kernel[i, j]
  return y


@functools.cache
def _stack(name):
  """(layers, the integer transform, its arrays) of one of STACKS."""
  layers = _randomize(STACKS[name]())
  transform = exact.ExactTransform(Sequential(layers), "t")
  arrays = transform.derive(offset=OFFSET)
  transform.use(arrays)
  return layers, transform, arrays


@pytest.mark.parametrize("name", STACKS)
@pytest.mark.parametrize("size", [pytest.param((1, 1), marks=pytest.mark.slow), (3, 5)], ids=str)
def test_the_integers_are_those_of_plain_arithmetic(name, size):
  layers, transform, arrays = _stack(name)
  x = _integers([2, *size, 3])
  expected = _plain(layers, arrays, x)
  np.testing.assert_array_equal(transform(tf.constant(x)), expected)
  assert expected.shape == tuple(Sequential(layers)(tf.constant(x, tf.float32)).shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_it_stays_near_the_float_layers(name):
  """Activations of 8 bits are the least precise."""
  layers, transform, _ = _stack(name)
  x = _integers([2, 4, 3, 3])
  expected = _floats(layers, x, OFFSET)
  errors = transform(tf.constant(x)).numpy() / ONE - expected
  assert np.sqrt(np.mean(errors**2)) < 2 / ONE + 0.025 * np.std(expected)
  assert np.abs(errors).max() < 2 / ONE + 0.06 * np.abs(expected).max()


def test_channels_of_very_different_sizes_keep_their_precision():
  layers = _randomize([Conv2D(3, 6, 3, activation="relu"), Conv2D(6, 4, 3)])
  scales = 10.0 ** np.arange(-2, 4)
  plain = _floats(layers, _integers([1, 4, 3, 3]))
  layers[0].kernel.assign(layers[0].kernel * scales)
  layers[0].bias.assign(layers[0].bias * scales)
  layers[1].kernel.assign(layers[1].kernel / scales[:, None])
  transform = exact.ExactTransform(Sequential(layers), "t")
  transform.use(transform.derive())
  errors = transform(tf.constant(_integers([1, 4, 3, 3]))).numpy() / ONE - plain
  assert np.sqrt(np.mean(errors**2)) < 0.01 * np.std(plain)


@pytest.mark.parametrize("size", [0.05, 0.5, 10.0, 50.0])
def test_images_of_any_size_keep_their_precision_alone_and_in_a_batch(size):
  """Without biases errors are proportional to outputs, but for the last rounding."""
  layers = _randomize([Conv2D(3, 6, 3, activation="relu"), Conv2DTranspose(6, 4, 5, 2)])
  for layer in layers:
    layer.bias.assign(tf.zeros_like(layer.bias))
  transform = exact.ExactTransform(Sequential(layers), "t")
  transform.use(transform.derive())
  x = np.concatenate([_integers([1, 4, 3, 3]), _integers([1, 4, 3, 3], seed=5, spread=20 * size)])
  expected = _floats(layers, x)
  errors = transform(tf.constant(x)).numpy() / ONE - expected
  for error, values in zip(errors, expected):
    assert np.sqrt(np.mean(error**2)) < 0.5 / ONE + 0.01 * np.std(values)


def test_a_precise_input_is_rounded_no_more_than_its_image_needs():
  """An image with inputs up to 127 keeps its units, one with larger ones the next power of 2."""
  layer = Conv2D(1, 1, 1, use_bias=False)
  layer.kernel.assign([[[[0.25]]]])
  transform = exact.ExactTransform(layer, "t")
  transform.use(transform.derive(offset=np.array([0.375])))
  x = np.array([[127, -127, 1], [128, -3, 6], [8128, 64, 20], [10**6, -(2**31), 31]], np.int32)
  found = transform(tf.constant(x[:, None, :, None])).numpy()[:, 0, :, 0] / ONE
  expected = [[127, -127, 1], [128, -2, 6], [8128, 64, 0], [8128, -8128, 0]]
  np.testing.assert_allclose(found, (np.array(expected) + 0.375) / 4, rtol=1e-3)
  assert exact.ExactTransform(layer, "t").derive()["t/offset"] == 0


def test_inputs_and_activations_beyond_the_coarsest_scale_are_clipped_alike():
  layers, transform, arrays = _stack("hyper-synthesis")
  x = _integers([1, 3, 4, 3], spread=2e6)
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain(layers, arrays, x))


def test_a_gain_and_a_shift_apply_to_the_outputs():
  layers, transform, _ = _stack("hyper-synthesis")
  other = exact.ExactTransform(Sequential(layers), "t")
  gain, shift = np.array([1.0, -2.0, 0.5, 8.125]), np.array([0.0, 3.0, -1.0, 17.9])
  other.use(other.derive(gain, shift, OFFSET))
  x = tf.constant(_integers([1, 3, 4, 3]))
  expected = transform(x).numpy() / ONE * gain + shift
  np.testing.assert_allclose(other(x).numpy() / ONE, expected, atol=0.1, rtol=0.004)


def test_a_batch_gives_what_each_image_gives_alone():
  _, transform, _ = _stack("hyper-synthesis")
  x = _integers([5, 7, 9, 3])
  together = transform(tf.constant(x)).numpy()
  for i in range(len(x)):
    np.testing.assert_array_equal(transform(tf.constant(x[i : i + 1]))[0], together[i])


def test_the_order_of_summation_does_not_matter():
  """Channels, rows and columns in another order: other sums of the same numbers.

  With many channels, so that float arithmetic would differ.
  """
  layers = _randomize([Conv2DTranspose(96, 16, 5, 2, activation="relu"), Conv2D(16, 24, 3)])
  turned = [Conv2DTranspose(96, 16, 5, 2, activation="relu", origin=2), Conv2D(16, 24, 3)]
  into, within = np.random.default_rng(3).permutation(96), np.random.default_rng(4).permutation(16)
  turned[0].kernel.assign(tf.gather(tf.gather(layers[0].kernel, into, axis=2), within, axis=3))
  turned[0].bias.assign(tf.gather(layers[0].bias, within))
  turned[1].kernel.assign(tf.gather(layers[1].kernel, within, axis=2))
  turned[1].bias.assign(layers[1].bias)
  x = _integers([1, 9, 8, 96])
  outputs = []
  for stack, order in ((layers, np.arange(96)), (turned, into)):
    transform = exact.ExactTransform(Sequential(stack), "t")
    transform.use(transform.derive())
    outputs.append(transform(tf.constant(x[..., order])).numpy())
  np.testing.assert_array_equal(*outputs)
  floats = [
    _floats(stack, x[..., order]) for stack, order in ((layers, np.arange(96)), (turned, into))
  ]
  assert np.any(floats[0] != floats[1])


@functools.cache
def _mutable():
  layers = [Conv2DTranspose(3, 4, 5, 2, activation="relu"), Conv2D(4, 2, 3)]
  return layers, exact.ExactTransform(Sequential(layers), "t")


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
  seed=st.integers(0, 2**32 - 1),
  magnitudes=st.tuples(*[st.floats(-12, 9)] * 2),
  spread=st.sampled_from([0.0, 1.0, 6.0]),
  biases=st.floats(-6, 12),
  activations=st.sampled_from([1.0, 127.0, 1000.0, float(MOST), 1e8]),
  offset=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_no_sum_is_ever_rounded(seed, magnitudes, spread, biases, activations, offset):
  """For any weights that are not refused and any inputs: sums stay below 2^53, and the results
  are those of Python's integers."""
  layers, transform = _mutable()
  random = np.random.default_rng(seed)
  for layer, magnitude in zip(layers, magnitudes):
    signs = random.choice([-1, 0, 1], layer.kernel.shape, p=[0.45, 0.1, 0.45])
    exponents = magnitude - random.uniform(0, spread + 1e-9, layer.kernel.shape)
    layer.kernel.assign(signs * 10**exponents)
    layer.bias.assign(random.choice([-1, 1], layer.bias.shape) * 10**biases)
  try:
    arrays = transform.derive(offset=random.choice([-1, 1], 3) * offset)
  except ValueError as e:
    assert "too large" in str(e)
    assert max(magnitudes) > 4 or biases > 7
    return
  for i in range(2):
    kernel, bias = (arrays[f"t/{i}/{key}"].astype(object) for key in ("kernel", "bias"))
    assert np.all(np.abs(kernel) <= 2047) and np.all(np.abs(bias) <= 2**50)
    phases = [kernel] if i else [kernel[a::2, b::2] for a in range(2) for b in range(2)]
    for taps in phases:
      assert np.all(np.abs(taps).sum(axis=(0, 1, 2)) * UNSIGNED <= 31 * 2**24)
  transform.use(arrays)
  x = np.round(random.choice([-1, 1, 0.3], [2, 3, 2, 3]) * activations).astype(np.int32)
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain(layers, arrays, x))


def test_the_largest_sum_of_a_further_layer_comes_out_right():
  """All weights and activations of one sign, as large as they may be."""
  layers = [Conv2D(8, 41, 1, activation="relu"), Conv2D(41, 1, 5)]
  layers[0].kernel.assign(tf.ones(layers[0].kernel.shape))
  layers[1].kernel.assign(tf.fill(layers[1].kernel.shape, 1989 / 1024))
  transform = exact.ExactTransform(Sequential(layers), "t")
  arrays = transform.derive()
  transform.use(arrays)
  x = np.full([1, 5, 5, 8], MOST, np.int32)
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain(layers, arrays, x))
  total = int(np.abs(arrays["t/1/kernel"].astype(object)).sum()) * UNSIGNED
  assert 0.99 * 31 * 2**24 < total <= 31 * 2**24  # Close to the bound.


@pytest.mark.parametrize("channels,in_bytes", [(200, True), (600, False)])
def test_layers_so_wide_that_parts_have_large_sums_run_in_floats(channels, in_bytes):
  layers = _randomize([Conv2D(2, channels, 1, activation="relu"), Conv2DTranspose(channels, 3, 4)])
  transform = exact.ExactTransform(Sequential(layers), "t")
  arrays = transform.derive()
  kernel = np.sign(arrays["t/1/kernel"]) * 15  # All in the lower part.
  arrays["t/1/kernel"] = kernel.astype(np.int16)
  transform.use(arrays)
  x = _integers([1, 3, 2, 2])
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain(layers, arrays, x))
  if exact.multiplies_bytes():
    assert transform._layers[1].runs_in_bytes() == in_bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", STACKS)
def test_bytes_and_floats_give_the_same(name, monkeypatch):
  layers, transform, arrays = _stack(name)
  floats = exact.ExactTransform(Sequential(layers), "t")
  floats.use(arrays)
  x = tf.constant(_integers([2, 7, 6, 3]))
  expected = transform(x)
  monkeypatch.setattr(exact, "multiplies_bytes", lambda: False)
  np.testing.assert_array_equal(floats(x), expected)


# Layers as large as models have them: the library chooses its code by their sizes.
_LARGE = {
  "5x5, up by 2": lambda n, m: Conv2DTranspose(n, m, 5, 2),
  "3x3": lambda n, m: Conv2DTranspose(n, m, 3),
  "1x1": lambda n, m: Conv2D(n, m, 1),
  "5x5, down by 2": lambda n, m: Conv2D(n, m, 5, 2),
  "6x6, up by 4": lambda n, m: Conv2DTranspose(n, m, 6, 4),
}


@pytest.mark.slow
@pytest.mark.parametrize("channels", [(192, 288), (320, 80), (33, 17)], ids=str)
@pytest.mark.parametrize("kind", _LARGE)
def test_bytes_and_floats_give_the_same_in_large_layers(kind, channels, monkeypatch):
  """Also with the largest activations and kernels, of both signs, near every bound."""
  if not exact.multiplies_bytes():
    pytest.skip("TensorFlow convolves no bytes here")
  layers = _randomize([Conv2D(2, channels[0], 1, activation="relu"), _LARGE[kind](*channels)])
  transform = exact.ExactTransform(layers[1], "t")
  second = exact.ExactTransform(Sequential(layers), "t")
  arrays, more = transform.derive(), second.derive()
  random = np.random.default_rng(0)
  few = min(0.1, 400 / np.prod(layers[1].kernel.shape[:3]))  # As many as sums have room for.
  chances = [few, few, 0.1, 0.1, 0.8 - 2 * few]
  extreme = random.choice([-2047, 2047, -16, 15, 0], layers[1].kernel.shape, p=chances)
  x = random.choice([-127, 127, 1, 0], [2, 9, 6, channels[0]]).astype(np.int32)
  for kernel in (arrays["t/0/kernel"], extreme.astype(np.int16)):
    found = []
    for in_bytes in (True, False):
      with monkeypatch.context() as patch:
        if not in_bytes:
          patch.setattr(exact, "multiplies_bytes", lambda: False)
        transform.use({**arrays, "t/0/kernel": kernel})
        second.use({**more, "t/1/kernel": kernel})
        assert transform._layers[0].runs_in_bytes() == in_bytes
        assert second._layers[1].runs_in_bytes() == in_bytes
        found.append((transform(tf.constant(x)), second(tf.constant(x[..., :2]))))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert np.ptp(found[0][0]) > 100


def test_an_offset_that_is_no_multiple_is_refused():
  with pytest.raises(ValueError, match="multiples"):
    exact.ExactTransform(Conv2D(3, 4, 3), "t").derive(offset=np.full(3, 2.0**-11))


def test_bytes_are_multiplied_where_onednn_is():
  """Else all is right, and slow."""
  if platform.machine() != "x86_64" or os.environ.get("TF_ENABLE_ONEDNN_OPTS") == "0":
    pytest.skip("oneDNN is not on: this is for x86 processors, without TF_ENABLE_ONEDNN_OPTS=0")
  assert exact.multiplies_bytes()


def test_the_largest_sum_comes_out_right():
  """All weights and inputs of one sign, as large as they may be."""
  layer = Conv2D(41, 1, 5)
  layer.kernel.assign(tf.fill(layer.kernel.shape, 1989 / 1024))
  transform = exact.ExactTransform(layer, "t")
  arrays = transform.derive()
  transform.use(arrays)
  x = np.full([1, 5, 5, 41], 10 * MOST, np.int32)
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain([layer], arrays, x))
  total = int(np.abs(arrays["t/0/kernel"].astype(object)).sum()) * UNSIGNED
  assert 0.99 * 31 * 2**24 < total <= 31 * 2**24  # Close to the bound.


def _gdn():
  return [Conv2DTranspose(3, 4, 5, 2), GDN(4, inverse=True)]


@pytest.mark.parametrize(
  "layers",
  [
    _gdn,
    lambda: [Conv2D(3, 4, 3, activation="leaky_relu")],
    lambda: [Conv2D(3, 4, 3, activation="sigmoid")],
    lambda: [Sequential([Conv2D(3, 4, 3)])],
  ],
  ids=["GDN", "leaky ReLU", "sigmoid", "nested"],
)
def test_other_layers_are_refused_with_the_way_out(layers):
  with pytest.raises(ValueError, match="exact_coding=False"):
    exact.ExactTransform(Sequential(layers()), "t")


@pytest.mark.parametrize(
  "kernel,bias,expected",
  [
    (np.nan, 0.0, "not finite"),
    (np.inf, 0.0, "not finite"),
    (0.1, np.nan, "not finite"),
    (0.1, -np.inf, "not finite"),
    (1e25, 0.0, "too large"),
    (3e38, 0.0, "too large"),
    (0.1, 1e30, "too large"),
  ],
)
def test_weights_of_a_diverged_training_are_refused(kernel, bias, expected):
  layer = Conv2D(3, 4, 3)
  layer.kernel.assign(tf.fill(layer.kernel.shape, kernel))
  layer.bias.assign(tf.fill([4], bias))
  with pytest.raises(ValueError, match=expected):
    exact.ExactTransform(layer, "t").derive()


_DAMAGES = {
  "kernel's shape": ("t/1/kernel", lambda a: a[:, :, :-1]),
  "kernel's axes": ("t/1/kernel", lambda a: a.transpose(0, 1, 3, 2)),
  "kernel's type": ("t/0/kernel", lambda a: a.astype(np.float64)),
  "offset's shape": ("t/offset", lambda a: a[:2]),
  "offset's type": ("t/offset", lambda a: a / 1024),
  "large offset": ("t/offset", lambda a: np.full_like(a, 1025)),
  "smallest offset": ("t/offset", lambda a: np.full(a.shape, -(2**63))),
  "bias's shape": ("t/2/bias", lambda a: a[:1]),
  "bias's type": ("t/0/bias", lambda a: a + np.nan),
  "large kernel": ("t/2/kernel", lambda a: np.full_like(a, 2048)),
  "negative kernel": ("t/1/kernel", lambda a: np.full_like(a, -2048)),
  "kernel beyond int32": ("t/2/kernel", lambda a: a.astype(np.int64) * 0 + 2**31),
  "large bias": ("t/1/bias", lambda a: np.full_like(a, 2**53)),
  "smallest bias": ("t/1/bias", lambda a: np.full_like(a, -(2**63))),
  "bits's shape": ("t/0/bits", lambda a: a[None]),
  "bits's type": ("t/0/bits", lambda a: a + 0.5),
  "negative bits": ("t/0/bits", lambda a: a - 2000),
  "many bits": ("t/0/bits", lambda a: a + 2000),
  "bits of activations": ("t/0/out", lambda a: a + 100),
  "many bits of sums": ("t/1/bits", lambda a: a + 100),
  "one number of bits for all channels": ("t/2/bits", lambda a: a[0]),
  "missing bits of a channel": ("t/2/out", lambda a: a[1:]),
}


@pytest.mark.parametrize("damage", _DAMAGES)
def test_arrays_that_are_not_of_such_a_stack_are_refused_and_the_old_ones_kept(damage):
  layers, transform, arrays = _stack("hyper-synthesis")
  key, change = _DAMAGES[damage]
  with pytest.raises(ValueError, match=key.rsplit("/", 1)[0]):
    transform.use({**arrays, key: change(arrays[key])})
  x = _integers([1, 2, 2, 3])
  np.testing.assert_array_equal(transform(tf.constant(x)), _plain(layers, arrays, x))


def test_missing_arrays_are_refused():
  _, transform, arrays = _stack("hyper-synthesis")
  for key in arrays:
    with pytest.raises(KeyError, match=key):
      transform.use({k: v for k, v in arrays.items() if k != key})


def test_it_needs_kernels_before_it_computes():
  transform = exact.ExactTransform(Conv2D(3, 4, 3), "t")
  transform.derive()
  with pytest.raises(RuntimeError, match="prepare"):
    transform(tf.zeros([1, 2, 2, 3], tf.int32))
