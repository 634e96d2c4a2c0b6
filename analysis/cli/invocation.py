"""How a command was called, for the records that it writes."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path


def command_line() -> str:
    """The program's name without its folder, and its arguments, quoted for a shell."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
