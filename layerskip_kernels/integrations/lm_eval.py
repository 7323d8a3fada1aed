"""EleutherAI's lm-evaluation-harness: the model `layerskip`.

lm_eval 0.4.13 looks models up among its own and those that were imported; packages have no way of announcing theirs.
With this module imported, `lm_eval.simple_evaluate(model="layerskip", ...)` works, and
`python -m layerskip_kernels.integrations.lm_eval` is the command `lm_eval` with `--model layerskip`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError
from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, has_bos_prefix, postprocess_generated_text
from tqdm import tqdm

from layerskip_kernels import SelfSpeculativeDecoder
from layerskip_kernels.decode import arguments
from layerskip_kernels.decode.generate import STRATEGIES
from layerskip_kernels.integrations.lm_eval_arguments import generate_arguments, prompts_together
from layerskip_kernels.integrations.lm_eval_tally import Tally
from layerskip_kernels.measure.environment import environment
from layerskip_kernels.measure.likelihood import Likelihood
from layerskip_kernels.messages import shown

log = logging.getLogger("layerskip_kernels")

BATCHES = 8  # decoded per call, so that slots are refilled as sequences end
SEED = 1234  # lm_eval's own


@register_model("layerskip")
class LayerSkipLM(TemplateLM):
    """A LayerSkip checkpoint under evaluation: text by `SelfSpeculativeDecoder`, log-likelihoods by its kernels.

    What it answers depends neither on exit layer, drafts nor batch size (`generation_strategy="early_exit"` excepted,
    which leaves the first `exit_layer` layers alone to generate and to rate).

    Args:
        pretrained: a local folder, a hub id, "demo", or a `SelfSpeculativeDecoder`, which the next ones leave alone.
        exit_layer, num_speculations, dtype, device, backend, quantization, draft_layers, draft_head, head_screen: as in
            `SelfSpeculativeDecoder.from_pretrained`.
        batch_size, max_batch_size: prompts decoded together; the second wins where both are given. "auto": 8.
        generation_strategy, verification, rejection_method, draft_confidence, adaptive_speculations: as in `generate`.
        max_length: tokens of a text, prompt included. None: as many as the model was made for.
        add_bos_token: whether to put the tokenizer's special tokens around a text. None: as it does itself.
        prefix_token_id: what comes before a text without context. None: the tokenizer's BOS, or else its EOS.
        enable_thinking: for the chat template.
        think_end_token: text that ends a model's thinking; the answer is what follows it.
        seed: of sampling; request i has the stream seed + i.
        trust_remote_code: the harness hands it on; nothing here runs code from a checkpoint.

    Raises:
        ValueError, TypeError and others of `from_pretrained`: unusable arguments or checkpoint, in one sentence.
    """

    max_gen_toks = 256  # where a task names no number

    def __init__(
        self,
        pretrained: str | SelfSpeculativeDecoder = "demo",
        *,
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        generation_strategy: str = "self_speculative",
        verification: str = "coupled",
        rejection_method: str | None = None,
        draft_confidence: float | None = None,
        adaptive_speculations: bool = False,
        dtype: str = "auto",
        device: str = "auto",
        backend: str = "auto",
        quantization: str | None = None,
        draft_layers: str = "auto",
        draft_head: str = "auto",
        head_screen: str = "auto",
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | None = None,
        seed: int = SEED,
        trust_remote_code: bool = False,
    ):
        super().__init__()
        arguments.one_of("generation_strategy", generation_strategy, STRATEGIES)
        arguments.whole("seed", seed, seed)
        decoder = pretrained
        if not isinstance(decoder, SelfSpeculativeDecoder):
            decoder = SelfSpeculativeDecoder.from_pretrained(
                pretrained,
                exit_layer=exit_layer,
                num_speculations=num_speculations,
                dtype=dtype,
                device=device,
                backend=backend,
                quantization=quantization,
                draft_layers=draft_layers,
                draft_head=draft_head,
                head_screen=head_screen,
                max_batch_size=prompts_together(batch_size, max_batch_size),
            )
        if decoder.tokenizer is None:
            raise ValueError(f"pretrained={shown(pretrained)}: has no tokenizer, so it cannot read a task")
        if generation_strategy == "early_exit" and decoder.exit_layer is None:
            raise ValueError("generation_strategy='early_exit': a model of 1 layer has no early exit")
        self.decoder, self.tokenizer = decoder, decoder.tokenizer
        self.max_length = decoder.max_length or decoder.config.max_position_embeddings
        if max_length is not None:
            self.max_length = arguments.whole("max_length", max_length, 2)
        self.add_bos_token, self._prefix_token_id = add_bos_token, prefix_token_id
        self.enable_thinking, self.think_end_token = enable_thinking, think_end_token
        self.seed = seed
        self._how = dict(
            generation_strategy=generation_strategy,
            verification=verification,
            rejection_method=rejection_method,
            draft_confidence=draft_confidence,
            adaptive_speculations=adaptive_speculations,
        )
        self._likelihood = Likelihood(decoder, decoder.exit_layer if generation_strategy == "early_exit" else None)
        self.tally = Tally(speculative=generation_strategy == "self_speculative")

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: dict | None = None) -> LayerSkipLM:
        return cls.create_from_arg_obj(utils.simple_parse_args_string(arg_string), additional_config)

    @classmethod
    def create_from_arg_obj(cls, arg_dict: dict, additional_config: dict | None = None) -> LayerSkipLM:
        """`--model_args`, and the harness's own options, of which `--device` is cuda:0 unless given."""
        given = {name: value for name, value in (additional_config or {}).items() if value is not None} | arg_dict
        if str(given.get("device", "")).startswith("cuda") and not torch.cuda.is_available():
            log.warning("device=%s: torch finds no CUDA device here, running on the CPU", given["device"])
            given["device"] = "cpu"
        return cls(**given)

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def batch_size(self) -> int:
        return self.decoder.max_batch_size

    @property
    def eot_token_id(self) -> int:
        if self.tokenizer.eos_token_id is not None:
            return self.tokenizer.eos_token_id
        if self.decoder.config.eos_token_ids:
            return self.decoder.config.eos_token_ids[0]
        raise ValueError("the tokenizer has no end token, give prefix_token_id")

    @property
    def prefix_token_id(self) -> int:
        if self._prefix_token_id is not None:
            return self._prefix_token_id
        return self.eot_token_id if self.tokenizer.bos_token_id is None else self.tokenizer.bos_token_id

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids. Special tokens as asked for, else by `add_bos_token`, but no second BOS where the text has one."""
        if add_special_tokens is None:
            written = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = False if written else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return self.tokenizer.encode(string, **options)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        options: dict[str, Any] = dict(
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        if self.enable_thinking is not None:
            options["enable_thinking"] = self.enable_thinking
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError as error:
            kept = [message for message in chat_history if message["role"] != "system"]
            if len(kept) == len(chat_history):
                raise ValueError(f"the chat template does not take these messages: {error}") from error
            log.warning("Failed to apply chat template. removing the system role in chat history.")
            return self.tokenizer.apply_chat_template(kept, **options)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts; what is longer than `max_length` in disjoint windows with all its context."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (string,) = request.args
            for window in utils.get_rolling_token_windows(
                self.tok_encode(string), self.prefix_token_id, max_seq_len=self.max_length, context_len=1
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)):
            totals[owner] += logprob
        for request, total in zip(requests, totals):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        # continuations of one context one after the other, the longest first
        order = sorted(range(len(requests)), key=lambda i: (-len(requests[i][1]), requests[i][1], -len(requests[i][2])))
        found: list[Any] = [None] * len(requests)
        for i in tqdm(order, desc="Running loglikelihood requests", disable=disable_tqdm):
            texts, context, continuation = requests[i]
            context = self._room_for(context, continuation)
            started = time.perf_counter()
            found[i] = self._likelihood(context, continuation)
            self.tally.count_scored(len(continuation), time.perf_counter() - started)
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, found[i])
        return found

    def _room_for(self, context: list[int], continuation: list[int]) -> list[int]:
        """The context, without its beginning where text and continuation are longer than the model takes."""
        if len(continuation) > self.max_length:
            raise ValueError(f"a continuation of {len(continuation)} tokens: the model takes {self.max_length}")
        total = len(context) + len(continuation)
        if total > self.max_length + 1:
            log.warning(
                "Combined length of context (%d) and continuation (%d) exceeds model's maximum length (%d). "
                "Truncating %d tokens from the left.",
                len(context),
                len(continuation),
                self.max_length,
                total - self.max_length - 1,
            )
        return context[-(self.max_length + 1 - len(continuation)) :]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        prompts = []
        for number, request in enumerate(requests):
            context, how = request.args
            prompts.append((self.tok_encode(context), how, number, context))
        ordered = Collator(
            prompts, sort_fn=lambda p: (-len(p[0]), p[0]), group_fn=lambda p: p[1], group_by="gen_kwargs"
        )
        bar = tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm)
        answers = []
        with bar:
            for chunk in ordered.get_batched(n=BATCHES * self.batch_size if self.batch_size > 1 else 1):
                answers += self._answers(chunk)
                bar.update(len(chunk))
        return ordered.get_original(answers)

    def _answers(self, chunk: Sequence[tuple[list[int], dict, int, str]]) -> list[str]:
        """Of prompts that are to be continued in the same way."""
        ids, (how, *_), numbers, contexts = zip(*chunk)
        options, until = generate_arguments(how, self.max_gen_toks, self.seed)
        room = self.max_length - options["max_new_tokens"]
        if room < 1:
            raise ValueError(
                f"max_gen_toks={options['max_new_tokens']}: the model takes {self.max_length} tokens, prompt included, "
                f"choose 1..{self.max_length - 1}"
            )
        for prompt in ids:
            if len(prompt) > room:
                log.warning(
                    "Left truncation applied. Original sequence length was %d, truncating to last %d tokens. "
                    "Some content will be lost.",
                    len(prompt),
                    room,
                )
        seed = options.pop("seed")
        result = self.decoder.generate(
            [prompt[-room:] or [self.prefix_token_id] for prompt in ids],
            stop_strings=until or None,
            seed=[seed + number for number in numbers],
            # besides the model's own, as the harness has the tokenizer's among its stop strings
            eos_token_id=sorted({*self.decoder.config.eos_token_ids, self.eot_token_id}),
            **options,
            **self._how,
        )
        self.tally.count_generated(len(ids), result.stats)
        texts = [postprocess_generated_text(text, until, self.think_end_token) for text in result.text]
        for context, text, reason in zip(contexts, texts, result.finish_reasons):
            if reason != "interrupted":
                self.cache_hook.add_partial("generate_until", (context, how), text)
        if result.interrupted:
            raise KeyboardInterrupt
        return texts

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes into `config` of its results: how the model ran, and what that took so far."""
        ran = environment(self.decoder)
        how = {"max_length": self.max_length, "seed": self.seed, **self._how}
        return {"layerskip": {**ran["decoder"], **how, "machine": ran["machine"], **self.tally.report()}}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
