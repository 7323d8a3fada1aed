"""LayerSkip self-speculative decoding (arXiv 2404.16710): exact, fused, on GPU and CPU.

>>> import layerskip_kernels as lk
>>> decoder = lk.SelfSpeculativeDecoder.from_pretrained("path/to/checkpoint", exit_layer=4, num_speculations=6)
>>> decoder.generate("def fibonacci(n):", max_new_tokens=64).text
"""

from importlib import import_module

__version__ = "0.1.0"

# Resolved on first use, so that `import layerskip_kernels` loads neither transformers nor the kernels.
_PUBLIC = {
    "SelfSpeculativeDecoder": "layerskip_kernels.decode.decoder",
    "GenerationResult": "layerskip_kernels.decode.result",
    "GenerationStats": "layerskip_kernels.decode.result",
    "generate": "layerskip_kernels.integrations.transformers_generate",
    "accelerate": "layerskip_kernels.integrations.transformers_accelerate",
    "register_attention": "layerskip_kernels.integrations.transformers_attention",
    "backends": "layerskip_kernels.registry",
    "use_backend": "layerskip_kernels.registry",
    "BackendUnavailable": "layerskip_kernels.registry",
    "ops": None,
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(
            f"module 'layerskip_kernels' has no attribute {name!r}; public names: {', '.join(_PUBLIC)}"
        )
    value = import_module("layerskip_kernels.ops") if name == "ops" else getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
