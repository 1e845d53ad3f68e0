"""The command ``flexdpo``. A user's mistake prints one line and exits with 2; ``--traceback`` shows more."""

import contextlib
import errno
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator

from flexdpo.commands import COMMANDS
from flexdpo.errors import FlexdpoError, Interrupted, is_the_disks, nearest


def main(argv: list[str] | None = None) -> int:
    """Run one command: the words after ``flexdpo``, by default those of the process.

    Returns:
        The exit code: 0, 2 for something the user can mend, 3 for a model that is refused, 128 + n when signal n ended
        it (130 for Ctrl-C); ``results`` has its own.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if argv is None and words[:1] == ["train"] and {"-h", "--help"} & set(words):
        # peft would bring every model along, and the process ends with the help
        import transformers.utils

        transformers.utils.is_peft_available = lambda *_: False
    shows_traceback = "--traceback" in words
    try:
        with _signals_raise():
            return _dispatch([word for word in words if word != "--traceback"])
    except (FlexdpoError, KeyboardInterrupt, OSError) as error:
        if shows_traceback or (isinstance(error, OSError) and not (is_the_disks(error) or error.errno == errno.EPIPE)):
            raise
        if isinstance(error, KeyboardInterrupt):
            print(f"flexdpo: interrupted{error}", file=sys.stderr)
            return 128 + getattr(error, "number", signal.SIGINT)
        if isinstance(error, OSError):
            return _refused_by_the_disk(error)
        print(f"flexdpo: error: {error}", file=sys.stderr)
        return 2


@contextlib.contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end a command as Ctrl-C does, unless the process was told to ignore them (``nohup``)."""
    process = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() == process:
            raise Interrupted(number)
        # a data loader's worker, forked since: it ends as if nothing had been set
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    names = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    mine = threading.current_thread() is threading.main_thread()
    numbers = [getattr(signal, name) for name in names if mine]
    before = {each: signal.getsignal(each) for each in numbers if signal.getsignal(each) == signal.SIG_DFL}
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _refused_by_the_disk(error: OSError) -> int:
    if error.errno == errno.EPIPE:
        # whoever read the output has seen enough; Python's own last flush must not complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    place = f" {error.filename}" if error.filename else ""
    print(
        f"flexdpo: error: the disk refuses{place}: {error.strerror}; make room, or name a folder that can be written "
        "to (--output_dir; HF_HOME and FLEXDPO_CACHE for caches)",
        file=sys.stderr,
    )
    return 2


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        width = max(map(len, COMMANDS))
        print(
            "usage: flexdpo COMMAND [options]\n\n"
            "Preference training of Hugging Face models that runs every distinct token once, exactly.\n\ncommands:",
            *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
            "\nflexdpo COMMAND --help lists the options; --traceback shows the traceback behind an error.",
            sep="\n",
        )
        return 0
    if words[0] in ("-V", "--version"):
        from flexdpo import __version__

        print(f"flexdpo {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if "--debug" in rest and " ".join([*rest, "--"]).split("--debug ", 1)[1].startswith("--"):
        raise FlexdpoError(
            "--debug takes one of transformers' values, such as underflow_overflow; --traceback shows the traceback "
            "behind an error"
        )
    if command not in COMMANDS:
        hint = nearest(command, list(COMMANDS))
        raise FlexdpoError(f"unknown command {command!r}{hint}; commands: {', '.join(COMMANDS)}")
    # forked tokenizer threads would warn on every data loader worker
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    module = importlib.import_module(f"flexdpo.commands.{command}")
    try:
        return int(module.run(rest))
    except SystemExit as done:  # how argparse ends a --help
        return int(done.code or 0)
