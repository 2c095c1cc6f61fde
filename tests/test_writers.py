"""What people see of a run: progress, TensorBoard, pictures."""

import io
import re

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from common import runs, writers
from tests.conftest import picture


class _Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
  return now


def test_a_log_file_gets_plain_lines_with_the_rate_and_the_time_left(monkeypatch, clock):
  log = io.StringIO()
  monkeypatch.setattr(writers.sys, "stderr", log)
  progress = writers.Progress(100, start=20, label="wid=0", seconds_between=10.0)
  for step in range(21, 101):
    clock[0] += 0.5
    progress.update(step, "loss 1.5000")
  progress.close()
  lines = log.getvalue().split("\n")[:-1]
  assert len(lines) == 4  # 40 s, a line every 10 s: no line for each step.
  assert lines[0] == "wid=0: step 40/100  loss 1.5000  2.00/s  0:00:30 left"
  assert lines[-1] == "wid=0: step 100/100  loss 1.5000  2.00/s  0:00:00 left"
  assert "\r" not in log.getvalue() and "\x1b" not in log.getvalue()


def test_a_terminal_gets_a_bar_with_the_rate_and_the_time_left(monkeypatch):
  terminal = _Terminal()
  monkeypatch.setattr(writers.sys, "stderr", terminal)
  progress = writers.Progress(10, start=4, label="wid=0")
  for step in range(5, 11):
    progress.update(step, f"loss {step}.0")
  progress.close()
  last = terminal.getvalue().rstrip().split("\r")[-1]
  assert re.search(r"wid=0: 100%\|.+\| 10/10 \[[0-9:]+<[0-9:]+, .+step/s, loss 10.0\]", last), last


def test_launchers_read_how_far_a_run_is(monkeypatch, tmp_path):
  monkeypatch.setattr(writers.sys, "stderr", io.StringIO())
  run = runs.RunDir(tmp_path)
  progress = writers.Progress(10, run=run)
  progress.update(10, "loss 2.0")
  state = run.read_state()
  assert (state["state"], state["step"], state["num_steps"]) == ("RUNNING", 10, 10)
  assert state["detail"] == "loss 2.0"


def _events(run):
  """(step, tag, value) of all that TensorBoard would show."""
  from tensorflow.core.util import event_pb2

  for path in sorted(run.tensorboard_dir.glob("events.*")):
    for record in tf.data.TFRecordDataset(str(path)):
      event = event_pb2.Event.FromString(record.numpy())
      for value in event.summary.value:
        yield event.step, value.tag, tf.make_ndarray(value.tensor)


def test_scalars_and_pictures_are_in_the_run_and_in_tensorboard(tmp_path):
  run = runs.RunDir(tmp_path)
  original = np.stack([picture(16, 24, i) for i in range(2)])
  for step in (3, 6):  # The second writer appends, as after a resume.
    writer = writers.MetricsWriter(run)
    writer.scalars(step, {"loss": step / 4}, split="val")
    writer.image_pairs(step, original, 255 - original)
    writer.close()
  records = runs.read_jsonl(run.metrics_file)
  assert [(r["step"], r["split"], r["loss"]) for r in records] == [
    (3, "val", 0.75),
    (6, "val", 1.5),
  ]
  events = list(_events(run))
  scalars = [(step, float(value)) for step, tag, value in events if tag == "val/loss"]
  assert scalars == [(3, 0.75), (6, 1.5)]
  shown = [value for step, tag, value in events if "original" in tag and step == 6]
  (shown,) = shown  # Width, height, and the pictures as PNG.
  assert [int(n) for n in shown[:2]] == [48, 16] and len(shown) == 4
  for i in range(2):
    expected = np.concatenate([original[i], 255 - original[i]], axis=1)
    with Image.open(run.images_dir / f"step-00000006-{i}.png") as image:
      np.testing.assert_array_equal(image, expected)
    np.testing.assert_array_equal(tf.io.decode_png(shown[2 + i]), expected)
