"""Checkpoints: whole or not at all, verified, strict."""

import pathlib
import shutil

import numpy as np
import pytest
import tensorflow as tf

from common import checkpoints
from common.checkpoints import CheckpointError, Checkpoints, MisfitError


class Model(tf.Module):
  def __init__(self, value, more=False):
    super().__init__()
    self.weight = tf.Variable([value, value])
    if more:
      self.extra = tf.Variable(7.0)


def _state(value, more=False):
  model = Model(float(value), more)
  return model, tf.train.Checkpoint(codec=model)


def _saved(folder, steps=(1, 2, 3), **kwargs):
  ckpts = Checkpoints(folder / "checkpoints", **kwargs)
  for step in steps:
    ckpts.save(_state(step)[1], step, {"loss": 1.0 / step})
  return ckpts


def test_what_was_saved_comes_back(tmp_path):
  ckpts = _saved(tmp_path)
  model, state = _state(0)
  ckpts.restore(state, ckpts.latest())
  np.testing.assert_array_equal(model.weight, [3, 3])
  assert ckpts.facts(2) == {"loss": 0.5}


def test_the_newest_n_stay_and_the_best(tmp_path):
  ckpts = Checkpoints(tmp_path, max_to_keep=2)
  for step in range(1, 7):
    ckpts.save(_state(step)[1], step)
    if step == 2:
      ckpts.mark_best(2, 0.1)
  assert ckpts.steps() == [2, 5, 6]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "manifest", "no manifest"])
def test_a_damaged_newest_checkpoint_is_passed_over(tmp_path, damage, caplog):
  ckpts = _saved(tmp_path)
  data = next(p for p in ckpts.path(3).iterdir() if ".data-" in p.name)
  if damage == "truncate":
    data.write_bytes(data.read_bytes()[:-3])
  elif damage == "flip":
    content = bytearray(data.read_bytes())
    content[0] ^= 1
    data.write_bytes(bytes(content))
  elif damage == "delete":
    data.unlink()
  elif damage == "manifest":
    (ckpts.path(3) / "manifest.json").write_text("{")
  else:
    (ckpts.path(3) / "manifest.json").unlink()
  assert ckpts.latest() == 2
  with pytest.raises(CheckpointError):
    ckpts.restore(_state(0)[1], 3)


def test_a_failed_save_leaves_the_checkpoints_before_and_no_rubbish(tmp_path, monkeypatch):
  ckpts = _saved(tmp_path)

  def no_space(self, path):
    pathlib.Path(f"{path}.data-00000-of-00001").write_bytes(b"half")
    raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

  with monkeypatch.context() as patch:
    patch.setattr(tf.train.Checkpoint, "write", no_space)
    with pytest.raises(OSError, match="No space left"):
      ckpts.save(_state(4)[1], 4)
  assert ckpts.steps() == [1, 2, 3] and ckpts.latest() == 3
  assert not list(ckpts.folder.glob(".saving-*"))


def test_a_kill_while_saving_leaves_no_checkpoint_and_is_cleaned_up(tmp_path):
  ckpts = _saved(tmp_path)
  leftover = ckpts.folder / ".saving-abc"
  shutil.copytree(ckpts.path(3), leftover)
  assert ckpts.latest() == 3
  ckpts.save(_state(4)[1], 4)
  assert not leftover.exists() and ckpts.steps() == [1, 2, 3, 4]


def test_a_variable_that_was_not_saved_is_an_error_that_names_it(tmp_path):
  ckpts = _saved(tmp_path)
  model, state = _state(0, more=True)
  with pytest.raises(MisfitError, match=r"1 of 2 variables differ: codec/extra is \[\] here, mis"):
    ckpts.restore(state, 3)
  ckpts.restore(state, 3, partial=True)
  np.testing.assert_array_equal(model.weight, [3, 3])
  assert model.extra == 7.0


@pytest.mark.parametrize("partial", [False, True])
def test_another_shape_is_an_error_that_names_both(tmp_path, partial):
  ckpts = _saved(tmp_path)
  model = Model(0.0, more=partial)
  model.weight = tf.Variable([0.0, 0.0, 0.0])
  with pytest.raises(MisfitError, match="does not fit") as e:
    ckpts.restore(tf.train.Checkpoint(codec=model), 3, partial)
  assert str(ckpts.path(3)) in str(e.value)
  total = 2 if partial else 1
  assert str(e.value).endswith(
    f"1 of {total} variables differ: codec/weight is [3] here, [2] there."
  )


def test_of_many_differences_the_first_five_are_named(tmp_path):
  ckpts = _saved(tmp_path)
  model = Model(0.0)
  model.many = [{"a": tf.Variable([float(i)])} for i in range(20)]
  with pytest.raises(MisfitError) as e:
    ckpts.restore(tf.train.Checkpoint(codec=model), 3)
  message = str(e.value)
  assert "20 of 21 variables differ: codec/many/0/a is [1] here, missing there; " in message
  assert message.count("missing there") == 5 and message.endswith("; and 15 more.")
  assert "\n" not in message


def test_find_takes_a_checkpoint_a_run_or_an_experiment_and_a_wid(tmp_path):
  run = tmp_path / "7" / "wid=2-name"
  ckpts = _saved(run)
  assert checkpoints.find(ckpts.path(2))[1] == 2
  assert checkpoints.find(run)[1] == 3
  found, step = checkpoints.find(tmp_path / "7", wid=2)
  assert (found.folder, step) == (ckpts.folder, 3)


@pytest.mark.parametrize(
  "path,wid,message",
  [
    ("nowhere", None, "neither a checkpoint folder"),
    ("7", 5, "wid 5 does not name one of them"),
    ("7", None, "wid=2-name"),
    ("7/wid=3-empty", None, "no whole checkpoint"),
  ],
)
def test_find_says_what_is_missing(tmp_path, path, wid, message):
  _saved(tmp_path / "7" / "wid=2-name")
  (tmp_path / "7" / "wid=3-empty").mkdir()
  with pytest.raises(CheckpointError, match=message):
    checkpoints.find(tmp_path / path, wid)
