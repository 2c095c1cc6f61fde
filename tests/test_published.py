"""The published curves of json_results/published: their form, and that no number was changed."""

import json
import math
import re

import pytest

import configs
from common import bd, report_data, results

FILES = sorted(configs.PUBLISHED_DIR.glob("*.json"))
CURVES = [c for path in FILES for c in json.loads(path.read_text())["curves"]]
DATASETS = sorted({c["dataset"] for c in CURVES})
# What the reference calls data sets, where it is another name.
REFERENCE_NAMES = {"clic2020-professional-valid": "clic_pval"}
TEXTS = {"label", "codec", "source", "commit", "files", "name", "rate", "convention", "dataset"}
COLUMNS = {  # field: (low, high)
  "bpp": (0.02, 10),
  "psnr_db": (20, 55),
  "msssim_db": (5, 40),
  "lpips": (0, 1),
  "lpips_vgg": (0, 1),
}


def identity(curve):
  return f"{curve['dataset']}-{curve['codec']}"


each_curve = pytest.mark.parametrize("curve", CURVES, ids=identity)


def test_there_are_the_sources_that_the_readme_names():
  assert [p.stem for p in FILES] == [
    "compressai",
    "mlic",
    "shallow-ntc",
    "tcm",
    "tensorflow-compression",
  ]
  text = (configs.PUBLISHED_DIR.parent / "README.md").read_text()
  for path in FILES:
    assert f"`{path.stem}`" in text
  for field in {key for c in CURVES for key in c} | {"complexity"}:
    assert f"`{field}`" in text or f'"{field}"' in text, field


@each_curve
def test_a_curve_has_the_form_of_the_readme(curve):
  assert TEXTS <= set(curve) <= TEXTS | set(COLUMNS) | {"on_request"}
  assert all(isinstance(curve[field], str) and curve[field].strip() for field in TEXTS - {"files"})
  assert curve["files"] and all(isinstance(f, str) and f for f in curve["files"])
  assert re.fullmatch(r"[\w.-]+/[\w.-]+", curve["source"])
  assert re.fullmatch(r"[0-9a-f]{40}", curve["commit"])
  assert re.fullmatch(r"[a-z0-9-]+", curve["codec"])
  assert curve["rate"] in results.PUBLISHED_RATES
  assert curve.get("on_request", True) is True
  assert {"bpp", "psnr_db"} <= set(curve)


@each_curve
def test_numbers_are_complete_ordered_and_plausible(curve):
  lengths = {field: len(curve[field]) for field in COLUMNS if field in curve}
  assert len(set(lengths.values())) == 1, lengths
  assert lengths["bpp"] >= 4
  for field in lengths:
    low, high = COLUMNS[field]
    assert all(isinstance(v, (int, float)) and low <= v <= high for v in curve[field]), field
  assert all(a < b for a, b in zip(curve["bpp"], curve["bpp"][1:]))


@pytest.mark.parametrize("dataset", DATASETS)
def test_the_report_reads_every_curve_and_names_are_unique(dataset):
  series, left_out = report_data.load_published(configs.PUBLISHED_DIR, dataset)
  assert not left_out
  expected = [c for c in CURVES if c["dataset"] == dataset]
  assert len(series) == len(expected)
  for names in ([s.publication.codec for s in series], [s.curve.label for s in series]):
    assert len(set(names)) == len(names)
  for s in series:
    assert bd.pick_anchor(series, s.publication.codec) is s
  drawn = report_data.select_published(series, ["default"])
  assert 3 <= len(drawn) <= 12  # More cannot be told apart in grey.


def test_estimates_say_so():
  for c in CURVES:
    estimated = c["source"] == "mandt-lab/shallow-ntc"
    assert (c["rate"] == "estimate") == estimated, identity(c)
    if estimated:
      assert "Estimated rate" in c["convention"] and "no files" in c["convention"]
    if "msssim_db" in c:
      assert "computed from the published mean" in c["convention"]


# Yang and Mandt 2023 on Kodak: bpp and PSNR to the printed digits. The sixth rate with SGA is
# 0.94647 (in an earlier commit of the same file 0.94653).
SHALLOW = {
  "shallow-jpeg-like": (
    ".124 .216 .353 .549 .798 1.098 1.438", "26.95 28.69 30.59 32.68 34.87 37.03 39.01",
  ),
  "shallow-2-layer": (
    ".115 .192 .300 .462 .673 .941 1.306", "27.27 28.84 30.65 32.57 34.59 36.64 38.79",
  ),
  "shallow-2-layer-sga": (
    ".117 .197 .307 .470 .681 .946 1.311", "27.85 29.51 31.21 33.14 35.14 37.13 39.28",
  ),
}  # fmt: skip


@pytest.mark.parametrize("codec", SHALLOW)
def test_shallow_decoders_on_kodak(codec):
  (curve,) = [c for c in CURVES if c["codec"] == codec and c["dataset"] == "kodak"]
  for field, printed in zip(("bpp", "psnr_db"), SHALLOW[codec]):
    expected = printed.split()
    digits = len(expected[0].partition(".")[2])
    assert [f"{v:.{digits}f}".lstrip("0") for v in curve[field]] == expected


# --- Against the reference, where it is ---


