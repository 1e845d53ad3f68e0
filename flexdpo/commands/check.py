"""``flexdpo check MODEL``: exact or refused, and why."""

from dataclasses import dataclass, field

from flexdpo.commands.options import OptionParser, one_name, settings_of
from flexdpo.errors import FlexdpoError


@dataclass
class CheckOptions:
    """Which model, and how the answer is to look. Names as in TRL."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "A config.json, a saved folder, or a hub name.", "aliases": ["--model"]}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit on the hub."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Let a model from the hub run its own code."})
    json: bool = field(default=False, metadata={"help": "Print the report as JSON."})


def parser() -> OptionParser:
    """The options."""
    options = OptionParser(
        prog="flexdpo check",
        usage="flexdpo check MODEL [options]",
        description="Say whether a model gives the ordinary result on shared, packed rows, and if not, why. "
        "Exit code 0: exact. 3: refused.",
    )
    options.add_argument("model", metavar="MODEL", nargs="?", help="As --model_name_or_path.")
    options.add_settings(CheckOptions, "model")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo check`` with the words after it; returns 0 for exact and 3 for refused."""
    found = parser().read(argv)
    options = settings_of(CheckOptions, found)
    name = one_name("model_name_or_path", found.model, options.model_name_or_path)
    if name is None:
        raise FlexdpoError("which model? give a folder, a config.json or a hub name: flexdpo check ./my-model")
    from flexdpo.proof.check import run_check

    text, code = run_check(
        name, json=options.json, trust_remote_code=options.trust_remote_code, revision=options.model_revision
    )
    print(text)
    return code
