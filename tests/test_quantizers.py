"""Quantizers: what each returns as (rate, decode), and that noise comes from the seed alone."""

import numpy as np
import pytest
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from common import quantizers

TWO_POINTS = {
  "danneal": lambda d: -np.arctanh(d),
  "sga": lambda d: -np.arctanh(d),
  "sga_linear": lambda d: np.log(1 - d),
  "sga_cosine": lambda d: np.log(np.cos(np.pi * d / 2) ** 2),
  "sga_ssl": lambda d: np.log(1 / (1 + np.exp(2.3 * np.log(d / (1 - d))))),
}
THREE_POINTS = {
  "sga3_linear": lambda d: 1.5 * np.log(1 - d),
  "sga3_cosine": lambda d: np.log(np.cos(np.pi * d / 2) ** 2),
  "sga3_ssl": lambda d: 1.5 * np.log(1 / (1 + np.exp(1.4 * np.log(d / (1 - d))))),
}
ANNEALED = sorted({*TWO_POINTS, *THREE_POINTS, "soft_round"})
DRAWN = [m for m in ANNEALED if m != "danneal"]

LOC = tf.constant(np.random.default_rng(0).normal(0, 3, [2, 4, 5, 6]), tf.float32)
OFFSET = tf.constant(np.linspace(-0.5, 0.5, 6), tf.float32)


def test_unknown_name_lists_the_known_ones():
  with pytest.raises(ValueError, match=r"Known: danneal, gnoise, mixedq, round, sga, .*unoise"):
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


def test_noise_without_a_seed_is_refused():
  with pytest.raises(ValueError, match="give it a seed"):
    quantizers.make_quantizer("unoise")()("y", LOC, OFFSET)


def _sample(method, v, tau, seed=(3, 4), offset=0.0, **options):
  make = quantizers.make_quantizer(method, **options)
  rate, decode = make(seed=seed, temperature=tau)("y", v, offset)
  np.testing.assert_array_equal(rate, decode)
  return rate


def _gumbel_softmax(logits, tau, n):
  """Plain samples of weights [n, classes]."""
  noise = np.random.default_rng(7).gumbel(size=[n, len(logits)])
  scores = (logits / tau + noise) / tau
  scores = np.exp(scores - scores.max(axis=1, keepdims=True))
  return scores / scores.sum(axis=1, keepdims=True)


def _assert_same_distribution(got, expected):
  """Of two large samples: five standard errors of the mean, and the quantiles' levels."""
  error = 5 * np.hypot(got.std() / np.sqrt(got.size), expected.std() / np.sqrt(expected.size))
  assert abs(got.mean() - expected.mean()) < error
  for level in (0.1, 0.25, 0.5, 0.75, 0.9):
    at = np.quantile(expected, level)
    # Samples that saturate at a grid point are equal only up to rounding.
    assert np.mean(got < at - 1e-4) - 0.01 < level < np.mean(got < at + 1e-4) + 0.01


def test_those_of_iterative_inference_are_known_and_have_gradients():
  assert set(quantizers.FOR_ITERATIVE_INFERENCE) == {*ANNEALED, "ste", "unoise"}
  for name in quantizers.FOR_ITERATIVE_INFERENCE:
    with tf.GradientTape() as tape:
      tape.watch(LOC)
      quantized = quantizers.make_quantizer(name)(seed=(0, 1), temperature=0.5)("y", LOC, OFFSET)
      total = tf.reduce_sum(quantized.rate) + tf.reduce_sum(quantized.decode)
    assert np.mean(tape.gradient(total, LOC) != 0) > 0.5, name


@pytest.mark.parametrize("method", [m for m in TWO_POINTS if m != "danneal"])
@pytest.mark.parametrize("r", [0.05, 0.4, 0.8])
def test_two_classes_are_drawn_as_their_formula_says(method, r):
  tau, n = 0.6, 40_000
  got = _sample(method, tf.fill([1, 1, n, 1], -3.0 + r), tau).numpy().ravel() + 3
  logits = TWO_POINTS[method](np.array([r, 1 - r]))
  _assert_same_distribution(got, _gumbel_softmax(logits, tau, n)[:, 1])
  up = 1 / (1 + np.exp((logits[0] - logits[1]) / tau))
  assert abs(np.mean(got > 0.5) - up) < 5 * np.sqrt(up * (1 - up) / n) + 1e-4


@pytest.mark.parametrize("method", THREE_POINTS)
@pytest.mark.parametrize("w", [-0.45, -0.1, 0.3])
def test_three_classes_are_drawn_as_their_formula_says(method, w):
  tau, n = 0.8, 40_000
  got = _sample(method, tf.fill([1, 1, n, 1], 5.0 + w), tau).numpy().ravel() - 5
  distance = np.minimum(0.98 * np.abs(w - np.array([-1, 0, 1])), 1 - 1e-5)
  weights = _gumbel_softmax(THREE_POINTS[method](distance), tau, n)
  _assert_same_distribution(got, weights @ [-1, 0, 1])


