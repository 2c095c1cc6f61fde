"""The mean-scale hyperprior family: its bits, its integer coding, its configs, its entry points."""

import hashlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.stats
import tensorflow as tf

import configs
from common import (
  bitstream,
  checkpoints,
  cli,
  data,
  eval_lib,
  hyper,
  quantizers,
  rd,
  results,
  runs,
  schedules,
  train_lib,
)
from common.bitstream import BitstreamError
from mshyper import codec as mshyper_codec
from mshyper.codec import build
from tests.conftest import (
  ROOT,
  TINY_MODELS,
  picture,
  run_command,
  run_entry_point,
  tiny_arguments,
  train,
)

CONFIGS = ["mbt2018", "jpegl", "two_layer_syn", "two_layer_syn2"]


def _config(name, **model):
  """The config of `name.py:variant` with values of its model_config; `__` stands for a dot."""
  config = hyper.load(f"mshyper/configs/{name}").get_config()
  hyper.set_values(config, {f"model_config.{k.replace('__', '.')}": v for k, v in model.items()})
  return config


def _codec(name="mbt2018.py:tiny", seed=0, **model):
  """An untrained codec; tables are not built yet."""
  tf.keras.utils.set_random_seed(seed)
  return build(_config(name, **model).model_config)


def _small(seed=0, **model):
  """One of a few channels, whose means and scales vary as a trained one's do."""
  codec = _codec(seed=seed, **{**TINY_MODELS["mshyper"][1], **model})
  _disturb(codec, seed)
  codec.prepare()
  return codec


def _disturb(codec, seed=0):
  random = np.random.default_rng(seed)
  for v in codec.trainable_variables:
    v.assign_add(random.normal(0, 0.05, v.shape))
  for layer in codec.hyper_synthesis.layers:
    layer.kernel.assign(1.5 * layer.kernel)


def _twin(codec, **model):
  """Another codec of the same weights, without tables."""
  twin = _codec(seed=7, **{**TINY_MODELS["mshyper"][1], **model})
  for ours, theirs in zip(twin.variables, codec.variables):
    ours.assign(theirs)
  return twin


def _photograph(height, width, index=0):
  _, image = data.load_eval_images("sample")[index]
  return image[:height, :width]


def _round():
  return quantizers.make_quantizer("round")()


@pytest.fixture(scope="module")
def small():
  return _small()


# --- Bits -----------------------------------------------------------------------------------------


def test_bits_are_those_of_the_plain_formula(small):
  x = tf.constant(np.stack([picture(64, 128, i) for i in range(2)]), tf.float32)
  latents = small.infer(x)
  coded = small.code(latents, _round())
  y, z = latents["y"].loc.numpy(), latents["z"].loc.numpy()
  offset = small.prior.offset.numpy()
  assert np.any(offset)
  z_hat = np.round(z - offset) + offset
  parameters = small.hyper_synthesis(tf.constant(z_hat)).numpy().astype(np.float64)
  mean, log_scale = np.split(parameters, 2, axis=-1)
  scale = np.clip(np.exp(log_scale), 0.11, 256)
  integers = np.round(y - mean)
  below, above = (scipy.stats.norm.sf((np.abs(integers) + side) / scale) for side in (-0.5, 0.5))
  np.testing.assert_allclose(
    coded.bits["y"], -np.log2(below - above).sum(axis=(1, 2, 3)), rtol=1e-3
  )
  cdf = small.prior.distribution.base.cdf
  probability = (cdf(z_hat + 0.5) - cdf(z_hat - 0.5)).numpy()
  np.testing.assert_allclose(coded.bits["z"], -np.log2(probability).sum(axis=(1, 2, 3)), rtol=2e-3)
  np.testing.assert_allclose(coded.decode["y"], integers + mean, atol=1e-4)
  assert scale.std() > 0.01 and np.abs(mean).max() > 0.1  # Or the formula would not be tried.


def test_mixed_quantization_codes_noise_and_decodes_rounded_values():
  codec = _small(quantizer="mixedq")
  np.testing.assert_array_equal(codec.prior.offset, 0)  # The grid of z: the integers.
  calls = {}
  mixed = quantizers.make_quantizer("mixedq")(seed=(0, 1))

  def recording(name, loc, offset):
    calls[name] = (loc, offset, mixed(name, loc, offset))
    return calls[name][2]

  latents = codec.infer(tf.constant(picture(64, 128)[None], tf.float32))
  coded = codec.code(latents, recording)
  assert list(calls) == ["z", "y"]  # The mean of y depends on z.
  _, offset, z = calls["z"]
  np.testing.assert_array_equal(offset, 0)
  np.testing.assert_allclose(z.decode, np.round(z.decode), atol=1e-5)
  mean, log_scale = np.split(codec.hyper_synthesis(z.decode).numpy(), 2, axis=-1)
  y_loc, y_mean, y = calls["y"]
  np.testing.assert_allclose(y_mean, mean, atol=1e-5)
  np.testing.assert_array_equal(coded.decode["y"], y.decode)
  np.testing.assert_allclose(y.decode - mean, np.round(y.decode - mean), atol=1e-4)
  noise = (y.rate - y_loc).numpy()
  assert np.abs(noise).max() <= 0.5 + 1e-5 and noise.std() > 0.25
  np.testing.assert_allclose(
    coded.bits["y"], codec.conditional.bits(y.rate, mean, log_scale), rtol=1e-5
  )
  np.testing.assert_allclose(coded.bits["z"], codec.prior.bits(z.rate), rtol=1e-5)


