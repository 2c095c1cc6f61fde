"""python -m mshyper.train --config mshyper/configs/mbt2018.py."""

from common import cli


def check(unit):
  """A codec to train. Raises for what cannot be trained, before anything is written."""
  from common import train_lib
  from mshyper.codec import build

  return train_lib.check(unit, build)


def run(job):
  """Trains."""
  from common import train_lib
  from mshyper.codec import build

  train_lib.train(job, build)


if __name__ == "__main__":
  cli.main("mshyper", "train", run, check)
