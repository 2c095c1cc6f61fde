"""Sweeps and configs: products, typed overrides, references, duplicates."""

import json

import ml_collections
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ml_collections import config_dict

from common import hyper

values = st.lists(st.integers(), min_size=1, max_size=5)


def make_config():
  config = ml_collections.ConfigDict()
  config.num_steps = 100
  config.flag = True
  config.rate = 0.5
  config.name = "a"
  config.sizes = (3, 5)
  config.optional_int = config_dict.placeholder(int)
  config.optional_flag = config_dict.placeholder(bool)
  config.anything = None
  config.schedule = ml_collections.ConfigDict()
  config.schedule.num_steps = config.get_oneway_ref("num_steps")
  config.schedule.half = config.get_oneway_ref("num_steps") // 2
  config.model_config = ml_collections.ConfigDict({"rd_lambda": 0.01, "num_filters": 8})
  return config.lock()


def config_file(tmp_path, hyper_text="[{}]", name_text="'run'", config_text=None):
  path = tmp_path / "my config.py"
  config_text = config_text or (
    "ml_collections.ConfigDict({'a': 1, 'b': 2.0, 'flag': config_dict.placeholder(bool)})"
  )
  path.write_text(
    "import ml_collections\nfrom ml_collections import config_dict\nfrom common import hyper\n"
    f"def get_config():\n  return {config_text}\n"
    f"def get_cfg_str(config):\n  return {name_text}\n"
    f"def get_hyper():\n  return {hyper_text}\n"
  )
  return hyper.load(str(path))


# Sweeps


@given(values, values)
def test_product_is_every_pair_with_the_last_varying_fastest(a, b):
  settings = hyper.product(hyper.sweep("x.a", a), hyper.sweep("b", b))
  assert [(s["x.a"], s["b"]) for s in settings] == [(i, j) for i in a for j in b]


@given(values)
def test_product_of_one_is_itself_and_of_none_is_the_config(a):
  assert hyper.product(hyper.sweep("a", a)) == hyper.sweep("a", a)
  assert hyper.product() == [{}]


@given(values, values, values)
def test_product_is_associative(a, b, c):
  sweeps = [hyper.sweep(key, v) for key, v in (("a", a), ("b", b), ("c", c))]
  left = hyper.product(hyper.product(*sweeps[:2]), sweeps[2])
  assert left == hyper.product(*sweeps) == hyper.product(sweeps[0], hyper.product(*sweeps[1:]))


@given(st.lists(st.tuples(st.integers(), st.integers()), min_size=1, max_size=5))
def test_zip_goes_side_by_side(pairs):
  settings = hyper.zip(
    hyper.sweep("a", [p[0] for p in pairs]), hyper.sweep("b", [p[1] for p in pairs])
  )
  assert [(s["a"], s["b"]) for s in settings] == pairs


@given(values, values)
def test_chain_is_one_after_the_other(a, b):
  chained = hyper.chain(hyper.sweep("a", a), hyper.sweep("b", b))
  assert chained == hyper.sweep("a", a) + hyper.sweep("b", b)
  chained[0]["new"] = 1  # Copies: the parts may be used again.


def test_mistakes_in_sweeps_say_so():
  with pytest.raises(hyper.ConfigError, match=r"lengths \[2, 3\]"):
    hyper.zip(hyper.sweep("a", [1, 2]), hyper.sweep("b", [1, 2, 3]))
  with pytest.raises(hyper.ConfigError, match="'a' is swept twice"):
    hyper.product(hyper.sweep("a", [1]), hyper.sweep("a", [2]))
  with pytest.raises(hyper.ConfigError, match="'a' has no values"):
    hyper.sweep("a", [])


# Values


def test_derived_values_move_with_what_they_refer_to():
  config = make_config()
  hyper.set_values(config, {"num_steps": 40})
  assert (config.schedule.num_steps, config.schedule.half) == (40, 20)
  hyper.set_values(config, {"schedule.half": 7})
  assert (config.num_steps, config.schedule.half) == (40, 7)


