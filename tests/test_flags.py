"""Command lines: typed config overrides, and errors that name the fix."""

import pytest
from absl import flags as absl_flags

from common import flags, hyper

CONFIG = """
import ml_collections
from ml_collections import config_dict

def get_config(variant=""):
  config = ml_collections.ConfigDict()
  config.num_steps = 2 if variant == "tiny" else 4
  config.b = True
  config.rate = 0.5
  config.name = "a"
  config.sizes = (3, 5)
  config.names = ["x"]
  config.optional = config_dict.placeholder(int)
  config.optional_flag = config_dict.placeholder(bool)
  config.anything = None
  config.group = ml_collections.ConfigDict({"x": 1})
  config.group.twice = config.get_oneway_ref("num_steps") * 2
  return config
"""


def define(values):
  absl_flags.DEFINE_string("workdir", None, "Where.", flag_values=values)
  absl_flags.DEFINE_string("args", "", "More.", flag_values=values)
  absl_flags.DEFINE_integer("wid", 0, "Which.", flag_values=values)
  absl_flags.DEFINE_bool("dry_run", False, "Only look.", flag_values=values)


@pytest.fixture
def file(tmp_path):
  path = tmp_path / "it's a config.py"
  path.write_text(CONFIG)
  return str(path)


def parse(*argv, **kwargs):
  return flags.parse(argv, define, "usage: test", **kwargs)


def overrides(file, *argv):
  return parse(f"--config={file}", *argv)[2]


def test_config_is_given_with_a_blank_or_an_equals_sign(file):
  for argv in (["--config", file], [f"--config={file}"], ["-config", file]):
    values, config_file, given = parse("--wid=3", *argv, "--dry_run")
    assert config_file.source == file
    assert (values.wid, values.dry_run, values.workdir, given) == (3, True, None, {})


def test_no_config(file):
  values, config_file, given = parse("--workdir", "a b")
  assert (values.workdir, config_file, given) == ("a b", None, {})


def test_variant(file):
  _, config_file, _ = parse("--config", f"{file}:tiny")
  assert config_file.get_config().num_steps == 2


@pytest.mark.parametrize(
  ("argv", "value"),
  [
    (["--config.num_steps=7"], {"num_steps": 7}),
    (["--config.num_steps", "7"], {"num_steps": 7}),
    (["--config.group.x=-1"], {"group.x": -1}),
    (["--config.group.x", "-1"], {"group.x": -1}),
    (["--config.rate=2"], {"rate": 2.0}),
    (["--config.rate=1e-4"], {"rate": 1e-4}),
    (["--config.name=7"], {"name": "7"}),
    (["--config.name="], {"name": ""}),
    (["--config.name=a=b 'c'"], {"name": "a=b 'c'"}),
    (["--config.b=False"], {"b": False}),
    (["--config.b=0"], {"b": False}),
    (["--config.b"], {"b": True}),
    (["--noconfig.b"], {"b": False}),
    (["--config.sizes=(1, 2)"], {"sizes": (1, 2)}),
    (["--config.sizes=[1, 2]"], {"sizes": (1, 2)}),
    (["--config.sizes=1,2"], {"sizes": (1, 2)}),
    (["--config.sizes=1"], {"sizes": (1,)}),
    (["--config.names=['p', 'q']"], {"names": ["p", "q"]}),
    (["--config.optional=3"], {"optional": 3}),
    (["--config.optional=None"], {"optional": None}),
    (["--config.optional", "none"], {"optional": None}),
    (["--config.optional=None", "--config.optional=4"], {"optional": 4}),
    (["--config.optional=4", "--config.optional=None"], {"optional": None}),
    (["--config.optional_flag=true"], {"optional_flag": True}),
    (["--config.anything=None"], {"anything": None}),
    (["--config.anything=0.5"], {"anything": 0.5}),
    (["--config.anything=words here"], {"anything": "words here"}),
  ],
)
def test_overrides_have_the_configs_types(file, argv, value):
  given = overrides(file, *argv)
  assert given == value
  assert [type(v) for v in given.values()] == [type(v) for v in value.values()]


