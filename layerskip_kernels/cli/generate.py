"""`layerskip generate`: answers to prompts from options, files, or typed at the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource
from rich.console import Console

from layerskip_kernels.cli.compare import compare
from layerskip_kernels.cli.errors import INTERRUPTED, CliError, one_sentence
from layerskip_kernels.cli.load import load_decoder
from layerskip_kernels.cli.options import (
    DEMO,
    MetaCommand,
    TrueFalse,
    draft_options,
    generation_options,
    model_options,
    penalty_option,
)
from layerskip_kernels.cli.prompts import given_prompts, typed_prompts
from layerskip_kernels.cli.report import Record, print_phases, print_stats
from layerskip_kernels.cli.screen import Screen, visible
from layerskip_kernels.cli.streamers import SpeculativeStreamer, TextStreamer

STREAMERS = ("standard", "speculative", "none")


@click.command(cls=MetaCommand)
@model_options
@click.option("--prompt", multiple=True, help="A prompt; repeat it for more.")
@click.option(
    "--prompt_file", multiple=True, help='A text file is one prompt; each line {"prompt": ...} of a .jsonl file is one.'
)
@click.option("--chat", is_flag=True, help="Apply the tokenizer's chat template; typed prompts keep the conversation.")
@generation_options
@penalty_option
@draft_options
@click.option(
    "--streamer", type=click.Choice(STREAMERS), default="standard", help="speculative: show drafts, then correct them."
)
@click.option(
    "--compare",
    type=TrueFalse(),
    is_flag=False,
    flag_value="True",
    default=None,
    help="Decode again, autoregressively and self-speculatively in turns, and print the speed-up."
    "  [default: for the demo model]",
)
@click.option("--profile", is_flag=True, help="Print what the rounds spent where. On the CPU only.")
@click.option("--output_dir", type=click.Path(file_okay=False, path_type=Path), help="Also write the answers there.")
@click.pass_context
def generate(ctx: click.Context, **options: Any) -> None:
    """Continue prompts with a LayerSkip checkpoint.

    Without --prompt and --prompt_file the prompt is what standard input holds, or what is typed at the terminal.
    """
    sys.stdout.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it cannot
    prompts = given_prompts(options["prompt"], options["prompt_file"])
    if options["compare"] is None:
        options["compare"] = options["model"] == DEMO
    with one_sentence():
        record = Record(options["output_dir"], _settings(options)) if options["output_dir"] else None
    _notes(ctx, prompts, options)
    run = Run(_load(ctx, options), options, record)
    if prompts is not None:
        interrupted = run.answer_all(prompts) if len(prompts) > 1 else run.answer(prompts[0])
        if options["compare"] and not interrupted:
            same = options["verification"] == "coupled"
            interrupted = compare(lambda strategy: run.generate(prompts, None, strategy), same_tokens=same)
    else:
        interrupted = False  # of typed prompts Ctrl-C stops one answer, and the command only where a prompt is typed
        for prompt in typed_prompts():
            run.answer_typed(prompt)
    if interrupted:
        ctx.exit(INTERRUPTED)


@dataclass
class Run:
    """A decoder and how to ask it."""

    decoder: Any
    options: dict[str, Any]
    record: Record | None
    conversation: list[dict[str, str]] = field(default_factory=list)

    def answer(self, prompt: str) -> bool:
        """Prints the answer to one prompt while it is generated; True when Ctrl-C stopped it."""
        streamer = self._streamer()
        try:
            result = self.generate([prompt], streamer)
        finally:
            if streamer:
                streamer.end()
        if streamer is None:
            self._write(result.text[0] + "\n")
        if self.options["chat"]:
            self.conversation += [_message("user", prompt), _message("assistant", result.text[0])]
        return self._finish([prompt], result)

    def answer_typed(self, prompt: str) -> None:
        """As `answer`, but an error leaves the terminal session open."""
        try:
            self.answer(prompt)
        except CliError as error:
            error.show()

    def answer_all(self, prompts: list[str]) -> bool:
        """Prints each prompt with its answer under it; True when Ctrl-C stopped them."""
        result = self.generate(prompts, None)
        for number, (prompt, text) in enumerate(zip(prompts, result.text, strict=True), 1):
            click.secho(f"[{number}/{len(prompts)}] ", bold=True, nl=False)
            self._write(f"{prompt}\n{text}\n\n")
        return self._finish(prompts, result)

    def generate(self, prompts: list[str], streamer: TextStreamer | None, strategy: str | None = None) -> Any:
        options = self.options
        verification = {name: options[name] for name in ("verification", "rejection_method")}
        with one_sentence():
            return self.decoder.generate(
                [self._chat_ids(prompt) for prompt in prompts] if options["chat"] else prompts,
                max_new_tokens=options["max_steps"],
                generation_strategy=strategy or options["generation_strategy"],
                sample=options["sample"],
                temperature=options["temperature"],
                top_k=options["top_k"],
                top_p=options["top_p"],
                repetition_penalty=options["repetition_penalty"],
                seed=options["seed"],
                stop_strings=list(options["stop_words"]) or None,
                eos_token_id=self._eos_ids(),
                streamer=streamer,
                draft_confidence=options["draft_confidence"],
                adaptive_speculations=options["adaptive_speculations"],
                profile=options["profile"] and strategy is None,
                **({} if strategy == "autoregressive" else verification),
            )

    def _finish(self, prompts: list[str], result: Any) -> bool:
        print_stats(self.decoder, self.options["generation_strategy"], result.stats)
        if result.stats.phases:
            print_phases(result.stats)
        if self.record:
            with one_sentence():
                self.record.add(prompts, result)
            click.echo(f"written: {self.record.path}", err=True)
        return result.interrupted

    def _chat_ids(self, prompt: str) -> list[int]:
        messages = [*self.conversation, _message("user", prompt)]
        tokenizer = self.decoder.tokenizer
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def _eos_ids(self) -> list[int] | None:
        """None: the model's own alone. A chat also ends at the tokenizer's, which templates use to end a turn."""
        extra = list(self.options["stop_token_ids"])
        if self.options["chat"] and self.decoder.tokenizer.eos_token_id is not None:
            extra.append(self.decoder.tokenizer.eos_token_id)
        return sorted({*self.decoder.config.eos_token_ids, *extra}) if extra else None

    def _streamer(self) -> TextStreamer | None:
        name, console = self.options["streamer"], Console(highlight=False)
        if name == "none":
            return None
        if name == "speculative" and sys.stdout.isatty() and not (console.is_dumb_terminal or console.legacy_windows):
            return SpeculativeStreamer(self.decoder.tokenizer, Screen(console))
        return TextStreamer(self.decoder.tokenizer, self._write)

    @staticmethod
    def _write(text: str) -> None:
        sys.stdout.write(visible(text) if sys.stdout.isatty() else text)
        sys.stdout.flush()


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _settings(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in ("prompt", "prompt_file", "output_dir")}


def _notes(ctx: click.Context, prompts: list[str] | None, options: dict[str, Any]) -> None:
    if options["generation_strategy"] == "autoregressive" and options["exit_layer"] != -1:
        click.echo(
            "note: autoregressive runs the whole model and ignores --exit_layer; "
            "to leave at that layer, as Meta's scripts do, use --generation_strategy early_exit",
            err=True,
        )
    streams = options["streamer"] != "none" and ctx.get_parameter_source("streamer") != ParameterSource.DEFAULT
    if streams and prompts is not None and len(prompts) > 1:
        click.echo("note: several prompts are decoded together and not streamed", err=True)


def _load(ctx: click.Context, options: dict[str, Any]) -> Any:
    decoder = load_decoder(ctx, options)
    if options["chat"] and not decoder.tokenizer.chat_template:
        raise CliError(f"the tokenizer of {options['model']} has no chat template, leave --chat out")
    return decoder
