"""`python -m fulltune` is the command `fulltune`."""

from __future__ import annotations

from fulltune.cli import main

if __name__ == "__main__":
    main()
