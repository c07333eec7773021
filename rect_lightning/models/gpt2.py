"""GPT-2: the one family whose projections are ``Conv1D`` layers, with weights kept as ``[in, out]``."""

from rect_lightning.models.adapter import Adapter


class GPT2(Adapter):
    """GPT-2 in all sizes (Radford et al. 2019)."""

    model_types = ("gpt2",)
    blocks_path = "transformer.h"
    projection_path = "mlp.c_proj"
    norm_path = "transformer.ln_f"
