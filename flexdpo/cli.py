"""The command ``flexdpo``. A user's mistake prints one line and exits with 2; ``--debug`` shows its traceback."""

from __future__ import annotations

import importlib
import os
import sys

from flexdpo.errors import FlexdpoError, nearest

# each command is a module with `run(argv) -> exit code`, imported when it is called
COMMANDS = {
    "train": "train with DPO: without arguments the built-in example, or your model on your data",
    "check": "say whether a model is exact on shared, packed rows, or refused and why",
    "estimate": "predict what flexdpo would do for your dataset: tokens, speed-up, memory, settings",
    "show": "draw a row of your data: its trie, its mask, its tiles, and how a batch is packed",
    "bench": "time a training step on this machine: shared prompts against the ordinary ways",
    "results": "write the files of bench as tables into README, next to the paper's figures",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The words after ``flexdpo``; by default those of the process.

    Returns:
        The exit code: 0, 2 for something the user can mend, 130 when interrupted; commands may add their own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and words[:1] == ["train"] and {"-h", "--help"} & set(words):
        _leave_peft_out()
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"])
    except FlexdpoError as error:
        if debug:
            raise
        print(f"flexdpo: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if debug:
            raise
        print("flexdpo: interrupted", file=sys.stderr)
        return 130


def _leave_peft_out() -> None:
    """Import transformers' arguments without peft, which brings every model along; the process ends with the help."""
    import transformers.utils

    transformers.utils.is_peft_available = lambda *_: False


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if words[0] in ("-V", "--version"):
        from flexdpo import __version__

        print(f"flexdpo {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        known = list(COMMANDS)
        raise FlexdpoError(f"unknown command {command!r}{nearest(command, known)}; commands: {', '.join(known)}")
    # forked tokenizer threads would warn on every data loader worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module = importlib.import_module(f"flexdpo.commands.{command}")
    try:
        code: int = module.run(rest)
    except SystemExit as done:  # how argparse ends a --help
        return int(done.code or 0)
    return code


def _usage() -> str:
    width = max(map(len, COMMANDS))
    lines = "\n".join(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items())
    return (
        "usage: flexdpo COMMAND [options]\n\n"
        "Preference training of Hugging Face models that runs every distinct token once, exactly.\n\n"
        f"commands:\n{lines}\n\n"
        "flexdpo COMMAND --help lists the options; --debug shows the traceback behind an error.\n"
    )
