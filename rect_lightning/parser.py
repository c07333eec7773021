"""The command line's parser: errors that are the reason, and nothing else."""

import difflib
import sys
import textwrap
from typing import NoReturn

from lightning.pytorch.cli import LightningArgumentParser

_TRIED = ("Does not validate against", "Subtypes:", "Errors:", "Given value", "Expected a <class 'NoneType'>")


class EditParser(LightningArgumentParser):
    """A parser whose errors do not begin with the usage of a hundred options."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Say what is wrong, and end the process with status 2."""
        told = f"error: {reason(message)}{self._meant(message)}"
        besides = f"{self.epilog}\n" if self.epilog and "subcommand" in message else ""
        sys.stderr.write(f"{told}\n{besides}See --help, or --print_config for every option and its value.\n")
        raise SystemExit(2) from ex

    def _meant(self, message: str) -> str:
        """What a misspelt option is likely to have been."""
        words = message.removeprefix("unrecognized arguments: ").split()
        if words == message.split():
            return ""
        near = difflib.get_close_matches(words[0].partition("=")[0], self._option_string_actions, n=1)
        return f"; did you mean {near[0]}?" if near else ""


def reason(message: str) -> str:
    """What jsonargparse says is wrong, without the types that it tried in vain."""
    kept: list[str] = []
    said: set[str] = set()  # under the same heading
    left_out: int | None = None  # the depth of a line that goes, with all that is deeper below it
    for line in message.splitlines():
        text = line.lstrip()
        depth = len(line) - len(text)
        if left_out is not None and depth > left_out:
            continue
        left_out = depth if text.startswith("- Not a valid subclass") else None
        if depth == 0:
            said.clear()
        if left_out is None and not text.removeprefix("- ").startswith(_TRIED) and line not in said:
            kept.append(line)
            said.add(line)
    return textwrap.dedent("\n".join(kept)).strip().removeprefix("- ") or message
