"""Options of a command: from the fields of its settings and from YAML files, with one clear error for a mistake."""

import argparse
import copy
import dataclasses
import shutil
import textwrap
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn, TypeVar, Union, get_args, get_origin, get_type_hints

from flexdpo.commands.known_elsewhere import reason_against
from flexdpo.commands.yaml_options import yaml_options
from flexdpo.errors import FlexdpoError, nearest

Settings = TypeVar("Settings")
_YES, _NO = ("true", "yes", "t", "y", "1"), ("false", "no", "f", "n", "0")


class _Help(argparse.HelpFormatter):
    """As wide as the terminal, with the defaults that say something."""

    def __init__(self, prog: str) -> None:
        columns = shutil.get_terminal_size((120, 40)).columns
        self.columns = max(40, columns - 2)
        super().__init__(prog, max_help_position=min(36, columns // 3), width=self.columns)

    def _format_usage(self, usage: str | None, *args: Any) -> str:
        written = super()._format_usage(usage, *args)
        return written if usage is None else textwrap.fill(written, self.columns, subsequent_indent=" " * 7) + "\n\n"

    def _get_help_string(self, action: argparse.Action) -> str | None:
        choices = f" One of {', '.join(map(str, action.choices))}." if action.choices else ""
        help_text = f"{action.help or ''}{choices}".strip()
        if action.default in (None, "", [], argparse.SUPPRESS) or action.default is False:
            return help_text
        return f"{help_text} (default: %(default)s)"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        # each name once, though it may be written with dashes too
        shown = copy.copy(action)
        shown.option_strings = [name for name in action.option_strings if "-" not in name[2:]]
        if action.option_strings and action.metavar is None:
            kind = "true|false" if action.const is True else getattr(action.type, "__name__", "value")
            shown.metavar = {"str": "TEXT", "int": "N", "float": "X"}.get(kind, kind if "|" in kind else "VALUE")
        return super()._format_action_invocation(shown)


class OptionParser(argparse.ArgumentParser):
    """Takes the fields of dataclasses as options, reads ``--config FILE.yaml``, and raises ``FlexdpoError``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": _Help, "allow_abbrev": False, **kwargs})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage of a hundred options."""
        raise FlexdpoError(f"{message}; see {self.prog} --help")

    def add_settings(self, cls: type, title: str) -> None:
        """Add an option for every field that has a help text, under a heading.

        ``metadata["option"]`` is its name if it differs, ``metadata["aliases"]`` are others that it goes by.
        """
        hints, group = get_type_hints(cls), self.add_argument_group(title)
        for field in dataclasses.fields(cls):
            if "help" not in field.metadata:
                continue
            names = [f"--{field.metadata.get('option', field.name)}", *field.metadata.get("aliases", ())]
            kind, more = hints[field.name], dict[str, Any]()
            if get_origin(kind) in (Union, types.UnionType):
                kind = next(each for each in get_args(kind) if each is not type(None))
            if kind is bool:
                kind, more = _yes_or_no, {"nargs": "?", "const": True}
            elif get_origin(kind) in (tuple, list):
                kind, more = get_args(kind)[0], {"nargs": "+"}
            spellings = dict.fromkeys(each for name in names for each in (name, name.replace("_", "-")))
            group.add_argument(
                *spellings, dest=field.name, type=kind, default=field.default, help=field.metadata["help"], **more
            )

    def require_effect(self, found: argparse.Namespace, without: Iterable[str], where: str) -> None:
        """Refuse those of the options ``without`` that were given, though they would change nothing ``where``."""
        for action in self._actions:
            if action.dest in without and getattr(found, action.dest) != action.default:
                raise FlexdpoError(f"{action.option_strings[0]} has no effect {where}; leave it out")

    def read(self, argv: list[str]) -> argparse.Namespace:
        """Parse ``argv``; the options of every ``--config FILE.yaml`` come first, so that the command line wins."""
        files = OptionParser(prog=self.prog, add_help=False)
        files.add_argument("--config", action="append", default=[])
        given, rest = files.parse_known_args(argv)
        found, unknown = self.parse_known_args([*(word for file in given.config for word in yaml_options(file)), *rest])
        if not unknown:
            return found
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise FlexdpoError(f"{name!r} belongs to no option; see {self.prog} --help")
        if reason := reason_against(name, self.prog):
            raise FlexdpoError(f"{name} is not supported: {reason}")
        known = [option for action in self._actions for option in action.option_strings]
        raise FlexdpoError(f"unknown option {name}{nearest(name, [*known, '--config'])}; see {self.prog} --help")


@dataclasses.dataclass
class TokenizerOptions:
    """Which model is meant, or its tokenizer alone. Names as in TRL."""

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "A saved model or hub name: its tokenizer and sizes are used, its weights are not read.",
            "aliases": ["--model"],
        },
    )
    model_revision: str = dataclasses.field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    tokenizer: str | None = dataclasses.field(
        default=None, metadata={"help": "A folder with a tokenizer or a hub name; by default the model's."}
    )
    trust_remote_code: bool = dataclasses.field(
        default=False, metadata={"help": "Let models and tokenizers from the hub run their own code."}
    )

    def load_config(self) -> Any:
        """The model's config, or ``None`` where there is a tokenizer alone."""
        from flexdpo.training.model_loading import load_config

        if self.model_name_or_path is None:
            return None
        return load_config(self.model_name_or_path, trust_remote_code=self.trust_remote_code, **self._revision)

    def load_tokenizer(self, *, images: bool = False) -> Any:
        """The tokenizer that was named, or the model's; for data with images the processor of a model that sees."""
        from flexdpo.hf.auto import sees
        from flexdpo.training.model_loading import load_processor, load_tokenizer

        name, revision = str(self.model_name_or_path), self._revision
        if revision and self.model_name_or_path is None:
            raise FlexdpoError(f"--model_revision {self.model_revision} has no effect without a model; leave it out")
        if self.tokenizer is not None:
            name, revision = self.tokenizer, {}
        config = self.load_config() if images else None
        load = load_processor if images and (config is None or sees(config)) else load_tokenizer
        return load(name, trust_remote_code=self.trust_remote_code, **revision)

    @property
    def _revision(self) -> dict[str, str]:
        return {} if self.model_revision == "main" else {"revision": self.model_revision}


def one_name(option: str, *names: str | None) -> str | None:
    """What was given as the first word or as ``option``."""
    given = list(dict.fromkeys(name for name in names if name is not None))
    if len(given) > 1:
        raise FlexdpoError(f"{given[0]!r} and --{option} {given[1]!r} are two names for one thing; give one of them")
    return given[0] if given else None


def settings_of(cls: type[Settings], found: argparse.Namespace, **more: Any) -> Settings:
    """The settings that were given, lists as tuples; ``more`` are those that have no option of their own name."""
    names = {field.name for field in dataclasses.fields(cls) if "help" in field.metadata}  # type: ignore[arg-type]
    given = {name: value for name, value in vars(found).items() if name in names}
    return cls(**{n: tuple(dict.fromkeys(v)) if isinstance(v, list) else v for n, v in given.items()} | more)


def writable(name: str | None) -> Path | None:
    """The result file of ``--json``, tried now: minutes of work must not end in a missing folder."""
    try:
        if name is not None:
            Path(name).open("a", encoding="utf-8").close()
    except OSError as error:
        way_out = "name a file in a folder that exists"
        raise FlexdpoError(f"--json {name} cannot be written: {error.strerror}; {way_out}") from error
    return None if name is None else Path(name)


def _yes_or_no(word: str) -> bool:
    if word.lower() not in (*_YES, *_NO):
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return word.lower() in _YES
