"""Command lines: absl flags and config overrides, with errors that name the fix.

Flags live in a FlagValues of their own, so commands can be run and tested within one process.
Overrides (`--config.a.b=value`) are typed by the config itself, not by what the text looks like.
"""

import ast
import sys
from collections.abc import Sequence
from typing import Any, Callable, NoReturn, Optional

from absl import flags

from common import hyper

# What absl itself defines and the published commands use.
_ABSL_FLAGS = ("alsologtostderr", "logtostderr", "verbosity", "v", "stderrthreshold")
_ABSL_VALUE_FLAGS = ("verbosity", "v", "stderrthreshold")


class UsageError(Exception):
  """The command line is wrong; the message says how to put it right."""


def fail(message: Any) -> NoReturn:
  """Prints an error for people and ends the program with exit code 2."""
  print(f"Error: {message}", file=sys.stderr)
  sys.exit(2)


def config_source(argv: Sequence[str]) -> Optional[str]:
  """The value of --config among `argv`, or None."""
  source = None
  for i, arg in enumerate(argv):
    for dashes in ("--", "-"):
      given = None
      if arg.startswith(f"{dashes}config="):
        given = arg.split("=", 1)[1]
      elif arg == f"{dashes}config":
        given = argv[i + 1] if i + 1 < len(argv) else ""
      if given == "":
        raise UsageError("--config needs a file: --config factorized/configs/bls2017.py")
      if given is not None and source is not None:
        raise UsageError("--config is given twice.")
      source = given if given is not None else source
  return source


def without_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
  """The arguments that override configs (`--config.a.b=value`), and the others."""
  overrides = [arg for arg in argv if _config_key(arg) is not None]
  return overrides, [arg for arg in argv if _config_key(arg) is None]


def overrides_of_each(argv: Sequence[str], configs: Sequence[Any]) -> list[dict[str, Any]]:
  """Overrides of several configs, each typed by every config that has its key.

  Args:
    argv: `--config.a.b=value`; a value stands behind the equals sign.
    configs: The configs; they are changed.

  Returns:
    For each config the overrides that are for it.

  Raises:
    UsageError: A value does not parse.
    hyper.ConfigError: No config has a key, or a value's type does not fit.
  """
  found: list[dict[str, Any]] = [{} for _ in configs]
  for arg in argv:
    unknown: list[hyper.ConfigError] = []
    for config, overrides in zip(configs, found):
      try:
        hyper.get_value(config, _config_key(arg) or "")
      except hyper.ConfigError as e:
        unknown.append(e)
        continue
      overrides.update(_overrides([arg], config))
    if len(unknown) == len(found):
      raise unknown[0]
  return found


def parse(
  argv: Sequence[str],
  define: Callable[[flags.FlagValues], None],
  usage: str,
  allow_config: bool = True,
) -> tuple[flags.FlagValues, Optional[hyper.ConfigFile], dict[str, Any]]:
  """Parses a command line.

  Args:
    argv: Arguments without the program's name.
    define: Defines the command's own flags on the FlagValues that it is given.
    usage: Printed above the flags by --help.
    allow_config: Whether --config and --config.x=y are taken.

  Returns:
    The flags, the config file (None without --config), and the overrides given by
    `--config.a.b=value`, typed as the config types them.

  Raises:
    UsageError: Unknown flags, leftover arguments, values that do not parse.
    hyper.ConfigError: The config file is missing or wrong, or an override's key is unknown.
  """
  values = flags.FlagValues()
  define(values)
  flags.DEFINE_bool("help", False, "Show this help.", short_name="h", flag_values=values)
  flags.DEFINE_bool(
    "alsologtostderr", False, "Accepted for compatibility: logs always go there.",
    flag_values=values,
  )  # fmt: skip
  argv = _without_absl_flags(_joined(list(argv), values, allow_config))
  if any(a in ("--help", "-h", "-help", "--helpfull", "--helpshort") for a in argv):
    _print_help(values, usage, allow_config)
    sys.exit(0)
  config_file = None
  overrides: dict[str, Any] = {}
  if allow_config:
    source = config_source(argv)
    config_args = [a for a in argv if _config_key(a) is not None]
    if source is not None:
      config_file = hyper.load(source)
      overrides = _overrides(argv, config_file.get_config())
    elif config_args:
      raise UsageError(f"{config_args[0]} overrides a config; name it with --config FILE.")
    argv = [a for a in argv if not _is_config(a) and a not in config_args]
  try:
    rest = values(["program", *argv])[1:]
  except flags.UnrecognizedFlagError as e:
    known = [name for name in sorted(values) if name not in ("h", "alsologtostderr")]
    raise UsageError(f"{e}. Known: {', '.join(f'--{name}' for name in known)}.") from e
  except (flags.Error, ValueError, TypeError) as e:
    raise UsageError(f"{e} (see --help)") from e
  if rest:
    raise UsageError(
      f"Left over on the command line: {' '.join(rest)}. Flags are written --name=value; "
      "booleans too: --config.a.b=False."
    )
  return values, config_file, overrides


