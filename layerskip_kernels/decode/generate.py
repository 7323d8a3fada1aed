from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from layerskip_kernels.decode.adaptation import Adaptation
from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.buffers import Results, Round
from layerskip_kernels.decode.controls import Controls
from layerskip_kernels.decode.prefill import prefill, sampling_for
from layerskip_kernels.decode.profile import ProfiledModel
from layerskip_kernels.decode.rejection import Rejection
from layerskip_kernels.decode.result import GenerationStats
from layerskip_kernels.decode.round import plain_round, self_speculative_round
from layerskip_kernels.decode.workspace import Workspace
from layerskip_kernels.ops import Sampling

STRATEGIES = ("self_speculative", "autoregressive", "early_exit")


class Generation:
    """One call of `generate`: more requests than cache slots if need be, each slot refilled as its sequence ends."""

    def __init__(
        self,
        workspace: Workspace,
        requests: list[Request],
        *,
        strategy: str,
        exit_layer: int | None,
        drafts: int,
        eos_ids: tuple[int, ...],
        stop: Callable[[Request, int], int | None],
        streamer: Any,
        deterministic_prefill: bool,
        output_logits: bool,
        rejection: Rejection | None = None,
        draft_confidence: float | None = None,
        adaptive_speculations: bool = False,
        profile: bool = False,
    ):
        self.model, self.cache, self.batch = workspace.model, workspace.cache, workspace.batch
        self.requests = requests
        self.speculative = strategy == "self_speculative"
        self.exit_layer, self.drafts = exit_layer, drafts if self.speculative else 0
        self.last_layer = exit_layer if strategy == "early_exit" else self.model.config.num_layers
        if self.speculative:
            self.model.prepare_drafts(exit_layer)
        self.eos_ids, self.stop, self.streamer = workspace.eos_ids(eos_ids), stop, streamer
        self.eos = frozenset(eos_ids)
        self.shows_drafts = hasattr(streamer, "put_draft")
        self.deterministic_prefill = deterministic_prefill
        self.stats = GenerationStats(drafted_at=[0] * self.drafts, accepted_at=[0] * self.drafts)
        self.free_slots = list(reversed(range(min(self.cache.slots, len(requests)))))
        self.batch.requests.clear()  # of a call that failed
        sampled = requests[0].sampling is not None
        self.output_logits = output_logits
        self.controlled = requests[0].controls is not None
        self.rejection = rejection
        self.first_logits = output_logits or (self.controlled and requests[0].controls.needs_logits)
        self.needs_logits = self.first_logits or rejection is not None
        penalized = any(request.repetition_penalty != 1 for request in requests)
        self.buffers, self.graphs = workspace.rounds(
            self.drafts, sampled=sampled, penalized=penalized, logits=self.needs_logits
        )
        self.adaptation = None
        if self.drafts and (draft_confidence is not None or adaptive_speculations):
            cost = self.model.draft_share(exit_layer)
            self.adaptation = Adaptation(draft_confidence, adaptive_speculations, cost, self.drafts)
        if self.controlled or self.shows_drafts or self.adaptation:  # the host looks into the round
            self.graphs = None
        self.round_model = self.model
        if profile:
            self.stats.phases = {}
            self.round_model = ProfiledModel(self.model, exit_layer if self.speculative else None, self.stats.phases)
        self.lag = self.graphs.device.LAG if self.graphs else 0

    @torch.inference_mode()
    def run(self) -> None:
        """Until every request has a finish reason; after Ctrl-C the open ones have "interrupted"."""
        waiting = deque(self.requests)
        try:
            while waiting or len(self.batch):
                while waiting and self.free_slots:
                    together = len(waiting[0].controls.requests) if self.controlled else 1
                    self._start([waiting.popleft() for _ in range(together)])
                self._decode()
        except KeyboardInterrupt:
            for request in self.requests:
                request.finish_reason = request.finish_reason or "interrupted"
            if self.streamer is not None:
                self.streamer.end()

    def _start(self, requests: list[Request]) -> None:
        """Prefill these requests and emit their first tokens; the controls of one are those of all."""
        started = time.perf_counter()
        tokens, logprobs, logits = zip(*(self._prefill(request) for request in requests))
        if self.controlled:
            rows = [sampling_for(request, self.model.device) for request in requests]
            sampling = rows[0] and Sampling(*(torch.cat(fields) for fields in zip(*rows)))
            tokens = requests[0].controls.first(
                list(tokens), torch.cat(logits) if self.first_logits else None, sampling
            )
        self.stats.prefill_seconds += time.perf_counter() - started
        self.stats.tokens += len(requests)
        for request, token, logprob, row in zip(requests, tokens, logprobs, logits):
            self._emit(request, [token], [logprob], row)
            if request.finish_reason:
                self._release(request)
            else:
                self.batch.add(request)

    def _prefill(self, request: Request) -> tuple[int, float, torch.Tensor | None]:
        request.slot = self.free_slots.pop()
        if self.streamer is not None:
            self.streamer.put(torch.tensor(request.prompt))
        logits = None
        if self.first_logits:
            logits = torch.empty(1, self.model.config.vocab_size, dtype=torch.float32, device=self.model.device)
        token, logprob = prefill(self.model, self.cache, request, self.last_layer, self.deterministic_prefill, logits)
        return token, logprob, logits

    def _release(self, request: Request) -> None:
        if request.keep_kv:
            request.kv = self.cache.read(request.slot, len(request.prompt) + len(request.tokens) - 1)
        self.free_slots.append(request.slot)

    def _decode(self) -> None:
        """Rounds of the running sequences until one of them ends. On a GPU the next one starts before one is read."""
        launched: deque[tuple[Round, Callable[[], torch.Tensor]]] = deque()
        ended = not len(self.batch)
        while launched or not ended:
            started = time.perf_counter()
            if not ended:
                launched.append(self._launch())
            if ended or len(launched) > self.lag:
                ended = self._collect(*launched.popleft()) or ended
            self.stats.round_seconds.append(time.perf_counter() - started)
        for request in self.batch.drop_finished():
            self._release(request)

    def _launch(self) -> tuple[Round, Callable[[], torch.Tensor]]:
        """Start a round; returns it with what waits for its results."""
        drafts = self.drafts
        if not self.graphs:  # whose rounds are all of one width
            drafts = min(drafts, max(r.max_new_tokens - len(r.tokens) for r in self.batch.requests) - 1)
            if self.adaptation:
                drafts = min(drafts, self.adaptation.plan(self.batch.requests))
        r = self.buffers.round(drafts)
        if not self.graphs:
            r = self._run_round(r)
            return r, lambda: r.results.memory
        kind = self.speculative, self.exit_layer, self.last_layer, self.eos_ids.data_ptr(), len(self.batch)
        self.graphs.run(kind, lambda: self._run_round(r))
        return r, self.graphs.device.fetch(r.results.memory)

    def _run_round(self, r: Round) -> Round:
        control = self._control if self.controlled else None
        if self.speculative:
            hooks = self._show_draft if self.shows_drafts else None, control, self.rejection, self.adaptation
            return self_speculative_round(self.round_model, self.cache, r, self.exit_layer, self.eos_ids, *hooks)
        plain_round(self.round_model, self.cache, r, self.last_layer, self.eos_ids, control)
        return r

    def _collect(self, r: Round, wait: Callable[[], torch.Tensor]) -> bool:
        """Hand a round's tokens to their requests; True when one of them ended."""
        _, *results = Results.of(wait(), len(r.pending), r.window)
        rows = zip(*(tensor.tolist() for tensor in results))
        for row, (request, (tokens, logprobs, num_draft, num_emitted, num_accepted)) in enumerate(
            zip(self.batch.requests, rows)
        ):
            if request.finish_reason:  # in the round before, when this one was on its way
                continue
            self.stats.count_round(num_draft, num_emitted, num_accepted)
            if self.adaptation:
                self.adaptation.observe(request, num_draft, num_accepted)
            logits = None if r.logits is None else r.logits[row]
            self._emit(request, tokens[:num_emitted], logprobs[:num_emitted], logits)
        return any(request.finish_reason for request in self.batch.requests)

    def _control(self, r: Round) -> None:
        rows: dict[Controls, dict[int, int]] = {}
        for row, request in enumerate(self.batch.requests):
            rows.setdefault(request.controls, {})[request.controls.requests.index(request)] = row
        drafts, room = r.tokens[:, 1:].tolist(), r.num_draft.tolist()
        for controls, its_rows in rows.items():
            controls.advance(r, its_rows, drafts, room)

    def _show_draft(self, r: Round) -> None:
        if num_draft := r.num_draft.item():
            self.streamer.put_draft(r.tokens[0, 1 : 1 + num_draft].clone())

    def _emit(self, request: Request, tokens: list[int], logprobs: list[float], logits: torch.Tensor | None) -> None:
        if any(logprob != logprob for logprob in logprobs):
            raise FloatingPointError(
                f"the logits at position {len(request.prompt) + len(request.tokens)} are not numbers (NaN): the "
                f"checkpoint's weights are damaged or overflow in {str(self.model.dtype).removeprefix('torch.')}"
            )
        request.tokens += tokens
        if tokens[-1] in self.eos:
            request.finish_reason = "eos"
        elif request.controls is not None and request.controls.stops(request):
            request.finish_reason = "stopping_criteria"
        elif len(request.tokens) >= request.max_new_tokens:
            request.finish_reason = "length"
        if (kept := self.stop(request, len(tokens))) is not None:
            cut = len(request.tokens) - kept
            self.stats.tokens -= cut
            self.stats.decode_tokens -= cut
            del request.tokens[kept:]
            tokens = tokens[: len(tokens) - cut]
            request.finish_reason = "stop_string"
        if self.output_logits:
            request.logits.append(logits[: len(tokens)].clone())
        if self.streamer is not None:
            self.streamer.put(torch.tensor(tokens))
            if request.finish_reason:
                self.streamer.end()
