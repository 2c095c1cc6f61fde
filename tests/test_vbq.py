"""The VAE, Variational Bayesian Quantization and its baselines, and their files."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import tracemalloc

import constriction
import hypothesis
import numpy as np
import pytest
import tensorflow as tf
from hypothesis import strategies as st

from common import artefacts, bitstream, cli, data, eval_lib, hyper, quantizers, rd, results, runs
from common.bitstream import BitstreamError
from common.codec import NotPreparedError
from factorized import eval as factorized_eval
from factorized import vae, vbq, vbq_eval
from factorized.codec import build
from tests import conftest

CONFIG = "factorized/configs/bls2017_vae.py:tiny"
SMALL = {
  "analysis.num_filters": 6,
  "analysis.output_channels": 12,
  "synthesis.num_filters": 6,
  "synthesis.in_channels": 6,
}


def _config(**overrides):
  config = hyper.load(CONFIG).get_config()
  hyper.set_values(config, {f"model_config.{k}": v for k, v in {**SMALL, **overrides}.items()})
  return config


def _samples(channels=3, size=400, seed=0):
  random = np.random.default_rng(seed)
  scale = 2.0 ** random.normal(size=[channels, 1])
  mean = random.laplace(size=[channels, size]) * scale + random.normal(size=[channels, 1])
  deviation = np.exp(random.normal(-2, 0.5, size=[channels, size]))
  return vbq.Samples(mean.astype(np.float32), deviation.astype(np.float32))


# --- The VAE -------------------------------------------------------------------------------------


def test_published_variance_is_the_published_lambda():
  assert vae.rd_lambda(0.001) == pytest.approx(0.0333, abs=1e-4)
  config = hyper.load("factorized/configs/bls2017_vae.py").get_config()
  assert config.model_config.rd_lambda == pytest.approx(vae.rd_lambda(0.001))
  config.model_config.likelihood_variance = 0.004
  assert config.model_config.rd_lambda == pytest.approx(vae.rd_lambda(0.004))


@pytest.mark.parametrize("learned", [False, True])
def test_loss_is_the_negative_elbo_in_bits_per_pixel(learned):
  """Written out in nats from the formulas, at the very sample that the loss took."""
  tf.keras.utils.set_random_seed(1)
  config = _config(learned_prior=learned)
  codec = build(config.model_config)
  x = tf.constant(np.stack([conftest.picture(32, 48, s) for s in range(2)]), tf.float32)
  codec.calibrate(x)
  quantizer = quantizers.make_quantizer("gnoise")(seed=(3, 4))
  terms = rd.rd_terms(codec, x, config.model_config.rd_lambda, quantizer)

  mean, log_scale = (t.numpy().astype(np.float64) for t in codec.infer(x)["y"])
  noise = quantizer("y", tf.zeros(mean.shape), 0.0).decode.numpy()
  z = mean + np.exp(log_scale) * noise
  if learned:
    log_prior = codec.prior.log_prob(tf.constant(z, tf.float32)).numpy()
    divergence = -log_prior - 0.5 * np.log(2 * np.pi * np.e * np.exp(2 * log_scale))
  else:
    divergence = 0.5 * (mean**2 + np.exp(2 * log_scale) - 1 - 2 * log_scale)
  x_hat = codec.synthesize({"y": tf.constant(z, tf.float32)}).numpy()
  squares = np.sum((x.numpy() - x_hat) ** 2 / 255**2, axis=(1, 2, 3))
  elbo = -divergence.sum(axis=(1, 2, 3)) - squares / (2 * config.model_config.likelihood_variance)
  wanted = -np.mean(elbo) / (32 * 48 * math.log(2))
  np.testing.assert_allclose(terms.loss, wanted, rtol=1e-4)


def test_start_is_a_good_linear_vae():
  """Half the loss of random values; each latent's posterior is that of a linear model."""
  losses = {}
  x = tf.constant(np.stack([conftest.picture(64, 64, s) for s in range(4)]), tf.float32)
  for init in ("random", "dct"):
    tf.keras.utils.set_random_seed(1)
    config = _config(
      init=init, **{"analysis.output_channels": 48, "synthesis.in_channels": 24},
      **{"analysis.num_filters": 24, "synthesis.num_filters": 24},
    )  # fmt: skip
    codec = build(config.model_config)
    codec.calibrate(x)
    quantizer = quantizers.make_quantizer("gnoise")(seed=(0, 0))
    losses[init] = float(rd.rd_terms(codec, x, config.model_config.rd_lambda, quantizer).loss)
  assert losses["dct"] < 0.5 * losses["random"]
  mean, log_scale = (t.numpy() for t in codec.infer(x)["y"])
  share = 1 - np.mean(np.exp(2 * log_scale), axis=(0, 1, 2))  # Of the variance that is signal.
  np.testing.assert_allclose(np.var(mean, axis=(0, 1, 2)), share**2, atol=0.05)
  assert share.max() > 0.9 and share.min() > 0


def test_noise_is_standard_normal_and_a_function_of_the_seed():
  make = quantizers.make_quantizer("gnoise")
  draw = lambda seed: make(seed=seed)("y", tf.zeros([1, 64, 64, 8]), 0.0).decode.numpy()  # noqa: E731
  first = draw((0, 7))
  np.testing.assert_array_equal(first, draw((0, 7)))
  assert not np.array_equal(first, draw((0, 8)))
  assert abs(first.mean()) < 0.02 and abs(first.std() - 1) < 0.02
  assert abs(np.mean(np.abs(first) < 1) - 0.6827) < 0.01


