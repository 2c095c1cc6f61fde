"""The notebooks run from their first cell to their last, on a small run."""

import nbclient
import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def test_there_are_some_and_none_holds_outputs():
  assert NOTEBOOKS
  for path in NOTEBOOKS:
    for cell in nbformat.read(path, as_version=4).cells:
      assert not cell.get("outputs") and cell.get("execution_count") is None, path


def _execute(path, folder):
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  resources = {"metadata": {"path": str(folder)}}
  nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
  return notebook


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
@pytest.mark.parametrize("run", ["trained_run", "trained_hyperprior_run"])
def test_a_notebook_runs_on_each_family(path, run, request, monkeypatch):
  trained = request.getfixturevalue(run)
  monkeypatch.setenv("NTC_NOTEBOOK_RUN", str(trained.path))
  notebook = _execute(path, ROOT / "notebooks")
  outputs = [o for cell in notebook.cells for o in cell.get("outputs", [])]
  pictures = [o for o in outputs if "image/png" in o.get("data", {})]
  assert len(pictures) == 3
  assert any(trained.path.name in o.get("text", "") for o in outputs)


@pytest.mark.slow
def test_without_a_run_it_says_how_to_get_one(tmp_path, monkeypatch):
  monkeypatch.delenv("NTC_NOTEBOOK_RUN", raising=False)
  monkeypatch.setenv("NTC_TRAIN_DIR", str(tmp_path))
  with pytest.raises(
    nbclient.exceptions.CellExecutionError, match="train one, or set NTC_NOTEBOOK_RUN"
  ):
    _execute(ROOT / "notebooks" / "vis_syn_filters.ipynb", ROOT / "notebooks")
