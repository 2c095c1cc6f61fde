"""What a data set's name means: known names, paths, labels. Plain Python, for launchers too."""

import hashlib
import pathlib
import re

import configs
from common import hyper

# Built into common/data.py: they need no folder of this site.
BUILT_IN = ("sample", "sample_train")


# Of TensorFlow Datasets: "tfds:<name>", or "tfds:<name>:<split>".
TFDS = "tfds:"


def known() -> list[str]:
  """The known names, sorted."""
  return sorted({*configs.DATASETS, *BUILT_IN})


def is_glob(text: str) -> bool:
  """Whether a path has wildcards."""
  return any(c in text for c in "*?[")


def absolute(dataset: str) -> str:
  """The data set as it is found from any folder: known names stay, paths become absolute.

  What is neither stays as it is; resolving it then names the known ones.
  """
  if not dataset or dataset in known() or dataset.startswith(TFDS):
    return dataset
  path = pathlib.Path(dataset).expanduser()
  if path.exists() or is_glob(dataset) or "/" in dataset:
    return str(path.absolute())
  return dataset


def label(dataset: str) -> str:
  """The name that stands for a data set in folders and records.

  A known name is its own label, and that of its folder. Any other path gets its last part and a
  short hash of the whole, so that two folders called `photos` never share results.
  """
  if dataset.startswith(TFDS):
    return hyper.safe_name(dataset.replace("/", "-").replace(":", "-"))
  if absolute(dataset) == dataset and not pathlib.Path(dataset).is_absolute():
    return dataset
  path = pathlib.Path(dataset).expanduser()
  resolved = path.parent.resolve() / path.name if is_glob(dataset) else path.resolve()
  for name, setting in configs.DATASETS.items():
    if pathlib.Path(setting).expanduser().resolve() == resolved:
      return name
  digest = hashlib.sha256(str(resolved).encode()).hexdigest()[:8]
  return f"{hyper.safe_name(_last_part(resolved))[:80]}-{digest}"


def _last_part(path: pathlib.Path) -> str:
  """A glob's folder and pattern, or a path's name: /a/photos/x*.png -> photos-x."""
  if not is_glob(str(path)):
    return path.name
  fixed = []
  for part in path.parts[:-1]:
    if is_glob(part):
      break
    fixed.append(part)
  rest = path.relative_to(pathlib.Path(*fixed)).as_posix()
  rest = re.sub(r"(^|/)\*+(\.\w+)?(?=/|$)", "", rest).strip("/")
  return "-".join(p for p in (fixed[-1], rest) if p)
