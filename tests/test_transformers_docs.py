"""docs/transformers.md: the examples run as printed, in their order."""

import re
from pathlib import Path

from tiny_models import tiny_checkpoint

PAGE = (Path(__file__).parent.parent / "docs" / "transformers.md").read_text(encoding="utf-8")


def test_the_examples_run_as_printed(tmp_path, monkeypatch, capsys):
    tiny_checkpoint(tmp_path / "build/smollm2", "smollm2", late_scale=0.1)
    monkeypatch.chdir(tmp_path)
    examples = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(examples) >= 7
    names = {}
    for example in examples:
        exec(example, names)
    assert names["cache"].get_seq_length() == names["ids"].shape[1] - 1
    assert capsys.readouterr().out.count("def fibonacci(n):") == 3  # each prompt once
    assert "generate" not in vars(names["model"])