@pytest.mark.parametrize(
  ("overrides", "message"),
  [
    ({"rd_lambda": 0.01}, "likelihood_variance"),
    ({"likelihood_variance": -1.0}, "above 0"),
    ({"quantizer": "unoise"}, "gnoise"),
    ({"analysis.output_channels": 6}, "twice"),
  ],
)
def test_wrong_configs_are_refused_and_the_fix_is_named(overrides, message):
  with pytest.raises(ValueError, match=message):
    build(_config(**overrides).model_config)


def test_a_factorized_codec_does_not_train_with_the_vaes_noise():
  config = hyper.load("factorized/configs/bls2017.py:tiny").get_config()
  config.model_config.quantizer = "gnoise"
  with pytest.raises(ValueError, match="VAE"):
    build(config.model_config)


# --- The search ----------------------------------------------------------------------------------


def test_depths_of_ranks():
  assert vbq.depths(7).tolist() == [2, 1, 2, 0, 2, 1, 2]


def _bracketing(points, depth, mean):
  """At every depth the ranks of the points that bracket a mean: the definition, one by one."""
  for d in range(depth.max() + 1):
    ranks = np.flatnonzero(depth == d)
    below, above = ranks[points[ranks] <= mean], ranks[points[ranks] > mean]
    yield [*below[-1:], *above[:1]]


