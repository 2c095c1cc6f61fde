"""Makes the file of LPIPS weights from the packages `lpips` and `torchvision`.

    pip install torch torchvision lpips          (into .venv or a copy of it; about 1 GB)
    python -m common.lpips_weights [OUT.npz]

OUT.npz is `LPIPS_WEIGHTS` in configs.py unless it is given. torchvision downloads AlexNet (233 MB)
the first time; the linear weights of version 0.1 are inside `lpips`. Nothing else here needs these
packages: the file can be copied to where it is needed.
"""

import io
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

import configs
from common import flags, runs

# AlexNet's convolutions as `lpips` names them: slice and number in torchvision's `features`.
_CONVOLUTIONS = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")


def convert(state: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Arrays of the file, from the state dict of `lpips.LPIPS(net="alex")` as numpy arrays.

  Raises:
    lpips.LpipsError: It is the state of something else; the message names what is missing.
  """
  from common import lpips

  arrays = {}
  for i, name in enumerate(_CONVOLUTIONS):
    # Kernels are (out, in, height, width) there.
    arrays[f"conv{i + 1}_kernel"] = _get(state, f"net.{name}.weight").transpose(2, 3, 1, 0)
    arrays[f"conv{i + 1}_bias"] = _get(state, f"net.{name}.bias")
    # The convolution comes after a dropout, if there is one.
    linear = [f"lin{i}.model.{place}.weight" for place in (1, 0)]
    found = next((key for key in linear if key in state), linear[0])
    arrays[f"lin{i}"] = _get(state, found).reshape(-1)
  return lpips.check(arrays, "the package lpips")


def _get(state: Mapping[str, Any], name: str) -> np.ndarray:
  from common import lpips

  if name not in state:
    raise lpips.LpipsError(
      f"The state has no {name!r}: it is not that of lpips.LPIPS(net='alex') 0.1. "
      "Install lpips 0.1.4: pip install lpips==0.1.4"
    )
  return np.ascontiguousarray(np.asarray(state[name], np.float32))


def state_of_package() -> dict[str, np.ndarray]:
  """The state dict of `lpips.LPIPS(net="alex")`.

  Raises:
    flags.UsageError: A package is missing; the message says how to install it.
  """
  try:
    import lpips as package  # Not common.lpips.
    import torch  # noqa: F401
  except ImportError as e:
    raise flags.UsageError(
      f"This Python lacks {e.name}: pip install torch torchvision lpips (into .venv or a copy of "
      "it; only this command needs them)."
    ) from e
  model = package.LPIPS(net="alex", version="0.1", verbose=False)
  return {name: value.detach().cpu().numpy() for name, value in model.state_dict().items()}


def write(arrays: Mapping[str, np.ndarray], path: runs.PathLike) -> None:
  """Writes the file whole or not at all."""
  file = io.BytesIO()
  np.savez(file, **arrays)
  runs.atomic_write(path, file.getvalue())


def run(argv: Sequence[str]) -> None:
  """The command; `argv` without the program's name.

  Raises:
    flags.UsageError, lpips.LpipsError: The message names the fix.
  """
  if any(a in ("-h", "--help", "--helpfull") for a in argv):
    print(__doc__)
    return
  if len(argv) > 1 or any(a.startswith("-") for a in argv):
    raise flags.UsageError("Usage: python -m common.lpips_weights [OUT.npz]")
  path = pathlib.Path(argv[0]) if argv else configs.LPIPS_WEIGHTS
  write(convert(state_of_package()), path)
  print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


def main() -> None:
  """The command line."""
  try:
    run(sys.argv[1:])
  except (flags.UsageError, RuntimeError, OSError) as e:
    flags.fail(e)


if __name__ == "__main__":
  main()
