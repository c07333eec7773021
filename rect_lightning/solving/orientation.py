"""Which layers keep their weight the other way round."""

from __future__ import annotations

import sys

from torch import nn


def keeps_in_out(module: nn.Module) -> bool:
    """Whether a layer keeps its weight as ``[in, out]``: GPT-2's ``Conv1D`` does, ``Linear`` keeps ``[out, in]``.

    The type of the layer decides, never the shape, which says nothing when it is square.
    """
    library = sys.modules.get("transformers.pytorch_utils")  # whoever has a Conv1D has imported it
    return library is not None and isinstance(module, library.Conv1D)
