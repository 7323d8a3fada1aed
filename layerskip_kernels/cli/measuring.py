"""What the commands that measure on a data set share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerskip_kernels.cli.errors import CliError


def load_prompts(options: dict[str, Any], tokenizer: Any = None) -> list[Any]:
    """The samples that `dataset_options` and --seed choose."""
    from layerskip_kernels.datasets import load_samples

    names = ("data_path", "n_shot", "template", "random_shuffle", "seed", "num_samples")
    return load_samples(options["dataset"], tokenizer=tokenizer, **{name: options[name] for name in names})


def check_dataset(name: str) -> None:
    """Before the model is loaded, which takes longer."""
    from layerskip_kernels.datasets import DATASETS

    if name not in DATASETS:
        raise CliError(f"dataset={name!r}: choose from {', '.join(DATASETS)}")


def token_arguments(decoder: Any, options: dict[str, Any], stop: Sequence[str] = ()) -> dict[str, Any]:
    """Arguments of `generate` from `token_options`; --stop_words replace the texts that end the data set's answers.

    A command without `penalty_option` decodes without a penalty, as its simulations do.
    """
    words = list(options["stop_words"]) or list(stop)
    ids = list(options["stop_token_ids"])
    return {
        "max_new_tokens": options["max_steps"],
        "sample": options["sample"],
        "temperature": options["temperature"],
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "repetition_penalty": options.get("repetition_penalty", 1.0),
        "seed": options["seed"],
        "stop_strings": words or None,
        "eos_token_id": sorted({*decoder.config.eos_token_ids, *ids}) if ids else None,
    }


def settings(options: dict[str, Any]) -> dict[str, Any]:
    """All options of a command, as JSON holds them."""
    return {name: _plain(value) for name, value in options.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float, str, dict)) else str(value)
