"""What parts of kv4 need beyond numpy, and how to install it: the extras of the package."""

from __future__ import annotations

from importlib import import_module

from kv4.messages import mismatch


def require(part: str, extra: str, *modules: str) -> None:
    """Loads `modules`, which `part` stands on. ImportError naming the extra that brings them where one is missing."""
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as missing:
            if (missing.name or "").partition(".")[0] != name:
                raise  # it is there, and something that it needs is not
            wanted = f"{' and '.join(modules)}, which pip install 'kv4[{extra}]' brings"
            raise ImportError(mismatch(part, wanted, f"no module {name}"), name=name) from None
