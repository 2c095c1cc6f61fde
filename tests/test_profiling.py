import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest
import tensorflow as tf

from common.layers import GDN, Conv2D, Conv2DTranspose
from common.profiling import Stage, flops_per_pixel, profile_stages, time_stage
from common.transforms import Sequential, make_transform


def _mbt2018_analysis():
  return Sequential(
    [
      Conv2D(3, 192, 5, 2),
      GDN(192),
      Conv2D(192, 192, 5, 2),
      GDN(192),
      Conv2D(192, 192, 5, 2),
      GDN(192),
      Conv2D(192, 320, 5, 2),
    ]
  )


def _mbt2018_synthesis():
  return Sequential(
    [
      Conv2DTranspose(320, 192, 5, 2),
      GDN(192, inverse=True),
      Conv2DTranspose(192, 192, 5, 2),
      GDN(192, inverse=True),
      Conv2DTranspose(192, 192, 5, 2),
      GDN(192, inverse=True),
      Conv2DTranspose(192, 3, 5, 2),
    ]
  )


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


# make -> scale, products, with elementwise operations, published.
@pytest.mark.parametrize(
  "make,scale,products,everything,published",
  [
    (_mbt2018_analysis, 1, 187392, 187582.25, 187583),
    (_mbt2018_synthesis, 16, 187392, 187584, 187585),
    (lambda: Conv2DTranspose(320, 3, 18, 16), 16, 2430, 2433, 2433),
  ],
)
def test_published_flops(make, scale, products, everything, published):
  transform = make()
  assert flops_per_pixel(transform, scale) == products
  assert flops_per_pixel(transform, scale, elementwise=True) == everything
  assert products == pytest.approx(published, rel=0.005)
  assert everything == pytest.approx(published, abs=1)


def test_published_number_of_parameters():
  assert Conv2DTranspose(320, 3, 18, 16).num_parameters() == 311043


def test_time_stage_excludes_the_warm_up_and_names_the_device():
  calls = []

  def stage(x):
    calls.append(x)
    return {"y": tf.ones([2]) * x, "empty": None}

  result = time_stage(stage, 3.0, repeats=4, warmup=2)
  assert calls == [3.0] * 6
  assert 0 < result.min_seconds <= result.median_seconds <= result.max_seconds
  assert result.device
