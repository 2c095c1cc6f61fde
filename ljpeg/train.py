"""python -m ljpeg.train --config ljpeg/configs/ljpeg.py."""

from common import cli


def check(unit):
  """Raises for a work unit that cannot be trained, before anything is written."""
  from common import train_lib
  from ljpeg.codec import build

  train_lib.check(unit, build)


def run(job):
  """Trains."""
  from common import train_lib
  from ljpeg.codec import build

  train_lib.train(job, build)


if __name__ == "__main__":
  cli.main("ljpeg", "train", run, check)
