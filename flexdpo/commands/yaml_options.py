"""Options from a YAML file, as the words that the command line would have them."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from flexdpo.errors import FlexdpoError


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers and truth values, where 1.1 reads ``1e-6`` as text and ``no`` as false."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in resolvers if tag != "tag:yaml.org,2002:bool"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile("^(?:true|True|TRUE|on|On|ON|false|False|FALSE|off|Off|OFF)$"), list("tTfFoO")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def yaml_options(path: str) -> list[str]:
    """Turn a YAML mapping into the command-line options it stands for."""
    if not Path(path).is_file():
        raise FlexdpoError(f"--config {path}: no such file; name a YAML file with 'option: value' lines")
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506 a SafeLoader
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        raise FlexdpoError(
            f"--config {path} is not valid YAML: {' '.join(str(error).split())}; mend it there"
        ) from error
    except RecursionError as error:
        raise FlexdpoError(f"--config {path} is nested too deeply; write 'option: value' lines") from error
    except OSError as error:
        raise FlexdpoError(f"--config {path} cannot be read: {error.strerror}; name another file") from error
    if not isinstance(settings, dict | None):
        raise FlexdpoError(
            f"--config {path} must hold 'option: value' lines, found a {type(settings).__name__}; write it so"
        )
    options: list[str] = []
    for name, value in (settings or {}).items():
        # with its name in one word: a value may begin with a dash
        if isinstance(value, list) and len(value) != 1:
            options += [f"--{name}", *map(_word, value)]
        elif value is not None:
            options.append(f"--{name}={_word(value[0] if isinstance(value, list) else value)}")
    return options


def _word(value: Any) -> str:
    return json.dumps(value, default=str) if isinstance(value, dict) else str(value)
