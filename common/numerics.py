"""Stops at the first operation whose result is NaN or infinite, by tf.debugging.

Operations check themselves that are built within `checking`, forward and backward ones. It costs
time. Functions that were compiled before take no part, and those that are compiled within keep
their checks: a training makes its own.
"""

import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Optional

import tensorflow as tf

_ROOT = pathlib.Path(__file__).resolve().parent.parent


@contextlib.contextmanager
def checking(enabled: bool) -> Iterator[None]:
  """Within, operations that are built check their results; nothing where not `enabled`."""
  if not enabled:
    yield
    return
  tf.debugging.enable_check_numerics()
  try:
    yield
  finally:
    tf.debugging.disable_check_numerics()


def first_operation(message: str) -> Optional[str]:
  """What the message of a failed check says of the operation; None for other messages.

  Such as 'NaN in Log "gradient_tape/Log" of common/entropy.py, line 10'.
  """
  found = re.search(r"Detected (.+?) in output \d+ of .*?op \"?(\w+)\"?", message)
  if found is None:
    return None
  text = f"{found.group(1)} in {found.group(2)}"
  node = re.search(r"\{\{node (\S+?)/CheckNumerics", message)
  if node is not None:
    text += f' "{node.group(1)}"'
  for path, line in reversed(re.findall(r"\+ (\S+) \(L(\d+)\)", message)):
    file = _in_project(path)
    if file is not None:
      return f"{text} of {file}, line {line}"
  return text


def _in_project(path: str) -> Optional[str]:
  """The file of this project that a path means, whose beginning may have been cut off."""
  parts = path.split("/")
  for i in range(len(parts) - 1):
    file = "/".join(parts[i:])
    if file and not file.startswith("/") and (_ROOT / file).is_file():
      return file
  return None
