"""The set-up script: which interpreter it takes, and what it says where there is none."""

import os
import shutil
import subprocess

import pytest

from tests.conftest import ROOT

TOOLS = ("sh", "cat", "dirname", "rm", "mkdir", "chmod")


@pytest.fixture
def machine(tmp_path):
  """An empty clone with a PATH that holds a shell and little else; returns a runner."""
  clone, tools = tmp_path / "a clone", tmp_path / "bin"
  (clone / "scripts").mkdir(parents=True)
  tools.mkdir()
  shutil.copy(ROOT / "scripts/setup_venv.sh", clone / "scripts")
  (clone / "requirements.txt").write_text("one==1\n")
  (clone / "requirements-dev.txt").write_text("two==2\n")
  for tool in TOOLS:
    found = shutil.which(tool)
    assert found
    (tools / tool).symlink_to(found)

  def run(*arguments):
    return subprocess.run(
      ["sh", str(clone / "scripts/setup_venv.sh"), *arguments],
      env={"PATH": str(tools), "HOME": str(tmp_path)},
      capture_output=True,
      text=True,
    )

  run.clone, run.tools, run.log = clone, tools, tmp_path / "log"
  return run


def _program(machine, name, text):
  path = machine.tools / name
  path.write_text(f'#!/bin/sh\necho "{name} $*" >> "{machine.log}"\n{text}\n')
  path.chmod(0o755)


def _python(machine, name, is_supported):
  _program(
    machine,
    name,
    f"""
case "$1" in
  -c) exit {0 if is_supported else 1} ;;
  --version) echo "Python of {name}" ;;
  -m) if [ "$2" = venv ]; then mkdir -p .venv/bin; cat "$0" > .venv/bin/python;
        chmod +x .venv/bin/python; fi ;;
esac""",
  )


def test_without_python_and_uv_it_says_what_to_install(machine):
  done = machine()
  assert done.returncode == 1
  assert "No Python 3.9, 3.10 or 3.11" in done.stderr and "apt install python3.11" in done.stderr
  assert not (machine.clone / ".venv").exists()


def test_an_unsupported_python_is_passed_over_for_a_supported_one(machine):
  _python(machine, "python3.11", is_supported=False)
  _python(machine, "python3.10", is_supported=True)
  done = machine()
  assert done.returncode == 0, done.stderr
  assert "Python of python3.10" in done.stdout
  assert (machine.clone / ".venv/.requirements").is_file()


def test_uv_makes_the_environment_where_no_python_fits(machine):
  _python(machine, "python3", is_supported=False)
  _python(machine, "source-python", is_supported=True)
  _program(
    machine,
    "uv",
    'mkdir -p .venv/bin; cat "$(dirname "$0")/source-python" > .venv/bin/python; '
    "chmod +x .venv/bin/python",
  )
  done = machine()
  assert done.returncode == 0, done.stderr
  assert "uv venv" in machine.log.read_text()


def test_it_installs_once_and_again_when_the_requirements_change(machine):
  _python(machine, "python3.11", is_supported=True)

  def installs():
    assert machine().returncode == 0
    return machine.log.read_text().count("pip install")

  assert installs() == 2  # requirements.txt and requirements-dev.txt.
  assert installs() == 2
  (machine.clone / "requirements.txt").write_text("one==2\n")
  assert installs() == 4


def test_requirements_are_pinned_and_name_no_registry():
  for name in ("requirements.txt", "requirements-dev.txt", "requirements-gpu.txt"):
    for line in (ROOT / name).read_text().splitlines():
      requirement = line.split("#")[0].split(";")[0].strip()
      if requirement and not requirement.startswith("-r "):
        assert "==" in requirement and "://" not in requirement, f"{name}: {line}"
        assert not requirement.startswith("-"), f"{name}: {line}"


def test_tracked_files_name_no_registry_host_and_no_machine_path():
  if not (ROOT / ".git").exists():
    pytest.skip("not a git checkout")
  listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
  words = ["index" + "-url =", "pypi" + ".org", "/home" + "/", "/ro" + "ot/"]
  for name in listed.stdout.splitlines():
    path = ROOT / name
    if path.suffix in (".py", ".md", ".txt", ".in", ".toml", ".sh") and path.is_file():
      text = path.read_text()
      assert not any(w in text for w in words), name
  assert os.access(ROOT / "launch.py", os.X_OK) and os.access(ROOT / "launch_eval.py", os.X_OK)


def test_a_files_tests_go_to_one_worker(request):
  """Or fixtures of whole trainings are made once in each, and two Slurm clusters run at a time."""
  if "PYTEST_XDIST_WORKER" not in os.environ:
    pytest.skip("no workers")
  assert request.node.nodeid.endswith("@test_setup")
