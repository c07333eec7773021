"""GPT-J: attention and MLP read the same normalised input and are added to the residual stream side by side."""

from rect_lightning.models.adapter import Adapter


class GPTJ(Adapter):
    """GPT-J 6B (Wang and Komatsuzaki 2021)."""

    model_types = ("gptj",)
    blocks_path = "transformer.h"
    projection_path = "mlp.fc_out"
    norm_path = "transformer.ln_f"
