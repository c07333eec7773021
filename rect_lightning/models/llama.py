"""LLaMA, and the families that kept its module names: a gated MLP whose last matrix is ``down_proj``."""

from rect_lightning.models.adapter import Adapter


class Llama(Adapter):
    """LLaMA 1 to 3, SmolLM2, TinyLlama, Mistral, Qwen2, Qwen2.5, Qwen3 and Phi-3."""

    model_types = ("llama", "mistral", "qwen2", "qwen3", "phi3")
    blocks_path = "model.layers"
    projection_path = "mlp.down_proj"
    norm_path = "model.norm"
