"""Prints tokens while they are generated; transformers' streamer protocol, plus `put_draft`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from layerskip_kernels.cli.screen import Screen

DRAFT, ACCEPTED, REJECTED = "dim cyan", "green", "red strike"
_PARTIAL = "\ufffd"  # what a tokenizer decodes an unfinished character to


class IncrementalText:
    """Turns tokens into text piece by piece; the pieces joined are the text of all tokens.

    Tokens are decoded together with the piece before them, since a tokenizer may treat the beginning of a text
    differently (Llama 2 drops a leading space). An unfinished multi-byte character waits for its last token.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._start = 0  # decoding starts here: one piece before what is new
        self._done = 0  # tokens whose text was returned in full
        self._shown = 0  # characters returned of the text after them

    def push(self, ids: Iterable[int]) -> str:
        """The text that `ids` complete."""
        self._ids.extend(ids)
        text = self._pending(self._ids)
        complete = text.rstrip(_PARTIAL)
        piece = complete[self._shown :]
        if complete != text:
            self._shown = len(complete)
        elif text:
            self._start, self._done, self._shown = self._done, len(self._ids), 0
        return piece

    def peek(self, ids: list[int]) -> str:
        """The text `push` would return, without changing anything."""
        return self._pending(self._ids + ids).rstrip(_PARTIAL)[self._shown :]

    def flush(self) -> str:
        """What still waits, at the end of the text."""
        piece = self._pending(self._ids)[self._shown :]
        self._start = self._done = len(self._ids)
        self._shown = 0
        return piece

    def _pending(self, ids: list[int]) -> str:
        before = self._decode(ids[self._start : self._done])
        return self._decode(ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True) if ids else ""


class TextStreamer:
    """Gives the text of accepted tokens to `write` as soon as it is complete, and a newline after the last."""

    def __init__(self, tokenizer: Any, write: Callable[[str], None]):
        self._text = IncrementalText(tokenizer)
        self._write = write
        self._started = self._ended = False

    def put(self, ids: Any) -> None:
        """Tokens, a tensor [N] of int64; the first call brings the prompt, which is not printed."""
        if self._started:
            self._accept(ids.flatten().tolist())
        self._started = True

    def end(self) -> None:
        """Prints what waits; calls after the first do nothing."""
        if self._started and not self._ended:
            self._ended = True
            self._write(self._text.flush() + "\n")

    def _accept(self, ids: list[int]) -> None:
        self._write(self._text.push(ids))


class SpeculativeStreamer(TextStreamer):
    """Shows each round at work: drafts dim, then the accepted ones green, the model's own token plain.

    Rejected drafts stay behind the text, struck through, until the next round's drafts take their place.
    """

    def __init__(self, tokenizer: Any, screen: Screen):
        super().__init__(tokenizer, screen.commit)
        self._screen = screen
        self._draft: list[int] = []

    def put_draft(self, ids: Any) -> None:
        """This round's drafted tokens, a tensor [K] of int64, before `put` brings the accepted ones."""
        self._draft = ids.flatten().tolist()
        self._screen.preview(self._text.peek(self._draft), DRAFT)

    def _accept(self, ids: list[int]) -> None:
        draft, same = self._draft, 0
        while same < min(len(ids), len(draft)) and ids[same] == draft[same]:
            same += 1
        self._screen.commit(self._text.push(ids[:same]), ACCEPTED)
        left = self._text.peek(draft[same:])
        if own := ids[same:]:
            self._screen.commit(self._text.push(own))
        self._draft = [] if own else draft[same:]
        self._screen.preview(left, REJECTED if own else DRAFT)
