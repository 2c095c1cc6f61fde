"""Quantizers: what each returns as (rate, decode), and that noise comes from the seed alone."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from common import quantizers

LOC = tf.constant(np.random.default_rng(0).normal(0, 3, [2, 4, 5, 6]), tf.float32)
OFFSET = tf.constant(np.linspace(-0.5, 0.5, 6), tf.float32)


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match="Known: mixedq, round, sga, ste, unoise"):
    quantizers.make_quantizer("rond")


def test_round_gives_the_nearest_grid_point_for_rate_and_decoder():
  rate, decode = quantizers.make_quantizer("round")()("y", LOC, OFFSET)
  integers = (decode - OFFSET).numpy()
  np.testing.assert_allclose(integers, np.round(integers), atol=1e-5)
  assert np.abs(decode - LOC).max() <= 0.5 + 1e-5
  np.testing.assert_array_equal(rate, decode)


def test_unoise_is_uniform_and_the_same_for_both():
  loc = tf.zeros([1, 64, 64, 8])
  rate, decode = quantizers.make_quantizer("unoise")(seed=(0, 1))("y", loc, 0.0)
  np.testing.assert_array_equal(rate, decode)
  noise = rate.numpy().ravel()
  assert noise.min() >= -0.5 and noise.max() < 0.5
  assert abs(noise.mean()) < 0.01 and abs(noise.var() - 1 / 12) < 0.002


def test_mixedq_is_noisy_for_the_rate_and_rounded_for_the_decoder_with_its_gradient_passed():
  with tf.GradientTape() as tape:
    tape.watch(LOC)
    rate, decode = quantizers.make_quantizer("mixedq")(seed=(0, 1))("y", LOC, OFFSET)
    total = tf.reduce_sum(3.0 * decode)
  np.testing.assert_allclose(decode, tf.round(LOC - OFFSET) + OFFSET, atol=1e-5)
  assert np.abs(rate - decode).max() > 0.1
  np.testing.assert_allclose(tape.gradient(total, LOC), 3.0 * np.ones(LOC.shape))


@settings(max_examples=20, deadline=None)
@given(seed=st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)))
def test_noise_is_a_function_of_seed_and_latent_name(seed):
  def noise(seed, name):
    return quantizers.make_quantizer("unoise")(seed=seed)(name, LOC, OFFSET).rate.numpy()

  np.testing.assert_array_equal(noise(seed, "y"), noise(seed, "y"))
  assert np.any(noise(seed, "y") != noise(seed, "z"))
  assert np.any(noise(seed, "y") != noise((seed[0], (seed[1] + 1) % 2**31), "y"))


def test_sga_matches_the_two_class_relaxation_of_its_paper():
  """The mean of the sample over draws equals that of tfp's relaxed one-hot at the same tau."""
  import tensorflow_probability as tfp

  r, tau, n = 0.3, 0.4, 200_000
  v = tf.fill([1, 1, n, 1], 2.0 + r)
  sample = quantizers.make_quantizer("sga")(seed=(3, 4), temperature=tau)("y", v, 0.0).rate
  logits = tf.constant([-np.arctanh(r) / tau, -np.arctanh(1 - r) / tau], tf.float32)
  relaxed = tfp.distributions.RelaxedOneHotCategorical(tau, logits=logits).sample(n, seed=5)
  expected = 2.0 + relaxed[:, 1].numpy()
  got = sample.numpy().ravel()
  assert got.min() >= 2 and got.max() <= 3
  assert abs(got.mean() - expected.mean()) < 0.005
  assert abs(got.std() - expected.std()) < 0.005


def test_sga_becomes_rounding_as_the_temperature_falls():
  loc = LOC + 0.0
  sample = quantizers.make_quantizer("sga")(seed=(3, 4), temperature=1e-6)("y", loc, OFFSET).decode
  fraction = np.abs((loc - OFFSET) - np.floor(loc - OFFSET) - 0.5)
  clear = fraction > 0.01  # Away from the tie.
  expected = (tf.round(loc - OFFSET) + OFFSET).numpy()
  np.testing.assert_allclose(sample.numpy()[clear], expected[clear], atol=1e-4)


def test_sga_has_finite_gradients_on_the_grid_itself():
  loc = tf.constant(np.arange(-3, 4), tf.float32)
  with tf.GradientTape() as tape:
    tape.watch(loc)
    out = quantizers.make_quantizer("sga")(seed=(0, 0), temperature=0.5)("y", loc, 0.0).rate
  assert np.all(np.isfinite(tape.gradient(out, loc)))


def test_noise_without_a_seed_is_refused():
  with pytest.raises(ValueError, match="give it a seed"):
    quantizers.make_quantizer("unoise")()("y", LOC, OFFSET)
