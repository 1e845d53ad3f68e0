"""Several processes behind one ``flexdpo train --accelerate_config``, started by accelerate as ``trl`` does it."""

import subprocess
from importlib import resources
from importlib.util import find_spec
from pathlib import Path

from flexdpo.errors import FlexdpoError, quoted

OPTION = "--accelerate_config"


def launch_train(argv: list[str], of_accelerate: list[str]) -> int:
    """Start ``flexdpo train`` in the processes of an accelerate config; returns its exit code.

    Args:
        argv: All words.
        of_accelerate: Those of them, in their order, that are no options of ``flexdpo train`` and so accelerate's.
    """
    from accelerate.commands.launch import launch_command, launch_command_parser
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    theirs = iter(of_accelerate)
    following, own = next(theirs, None), []
    for word in argv:
        if word == following:
            following = next(theirs, None)
        else:
            own.append(word)
    words = [part for word in of_accelerate for part in (word.split("=", 1) if word.startswith(OPTION) else [word])]
    place = words.index(OPTION)
    if place + 1 == len(words):
        raise FlexdpoError(f"{OPTION} takes a file or a name; give one")
    words[place : place + 2] = ["--config_file", str(_config_file(words[place + 1]))]
    try:
        launch_command(launch_command_parser().parse_args([*words, "-m", "flexdpo", "train", *own]))
    except subprocess.CalledProcessError as error:
        # a negative one is the signal that ended it
        return error.returncode if error.returncode >= 0 else 128 - error.returncode
    except ChildFailedError as error:
        return int(error.get_first_failure()[1].exitcode)
    except (ValueError, KeyError, TypeError) as error:
        raise FlexdpoError(f"{OPTION}: accelerate refuses {quoted(words)} ({error}); see its own --help") from error
    return 0


def _config_file(name: str) -> Path:
    """A file, or one of those that come with TRL under a name of their own (``fsdp2``, ``zero3``, ...)."""
    if Path(name).is_file():
        return Path(name)
    known = {}
    if find_spec("trl") is not None:
        folder = Path(str(resources.files("trl"))) / "accelerate_configs"
        known = {path.stem: path for path in sorted(folder.glob("*.yaml"))}
    if name not in known:
        raise FlexdpoError(
            f"{OPTION} {name}: no such file, and none of TRL's configs ({quoted(known)}); make one with 'accelerate "
            "config'"
        )
    return known[name]
