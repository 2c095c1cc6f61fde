"""Site settings: where runs, results, Slurm files and data sets live.

Edit this file for your site, or set the environment variable named beside a setting.
It imports nothing of the project, and nothing here touches the disk.
"""

import os
import pathlib

PROJECT_DIR = pathlib.Path(__file__).resolve().parent


def _path(variable: str, default: pathlib.Path) -> pathlib.Path:
  value = os.environ.get(variable)
  return pathlib.Path(value).expanduser().absolute() if value else default


# Experiments: TRAIN_DIR/<xid>/wid=<N>-<runname>/
TRAIN_DIR = _path("NTC_TRAIN_DIR", PROJECT_DIR / "train_xms")
ITINF_DIR = _path("NTC_ITINF_DIR", PROJECT_DIR / "itinf_xms")

# Evaluations that ./launch_eval.py submits to Slurm: SLURM_DIR/<xid>/
SLURM_DIR = _path("NTC_SLURM_DIR", PROJECT_DIR / "slurm_jobs")

# Where sweeps run: "slurm", "local" (this machine), or empty for Slurm where there is `sbatch`.
EXECUTOR = os.environ.get("NTC_EXECUTOR", "")

# Results: RESULTS_DIR/<dataset>/<mode>/<family>-<runname>-step=<n>-xid=<xid>-wid=<wid>.json
RESULTS_DIR = _path("NTC_RESULTS_DIR", PROJECT_DIR / "json_results")
PUBLISHED_DIR = PROJECT_DIR / "json_results" / "published"
REPORTS_DIR = _path("NTC_REPORTS_DIR", PROJECT_DIR / "reports")

# Exported models, *.ntcm: where ./ntc.py decompress looks for the model that a file names.
MODELS_DIR = _path("NTC_MODELS_DIR", PROJECT_DIR / "models")

# Generated and downloaded data sets.
DATA_CACHE_DIR = _path("NTC_DATA_CACHE_DIR", PROJECT_DIR / "data_cache")

# Pictures and figures that tests and measurements use where they are present.
SHARED_DIR = _path("NTC_SHARED_DIR", PROJECT_DIR.parent / "shared")
DATA_DIR = _path("NTC_DATA_DIR", SHARED_DIR / "data")

# Weights of the metric LPIPS, made by `python -m common.lpips_weights`. Where this file is missing
# and the variable is not set, those in SHARED_DIR are used, if any.
LPIPS_WEIGHTS = _path("NTC_LPIPS_WEIGHTS", MODELS_DIR / "lpips_alex_v0.1.npz")
LPIPS_WEIGHTS_IS_SET = bool(os.environ.get("NTC_LPIPS_WEIGHTS"))

# Named data sets: a folder (searched recursively) or a glob. `sample` (photographs that ship
# inside the requirements) and `sample_train` (generated) are built in, see common/data.py.
DATASETS: dict[str, str] = {
  "kodak": str(DATA_DIR / "kodak"),
  "tecnick": str(DATA_DIR / "tecnick"),
  "coco": str(DATA_DIR / "coco"),
  "cid22-train": str(DATA_DIR / "cid22-train"),
  "cid22-valid": str(DATA_DIR / "cid22-valid"),
  "clic2025-valid": str(DATA_DIR / "clic2025-valid"),
  "bsds500-train": str(DATA_DIR / "bsds500" / "train"),
  "bsds500-val": str(DATA_DIR / "bsds500" / "val"),
  "bsds500-test": str(DATA_DIR / "bsds500" / "test"),
}
