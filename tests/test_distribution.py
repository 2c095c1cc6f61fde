"""Training on several devices and by several processes gives what one device gives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from common import data, distribution, hyper, quantizers, runs
from tests.conftest import ROOT, tiny_arguments
from tests.test_training import _assert_same_weights, _weights


def settings(strategy="multi_worker", **more):
  return {"train_eval_config": {"strategy": strategy, **more}}


TF_CONFIG = {
  "cluster": {"worker": ["a:1", "b:2", "c:3"]},
  "task": {"type": "worker", "index": 1},
}


def test_a_worker_learns_its_place_from_tf_config():
  worker = distribution.this_worker(settings(), {"TF_CONFIG": json.dumps(TF_CONFIG)})
  assert (worker.index, worker.count, worker.is_chief) == (1, 3, False)
  cluster = {"chief": ["z:9"], "worker": ["a:1"]}
  config = {"cluster": cluster, "task": {"type": "worker", "index": 0}}
  worker = distribution.this_worker(settings(), {"TF_CONFIG": json.dumps(config)})
  assert (worker.index, worker.addresses) == (1, ("z:9", "a:1"))


def test_a_worker_learns_its_place_from_slurm():
  environ = {"NTC_WORKERS": "a:1,b:2", "SLURM_PROCID": "0"}
  worker = distribution.this_worker(settings(), environ)
  assert (worker.is_chief, worker.count) == (True, 2)
  with pytest.raises(ValueError, match="SLURM_PROCID='2'"):
    distribution.this_worker(settings(), {**environ, "SLURM_PROCID": "2"})


@pytest.mark.parametrize("text", [
  "{", "[]", '{"cluster": {}}',
  '{"cluster": {"worker": []}, "task": {"type": "worker", "index": 0}}',
  '{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}',
])  # fmt: skip
def test_a_tf_config_that_makes_no_sense_is_named(text):
  with pytest.raises(ValueError, match="TF_CONFIG"):
    distribution.this_worker(settings(), {"TF_CONFIG": text})


def test_only_a_config_that_says_so_makes_workers():
  environ = {"TF_CONFIG": json.dumps(TF_CONFIG)}
  assert distribution.this_worker(settings("mirrored"), environ).count == 1
  assert distribution.this_worker({"train_eval_config": {}}, environ).count == 1


def test_settings_that_no_device_fits_are_refused():
  with pytest.raises(ValueError, match="Known: one_device, mirrored, multi_worker"):
    distribution.check(settings("miror"))
  with pytest.raises(ValueError, match="strategy=mirrored"):
    distribution.check(settings("one_device", num_replicas=2))
  for number in (0, -1, 1.5, True):
    with pytest.raises(ValueError, match="1 or more"):
      distribution.check(settings("mirrored", num_replicas=number))
  two = distribution.Distribution()
  two.num_replicas = 2
  two.check_batchsize(8)
  with pytest.raises(ValueError, match="multiple of 2"):
    two.check_batchsize(7)


@pytest.mark.parametrize("name", quantizers.known_quantizers())
def test_rows_of_a_batch_get_the_noise_they_have_in_the_batch(name):
  loc = tf.random.stateless_normal([6, 3, 2, 4], [1, 2], stddev=3.0)
  make = quantizers.make_quantizer(name)
  whole = make(seed=(3, 4), temperature=0.4)("y", loc, tf.zeros([4]))
  for first in (0, 2, 4):
    part = make(seed=(3, 4), temperature=0.4, rows=(first, 6))(
      "y", loc[first : first + 2], tf.zeros([4])
    )
    np.testing.assert_array_equal(part.rate, whole.rate[first : first + 2])
    np.testing.assert_array_equal(part.decode, whole.decode[first : first + 2])


def test_rows_of_a_batch_of_crops_are_those_of_the_whole_batch(pictures):
  config = dict(dataset=str(pictures), batchsize=6, patchsize=16, patches_per_image=4, flip=True)
  sampler = data.CropSampler(config, seed=5)
  for step in range(4):
    whole = sampler.batch(step)
    parts = [sampler.batch(step, rows=(first, 2)) for first in (0, 2, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


TRAINING_CONFIGS = sorted(
  str(path.relative_to(ROOT))
  for path in ROOT.glob("*/configs/*.py")
  if path.name not in ("__init__.py", "itinf.py", "pillow.py")
)


@pytest.mark.parametrize("file", TRAINING_CONFIGS)
def test_every_training_config_can_be_distributed(file):
  config = hyper.load(str(ROOT / file)).get_config()
  assert config.train_eval_config.strategy == "one_device"
  assert config.train_eval_config.num_replicas is None


# Processes of their own: TensorFlow's devices are fixed once it has begun.


def start(argv, worker=None, workers=()):
  env = {**os.environ, "NTC_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
  env.pop("TF_CONFIG", None)
  if workers:
    task = {"type": "worker", "index": worker}
    env["TF_CONFIG"] = json.dumps({"cluster": {"worker": workers}, "task": task})
  command = [sys.executable, "-m", "factorized.train", *argv]
  return subprocess.Popen(
    command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )


def finish(*processes):
  said = [process.communicate(timeout=240)[0] for process in processes]
  codes = [process.returncode for process in processes]
  return codes, "\n".join(said)


def free_addresses():
  sockets = [socket.socket() for _ in range(2)]
  for s in sockets:
    s.bind(("127.0.0.1", 0))
  addresses = [f"127.0.0.1:{s.getsockname()[1]}" for s in sockets]
  for s in sockets:
    s.close()
  return addresses


def arguments(pictures, folder, xid, strategy, steps, *more):
  argv = tiny_arguments(pictures, folder, f"--xid={xid}", steps=steps)
  argv += [
    "--config.train_data_config.batchsize=4",
    f"--config.train_eval_config.num_steps={steps}",
  ]
  argv += ["--config.train_eval_config.checkpoint_every_steps=10"]
  argv += ["--config.train_eval_config.eval_every_steps=20"]
  return [*argv, f"--config.train_eval_config.strategy={strategy}", *more]


def run_of(folder, xid):
  (path,) = (folder / xid).glob("wid=*")
  return runs.RunDir.open(path)


def losses(run):
  found = {r["step"]: r["loss"] for r in runs.read_jsonl(run.metrics_file) if r["split"] == "train"}
  return np.array([found[step] for step in sorted(found)])


@pytest.mark.slow
def test_two_replicas_and_two_workers_train_as_one_device(pictures, tmp_path):
  """Worker 1 is interrupted on the way, and both go on later."""
  steps = 200
  addresses = free_addresses()
  argv = arguments(pictures, tmp_path, "workers", "multi_worker", steps)

  workers = [start(argv, i, addresses) for i in range(2)]
  deadline = time.monotonic() + 200
  while not list(tmp_path.glob("workers/wid=*/checkpoints/step-*")):
    assert time.monotonic() < deadline and workers[0].poll() is None, finish(*workers)
    time.sleep(0.05)
  workers[1].send_signal(signal.SIGUSR2)
  codes, said = finish(*workers)
  assert codes == [runs.EXIT_RESUME] * 2, said
  run = run_of(tmp_path, "workers")
  stopped = run.read_state()
  assert stopped["state"] == "REQUEUED" and 10 <= stopped["step"] < steps
  codes, said = finish(*[start(argv, i, addresses) for i in range(2)])
  assert codes == [0, 0], said
  assert f"Resumed at step {stopped['step']}" in said
  assert run.read_state()["state"] == "DONE"

  mirrored = arguments(
    pictures, tmp_path, "mirrored", "mirrored", steps, "--config.train_eval_config.num_replicas=2"
  )
  one = arguments(pictures, tmp_path, "one", "one_device", steps)
  alone = arguments(pictures, tmp_path, "alone", "mirrored", 10)  # On one device.
  codes, said = finish(start(mirrored), start(one), start(alone))
  assert codes == [0, 0, 0], said
  assert run_of(tmp_path, "alone").read_state()["step"] == 10

  # Two halves of a batch, summed: the same bits wherever the halves are computed.
  _assert_same_weights(_weights(run), _weights(run_of(tmp_path, "mirrored")))
  # Another order of summation than one device's. Small differences grow along the way.
  whole, halves = losses(run_of(tmp_path, "one")), losses(run)
  assert len(whole) == len(halves) == steps
  np.testing.assert_allclose(halves[:50], whole[:50], rtol=1e-3)
  np.testing.assert_allclose(np.mean(halves[-20:]), np.mean(whole[-20:]), rtol=0.02)


@pytest.mark.slow
def test_the_end_of_a_worker_ends_the_run_with_its_reason(pictures, tmp_path):
  addresses = free_addresses()
  argv = arguments(pictures, tmp_path, "1", "multi_worker", 100_000)
  workers = [start(argv, i, addresses) for i in range(2)]
  deadline = time.monotonic() + 200
  while not list(tmp_path.glob("1/wid=*/checkpoints/step-*")):
    assert time.monotonic() < deadline and workers[0].poll() is None, finish(*workers)
    time.sleep(0.05)
  workers[1].kill()
  codes, said = finish(*workers)
  assert codes == [1, -signal.SIGKILL], said
  state = run_of(tmp_path, "1").read_state()
  assert state["state"] == "FAILED"
  assert "Another worker of this run is gone" in state["reason"]


@pytest.mark.slow
def test_a_batch_that_cannot_be_shared_is_refused_before_anything_is_written(pictures, tmp_path):
  more = ["--config.train_eval_config.num_replicas=3"]
  codes, said = finish(start(arguments(pictures, tmp_path / "x", "1", "mirrored", 10, *more)))
  assert codes == [2]
  assert "choose a multiple of 3" in said
  assert not (tmp_path / "x").exists()