@pytest.mark.parametrize(
  ("key", "value", "says"),
  [
    ("num_steps", 2.5, "int"),
    ("num_steps", True, "int"),
    ("num_steps", "3", "int"),
    ("rate", "x", "float"),
    ("rate", False, "float"),
    ("flag", 1, "bool"),
    ("flag", None, "bool"),
    ("name", 3, "str"),
    ("sizes", 3, "tuple"),
    ("optional_int", "x", "int"),
    ("optional_int", True, "int"),
    ("optional_flag", 1, "bool"),
    ("model_config", {"rd_lambda": 1.0}, "model_config.num_filters"),
    ("model_config.rd_lamda", 1.0, "Did you mean 'model_config.rd_lambda'"),
    ("rd_lambda", 1.0, "Did you mean 'model_config.rd_lambda'"),
    ("num_steps.x", 1, "is a value, not a group"),
  ],
)
def test_values_that_do_not_fit_are_refused(key, value, says):
  config = make_config()
  with pytest.raises(hyper.ConfigError, match=says):
    hyper.set_values(config, {key: value})
  assert hyper.plain(config) == hyper.plain(make_config())


def test_values_keep_the_configs_types():
  config = make_config()
  hyper.set_values(
    config,
    {"rate": 2, "sizes": [1, 2], "optional_int": 3, "optional_flag": False, "anything": "x"},
  )
  assert (config.rate, type(config.rate)) == (2.0, float)
  assert config.sizes == (1, 2)
  assert (config.optional_int, config.optional_flag, config.anything) == (3, False, "x")
  hyper.set_values(config, {"optional_int": None})
  assert config.optional_int is None


@given(
  st.dictionaries(
    st.text("abc", min_size=1),
    st.one_of(
      st.none(),
      st.booleans(),
      st.integers(),
      st.text(),
      st.floats(allow_nan=False, allow_infinity=False),
      st.lists(st.integers(), max_size=3),
    ),
    max_size=5,
  )
)
def test_plain_is_what_json_gives_back(content):
  plain = hyper.plain(ml_collections.ConfigDict({"group": content, "pair": (1, 2)}))
  assert json.loads(json.dumps(plain)) == plain
  assert hyper.plain(hyper.to_config(plain)) == plain


def test_plain_refuses_what_json_cannot_hold():
  for value in (float("nan"), float("inf"), {1, 2}, b"x"):
    with pytest.raises(hyper.ConfigError):
      hyper.plain(ml_collections.ConfigDict({"a": value}))


# Work units


def test_expand_applies_the_sweep_and_then_the_overrides(tmp_path):
  file = config_file(tmp_path, "hyper.sweep('a', [1, 5])", "f'a={config.a}'")
  units = hyper.expand(file, "factorized", "train", {"b": 3.0})
  assert [(u.wid, u.runname, u.config["a"], u.config["b"]) for u in units] == [
    (0, "a=1", 1, 3.0),
    (1, "a=5", 5, 3.0),
  ]
  assert units[1].overrides == {"a": 5, "b": 3.0}
  assert hyper.WorkUnit.from_json(json.loads(json.dumps(units[1].to_json()))) == units[1]
  assert hyper.make_work_unit(file, "factorized", "train", 1, {"b": 3.0}) == units[1]
  assert hyper.make_work_unit(file, "factorized", "train").overrides == {}
  with pytest.raises(hyper.ConfigError, match="0 to 1"):
    hyper.make_work_unit(file, "factorized", "train", 2)


@pytest.mark.parametrize(
  ("sweep", "name", "says"),
  [
    ("[{'a': 1}, {'a': 1}]", "'x'", "0 and 1 of the sweep are the same"),
    ("[{'a': 5}, {'a': 5, 'b': 2.0}]", "'x'", "the same"),  # b is 2.0 anyway.
    ("[{'a': 1}, {'a': 2}]", "'x'", "same run name 'x'"),
    ("[{'c': 1}]", "'x'", "Unknown config key 'c'"),
    ("[{'a': 1}, {'a': 'x'}]", "'x'", "'a' is int"),
    ("[]", "'x'", "get_hyper"),
    ("[3]", "'x'", "no dict"),
    ("[{}][1]", "'x'", r"get_hyper\(\) fails: IndexError"),
    ("[{}]", "config.c", r"get_cfg_str\(\) fails: AttributeError"),
    ("[{'b': float('nan')}]", "'x'", "finite"),
  ],
)
def test_sweeps_that_cannot_run_are_refused(tmp_path, sweep, name, says):
  with pytest.raises(hyper.ConfigError, match=says):
    hyper.expand(config_file(tmp_path, sweep, name), "factorized", "train")


def test_optional_booleans_can_be_swept(tmp_path):
  file = config_file(tmp_path, "hyper.sweep('flag', [True, False, None])", "f'f={config.flag}'")
  units = hyper.expand(file, "factorized", "train")
  assert [u.config["flag"] for u in units] == [True, False, None]


