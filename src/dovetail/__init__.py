"""The names that `import dovetail` offers, each of which loads what it needs on first use.

So `import dovetail` does not load torch. The package is the DeepSeek-V3 system: its model, training, inference, and the
planning of the hardware for them.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "LLM": "dovetail.engine.llm",
    "ModelSpec": "dovetail.spec.model",
    "Tokenizer": "dovetail.text.tokenizer",
    "Transformer": "dovetail.model.transformer",
    "load_model": "dovetail.catalog.presets",
}

__all__ = ["LLM", "ModelSpec", "Tokenizer", "Transformer", "__version__", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'dovetail' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
