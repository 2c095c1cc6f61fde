import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

from common.profiling import Stage, flops_per_pixel, profile_stages, time_stage
from common.transforms import make_transform


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


def test_time_stage_excludes_the_warm_up_and_names_the_device():
  calls = []

  def stage(x):
    calls.append(x)
    return {"y": tf.ones([2]) * x, "empty": None}

  result = time_stage(stage, 3.0, repeats=4, warmup=2)
  assert calls == [3.0] * 6
  assert 0 < result.min_seconds <= result.median_seconds <= result.max_seconds
  assert result.device
