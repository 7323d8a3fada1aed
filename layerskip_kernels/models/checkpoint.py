"""Reading the safetensors files of a checkpoint folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from layerskip_kernels import memory

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError naming the file when it holds no JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {type(value).__name__}")
    return value


class Checkpoint:
    """The tensors of a folder with ``model.safetensors``, or with shards and ``model.safetensors.index.json``.

    Opening reads only the headers. Tensors are views of memory-mapped files.

    Raises ValueError, naming the file, when the weights are missing, in another format, incomplete or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        self.file_of: dict[str, str] = {}
        if (folder / INDEX).is_file():
            self._read_index()
        elif (folder / SINGLE).is_file():
            self.file_of = dict.fromkeys(self._header(SINGLE).keys(), SINGLE)
        else:
            raise ValueError(_no_weights(folder))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for file in self._open.values():
            file.__exit__(*exc_info)

    def where(self, name: str) -> str:
        """The file that has the tensor, else the one that should list it; for messages."""
        return str(self.folder / self.file_of.get(name, INDEX if (self.folder / INDEX).is_file() else SINGLE))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor."""
        return {name: tuple(self._slice(name).get_shape()) for name in self.file_of}

    def metadata(self) -> dict[str, str]:
        """What the headers of all files say besides."""
        return {key: text for file in self._open.values() for key, text in (file.metadata() or {}).items()}

    def dtype(self, name: str) -> torch.dtype:
        """How the tensor is stored. Raises ValueError when that is not float32, float16 or bfloat16."""
        stored = self._slice(name).get_dtype()
        if stored not in _DTYPES:
            raise ValueError(
                f"{name} in {self.where(name)} is stored as {stored}, only F32, F16 and BF16 are supported"
            )
        return _DTYPES[stored]

    def tensor(self, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The tensor; on the CPU and in its stored dtype a view of the file, which stays mapped."""
        self.dtype(name)
        tensor = self.stored(name)
        if tensor.dtype == dtype:
            return tensor.to(device)
        return memory.empty(tensor.shape, dtype, device).copy_(tensor)

    def stored(self, name: str) -> Tensor:
        """As it is stored, a view of the file, of any dtype."""
        tensor = self._open[self.file_of[name]].get_tensor(name)
        # a file written without padding may start a tensor in the middle of an element
        return tensor if tensor.data_ptr() % tensor.element_size() == 0 else tensor.clone()

    def map_anew(self, name: str) -> None:
        """Maps the file of this tensor again, for tensors to come: so pages read so far go with the earlier ones."""
        self._open.pop(self.file_of[name]).__exit__(None, None, None)
        self._header(self.file_of[name])

    def _slice(self, name: str) -> Any:
        return self._open[self.file_of[name]].get_slice(name)

    def _read_index(self) -> None:
        path = self.folder / INDEX
        weight_map = read_json(path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{path} has no weight_map naming the file of each tensor")
        for file in sorted(set(map(str, weight_map.values()))):
            if Path(file).name != file:
                raise ValueError(f"{path} names the file {file!r}, which is not in its folder")
            if not (self.folder / file).is_file():
                raise ValueError(f"{path} names the file {file}, which is missing: the download is incomplete")
            self._header(file)
        keys = {file: set(opened.keys()) for file, opened in self._open.items()}
        for name, file in weight_map.items():
            if name not in keys[file]:
                raise ValueError(f"{self.folder / file} has no tensor {name}, which {INDEX} says it has")
        self.file_of = weight_map

    def _header(self, file: str) -> Any:
        from safetensors import SafetensorError, safe_open

        path = self.folder / file
        try:
            self._open[file] = safe_open(path, framework="pt").__enter__()
        except (SafetensorError, ValueError) as error:
            raise ValueError(
                f"{path} is damaged or not a safetensors file ({error}): download or save it again"
            ) from error
        return self._open[file]


def _no_weights(folder: Path) -> str:
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    for file in files:
        if file.endswith(".gguf"):
            return f"{folder / file}: GGUF files are not supported, the folder must hold {SINGLE}"
        if file.endswith((".bin", ".pt", ".pth", ".ckpt")):
            return (
                f"{folder} has its weights in {file}, only safetensors are loaded; convert them with "
                f"AutoModelForCausalLM.from_pretrained({str(folder)!r}, dtype='auto').save_pretrained(new_folder)"
            )
    return f"{folder} has neither {SINGLE} nor {INDEX}"
