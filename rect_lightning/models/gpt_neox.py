"""GPT-NeoX."""

from rect_lightning.models.adapter import Adapter


class GPTNeoX(Adapter):
    """GPT-NeoX 20B and the Pythia suite (Black et al. 2022, Biderman et al. 2023)."""

    model_types = ("gpt_neox",)
    blocks_path = "gpt_neox.layers"
    projection_path = "mlp.dense_4h_to_h"
    norm_path = "gpt_neox.final_layer_norm"
