"""Texts to rows of token ids that a causal language model trains on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

FORMATS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".parquet": "parquet"}


def load_texts(source: str, *, text_field: str = "text", split: str = "train") -> Dataset:
    """The texts of a file, or of a data set on the hub, as a `datasets.Dataset` with the one column `text`.

    Args:
        source: a .txt file (blank lines separate its texts), a .jsonl or .parquet file, a folder of such files of one
            kind, or the name of a data set on the hub, as "name" or "name:configuration".
        text_field: the field that holds the text.
        split: of a data set on the hub.

    Raises:
        ValueError: the file is empty, of another format, or has no such field.
        FileNotFoundError, ConnectionError: there is no such file or data set.
    """
    from datasets import load_dataset

    path = Path(source).expanduser()
    if path.exists():
        files = sorted(file for file in path.rglob("*") if file.suffix in FORMATS) if path.is_dir() else [path]
        kinds = {FORMATS.get(file.suffix) for file in files}
        if len(kinds) != 1 or None in kinds:
            raise ValueError(f"dataset={source}: give {', '.join(FORMATS)}, or a folder of files of one kind")
        kind = kinds.pop()
        if not any(file.stat().st_size for file in files):
            raise ValueError(f"dataset={source} is empty")
        options = {"sample_by": "paragraph"} if kind == "text" else {}
        field = "text" if kind == "text" else text_field
        data = load_dataset(kind, data_files=[str(file) for file in files], split="train", **options)
    elif path.suffix in FORMATS or "\\" in source or source.count("/") > 1:
        raise FileNotFoundError(f"dataset={source}: there is no such file")
    else:
        name, _, configuration = source.partition(":")
        data, field = load_dataset(name, configuration or None, split=split), text_field
    if field not in data.column_names:
        raise ValueError(f"text_field={field!r}: {source} has the fields {', '.join(data.column_names)}")
    data = data.select_columns([field])
    return data if field == "text" else data.rename_column(field, "text")


def pack(texts: Dataset, tokenizer: PreTrainedTokenizerBase, length: int) -> Dataset:
    """Rows of exactly `length` tokens: the texts one after the other, each ended by EOS.

    Returns columns `input_ids` and `labels`, both [length]. What is left after the last full row of a thousand texts is
    dropped, unless it is all there is of them.

    Raises ValueError when the tokenizer has no EOS token, or the texts do not fill one row.
    """
    eos = tokenizer.eos_token_id
    if eos is None:
        raise ValueError("the tokenizer has no EOS token to put between texts")

    def rows(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False, verbose=False)
        stream = [token for text in ids["input_ids"] for token in (*text, eos)]
        cut = [stream[start : start + length] for start in range(0, len(stream) - length + 1, length)]
        return {"input_ids": cut, "labels": cut}

    packed = texts.map(rows, batched=True, remove_columns=["text"], desc="Tokenizing")
    if not len(packed):
        raise ValueError(f"sequence_length={length}: the texts are too short to fill one row, choose less")
    return packed
