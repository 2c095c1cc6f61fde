"""For scripts: the project's own interpreter, where the one at hand lacks what is needed.

Imports nothing but the standard library.
"""

import importlib.util
import os
import pathlib
import sys

_NEEDED = ("absl", "ml_collections", "tqdm", "tensorflow")


def use_project_venv(script: str) -> None:
  """Starts `script` anew with .venv/bin/python beside it, if packages are missing here.

  Nothing is imported to find out. Without a .venv, it goes on, or ends if it cannot.
  """
  missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
  folder = pathlib.Path(script).resolve().parent
  python = folder / ".venv" / "bin" / "python"
  here = pathlib.Path(sys.prefix).resolve()
  if missing and python.exists() and here != (folder / ".venv").resolve():
    os.execv(python, [str(python), script, *sys.argv[1:]])
  if any(name in missing for name in _NEEDED[:3]):
    print(
      f"Error: this Python ({sys.executable}) lacks {', '.join(missing)}. "
      "Set up .venv first: scripts/setup_venv.sh",
      file=sys.stderr,
    )
    sys.exit(2)
