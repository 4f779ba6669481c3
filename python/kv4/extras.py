"""What parts of kv4 need beyond numpy, and how to install it: the extras of the package."""

from __future__ import annotations

from importlib import import_module

from kv4.messages import mismatch


def require(part: str, extra: str, *modules: str) -> None:
    """Imports `modules`, which `part` needs. Raises ImportError naming the extra to install if one is missing."""
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as missing:
            if (missing.name or "").partition(".")[0] != name:
                raise  # installed, but one of its own dependencies is missing
            wanted = f"{' and '.join(modules)}, which pip install 'kv4[{extra}]' brings"
            raise ImportError(mismatch(part, wanted, f"no module {name}"), name=name) from None
