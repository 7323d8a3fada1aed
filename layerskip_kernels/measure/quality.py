"""How good answers are: ROUGE, BLEU and exact match by well-kept libraries."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from layerskip_kernels.datasets import Sample
from layerskip_kernels.measure.execution import passes

ROUGE = ("rouge1", "rouge2", "rouge3", "rougeL")
_LAST_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def cut(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the `stop` strings."""
    return text[: min((at for word in stop if (at := text.find(word)) >= 0), default=len(text))]


class Scorer:
    """Rates the answers to one data set's prompts.

    ROUGE F-measures 0..1, BLEU 0..100 and exact match 0..1 where a sample has a reference; gsm8k: exact match of the
    number; human_eval with `execute_code`: pass@1, from one answer each.
    """

    def __init__(self, dataset: str, stop: Sequence[str], execute_code: bool = False):
        self.dataset, self.stop, self.execute_code = dataset, stop, execute_code

    def score(self, text: str, sample: Sample) -> dict[str, float]:
        """Of one answer; nothing without a reference."""
        if sample.response is None:
            return {}
        text = cut(text, self.stop)
        if self.dataset == "gsm8k":
            return {"exact_match": float(_number(text) == _number(sample.response))}
        import sacrebleu

        found = {name: result.fmeasure for name, result in _rouge().score(sample.response, text).items()}
        found["bleu"] = sacrebleu.sentence_bleu(text, [sample.response]).score
        found["exact_match"] = float(text.strip() == sample.response.strip())
        if self.execute_code:
            found["pass@1"] = float(passes(sample.record, text))
        return found

    def totals(self, rows: Sequence[dict[str, Any]]) -> dict[str, float]:
        """Of rows with `text`, `response` and `quality`: means of the rated ones; BLEU of the corpus as a whole."""
        rated = [row for row in rows if row["quality"]]
        if not rated:
            return {}
        found = {name: sum(row["quality"][name] for row in rated) / len(rated) for name in rated[0]["quality"]}
        if "bleu" in found:
            import sacrebleu

            answers = [cut(row["text"], self.stop) for row in rated]
            found["bleu"] = sacrebleu.corpus_bleu(answers, [[row["response"] for row in rated]]).score
        return found


@cache
def _rouge():
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(list(ROUGE), use_stemmer=True)


def _number(text: str) -> str | None:
    """The number after ####, else the last one."""
    numbers = _LAST_NUMBER.findall(text.partition("####")[2]) or _LAST_NUMBER.findall(text)[::-1]
    return numbers[0].replace(",", "").removesuffix(".00").removesuffix(".0") if numbers else None
