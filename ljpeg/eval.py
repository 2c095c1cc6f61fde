"""python -m ljpeg.eval --workdir RUN --dataset kodak."""

from common import cli


def run(**arguments):
  """Evaluates."""
  from common import eval_lib
  from ljpeg.codec import build

  return eval_lib.evaluate(build=build, **arguments)


if __name__ == "__main__":
  cli.eval_main("ljpeg", run)