def test_the_uniform_noise_model_has_a_shifted_grid_of_z(small):
  assert np.any(small.prior.offset.numpy() != 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_trainable_variable_gets_a_finite_gradient(name):
  config = _config(f"{name}.py:tiny")
  tf.keras.utils.set_random_seed(0)
  codec = build(config.model_config)
  x = tf.constant(_photograph(64, 64)[None], tf.float32)
  codec.calibrate(x)
  quantizer = quantizers.make_quantizer(config.model_config.quantizer)
  for disturbed in (False, True):  # As training starts; and away from branches that start at zero.
    if disturbed:
      _disturb(codec)
    with tf.GradientTape() as tape:
      loss = rd.rd_terms(codec, x, 0.01, quantizer(seed=(0, 0))).loss
    for v, gradient in zip(
      codec.trainable_variables, tape.gradient(loss, codec.trainable_variables)
    ):
      assert gradient is not None, v.name
      assert np.all(np.isfinite(gradient)), v.name
      assert not disturbed or np.any(gradient != 0), v.name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mbt2018", "two_layer_syn2"])
def test_training_starts_near_the_data(name):
  """Calibrated densities: bits of the first step are finite and of the order of the last one's."""
  x = tf.constant(_photograph(256, 256)[None], tf.float32)
  codec = _codec(f"{name}.py:tiny", rd_lambda=0.01)
  bpp = {}
  for when in ("before", "after"):
    if when == "after":
      codec.calibrate(x)
    coded = codec.code(codec.infer(x), quantizers.make_quantizer("unoise")(seed=(0, 0)))
    bpp[when] = {k: float(v[0]) / 256**2 for k, v in coded.bits.items()}
  assert 0 < bpp["after"]["y"] < 1.5 and 0 < bpp["after"]["z"] < 0.15
  assert sum(bpp["after"].values()) < 0.5 * sum(bpp["before"].values())
  mean, log_scale = tf.split(codec.hyper_synthesis(codec.infer(x)["z"].loc), 2, axis=-1)
  y = codec.infer(x)["y"].loc.numpy()
  wide = y.std(axis=(0, 1, 2)) > 1
  assert (
    np.corrcoef(np.mean(log_scale, axis=(0, 1, 2))[wide], np.log(y.std((0, 1, 2)))[wide])[0, 1]
    > 0.9
  )
  np.testing.assert_allclose(
    np.mean(mean, axis=(0, 1, 2)), y.mean(axis=(0, 1, 2)), atol=0.5 + 0.1 * y.std()
  )


def test_without_a_dct_nothing_is_calibrated():
  codec = _codec(init="random", **TINY_MODELS["mshyper"][1])
  before = [v.numpy() for v in codec.variables]
  codec.calibrate(tf.constant(picture(64, 64)[None], tf.float32))
  for a, b in zip(before, codec.variables):
    np.testing.assert_array_equal(a, b)


# --- Coding ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS[1:])
def test_other_transforms_round_trip_too(name):
  """The contract test has mbt2018; sizes, flat and noisy pictures of the others."""
  codec = _codec(f"{name}.py:tiny")
  codec.calibrate(rd.to_batch(_photograph(128, 128)))
  codec.prepare()
  random = np.random.default_rng(0)
  for image in (
    picture(1, 1),
    picture(7, 5),
    picture(17, 67),
    np.full([9, 70, 3], 255, np.uint8),
    random.integers(0, 256, [33, 20, 3], np.uint8),
  ):
    latents = rd.infer(codec, rd.to_batch(image))
    own = rd.to_image(rd.synthesize(codec, codec.rounded(latents), image.shape[:2]))
    np.testing.assert_array_equal(codec.decompress(codec.compress(image)), own)


def test_files_decode_to_what_rounding_a_batch_gives(small):
  """`rounded` of several images, of each alone, and `unpack` of each one's file: the same bits."""
  x = tf.constant(np.stack([picture(100, 140, i) for i in range(3)]), tf.float32)
  latents = rd.infer(small, x)
  together = small.rounded(latents)["y"].numpy()
  for i in range(3):
    alone = {k: v._replace(loc=v.loc[i : i + 1]) for k, v in latents.items()}
    np.testing.assert_array_equal(small.rounded(alone)["y"][0], together[i])
    decoded, size = small.unpack(small.pack(alone, (100, 140)))
    np.testing.assert_array_equal(decoded["y"][0], together[i])
    assert size == (100, 140)


def test_extreme_latents_come_back(small):
  latents = rd.infer(small, tf.constant(picture(64, 64)[None], tf.float32))
  for value in (0.0, 1e6, -1e12, np.inf, np.nan):
    extreme = {}
    for name, latent in latents.items():
      loc = latent.loc.numpy()
      loc[:, 0, 0] = value
      extreme[name] = latent._replace(loc=tf.constant(loc))
    expected = small.rounded(extreme)["y"]
    assert np.all(np.isfinite(expected))
    np.testing.assert_array_equal(small.unpack(small.pack(extreme, (64, 64)))[0]["y"], expected)


def test_forged_sections_of_the_latents_are_refused(small):
  """The contract test forges the first section, z; here y, and sections that change places."""
  stream = bitstream.read(small.compress(picture(80, 100)))
  z, y = stream.sections
  random = np.random.default_rng(0)
  forgeries = [(z, b""), (z, b"\xff" * 20), (z, b"\0" + bytes(200)), (y, z), (z, y[:-1]), (z, z)]
  for _ in range(40):
    mutated = bytearray(y)
    mutated[random.integers(len(mutated))] ^= 1 << random.integers(8)
    forgeries.append((z, bytes(mutated)))
  for sections in forgeries:
    forged = bitstream.Bitstream(
      stream.family, stream.fingerprint, 80, 100, sections, stream.symbols_crc
    )
    with pytest.raises(BitstreamError):
      small.decompress(bitstream.write(forged))


def test_another_familys_file_is_refused(small):
  stream = bitstream.read(small.compress(picture(20, 30)))
  forged = bitstream.Bitstream(
    "factorized", stream.fingerprint, 20, 30, stream.sections, stream.symbols_crc
  )
  with pytest.raises(BitstreamError):
    small.decompress(bitstream.write(forged))


def test_float_coding_round_trips_in_its_process_and_is_another_codec(small):
  plain = _twin(small, exact_coding=False)
  plain.prepare()
  assert plain.fingerprint != small.fingerprint
  image = picture(90, 70)
  latents = rd.infer(plain, rd.to_batch(image))
  own = rd.to_image(rd.synthesize(plain, plain.rounded(latents), (90, 70)))
  data_bytes = plain.compress(image)
  np.testing.assert_array_equal(plain.decompress(data_bytes), own)
  with pytest.raises(BitstreamError):
    small.decompress(data_bytes)
  # The float means are near the exact ones, so the file is about as long.
  assert abs(len(small.compress(image)) - len(data_bytes)) <= 0.05 * len(data_bytes)
  # Its files depend on the hyper-synthesis's own weights.
  before = plain.fingerprint
  plain.hyper_synthesis.layers[0].bias.assign_add(1e-3 * tf.ones([4]))
  plain.prepare()
  assert plain.fingerprint != before


def test_exact_and_float_conditions_agree(small):
  """Means to about a percent of their spread at the worst, rows to their neighbours."""
  plain = _twin(small, exact_coding=False)
  plain.prepare()
  z = small.prior.symbols(rd.infer(small, rd.to_batch(picture(200, 260)))["z"].loc)
  mean, rows = small._conditions(z)
  float_mean, float_rows = plain._conditions(z)
  assert mean.dtype == np.float32 and rows.dtype == np.uint8
  rows, float_rows = rows.astype(int), float_rows.astype(int)
  np.testing.assert_allclose(mean, float_mean, atol=2**-8 + 0.03 * np.std(float_mean))
  assert np.abs(rows - float_rows).max() <= 1 and np.mean(rows != float_rows) < 0.12
  assert len(np.unique(rows)) > 5
  np.testing.assert_array_equal(mean * 1024, np.round(mean * 1024.0))


def test_a_batch_too_large_for_one_go_has_the_conditions_of_each_image(small, monkeypatch):
  """In a file an image is alone, and scales follow from what is computed at once."""
  z = np.random.default_rng(0).normal(0, 3, [4, 3, 4, small.prior.channels])
  z = np.round(z * np.array([0.2, 1, 4, 20])[:, None, None, None]).astype(np.int32)
  size = small._conditions(z)[0][0].size
  for limit in (1 << 22, 2 * size, size // 2):
    monkeypatch.setattr(mshyper_codec, "_HYPER_VALUES_AT_ONCE", limit)
    alone = [small._conditions(z[i : i + 1]) for i in range(len(z))]
    for together, each in zip(small._conditions(z), zip(*alone)):
      np.testing.assert_array_equal(together, np.concatenate(each))


def test_a_hyper_synthesis_that_is_not_exact_needs_float_coding():
  model = _config("mbt2018.py:tiny").model_config.to_dict()
  model["hyper_synthesis"] = dict(
    name="MBT2018Synthesis", n_layers=2, channels_base=8, in_channels=128, output_channels=640
  )
  with pytest.raises(ValueError, match="exact_coding=False"):
    build(model)
  codec = build({**model, "exact_coding": False})
  codec.calibrate(rd.to_batch(_photograph(64, 64)))
  codec.prepare()
  image = picture(30, 70)
  latents = rd.infer(codec, rd.to_batch(image))
  expected = codec.rounded(latents)["y"]
  np.testing.assert_array_equal(codec.unpack(codec.compress(image))[0]["y"], expected)


# --- Coding state ---------------------------------------------------------------------------------


def test_a_twin_that_is_given_the_coding_state_decodes(small, tmp_path):
  np.savez(tmp_path / "coding.npz", **small.derive_coding())
  twin = _twin(small)
  with pytest.raises(RuntimeError, match="prepare"):
    _ = twin.fingerprint
  with np.load(tmp_path / "coding.npz") as state:
    twin.prepare(dict(state))
  assert twin.fingerprint == small.fingerprint
  image = picture(50, 90)
  data_bytes = small.compress(image)
  np.testing.assert_array_equal(twin.decompress(data_bytes), small.decompress(data_bytes))
  assert twin.compress(image) == data_bytes


def test_the_analysis_is_no_part_of_the_decoder(small):
  twin = _twin(small)
  twin.prepare()
  before = twin.fingerprint
  for v in twin.analysis.trainable_variables + twin.hyper_analysis.trainable_variables:
    v.assign_add(tf.ones_like(v))
  twin.prepare()
  assert twin.fingerprint == before == small.fingerprint


def test_every_array_of_the_coding_state_is_in_the_fingerprint(small):
  state = small.derive_coding()
  assert {"z/offset", "z/cdf", "z/first", "y/cdf", "y/first", "hyper/0/kernel"} <= set(state)
  twin = _twin(small)
  for key, array in state.items():
    tampered = array.copy()
    if key.endswith("cdf"):  # One count moves from a symbol to the one before.
      (movable,) = np.nonzero((array[:-1] > 16) & (np.diff(array) > 1))
      tampered[movable[0]] += 1
    elif key == "z/offset":
      tampered[0] = 0.25 if tampered[0] != 0.25 else 0.125
    elif key.endswith("bits"):
      tampered -= 1
    else:
      tampered.ravel()[0] += 1
    twin.prepare({**state, key: tampered})
    assert twin.fingerprint != small.fingerprint, key
  twin.prepare(state)
  assert twin.fingerprint == small.fingerprint


@pytest.mark.slow
def test_a_state_that_is_refused_leaves_no_codec_that_pretends_to_be_whole(small):
  image = picture(20, 30)
  data_bytes = small.compress(image)
  state = small.derive_coding()
  twin = _twin(small)
  twin.prepare(state)
  for wrong in (
    {**state, "hyper/1/kernel": state["hyper/1/kernel"][:, :, :-1]},
    {**state, "y/cdf": state["z/cdf"], "y/first": state["z/first"]},
    {k: v for k, v in state.items() if k != "hyper/2/bias"},
    {k: v for k, v in state.items() if not k.startswith("y/")},
  ):
    with pytest.raises((ValueError, KeyError)):
      twin.prepare({**wrong, "z/offset": 0 * state["z/offset"]})
    with pytest.raises(RuntimeError, match="prepare"):
      twin.decompress(data_bytes)
    with pytest.raises(RuntimeError, match="prepare"):
      twin.compress(image)
  twin.prepare(state)
  np.testing.assert_array_equal(twin.decompress(data_bytes), small.decompress(data_bytes))


def test_changing_an_exported_state_changes_no_codec(small):
  image = picture(30, 40)
  expected = small.compress(image)
  fingerprint = small.fingerprint
  for array in small.derive_coding().values():
    array[...] = 0
  assert small.compress(image) == expected
  small.prepare()
  assert small.fingerprint == fingerprint and small.compress(image) == expected


def test_checkpoints_hold_no_coding_state(small, tmp_path):
  written = train_lib.weights_only(small).write(str(tmp_path / "weights"))
  names = [name for name, _ in tf.train.list_variables(written)]
  assert sum("hyper_synthesis" in n for n in names) == 6  # Three kernels, three biases.
  assert not any("exact" in n or "offset" in n for n in names)


# --- On every machine -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def brief():
  """mbt2018:tiny after a few steps on photographs: its hyper-synthesis is that of a real size."""
  config = _config("mbt2018.py:tiny", rd_lambda=0.01)
  tf.keras.utils.set_random_seed(0)
  state = train_lib.TrainState(build(config.model_config))
  crops = np.stack([_photograph(512, 512, i)[100:228, 100:228] for i in range(6)])
  state.codec.calibrate(tf.constant(crops, tf.float32))
  step = train_lib.make_train_step(state, config)
  for i in range(12):
    step(tf.constant(crops), np.int32(i), np.float32(1e-3), np.float32(0.01))
  state.codec.prepare()
  return state.codec


_CHILD = """
import hashlib, json, os, sys
import numpy as np
import tensorflow as tf
threads, folder, batches = int(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
tf.config.threading.set_intra_op_parallelism_threads(threads)
tf.config.threading.set_inter_op_parallelism_threads(threads)
from common import hyper, train_lib
from common.codec import Latent
from mshyper.codec import build
config = hyper.load("mshyper/configs/mbt2018.py:tiny").get_config()
codec = build(config.model_config)
train_lib.weights_only(codec).read(f"{folder}/weights").assert_existing_objects_matched()
codec.prepare()
digest = lambda a: hashlib.sha256(a).hexdigest()
of_array = lambda a: digest(np.ascontiguousarray(a).tobytes())
files, decoded, rounded, exacts, floats = [], [], [], [], []
with np.load(f"{folder}/latents.npz") as arrays:
  for i in range(sum(name.startswith("size") for name in arrays)):
    latents = {k: Latent(tf.constant(arrays[f"{k}{i}"])) for k in ("y", "z")}
    files.append(digest(codec.pack(latents, tuple(arrays[f"size{i}"].tolist()))))
    with open(f"{folder}/{i}.ntc", "rb") as f:  # The parent's file.
      decoded.append(of_array(codec.unpack(f.read())[0]["y"].numpy()))
    symbols = codec.prior.symbols(latents["z"].loc)
    exacts.append([of_array(a) for a in codec._conditions(symbols)])
    floats.append(of_array(codec.graph("hyper_synthesis")(codec.prior.values(symbols)).numpy()))
  for batch in batches:
    latents = {k: Latent(tf.constant(arrays[f"{k}_several"][batch])) for k in ("y", "z")}
    rounded += zip(batch, map(of_array, codec.rounded(latents)["y"].numpy()))
print(json.dumps({
  "fingerprint": codec.fingerprint.hex(), "files": files, "decoded": decoded, "rounded": rounded,
  "exacts": exacts, "floats": floats,
}))
"""

# Threads, oneDNN, and how several images of one size are put into batches.
_SETTINGS = [
  ("1", "0", [[0, 1, 2]]),
  ("2", "0", [[2, 0], [1]]),
  ("1", "1", [[2], [0, 1]]),
  ("2", "1", [[1, 0, 1, 2]]),
]


@pytest.fixture(scope="module")
def elsewhere(brief, tmp_path_factory):
  """What this process codes and decodes, and what those of `_SETTINGS` do, as digests."""
  folder = tmp_path_factory.mktemp("elsewhere")

  def digest(content):
    return hashlib.sha256(content).hexdigest()

  def rounded(latents):
    return digest(brief.rounded(latents)["y"].numpy().tobytes())

  train_lib.weights_only(brief).write(str(folder / "weights"))
  expected = {"fingerprint": brief.fingerprint.hex(), "files": [], "decoded": []}
  several = np.stack([_photograph(100, 140, i) for i in range(3)])
  latents = rd.infer(brief, tf.constant(several, tf.float32))
  arrays = {f"{k}_several": v.loc.numpy() for k, v in latents.items()}
  expected["rounded"] = [
    rounded({k: v._replace(loc=v.loc[i : i + 1]) for k, v in latents.items()}) for i in range(3)
  ]
  for i, size in enumerate([(300, 410), (64, 65)]):
    latents = rd.infer(brief, rd.to_batch(_photograph(*size, i)))
    arrays |= {f"{k}{i}": v.loc.numpy() for k, v in latents.items()} | {f"size{i}": size}
    file = brief.pack(latents, size)
    (folder / f"{i}.ntc").write_bytes(file)
    expected["files"].append(digest(file))
    expected["decoded"].append(rounded(latents))
  np.savez(folder / "latents.npz", **arrays)
  found = {}
  for pair in (_SETTINGS[:2], _SETTINGS[2:]):  # Two at a time.
    children = [
      subprocess.Popen(
        [sys.executable, "-c", _CHILD, threads, str(folder), json.dumps(batches)],
        cwd=ROOT,
        env={**os.environ, "TF_ENABLE_ONEDNN_OPTS": onednn, "TF_CPP_MIN_LOG_LEVEL": "3"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
      )
      for threads, onednn, batches in pair
    ]
    for setting, child in zip(pair, children):
      output, errors = child.communicate(timeout=300)
      assert child.returncode == 0, errors
      found["threads {}, oneDNN {}, batches {}".format(*setting)] = json.loads(
        output.splitlines()[-1]
      )
  return expected, found


@pytest.mark.slow
def test_files_are_the_same_and_decode_bit_for_bit_under_other_threads_and_kernels(elsewhere):
  """Four processes code the same latents, and each decodes this process's files."""
  expected, found = elsewhere
  assert len(found) == len(_SETTINGS)
  for setting, result in found.items():
    for key in ("fingerprint", "files", "decoded"):
      assert result[key] == expected[key], (setting, key)


@pytest.mark.slow
def test_rounding_a_batch_elsewhere_gives_what_rounding_each_image_here_gives(elsewhere):
  expected, found = elsewhere
  assert len(set(expected["rounded"])) == 3
  for setting, result in found.items():
    assert {i for i, _ in result["rounded"]} == {0, 1, 2}
    for i, digest in result["rounded"]:
      assert digest == expected["rounded"][i], (setting, i)


@pytest.mark.slow
def test_integer_means_and_rows_agree_where_float_ones_do_not(elsewhere):
  """What exact coding is for. Whether the float ones differ is up to the machine's kernels."""
  _, found = elsewhere
  if len({str(result["floats"]) for result in found.values()}) == 1:
    pytest.skip("The float hyper-synthesis gives the same bits under all settings here.")
  assert len({str(result["exacts"]) for result in found.values()}) == 1


@pytest.mark.slow
def test_exact_coding_costs_little(brief):
  """Real bytes over the sample photographs, with integer and with float means and rows."""
  plain = build(_config("mbt2018.py:tiny", exact_coding=False).model_config)
  for ours, theirs in zip(plain.variables, brief.variables):
    ours.assign(theirs)
  plain.prepare()
  sizes = {brief: 0, plain: 0}
  estimate = 0.0
  for _, image in data.load_eval_images("sample"):
    latents = rd.infer(brief, rd.to_batch(image[:256, :256]))
    estimate += sum(float(b[0]) for b in brief.code(latents, _round()).bits.values())
    for codec in sizes:
      sections = bitstream.read(codec.pack(latents, (256, 256))).sections
      sizes[codec] += 8 * sum(len(s) for s in sections)
  exact, floats = sizes.values()
  print(f"exact / float {exact / floats - 1:+.3%}, exact / estimate {exact / estimate - 1:+.3%}")
  assert abs(exact / floats - 1) < 0.001
  # Less is possible: the escape symbol is cheaper than what a hardly trained model finds unlikely.
  assert exact < 1.003 * estimate


@pytest.mark.slow
def test_latents_as_the_model_expects_them_cost_what_it_estimates(brief):
  """y drawn from the float means and scales: no escapes hide what rows and integers cost."""
  real = estimate = 0.0
  random = np.random.default_rng(0)
  for _, image in data.load_eval_images("sample"):
    latents = rd.infer(brief, rd.to_batch(image[:256, :256]))
    z_hat = brief.prior.values(brief.prior.symbols(latents["z"].loc))
    mean, log_scale = tf.split(brief.hyper_synthesis(z_hat), 2, axis=-1)
    scale = np.clip(np.exp(log_scale), 0.11, 256)
    y = mean + random.normal(0, scale).astype(np.float32)
    latents["y"] = latents["y"]._replace(loc=y)
    estimate += float(brief.code(latents, _round()).bits["y"][0])
    real += 8 * len(bitstream.read(brief.pack(latents, (256, 256))).sections[1])
  print(f"real / estimate - 1 = {real / estimate - 1:+.3%}")
  assert abs(real / estimate - 1) < 0.003


@pytest.mark.slow
def test_exact_coding_rounds_latents_as_float_coding_nearly_always(brief):
  image = _photograph(256, 256)
  latents = rd.infer(brief, rd.to_batch(image))
  exact = brief.rounded(latents)["y"].numpy()
  floats = brief.code(latents, _round()).decode["y"].numpy()
  assert np.abs(exact - floats).max() < 1.01  # Next to a tie the other integer is taken.
  assert np.mean(np.abs(exact - floats) > 0.05) < 0.05


# --- Configs --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_configs_have_the_published_values(name):
  config = _config(f"{name}.py")
  model, options = config.model_config, config.train_eval_config
  steps = 2_000_000 if name == "mbt2018" else 1_800_000
  assert options.num_steps == steps
  assert config.train_data_config.batchsize == 8 and config.train_data_config.patchsize == 256
  optimizer = config.optimizer_config
  assert optimizer.learning_rate == 1e-4 and optimizer.gradient_clip_norm == 1.0
  assert optimizer.warmup_steps == steps // 50 and optimizer.decay_after_steps == steps * 4 // 5
  assert optimizer.decay_factor == 0.1 and optimizer.schedule == "piecewise"
  assert model.init == "random" and model.exact_coding
  assert model.quantizer == ("mixedq" if name == "two_layer_syn2" else "unoise")
  codec = build(model)
  assert codec.downsample_factor == 64
  assert codec.analysis.out_channels == codec.prior.channels == 320
  counts = {k: s.transform.num_parameters() for k, s in codec.stages().items()}
  if name in ("jpegl", "two_layer_syn"):
    assert (counts["f_h"], counts["g_h"]) == (6_042_560, 9_166_240)
    assert counts["f"] == 7_337_792
    assert counts["g"] == (311_043 if name == "jpegl" else 1_299_003)
  expected = {
    "mbt2018": {"analysis.channels_base": 192, "synthesis.channels_base": 192},
    "jpegl": {"synthesis.kernel_size": 18, "synthesis.strides": 16},
    "two_layer_syn": {
      "synthesis.channels": (12, 3),
      "synthesis.kernel_sizes": (13, 5),
      "synthesis.strides": (8, 2),
    },
    "two_layer_syn2": {
      "analysis.channels_base": 256,
      "analysis.activation_type": "leaky_relu",
      "synthesis.name": "TwoLayerSynthesis",
      "synthesis.kernel_sizes": (13, 5),
    },
  }[name]
  for key, value in expected.items():
    assert hyper.get_value(model, key) == value, key


@pytest.mark.parametrize("name", CONFIGS)
def test_sweeps_have_the_published_rates_and_tiny_ones_four(name):
  published = [0.08, 0.04, 0.02, 0.01, 0.005, 0.0025, 0.00125]
  units = _units(f"{name}.py")
  rates = [u["model_config.rd_lambda"] for u in units]
  if name == "two_layer_syn2":
    assert len(units) == 14
    settings = {(u["model_config.rd_lambda"], u["model_config.synthesis.channels"]) for u in units}
    assert settings == {(rate, (c, 3)) for rate in published for c in (24, 48)}
  else:
    assert rates == published
  tiny = [u["model_config.rd_lambda"] for u in _units(f"{name}.py:tiny")]
  assert tiny == [0.04, 0.016, 0.0063, 0.0025]


def _units(source):
  """The overrides of a sweep's settings."""
  return [
    {k: tuple(v) if isinstance(v, list) else v for k, v in unit.overrides.items()}
    for unit in hyper.expand(hyper.load(f"mshyper/configs/{source}"), "mshyper", "train")
  ]


@pytest.mark.parametrize("name", CONFIGS)
def test_an_unknown_variant_lists_the_known_ones(name, capsys):
  assert train(["--config", str(ROOT / f"mshyper/configs/{name}.py:huge")], "mshyper") == 2
  error = capsys.readouterr().err
  assert "'huge'" in error and "Known: tiny" in error and "Traceback" not in error


@pytest.mark.parametrize("name", CONFIGS)
def test_low_rates_warm_up_with_ten_times_lambda(name):
  """For the first fifth of the steps where lambda <= 0.01; the short variants do without."""
  for source, steps, factor in ((f"{name}.py", 1000, 10), (f"{name}.py:tiny", 1000, 1)):
    for rate, warms_up in ((0.01, True), (0.00125, True), (0.02, False)):
      config = _config(source, rd_lambda=rate)
      hyper.set_values(config, {"train_eval_config.num_steps": steps})
      model = config.model_config
      at = schedules.rd_lambda(
        model.rd_lambda,
        model.rd_lambda_warmup_steps,
        model.rd_lambda_warmup_factor,
        model.rd_lambda_warmup_below,
      )
      first = rate * factor if warms_up else rate
      assert [at(s) for s in (0, 199, 200, 999)] == pytest.approx([first, first, rate, rate])


def test_configs_do_not_share_what_can_be_changed():
  tiny, full = _config("jpegl.py:tiny"), _config("jpegl.py")
  assert tuple(full.model_config.analysis.channels) == (192, 192, 192, 320)
  assert tuple(tiny.model_config.analysis.channels) == (48, 64, 96, 320)
  assert _config("mbt2018.py").model_config.hyper_analysis.bottleneck_size == 320


@pytest.mark.parametrize(
  "model,expected",
  [
    ({"analysis__output_channels": 100, "synthesis__in_channels": 100}, "gives 100 channels"),
    ({"hyper_synthesis__bottleneck_size": 100}, "it must be 640"),
    ({"hyper_synthesis__in_channels": 100}, "synthesis takes 100"),
    ({"quantizer": "noise"}, "Known: danneal"),
    ({"init": "haar"}, "Known: random, dct"),
  ],
)
def test_models_that_do_not_fit_are_refused_with_the_numbers(model, expected):
  with pytest.raises(ValueError, match=expected):
    _codec(**model)


# --- Entry points ---------------------------------------------------------------------------------


def _weights(run, step=None):
  step = step or checkpoints.Checkpoints(run.checkpoints_dir).latest()
  prefix = str(run.checkpoints_dir / f"step-{step:08d}" / "state")
  return {
    name: tf.train.load_variable(prefix, name)
    for name, _ in tf.train.list_variables(prefix)
    if "OBJECT_GRAPH" not in name
  }


def _only_run(experiments):
  (path,) = experiments.glob("*/wid=*")
  return runs.RunDir.open(path)


@pytest.mark.slow
def test_a_broken_training_ends_with_the_weights_of_the_unbroken_one(
  trained_hyperprior_run, tmp_path
):
  """As after a kill at step 5 and a full disk at step 4: goes on from step 3."""
  copied = tmp_path / "1" / trained_hyperprior_run.path.name
  shutil.copytree(trained_hyperprior_run.path, copied)
  run = runs.RunDir.open(copied)
  ckpts = checkpoints.Checkpoints(run.checkpoints_dir)
  assert ckpts.steps() == [2, 3, 4, 6]
  shutil.rmtree(ckpts.path(6))
  (ckpts.path(4) / "manifest.json").write_text("{")
  run.write_state("RUNNING")
  assert train(["--workdir", str(copied)], "mshyper") == 0
  assert run.read_state()["state"] == "DONE"
  a, b = _weights(trained_hyperprior_run), _weights(run)
  assert a.keys() == b.keys() and len(a) > 40
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.mark.slow
def test_training_moves_all_kernels_and_the_prior(trained_hyperprior_run):
  before, after = (_weights(trained_hyperprior_run, step) for step in (2, 6))
  names = [k for k in before if k.startswith("codec/") and ("kernel" in k or "prior" in k)]
  assert len(names) == 8 + 6 + 8
  for name in names:
    assert np.any(before[name] != after[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["checkpoint", "run", "experiment"])
def test_warm_start_takes_the_weights(trained_hyperprior_run, pictures, tmp_path, kind):
  source = {
    "checkpoint": trained_hyperprior_run.checkpoints_dir / "step-00000006",
    "run": trained_hyperprior_run.path,
    "experiment": trained_hyperprior_run.path.parent,
  }[kind]
  argv = tiny_arguments(
    pictures,
    tmp_path,
    f"--config.train_eval_config.warm_start={source}",
    "--config.optimizer_config.learning_rate=0.0",
    *(["--config.train_eval_config.warm_start_wid=0"] if kind == "experiment" else []),
    steps=1,
    family="mshyper",
  )
  assert train(argv, "mshyper") == 0
  start, end = _weights(trained_hyperprior_run), _weights(_only_run(tmp_path))
  names = [k for k in start if k.startswith("codec/")]
  assert len([k for k in names if "kernel" in k]) == 8 + 6
  for k in names:
    np.testing.assert_array_equal(start[k], end[k], err_msg=k)


@pytest.fixture(scope="module")
def evaluated(trained_hyperprior_run, odd_pictures, tmp_path_factory):
  from mshyper import eval as entry

  folder = tmp_path_factory.mktemp("results")
  argv = ["--workdir", str(trained_hyperprior_run.path), "--dataset", str(odd_pictures)]
  argv += ["--results_dir", str(folder), "--save_dir", str(folder / "saved")]
  assert run_command(cli.eval_main, "mshyper", entry.run, argv) == 0
  (path,) = folder.glob("*/bitstream/*.json")
  return folder, results.read(path)


@pytest.mark.slow
def test_evaluation_writes_real_bytes(evaluated, trained_hyperprior_run, odd_pictures):
  from PIL import Image

  folder, result = evaluated
  assert result.mode == "bitstream" and result.run["family"] == "mshyper" and result.step == 6
  assert len(result.records) == 5
  codec, _ = eval_lib.load_codec(trained_hyperprior_run, build)
  for record in result.records:
    file = folder / "saved" / record.image.replace(".png", ".ntc")
    assert record.num_bytes == file.stat().st_size
    assert 0 < record.bpp_estimated < record.bpp
    decoded = np.asarray(Image.open(file.with_suffix(".png")))
    np.testing.assert_array_equal(codec.decompress(file.read_bytes()), decoded)


@pytest.mark.slow
def test_iterative_inference_lowers_the_loss_and_ends_in_files_of_the_same_decoder(
  evaluated, trained_hyperprior_run, odd_pictures, tmp_path, monkeypatch
):
  monkeypatch.setattr(configs, "RESULTS_DIR", tmp_path / "results")
  values = {
    "data_config.dataset": odd_pictures,
    "data_config.batchsize": 3,
    "train_eval_config.num_steps": 30,
    "train_eval_config.warm_start_exp_dir": trained_hyperprior_run.path.parent,
    "train_eval_config.warm_start_wid": 0,
  }
  argv = [
    "--config",
    str(ROOT / "mshyper/configs/itinf.py:tiny"),
    f"--experiments_dir={tmp_path / 'xms'}",
    *[f"--config.{k}={v}" for k, v in values.items()],
  ]
  assert run_entry_point("mshyper", "itinf", argv) == 0
  run = _only_run(tmp_path / "xms")
  (path,) = (tmp_path / "results").glob("*/itinf/*.json")
  result = results.read(path)
  assert result.mode == "itinf" and len(result.records) == 5
  codec, _ = eval_lib.load_codec(trained_hyperprior_run, build)
  gains = []
  for record in result.records:
    folder = run.path / "images" / record.image
    facts = runs.read_json(folder / "facts.json")
    gains.append(facts["loss_before"] - facts["loss_after"])
    file = (folder / "image.ntc").read_bytes()
    assert record.num_bytes == len(file) and codec.decompress(file).dtype == np.uint8
    with np.load(folder / "latents.npz") as latents:
      assert set(latents) == {"y", "z"}
  assert min(gains) >= 0 and np.mean(gains) > 0


def test_itinf_has_a_work_unit_for_every_rate():
  for variant, count in (("", 7), (":tiny", 4)):
    units = hyper.expand(hyper.load(f"mshyper/configs/itinf.py{variant}"), "mshyper", "itinf")
    wids = [u.config["train_eval_config"]["warm_start_wid"] for u in units]
    assert wids == list(range(count))


def test_a_float_codec_says_that_another_machine_may_round_otherwise(monkeypatch):
  codec = _small(exact_coding=False)
  data_bytes = codec.compress(picture(64, 96))
  conditions = codec._conditions

  def rounds_otherwise(z):
    mean, rows = conditions(z)
    rows[:, ::2] += 1
    return mean, rows

  monkeypatch.setattr(codec, "_conditions", rounds_otherwise)
  with pytest.raises(BitstreamError, match="exact_coding=False"):
    codec.decompress(data_bytes)
