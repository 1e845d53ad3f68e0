"""Options of a command: from the fields of its settings and from YAML files, with one clear error for a mistake."""

from __future__ import annotations

import argparse
import dataclasses
import json
import types
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from flexdpo.errors import FlexdpoError, nearest

Settings = TypeVar("Settings")
_YES, _NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class OptionParser(argparse.ArgumentParser):
    """Takes the fields of dataclasses as options, reads ``--config FILE.yaml``, and raises ``FlexdpoError``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        wide = partial(argparse.HelpFormatter, max_help_position=34, width=118)
        super().__init__(*args, **{"formatter_class": wide, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of a hundred options."""
        raise FlexdpoError(f"{message}; see {self.prog} --help")

    def add_settings(self, cls: type) -> None:
        """Add an option for every field that has a help text; ``metadata["option"]`` is its name if it differs."""
        hints = get_type_hints(cls)
        for field in dataclasses.fields(cls):
            if "help" not in field.metadata:
                continue
            kind = _plain_type(hints[field.name])
            more: dict[str, Any] = {}
            if kind is bool:
                kind, more = _yes_or_no, {"nargs": "?", "const": True}
            elif get_origin(kind) is tuple:
                kind, more = get_args(kind)[0], {"nargs": "+"}
            name = field.metadata.get("option", field.name)
            spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"])
            self.add_argument(
                *spellings, dest=field.name, type=kind, default=field.default, help=field.metadata["help"], **more
            )

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse ``argv``; the options of ``--config FILE.yaml`` come first, so that the command line wins."""
        found, unknown = self.parse_known_args(self.with_config(argv))
        self.refuse_unknown(unknown)
        return found

    def with_config(self, argv: list[str]) -> list[str]:
        """The words behind ``--config FILE.yaml``, with the file's options before them."""
        files = OptionParser(prog=self.prog, add_help=False)
        files.add_argument("--config")
        given, rest = files.parse_known_args(argv)
        return rest if given.config is None else [*_yaml_options(given.config), *rest]

    def refuse_unknown(self, words: list[str]) -> None:
        """Name the first of ``words`` that no option takes, and the option it may have been meant for."""
        if words:
            known = [option for action in self._actions for option in action.option_strings]
            name = words[0].split("=")[0]
            raise FlexdpoError(f"unknown option {name}{nearest(name, [*known, '--config'])}; see {self.prog} --help")


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Which rows of a dataset are meant."""

    split: str = dataclasses.field(
        default="train", metadata={"help": "Split of the dataset; slices such as train[:10%%] too."}
    )
    config_name: str | None = dataclasses.field(default=None, metadata={"help": "Configuration of a hub dataset."})
    columns: str | None = dataclasses.field(
        default=None, metadata={"help": "Which column is which: prompt=question,chosen=response_j."}
    )

    def load(self, name: str) -> Any:
        """The dataset of this name, as ``flexdpo train`` takes it."""
        from flexdpo.data.columns import parse_columns
        from flexdpo.data.load import load_preference_dataset

        columns = parse_columns(self.columns)
        return load_preference_dataset(name, split=self.split, config_name=self.config_name, columns=columns)


def settings_of(cls: type[Settings], found: argparse.Namespace, **more: Any) -> Settings:
    """The settings that were given, lists as tuples; ``more`` are those that have no option of their own name."""
    names = {field.name for field in dataclasses.fields(cls) if "help" in field.metadata}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(found).items() if name in names}
    lists = {name: tuple(dict.fromkeys(value)) for name, value in given.items() if isinstance(value, list)}
    return cls(**{**given, **lists, **more})


def writable(name: str | None) -> Path | None:
    """The result file of ``--json``, tried now: minutes of work must not end in a missing folder."""
    if name is None:
        return None
    path = Path(name)
    try:
        path.open("a", encoding="utf-8").close()
    except OSError as error:
        raise FlexdpoError(
            f"--json {path} cannot be written: {error.strerror}; name a file in a folder that exists"
        ) from error
    return path


def _plain_type(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _yes_or_no(word: str) -> bool:
    if word.lower() not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() in _YES


def _yaml_options(path: str) -> list[str]:
    """Turn a YAML mapping into the command-line options it stands for."""
    if not Path(path).is_file():
        raise FlexdpoError(f"--config {path}: no such file")
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise FlexdpoError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(settings, dict | None):
        raise FlexdpoError(f"--config {path} must hold 'option: value' lines, found a {type(settings).__name__}")
    options: list[str] = []
    for name, value in (settings or {}).items():
        if value is not None:
            values = value if isinstance(value, list) else [value]
            options += [f"--{name}", *(json.dumps(v) if isinstance(v, dict) else str(v) for v in values)]
    return options
