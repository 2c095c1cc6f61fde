"""Initial kernels: analysis and synthesis together are a truncated 16x16 block DCT."""

import functools

import numpy as np
import pytest
import scipy.fft
import tensorflow as tf

from common import data, dct_init, transforms
from common.layers import Conv2D, Conv2DTranspose, Sequential

STEP = dct_init.step(0.01)
LATENTS = 320

# As the configs have them. Widths of 192 or 256 keep all that 320 latents need; leaky ReLUs take
# two channels for each.
ANALYSES = {
  "bls": dict(name="BLS2017Analysis", num_filters=96, output_channels=320, gdn_gamma_init=0.01),
  "mbt": dict(name="MBT2018Analysis", channels_base=192, output_channels=320, gdn_gamma_init=0.01),
  "mbt, gamma 0": dict(
    name="MBT2018Analysis", channels_base=192, output_channels=320, gdn_gamma_init=0.0
  ),
  "cnn": dict(name="CNNAnalysis", channels_base=256, output_channels=320),
  "cnn, all": dict(name="CNNAnalysis", channels_base=384, output_channels=320),
  "cnn, relu": dict(
    name="CNNAnalysis", channels_base=384, output_channels=320, activation_type="relu"
  ),
  "elic": dict(name="ElicAnalysis", channels=(192, 192, 192, 320), num_residual_blocks=1),
}
SYNTHESES = {
  "bls": dict(name="BLS2017Synthesis", num_filters=96, in_channels=320, gdn_gamma_init=0.01),
  "mbt": dict(name="MBT2018Synthesis", channels_base=192, in_channels=320, gdn_gamma_init=0.01),
  "mbt, gamma 0": dict(
    name="MBT2018Synthesis", channels_base=192, in_channels=320, gdn_gamma_init=0.0
  ),
  "cnn": dict(name="CNNSynthesis", channels_base=384, in_channels=320),
  "elic": dict(name="ElicSynthesis", num_residual_blocks=1),
  "jpeg 16": dict(name="JPEGLikeSynthesis", kernel_size=16),
  "jpeg 18": dict(name="JPEGLikeSynthesis", kernel_size=18),
  "jpeg 18, offset": dict(name="JPEGLikeSynthesis", kernel_size=18, use_offset=True),
  "two layers": dict(name="TwoLayerSynthesis", channels=(24, 3), gdn_gamma_init=0.01),
  "two layers, gamma 0": dict(name="TwoLayerSynthesis", channels=(12, 3), gdn_gamma_init=0.0),
  "two layers, conv": dict(name="TwoLayerResSynthesis", gdn_gamma_init=0.01),
  "two layers, d2s": dict(name="TwoLayerResSynthesis", res_type="d2s", gdn_gamma_init=0.01),
  "two layers, d2s, gamma 0": dict(name="TwoLayerResSynthesis", res_type="d2s", gdn_gamma_init=0.0),
}
PAIRS = [
  ("bls", "bls"),
  ("mbt", "mbt"),
  ("cnn", "two layers"),
  ("cnn", "cnn"),
  ("elic", "jpeg 16"),
  ("elic", "jpeg 18"),
  ("elic", "jpeg 18, offset"),
  ("elic", "two layers, conv"),
  ("elic", "two layers, d2s"),
  ("elic", "elic"),
]
# Those in which nothing but convolutions is left.
EXACT_PAIRS = [
  ("mbt, gamma 0", "mbt, gamma 0"),
  ("cnn, all", "two layers, gamma 0"),
  ("cnn, all", "cnn"),
  ("cnn, relu", "jpeg 16"),
  ("elic", "two layers, d2s, gamma 0"),
  ("elic", "two layers, conv"),  # The activated half starts at zero.
  ("elic", "jpeg 18, offset"),
  ("elic", "elic"),
]


@functools.lru_cache(maxsize=1)
def _photograph():
  """[128, 160, 3] in 0..255."""
  _, image = data.load_eval_images("sample")[0]
  return image[60:188, 100:260].astype(np.float64)


