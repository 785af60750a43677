"""bitsandbytes, where it is installed and works."""

from __future__ import annotations

import logging
from typing import Any

from loratune.errors import ConfigError, ModelError

INSTALL = "pip install 'loratune[quantized]'"


def import_bitsandbytes() -> Any:
    """The library, with its compiled part.

    Raises:
        ConfigError: if it is not installed.
        ModelError: if it has no compiled part for this machine.
    """
    # It tells of kernels that could be fetched from the hub; nothing here uses them.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
        from bitsandbytes.cextension import ErrorHandlerMockBNBNativeLibrary, lib
    except ImportError as error:
        cause = f"quantized models need bitsandbytes: {str(error).splitlines()[0]}"
        raise ConfigError(cause, where="model.quantize", fix=INSTALL) from error
    if isinstance(lib, ErrorHandlerMockBNBNativeLibrary):
        raise ModelError(
            f"bitsandbytes {bitsandbytes.__version__} has no compiled library for this machine",
            where="model.quantize",
            fix=f"install a version that has one: {INSTALL}",
        )
    return bitsandbytes
