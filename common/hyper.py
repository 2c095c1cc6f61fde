"""Experiment configs and their sweeps: load, override, expand into work units.

A config file is a Python file with

* `get_config(variant="")`  -> `ml_collections.ConfigDict`; `file.py:tiny` asks for variant "tiny";
* `get_cfg_str(config)`     -> the run's name for people, e.g. "rd_lambda=0.01-num_filters=256";
* `get_hyper(variant="")`   -> the sweep: a list of `{dotted key: value}`, one setting a work unit
  (optional; without it the sweep is the config itself).

The helpers below build such lists:

    hyper.product(hyper.sweep("model_config.rd_lambda", [0.08, 0.01]), hyper.sweep("seed", [0, 1]))
"""

import builtins
import copy
import dataclasses
import difflib
import hashlib
import importlib.util
import inspect
import itertools
import math
import pathlib
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Callable, NamedTuple, Optional

import ml_collections

Setting = dict[str, Any]

_NAME_LIMIT = 180  # Bytes; a file name may have 255, and "wid=100000-" stands before it.


class ConfigError(ValueError):
  """A config, a sweep or an override is wrong; the message names the fix."""


def sweep(key: str, values: Iterable[Any]) -> list[Setting]:
  """One setting a value: `sweep("model_config.rd_lambda", [0.08, 0.01])`."""
  settings = [{key: value} for value in values]
  if not settings:
    raise ConfigError(f"The sweep of {key!r} has no values.")
  return settings


def product(*sweeps: Sequence[Setting]) -> list[Setting]:
  """Every combination of the sweeps' settings; the last sweep varies fastest."""
  return [_merge(parts) for parts in itertools.product(*sweeps)]


def zip(*sweeps: Sequence[Setting]) -> list[Setting]:
  """The sweeps' settings side by side; all must have the same length."""
  lengths = [len(s) for s in sweeps]
  if len(set(lengths)) > 1:
    raise ConfigError(f"zip needs sweeps of one length, got lengths {lengths}.")
  return [_merge(parts) for parts in builtins.zip(*sweeps)]


def chain(*sweeps: Sequence[Setting]) -> list[Setting]:
  """The settings of one sweep after those of the other."""
  return [dict(s) for s in itertools.chain(*sweeps)]


def _merge(parts: Iterable[Setting]) -> Setting:
  merged: Setting = {}
  for part in parts:
    for key, value in part.items():
      if key in merged:
        raise ConfigError(f"{key!r} is swept twice in one product or zip.")
      merged[key] = value
  return merged


def name_from(config: ml_collections.ConfigDict, keys: Sequence[str]) -> str:
  """A run name from config values: the last part of each dotted key, "rd_lambda=0.01-seed=0"."""
  parts = []
  for key in keys:
    value = get_value(config, key)
    if isinstance(value, (list, tuple)):
      value = "_".join(str(v) for v in value)
    elif isinstance(value, str):
      value = value.rstrip("/").rsplit("/", 1)[-1]
    parts.append(f"{key.rsplit('.', 1)[-1]}={value}")
  return "-".join(parts)


@dataclasses.dataclass(frozen=True)
class WorkUnit:
  """One setting of one experiment: all that a run needs to know.

  Attributes:
    family: The entropy-model folder, "factorized".
    task: The entry point in it, "train" or "itinf".
    config: The whole config as a plain nested dict, overrides applied.
    wid: Index of the setting in the sweep.
    overrides: What the sweep and the command line changed, `{dotted key: value}`.
    runname: The name for people; facts are read from `config`, never from here.
    config_file: Where the config came from, "factorized/configs/bls2017.py:tiny".
  """

  family: str
  task: str
  config: dict[str, Any]
  wid: int
  overrides: dict[str, Any]
  runname: str
  config_file: str

  def to_json(self) -> dict[str, Any]:
    """As a dict that JSON can hold."""
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, record: Mapping[str, Any]) -> "WorkUnit":
    """The inverse of `to_json`; a record with missing or unknown fields is an error."""
    known = {f.name for f in dataclasses.fields(cls)}
    if set(record) != known:
      raise ConfigError(
        f"Not a work unit record: missing {sorted(known - set(record))}, "
        f"unknown {sorted(set(record) - known)}. It was written by another version."
      )
    return cls(**record)


