"""All rows of the performance table, one after the other, as one Markdown table.

  python -m benchmarks.table > table.md             (20 minutes or so, on a quiet machine)
  python -m benchmarks.table --quick --rows 1,2,8

Each benchmark runs in a process of its own, with nothing beside it; what it prints goes to standard
error as it comes. Rows 3 to 5 need CompressAI (benchmarks/setup_peer.sh). A benchmark that fails
leaves a line below the table, the others go on, and the exit code is 1.
"""

import argparse
import datetime
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any, Optional

from benchmarks import rows

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def commands(
  numbers: list[int], is_quick: bool, options: dict[str, str]
) -> dict[str, tuple[list[int], list[str]]]:
  """By benchmark: the rows it is run for, and its arguments; each runs once."""
  found: dict[str, tuple[list[int], list[str]]] = {}
  for number in numbers:
    row = rows.ROWS[number]
    if row.module in found:
      found[row.module][0].append(number)
      continue
    args = [arg.format(**options) for arg in row.args] + list(row.quick if is_quick else ())
    found[row.module] = ([number], args)
  return found


def run(module: str, args: list[str]) -> Optional[dict[str, Any]]:
  """What the benchmark wrote (see `rows.report`), None if it failed."""
  with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder, "figures.json")
    argv = [sys.executable, "-m", f"benchmarks.{module}", *args, "--json", str(path)]
    print(f"\n{' '.join(argv[1:-2])}", file=sys.stderr, flush=True)
    done = subprocess.run(argv, cwd=_ROOT, stdout=sys.stderr)
    if done.returncode or not path.exists():
      return None
    return json.loads(path.read_text(encoding="utf-8"))


def commit() -> str:
  """The commit that is measured, or "unknown"."""
  argv = ["git", "describe", "--always", "--dirty"]
  done = subprocess.run(argv, cwd=_ROOT, capture_output=True, text=True)
  return done.stdout.strip() or "unknown"


def _numbers(text: str) -> list[int]:
  try:
    numbers = sorted({int(part) for part in text.split(",")})
  except ValueError:
    raise argparse.ArgumentTypeError(f"{text!r}: numbers such as 1,2,8") from None
  if unknown := set(numbers) - rows.ROWS.keys():
    raise argparse.ArgumentTypeError(f"no row {min(unknown)}; there are 1 to {max(rows.ROWS)}")
  return numbers


def main() -> int:
  listed = "\n".join(f"  {n:2d}  {row.what}: {row.asks}" for n, row in rows.ROWS.items())
  parser = argparse.ArgumentParser(
    description=__doc__,
    epilog=f"rows:\n{listed}",
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--rows", type=_numbers, default=list(rows.ROWS), help="such as 1,2,8")
  parser.add_argument("--quick", action="store_true", help="fewer rounds, fewer cases")
  parser.add_argument("--dataset", default="kodak", help="of rows 3 to 5, 8, 9: its first picture")
  parser.add_argument("--peer", default=".venv-peer/bin/python", help="CompressAI's Python")
  args = parser.parse_args()
  figures: list[rows.Figure] = []
  ceilings: dict[str, list[float]] = {}
  machine, failed = "", []
  options = {"dataset": args.dataset, "peer": args.peer}
  for module, (numbers, argv) in commands(args.rows, args.quick, options).items():
    record = run(module, argv)
    if record is None:
      failed.append((numbers, module))
      continue
    machine = record["machine"]
    for name, values in record["ceilings"].items():
      ceilings.setdefault(name, []).extend(values)
    figures += [f for f in (rows.Figure(**f) for f in record["figures"]) if f.row in args.rows]
  figures.sort(key=lambda figure: figure.row)
  print(f"{datetime.date.today()}, commit {commit()}{', --quick' if args.quick else ''}")
  print("\n".join(rows.ceiling_lines(machine, ceilings) + rows.markdown(figures)))
  for numbers, module in failed:
    print(f"\nRows {', '.join(map(str, numbers))}: benchmarks.{module} failed.")
  return 1 if failed else 0


if __name__ == "__main__":
  sys.exit(main())
