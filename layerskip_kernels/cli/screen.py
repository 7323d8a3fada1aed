"""Text on a terminal whose tail can be shown in advance and taken back."""

from __future__ import annotations

import re

from rich.cells import get_character_cell_size
from rich.console import Console
from rich.segment import Segment, Segments
from rich.style import Style

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and newline
_INDEX, _UP, _SAVE, _RESTORE, _ERASE = "\x1bD", "\x1b[{}A", "\x1b7", "\x1b8", "\x1b[J"


def visible(text: str) -> str:
    """`text` with control characters replaced: a model's output must not steer the terminal."""
    return _CONTROL.sub("\ufffd", text.replace("\r\n", "\n"))


class Screen:
    """Writes text for good (`commit`), and after it text that the next call takes back (`preview`).

    The cursor is saved before a preview and restored to take it back. As the saved place is one on the screen, the rows
    the preview needs are scrolled free first; how many is only estimated from above, so terminals may disagree about
    the width of a character.
    """

    def __init__(self, console: Console):
        self.console = console
        self._column = 0  # where the committed text ends; the terminal's width when the next character wraps
        self._previewing = False

    def commit(self, text: str, style: str = "") -> None:
        self._take_back()
        text = visible(text)
        self._column = self._layout(text)[-1][1]
        self._write(text, style)
        self.console.file.flush()

    def preview(self, text: str, style: str = "") -> None:
        """Shows as many rows of `text` as fit."""
        self._take_back()
        text = visible(text)
        # an accent that starts the preview would stay on the committed character before it
        while text and text[0] not in "\n\t" and get_character_cell_size(text[0]) == 0:
            text = text[1:]
        # at the end of a full row the saved cursor would lose that the next character wraps: no preview there
        if not text or self._column >= self.console.width:
            return
        rows = [row for row, _ in self._layout(text)]
        most = max(self.console.height - 3, 0)
        free = min(rows[-1], most) + 1
        self.console.file.write(_INDEX * free + _UP.format(free) + _SAVE)
        self._write(text[: sum(row <= most for row in rows) - 1], style)
        self._previewing = True
        self.console.file.flush()

    def _take_back(self) -> None:
        if self._previewing:
            self.console.file.write(_RESTORE + _ERASE)
            self._previewing = False

    def _write(self, text: str, style: str) -> None:
        if text:
            self.console.print(Segments([Segment(text, Style.parse(style))]), end="", crop=False, soft_wrap=True)

    def _layout(self, text: str) -> list[tuple[int, int]]:
        """(rows below the committed text's end, column) before the first character of `text` and after each."""
        width, row, column = self.console.width, 0, self._column
        places = [(row, column)]
        for character in text:
            if character == "\n":
                row, column = row + 1, 0
            elif character == "\t":
                column = min((column // 8 + 1) * 8, width - 1)
            else:
                cells = get_character_cell_size(character)
                if column + cells > width:
                    row, column = row + 1, 0
                column += cells
            places.append((row, column))
        return places
