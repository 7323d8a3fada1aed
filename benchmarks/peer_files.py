"""The same weights in every peer's format, made once and kept."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import torch

from layerskip_kernels.models.checkpoint import read_json

EXPORT = Path(__file__).with_name("openvino_export.py")


class PeerFiles:
    """Files of one checkpoint below `cache`, in a folder that changes with the checkpoint's path, size and time.

    checkpoint: the Hugging Face folder in bfloat16, the checkpoint itself if it is stored so.
    """

    def __init__(self, checkpoint: Path, cache: Path, openvino_python: str = sys.executable):
        stats = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(checkpoint.glob("*.safetensors"))]
        key = hashlib.sha256(repr((str(checkpoint.resolve()), stats)).encode()).hexdigest()[:8]
        self.folder = cache / f"{checkpoint.name}-{key}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.openvino_python = openvino_python
        self.checkpoint = checkpoint if read_json(checkpoint / "config.json").get("dtype") == "bfloat16" else None
        self.checkpoint = self.checkpoint or self._made("bfloat16", lambda out: _to_bfloat16(checkpoint, out))

    def gguf(self, weights: str) -> Path:
        """BF16, or what llama.cpp's own quantizer makes of it: its default mix for "Q8_0" or "Q4_0"."""
        from gguf_file import write_gguf

        file = self._made("BF16.gguf", lambda out: write_gguf(self.checkpoint, out))
        return file if weights == "BF16" else self._made(f"{weights}.gguf", lambda out: _quantize(file, out, weights))

    def openvino(self, weights: str) -> Path:
        """optimum-intel's export; "int8" are its default weights of 8 bits, one asymmetric scale per row."""
        return self._made(f"openvino-{weights}", lambda out: self._export(out, weights))

    def _export(self, output: Path, weights: str) -> None:
        command = [self.openvino_python, str(EXPORT), str(self.checkpoint), str(output), weights]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip() or "no message").splitlines()[-1]
            raise RuntimeError(f"optimum-intel's export by {self.openvino_python} failed: {last}")

    def _made(self, name: str, make) -> Path:
        """The file or folder, made if it is not there; whole or not at all."""
        path, partial = self.folder / name, self.folder / f"partial-{name}"
        if not path.exists():
            if partial.is_dir():
                shutil.rmtree(partial)
            make(partial)
            partial.rename(path)
        return path


def _to_bfloat16(checkpoint: Path, output: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).save_pretrained(output)
    if (checkpoint / "tokenizer.json").is_file():
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(output)


def _quantize(source: Path, output: Path, weights: str) -> None:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{weights}")
    if llama_cpp.llama_model_quantize(str(source).encode(), str(output).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {weights}")