@hypothesis.given(seed=st.integers(0, 2**32 - 1), bits=st.integers(0, 6), exponent=st.floats(-9, 9))
@hypothesis.settings(max_examples=60)
def test_search_is_brute_force_where_a_depth_has_one_price(seed, bits, exponent):
  random = np.random.default_rng(seed)
  num_points = (2 << bits) - 1
  points = np.sort(random.normal(size=[2, num_points]), axis=1).astype(np.float32)
  mean = (2 * random.normal(size=[2, 9])).astype(np.float32)
  mean[:, 0] = points[:, num_points // 2]  # One that lies on a point.
  deviation = np.exp(random.normal(-1, 1, size=[2, 9])).astype(np.float32)
  depth = vbq.depths(num_points)
  price = (2.0**exponent * random.random([2, bits + 1]))[:, depth].astype(np.float32)
  (found,) = vbq.search(points, mean, deviation, [price])
  cost = np.square(points[:, None, :].astype(np.float64) - mean[..., None])
  cost = cost / (2 * np.square(deviation[..., None], dtype=np.float64)) + price[:, None, :]
  for c in range(2):
    for i in range(9):
      candidates = [r for ranks in _bracketing(points[c], depth, mean[c, i]) for r in ranks]
      least = cost[c, i, candidates].min()
      assert cost[c, i, found[c, i]] == pytest.approx(least, rel=1e-5, abs=1e-6)
      # And they are the best of all points, not of the candidates alone.
      assert least == pytest.approx(cost[c, i].min(), rel=1e-9)


def test_search_with_a_price_a_point_is_the_best_of_the_points_next_to_the_mean():
  random = np.random.default_rng(3)
  points = np.sort(random.normal(size=[3, 63]), axis=1).astype(np.float32)
  mean = random.normal(size=[3, 50]).astype(np.float32)
  deviation = np.full_like(mean, 0.2)
  price = random.gamma(2, 1, size=[3, 63]).astype(np.float32)
  depth = vbq.depths(63)
  (found,) = vbq.search(points, mean, deviation, [price])
  for c in range(3):
    for i in range(50):
      distance = np.abs(points[c] - mean[c, i])
      near = [min(np.flatnonzero(depth == d), key=lambda r: distance[r]) for d in range(6)]
      cost = distance**2 / (2 * 0.2**2) + price[c]
      assert cost[found[c, i]] == pytest.approx(min(cost[near]), rel=1e-5)


def test_search_does_not_depend_on_what_is_searched_beside():
  """Chunks and threads: many latents, one by one, several rates at once."""
  samples = _samples(5, 20_000)
  points = vbq.quantile_points(samples, max_bits=6)
  prices = [np.full(points.shape, 1.0) * vbq.depths(127) * f for f in (0.1, 3.0)]
  together = vbq.search(points, samples.mean, samples.deviation, prices)
  part = slice(700, 710)
  for price, whole in zip(prices, together):
    few = vbq.search(points, samples.mean[:, part], samples.deviation[:, part], [price])[0]
    np.testing.assert_array_equal(whole[:, part], few)


def test_a_wider_posterior_takes_fewer_bits():
  samples = _samples()
  coder = vbq.build_vbq(samples, lambdas=[1.0])
  mean = samples.mean.T[None]
  bits = [coder.bits(coder.quantize(mean, np.full_like(mean, d), 0), 0) for d in (0.01, 0.1, 1.0)]
  assert bits[0] > bits[1] > bits[2]


# --- Code points and tables ----------------------------------------------------------------------


def test_code_points_are_quantiles():
  samples = _samples(size=5_000)
  points = vbq.quantile_points(samples, max_bits=4, flatten=0.0)
  assert points.shape == (3, 31) and points.dtype == np.float32
  below = np.mean(samples.mean[:, None, :] <= points[:, :, None], axis=2)
  np.testing.assert_allclose(below, np.arange(1, 32)[None] / 32 * np.ones([3, 1]), atol=0.01)


def test_flattened_code_points_are_closer_where_latents_are_rare():
  samples = _samples(size=5_000)
  plain, flat = (vbq.quantile_points(samples, 8, flatten=f) for f in (0.0, 0.3))
  reach = samples.mean.max(axis=1) - samples.mean.min(axis=1)
  assert np.all(np.diff(flat, axis=1).max(axis=1) < 0.02 * reach)
  assert np.all(np.diff(plain, axis=1).max(axis=1) > np.diff(flat, axis=1).max(axis=1))


def test_a_channel_that_never_changes_has_code_points():
  samples = vbq.Samples(np.zeros([1, 50], np.float32), np.ones([1, 50], np.float32))
  for make in vbq.BUILDERS.values():
    coder = make(samples)
    symbols = coder.quantize(np.zeros([1, 2, 2, 1], np.float32), np.ones([1, 2, 2, 1]), 0)
    decoded = coder.decode(coder.encode(symbols, 0), symbols.shape, 0)
    np.testing.assert_array_equal(decoded, symbols)
    np.testing.assert_allclose(coder.values(decoded, 0), 0, atol=1e-5)


@pytest.mark.slow
def test_deep_density_fits_the_means():
  samples = _samples(size=3_000)
  points = vbq.quantile_points(samples, max_bits=4, density="deep")
  below = np.mean(samples.mean[:, None, :] <= points[:, :, None], axis=2)
  np.testing.assert_allclose(below, np.arange(1, 32)[None] / 32 * np.ones([3, 1]), atol=0.05)


@pytest.mark.parametrize("method", vbq.METHODS)
def test_probabilities_are_positive_and_sum_to_one(method):
  coder = vbq.BUILDERS[method](_samples())
  for rate in range(coder.num_rates):
    p = coder.tables(rate).probabilities
    assert p.min() > 0
    np.testing.assert_allclose(p.sum(axis=1), 1.0, rtol=1e-12)


def test_true_code_lengths_code_better_than_two_passes():
  """Rate and distortion together, lambda bits + error, on latents that were not calibrated on."""
  samples, others = _samples(4, 8_000), _samples(4, 8_000)
  mean, deviation = others.mean.T[None], others.deviation.T[None]
  costs = {}
  for scheme in ("two-pass", "iterated"):
    coder = vbq.build_vbq(samples, lambdas=[4.0, 0.25], scheme=scheme)
    costs[scheme] = 0.0
    for rate, symbols in enumerate(coder.quantize_all(mean, deviation)):
      error = np.sum((coder.values(symbols, rate) - mean) ** 2 / (2 * deviation**2))
      costs[scheme] += error / coder.settings[rate] + coder.bits(symbols, rate)
  assert costs["iterated"] < costs["two-pass"]


def _least_error(row, k):
  """The least squared error with k clusters, by trying every last boundary."""
  x = np.sort(row.astype(np.float64))
  error = [[np.sum((x[i:j] - x[i:j].mean()) ** 2) if j > i else 0.0 for j in range(len(x) + 1)]
           for i in range(len(x) + 1)]  # fmt: skip
  best = error[0]
  for _ in range(k - 1):
    best = [min(best[i] + error[i][j] for i in range(j + 1)) for j in range(len(x) + 1)]
  return best[-1]


@hypothesis.given(seed=st.integers(0, 2**32 - 1), size=st.integers(1, 24), repeats=st.booleans())
@hypothesis.settings(max_examples=40)
def test_kmeans_is_exact(seed, size, repeats):
  rows = np.random.default_rng(seed).normal(size=[2, size]) ** 3
  rows = np.round(rows) if repeats else rows
  levels = [2, 3, 6]
  for k, centres in zip(levels, vbq.kmeans(rows, levels)):
    assert centres.shape == (2, k) and np.all(np.diff(centres, axis=1) >= 0)
    for row, c in zip(rows, centres):
      error = np.sum(np.min((row[:, None] - c) ** 2, axis=1))
      assert error == pytest.approx(_least_error(row, k), rel=1e-9, abs=1e-9)


def test_kmeans_in_groups_beats_what_it_starts_from():
  """More numbers than groups: still better than even spacing, and than equal counts."""
  row = np.random.default_rng(0).laplace(size=[1, 20_000])
  (centres,) = vbq.kmeans(row, [16])

  def error(c):
    c = np.sort(c)
    return np.sum((row[0] - c[np.searchsorted((c[1:] + c[:-1]) / 2, row[0])]) ** 2)

  even, counts = np.linspace(row.min(), row.max(), 16), np.quantile(row, (np.arange(16) + 0.5) / 16)
  assert error(centres[0]) < 0.9 * min(error(even), error(counts))


@pytest.mark.parametrize("method", vbq.METHODS)
def test_files_of_ranks_cost_their_code_length(method):
  """And at most 5 bytes: of them 3 are the coder's state, and one is filled up."""
  samples = _samples(8, 4_000)
  coder = vbq.BUILDERS[method](samples)
  mean, deviation = (x.T.reshape(1, 40, 100, 8) for x in (samples.mean, samples.deviation))
  before = math.inf if method == "vbq" else 0.0
  for rate, symbols in enumerate(coder.quantize_all(mean, deviation)):
    coded = coder.encode(symbols, rate)
    np.testing.assert_array_equal(coder.decode(coded, symbols.shape, rate), symbols)
    assert abs(8 * len(coded) - coder.bits(symbols, rate) - 20) <= 20
    error = np.sum((coder.values(symbols, rate) - mean) ** 2 / deviation**2)
    assert error < before or method != "vbq"
    before = error


def test_rare_points_decode_and_cost_their_code_length():
  """Ranks that no latent took, evenly drawn: nearly all are coded in two steps."""
  coder = vbq.build_vbq(_samples(3))
  random = np.random.default_rng(0)
  for rate in (0, 8, 15):
    assert coder.tables(rate).is_rare.mean() > 0.3
    for count in (1, 500):
      symbols = random.integers(0, 2047, [1, 1, count, 3]).astype(np.int32)
      coded = coder.encode(symbols, rate)
      np.testing.assert_array_equal(coder.decode(coded, symbols.shape, rate), symbols)
      bits = coder.bits(symbols, rate)
      assert 8 * len(coded) < 1.002 * bits + 40


def test_a_table_has_a_share_for_every_symbol_and_the_coder_uses_exactly_these():
  """Also where rounding up what is rare takes much; the coder's state tells share and place."""
  random = np.random.default_rng(0)
  for size, power in ((2, 1), (40, 3), (2047, 1), (2047, 60), (65535, 40)):
    p = random.random(size) ** power
    table = vbq._Table.of(p / p.sum())
    assert table.shares.sum() == 1 << 24 and table.shares.min() >= 1
    below = np.cumsum(table.shares) - table.shares
    for symbol in range(0, size, max(1, size // 20)):
      coder = constriction.stream.queue.RangeEncoder()
      coder.encode(np.array([symbol], np.int32), table.model)
      position, (low, width) = coder.pos()
      if position == 0:  # Else the first word is out of sight.
        unit = (2**64 - 1) >> 24
        assert (low // unit, width // unit) == (below[symbol], table.shares[symbol])


def test_files_of_kodaks_size_are_within_1_percent_of_their_code_length_from_0_1_bpp_on():
  """With all that a file holds besides: 47 bytes at most, at every rate."""
  config = _config(init="random", **{"analysis.output_channels": 128, "synthesis.in_channels": 64})
  codec = build(config.model_config)
  samples = _samples(64, 1536)
  codec.prepare(vbq.build_vbq(samples).arrays())
  mean, deviation = (x.T.reshape(1, 32, 48, 64) for x in (samples.mean, samples.deviation))
  rates = []
  for rate, symbols in enumerate(codec.coder.quantize_all(mean, deviation)):
    file = codec.pack_symbols(symbols, rate, (512, 768))
    ideal = codec.coder.bits(symbols, rate) / 8
    rates.append(8 * ideal / (512 * 768))
    assert ideal < len(file) <= ideal + 47
    if 8 * len(file) / (512 * 768) >= 0.1:
      assert len(file) <= 1.01 * ideal
    decode, size = codec.unpack(file)
    np.testing.assert_array_equal(decode["y"], codec.coder.values(symbols, rate))
    assert size == (512, 768)
  assert min(rates) < 0.12 and max(rates) > 1


def test_arrays_make_the_same_quantizer():
  for make in vbq.BUILDERS.values():
    coder = make(_samples())
    again = vbq.Coder.from_arrays(coder.arrays())
    assert again.method == coder.method and again.num_rates == coder.num_rates
    mean = _samples(seed=1).mean.T
    for rate in range(coder.num_rates):
      symbols = coder.quantize(mean, np.full_like(mean, 0.1), rate)
      np.testing.assert_array_equal(again.quantize(mean, np.full_like(mean, 0.1), rate), symbols)
      assert again.encode(symbols, rate) == coder.encode(symbols, rate)


@pytest.mark.parametrize(
  "damage",
  [
    {"method": np.array([9])},
    {"shape": np.array([3])},
    {"shape": np.array([4, *[2047] * 16])},
    {"points": np.zeros(5, np.float32)},
    {"points": np.full(3 * 2047, np.nan, np.float32)},
    {"counts_place": np.array([10**9]), "counts": np.array([1])},
    {"counts_place": np.array([1]), "counts": np.array([-1])},
    {"settings": np.ones(3)},
    {"version": np.array([1])},
    {"shape": np.array([1, *[2047] * 257])},
    {"shape": np.array([60_000, *[2047] * 16])},
  ],
)
def test_damaged_arrays_are_refused(damage):
  arrays = {**vbq.build_vbq(_samples()).arrays(), **damage}
  with pytest.raises(ValueError, match=r"damaged|fit|count|anew"):
    vbq.Coder.from_arrays(arrays)


def test_tables_that_are_too_large_are_refused_before_they_are_made():
  """All else fits, with points for one rate: 257 rates, or 16 GB of zeros."""
  for channels, rates in ((1, 257), (2000, 255)):
    arrays = {
      **vbq.build_vbq(_samples()).arrays(),
      "shape": np.array([channels, *[2047] * rates]),
      "settings": np.ones(rates),
      "points": np.zeros(channels * 2047, np.float32),
    }
    tracemalloc.start()
    with pytest.raises(ValueError, match="too large"):
      vbq.Coder.from_arrays(arrays)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 24


def test_random_bytes_are_refused_or_are_what_their_symbols_are_coded_as():
  coder = vbq.build_vbq(_samples())
  random = np.random.default_rng(0)
  for size in (0, 1, 4, 7, 200):
    for _ in range(10):
      coded = random.bytes(size)
      try:
        assert coder.encode(coder.decode(coded, (1, 3, 4, 3), 9), 9) == coded
      except BitstreamError:
        continue
      assert size < 200


def test_a_size_that_the_bytes_cannot_hold_is_refused_before_anything_is_allocated():
  with pytest.raises(BitstreamError, match="cannot hold"):
    vbq.build_vbq(_samples()).decode(b"12345", (1, 30_000, 30_000, 3), 9)


# --- Runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(pictures, tmp_path_factory):
  """A VAE of 6 channels after 6 steps. Tests must not write to it, but may make its quantizers."""
  experiments = tmp_path_factory.mktemp("vae")
  argv = conftest.tiny_arguments(pictures, experiments, "--xid", "1")
  argv[1] = str(conftest.ROOT / CONFIG)
  argv = [a for a in argv if not a.startswith("--config.model_config")]
  argv += [f"--config.model_config.{k}={v}" for k, v in SMALL.items()]
  assert conftest.train(argv) == 0
  (path,) = experiments.glob("1/wid=*")
  return runs.RunDir.open(path)


@pytest.fixture(scope="module")
def evaluated(run, pictures, odd_pictures, tmp_path_factory):
  """The folder of results of all methods on the odd pictures, and the export."""
  folder = tmp_path_factory.mktemp("vbq")
  assert _evaluate(run, pictures, odd_pictures, folder, "--export", str(folder / "all.npz")) == 0
  return folder


def _evaluate(run, calibration, dataset, folder, *more):
  return vbq_eval.main(
    ["--workdir", str(run.path), "--calibration", str(calibration), "--dataset", str(dataset),
     "--results_dir", str(folder / "results"), *more]
  )  # fmt: skip


def _codec(run, rate=None):
  codec, _ = eval_lib.load_codec(run, build)
  if rate is not None:
    codec.rate_index = rate
  return codec


@pytest.mark.slow
def test_training_resumes_to_the_same_weights(run, pictures, tmp_path):
  """Killed after 4 of 6 steps: noise and data are functions of (seed, step)."""
  copy = tmp_path / "1" / run.path.name
  shutil.copytree(run.path, copy)
  shutil.rmtree(copy / "checkpoints" / "step-00000006")
  record = json.loads((copy / "state.json").read_text())
  (copy / "state.json").write_text(json.dumps({**record, "state": "REQUEUED"}))
  assert conftest.train(["--workdir", str(copy)]) == 0
  whole, again = (_codec(r) for r in (run, runs.RunDir.open(copy)))
  for a, b in zip(whole.variables, again.variables):
    np.testing.assert_array_equal(a.numpy(), b.numpy())


@pytest.mark.slow
def test_without_a_quantizer_the_message_names_the_command(run, tmp_path):
  copy = tmp_path / run.path.name
  shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("coding"))
  copied = runs.RunDir.open(copy)
  for step, named in ((None, f"{copy} --calibration"), ("4", f"{copy} --step 4 --calibration")):
    codec, _ = eval_lib.load_codec(copied, build, step)
    for call in (codec.compress, lambda _, codec=codec: codec.fingerprint):
      with pytest.raises(NotPreparedError) as e:
        call(conftest.picture(8, 8))
      assert f"factorized.vbq_eval --workdir {named}" in str(e.value)


@pytest.mark.slow
def test_a_file_of_an_older_checkpoint_is_found_though_the_newest_has_no_quantizer(
  run, pictures, tmp_path, capsys
):
  ntc = importlib.import_module("ntc")
  copy = tmp_path / run.path.name
  shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("coding"))
  copied = runs.RunDir.open(copy)
  assert _evaluate(copied, pictures, pictures, tmp_path, "--step", "4", "--methods", "vbq") == 0
  file, back = tmp_path / "a.ntc", tmp_path / "a.png"
  picture = str(pictures / "0.png")
  assert ntc.main(["compress", picture, str(file), "--workdir", str(copy), "--step", "4"]) == 0
  assert ntc.main(["decompress", str(file), str(back), "--workdir", str(copy)]) == 0
  assert back.is_file() and "was written by step 4" in capsys.readouterr().err


@pytest.mark.slow
def test_results_are_one_curve_a_method_of_real_bytes(run, evaluated, odd_pictures):
  dataset = data.load_eval_images(str(odd_pictures))
  found = [results.read(p) for p in results.find(evaluated / "results", dataset.name)]
  curves = results.curves(found)
  (cal,) = {c.group.split()[-1] for c in curves}
  assert re.fullmatch(r"cal=pictures.*-[0-9a-f]{6}", cal)
  wanted = sorted(f"factorized-1-{m} wid=0 {cal}" for m in vbq.METHODS)
  assert sorted(c.group for c in curves) == wanted
  assert {len(c.bpp) for c in curves} == {16, 9}
  assert all(r.mode == "vbq" and len(r.records) == 5 for r in found)
  codec = _codec(run)
  for result in found:
    if result.config["quantizer"]["method"] != "vbq":
      continue
    codec.rate_index = codec.coder.settings.tolist().index(result.config["quantizer"]["setting"])
    for (name, image), record in zip(dataset, result.records):
      assert record.image == name and record.num_bytes == len(codec.compress(image))


@pytest.mark.slow
def test_export_holds_what_the_results_hold(evaluated, odd_pictures):
  arrays = artefacts.read_arrays(evaluated / "all.npz")
  dataset = data.load_eval_images(str(odd_pictures))
  assert arrays["images"].tolist() == dataset.names
  for method, rates in (("vbq", 16), ("uniform", 9), ("kmeans", 9)):
    for name in ("bytes", "bpp", "bits_per_latent", "mse", "psnr", "msssim", "mse_luma",
                 "psnr_luma", "msssim_luma"):  # fmt: skip
      assert arrays[f"{method}_{name}"].shape == (5, rates), name
  found = [results.read(p) for p in results.find(evaluated / "results", dataset.name)]
  means = sorted(r.mean("bpp") for r in found if r.config["quantizer"]["method"] == "vbq")
  np.testing.assert_allclose(sorted(arrays["vbq_bpp"].mean(axis=0)), means)


@pytest.mark.slow
def test_results_that_are_there_are_left(run, evaluated, pictures, odd_pictures):
  before = {p: p.stat().st_mtime_ns for p in evaluated.rglob("*.json")}
  assert _evaluate(run, pictures, odd_pictures, evaluated) == 0
  assert {p: p.stat().st_mtime_ns for p in evaluated.rglob("*.json")} == before


@pytest.mark.slow
def test_a_profile_joins_the_results_of_the_first_method(
  run, evaluated, pictures, odd_pictures, tmp_path, capsys
):
  copy = tmp_path / "results"
  shutil.copytree(evaluated / "results", copy)
  assert _evaluate(run, pictures, odd_pictures, tmp_path, "--profile") == 0
  assert "FLOPs/pixel" in capsys.readouterr().out
  found = [results.read(p) for p in copy.rglob("*.json")]
  counted = {r.config["quantizer"]["method"] for r in found if r.profile is not None}
  assert counted == {"vbq"}
  codec = _codec(run)
  expected = sum(v.numpy().size for v in codec.trainable_variables)
  assert {r.run["num_parameters"] for r in found} == {expected}
  for path in copy.rglob("*.json"):
    before = results.read(evaluated / path.relative_to(tmp_path))
    assert results.read(path).records == before.records


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_where_it_was(
  run, evaluated, pictures, odd_pictures, tmp_path, monkeypatch
):
  measure, seen = vbq_eval._measure_image, []

  def measured(codec, name, *rest):
    seen.append(name)
    if len(seen) == 3:
      raise KeyboardInterrupt
    return measure(codec, name, *rest)

  monkeypatch.setattr(vbq_eval, "_measure_image", measured)
  argv = (run, pictures, odd_pictures, tmp_path, "--methods", "uniform")
  assert _evaluate(*argv) == 130
  partials = list(tmp_path.rglob("*.partial"))
  assert len(partials) == 9 and not list(tmp_path.rglob("*.json"))
  # As after a kill between two rates: the last one lacks its second record.
  lines = partials[-1].read_text().splitlines(keepends=True)
  partials[-1].write_text("".join(lines[:-1]))
  assert _evaluate(*argv) == 0
  assert len(set(seen)) == 5 and len(seen) == 7  # The second and the third were measured twice.
  assert not list(tmp_path.rglob("*.partial"))
  for path in tmp_path.rglob("*.json"):
    records = [
      [{**results.as_dict(r), "seconds_decode": 0} for r in results.read(p).records]
      for p in (path, evaluated / path.relative_to(tmp_path))
    ]
    assert records[0] == records[1] and len(records[0]) == 5


@pytest.mark.slow
def test_another_calibration_has_files_and_curves_of_its_own(
  run, evaluated, pictures, odd_pictures, tmp_path
):
  """And does not change what the run codes with, unless it is asked to."""
  copy, folder = tmp_path / "1" / run.path.name, tmp_path / "out"
  shutil.copytree(run.path, copy)
  shutil.copytree(evaluated, folder)
  own = runs.RunDir.open(copy)
  before = {p: p.read_bytes() for p in folder.rglob("*.json")}
  fingerprint = _codec(own).fingerprint
  (default,) = copy.rglob("default.npz")
  kept = default.read_bytes()

  argv = (own, odd_pictures, odd_pictures, folder, "--methods", "vbq")
  assert _evaluate(*argv) == 0
  name = data.load_eval_images(str(odd_pictures)).name
  found = [results.read(p) for p in results.find(folder / "results", name)]
  assert len(found) == len(before) + 16
  assert all(p.read_bytes() == content for p, content in before.items())
  assert sorted(len(c.bpp) for c in results.curves(found)) == [9, 9, 16, 16]
  assert default.read_bytes() == kept and _codec(own).fingerprint == fingerprint

  assert _evaluate(*argv, "--make_default") == 0
  assert _codec(own).fingerprint != fingerprint
  assert _codec(own).fingerprint.hex() in {r.run["fingerprint"] for r in found}
  assert _evaluate(own, pictures, odd_pictures, folder, "--make_default") == 0
  assert _codec(own).fingerprint == fingerprint


@pytest.mark.slow
def test_the_log_says_which_quantizer_a_run_codes_with(
  run, evaluated, odd_pictures, tmp_path, caplog
):
  copy = tmp_path / "1" / run.path.name
  shutil.copytree(run.path, copy)
  own = runs.RunDir.open(copy)
  codec, step = eval_lib.load_codec(own, build)
  quantizers = vbq_eval.Quantizers(own, step, codec, data.load_eval_images(str(odd_pictures)))
  quantizers.get("vbq")
  for replace, words in ((False, "--make_default changes that"), (True, "no longer decode")):
    caplog.clear()
    with caplog.at_level("INFO"):
      quantizers.use_as_default(replace)
    assert words in caplog.text and quantizers.calibration in caplog.text
  caplog.clear()
  quantizers.use_as_default(False)
  assert not caplog.text
  (default,) = copy.rglob("default.npz")
  arrays = artefacts.read_arrays(default)
  for content in (b"PK damaged", None):
    if content is None:
      artefacts.write_arrays(default, {**arrays, "version": np.array([1], np.int32)})
    else:
      default.write_bytes(content)
    quantizers.use_as_default(False)
    assert artefacts.read_arrays(default)["version"] == [vbq.VERSION]


@pytest.mark.slow
def test_results_of_another_run_are_refused(
  run, evaluated, pictures, odd_pictures, tmp_path, capsys
):
  """With the same xid and wid and another model; an earlier model of the run is measured anew."""
  folder = tmp_path / "out"
  shutil.copytree(evaluated, folder)
  path = sorted(folder.rglob("*uniform*.json"))[0]
  record = json.loads(path.read_text())
  other = {**record, "run": {**record["run"], "fingerprint": "00" * 6, "workdir": "/elsewhere"}}
  path.write_text(json.dumps(other))
  argv = (run, pictures, odd_pictures, folder, "--methods", "uniform")
  assert _evaluate(*argv) == 1
  assert "another run with this xid and wid (/elsewhere)" in capsys.readouterr().err
  assert json.loads(path.read_text()) == other
  other["run"]["workdir"] = str(run.path)
  path.write_text(json.dumps(other))
  assert _evaluate(*argv) == 0
  assert results.read(path).run["fingerprint"] == record["run"]["fingerprint"]


@pytest.mark.slow
@pytest.mark.parametrize("init", ["random", "dct"])
def test_an_untrained_vae_is_profiled(init, capsys):
  """Without a quantizer of its own: one is made from the picture."""
  argv = ["--profile", "--config", str(conftest.ROOT / CONFIG), "--profile_size=40x56"]
  argv += [f"--config.model_config.{k}={v}" for k, v in {**SMALL, "init": init}.items()]
  assert conftest.run_command(cli.eval_main, "factorized", factorized_eval.run, argv) == 0
  printed = capsys.readouterr().out
  assert "untrained" in printed and "unpack" in printed


def test_report_draws_the_curves(evaluated, odd_pictures):
  from common import report_content

  name = data.load_eval_images(str(odd_pictures)).name
  made = report_content.build(name, evaluated / "results", published=["none"])
  own = [s for s in made.series if not s.published]
  assert len({s.curve.label for s in own}) == 3
  assert sum(len(made.members(s)) for s in own) == 34


@pytest.mark.slow
def test_a_new_process_makes_identical_quantizers_and_files(
  run, evaluated, pictures, odd_pictures, tmp_path
):
  copy = tmp_path / run.path.name
  shutil.copytree(run.path, copy, ignore=shutil.ignore_patterns("coding"))
  command = [
    sys.executable, "-m", "factorized.vbq_eval", "--workdir", str(copy), "--calibration",
    str(pictures), "--dataset", str(odd_pictures), "--results_dir", str(tmp_path / "results"),
  ]  # fmt: skip
  done = subprocess.run(command, cwd=conftest.ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  own, other = (sorted(p.rglob("coding/*/*.npz")) for p in (run.path, copy))
  assert [p.name for p in own] == [p.name for p in other] and len(own) == 4
  for a, b in zip(own, other):
    first, second = artefacts.read_arrays(a), artefacts.read_arrays(b)
    for name in first:
      np.testing.assert_array_equal(first[name], second[name], err_msg=f"{a.name} {name}")
  image = conftest.picture(45, 61)
  for rate in (0, 8, 15):
    files = [_codec(r, rate).compress(image) for r in (run, runs.RunDir.open(copy))]
    assert files[0] == files[1]


@pytest.mark.slow
def test_a_damaged_quantizer_is_made_anew_and_another_calibration_apart(
  run, evaluated, pictures, odd_pictures, tmp_path
):
  copy = tmp_path / run.path.name
  shutil.copytree(run.path, copy)
  run = runs.RunDir.open(copy)
  (kept,) = copy.rglob("uniform-*.npz")
  before = artefacts.read_arrays(kept)
  kept.write_bytes(kept.read_bytes()[:-30])
  assert _evaluate(run, pictures, odd_pictures, tmp_path, "--methods", "uniform") == 0
  np.testing.assert_array_equal(artefacts.read_arrays(kept)["points"], before["points"])
  assert _evaluate(run, odd_pictures, pictures, tmp_path, "--methods", "uniform") == 0
  assert len(list(copy.rglob("uniform-*.npz"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (17, 33), (61, 45)], ids=str)
def test_a_smaller_lambda_is_nearer_and_larger_and_the_decoder_needs_no_rate(run, evaluated, size):
  image, codec = conftest.picture(*size), _codec(run)
  decoder = _codec(run, 0)
  sizes, errors = [], []
  for rate in (0, 8, 15):
    codec.rate_index = rate
    file = codec.compress(image)
    decoded = decoder.decompress(file)
    latents = rd.infer(codec, rd.to_batch(image))
    own = rd.to_image(rd.synthesize(codec, codec.rounded(latents), size))
    np.testing.assert_array_equal(decoded, own)
    values = codec.rounded(latents)["y"].numpy()
    mean, deviation = vbq.posterior(latents)
    sizes.append(len(file))
    errors.append(np.sum((values - mean) ** 2 / deviation**2))
  assert sizes[0] <= sizes[1] <= sizes[2] and errors[0] >= errors[1] >= errors[2]


@pytest.mark.slow
def test_rates_are_checked(run, evaluated):
  codec = _codec(run)
  assert codec.num_rates == 16 and codec.coder.settings[codec.rate_index] == 0.5
  for rate in (-1, 16):
    with pytest.raises(ValueError, match="0 to 15"):
      codec.rate_index = rate


def test_forged_files_are_refused(run, evaluated):
  codec = _codec(run, 8)
  file = codec.compress(conftest.picture(40, 56))
  stream = bitstream.read(file)
  section = stream.sections[0]
  forgeries = [b"", b"\x08", bytes([15]) + section[1:], bytes([16]) + section[1:], b"\xff" * 9]
  forgeries += [section[:-1], section[:1] + b"\xff" * 40, section[:1] + bytes(40)]
  for forgery in forgeries:
    for size in ((40, 56), (1, 1), (11_000, 11_000)):
      forged = dataclasses.replace(stream, height=size[0], width=size[1], sections=(forgery,))
      with pytest.raises(BitstreamError):
        codec.decompress(bitstream.write(forged))
  for position in range(len(file)):
    damaged = bytearray(file)
    damaged[position] ^= 0x5A
    with pytest.raises(BitstreamError):
      codec.decompress(bytes(damaged))
  for length in range(0, len(file), 5):
    with pytest.raises(BitstreamError):
      codec.decompress(file[:length])


def test_files_of_another_quantizer_are_refused(run, evaluated):
  codec = _codec(run, 8)
  file = codec.compress(conftest.picture(20, 20))
  codec.prepare(vbq.build_vbq(_samples(6)).arrays())
  with pytest.raises(BitstreamError, match="written by model"):
    codec.decompress(file)


@pytest.mark.slow
def test_pictures_are_compressed_at_a_rate_and_decoded_by_an_exported_model(
  run, evaluated, odd_pictures, tmp_path, capsys
):
  ntc = importlib.import_module("ntc")
  picture = str(next(pathlib.Path(odd_pictures).glob("3-*.png")))
  model = str(tmp_path / "model.ntcm")
  assert ntc.main(["export", str(run.path), "--output", model]) == 0
  sizes = []
  for rate in ("0", "15"):
    file, back = tmp_path / f"{rate}.ntc", tmp_path / f"{rate}.png"
    argv = ["compress", picture, str(file), "--model", model, "--rate", rate]
    assert ntc.main(argv) == 0
    assert ntc.main(["decompress", str(file), str(back), "--model", model]) == 0
    assert _codec(run, int(rate)).compress(data.read_image(picture)) == file.read_bytes()
    np.testing.assert_array_equal(data.read_image(back), _codec(run).decompress(file.read_bytes()))
    sizes.append(file.stat().st_size)
  assert sizes[0] < sizes[1]
  capsys.readouterr()
  assert ntc.main(["info", model]) == 0
  said = capsys.readouterr().out
  named = ", ".join(f"2^{7 - rate}" for rate in range(16))
  assert f"16, --rate 0 to 15: lambda {named}" in said
  assert [2.0 ** (7 - rate) for rate in range(16)] == _codec(run).coder.settings.tolist()
  argv = ["compress", picture, str(tmp_path / "x.ntc"), "--model", model, "--rate", "16"]
  assert ntc.main(argv) == 2
  assert "0 to 15" in capsys.readouterr().err


def test_a_vaes_latents_are_not_for_iterative_inference(run):
  from factorized import itinf

  config = run.read_work_unit().config["model_config"]
  with pytest.raises(ValueError, match="vbq_eval"):
    itinf._build(hyper.to_config({"model_config": config}).model_config)


@pytest.mark.parametrize(
  ("argv", "message"),
  [
    ([], "--workdir is needed"),
    (["--workdir", "nowhere", "--calibration", "sample", "--dataset", "sample"], "nowhere"),
    (["--workdir", "x", "--calibration", "sample", "--dataset", "sample", "--methods", "jpeg"],
     "vbq, uniform, kmeans"),
    (["--workdir", "x", "--calibration", "sample", "--dataset", "sample", "--export", "x.json"],
     "npz"),
    (["--workdir", "x", "--calibration", "sample", "--dataset", "sample", "--methods", "uniform",
      "--make_default"], "needs vbq"),
  ],
)  # fmt: skip
def test_wrong_command_lines_name_the_fix(argv, message, capsys):
  assert vbq_eval.main(argv) == 2
  assert message in capsys.readouterr().err


def test_a_run_that_is_no_vae_is_refused(trained_run, pictures, tmp_path, capsys):
  assert _evaluate(trained_run, pictures, pictures, tmp_path) == 1
  assert "no VAE" in capsys.readouterr().err


def test_help_starts_without_tensorflow():
  code = (
    "import sys; from factorized import vbq_eval\n"
    "try: vbq_eval.main(['--help'])\n"
    "except SystemExit as e: assert not e.code\n"
    "assert 'tensorflow' not in sys.modules"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], cwd=conftest.ROOT, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "--calibration" in done.stdout


@pytest.mark.parametrize("build", [vbq.build_uniform, vbq.build_kmeans])
def test_symbols_that_cost_words_of_zeros_decode(build):
  """The likeliest point is the lowest: its code is the beginning of the interval, all zeros."""
  means = np.r_[np.zeros(900), np.ones(100)][None].astype(np.float32)
  coder = build(vbq.Samples(means, np.ones_like(means)))
  for rate in range(len(coder.settings)):
    symbols = np.zeros((1, 64, 64, 1), np.int32)
    decoded = coder.decode(coder.encode(symbols, rate), symbols.shape, rate)
    np.testing.assert_array_equal(decoded, symbols)
