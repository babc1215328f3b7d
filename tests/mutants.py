"""Breaks the package in one place after the other, and shows whether a test fails each time.

`mutants.toml` lists groups of mutants, each a text that stands once in a file of the package and
what replaces it, and what pytest is given to kill them. A mutant that no test can kill stands
under `explained`, with the reason. All happens in a copy of the repository, in which the loops are
compiled, so it takes a C++ compiler.

    python tests/mutants.py [PART OF A MUTANT AS IT IS PRINTED ...]

The exit status is 1 if a mutant survives without an explanation. Python 3.11 or later.
"""

import contextlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomllib
import torch._dynamo  # noqa: F401  # once for all forks
from tqdm import tqdm

ROOT = Path(__file__).parents[1]
COPIED = ("sync_splitbn", "tests", "pyproject.toml", "README.md", "LICENSE")
COMPILED = shutil.ignore_patterns("__pycache__", "*.so")
# A mutant that hangs is killed: the tests of any file end within a third of it.
SECONDS = 120
BUILD = "from setuptools import setup; setup()"
EXTENSION = Path("sync_splitbn/_kernels/_cpu.abi3.so")


@dataclass(frozen=True)
class Mutant:
    """One change of one file, the tests that must notice it, and why they cannot, if so."""

    path: Path
    old: str
    new: str
    tests: tuple[str, ...]
    reason: str | None = None

    def __str__(self) -> str:
        return f"{self.path}: {self.old!r} -> {self.new!r}"

    def applied(self, text: str) -> str:
        """Return the text with the change, or raise if it has no unique place or no syntax."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"old text must occur once, got {text.count(self.old)} times; "
                f"correct it in tests/mutants.toml: {self}"
            )
        changed = text.replace(self.old, self.new)
        if self.path.suffix == ".py":
            compile(changed, str(self.path), "exec")
        return changed


def main() -> int:
    parts = sys.argv[1:] or [""]
    mutants = [m for m in read() if any(part in str(m) for part in parts)]
    for mutant in mutants:
        mutant.applied((ROOT / mutant.path).read_text())
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for part in COPIED:
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, tree / part, ignore=COMPILED)
            else:
                shutil.copy(ROOT / part, tree / part)
        build(tree)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            if fails(tree, tests):
                raise RuntimeError(f"tests must pass without a mutant, got a failure: {tests}")
        survivors = []
        for mutant in tqdm(mutants, unit="mutant"):
            with broken(tree, mutant):
                if not fails(tree, mutant.tests):
                    survivors.append(mutant)
                    tqdm.write(f"survived: {mutant}")
    return report(len(mutants), survivors)


def read() -> list[Mutant]:
    """Return the mutants of the list, in its order."""
    mutants = []
    for group in tomllib.loads((ROOT / "tests/mutants.toml").read_text())["groups"]:
        path, tests = Path(group["file"]), tuple(group["tests"])
        for old, new, *reason in group["mutants"] + group.get("explained", []):
            mutants.append(Mutant(path, old, new, tests, *reason))
    return mutants


def build(tree: Path) -> None:
    """Compile the loops of a tree, or raise."""
    (tree / EXTENSION).unlink(missing_ok=True)
    command = [sys.executable, "-c", BUILD, "--quiet", "build_ext", "--inplace", "--force"]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if not (tree / EXTENSION).exists():
        raise RuntimeError(f"the loops must compile, got\n{done.stderr}")


def fails(tree: Path, tests: tuple[str, ...]) -> bool:
    """Return whether pytest fails, or does not end, with the package of a tree."""
    # A fork has torch loaded already: its import takes longer than most tests.
    process = multiprocessing.get_context("fork").Process(target=run_pytest, args=(tree, tests))
    process.start()
    process.join(SECONDS)
    # What hangs, and the ranks that it left.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode != 0


def run_pytest(tree: Path, tests: tuple[str, ...]) -> None:
    """Become a pytest that imports the package from a tree."""
    os.setsid()
    os.chdir(tree)
    silence = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(silence, stream)
    # No bytecode: mutants of the same length within a second would share it.
    sys.dont_write_bytecode = True
    os.environ.update(PYTHONPATH=str(tree), PYTHONDONTWRITEBYTECODE="1")
    sys.path[0] = str(tree)
    os._exit(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))


@contextlib.contextmanager
def broken(tree: Path, mutant: Mutant) -> Iterator[None]:
    """Apply a mutant to a tree, and take it back afterwards."""
    path, is_compiled = tree / mutant.path, mutant.path.suffix != ".py"
    text, extension = path.read_text(), (tree / EXTENSION).read_bytes()
    path.write_text(mutant.applied(text))
    try:
        if is_compiled:
            build(tree)
        yield
    finally:
        path.write_text(text)
        (tree / EXTENSION).write_bytes(extension)


def report(number: int, survivors: list[Mutant]) -> int:
    """Print the share that was killed and who survived; return the exit status."""
    killed = number - len(survivors)
    print(f"killed {killed} of {number} mutants ({killed / max(number, 1):.1%})")
    for mutant in survivors:
        print(f"survived: {mutant}\n    {mutant.reason or 'not explained'}")
    return int(any(mutant.reason is None for mutant in survivors))


if __name__ == "__main__":
    sys.exit(main())