@pytest.fixture(scope="module")
def reference():
  path = configs.SHARED_DIR / "reference" / "reference_rd.json"
  if not path.is_file():
    pytest.skip(f"no published numbers at {path} (NTC_SHARED_DIR)")
  return json.loads(path.read_text())


def in_reference(curve):
  """The key of a curve in the reference."""
  dataset = REFERENCE_NAMES.get(curve["dataset"], curve["dataset"])
  return (curve["source"], curve["name"], dataset)


def test_every_number_equals_the_reference(reference):
  known = {(c["source"], c["codec"], c["dataset"]): c for c in reference["curves"]}
  assert len({in_reference(c) for c in CURVES}) == len(CURVES)
  for curve in CURVES:
    original = known[in_reference(curve)]
    assert curve["files"] == original["files"], identity(curve)
    assert curve["commit"] == reference["_snapshots"][curve["source"]]
    order = sorted(range(len(original["bpp"])), key=lambda i: original["bpp"][i])
    pairs = {"bpp": "bpp", "psnr_db": "psnr_rgb", "lpips_vgg": "lpips"}
    for field, name in pairs.items():
      assert (field in curve) == bool(original.get(name)), (identity(curve), field)
      if field in curve:
        assert curve[field] == [original[name][i] for i in order], (identity(curve), field)
    assert ("msssim_db" in curve) == bool(original.get("ms_ssim")), identity(curve)
    if "msssim_db" in curve:
      expected = [results.msssim_to_db(original["ms_ssim"][i]) for i in order]
      assert curve["msssim_db"] == pytest.approx(expected, rel=1e-12)


def test_every_classical_codec_and_every_shallow_decoder_is_here(reference):
  here = {in_reference(c) for c in CURVES}
  for c in reference["curves"]:
    if c["kind"] == "classical" or c["source"] == "mandt-lab/shallow-ntc":
      assert (c["source"], c["codec"], c["dataset"]) in here


def test_what_is_left_out_is_a_repetition_has_no_psnr_or_is_another_measurement(reference):
  here = {in_reference(c): c for c in CURVES}
  points = {(c["dataset"], tuple(c["psnr_db"])) for c in CURVES}
  for c in reference["curves"]:
    if (c["source"], c["codec"], c["dataset"]) in here or not c.get("psnr_rgb"):
      continue
    order = sorted(range(len(c["bpp"])), key=lambda i: c["bpp"][i])
    repeated = (c["dataset"], tuple(c["psnr_rgb"][i] for i in order)) in points
    other = re.search(r"_cpu$|_cuda$|ms-ssim|vbr|checkerboard|parallel", c["codec"])
    assert repeated or (c["source"] == "InterDigitalInc/CompressAI" and other), c["codec"]


def test_bd_rates_of_the_reference_are_reproduced(reference):
  series = {}
  for dataset in DATASETS:
    for s in report_data.load_published(configs.PUBLISHED_DIR, dataset)[0]:
      series[dataset, s.publication.codec] = s.curve
  curves = {in_reference(c): series[c["dataset"], c["codec"]] for c in CURVES}
  owners = {s.rpartition("/")[2]: s for s in reference["_snapshots"]}
  checked = 0
  for row in reference["derived_bd_rate"]["rows"]:
    source, _, codec = row["anchor"].partition(":")
    anchor = curves.get((owners.get(source, source), codec, row["dataset"]))
    curve = curves.get((row["source"], row["codec"], row["dataset"]))
    if anchor is None or curve is None:
      continue  # Repetitions and other measurements: see test_report.py for these.
    found = bd.bd_rate(anchor, curve)
    assert found.value == pytest.approx(row["bd_rate_pct"]["pchip"], abs=0.1), row
    assert found.overlap == pytest.approx(row["psnr_overlap_db"], abs=0.01)
    checked += 1
  assert checked >= 158


def test_decoding_flops_of_published_curves_are_those_of_the_reference(reference):
  rows = reference["complexity"]["flops_per_pixel.csv"]
  expected = {
    "shallow-2-layer": rows["2-layer syn. (proposed)"],
    "shallow-jpeg-like": rows["JPEG-like syn. (proposed)"],
    "minnen2018-mean-scale": rows["Minnen 2018 Hyperprior"],
    "elic2022": rows["He 2022 ELIC"],
  }
  series, _ = report_data.load_published(configs.PUBLISHED_DIR, "kodak")
  found = {s.publication.codec: s.publication.decoder_flops_per_pixel for s in series}
  for codec, stages in expected.items():
    assert found[codec] == pytest.approx(stages["g"] + stages["g_h"])
  assert found["bpg444"] is None


def test_complexity_equals_the_reference(reference):
  original = reference["complexity"]
  rows = json.loads((configs.PUBLISHED_DIR / "shallow-ntc.json").read_text())["complexity"]
  codecs = {c["codec"] for c in CURVES}
  assert {r["name"] for r in rows} == set(original["flops_per_pixel.csv"])
  for row in rows:
    assert row["flops_per_pixel"] == original["flops_per_pixel.csv"][row["name"]]
    parameters = original["all_params.csv"].get(row["name"], {})
    assert row.get("parameters", {}) == {k: v for k, v in parameters.items() if v is not None}
    assert row["convention"] and row["files"]
    assert row.get("codec", "elic2022") in codecs
    assert all(math.isfinite(v) for v in row["flops_per_pixel"].values())
