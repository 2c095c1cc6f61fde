"""LPIPS: the published distances of its example pictures, its weights file, its absence."""

import logging

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import configs
from common import flags, lpips, lpips_weights, metrics
from tests.conftest import picture


def made_up_weights(seed=0):
  random = np.random.default_rng(seed)
  return {
    name: np.abs(random.normal(0, 0.05, shape)).astype(np.float32)
    if name.startswith("lin")
    else random.normal(0, 0.05, shape).astype(np.float32)
    for name, shape in lpips.shapes().items()
  }


@pytest.fixture
def real_weights():
  if metrics.lpips_weights() is None:
    pytest.skip(f"no LPIPS weights at {configs.LPIPS_WEIGHTS} or in NTC_SHARED_DIR")
  return lpips.load()


@pytest.fixture
def weights_file(tmp_path, monkeypatch):
  """A file of made-up weights that `find` finds."""
  path = tmp_path / "weights.npz"
  lpips_weights.write(made_up_weights(), path)
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS", path)
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS_IS_SET", True)
  return path


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS", tmp_path / "nothing.npz")
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS_IS_SET", True)
  metrics._warn_that_lpips_is_left_out.cache_clear()


def _example(name):
  path = configs.SHARED_DIR / "data" / "lpips_examples" / f"{name}.png"
  if not path.is_file():
    pytest.skip(f"no example pictures at {path} (NTC_SHARED_DIR)")
  return np.array(Image.open(path).convert("RGB"))


@pytest.mark.parametrize("other, expected", [("ex_p0", 0.7219), ("ex_p1", 0.1376)])
def test_the_published_distances_of_the_example_pictures(real_weights, other, expected):
  del real_weights
  assert metrics.lpips(_example("ex_ref"), _example(other)) == pytest.approx(expected, abs=1e-4)


def test_identical_pictures_have_distance_0_and_others_more(weights_file):
  del weights_file
  a, b = picture(40, 50), picture(40, 50, 1)
  assert metrics.lpips(a, a) == 0
  assert metrics.lpips(a, b) > 1e-4
  assert metrics.lpips(a, b) == pytest.approx(metrics.lpips(b, a), rel=1e-5)
  assert metrics.measure(a, b)["lpips"] == metrics.lpips(a, b)
  assert metrics.measure(a, b, with_lpips=False)["lpips"] is None


def test_pictures_that_are_too_small_have_none(weights_file):
  del weights_file
  side = lpips.MIN_SIDE
  assert metrics.lpips(picture(side, side), picture(side, side, 1)) is not None
  assert metrics.lpips(picture(side - 1, 90), picture(side - 1, 90, 1)) is None


def test_gradients_are_finite_also_where_features_vanish():
  weights = made_up_weights()
  x = tf.constant(np.stack([picture(32, 32), np.zeros([32, 32, 3], np.uint8)]), tf.float32)
  for y in (x, 255.0 - x):
    with tf.GradientTape() as tape:
      tape.watch(y)
      distance = lpips.distance(x, y, weights)
    assert np.all(np.isfinite(tape.gradient(distance, y)))
    assert distance.shape == [2]


def test_without_weights_it_is_left_out_with_one_warning(no_weights, caplog):
  del no_weights
  a, b = picture(40, 40), picture(40, 40, 1)
  with caplog.at_level(logging.WARNING):
    assert [metrics.measure(a, b)["lpips"] for _ in range(3)] == [None] * 3
  assert len(caplog.records) == 1
  assert "python -m common.lpips_weights" in caplog.text
  with pytest.raises(lpips.LpipsError, match=r"python -m common\.lpips_weights"):
    lpips.load()


def test_a_damaged_file_is_refused(weights_file):
  weights_file.write_bytes(weights_file.read_bytes()[:1000])
  lpips._read.cache_clear()
  with pytest.raises(lpips.LpipsError, match=r"cannot be read.*lpips_weights"):
    metrics.lpips(picture(40, 40), picture(40, 40, 1))


@pytest.mark.parametrize(
  "change, words",
  [
    (lambda w: w.pop("lin3"), "holds no lin3"),
    (lambda w: w.update(conv1_bias=np.zeros(3)), "conv1_bias .* shape"),
    (lambda w: w.update(lin0=-np.ones(64)), "impossible"),
  ],
)
def test_other_arrays_are_refused(change, words):
  weights = made_up_weights()
  change(weights)
  with pytest.raises(lpips.LpipsError, match=words):
    lpips.check(weights, "the file")


# --- Making the file ------------------------------------------------------------------------------

_NAMES = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")


def _state(dropout=True):
  """A state dict as the package `lpips` has it, of the made-up weights."""
  weights = made_up_weights()
  state = {"scaling_layer.shift": np.zeros([1, 3, 1, 1]), "lins.0.model.1.weight": np.zeros(1)}
  for i, name in enumerate(_NAMES):
    state[f"net.{name}.weight"] = weights[f"conv{i + 1}_kernel"].transpose(3, 2, 0, 1)
    state[f"net.{name}.bias"] = weights[f"conv{i + 1}_bias"]
    state[f"lin{i}.model.{int(dropout)}.weight"] = weights[f"lin{i}"][None, :, None, None]
  return state


@pytest.mark.parametrize("dropout", [True, False])
def test_a_state_of_the_package_becomes_the_same_weights(dropout):
  converted = lpips_weights.convert(_state(dropout))
  expected = made_up_weights()
  assert converted.keys() == expected.keys()
  for name in expected:
    np.testing.assert_array_equal(converted[name], expected[name], err_msg=name)


def test_another_networks_state_is_refused():
  state = _state()
  state["net.slice9.1.weight"] = state.pop("net.slice2.3.weight")
  with pytest.raises(lpips.LpipsError, match=r"net\.slice2\.3\.weight"):
    lpips_weights.convert(state)


def test_the_command_writes_a_file_that_is_found(tmp_path, monkeypatch, capsys):
  path = tmp_path / "folder" / "weights.npz"
  monkeypatch.setattr(lpips_weights, "state_of_package", _state)
  monkeypatch.setattr(configs, "LPIPS_WEIGHTS", path)
  lpips_weights.run([])
  assert str(path) in capsys.readouterr().out
  np.testing.assert_array_equal(lpips.load()["lin4"], made_up_weights()["lin4"])


def test_the_command_says_what_to_install():
  try:
    import lpips as package  # noqa: F401
    import torch  # noqa: F401
  except ImportError:
    with pytest.raises(flags.UsageError, match="pip install torch torchvision lpips"):
      lpips_weights.state_of_package()
  else:
    pytest.skip("the packages are installed")


def test_the_packages_own_weights_give_the_published_distance():
  pytest.importorskip("torch")
  pytest.importorskip("lpips")
  weights = lpips_weights.convert(lpips_weights.state_of_package())
  pair = [tf.constant(_example(n)[None], tf.float32) for n in ("ex_ref", "ex_p0")]
  assert float(lpips.distance(*pair, weights)[0]) == pytest.approx(0.7219, abs=1e-4)