@dataclasses.dataclass(frozen=True)
class ConfigFile:
  """A loaded config file: its module and the variant asked for."""

  source: str
  path: pathlib.Path
  variant: str
  module: ModuleType

  def get_config(self) -> ml_collections.ConfigDict:
    """A fresh, locked config."""
    config = _call(self.module.get_config, self.variant, self.source)
    if not isinstance(config, ml_collections.ConfigDict):
      raise ConfigError(
        f"{self.source}: get_config() must return an ml_collections.ConfigDict, "
        f"not {type(config).__name__}."
      )
    return config.lock()

  def get_hyper(self) -> list[Setting]:
    """The sweep's settings; `[{}]` where the file defines none."""
    if not hasattr(self.module, "get_hyper"):
      return [{}]
    settings = _call(self.module.get_hyper, self.variant, self.source)
    if not isinstance(settings, (list, tuple)) or not settings:
      raise ConfigError(f"{self.source}: get_hyper() must return a list with a setting or more.")
    for setting in settings:
      if not isinstance(setting, dict):
        raise ConfigError(f"{self.source}: get_hyper() returned {setting!r}, which is no dict.")
    return [dict(s) for s in settings]

  def get_cfg_str(self, config: ml_collections.ConfigDict) -> str:
    """The run's name, safe as part of a file name."""
    if hasattr(self.module, "get_cfg_str"):
      try:
        name = self.module.get_cfg_str(config)
      except ConfigError:
        raise
      except Exception as e:
        raise ConfigError(f"{self.source}: get_cfg_str() fails: {type(e).__name__}: {e}") from e
    else:
      name = self.path.stem
    return safe_name(str(name))


def safe_name(name: str) -> str:
  """`name` fit for one path component: no separators or blanks, of bounded length."""
  clean = re.sub(r"[^A-Za-z0-9_.,=+@-]+", "_", name).strip("_.-") or "run"
  if len(clean) > _NAME_LIMIT:
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    clean = f"{clean[: _NAME_LIMIT - 9]}-{digest}"
  return clean


