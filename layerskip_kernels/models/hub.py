"""Where a checkpoint lies: the one that comes with the package, a local folder, or a download from the hub."""

from __future__ import annotations

from pathlib import Path

from layerskip_kernels.messages import shown

# safetensors, configuration and tokenizer; never pickles, code, or other frameworks' copies of the weights
_ALLOW = ["*.json", "model*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
_IGNORE = ["*/*"]

DEMO = "demo"  # the model that comes with the package; ./demo is a folder of that name


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """The folder of a checkpoint: "demo" is the package's own; the id of a model on the hub is downloaded first.

    Raises ValueError when it is neither a folder nor an id, ConnectionError when the hub cannot be reached or has no
    such model, PermissionError when the model is gated and access was not granted.
    """
    if not isinstance(path_or_id, (str, Path)):
        raise TypeError(f"model: expected a folder or the id of a model on the hub, got {type(path_or_id).__name__}")
    if not str(path_or_id):
        raise ValueError("model='': expected a folder or the id of a model on the hub")
    if path_or_id == DEMO:
        return Path(__file__).parent / DEMO
    path = Path(path_or_id).expanduser()
    try:
        if path.is_dir():
            return path
    except (OSError, ValueError) as error:  # too long a name, a null character
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"model={shown(str(path_or_id))}: no folder can have this name ({reason})") from error
    if path.suffix == ".gguf":
        raise ValueError(f"{path_or_id}: GGUF files are not supported, give a folder with safetensors weights")
    if path.exists():
        raise ValueError(f"{path_or_id} is a file, give the folder that holds config.json and the safetensors weights")
    return _download(str(path_or_id))


def _download(repo_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is neither an existing folder nor the id of a model on the hub") from error
    try:
        return Path(snapshot_download(repo_id, allow_patterns=_ALLOW, ignore_patterns=_IGNORE))
    except GatedRepoError as error:
        raise PermissionError(
            f"{repo_id} is gated on the hub: accept its licence at https://huggingface.co/{repo_id}, "
            "then log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ConnectionError(
            f"{repo_id!r} is neither an existing folder nor a model on the hub (if it is private: `hf auth login`)"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, ConnectionError) as error:
        reason = str(error).splitlines()[0]
        raise ConnectionError(
            f"{repo_id!r} is not an existing folder, and the hub could not be reached to look for it there: {reason}"
        ) from error
