"""python -m factorized.train --config factorized/configs/bls2017.py."""

from common import cli


def check(unit):
  """A codec to train. Raises for what cannot be trained, before anything is written."""
  from common import train_lib
  from factorized.codec import build

  return train_lib.check(unit, build)


def run(job):
  """Trains."""
  from common import train_lib
  from factorized.codec import build

  train_lib.train(job, build)


if __name__ == "__main__":
  cli.main("factorized", "train", run, check)
