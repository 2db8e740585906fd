"""Fine-tune every weight of a language model on your own data.

The names below are found on first use, so that `import fulltune` and `fulltune --help` load
neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fulltune.config import load_config
    from fulltune.data.tasks import TASKS, TaskConfig
    from fulltune.errors import FulltuneError

__version__ = "0.1.0"

_MODULES = {
    "TASKS": "fulltune.data.tasks",
    "FulltuneError": "fulltune.errors",
    "TaskConfig": "fulltune.data.tasks",
    "load_config": "fulltune.config",
}

__all__ = ["TASKS", "FulltuneError", "TaskConfig", "__version__", "load_config"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'fulltune' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
