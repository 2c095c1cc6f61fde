"""python -m ljpeg.itinf --config ljpeg/configs/itinf.py."""

from common import cli


def check(unit):
  """Raises for a work unit that cannot run, before anything is written."""
  from common import itinf_lib
  from ljpeg.codec import build

  itinf_lib.check(unit, build)


def run(job):
  """Optimises the latents of the data set's images."""
  from common import itinf_lib
  from ljpeg.codec import build

  itinf_lib.run(job, build)


if __name__ == "__main__":
  cli.main("ljpeg", "itinf", run, check)
