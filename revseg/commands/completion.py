"""`revseg completion`: a script by which a shell completes commands, flags and the values that are names.

The script is made from the settings of the commands; a shell that has read it asks nothing of Python.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

from tyro.conf import Positional

from revseg.commands import COMMANDS, named
from revseg.inference.settings import PREDICTING
from revseg.training.choices import registered_names
from revseg.training.settings import CHOICES

SHELLS = ("bash", "zsh")

BASH = """\
_revseg() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
  local command=${{COMP_WORDS[1]}} words=
  case $command in {groups}) command="$command ${{COMP_WORDS[2]}}" ;; esac
  case $before in
{values}
    *)
      case $command in
{flags}
        *) words="{commands}" ;;
      esac
      case $COMP_CWORD,${{COMP_WORDS[1]}} in
        1,*) words="{commands}" ;;
{second}
      esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$word"))
  if [ ${{#COMPREPLY[@]}} -eq 0 ]; then COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _revseg revseg
"""


@dataclass(frozen=True)
class CompletionSettings:
    """Print a script for the shell, as in: eval "$(revseg completion bash)"."""

    shell: Positional[str] = "bash"
    """bash or zsh."""

    def __post_init__(self) -> None:
        if self.shell not in SHELLS:
            raise ValueError(f"expected one of the shells {', '.join(SHELLS)}, got {self.shell}")


def completion(settings: CompletionSettings) -> None:
    """Prints the script.

    Args:
        settings: For which shell.
    """
    script = script_for({name: _flags(command.settings) for name, command in COMMANDS.items()})
    print("autoload -U +X bashcompinit && bashcompinit\n" * (settings.shell == "zsh") + script, end="")


def script_for(commands: dict[str, list[str]]) -> str:
    """The script for bash.

    Args:
        commands: The flags of each command, which is one word or two.
    """
    pairs = [name.split() for name in commands if " " in name]
    groups = list(dict.fromkeys(first for first, _ in pairs))
    names = {
        "model": registered_names("models", "MODELS"),
        "data": registered_names("data", "DATASETS"),
        "runtime": PREDICTING,
        **CHOICES,
    }
    return BASH.format(
        groups="|".join(groups),
        commands=_words(dict.fromkeys(name.split()[0] for name in commands)),
        values="\n".join(
            f'    --{name.replace("_", "-")}) words="{_words(values)}" ;;' for name, values in names.items()
        ),
        flags="\n".join(f'        "{name}") words="{_words(flags)}" ;;' for name, flags in commands.items()),
        second="\n".join(
            f'        2,{group}) words="{_words(second for first, second in pairs if first == group)}" ;;'
            for group in groups
        ),
    )


def _flags(settings: str) -> list[str]:
    found = fields(named(settings))
    return [f"--{field.name.replace('_', '-')}" for field in found if "Positional" not in str(field.type)]


def _words(words: Iterable[str]) -> str:
    return " ".join(words)
