import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import json
import time

import pytest
import tensorflow as tf

from common import profiling
from common.profiling import Stage, flops_per_pixel, profile_stages, time_in_turn
from common.transforms import make_transform
from factorized.codec import FactorizedCodec
from tests.conftest import picture


def test_bls2017_layer_by_layer():
  stages = {
    "analysis": Stage(make_transform("BLS2017Analysis"), 1),
    "synthesis": Stage(make_transform("BLS2017Synthesis"), 16),
  }
  costs = profile_stages(stages)
  convs = 2 * (81 * 3 * 256 / 4**2 + 25 * 256**2 / 8**2 + 25 * 256**2 / 16**2)
  gdns = 2 * (256**2 / 4**2 + 256**2 / 8**2)
  assert convs + gdns == 82016
  assert costs["analysis"].flops_per_pixel == costs["synthesis"].flops_per_pixel == 82016
  gdn_parameters = 2 * (256**2 + 256)
  assert costs["analysis"].num_parameters == (
    81 * 3 * 256 + 256 + 25 * 256**2 + 256 + 25 * 256**2 + gdn_parameters
  )
  assert costs["synthesis"].num_parameters == (
    2 * (25 * 256**2 + 256) + 81 * 256 * 3 + 3 + gdn_parameters
  )
  assert list(costs) == ["analysis", "synthesis"]


_ANALYSIS = {
  "mbt2018": ("MBT2018Analysis", dict(channels_base=192, output_channels=320)),
  "elic": ("ElicAnalysis", {}),
}
_SYNTHESIS = {
  "mbt2018": ("MBT2018Synthesis", dict(channels_base=192, in_channels=320)),
  "jpegl": ("JPEGLikeSynthesis", dict(kernel_size=18)),
  "two_layer_syn": ("TwoLayerResSynthesis", dict(channels=(12, 3))),
}
_HYPER = {"f_h": ("HyperAnalysis", {}), "g_h": ("HyperSynthesis", {})}


