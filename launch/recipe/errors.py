"""The error that a recipe reports in one line, and optional packages that raise it."""

import importlib
from typing import Any


class RunError(RuntimeError):
    """Something that the user gave, or the state of the run, which the user can mend.

    `recipe.run` prints it as one line and ends the process with exit code 2. All other exceptions
    keep their traceback.

    Args:
        message: what must hold, what came, and what to do, in one line.
        is_of_one_rank: whether other ranks do not meet it, so that this one must report it.
    """

    def __init__(self, message: str, *, is_of_one_rank: bool = False) -> None:
        super().__init__(message)
        self.is_of_one_rank = is_of_one_rank


def require_timm(module: str, purpose: str) -> Any:
    """Import a module of timm, or say what to install.

    Args:
        module: full name, such as `timm.data`.
        purpose: what needs it, the subject of the message.
    """
    try:
        return importlib.import_module(module)
    # A torchvision that was built for another torch fails with a RuntimeError.
    except (ImportError, RuntimeError) as error:
        raise RunError(
            f"{purpose} must have timm, got {type(error).__name__}: {error}; "
            'run pip install -e ".[timm]", with the torchvision that belongs to this torch'
        ) from error