def load(source: str) -> ConfigFile:
  """Loads a config file named as on the command line: `path.py` or `path.py:variant`.

  Raises:
    ConfigError: There is no such file, it does not run, or it lacks `get_config`.
  """
  name, _, variant = source.partition(":")
  path = pathlib.Path(name).expanduser()
  if not path.is_file():
    raise ConfigError(_no_such_file(path))
  if path.suffix != ".py":
    raise ConfigError(f"Config file {name!r} is not a Python file (*.py).")
  root = str(pathlib.Path(__file__).resolve().parent.parent)
  if root not in sys.path:
    sys.path.insert(0, root)
  digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
  spec = importlib.util.spec_from_file_location(f"_config_{path.stem}_{digest}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
  except Exception as e:
    raise ConfigError(f"Config file {name!r} does not run: {type(e).__name__}: {e}") from e
  if not hasattr(module, "get_config"):
    raise ConfigError(f"Config file {name!r} defines no get_config().")
  return ConfigFile(source, path, variant, module)


def _no_such_file(path: pathlib.Path) -> str:
  message = f"No config file {str(path)!r}."
  folder = path.parent
  if folder.is_dir() and folder != pathlib.Path():
    known = sorted(p.name for p in folder.glob("*.py") if p.name != "__init__.py")
    if known:
      message += f" In {str(folder)!r} there are: {', '.join(known)}."
  else:
    files = pathlib.Path().glob("*/configs/*.py")
    known = sorted(str(p) for p in files if p.stem != "__init__")
    if known:
      message += f" Known: {', '.join(known)}."
  return message


def _call(function: Callable[..., Any], variant: str, source: str) -> Any:
  takes_variant = bool(inspect.signature(function).parameters)
  if variant and not takes_variant and function.__name__ == "get_config":
    raise ConfigError(f"{source}: this config has no variants; drop ':{variant}'.")
  try:
    return function(variant) if takes_variant else function()
  except ValueError as e:
    raise ConfigError(f"{source}: {e}") from e
  except Exception as e:
    raise ConfigError(f"{source}: {function.__name__}() fails: {type(e).__name__}: {e}") from e


def check_variant(variant: str, known: Sequence[str]) -> None:
  """For `get_config(variant)`: raises if `variant` is neither empty nor one of `known`."""
  if variant and variant not in known:
    raise ConfigError(f"Unknown variant {variant!r}. Known: {', '.join(known)}.")


def get_value(config: ml_collections.ConfigDict, key: str) -> Any:
  """The value at a dotted key.

  Raises:
    ConfigError: There is no such key; the message lists the keys that there are.
  """
  node: Any = config
  parts = key.split(".")
  for i, part in enumerate(parts):
    if not isinstance(node, ml_collections.ConfigDict) or part not in node:
      where = ".".join(parts[:i])
      if not isinstance(node, ml_collections.ConfigDict):
        raise ConfigError(f"Unknown config key {key!r}: {where!r} is a value, not a group.")
      known = sorted(node.keys())
      message = f"Unknown config key {key!r}. Known in {where or 'the config'!r}: "
      message += ", ".join(known) + "."
      everywhere = [k for k in _leaves(config) if k.rsplit(".", 1)[-1] == parts[-1]]
      near = everywhere or difflib.get_close_matches(key, list(_leaves(config)), 1)
      if near:
        message += f" Did you mean {near[0]!r}?"
      raise ConfigError(message)
    node = node[part]
  return node


def _leaves(config: ml_collections.ConfigDict, prefix: str = "") -> Iterator[str]:
  for key in config:
    value = config[key]
    if isinstance(value, ml_collections.ConfigDict):
      yield from _leaves(value, f"{prefix}{key}.")
    else:
      yield f"{prefix}{key}"


def set_values(config: ml_collections.ConfigDict, overrides: Mapping[str, Any]) -> None:
  """Sets dotted keys of a locked config, in order; values keep the types that the config has.

  Raises:
    ConfigError: A key is unknown, names a whole group, or the value's type does not fit.
  """
  for key, value in overrides.items():
    current = get_value(config, key)
    if isinstance(current, ml_collections.ConfigDict):
      keys = ", ".join(f"{key}.{k}" for k in current)
      raise ConfigError(f"{key!r} is a group of settings; override its members: {keys}.")
    *groups, last = key.split(".")
    node = get_value(config, ".".join(groups)) if groups else config
    kind = node.get_type(last)
    # ml_collections takes True for 1, and None for any value (which optional numbers need).
    none_fits = value is None and (kind is not bool or current is None)
    if not none_fits and kind is not type(None) and isinstance(value, bool) != (kind is bool):
      raise ConfigError(_wrong_type(key, kind, current, value))
    try:
      node[last] = value
    except (TypeError, ValueError) as e:
      raise ConfigError(_wrong_type(key, kind, current, value)) from e


def _wrong_type(key: str, kind: type, current: Any, value: Any) -> str:
  return f"{key!r} is {kind.__name__} (now {current!r}); {value!r} is {type(value).__name__}."


def expand(
  config_file: ConfigFile,
  family: str,
  task: str,
  overrides: Optional[Mapping[str, Any]] = None,
  check: Optional[Callable[[ml_collections.ConfigDict], None]] = None,
) -> list[WorkUnit]:
  """All work units of the config's sweep, every one checked, none with a side effect.

  Args:
    config_file: The loaded file.
    family: The entropy-model folder that will run it.
    task: "train" or "itinf".
    overrides: From the command line; they hold for every setting.
    check: Called with each setting's config; raises ConfigError if it could not run.

  Raises:
    ConfigError: A setting has an unknown key or a wrong type, an override is swept, or two
      settings, or their run names, are the same.
  """
  settings = _settings(config_file, overrides or {})
  if len(settings) == 1:
    return [make_work_unit(config_file, family, task, 0, overrides, check, setting=settings[0])]
  units = list(_units_of(config_file, family, task, settings, overrides or {}, check))
  _refuse_duplicates(units)
  return units


def _units_of(
  config_file: ConfigFile,
  family: str,
  task: str,
  settings: Sequence[Setting],
  overrides: Mapping[str, Any],
  check: Optional[Callable[[ml_collections.ConfigDict], None]],
) -> Iterator[WorkUnit]:
  """The work units of settings.

  Of many thousand settings, most differ in a few plain values. One config takes them in turn, and
  the units share the parts that are alike. What other values may follow, needs a config of its own.
  """
  config = config_file.get_config()
  set_values(config, overrides)
  base = _with_absolute_paths(plain(config))
  nodes: dict[str, Any] = {}
  for wid, setting in enumerate(settings):
    for key in setting:
      if key not in nodes:
        nodes[key] = _node_of_plain_value(config, key)
    if None in [nodes[key] for key in setting]:
      yield make_work_unit(config_file, family, task, wid, overrides, check, setting=setting)
      continue
    before = [(node, last, node[last]) for node, last in (nodes[key] for key in setting)]
    set_values(config, setting)
    if check is not None:
      check(config)
    values = base
    for key in setting:
      node, last = nodes[key]
      changed = _with_absolute_paths(plain_value({last: node[last]}, key))
      values = _with_value(values, key.split(".")[:-1], changed)
    yield WorkUnit(
      family=family,
      task=task,
      config=values,
      wid=wid,
      overrides={**setting, **overrides},
      runname=config_file.get_cfg_str(config),
      config_file=config_file.source,
    )
    for node, last, value in before:
      node[last] = value


def _node_of_plain_value(
  config: ml_collections.ConfigDict, key: str
) -> Optional[tuple[ml_collections.ConfigDict, str]]:
  """The group and the name of a key where setting it changes nothing else and can be undone."""
  try:
    value = get_value(config, key)
    *groups, last = key.split(".")
    node = get_value(config, ".".join(groups)) if groups else config
    stored = object.__getattribute__(node, "_fields")[last]
  except (AttributeError, KeyError, ConfigError):  # The usual way has the right words.
    return None
  is_reference = isinstance(stored, ml_collections.FieldReference)
  is_group = isinstance(value, ml_collections.ConfigDict)
  return None if value is None or is_reference or is_group else (node, last)


def _with_value(
  config: Mapping[str, Any], groups: Sequence[str], changed: Mapping[str, Any]
) -> dict[str, Any]:
  """A config with other values in one group; all else is shared."""
  if not groups:
    return {**config, **changed}
  return {**config, groups[0]: _with_value(config[groups[0]], groups[1:], changed)}


def make_work_unit(
  config_file: ConfigFile,
  family: str,
  task: str,
  wid: Optional[int] = None,
  overrides: Optional[Mapping[str, Any]] = None,
  check: Optional[Callable[[ml_collections.ConfigDict], None]] = None,
  setting: Optional[Setting] = None,
) -> WorkUnit:
  """The work unit of sweep setting `wid`, or of the config as it stands where `wid` is None."""
  overrides = dict(overrides or {})
  if setting is None:
    setting = {} if wid is None else _setting(config_file, overrides, wid)
  config = config_file.get_config()
  set_values(config, setting)
  set_values(config, overrides)
  if check is not None:
    check(config)
  return WorkUnit(
    family=family,
    task=task,
    config=_with_absolute_paths(plain(config)),
    wid=wid or 0,
    overrides={**setting, **overrides},
    runname=config_file.get_cfg_str(config),
    config_file=config_file.source,
  )


class Range(NamedTuple):
  """What a number in a config may be."""

  kind: type
  minimum: float
  exclusive: bool = False  # Whether the minimum itself is out of range.
  below: float = math.inf
  optional: bool = False  # Whether None is in range.


def check_numbers(config: ml_collections.ConfigDict, ranges: Mapping[str, Range]) -> None:
  """Raises ConfigError for a value that is no such number; keys the config lacks are skipped."""
  for key, (kind, minimum, exclusive, below, optional) in ranges.items():
    try:
      value = get_value(config, key)
    except ConfigError:
      continue
    if value is None and optional:
      continue
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    fits = is_number and math.isfinite(value) and (kind is float or value == int(value))
    if not fits or not minimum <= value < below or (exclusive and value == minimum):
      name = {int: "a whole number", float: "a number"}[kind]
      bound = f"above {minimum:g}" if exclusive else f"of {minimum:g} or more"
      bound += f" and below {below:g}" if below < math.inf else ""
      none = ", or None" if optional else ""
      raise ConfigError(f"{key} is {value!r}; it must be {name} {bound}{none}.")


# Config values that may be paths; a run is resumed from other folders than it was started in.
_PATH_KEYS = ("dataset", "warm_start", "warm_start_exp_dir")


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
  """The same config, where relative paths (not names of data sets) are made absolute."""
  from common import datasets

  absolute: dict[str, Any] = {}
  for key, value in config.items():
    if isinstance(value, dict):
      value = _with_absolute_paths(value)
    elif key in _PATH_KEYS and isinstance(value, str):
      value = datasets.absolute(value)
    absolute[key] = value
  return absolute


def _setting(config_file: ConfigFile, overrides: Mapping[str, Any], wid: int) -> Setting:
  settings = _settings(config_file, overrides)
  if not 0 <= wid < len(settings):
    raise ConfigError(
      f"--wid={wid}: the sweep of {config_file.source} has {len(settings)} settings, "
      f"0 to {len(settings) - 1}."
    )
  return settings[wid]


def _settings(config_file: ConfigFile, overrides: Mapping[str, Any]) -> list[Setting]:
  settings = config_file.get_hyper()
  for key in overrides:
    if any(key in s for s in settings):
      raise ConfigError(
        f"{key!r} is swept by get_hyper() of {config_file.source}, so overriding it would make "
        "settings alike. Edit the sweep, or run one setting by `python -m <family>.train` "
        "without --wid."
      )
  return settings


def _refuse_duplicates(units: Sequence[WorkUnit]) -> None:
  # Whole configs are compared: a setting that only spells out a default is the same setting.
  configs: dict[str, int] = {}
  names: dict[str, int] = {}
  shared: dict[int, str] = {}  # The digests of parts that units share, by their identity.
  for unit in units:
    first = configs.setdefault(_digest(unit.config, shared), unit.wid)
    if first != unit.wid:
      raise ConfigError(
        f"Settings {first} and {unit.wid} of the sweep are the same: {unit.overrides}."
      )
    first = names.setdefault(unit.runname, unit.wid)
    if first != unit.wid:
      raise ConfigError(
        f"Settings {first} and {unit.wid} of the sweep have the same run name {unit.runname!r}: "
        "let get_cfg_str() name every swept key."
      )


def _digest(config: Mapping[str, Any], shared: dict[int, str]) -> str:
  """Equal for equal configs; the configs must outlive `shared`."""
  parts = []
  for key, value in sorted(config.items()):
    if isinstance(value, dict):
      if id(value) not in shared:
        shared[id(value)] = _digest(value, shared)
      value = ("group", shared[id(value)])  # No config holds a tuple.
    parts.append((key, value))
  return hashlib.sha256(repr(parts).encode()).hexdigest()


def plain(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """The config as nested dicts and lists, references resolved: what JSON gives back unchanged."""
  return plain_value(config.to_dict(), "")


def plain_value(config: Mapping[str, Any], where: str) -> dict[str, Any]:
  """`plain` of a dict; `where` is its dotted key, for messages."""

  def convert(value: Any, key: str) -> Any:
    if isinstance(value, dict):
      return {k: convert(v, f"{key}.{k}" if key else k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
      return [convert(v, key) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
      raise ConfigError(
        f"A config's numbers are finite, so that JSON can hold them; {key!r} is {value}."
      )
    if value is None or isinstance(value, (bool, int, float, str)):
      return value
    raise ConfigError(f"A config holds numbers, strings, booleans and lists; {key!r} is {value!r}.")

  return {key: convert(value, where or key) for key, value in config.items()}


def to_config(record: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """A recorded config (`WorkUnit.config`) as a locked ConfigDict."""
  return ml_collections.ConfigDict(copy.deepcopy(dict(record))).lock()
