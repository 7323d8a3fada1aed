"""Trains the demo model's byte-level BPE tokenizer.

python docs/demo/tokenizer.py build/demo/train.parquet build/demo/tokenizer
"""

from __future__ import annotations

from pathlib import Path

import click
import pyarrow.parquet as pq
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 4096
END = "<|end|>"
# A line end keeps the next line's indentation: one token where other splits spend two or three.
PIECES = r"\n *| ?[A-Za-z]+| ?[0-9]|_+| ?[^\sA-Za-z0-9_]+| +|\s+"


@click.command()
@click.argument("corpus", type=click.Path(exists=True, dir_okay=False))
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
def main(corpus: str, out: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    texts = pq.read_table(corpus)["text"].to_pylist()
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    # A prompt starts a text, as the model saw texts start in training: after the end of another one.
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 0)])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END)
    wrapped.save_pretrained(out)
    sample = texts[:: max(1, len(texts) // 2000)]
    tokens = sum(map(len, wrapped(sample, add_special_tokens=False).input_ids))
    click.echo(f"{len(wrapped)} tokens; {sum(map(len, sample)) / tokens:.2f} characters per token")


if __name__ == "__main__":
    main()
