"""The exit layer and number of drafts that `layerskip tune` found: beside the checkpoint, else in the user's cache."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from layerskip_kernels.files import write_whole
from layerskip_kernels.models.checkpoint import read_json


def write_choice(folder: Path, choice: dict[str, Any]) -> Path:
    """Makes `choice` the `layerskip` entry of the folder's config.json, which it returns."""
    path = folder / "config.json"
    config = read_json(path)
    config["layerskip"] = choice
    write_whole(path, (json.dumps(config, indent=2) + "\n").encode())
    return path


def write_user_choice(folder: Path, choice: dict[str, Any]) -> Path:
    """Keeps `choice` for this checkpoint in the user's cache, where loading looks first; returns the file."""
    path = _user_file(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"checkpoint": str(folder.resolve()), "layerskip": choice}
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
    return path


def user_choice(folder: Path) -> dict[str, Any] | None:
    """What `write_user_choice` kept for this checkpoint, as long as its config.json is the same."""
    path = _user_file(folder)
    return read_json(path).get("layerskip") if os.path.isfile(path) else None  # False also where it may not be read


def _user_file(folder: Path) -> Path:
    # os.path: a user without a home folder has no cache, which is no error
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    identity = str(folder.resolve()).encode() + b"\0" + (folder / "config.json").read_bytes()
    return cache / "layerskip_kernels" / "tuned" / f"{hashlib.sha256(identity).hexdigest()[:32]}.json"