def test_swept_keys_cannot_be_overridden(tmp_path):
  with pytest.raises(hyper.ConfigError, match="'a' is swept"):
    hyper.expand(config_file(tmp_path, "[{'a': 1}]"), "factorized", "train", {"a": 3})


def test_check_sees_every_setting(tmp_path):
  seen = []
  file = config_file(tmp_path, "hyper.sweep('a', [1, 2])", "f'a={config.a}'")
  hyper.expand(file, "factorized", "train", check=lambda config: seen.append(config.a))
  assert seen == [1, 2]


def test_config_files_that_do_not_load_say_why(tmp_path):
  with pytest.raises(hyper.ConfigError, match=r"my config\.py"):
    config_file(tmp_path)
    hyper.load(str(tmp_path / "other.py"))
  with pytest.raises(hyper.ConfigError, match="no variants"):
    hyper.load(f"{tmp_path / 'my config.py'}:tiny").get_config()
  (tmp_path / "broken.py").write_text("import no_such_module")
  with pytest.raises(hyper.ConfigError, match="does not run: ModuleNotFoundError"):
    hyper.load(str(tmp_path / "broken.py"))
  (tmp_path / "empty.py").touch()
  with pytest.raises(hyper.ConfigError, match="no get_config"):
    hyper.load(str(tmp_path / "empty.py"))
  with pytest.raises(hyper.ConfigError, match=r"must return an ml_collections\.ConfigDict"):
    config_file(tmp_path, config_text="{}").get_config()


@given(st.text(max_size=400))
def test_safe_names_are_one_path_component(name):
  safe = hyper.safe_name(name)
  assert safe and "/" not in safe and len(safe.encode()) <= 200
  assert safe == hyper.safe_name(safe)


def test_long_names_stay_apart():
  assert hyper.safe_name("x" * 300 + "a") != hyper.safe_name("x" * 300 + "b")


def test_name_from_joins_the_last_parts():
  config = make_config()
  name = hyper.name_from(config, ["model_config.rd_lambda", "sizes", "flag"])
  assert name == "rd_lambda=0.01-sizes=3_5-flag=True"


def test_relative_paths_in_a_config_are_recorded_absolute(tmp_path, monkeypatch):
  (tmp_path / "photos").mkdir()
  (tmp_path / "c.py").write_text(
    "import ml_collections\n"
    "def get_config():\n"
    "  groups = {'train': dict(dataset=''), 'val': dict(dataset='kodak')}\n"
    "  return ml_collections.ConfigDict(groups)\n"
  )
  monkeypatch.chdir(tmp_path)
  file = hyper.load("c.py")
  for text in ("photos", "./photos", "photos/*.png"):
    unit = hyper.make_work_unit(file, "f", "train", overrides={"train.dataset": text})
    assert unit.config["train"]["dataset"] == str(tmp_path / text)
    assert unit.config["val"]["dataset"] == "kodak"


def test_a_sweep_gives_what_each_setting_alone_gives(tmp_path):
  """Settings share one config where they only set plain values; nothing must leak to the next."""
  file = config_file(
    tmp_path,
    config_text="make()",
    hyper_text="hyper.chain(hyper.product(hyper.sweep('m.a', [1, 2, 3]), "
    "hyper.sweep('b', [0.5, 1])),"
    "hyper.sweep('m.n', [7, 8]), hyper.sweep('m.list', [(1, 2)]), hyper.sweep('m.none', [3, 4]),"
    "hyper.sweep('m.half', [4]), hyper.sweep('name', ['x', 'y']), [{}])",
    name_text="'run-' + hyper.safe_name(str(config.to_dict()))",
  )

  def make():
    config = ml_collections.ConfigDict({"b": 2.0, "name": "n"})
    config.m = ml_collections.ConfigDict({"a": 9, "n": 1, "list": (5, 6), "none": None})
    config.m.half = config.m.get_oneway_ref("n") * 2
    return config

  file.module.make = make
  units = hyper.expand(file, "f", "train")
  alone = [hyper.make_work_unit(file, "f", "train", wid) for wid in range(len(units))]
  assert units == alone
  assert [unit.config["m"]["half"] for unit in units[6:8]] == [14, 16]
  assert units[-1].config["m"] == {"a": 9, "n": 1, "list": [5, 6], "none": None, "half": 2}
