"""Parsing for the command line: dataclass fields as options, YAML files as defaults, one clear error for a mistake."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from flexdpo.errors import FlexdpoError, nearest


class OptionParser(HfArgumentParser):
    """``HfArgumentParser`` that groups its help by dataclass, reads YAML and raises ``FlexdpoError`` on a mistake."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of a hundred options."""
        raise FlexdpoError(f"{message}; see {self.prog} --help")

    def show_group(self, title: str, names: Sequence[str], *, but_not: Sequence[str] = ()) -> None:
        """Show the options ``names`` under their own heading in the help."""
        group = self.add_argument_group(title)
        wanted = {f"--{name}" for name in names} - {f"--{name}" for name in but_not}
        for action in self._actions:
            if wanted & set(action.option_strings):
                for other in self._action_groups:
                    if action in other._group_actions:
                        other._group_actions.remove(action)
                group._group_actions.append(action)

    def parse_with_config(self, argv: list[str]) -> tuple[Any, ...]:
        """Parse ``argv``; the options of ``--config FILE.yaml`` come first, so that the command line wins."""
        path, rest = _take_option(argv, "--config")
        tokens = [*(_yaml_options(path) if path else []), *rest]
        *parsed, unknown = self.parse_args_into_dataclasses(args=tokens, return_remaining_strings=True)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            name = unknown[0].split("=")[0]
            hint = nearest(name, [*known, "--config"])
            raise FlexdpoError(f"unknown option {name}{hint}; see {self.prog} --help")
        return tuple(parsed)


class _HelpFormatter(argparse.HelpFormatter):
    """Wide, with one line between an option and its text, and without a usage of a hundred options."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=118)


def _take_option(argv: list[str], name: str) -> tuple[str | None, list[str]]:
    for i, token in enumerate(argv):
        if token == name:
            if i + 1 == len(argv):
                raise FlexdpoError(f"{name} needs a value")
            return argv[i + 1], argv[:i] + argv[i + 2 :]
        if token.startswith(f"{name}="):
            return token.split("=", 1)[1], argv[:i] + argv[i + 1 :]
    return None, argv


def _yaml_options(path: str) -> list[str]:
    """Turn a YAML mapping into the command-line options it stands for."""
    if not Path(path).is_file():
        raise FlexdpoError(f"--config {path}: no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if settings is None:
        return []
    if not isinstance(settings, dict):
        raise FlexdpoError(f"--config {path} must hold 'option: value' lines, found a {type(settings).__name__}")
    options: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        values = value if isinstance(value, list) else [value]
        options += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return options


def field_names(*dataclass_types: type) -> list[str]:
    """Names of the fields of dataclasses, in order."""
    return [field.name for cls in dataclass_types for field in dataclasses.fields(cls) if field.init]
