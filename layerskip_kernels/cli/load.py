"""The decoder that the options of a command describe."""

from __future__ import annotations

import inspect
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from layerskip_kernels.cli.errors import CliError, one_sentence


def load_decoder(ctx: click.Context, options: dict[str, Any]) -> Any:
    """A `SelfSpeculativeDecoder` with a tokenizer, from `model_options`, and the exit layer and K if among them."""
    with one_sentence(), Console(stderr=True).status(f"Loading {options['model']}"):
        import torch

        from layerskip_kernels import SelfSpeculativeDecoder

        if options["device"].startswith("cuda") and not torch.cuda.is_available():
            raise CliError(f"--device {options['device']}: torch finds no CUDA device here, choose cpu")
        loader = SelfSpeculativeDecoder.from_pretrained
        arguments = _decoder_arguments(ctx, options, list(inspect.signature(loader).parameters)[1:])
        decoder = loader(options["model"], **arguments)
    if decoder.tokenizer is None:
        raise CliError(f"{options['model']} has no tokenizer, so it cannot read a prompt")
    return decoder


def _decoder_arguments(ctx: click.Context, options: dict[str, Any], known: list[str]) -> dict[str, Any]:
    """The options that are arguments of the decoder, with those of --model_args, which are checked against `known`."""
    more = options["model_args"] or {}
    for name in more:
        if name not in known:
            raise CliError(f"--model_args {name}: choose from {', '.join(known)}")
        if name in options and ctx.get_parameter_source(name) != ParameterSource.DEFAULT:
            raise CliError(f"--model_args {name} and --{name} are both given, leave one out")
    arguments = {**{name: options[name] for name in known if name in options}, **more}
    for name in ("exit_layer", "num_speculations"):
        if arguments.get(name) == -1:
            arguments[name] = None
    return arguments