def _joined(argv: list[str], values: flags.FlagValues, allow_config: bool) -> list[str]:
  """`--name value` as `--name=value`, so that a value is never taken for a flag."""
  joined: list[str] = []
  i = 0
  while i < len(argv):
    arg, name = argv[i], argv[i].lstrip("-")
    takes_value = name in values and not values[name].boolean
    takes_value = takes_value or (allow_config and name == "config")
    if arg.startswith("-") and takes_value and i + 1 < len(argv):
      joined.append(f"--{name}={argv[i + 1]}")
      i += 1
    else:
      joined.append(arg)
    i += 1
  return joined


def _without_absl_flags(argv: list[str]) -> list[str]:
  kept, skip = [], False
  for arg in argv:
    name, _, value = arg.lstrip("-").partition("=")
    if skip:
      skip = False
    elif arg.startswith("-") and name in _ABSL_FLAGS:
      skip = name in _ABSL_VALUE_FLAGS and not value
    else:
      kept.append(arg)
  return kept


def _is_config(arg: str) -> bool:
  return arg in ("--config", "-config") or arg.startswith(("--config=", "-config="))


def _config_key(arg: str) -> Optional[str]:
  """The dotted key of an argument that overrides a config's value, else None."""
  name = arg.lstrip("-").split("=", 1)[0]
  for prefix in ("config.", "noconfig."):
    if arg.startswith("-") and name.startswith(prefix):
      return name[len(prefix) :]
  return None


def _overrides(argv: list[str], config: Any) -> dict[str, Any]:
  """The config's overrides among `argv`, checked and typed; values after a blank are joined."""
  overrides: dict[str, Any] = {}
  i = 0
  while i < len(argv):
    arg, key = argv[i], _config_key(argv[i])
    i += 1
    if key is None:
      continue
    current = hyper.get_value(config, key)
    if hasattr(current, "keys"):
      hyper.set_values(config, {key: None})  # Raises, and names the members of the group.
    kind = _kind(config, key)
    negated = arg.lstrip("-").startswith("noconfig.")
    if "=" in arg and not negated:
      text = arg.split("=", 1)[1]
    elif kind is bool and "=" not in arg:
      text = "False" if negated else "True"
    elif negated:
      raise UsageError(f"{arg}: --noconfig.x is for booleans, and takes no value.")
    elif i < len(argv) and not argv[i].startswith("--"):
      text = argv.pop(i)
    else:
      raise UsageError(f"{arg} needs a value: {arg}=VALUE.")
    value = _parsed(key, kind, text)
    hyper.set_values(config, {key: value})
    overrides.pop(key, None)  # The last one counts, and takes its place in the order.
    overrides[key] = value
  return overrides


def _kind(config: Any, key: str) -> type:
  *groups, last = key.split(".")
  for group in groups:
    config = config[group]
  return config.get_type(last)


def _parsed(key: str, kind: type, text: str) -> Any:
  """`text` as the type that the config has at `key`."""
  if text in ("None", "none"):
    return None
  if kind is str:
    return text
  if kind is bool:
    if text.lower() not in ("true", "false", "1", "0"):
      raise UsageError(f"--config.{key}={text}: a boolean is True or False.")
    return text.lower() in ("true", "1")
  if kind in (int, float):
    try:
      return kind(text)
    except ValueError as e:
      what = "a whole number" if kind is int else "a number"
      raise UsageError(f"--config.{key}={text}: needs {what}.") from e
  try:
    value = ast.literal_eval(text)
  except (SyntaxError, ValueError) as e:
    if kind is type(None):
      return text
    raise UsageError(
      f"--config.{key}={text}: needs a {kind.__name__}, written as in Python: "
      f"'--config.{key}=(1, 2)', strings in quotes."
    ) from e
  if kind in (tuple, list):
    return kind(value) if isinstance(value, (tuple, list)) else kind([value])
  return value


def _print_help(values: flags.FlagValues, usage: str, allow_config: bool) -> None:
  print(usage.strip())
  print("\nflags:")
  for name in sorted(values):
    flag = values[name]
    if name in ("alsologtostderr", "h") or flag.name != name:
      continue
    unset = flag.default is None or flag.default is False or flag.default in ("", [])
    default = "" if unset else f" (default: {flag.default})"
    print(f"  --{name}: {flag.help}{default}")
  if allow_config:
    print("  --config.<key>=<value>: override one value of the config, e.g.")
    print("    --config.train_eval_config.num_steps=1000")
