"""python -m ljpeg.train --config ljpeg/configs/ljpeg.py."""

from common import cli


def check(unit):
  """A codec to train. Raises for what cannot be trained, before anything is written."""
  from common import lpips, train_lib
  from ljpeg.codec import build

  if unit.config["model_config"].get("lpips_weight"):
    lpips.load()
  return train_lib.check(unit, build)


def run(job):
  """Trains, and leaves the tables as <run>/tables.json, which needs no TensorFlow to be used."""
  from common import eval_lib, train_lib
  from ljpeg import compress, tables
  from ljpeg.codec import build

  train_lib.train(job, build)
  codec, _ = eval_lib.load_codec(job.run, build)
  tables.save(job.run.path / compress.TABLES_FILE, codec.table_path(job.run.path.name))


if __name__ == "__main__":
  cli.main("ljpeg", "train", run, check)