def test_overrides_may_come_before_the_config_and_keep_their_order(file):
  argv = ["--config.rate=1", "--config.b=False", f"--config={file}", "--config.rate=3"]
  assert list(parse(*argv)[2].items()) == [("b", False), ("rate", 3.0)]


def test_overrides_do_not_come_from_the_processs_own_command_line(file, monkeypatch):
  monkeypatch.setattr("sys.argv", ["program", "--config=other", "--config.num_steps=9"])
  assert overrides(file, "--config.rate=1") == {"rate": 1.0}


@pytest.mark.parametrize(
  ("argv", "says"),
  [
    (["--config.num_step=3"], "Did you mean 'num_steps'"),
    (["--config.num_step=3"], "group, name, names, num_steps"),
    (["--config.group.y=3"], "Known in 'group': twice, x"),
    (["--noconfig.c"], "Unknown config key 'c'"),
    (["--config.group={}"], "group.x"),
    (["--config.num_steps=2.5"], "needs a whole number"),
    (["--config.num_steps=True"], "needs a whole number"),
    (["--config.num_steps"], "needs a value"),
    (["--config.num_steps", "--wid=3"], "needs a value"),
    (["--config.rate=fast"], "needs a number"),
    (["--config.b=maybe"], "True or False"),
    (["--config.b=None"], "'b' is bool"),
    (["--config.sizes=(a, b)"], "needs a tuple"),
    (["--noconfig.rate"], "is for booleans"),
    (["--config.b", "False"], "Left over on the command line: False"),
    (["--config.b", "False"], "--config.a.b=False"),
    (["--wib=3"], "wib"),
    (["--wib=3"], "--args, --dry_run, --help, --wid, --workdir"),
    (["--wid=x"], "wid"),
    (["--wid"], "wid"),
    (["word"], "Left over"),
    (["--config", "other.py"], "twice"),
  ],
)
def test_mistakes_name_the_fix(file, argv, says):
  with pytest.raises((flags.UsageError, hyper.ConfigError)) as e:
    overrides(file, *argv)
  assert says in str(e.value)
  assert "\n" not in str(e.value)


def test_config_mistakes(file, tmp_path):
  with pytest.raises(hyper.ConfigError, match=r"it's a config\.py"):
    parse("--config", str(tmp_path / "other.py"))
  with pytest.raises(flags.UsageError, match="--config needs a file"):
    parse("--config")
  with pytest.raises(flags.UsageError, match="--config FILE"):
    parse("--config.rate=3")
  with pytest.raises(flags.UsageError, match="config"):
    parse(f"--config={file}", allow_config=False)


def test_values_that_look_like_flags_are_values(file):
  values, _, given = parse("--config", file, "--args", "--config.rate=3 --help", "--workdir", "-v")
  assert (values.args, values.workdir, given) == ("--config.rate=3 --help", "-v", {})
  assert parse("--args", "--help")[0].args == "--help"
  assert parse("--args=--alsologtostderr")[0].args == "--alsologtostderr"


def test_absls_own_flags_are_accepted(file):
  argv = ["--alsologtostderr", "--verbosity", "1", "-v=1", "--wid=2", "--stderrthreshold=info"]
  assert parse(*argv)[0].wid == 2


def test_help_lists_the_flags(capsys):
  with pytest.raises(SystemExit) as e:
    parse("--wid=3", "--help")
  assert e.value.code == 0
  out = capsys.readouterr().out
  for part in ("usage: test", "--wid: Which. (default: 0)", "--config.<key>=<value>"):
    assert part in out


def test_fail_ends_with_code_2(capsys):
  with pytest.raises(SystemExit) as e:
    flags.fail("no such thing")
  assert e.value.code == 2
  assert capsys.readouterr().err == "Error: no such thing\n"
