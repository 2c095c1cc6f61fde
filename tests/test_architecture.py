"""The arrows of docs/architecture.md, read from the imports of the source, lazy ones included."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent

# A: plain Python. B: tensors, no files. C: loops and files.
ROOMS = {
  "A": "bd datasets fetch flags hyper launchers publish report_content report_cost report_data "
  "report_look report_page report_plots report_tables results runs slurm supervise train_options "
  "unpack venv",
  "B": "averages bitstream codec dct_init distribution entropy exact hyper_init layers libjpeg "
  "lpips metrics numerics optimizers precision profiling quantizers rd rescale schedules tiling "
  "transforms transforms_elic transforms_shallow",
  "C": "artefacts checkpoints classical cli data dead_leaves early_stopping eval_lib itinf_lib "
  "job lpips_weights programs report report_crops train_lib validation writers",
}
ROOM_OF = {f"common.{m}": room for room, modules in ROOMS.items() for m in modules.split()}
MAY_IMPORT = {"A": "A", "B": "AB", "C": "ABC"}
FAMILIES = sorted(p.parent.name for p in ROOT.glob("*/codec.py") if p.parent.name != "common")
ENTRY_POINTS = ("train", "eval", "itinf", "vbq_eval", "compress", "pillow_eval")


def _modules():
  for path in sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("*/**/*.py")):
    relative = path.relative_to(ROOT)
    if relative.parts[0] in ("common", "sweeps", *FAMILIES) or len(relative.parts) == 1:
      name = ".".join(relative.with_suffix("").parts)
      yield name.removesuffix(".__init__"), path


def _imports(path):
  """Every module of the project that a file imports, at its top or within a function."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f"{path}: relative imports hide the rooms"
      found.add(node.module)
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  ours = {"common", "configs", "launch", "launch_eval", "ntc", "slurm_template", "sweeps", "tests"}
  ours |= set(FAMILIES)
  return {name for name in found if name.split(".")[0] in ours}


def _is_module(name):
  path = ROOT.joinpath(*name.split("."))
  return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


ALL = {name: {i for i in _imports(path) if _is_module(i)} for name, path in _modules()}


def test_every_module_of_common_has_a_room():
  modules = {name for name in ALL if name.startswith("common.")}
  assert modules == set(ROOM_OF), "Put new modules into ROOMS (and docs/architecture.md)."
  assert FAMILIES


@pytest.mark.parametrize("name", sorted(ROOM_OF))
def test_common_imports_only_what_its_room_may(name):
  for imported in ALL[name] - {"common", "configs"}:
    assert imported in ROOM_OF, f"{name} imports {imported}: common never imports a family"
    allowed = MAY_IMPORT[ROOM_OF[name]]
    assert ROOM_OF[imported] in allowed, f"{name} ({ROOM_OF[name]}) imports {imported}"


@pytest.mark.parametrize("family", FAMILIES)
def test_families_keep_to_themselves_and_to_their_rooms(family):
  for name, imported in ALL.items():
    if name.split(".")[0] != family:
      continue
    parts = name.split(".")
    if parts[1:2] == ["configs"]:
      allowed = {"common.hyper"} | {n for n in ALL if n.startswith(f"{family}.configs")}
    elif parts[-1] in ENTRY_POINTS:
      allowed = {n for n, room in ROOM_OF.items() if room == "C"} | set(ALL)
    else:
      allowed = {n for n, room in ROOM_OF.items() if room in "AB"}
    allowed |= {"common", family} | {n for n in ALL if n.startswith(f"{family}.")}
    others = tuple(f"{f}." for f in FAMILIES if f != family)
    for i in imported:
      assert not i.startswith(others), f"{name} imports {i}: families never import one another"
      assert i in allowed, f"{name} imports {i}"


def test_sweeps_import_configs_alone():
  allowed = {"common", "common.hyper", "sweeps", *FAMILIES}
  for name in ALL:
    if name.split(".")[0] == "sweeps":
      for i in ALL[name] - allowed:
        assert i.split(".")[1:2] == ["configs"] or i.startswith("sweeps."), f"{name} imports {i}"


def test_site_settings_import_nothing_of_the_project():
  assert ALL["configs"] == set()


def test_launchers_import_only_plain_python():
  for name in ("launch", "launch_eval"):
    for imported in ALL[name] - {"common", "configs", "launch", "slurm_template"}:
      assert ROOM_OF[imported] == "A", f"{name} imports {imported}"


def test_the_command_for_pictures_names_no_family():
  for imported in ALL["ntc"] - {"common", "configs"}:
    assert imported in ROOM_OF, f"ntc imports {imported}: it finds families as folders"


def test_plain_python_starts_without_tensorflow():
  modules = [*sorted(n for n, room in ROOM_OF.items() if room == "A"), "launch", "launch_eval"]
  modules += ["ntc", "common.artefacts", "common.report"]
  code = f"import sys, {', '.join(modules)}; assert 'tensorflow' not in sys.modules"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
