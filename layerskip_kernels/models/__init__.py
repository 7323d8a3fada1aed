"""Hugging Face checkpoints and live transformers models, as the weights and configuration of a decoder."""

from layerskip_kernels.models.config import ModelConfig
from layerskip_kernels.models.loading import LoadedModel, from_transformers, load_checkpoint
from layerskip_kernels.models.rope import Rope, RopeConfig
from layerskip_kernels.models.weights import ModelWeights

__all__ = ["LoadedModel", "ModelConfig", "ModelWeights", "Rope", "RopeConfig", "from_transformers", "load_checkpoint"]
