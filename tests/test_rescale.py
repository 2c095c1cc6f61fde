"""Latents on another grid: the same pictures and the same relative densities."""

import numpy as np
import pytest
import tensorflow as tf

from common import entropy, rescale, transforms
from factorized import codec as factorized_codec
from mshyper import codec as mshyper_codec

FACTOR = 1.7
CHANNELS = 6
ANALYSIS = dict(name="BLS2017Analysis", num_filters=4, output_channels=CHANNELS)
SYNTHESES = [
  dict(name="BLS2017Synthesis", num_filters=4, in_channels=CHANNELS),
  dict(name="JPEGLikeSynthesis", in_channels=CHANNELS, kernel_size=18, use_offset=True),
  dict(name="TwoLayerSynthesis", in_channels=CHANNELS),
  dict(name="TwoLayerResSynthesis", in_channels=CHANNELS),
  dict(name="TwoLayerResSynthesis", in_channels=CHANNELS, res_type="d2s"),
]
HYPER_SYNTHESES = [
  dict(name="HyperSynthesis", in_channels=4, bottleneck_size=CHANNELS),
  dict(name="JPEGLikeHyperSynthesis", in_channels=4, bottleneck_size=CHANNELS),
]


def _randomised(codec):
  """Biases too: a bias of zero shows nothing."""
  random = np.random.default_rng(0)
  for variable in codec.trainable_variables:
    if "bias" in variable.name:
      variable.assign(variable + random.normal(0, 0.1, variable.shape))
  return codec


def _hyperprior(synthesis, hyper_synthesis):
  return _randomised(
    mshyper_codec.HyperpriorCodec(
      analysis=transforms.make_transform(**ANALYSIS),
      synthesis=transforms.make_transform(**synthesis),
      hyper_analysis=transforms.make_transform(
        "HyperAnalysis", in_channels=CHANNELS, bottleneck_size=4
      ),
      hyper_synthesis=transforms.make_transform(**hyper_synthesis),
    )
  )


@pytest.mark.parametrize("hyper_synthesis", HYPER_SYNTHESES, ids=lambda s: s["name"])
@pytest.mark.parametrize("synthesis", SYNTHESES, ids=lambda s: "-".join(map(str, s.values())))
def test_a_hyperprior_is_the_same_on_a_finer_grid(synthesis, hyper_synthesis):
  codec = _hyperprior(synthesis, hyper_synthesis)
  x = tf.constant(np.random.default_rng(1).uniform(0, 255, [1, 64, 64, 3]), tf.float32)
  before = codec.infer(x)
  pictures = codec.synthesize({"y": before["y"].loc})
  mean, log_scale = np.split(codec.hyper_synthesis(before["z"].loc), 2, axis=-1)
  codec.rescale(FACTOR)
  after = codec.infer(x)
  close = dict(rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(after["y"].loc, FACTOR * before["y"].loc, **close)
  np.testing.assert_allclose(after["z"].loc, before["z"].loc, **close)
  np.testing.assert_allclose(codec.synthesize({"y": after["y"].loc}), pictures, rtol=1e-4, atol=0.1)
  new_mean, new_log_scale = np.split(codec.hyper_synthesis(after["z"].loc), 2, axis=-1)
  np.testing.assert_allclose(new_mean, FACTOR * mean, **close)
  np.testing.assert_allclose(new_log_scale, log_scale + np.log(FACTOR), **close)


def test_a_factorized_prior_is_stretched_with_its_latents():
  codec = _randomised(
    factorized_codec.FactorizedCodec(
      transforms.make_transform(**ANALYSIS), transforms.make_transform(**SYNTHESES[0])
    )
  )
  x = tf.constant(np.random.default_rng(1).uniform(0, 255, [1, 32, 32, 3]), tf.float32)
  before, points = codec.infer(x)["y"].loc, np.random.default_rng(2).normal(0, 5, [9, CHANNELS])
  pictures, logits = codec.synthesize({"y": before}), codec.prior._logits_float64()(points)
  codec.rescale(FACTOR)
  after = codec.infer(x)["y"].loc
  np.testing.assert_allclose(after, FACTOR * before, rtol=1e-4, atol=1e-4)
  np.testing.assert_allclose(codec.synthesize({"y": after}), pictures, rtol=1e-4, atol=0.1)
  stretched = codec.prior._logits_float64()(FACTOR * points)
  np.testing.assert_allclose(stretched, logits, rtol=1e-4, atol=1e-4)


def test_what_cannot_absorb_the_factor_is_refused_with_the_option_to_change():
  attention = transforms.make_transform(
    "ElicAnalysis", channels=(4, 4, 4, CHANNELS), num_residual_blocks=1
  )
  with pytest.raises(ValueError, match=r"ElicAnalysis does not end .*warm_start_rescale=False"):
    rescale.multiply_outputs(attention, np.ones(CHANNELS))
  synthesis = transforms.make_transform(
    "ElicSynthesis", channels=(4, 4, 4, CHANNELS), num_residual_blocks=1
  )
  with pytest.raises(ValueError, match="ElicSynthesis does not begin"):
    rescale.divide_inputs(synthesis, 2.0)


def test_the_factor_is_that_of_the_step_that_suits_a_lambda():
  from common import dct_init

  assert rescale.factor(0.01, 0.04) == pytest.approx(2.0)
  assert rescale.factor(0.01, 0.003) == pytest.approx(dct_init.step(0.01) / dct_init.step(0.003))


def test_stretching_keeps_the_density_a_density():
  prior = entropy.FactorizedPrior(3)
  prior.stretch(4.0)
  prior.prepare()
  assert np.all(np.isfinite(prior.bits(tf.zeros([1, 2, 2, 3]))))
