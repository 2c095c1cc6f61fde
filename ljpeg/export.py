"""Tables of trained runs as small JSON files (`ljpeg.tables`), for `python -m ljpeg.eval compress`.

    python -m ljpeg.export train_xms/<xid> OUT.json

joins the tables that the runs of an experiment have left (<run>/tables.json): one point a lambda.
"""

import pathlib
import sys
from collections.abc import Sequence

from common import flags, runs
from ljpeg import tables

TABLES_FILE = "tables.json"  # Of a run; `ljpeg.compress` looks for it.


def join(experiment: runs.PathLike) -> tables.TablePath:
  """The tables of an experiment's runs, by rising lambda.

  Raises:
    tables.TablesError: There are none, or they are not of one subsampling.
  """
  folder = pathlib.Path(experiment)
  found = [tables.load(p) for p in sorted(folder.glob(f"wid=*/{TABLES_FILE}"))]
  if not found:
    raise tables.TablesError(f"{folder} holds no run with a {TABLES_FILE}: train one to its end.")
  if len({path.subsampling for path in found}) != 1:
    raise tables.TablesError(f"The runs of {folder} differ in their subsampling.")
  by_lambda = {point.lambda_: point for path in found for point in path.points}
  points = tuple(by_lambda[key] for key in sorted(by_lambda))
  return tables.TablePath(points, found[0].subsampling, folder.name)


def main(argv: Sequence[str]) -> None:
  """The command line."""
  if len(argv) != 2 or argv[0].startswith("-"):
    print(__doc__)
    sys.exit(0 if argv and argv[0] in ("-h", "--help") else 2)
  try:
    tables.save(argv[1], join(argv[0]))
  except (tables.TablesError, OSError) as e:
    flags.fail(e)


if __name__ == "__main__":
  main(sys.argv[1:])