def test_deterministic_annealing_is_the_expected_hard_rounding():
  v, tau = LOC.numpy().astype(np.float64), 0.3
  r = v - np.floor(v)
  f = [np.exp(TWO_POINTS["danneal"](d) / tau) for d in (r, 1 - r)]
  expected = np.floor(v) + f[1] / (f[0] + f[1])
  np.testing.assert_allclose(_sample("danneal", LOC, tau, seed=None), expected, atol=1e-4)


def test_linear_logits_at_temperature_one_round_without_bias():
  v = tf.fill([1, 1, 100_000, 1], 0.37)
  up = np.mean(_sample("sga_linear", v, 1.0).numpy() > 0.5)
  assert abs(up - 0.37) < 0.01


def test_ssl_of_scale_one_is_linear():
  ssl = _sample("sga_ssl", LOC, 0.5, sigmoid_scale=1.0)
  np.testing.assert_allclose(ssl, _sample("sga_linear", LOC, 0.5), atol=1e-4)


def test_three_classes_follow_their_parameters():
  v = tf.fill([1, 1, 20_000, 1], 0.1)
  spread = {
    power: _sample("sga3_linear", v, 1.0, three_class_power=power).numpy().std()
    for power in (1.0, 4.0)
  }
  assert spread[4.0] < 0.7 * spread[1.0]
  far = {
    factor: np.mean(_sample("sga3_linear", v, 1.0, three_class_factor=factor).numpy() < -0.5)
    for factor in (0.98, 0.5)
  }
  assert far[0.5] > 2 * far[0.98]  # The farther neighbour becomes more likely.


def test_soft_rounding_matches_a_plain_implementation():
  tau, seed = 0.2, (5, 6)
  alpha = 1 / tau
  noise = quantizers.make_quantizer("unoise")(seed=seed)("y", tf.zeros_like(LOC), 0.0).rate.numpy()
  x = LOC.numpy().astype(np.float64)
  r = x - np.floor(x) - 0.5
  t = np.floor(x) + 0.5 + np.tanh(alpha * r) / (2 * np.tanh(alpha / 2)) + noise - 0.5
  inverse = np.floor(t) + 0.5 + np.arctanh(2 * np.tanh(alpha / 2) * (t - np.floor(t) - 0.5)) / alpha
  np.testing.assert_allclose(_sample("soft_round", LOC, tau, seed=seed), inverse + 0.5, atol=1e-4)


def test_soft_rounding_gives_the_conditional_expectation():
  """The mean of x over all that gave one result is that result."""
  x = np.random.default_rng(0).uniform(0, 20, [1, 500, 400, 1]).astype(np.float32)
  s = _sample("soft_round", tf.constant(x), 0.25).numpy()
  inner = (s > 1) & (s < 19)
  bins = (np.mod(s, 1) * 20).astype(int)
  for i in range(20):
    here = inner & (bins == i)
    if here.sum() > 100:
      assert abs(np.mean(x[here] - s[here])) < 5 * 0.3 / np.sqrt(here.sum())


def test_soft_rounding_is_nearly_uniform_noise_at_high_temperature():
  noisy = quantizers.make_quantizer("unoise")(seed=(3, 4))("y", LOC, OFFSET).rate
  np.testing.assert_allclose(_sample("soft_round", LOC, 20.0, offset=OFFSET), noisy, atol=1e-3)


@pytest.mark.parametrize("method", ANNEALED)
@settings(max_examples=15, deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=8), seed=st.integers(0))
def test_it_becomes_rounding_as_the_temperature_falls(method, values, seed):
  v = np.array(values, np.float32)
  v = v[np.abs(v - np.floor(v) - 0.5) > 0.01]  # Away from ties.
  loc = tf.constant(v[:, None, None, None]) + OFFSET
  v = loc - OFFSET
  for tau in (1e-4, 1e-8):
    sample = _sample(method, loc, tau, seed=(1, seed % 2**31), offset=OFFSET)
    np.testing.assert_allclose(sample - OFFSET, np.round(v), atol=2e-3)


@pytest.mark.parametrize("method", ANNEALED)
@settings(max_examples=15, deadline=None)
@given(tau=st.floats(1e-8, 1), seed=st.integers(0, 2**31 - 1))
def test_samples_stay_between_the_grid_points_of_the_method(method, tau, seed):
  sample = _sample(method, LOC, tau, seed=(seed, 1), offset=OFFSET) - OFFSET
  v = LOC - OFFSET
  if method in TWO_POINTS:
    low, high = np.floor(v), np.ceil(v)
  elif method in THREE_POINTS:
    low, high = np.round(v) - 1, np.round(v) + 1
  else:
    low, high = np.floor(v) - 0.5, np.ceil(v) + 0.5
  assert np.all(sample >= low - 1e-5) and np.all(sample <= high + 1e-5)


