from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from layerskip_kernels.decode.batch import Request
from layerskip_kernels.messages import shown


class StopStrings:
    """Finds the token that completes a stop string, wherever in a token, or across tokens, the string lies."""

    def __init__(self, strings: str | Sequence[str] | None, tokenizer: Any):
        strings = () if strings is None else (strings,) if isinstance(strings, str) else strings
        if not isinstance(strings, (list, tuple, set, frozenset)) or not all(isinstance(s, str) for s in strings):
            raise TypeError(f"stop_strings={shown(strings)}: expected strings")
        if not all(strings):
            raise ValueError(f"stop_strings={shown(strings)}: expected non-empty strings")
        self.strings = list(strings)
        if self.strings and tokenizer is None:
            raise ValueError("stop_strings: needs a tokenizer and the checkpoint has none")
        self.tokenizer = tokenizer
        # A character takes at most four byte tokens, so no stop string begins further back than this.
        self.reach = 4 * max(map(len, self.strings), default=0) + 4

    def __call__(self, request: Request, new: int) -> int | None:
        """How many tokens to keep, of which the last `new` are new; None when there is no stop string."""
        if not self.strings:
            return None
        tokens = request.tokens
        for end in range(len(tokens) - new + 1, len(tokens) + 1):
            if self._found_in(tokens[max(0, end - self.reach) : end]):
                return end
        return None

    def completed_by_last(self, tokens: list[int]) -> bool:
        """Whether a stop string is in the text of `tokens`; it is not in that of all but the last."""
        return bool(self.strings) and self._found_in(tokens[-self.reach :])

    def _found_in(self, tokens: list[int]) -> bool:
        text = self.tokenizer.decode(tokens)
        return any(s in text for s in self.strings)
