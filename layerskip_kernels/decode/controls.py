from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from layerskip_kernels.decode.batch import Request
from layerskip_kernels.decode.buffers import Round
from layerskip_kernels.decode.stop import StopStrings
from layerskip_kernels.ops import Sampling
from layerskip_kernels.reference.exit_head import lowest_argmax, process, sampling_noise


class Controls:
    """Logits processors and stopping criteria of requests that advance together; usually of one request alone.

    They are called after each emitted token with what a plain decode would have shown them: `[n, length]` ids, for each
    request its prompt and its tokens. They never see a rejected draft, and never run while drafting: at verification
    they go position by position, as far as drafts are accepted. Tokens are drawn with the noise of fused sampling.
    """

    @torch.inference_mode(False)  # user code gets ordinary tensors
    def __init__(
        self,
        requests: Sequence[Request],
        processors: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None,
        criteria: Callable[..., torch.Tensor] | None,
        *,
        stop: StopStrings,
        eos_ids: Sequence[int],
        device: torch.device,
        shown: Sequence[Sequence[int]] | None = None,
        fill: int | None = None,
        keep_scores: bool = False,
    ):
        """`shown`: prompts of one length, in place of the requests' own; `fill`: the ended requests' token, None where
        they go on until all have ended."""
        self.requests, self.processors, self.criteria = list(requests), processors, criteria
        self.stop, self.eos_ids, self.fill, self.keep_scores = stop, frozenset(eos_ids), fill, keep_scores
        prompts = torch.tensor(shown or [r.prompt for r in requests], dtype=torch.int64, device=device)
        self.length = prompts.shape[1]
        room = prompts.new_full((len(requests), max(r.max_new_tokens for r in requests)), fill or 0)
        self.history = torch.cat([prompts, room], dim=1)
        self.tokens: list[list[int]] = [[] for _ in requests]
        self.ended = [False] * len(requests)  # by EOS, or as below
        self.stopped = [False] * len(requests)  # by a criterion or a stop string
        self._criteria_met = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self.scores: list[torch.Tensor] = []  # [n, V] float32 for each token: what it was drawn from
        for request in requests:
            request.controls = self

    @property
    def needs_logits(self) -> bool:
        return self.processors is not None or self.keep_scores

    def stops(self, request: Request) -> bool:
        """Whether a criterion, or a stop string, ended it."""
        return self.stopped[self.requests.index(request)]

    def scores_of(self, request: Request) -> torch.Tensor:
        """[n, V] float32, what its tokens were drawn from; with `keep_scores`."""
        row = self.requests.index(request)
        return torch.stack([scores[row] for scores in self.scores[: len(self.tokens[row])]])

    def first(self, tokens: list[int], logits: torch.Tensor | None, sampling: Sampling | None) -> list[int]:
        """The requests' first tokens. `tokens` [n] are the head's choice, from `logits` [n, V]."""
        return self._step(list(range(len(self.requests))), tokens, logits, sampling)

    def advance(self, r: Round, rows: dict[int, int], drafts: list[list[int]], room: list[int]) -> None:
        """Put the tokens the processors choose into the round's targets; where a criterion holds, end its row there.

        Args:
            r: the round, its targets and logits computed.
            rows: request number -> row of the round, for the requests still running.
            drafts, room: the round's drafts [B, K], and how many of them count [B].
        """
        places = list(rows.values())
        for t in range(r.window):
            at = [row * r.window + t for row in places]
            logits = r.logits.flatten(0, 1)[at] if self.needs_logits else None
            sampling = _rows_of(r.verify_sampling, at)
            tokens = self._step(list(rows), r.target.flatten()[at].tolist(), logits, sampling)
            r.target[places, t] = r.target.new_tensor(tokens)
            goes_on = [t < room[row] and token == drafts[row][t] for row, token in zip(places, tokens)]
            if not all(goes_on) or any(self.ended[i] for i in rows):
                break
        for i, row in rows.items():
            if self.stopped[i]:
                r.remaining[row] = t + 1
            elif len(rows) > 1 and t < r.drafts:
                r.tokens[row, t + 1] = -1  # no token: all wait for the first that rejects

    @torch.inference_mode(False)
    @torch.no_grad()
    def _step(self, indices: list[int], tokens: list[int], logits, sampling: Sampling | None) -> list[int]:
        """One token for each of the requests `indices`, and what the criteria say to it."""
        if self.needs_logits:
            tokens = self._choose(indices, logits, sampling)
        self.history[indices, self.length] = self.history.new_tensor(tokens)
        self.length += 1
        for i, token in zip(indices, tokens):
            self.tokens[i].append(token)
            self.stopped[i] = self.stop.completed_by_last(self.tokens[i])
        if self.criteria is not None:
            scores = tuple(self.scores) if self.keep_scores else None
            self._criteria_met |= self.criteria(self.history[:, : self.length], scores)
            met = self._criteria_met.tolist()
            for i in indices:
                self.stopped[i] |= met[i] and (self.fill is not None or all(met))
        for i, token in zip(indices, tokens):
            self.ended[i] = self.stopped[i] or token in self.eos_ids
        return tokens

    def _choose(self, indices: list[int], logits: torch.Tensor, sampling: Sampling | None) -> list[int]:
        everyone = logits.new_zeros(len(self.requests), logits.shape[1])  # zeros for the ended
        everyone[indices] = logits
        scores = everyone
        if self.processors is not None:
            scores = self.processors(self.history[:, : self.length], everyone)
            if not isinstance(scores, torch.Tensor) or scores.shape != everyone.shape:
                got = list(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
                raise TypeError(f"logits_processor: returned {got}, expected scores of shape {list(everyone.shape)}")
        scores = scores[indices].float()
        scores = torch.where(scores.isnan(), float("-inf"), scores)
        if sampling is not None:
            scores = process(scores, sampling)
        if self.keep_scores:
            self.scores.append(torch.zeros_like(everyone).index_copy_(0, _index(indices, scores), scores))
        if sampling is not None:
            scores = scores + sampling_noise(sampling, scores.shape[1])
        return lowest_argmax(scores).tolist()


def _rows_of(sampling: Sampling | None, rows: list[int]) -> Sampling | None:
    return sampling and Sampling(*(None if field is None else field[rows] for field in sampling))


def _index(rows: list[int], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
