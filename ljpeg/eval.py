"""python -m ljpeg.eval --workdir RUN --dataset kodak; python -m ljpeg.eval compress PICTURE OUT."""

import sys

from common import cli


def run(**arguments):
  """Evaluates."""
  from common import eval_lib
  from ljpeg.codec import build

  return eval_lib.evaluate(build=build, **arguments)


def main(argv):
  """Evaluates a run, or compresses a picture (`ljpeg.compress`), and exits."""
  if argv[:1] == ["compress"]:
    from ljpeg import compress

    sys.exit(compress.main(argv[1:]))
  cli.eval_main("ljpeg", run, argv)


if __name__ == "__main__":
  main(sys.argv[1:])
