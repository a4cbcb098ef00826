"""Learned multi-view image codec: cameras encode alone, the receiver decodes any number of views together.

    import mvcodec

    data = mvcodec.encode("C1/00000000.png", quality=60)        # one camera, no other view is ever seen
    views = mvcodec.decode_set([data, *others])                 # any number of cameras, any order
    views[0].pixels, views[0].header.camera_id

Nothing heavy is imported before it is used: `import mvcodec` and `mvcodec.info` need no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mvcodec import errors as errors
    from mvcodec import frames as frames
    from mvcodec import images as images
    from mvcodec import runtime as runtime
    from mvcodec.api import decode as decode
    from mvcodec.api import decode_set as decode_set
    from mvcodec.api import encode as encode
    from mvcodec.api import load_model as load_model
    from mvcodec.container import describe as info
    from mvcodec.errors import MvcodecError as MvcodecError

_HOMES = {
    "encode": "mvcodec.api",
    "decode": "mvcodec.api",
    "decode_set": "mvcodec.api",
    "load_model": "mvcodec.api",
    "info": "mvcodec.container:describe",
    "MvcodecError": "mvcodec.errors",
}
_MODULES = ("errors", "frames", "images", "runtime")
__version__ = "0.1.0"
__all__ = ["MvcodecError", "decode", "decode_set", "encode", "info", "load_model"]


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for (PEP 562)."""
    from importlib import import_module

    if name in _MODULES:
        return import_module(f"mvcodec.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'mvcodec' has no attribute {name!r}")
    module, _, attribute = _HOMES[name].partition(":")
    return getattr(import_module(module), attribute or name)


def __dir__() -> list[str]:
    return sorted((*__all__, *_MODULES))
