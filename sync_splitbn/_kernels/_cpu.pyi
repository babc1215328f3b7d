# The compiled loops; cpu.py says what each is given, and cpp/module.cpp checks it.

from typing import Any

def __getattr__(name: str) -> Any: ...