# What, the image's size over its input's, FLOPs as products alone, with elementwise operations,
# as published; parameters (those of the ELIC models and the hyperprior are published too).
@pytest.mark.parametrize(
  "transform,scale,products,everything,published,parameters",
  [
    (_ANALYSIS["mbt2018"], 1, 187392, 187582.25, 187583, 3505664),
    (_ANALYSIS["elic"], 1, 509936, 510845.5, 510846, 7337792),
    (_HYPER["f_h"], 16, 13450, 13451.640625, 13452, 6042560),
    (_SYNTHESIS["mbt2018"], 16, 187392, 187584, 187585, 3505347),
    (_SYNTHESIS["jpegl"], 16, 2430, 2433, 2433, 311043),
    (_SYNTHESIS["two_layer_syn"], 16, 10662, 10680, 10680, 1299003),
    (_HYPER["g_h"], 64, 30350, 30354.6875, 30355, 9166240),
  ],
  ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_published_costs(transform, scale, products, everything, published, parameters):
  name, arguments = transform
  transform = make_transform(name, **arguments)
  assert flops_per_pixel(transform, scale) == products
  assert flops_per_pixel(transform, scale, elementwise=True) == everything
  assert products == pytest.approx(published, rel=0.005)
  assert everything == pytest.approx(published, abs=1)
  assert transform.num_parameters() == parameters


def test_elic_stage_by_stage():
  """Plain arithmetic, with other channels."""
  a, b, c, d = channels = (8, 12, 16, 20)

  def residual(n):
    return n * n / 2 + 9 * n * n / 4 + n * n / 2

  convolutions = 25 * (3 * a / 4 + a * b / 16 + b * c / 64 + c * d / 256)
  stages = 3 * (residual(a) / 4 + residual(b) / 16 + residual(c) / 64)
  attention = (6 * residual(b) + b * b) / 16 + (6 * residual(d) + d * d) / 256
  analysis = make_transform("ElicAnalysis", channels=channels)
  assert flops_per_pixel(analysis) == 2 * (convolutions + stages + attention)
  synthesis = make_transform("ElicSynthesis", channels=channels)
  stages = 3 * (residual(a) / 4 + residual(b) / 16 + residual(c) / 64)
  assert flops_per_pixel(synthesis, 16) == 2 * (convolutions + stages + attention)


def test_shallow_layer_by_layer():
  two_layer = make_transform("TwoLayerSynthesis", channels=(24, 3), in_channels=320)
  assert flops_per_pixel(two_layer, 16) == 2 * (169 * 320 * 24 / 256 + (24**2 + 25 * 24 * 3) / 4)
  d2s = make_transform("TwoLayerResSynthesis", res_type="d2s")
  assert flops_per_pixel(d2s, 16) == 2 * (
    (169 * 320 * 12 + 320 * 12 * 64) / 256 + (12**2 + 25 * 12 * 3) / 4
  )
  offset = make_transform("JPEGLikeSynthesis", use_offset=True)
  assert flops_per_pixel(offset, 16) == 2 * 321 * 3
  assert offset.num_parameters() == 16**2 * 321 * 3 + 3
  hyper = make_transform("JPEGLikeHyperSynthesis")
  assert flops_per_pixel(hyper, 64) == 2 * 36 * 320 * 640 / 64**2


def test_mbt2018_layer_by_layer():
  """Plain arithmetic for both conventions, with other channels, widths that differ everywhere."""
  n, m = 24, 40
  kernels = 25 * (3 * n / 2**2 + n * n / 4**2 + n * n / 8**2 + n * m / 16**2)
  gammas = n * n * (1 / 2**2 + 1 / 4**2 + 1 / 8**2)
  # A bias for each value; beta and a division for each value of the three GDNs.
  biases = n / 2**2 + n / 4**2 + n / 8**2 + m / 16**2
  gdns = 2 * n * (1 / 2**2 + 1 / 4**2 + 1 / 8**2)
  analysis = make_transform("MBT2018Analysis", channels_base=n, output_channels=m)
  assert flops_per_pixel(analysis) == 2 * (kernels + gammas)
  assert flops_per_pixel(analysis, elementwise=True) == 2 * (kernels + gammas) + biases + gdns
  # The mirror: the same products, its biases lie on the larger side.
  synthesis = make_transform("MBT2018Synthesis", channels_base=n, in_channels=m)
  biases = n / 8**2 + n / 4**2 + n / 2**2 + 3
  assert flops_per_pixel(synthesis, 16) == 2 * (kernels + gammas)
  assert flops_per_pixel(synthesis, 16, elementwise=True) == 2 * (kernels + gammas) + biases + gdns


def test_hyper_layer_by_layer():
  n = 40
  analysis = make_transform("HyperAnalysis", bottleneck_size=n)
  products = 2 * n * n * (9 / 16**2 + 25 / 32**2 + 25 / 64**2)
  assert flops_per_pixel(analysis, 16) == products
  biases = n * (1 / 16**2 + 1 / 32**2 + 1 / 64**2)
  assert flops_per_pixel(analysis, 16, elementwise=True) == products + biases
  synthesis = make_transform("HyperSynthesis", bottleneck_size=n)
  # A transposed layer's products are counted at its input's size.
  wide = 3 * n // 2
  products = 2 * (25 * n * n / 64**2 + 25 * n * wide / 32**2 + 9 * wide * 2 * n / 16**2)
  assert flops_per_pixel(synthesis, 64) == products
  biases = n / 32**2 + wide / 16**2 + 2 * n / 16**2
  assert flops_per_pixel(synthesis, 64, elementwise=True) == products + biases


_PUBLISHED = {
  "mbt2018": ("mbt2018", "mbt2018", dict(f=187583, f_h=13452, g_h=30355, g=187585)),
  "jpegl": ("elic", "jpegl", dict(f=510846, f_h=13452, g_h=30355, g=2433)),
  "two_layer_syn": ("elic", "two_layer_syn", dict(f=510846, f_h=13452, g_h=30355, g=10680)),
}


@pytest.mark.slow
@pytest.mark.parametrize("model", _PUBLISHED)
def test_published_tables_come_out_of_the_stages(model):
  analysis, synthesis, published = _PUBLISHED[model]
  transforms = {"f": _ANALYSIS[analysis], **_HYPER, "g": _SYNTHESIS[synthesis]}
  scales = {"f": 1, "f_h": 16, "g_h": 64, "g": 16}
  stages = {
    k: Stage(make_transform(name, **arguments), scales[k])
    for k, (name, arguments) in transforms.items()
  }
  for elementwise in (False, True):
    costs = profile_stages(stages, elementwise)
    assert list(costs) == ["f", "f_h", "g_h", "g"]
    for name, cost in costs.items():
      assert cost.flops_per_pixel == pytest.approx(published[name], rel=0.005)


def _profiled_by_tensorflow(transform, height, width):
  """FLOPs of the traced graph as TensorFlow's own profiler counts them."""
  spec = tf.TensorSpec([1, height, width, transform.in_channels])
  graph = tf.function(lambda x: transform(x)).get_concrete_function(spec).graph
  options = tf.compat.v1.profiler.ProfileOptionBuilder.float_operation()
  options["output"] = "none"
  return tf.compat.v1.profiler.profile(graph, options=options).total_float_ops


@pytest.mark.slow
@pytest.mark.parametrize(
  "name,arguments,scale",
  [
    ("BLS2017Analysis", dict(num_filters=64), 1),
    ("BLS2017Synthesis", dict(num_filters=64), 16),
    (*_ANALYSIS["mbt2018"], 1),
    (*_SYNTHESIS["mbt2018"], 16),
    (*_ANALYSIS["elic"], 1),
    ("ElicSynthesis", {}, 16),
    ("CNNAnalysis", {}, 1),
    ("CNNSynthesis", {}, 16),
    (*_HYPER["f_h"], 16),
    (*_HYPER["g_h"], 64),
    ("JPEGLikeHyperSynthesis", {}, 64),
    (*_SYNTHESIS["jpegl"], 16),
    (*_SYNTHESIS["two_layer_syn"], 16),
    ("TwoLayerResSynthesis", dict(res_type="d2s"), 16),
    ("TwoLayerSynthesis", {}, 16),
  ],
)
def test_tensorflows_profiler_counts_the_same(name, arguments, scale):
  """Nothing is run, so the image may be large: what is computed beyond its edges, and once an
  image, then hardly counts."""
  transform, side = make_transform(name, **arguments), 8192
  counted = _profiled_by_tensorflow(transform, side // scale, side // scale) / side**2
  assert flops_per_pixel(transform, scale, elementwise=True) == pytest.approx(counted, rel=0.003)


def test_calls_take_turns_and_the_warm_up_does_not_count():
  order = []

  def call(name, seconds):
    order.append(name)
    time.sleep(0.1 if len(order) <= 2 else seconds)
    return {"y": tf.ones([2]), "empty": None}

  seconds = time_in_turn(
    {"a": lambda: call("a", 0.001), "b": lambda: call("b", 0.02)}, repeats=3, warmup=1
  )
  assert order == ["a", "b"] * 4
  assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
  assert min(seconds["b"]) >= 0.02 and min(seconds["a"]) < 0.1


class _FourStages(FactorizedCodec):
  """A codec with a hyperprior's stages, whose coding takes known times."""

  def stages(self):
    f, g = (super(_FourStages, self).stages()[name] for name in "fg")
    f_h = Stage(make_transform("HyperAnalysis", bottleneck_size=4), 16)
    g_h = Stage(make_transform("HyperSynthesis", bottleneck_size=4), 64)
    return {"f": f, "f_h": f_h, "g_h": g_h, "g": g}

  def pack(self, latents, size):
    time.sleep(0.02)
    return super().pack(latents, size)

  def unpack(self, data):
    time.sleep(0.03)
    return super().unpack(data)


def _codec():
  codec = _FourStages(
    make_transform("BLS2017Analysis", num_filters=4),
    make_transform("BLS2017Synthesis", num_filters=4),
  )
  codec.prepare()
  return codec


def test_profile_of_a_codec():
  codec, image = _codec(), picture(50, 70)
  profile = profiling.profile_codec(codec, image, repeats=3, matrix_size=64)
  assert json.loads(json.dumps(profile)) == profile
  assert profile["size"] == [50, 70] and profile["repeats"] == 3
  assert profile["num_bytes"] == len(codec.compress(image))
  assert list(profile["stages"]) == ["f", "f_h", "g_h", "g"]
  expected = profile_stages(codec.stages(), elementwise=True)
  products = profile_stages(codec.stages())
  for name, stage in profile["stages"].items():
    assert stage["flops_per_pixel"] == expected[name].flops_per_pixel
    assert stage["flops_per_pixel_products"] == products[name].flops_per_pixel
    assert stage["num_parameters"] == expected[name].num_parameters
    assert stage["seconds"] > 0
  # GFLOP/s are of the padded picture: 64 x 80 pixels.
  f = profile["stages"]["f"]
  assert f["gflops"] * f["seconds"] * 1e9 == pytest.approx(
    f["flops_per_pixel_products"] * 64 * 80, rel=1e-6
  )
  assert sum(stage["share"] for stage in profile["stages"].values()) == pytest.approx(1)
  assert profile["decoder_flops_per_pixel"] == (
    expected["g"].flops_per_pixel + expected["g_h"].flops_per_pixel
  )
  seconds = profile["seconds"]
  assert 0.02 <= seconds["pack"] < seconds["compress"]
  assert 0.03 <= seconds["unpack"] < seconds["decompress"]
  assert min(seconds.values()) > 0
  low, high = profile["matmul_gflops_range"]
  assert 0 < low <= profile["matmul_gflops"] <= high
  assert profile["device"]


def test_table_shows_every_stage_and_step():
  profile = {
    "size": [512, 768],
    "num_bytes": 24576,
    "device": "a machine",
    "repeats": 5,
    "matmul_gflops": 200.0,
    "matmul_gflops_range": [190.0, 210.0],
    "stages": {
      "g": {
        "flops_per_pixel": 187584.0,
        "flops_per_pixel_products": 187392.0,
        "num_parameters": 3505347,
        "seconds": 0.7368,
        "share": 1.0,
        "gflops": 100.0,
      }
    },
    "seconds": {
      "infer": 3.0,
      "pack": 1.0,
      "compress": 4.0,
      "unpack": 0.5,
      "synthesize": 1.25,
      "to_image": 0.25,
      "decompress": 2.0,
    },
  }
  lines = [line.split() for line in profiling.table(profile).splitlines()]
  assert ["g", "187,584", "187,392", "3,505,347", "0.7368", "100.0%", "100.0", "50.0%"] in lines
  assert ["pack", "1.0000", "25.0%"] in lines and ["compress", "4.0000", "100.0%"] in lines
  assert ["unpack", "0.5000", "25.0%"] in lines and ["decompress", "2.0000", "100.0%"] in lines
  assert ["24576", "bytes,", "0.500", "bits", "per", "pixel"] in lines
  assert "busy" not in profiling.table(profile)
  assert "busy" in profiling.table({**profile, "matmul_gflops_range": [150.0, 210.0]})
