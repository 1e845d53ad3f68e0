"""``flexdpo completion bash|zsh``: a script that completes commands, options and the values of those with few."""

import importlib

from flexdpo.commands import COMMANDS
from flexdpo.commands.options import OptionParser

# bash's own words; zsh reads them through bashcompinit
_SCRIPT = """\
_flexdpo() {{
    local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" words=""
    if [ "$COMP_CWORD" -eq 1 ]; then
        words="{commands}"
    else
        case "${{COMP_WORDS[1]}} $before" in
{values}
        esac
        if [ -z "$words" ] && [ "${{word#-}}" != "$word" ]; then
            case "${{COMP_WORDS[1]}}" in
{options}
            esac
        fi
    fi
    if [ -n "$words" ]; then
        COMPREPLY=($(compgen -W "$words" -- "$word"))
    else
        COMPREPLY=($(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _flexdpo flexdpo
"""


def parser() -> OptionParser:
    """The options: which shell."""
    options = OptionParser(
        prog="flexdpo completion",
        description="Print a completion script. bash: flexdpo completion bash > "
        "~/.local/share/bash-completion/completions/flexdpo. zsh: flexdpo completion zsh > ~/.flexdpo-completion, and "
        "'source ~/.flexdpo-completion' in ~/.zshrc.",
    )
    options.add_argument("shell", choices=("bash", "zsh"), help="Whose completion.")
    return options


def run(argv: list[str]) -> int:
    """Run ``flexdpo completion`` with the words after it."""
    found = parser().read(argv)
    values, options = [], []
    for command in COMMANDS:
        known: OptionParser = importlib.import_module(f"flexdpo.commands.{command}").parser()
        names = [name for action in known._actions for name in action.option_strings if "-" not in name[2:]]
        options.append(f'                {command}) words="{" ".join([*names, "--config", "--traceback"])}" ;;')
        for action in known._actions:
            choices = action.choices or (("true", "false") if action.const is True else ())
            if choices and action.option_strings:
                pattern = "|".join(f"'{command} {name}'" for name in action.option_strings)
                values.append(f'            {pattern}) words="{" ".join(map(str, choices))}" ;;')
    script = _SCRIPT.format(commands=" ".join(COMMANDS), values="\n".join(values), options="\n".join(options))
    print(("autoload -U +X bashcompinit && bashcompinit\n" if found.shell == "zsh" else "") + script, end="")
    return 0