# Differences in float64; the functions are the same.
SMOOTH = np.random.default_rng(1).integers(-4, 5, [2, 3, 4, 6]) + np.tile(
  [-0.43, -0.2, -0.05, 0.1, 0.3, 0.46], [2, 3, 4, 1]
)


@pytest.mark.parametrize("method", [*ANNEALED, "unoise"])
@pytest.mark.parametrize("tau", [0.5, 0.15])
def test_gradients_are_those_of_finite_differences(method, tau):
  loc, offset, weights = tf.constant(SMOOTH + 0.1), tf.constant(np.full(6, 0.1)), SMOOTH + 5.0
  full = tf.zeros_like(loc) + offset

  def forward(loc, offset):
    return _sample(method, loc, tau, offset=offset)

  with tf.GradientTape(persistent=True) as tape:
    tape.watch([loc, offset, full])
    by_channel = tf.reduce_sum(weights * forward(loc, offset))
    by_element = tf.reduce_sum(weights * forward(loc, full))
  step = 1e-6
  in_loc = weights * (forward(loc + step, full) - forward(loc - step, full)) / (2 * step)
  in_offset = weights * (forward(loc, full + step) - forward(loc, full - step)) / (2 * step)
  close = dict(rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(tape.gradient(by_channel, loc), in_loc, **close)
  np.testing.assert_allclose(tape.gradient(by_element, loc), in_loc, **close)
  if method != "unoise":  # It does not read the offset.
    np.testing.assert_allclose(tape.gradient(by_element, full), in_offset, **close)
    in_channel = np.sum(in_offset, axis=(0, 1, 2))
    np.testing.assert_allclose(tape.gradient(by_channel, offset), in_channel, **close)


@pytest.mark.parametrize("method", sorted(quantizers.FOR_ITERATIVE_INFERENCE))
def test_an_offset_by_channel_and_the_same_as_a_tensor_give_the_same(method):
  full = tf.zeros_like(LOC) + OFFSET
  np.testing.assert_array_equal(*(_sample(method, LOC, 0.4, offset=o) for o in (OFFSET, full)))


@pytest.mark.parametrize("method", ANNEALED)
@pytest.mark.parametrize("tau", [1.0, 0.3, 1e-3, 1e-8])
def test_values_and_gradients_are_finite_on_the_grid_at_ties_and_far_out(method, tau):
  tiny = np.float32(1e-9)
  special = [0.0, -0.0, 1.0, -2.0, 0.5, -0.5, 1.5, tiny, -tiny, np.nextafter(np.float32(1), 0)]
  far = [1e6, 1e6 + 0.0625, -1e6 - 0.5, 1e6 + 0.9375, 3e7, -1e20]
  loc = tf.constant(np.tile(np.float32(special + far)[:, None], [1, 64]))
  offset = tf.zeros_like(loc)
  with tf.GradientTape() as tape:
    tape.watch([loc, offset])
    sample = _sample(method, loc, tau, offset=offset)
  assert np.all(np.isfinite(sample))
  assert np.all(np.abs(sample - loc)[: len(special)] <= 2)
  for gradient in tape.gradient(sample, [loc, offset]):
    assert np.all(np.isfinite(np.square(gradient)))  # Adam squares them.


@pytest.mark.parametrize("method", [*DRAWN, "unoise"])
def test_shared_noise_makes_an_image_independent_of_its_batch(method):
  def sample(loc, share):
    make = quantizers.make_quantizer(method)
    return make(seed=(1, 2), temperature=0.5, share_noise=share)("y", loc, OFFSET).rate.numpy()

  twice = tf.concat([LOC, LOC[::-1]], axis=0)
  together = sample(twice, True)
  for i in range(4):
    np.testing.assert_allclose(together[i], sample(twice[i : i + 1], True)[0], atol=1e-6)
  same = tf.concat([LOC[:1], LOC[:1]], axis=0)
  own = sample(same, False)
  assert np.any(np.abs(own[0] - own[1]) > 0.1)  # Training draws for every image.


@pytest.mark.parametrize("method", ANNEALED)
def test_a_missing_temperature_or_seed_is_refused(method):
  with pytest.raises(ValueError, match="needs a temperature"):
    quantizers.make_quantizer(method)(seed=(0, 0))("y", LOC, OFFSET)
  if method in DRAWN:
    with pytest.raises(ValueError, match="give it a seed"):
      quantizers.make_quantizer(method)(temperature=0.5)("y", LOC, OFFSET)


def test_an_unknown_parameter_lists_the_methods_that_have_it():
  with pytest.raises(ValueError, match="'sigmoid_scale' belongs to: sga3_ssl, sga_ssl"):
    quantizers.make_quantizer("sga", sigmoid_scale=2.0)
  with pytest.raises(ValueError, match="It takes: sigmoid_scale;"):
    quantizers.make_quantizer("sga_ssl", scale=2.0)
