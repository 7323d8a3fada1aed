from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from layerskip_kernels import registry
from layerskip_kernels.decode import arguments
from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.cache import KVCache
from layerskip_kernels.decode.controls import Controls
from layerskip_kernels.decode.draft_head import (
    DRAFT_HEADS,
    HEAD_SCREENS,
    choose_draft_head,
    choose_head_screen,
    make_draft_head,
    make_head_screen,
)
from layerskip_kernels.decode.draft_layers import DRAFT_LAYERS, choose_draft_layers, make_draft_layers
from layerskip_kernels.decode.generate import STRATEGIES, Generation
from layerskip_kernels.decode.model import Model
from layerskip_kernels.decode.processors import Processing
from layerskip_kernels.decode.prompts import encode
from layerskip_kernels.decode.rejection import rejection_of
from layerskip_kernels.decode.result import GenerationResult, GenerationStats
from layerskip_kernels.decode.stop import StopStrings
from layerskip_kernels.decode.workspace import Workspace
from layerskip_kernels.messages import shown

log = logging.getLogger("layerskip_kernels")

CAPACITY_STEP = 256  # the cache grows in these steps


class SelfSpeculativeDecoder:
    """LayerSkip decoding of one model: its first `exit_layer` layers draft, the others verify (arXiv 2404.16710).

    Make one with `from_pretrained` or `from_model`. Calls from several threads are served one after the other.

    Attributes:
        config: `ModelConfig`; tokenizer: the checkpoint's, or None.
        exit_layer, num_speculations: what `generate` uses unless told otherwise.
        draft_layers, draft_head: "shared", "int8" or "int4": the layers and the head that draft.
        head_screen: "none" or "int8": the copy that is read in place of the LM head, without changing an answer.
        ops: the bound ops, with `ops.backends` saying which backend serves each.
    """

    def __init__(
        self,
        loaded,
        *,
        exit_layer,
        num_speculations,
        backend,
        max_batch_size,
        max_length,
        draft_layers,
        draft_head,
        head_screen,
    ):
        config, weights = loaded.config, loaded.weights
        registry.check_backend_name(backend)
        self.config, self.tokenizer = config, loaded.tokenizer
        device, dtype = weights.embedding.device, weights.embedding.dtype
        self.ops = registry.bind(device, dtype, backend, quantized=weights.quantized)
        self.exit_layer = arguments.exit_layer(exit_layer, config, config.exit_layer or max(1, config.num_layers // 4))
        recorded = config.num_speculations
        self.num_speculations = arguments.speculations(
            num_speculations, arguments.default_speculations(device) if recorded is None else recorded
        )
        self.draft_layers = choose_draft_layers(draft_layers, weights, self.ops, self.exit_layer)
        self.draft_head = choose_draft_head(draft_head, weights, self.ops, self.exit_layer)
        self.head_screen = choose_head_screen(head_screen, weights, self.ops)
        copied = (self.draft_head, self.head_screen) != ("shared", "none")
        head = loaded.head_to_copy() if copied else weights.lm_head
        screen = make_head_screen(self.head_screen, head)
        self.model = Model(
            config,
            weights,
            self.ops,
            screen,
            make_draft_head(self.draft_head, head, screen),
            make_draft_layers(self.draft_layers, weights, self.exit_layer),
        )
        self.max_batch_size = arguments.whole("max_batch_size", max_batch_size, 1)
        self.max_length = None if max_length is None else arguments.whole("max_length", max_length, 2)
        self._workspace: Workspace | None = None
        self._lock = threading.RLock()
        self._busy = False

    @classmethod
    def from_pretrained(
        cls,
        model: str = "demo",
        *,
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
        max_batch_size: int = 8,
        max_length: int | None = None,
        quantization: str | None = None,
        draft_layers: str = "auto",
        draft_head: str = "auto",
        head_screen: str = "auto",
    ) -> SelfSpeculativeDecoder:
        """Load a Hugging Face checkpoint, safetensors only.

        Args:
            model: a local folder, a hub id, or "demo": the small model that comes with the package.
            exit_layer: E, 1..L-1. None: the value recorded with the checkpoint, else L // 4.
            num_speculations: K, drafted tokens per round, 0 or more. None: the recorded value, else 3 on a
                CPU and 6 on a GPU.
            dtype: "float32", "float16", "bfloat16", or "auto" for the checkpoint's own.
            device: "cpu", "cuda", ..., or "auto" for a GPU when there is one.
            backend: "auto", "cuda", "triton", "cpu" or "reference"; an explicit choice raises when it can't run.
            max_batch_size: sequences decoded together; further prompts wait for a free cache slot.
            max_length: prompt plus new tokens of a sequence, at most. None: as many as each call asks for.
            quantization: "int8" or "int4" (8.25 and 4.25 bits per weight): linears are quantized while loading, the LM
                head to 8 bits either way. Norms, biases and the embedding table stay as they are. On the CPU only.
                None: as stored, where torchao's weight-only int8 and int4 stay what they are, too.
            draft_layers: the layers that draft. "shared": the model's own, whose hidden states verification goes on
                with; "int8", "int4": quantized copies of them, made while loading, or in a call with a later exit, of
                1/2 or 1/4 of the bytes of bfloat16 ones. Verification then runs all layers over the window, so what is
                said never changes. "auto": copies in 8 bits where they pay, on the CPU and for layers that no cache
                holds; else shared.
            draft_head: the LM head that drafts. "shared": the model's own; "int8", "int4": a quantized copy, made while
                loading, of 1/2 or 1/4 of the bytes of a bfloat16 one, whose best 16 tokens the model's own rates.
                Verification uses the model's own, so what is said never changes, only how much of a draft is accepted
                and what it takes. "auto": a copy where it pays, on the CPU and for a large vocabulary; else shared.
            head_screen: "int8": the LM head is read as a copy of 1/2 of its bytes, and itself only where its largest
                logit may be: no answer changes. Not with top-k, top-p, min-p or `output_logits`, where it is read as
                it is. "none": always as it is. "auto": the copy where it pays, as with drafts.

        Raises:
            ValueError, TypeError: unusable arguments or checkpoint, in one sentence.
            ConnectionError, PermissionError: the hub has no such model or can't be reached; the model is gated.
            BackendUnavailable: the chosen backend can't run here.
        """
        from layerskip_kernels.models.loading import load_checkpoint

        registry.check_backend_name(backend)
        arguments.one_of("draft_layers", draft_layers, DRAFT_LAYERS)
        arguments.one_of("draft_head", draft_head, DRAFT_HEADS)
        arguments.one_of("head_screen", head_screen, HEAD_SCREENS)
        return cls(
            load_checkpoint(model, dtype=dtype, device=arguments.device(device), quantization=quantization),
            exit_layer=exit_layer,
            num_speculations=num_speculations,
            backend=backend,
            max_batch_size=max_batch_size,
            max_length=max_length,
            draft_layers=draft_layers,
            draft_head=draft_head,
            head_screen=head_screen,
        )

    @classmethod
    def from_model(
        cls,
        hf_model: Any,
        *,
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        tokenizer: Any = None,
        backend: str = "auto",
        max_batch_size: int = 8,
        max_length: int | None = None,
        quantization: str | None = None,
        draft_layers: str = "auto",
        draft_head: str = "auto",
        head_screen: str = "auto",
    ) -> SelfSpeculativeDecoder:
        """Decode a live transformers model, sharing its weights; the model is not modified.

        With `quantization` linears and head are quantized copies. A model that torchao has quantized is shared as far
        as its layout goes. All copies are of the weights as they are now: after changing these make a new decoder.
        Arguments and errors as in `from_pretrained`; `tokenizer` makes strings usable as prompts.
        """
        from layerskip_kernels.models.loading import from_transformers

        arguments.one_of("draft_layers", draft_layers, DRAFT_LAYERS)
        arguments.one_of("draft_head", draft_head, DRAFT_HEADS)
        arguments.one_of("head_screen", head_screen, HEAD_SCREENS)
        loaded = from_transformers(hf_model, quantization)
        if tokenizer is not None:
            if not callable(tokenizer) or not callable(getattr(tokenizer, "decode", None)):
                raise TypeError(f"tokenizer={shown(tokenizer)}: expected a transformers tokenizer")
            loaded = replace(loaded, tokenizer=tokenizer)
        return cls(
            loaded,
            exit_layer=exit_layer,
            num_speculations=num_speculations,
            backend=backend,
            max_batch_size=max_batch_size,
            max_length=max_length,
            draft_layers=draft_layers,
            draft_head=draft_head,
            head_screen=head_screen,
        )

    def __repr__(self) -> str:
        weights, config = self.model.weights, self.config
        size = self.model.layer_bytes(0, config.num_layers) + weights.lm_head.nbytes
        if weights.lm_head is not weights.embedding:
            size += weights.embedding.nbytes
        layers = ""
        if self.draft_layers != "shared":
            copies = self.model.layer_bytes(0, self.exit_layer or 0, drafts=True)
            layers = f", draft_layers={self.draft_layers} of {copies / 2**20:.1f} MiB"
        drafts = "" if self.draft_head == "shared" else f" of {self.model.head_bytes(drafts=True) / 2**20:.1f} MiB"
        screen = (
            "" if self.head_screen == "none" else f", head_screen=int8 of {self.model.head_bytes() / 2**20:.1f} MiB"
        )
        return (
            f"{type(self).__name__}({config.model_type}, {config.num_layers} layers, "
            f"{str(self.dtype).removeprefix('torch.')}{' quantized' if weights.quantized else ''} on {self.device}, "
            f"weights {size / 2**20:.1f} MiB, exit_layer={self.exit_layer}, num_speculations={self.num_speculations}"
            f"{layers}, draft_head={self.draft_head}{drafts}{screen})"
        )

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]] | torch.Tensor,
        *,
        max_new_tokens: int = 256,
        generation_strategy: str = "self_speculative",
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        sample: bool = False,
        temperature: float = 0.6,
        top_k: int = 0,
        top_p: float = 0.9,
        min_p: float = 0.0,
        seed: int | Sequence[int] | None = None,
        repetition_penalty: float | None = None,
        min_new_tokens: int = 0,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        stop_strings: str | Sequence[str] | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        streamer: Any = None,
        deterministic_prefill: bool = False,
        output_logits: bool = False,
        verification: str = "coupled",
        rejection_method: str | None = None,
        draft_confidence: float | None = None,
        adaptive_speculations: bool = False,
        profile: bool = False,
    ) -> GenerationResult:
        """Continue each prompt. What comes out does not depend on the strategy's speculation, nor on the batch.

        Args:
            prompts: text, token ids, or several of either; a tensor [P] or [B, P] int64.
            max_new_tokens: per prompt, at least 1.
            generation_strategy: "self_speculative"; "autoregressive", the whole model token by token; "early_exit",
                the first `exit_layer` layers alone.
            exit_layer, num_speculations: override the decoder's own.
            sample: draw tokens instead of taking the most probable one. The noise is a function of seed, request and
                position, so speculation does not change the text either.
            temperature, top_k, top_p, min_p: of sampling; top_k=0, top_p=1 and min_p=0 are off.
            seed: an int gives prompt i the stream (seed, i), a list gives each prompt its own. None: a fresh one.
            repetition_penalty: above 1 makes tokens of prompt and text less likely; transformers' definition. None: the
                checkpoint's, else 1, which is off.
            min_new_tokens: no EOS before as many tokens.
            logits_processor: transformers' `LogitsProcessorList`, or functions (ids [1, length], scores [1, V]) ->
                scores. Called once for each emitted token, before temperature and filters, with ids of prompt and text
                so far; never for drafts. All prompts share them, so they should keep no state.
            stopping_criteria: `StoppingCriteriaList`, or functions (ids [1, length], None) -> bool; called after each
                emitted token.
            stop_strings: end a sequence with the token that completes one of them; needs a tokenizer.
            eos_token_id: token id or ids that end a sequence. None: the checkpoint's. Empty list: none.
            streamer: a transformers streamer, one prompt only: `put(ids)` with the prompt, then with what each round
                emits, then `end()`. If it has `put_draft(ids)`, that is called with each round's drafts first.
            deterministic_prefill: prompts of 32 tokens and more give the same bits for every thread count, too (slow).
            output_logits: keep the raw logits, before any processing, in `result.logits`.
            verification: of sampled drafts. "coupled": drafts share the model's noise, and are accepted where they are
                its own tokens. "rejection": speculative sampling as in the literature, to compare with; the same
                distribution, but the text depends on the exit layer and `num_speculations`, and logits processors,
                `min_new_tokens` and stopping criteria are not available.
            rejection_method: "standard" (the default; Leviathan et al., arXiv 2211.17192) or "block" (Sun et al., arXiv
                2403.10444), which accepts more.
            draft_confidence: of self-speculative decoding: a draft ends after a token whose exit gave no token this
                probability, in 0..1. None: it never does.
            adaptive_speculations: each sequence's K follows what was lately accepted of its drafts, `num_speculations`
                at most. Neither changes what is said; on a GPU both keep rounds from being graphs.
            profile: time the phases of the rounds, into `result.stats.phases`. On the CPU only.

        Returns:
            `GenerationResult`. Ctrl-C ends the call with what was generated so far.

        Raises:
            ValueError, TypeError: unusable argument, before any work starts. The decoder stays usable after any error.
        """
        arguments.whole("max_new_tokens", max_new_tokens, 1)
        ids = encode(prompts, self.tokenizer, self.config.vocab_size)
        arguments.check_streamer(streamer, len(ids))
        arguments.true_or_false("deterministic_prefill", deterministic_prefill)
        arguments.true_or_false("output_logits", output_logits)
        sampling = arguments.sampling(len(ids), sample, temperature, top_k, top_p, min_p, seed)
        requests = [Request(p, max_new_tokens, s) for p, s in zip(ids, sampling)]
        stop = StopStrings(stop_strings, self.tokenizer)
        eos_ids = arguments.eos_ids(eos_token_id, self.config)
        arguments.whole("min_new_tokens", min_new_tokens, 0)
        if repetition_penalty is None:
            repetition_penalty = self.config.repetition_penalty
        processing = Processing(
            logits_processor, stopping_criteria, repetition_penalty, min_new_tokens, eos_ids, output_logits
        )
        for request in requests:
            request.repetition_penalty = processing.repetition_penalty
        if processing.needed:
            for request in requests:
                its_own = processing.for_request(request, self.device)
                Controls([request], *its_own, stop=stop, eos_ids=eos_ids, device=self.device)
        if draft_confidence is not None:
            arguments.number("draft_confidence", draft_confidence, lambda p: 0 <= p <= 1, "in 0..1")
        arguments.true_or_false("adaptive_speculations", adaptive_speculations)
        arguments.true_or_false("profile", profile)
        if profile and self.device.type != "cpu":
            raise ValueError(f"profile=True: phases are timed on the CPU alone, this model is on {self.device}")
        rejection = rejection_of(
            verification, rejection_method, requests, sample, generation_strategy, processing.needed
        )
        stats = self.run(
            requests,
            generation_strategy=generation_strategy,
            exit_layer=exit_layer,
            num_speculations=num_speculations,
            eos_ids=eos_ids,
            stop=stop,
            streamer=streamer,
            deterministic_prefill=deterministic_prefill,
            output_logits=output_logits,
            rejection=rejection,
            draft_confidence=draft_confidence,
            adaptive_speculations=adaptive_speculations,
            profile=profile,
        )
        sequences = [r.tokens for r in requests]
        text = None
        if self.tokenizer is not None:
            text = [self.tokenizer.decode(tokens, skip_special_tokens=True) for tokens in sequences]
        reasons = [r.finish_reason for r in requests]
        logits = None
        if output_logits:
            # an interrupted request may have no token
            none = torch.empty(0, self.config.vocab_size, dtype=torch.float32, device=self.device)
            logits = [torch.cat([none, *r.logits]) for r in requests]
        return GenerationResult(sequences, text, reasons, stats, logits)

    def run(
        self,
        requests: list[Request],
        *,
        generation_strategy: str = "self_speculative",
        exit_layer: int | None = None,
        num_speculations: int | None = None,
        **options: Any,
    ) -> GenerationStats:
        """What `generate` and the integrations have in common: decode these requests, which receive the results."""
        if not isinstance(generation_strategy, str) or generation_strategy not in STRATEGIES:
            value = shown(generation_strategy)
            raise ValueError(f"generation_strategy={value}: choose {', '.join(STRATEGIES)}")
        exit_layer = arguments.exit_layer(exit_layer, self.config, self.exit_layer)
        if exit_layer is None and generation_strategy != "autoregressive":
            raise ValueError(f"generation_strategy={generation_strategy!r}: a model of 1 layer has no early exit")
        drafts = arguments.speculations(num_speculations, self.num_speculations)
        drafts = drafts if generation_strategy == "self_speculative" else 0
        with self._lock:
            if self._busy:
                raise RuntimeError(
                    "generate was called from its own streamer, processor or criterion; use a second decoder there"
                )
            self._busy = True
            try:
                generation = Generation(
                    self._reserve(requests, drafts),
                    requests,
                    strategy=generation_strategy,
                    exit_layer=exit_layer,
                    drafts=drafts,
                    **options,
                )
                generation.run()
            finally:
                self._busy = False
        return generation.stats

    def _reserve(self, requests: list[Request], drafts: int) -> Workspace:
        """A cache that holds these requests: each P + max_new_tokens, and two rounds' windows beyond."""
        for i, request in enumerate(requests):
            length = len(request.prompt) + request.max_new_tokens
            if self.max_length is not None and length > self.max_length:
                raise ValueError(
                    f"prompts[{i}]: {len(request.prompt)} tokens plus max_new_tokens={request.max_new_tokens} is "
                    f"{length}, the decoder was made for max_length={self.max_length}"
                )
        longest = max(len(r.prompt) + r.max_new_tokens for r in requests)
        if longest > self.config.max_position_embeddings:
            log.warning(
                "%d positions asked for, the model was made for %d: expect poor text",
                longest,
                self.config.max_position_embeddings,
            )
        capacity = longest + 2 * (drafts + 1)
        slots = min(self.max_batch_size, len(requests))
        have = self._workspace and self._workspace.cache
        if have is None or have.slots < slots or have.capacity < capacity:
            self._workspace = None  # free the old one first
            capacity = -(-capacity // CAPACITY_STEP) * CAPACITY_STEP
            if have is not None:
                both = max(slots, have.slots), max(capacity, have.capacity)
                # many short and few long sequences in turn must not add up to many long ones
                if both[0] * both[1] <= 2 * max(slots * capacity, have.slots * have.capacity):
                    slots, capacity = both
            have = None
            cache = KVCache(self.config, slots, capacity, self.dtype, self.device)
            self.model.rope.reserve(capacity)
            self._workspace = Workspace(self.model, cache)
        return self._workspace
