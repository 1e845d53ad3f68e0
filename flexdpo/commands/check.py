"""``flexdpo check MODEL``: exact or refused, and why."""

from __future__ import annotations

from flexdpo.commands.options import OptionParser


def run(argv: list[str]) -> int:
    """Run ``flexdpo check`` with the words after it; returns 0 for exact and 3 for refused."""
    parser = OptionParser(
        prog="flexdpo check",
        description="Say whether a model gives the ordinary result on shared, packed rows, and if not, why. "
        "Exit code 0: exact. 3: refused.",
    )
    parser.add_argument("model", metavar="MODEL", help="a config.json, a saved folder, or a hub name")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--trust_remote_code", action="store_true", help="let a model from the hub run its own code")
    options = parser.parse_args(argv)
    from flexdpo.proof.check import run_check

    text, code = run_check(options.model, json=options.json, trust_remote_code=options.trust_remote_code)
    print(text)
    return code
