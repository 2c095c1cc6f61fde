"""The hyperprior's initial values: contrast in, log scales out, fitted to data."""

import numpy as np
import pytest
import tensorflow as tf

from common import data, hyper_init, quantizers, rd
from common.hyper import load
from common.transforms import make_transform
from mshyper.codec import build


def _latents(seed=0):
  """Noise of each channel's own mean and scale, four times as strong in one half of the picture."""
  random = np.random.default_rng(seed)
  y = random.normal(0, 1, [4, 32, 32, 12]) * np.linspace(0.5, 4, 12)
  y[:, :, 16:] *= 4
  return (y + np.linspace(-3, 3, 12)).astype(np.float32)


@pytest.fixture(scope="module")
def transforms():
  tf.keras.utils.set_random_seed(0)
  analysis = make_transform("HyperAnalysis", in_channels=12, bottleneck_size=10)
  synthesis = make_transform("HyperSynthesis", in_channels=10, bottleneck_size=12)
  hyper_init.initialise(analysis, synthesis, _latents())
  return analysis, synthesis


def test_scales_follow_the_contrast_of_latents_that_were_not_seen(transforms):
  analysis, synthesis = transforms
  y = _latents(seed=1)
  z = tf.round(analysis(y))
  mean, log_scale = np.split(synthesis(z).numpy(), 2, axis=-1)
  left, right = log_scale[:, 4:-4, 4:12], log_scale[:, 4:-4, 20:28]
  truth = np.log(np.linspace(0.5, 4, 12))
  np.testing.assert_allclose(left.mean(axis=(0, 1, 2)), truth, atol=0.4)
  np.testing.assert_allclose(right.mean(axis=(0, 1, 2)), truth + np.log(4), atol=0.4)
  np.testing.assert_allclose(mean.mean(axis=(0, 1, 2)), np.linspace(-3, 3, 12), atol=0.5)


def test_hyper_latents_are_small_integers_and_not_all_zero(transforms):
  z = transforms[0](_latents()).numpy()
  used = z.std(axis=(0, 1, 2)) > 1
  assert 3 <= used.sum() <= 10 and np.abs(z).max() < 20


def test_it_is_the_same_each_time():
  kernels = []
  for seed in (1, 2):
    tf.keras.utils.set_random_seed(seed)
    analysis = make_transform("HyperAnalysis", in_channels=12, bottleneck_size=10)
    synthesis = make_transform("HyperSynthesis", in_channels=10, bottleneck_size=12)
    hyper_init.initialise(analysis, synthesis, _latents())
    kernels.append([v.numpy() for v in (*analysis.variables, *synthesis.variables)])
  for first, second in zip(*kernels):
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
  ("analysis", "synthesis", "known"),
  [
    ("HyperAnalysis", "HyperSynthesis", True),
    ("HyperAnalysis", "JPEGLikeHyperSynthesis", False),
    ("HyperAnalysisSmall", "HyperSynthesisSmall", False),
  ],
)
def test_other_transforms_are_left_alone(analysis, synthesis, known):
  made = [make_transform(name, bottleneck_size=8) for name in (analysis, synthesis)]
  assert hyper_init.is_known(*made) == known


@pytest.mark.slow
def test_photographs_cost_fewer_bits_than_with_constant_scales():
  """Before any step of training, on a photograph that the fit did not see."""
  images = [image[:256, :256] for _, image in data.load_eval_images("sample")]
  images = [i for i in images if i.shape == (256, 256, 3)]
  bits = {}
  for name in ("HyperSynthesis", "JPEGLikeHyperSynthesis"):
    config = load("mshyper/configs/mbt2018.py:tiny").get_config().model_config
    config.hyper_synthesis.name = name
    tf.keras.utils.set_random_seed(0)
    codec = build(config)
    codec.calibrate(tf.constant(np.stack(images[1:]), tf.float32))
    codec.prepare()
    coded = codec.code(
      rd.infer(codec, rd.to_batch(images[0])), quantizers.make_quantizer("round")()
    )
    bits[name] = sum(float(b[0]) for b in coded.bits.values())
  assert bits["HyperSynthesis"] < 0.97 * bits["JPEGLikeHyperSynthesis"], bits


def test_latents_without_any_contrast_give_finite_weights():
  analysis = make_transform("HyperAnalysis", in_channels=12, bottleneck_size=10)
  synthesis = make_transform("HyperSynthesis", in_channels=10, bottleneck_size=12)
  hyper_init.initialise(analysis, synthesis, np.zeros([1, 4, 4, 12], np.float32))
  assert all(np.all(np.isfinite(v)) for v in (*analysis.variables, *synthesis.variables))
