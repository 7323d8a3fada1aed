"""Streaming: the pieces printed are the text of all tokens, and what a terminal shows in the end is that text."""

from __future__ import annotations

import io
import random
import re

import pytest
import torch
from rich.cells import get_character_cell_size
from rich.console import Console
from tiny_models import tiny_tokenizer

from layerskip_kernels.cli.screen import Screen, visible
from layerskip_kernels.cli.streamers import IncrementalText, SpeculativeStreamer, TextStreamer

TEXTS = ("plain words", "naïve café", "漢字とかな", "👍🏽 🇫🇷 ok", "a\n\n  b\tc\n", "x" * 50, "e\u0301\u0301 combining")


def sentencepiece_tokenizer():
    """Decodes as Llama 2 does: the first space of a text is dropped, unknown characters are bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    pieces = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "▁▁▁",
        "▁def",
        "▁return",
        "a",
        "b",
        "d",
        "e",
        "f",
    ]
    bpe = models.BPE(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True
    )
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", clean_up_tokenization_spaces=False)


def in_pieces(ids: list[int], rng: random.Random) -> list[list[int]]:
    pieces = []
    while ids:
        count = rng.randint(1, 7)
        pieces.append(ids[:count])
        ids = ids[count:]
    return pieces


@pytest.mark.parametrize("make", [tiny_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize("seed", range(20))
def test_pieces_joined_are_the_whole_text(make, seed):
    rng, tokenizer = random.Random(seed), make()
    encoded = tokenizer("".join(rng.choices(TEXTS, k=3)), add_special_tokens=False)["input_ids"]
    cases = [encoded]
    if make is tiny_tokenizer:  # Llama 2's decoder turns good characters bad when an invalid byte follows later
        noise = [rng.randrange(len(tokenizer)) for _ in range(40)]  # invalid byte sequences, special tokens
        cases += [noise, encoded + noise + encoded]
    for ids in cases:
        text = IncrementalText(tokenizer)
        shown = "".join(text.push(piece) for piece in in_pieces(ids, rng)) + text.flush()
        assert shown == tokenizer.decode(ids, skip_special_tokens=True)


def test_indentation_after_a_newline_survives():
    tokenizer = sentencepiece_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁def", "<0x0A>", "▁▁▁", "▁return"])
    text = IncrementalText(tokenizer)
    assert [text.push([token]) for token in ids] == ["def", "\n", "   ", " return"]


def test_an_unfinished_character_waits_but_not_the_text_before_it():
    tokenizer = tiny_tokenizer()
    first, *rest = tokenizer("漢", add_special_tokens=False)["input_ids"]
    text = IncrementalText(tokenizer)
    assert text.push([*tokenizer("ok ", add_special_tokens=False)["input_ids"], first]) == "ok "
    assert text.peek(rest) == "漢"
    assert text.push(rest[:1]) == ""
    assert text.push(rest[1:]) == "漢"
    assert text.push([first]) == ""
    assert text.flush() == "\ufffd"


def test_the_prompt_is_not_printed_and_end_is_said_once():
    tokenizer, written = tiny_tokenizer(), []
    streamer = TextStreamer(tokenizer, written.append)
    streamer.put(torch.tensor(tokenizer("prompt")["input_ids"]))
    streamer.put(torch.tensor(tokenizer("answer", add_special_tokens=False)["input_ids"]))
    streamer.end()
    streamer.end()
    assert "".join(written) == "answer\n"


class Terminal(io.StringIO):
    """The part of a VT100 that `Screen` uses; a full row wraps when the next character comes, as real ones do."""

    def __init__(self, width: int, height: int):
        super().__init__()
        self.width, self.height = width, height
        self.rows: list[list[str]] = [[]]  # all rows, those that scrolled off the top included
        self.top = self.row = self.column = 0
        self.saved = (0, 0)  # row on the screen, column
        self.styled: set[str] = set()

    def isatty(self) -> bool:
        return True

    def write(self, data: str) -> int:
        for part in re.findall(r"\x1b\[\d*(?:;\d+)*[A-Za-z]|\x1b.|[^\x1b]", data, re.DOTALL):
            if part.startswith("\x1b"):
                self._control(part)
            elif part == "\n":
                self._down()
                self.column = 0
            else:
                self._print(part)
        return len(data)

    def _control(self, code: str) -> None:
        if code == "\x1bD":
            self._down()
        elif code == "\x1b7":
            self.saved = (self.row - self.top, min(self.column, self.width - 1))  # forgets a pending wrap
        elif code == "\x1b8":
            self.row, self.column = self.saved[0] + self.top, self.saved[1]
        elif code == "\x1b[J":
            self.rows[self.row] = self.rows[self.row][: self.column]
            self.rows[self.row + 1 :] = [[] for _ in self.rows[self.row + 1 :]]
        elif code.endswith("A"):
            self.row = max(self.row - int(code[2:-1]), self.top)
        elif code.endswith("m"):
            self.styled.add(code)
        else:
            raise AssertionError(f"unexpected escape code {code!r}")

    def _down(self) -> None:
        self.row += 1
        if self.row == len(self.rows):
            self.rows.append([])
        self.top = max(self.top, self.row - self.height + 1)

    def _print(self, character: str) -> None:
        cells = get_character_cell_size(character)
        row = self.rows[self.row]
        if character == "\t":
            self.column = min((self.column // 8 + 1) * 8, self.width - 1)
            return
        if cells == 0:  # joins the character before it, if any
            before = self.column - 1 if self.column and row[self.column - 1] else self.column - 2
            if before >= 0:
                row[before] += character
            return
        if self.column + cells > self.width:
            self._down()
            self.column = 0
            row = self.rows[self.row]
        row += [" "] * (self.column - len(row))
        row[self.column : self.column + cells] = [character, ""][:cells]
        self.column += cells

    def text(self) -> str:
        return "\n".join("".join(row).rstrip() for row in self.rows).rstrip()


def console(terminal: Terminal) -> Console:
    return Console(
        file=terminal, force_terminal=True, color_system="standard", width=terminal.width, height=terminal.height
    )


def plain(text: str, width: int, height: int) -> str:
    terminal = Terminal(width, height)
    terminal.write(visible(text))
    return terminal.text()


@pytest.mark.parametrize(("width", "height"), [(80, 24), (21, 6), (7, 4), (40, 2)])
@pytest.mark.parametrize("seed", range(25))
def test_a_terminal_ends_up_with_the_accepted_text(width, height, seed):
    """Drafts that are rejected, wrap, scroll, and hold wide characters leave no trace."""
    rng, tokenizer = random.Random(seed), tiny_tokenizer()
    terminal = Terminal(width, height)
    streamer = SpeculativeStreamer(tokenizer, Screen(console(terminal)))
    streamer.put(torch.tensor([1]))
    rest = ids = tokenizer("".join(rng.choices(TEXTS, k=12)), add_special_tokens=False)["input_ids"]
    while rest:
        accepted = min(rng.randint(0, 30), len(rest) - 1)
        wrong = tokenizer(rng.choice(TEXTS), add_special_tokens=False)["input_ids"]
        streamer.put_draft(torch.tensor(rest[:accepted] + wrong))
        streamer.put(torch.tensor(rest[: accepted + 1]))
        rest = rest[accepted + 1 :]
    streamer.end()
    expected = plain(tokenizer.decode(ids), width, height)
    assert terminal.text() == expected
    assert terminal.styled


def test_drafts_are_shown_then_corrected():
    tokenizer, terminal = tiny_tokenizer(), Terminal(40, 10)

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    streamer = SpeculativeStreamer(tokenizer, Screen(console(terminal)))
    streamer.put(ids("prompt"))
    streamer.put(ids("the "))
    streamer.put_draft(ids("quicj"))
    assert terminal.text() == "the quicj"
    streamer.put(ids("quick"))
    assert terminal.text() == "the quickj"  # the rejected j stays, struck, until the next drafts
    streamer.put_draft(ids(" fox"))
    assert terminal.text() == "the quick fox"
    streamer.put(ids(" fo"))
    streamer.put(ids("g"))
    streamer.end()
    assert terminal.text() == "the quick fog"


def test_control_characters_do_not_reach_the_terminal():
    assert visible("a\x1b[2Jb\x07\r\nc\td\x9b") == "a\ufffd[2Jb\ufffd\nc\td\ufffd"
