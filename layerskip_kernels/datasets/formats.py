"""What a record of each data set looks like, and the prompt it makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

WORDS = 100  # of an article that open a cnn_dm_lm prompt


@dataclass(frozen=True)
class Sample:
    """One prompt, and what is known about its answer."""

    prompt: str | list[int]
    response: str | None = None
    record: dict[str, Any] = field(default_factory=dict, repr=False)  # as it was read


@dataclass(frozen=True)
class Format:
    """One data set: where it is, the fields its records have, and how they become samples."""

    fields: tuple[str, ...]
    sample: Callable[[dict[str, Any], Any], Sample]  # (record, tokenizer)
    hub: tuple[str, ...] | None = None  # name, and configuration if there are several
    split: str = "test"
    examples_split: str = "train"  # where the examples of --n_shot come from
    stop: tuple[str, ...] = ()  # texts that end an answer
    joint: str = " "  # between an example's prompt and its response


def _ask(template: str, prompt: str, response: str) -> Callable[[dict[str, Any], Any], Sample]:
    """A sample whose prompt is the field `prompt` inside a template and whose response is the field `response`."""

    def sample(record: dict[str, Any], tokenizer: Any) -> Sample:
        return Sample(template.format(_text(record, prompt)), _text(record, response), record)

    return sample


def _text(record: dict[str, Any], name: str) -> str:
    if not isinstance(record[name], str):
        raise ValueError(f"{name} must be text, found {type(record[name]).__name__}")
    return record[name]


def _opening(record: dict[str, Any], tokenizer: Any) -> Sample:
    words = _text(record, "article").split()
    return Sample(" ".join(words[:WORDS]), " ".join(words[WORDS:]), record)


def _prompt_and_response(record: dict[str, Any], tokenizer: Any) -> Sample:
    response = _text(record, "response") if record.get("response") is not None else None
    return Sample(_text(record, "prompt"), response, record)


def _chat(record: dict[str, Any], tokenizer: Any) -> Sample:
    messages = record["messages"]
    if not (isinstance(messages, list) and messages and all(_is_message(m) for m in messages)):
        raise ValueError('messages must be a list of {"role": ..., "content": ...}')
    response = messages[-1]["content"] if messages[-1]["role"] == "assistant" else None
    if not tokenizer.chat_template:
        raise ValueError("the model's tokenizer has no chat template, which chat_format needs")
    asked = messages[:-1] if response is not None else messages
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return Sample(tokenizer(text, add_special_tokens=False)["input_ids"], response, record)


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))


def _token_ids(record: dict[str, Any], tokenizer: Any) -> Sample:
    ids = record["token_ids"]
    if not (isinstance(ids, list) and ids and all(type(token) is int for token in ids)):
        raise ValueError("token_ids must be a list of whole numbers")
    return Sample(ids, record.get("response"), record)


_CNN_DM = ("abisee/cnn_dailymail", "3.0.0")
DATASETS: dict[str, Format] = {
    "cnn_dm_summarization": Format(
        ("article", "highlights"),
        _ask("Article: {}\nSummary:", "article", "highlights"),
        _CNN_DM,
        stop=("\nArticle:",),
    ),
    "xsum_summarization": Format(
        ("document", "summary"),
        _ask("Article: {}\nSummary:", "document", "summary"),
        ("EdinburghNLP/xsum",),
        stop=("\nArticle:",),
    ),
    "cnn_dm_lm": Format(("article",), _opening, _CNN_DM),
    "human_eval": Format(
        ("prompt", "canonical_solution"),
        _ask("{}", "prompt", "canonical_solution"),
        stop=("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
        joint="",
    ),
    "top_v2": Format(
        ("utterance", "semantic_parse"),
        _ask("Utterance: {}\nParse:", "utterance", "semantic_parse"),
        ("WillHeld/top_v2",),
        stop=("\n",),
    ),
    "gsm8k": Format(
        ("question", "answer"),
        _ask("Question: {}\nAnswer:", "question", "answer"),
        ("openai/gsm8k", "main"),
        stop=("\nQuestion:",),
    ),
    "custom_jsonl": Format(("prompt",), _prompt_and_response),
    "chat_format": Format(("messages",), _chat),
    "token_ids": Format(("token_ids",), _token_ids),
}