@functools.lru_cache(maxsize=1)
def _block_dct():
  """The orthonormal DCT of 16x16 blocks of the opponent planes: [rows, columns, colour, v, u]."""
  planes = (_photograph() - 127.5) @ _opponent().T
  height, width, _ = planes.shape
  blocks = planes.reshape(height // 16, 16, width // 16, 16, 3).transpose(0, 2, 4, 1, 3)
  return scipy.fft.dctn(blocks, axes=(-2, -1), norm="ortho")


def _opponent():
  """Orthonormal: grey; red - blue; green against both."""
  rows = np.array([[1, 1, 1], [1, 0, -1], [1, -2, 1]])
  return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@functools.lru_cache(maxsize=1)
def _truncated():
  """The photograph from the LATENTS most useful coefficients of its blocks."""
  coefficients = _block_dct()
  kept = np.zeros_like(coefficients)
  for f in dct_init.frequencies(16, LATENTS):
    kept[..., f.colour, f.v, f.u] = coefficients[..., f.colour, f.v, f.u]
  blocks = scipy.fft.idctn(kept, axes=(-2, -1), norm="ortho")
  return blocks.transpose(0, 3, 1, 4, 2).reshape(_photograph().shape) @ _opponent() + 127.5


def _psnr(a):
  return 10 * np.log10(255**2 / np.mean((a - _photograph()) ** 2))


def _walk(analysis, synthesis, **options):
  """Latents and reconstruction of the photograph, not quantized."""
  tf.random.set_seed(0)
  f, g = transforms.from_config(ANALYSES[analysis]), transforms.from_config(SYNTHESES[synthesis])
  dct_init.initialise(f, g, STEP, **options)
  y = f(tf.constant(_photograph()[None] / 255 - 0.5, tf.float32))
  return y.numpy()[0], (g(y).numpy()[0] + 0.5) * 255


def test_the_truncated_dct_is_a_good_picture():
  assert _psnr(_truncated()) > 42


@pytest.mark.slow
@pytest.mark.parametrize("analysis,synthesis", PAIRS, ids=map(" - ".join, PAIRS))
def test_a_photograph_comes_back_as_from_a_truncated_dct(analysis, synthesis):
  _, x_hat = _walk(analysis, synthesis)
  assert _psnr(x_hat) > max(40, _psnr(_truncated()) - 2)


@pytest.mark.slow
@pytest.mark.parametrize("analysis,synthesis", EXACT_PAIRS, ids=map(" - ".join, EXACT_PAIRS))
def test_without_noise_and_normalisation_it_is_the_truncated_dct(analysis, synthesis):
  _, x_hat = _walk(analysis, synthesis, noise=0.0)
  np.testing.assert_allclose(x_hat, _truncated(), atol=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("analysis", ["mbt, gamma 0", "cnn, all", "cnn, relu", "elic"])
def test_latents_are_the_block_dcts_coefficients_in_steps(analysis):
  y, _ = _walk(analysis, "jpeg 16", noise=0.0)
  expected = _block_dct() / STEP
  for channel, f in enumerate(dct_init.frequencies(16, LATENTS)):
    np.testing.assert_allclose(
      y[..., channel], expected[..., f.colour, f.v, f.u], atol=2e-3, err_msg=str(f)
    )


def test_latents_with_noise_and_normalisation_are_near_them():
  y, _ = _walk("mbt", "mbt")
  expected = _block_dct()[..., 0, 0, 0] / STEP
  np.testing.assert_allclose(y[..., 0], expected, rtol=0.15, atol=0.5)


def test_the_synthesis_inverts_any_latents():
  """The other order: analysis(synthesis(y)) = y, as the DCT is orthonormal."""
  tf.random.set_seed(0)
  f = transforms.from_config(ANALYSES["elic"])
  g = transforms.from_config(SYNTHESES["two layers, conv"])
  dct_init.initialise(f, g, STEP, noise=0.0)
  y = np.random.default_rng(0).normal(0, 2, [1, 3, 4, LATENTS]).astype(np.float32)
  np.testing.assert_allclose(f(g(tf.constant(y))), y, atol=1e-3)


def test_fewer_latents_are_the_most_useful_ones():
  kept = dct_init.frequencies(16, 48)
  assert kept[0] == (0, 0, 0) and len(set(kept)) == 48
  assert dct_init.frequencies(16, LATENTS)[:48] == kept
  assert len(dct_init.frequencies(2, 100)) == 12  # No more than there are.
  grey, *colours = np.bincount([f.colour for f in kept], minlength=3)
  assert min(colours) > 0 and grey > sum(colours)
  # In the photograph they hold more than any other choice of the same kind would lose.
  energy = (_block_dct() ** 2).mean(axis=(0, 1))
  chosen = sum(energy[f] for f in kept)
  assert chosen > 0.95 * np.sort(energy.ravel())[-48:].sum()


@pytest.mark.parametrize("size", [1, 2, 8, 16])
def test_the_matrix_is_scipys_dct(size):
  np.testing.assert_allclose(
    dct_init.dct_matrix(size), scipy.fft.dct(np.eye(size), axis=0, norm="ortho"), atol=1e-12
  )


def test_the_step_is_the_best_at_high_rate():
  """Of a high-rate coder of three coefficients a pixel: -3 log2(step) bits, step^2 / 12 each."""
  for rd_lambda in (0.0025, 0.01, 0.08):
    steps = np.geomspace(1, 300, 4001)
    loss = -3 * np.log2(steps) + rd_lambda * steps**2 / 12
    assert dct_init.step(rd_lambda) == pytest.approx(steps[np.argmin(loss)], rel=0.01)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_kernels_and_noise_breaks_symmetries():
  kernels = []
  for seed in (0, 0, 1):
    f = transforms.from_config(ANALYSES["cnn"])
    g = transforms.from_config(SYNTHESES["two layers"])
    dct_init.initialise(f, g, STEP, seed=seed)
    kernels.append([v.numpy() for v in (f.layers[2].kernel, g.layers[0].kernel)])
  for a, b, c in zip(*kernels):
    np.testing.assert_array_equal(a, b)
    assert np.any(a != c)
  # The last channels of a layer that has more than the DCT needs.
  first = f.layers[0].kernel.numpy()
  assert len(np.unique(first[0, 0, 0, 24:])) > 200


@pytest.mark.parametrize(
  "analysis,synthesis,expected",
  [
    (
      lambda: Sequential([Conv2D(3, 8, 5, 4, activation="relu"), Conv2D(8, 8, 5, 4)]),
      lambda: Conv2DTranspose(8, 3, 16, 16),
      "does not know Conv2D",
    ),
    (
      lambda: Conv2D(3, 8, 16, 16),
      lambda: transforms.make_transform("HyperSynthesis", bottleneck_size=4, in_channels=8),
      "Conv2DTranspose without activation",
    ),
    (
      lambda: Sequential([transforms.from_config(SYNTHESES["jpeg 16"])]),
      lambda: Conv2DTranspose(8, 3, 16, 16),
      "does not know JPEGLikeSynthesis",
    ),
    (lambda: Conv2D(3, 8, 5, 8), lambda: Conv2DTranspose(8, 3, 8, 8), "does not cover a stride"),
    (lambda: Conv2D(3, 8, 8, 8), lambda: Conv2DTranspose(8, 3, 7, 8), "does not cover a stride"),
    (
      lambda: Conv2D(3, 8, 16, 8, origin=12),
      lambda: Conv2DTranspose(8, 3, 8, 8),
      "from -12 on does not cover",
    ),
    (lambda: Sequential([_gdn()]), lambda: Conv2DTranspose(3, 3, 1), "needs a transform of Conv2D"),
  ],
)
def test_what_it_cannot_initialise_is_named(analysis, synthesis, expected):
  with pytest.raises(ValueError, match=expected):
    dct_init.initialise(analysis(), synthesis(), STEP)


def _gdn():
  from common.layers import GDN

  return GDN(3)


def test_unknown_initial_values_list_the_known_ones():
  dct_init.check("dct")
  dct_init.check("random")
  with pytest.raises(ValueError, match=r"'haar'\. Known: random, dct"):
    dct_init.check("haar")
