"""What of `benchmarks/cpu_peers.py` needs no peer installed."""

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny_models import tiny_checkpoint, tiny_model

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import cpu_peers
import gguf_file
import make_controlled
import peer_rows
from peer_rows import Row, figures, steady_turn, table

PLAIN = Row("peer", "w", "plain")
SPECULATIVE = Row("peer", "w", "speculative", same_as=PLAIN.name)


def turn(seconds: float, kept: bool = True) -> dict:
    return dict(
        decode_tokens=10,
        decode_seconds=seconds,
        prefill_seconds=0.5,
        bandwidth=[90.0, 110.0],
        kept=kept,
        idle_cpu_share=0,
    )


def test_a_turn_across_a_change_of_bandwidth_is_thrown_away_and_repeated():
    probes = iter([10.0, 8.0, 10.0, 8.6])
    turns = steady_turn(lambda: {"tokens": [1]}, lambda: next(probes), limit=0.15, tries=3)
    assert [(t["bandwidth"], t["kept"]) for t in turns] == [([10.0, 8.0], False), ([10.0, 8.6], True)]


def test_turns_end_after_the_last_try_though_none_was_steady():
    probes = iter([10.0, 5.0] * 3)
    turns = steady_turn(dict, lambda: next(probes), limit=0.15, tries=3)
    assert [t["kept"] for t in turns] == [False] * 3
    assert "tokens_per_second" not in figures(PLAIN, turns, {}, {"bytes_per_token": 1})


def test_figures_are_medians_over_the_kept_turns():
    turns = [turn(1), turn(2), turn(5), turn(100, kept=False)]
    tokens = {PLAIN.name: [1, 2, 3], SPECULATIVE.name: [1, 2, 4], peer_rows.EXACT: [1, 5, 3]}
    found = figures(SPECULATIVE, turns, tokens, {"bytes_per_token": 4})
    assert (found["tokens_per_second"], found["slowest"], found["fastest"]) == (5, 2, 10)
    assert (found["turns"], found["thrown_away"]) == (3, 1)
    assert found["share_of_bandwidth"] == 5 * 4 / 100
    assert (found["same_as_plain"], found["same_as_float32"]) == (2, 1)


def test_the_table_names_every_row_and_why_it_is_missing():
    rows = [
        figures(PLAIN, [turn(1)], {}, {"bytes_per_token": 4}),
        figures(SPECULATIVE, [turn(1, kept=False)], {}, {"bytes_per_token": 4}),
    ]
    console = Console(width=160, file=io.StringIO())
    console.print(table(rows, {"other": "not installed", "another": "not installed"}, 16, "caption"))
    text = console.file.getvalue()
    for part in (PLAIN.name, "10.0", "40%", SPECULATIVE.name, "no steady turn in 1", "other, another: not installed"):
        assert part in text


def test_names_of_rows_differ_and_speculation_names_its_plain_row():
    names = [row.name for row in peer_rows.ROWS]
    assert len(set(names)) == len(names)
    assert {row.same_as for row in peer_rows.ROWS} - {""} <= set(names)
    assert {peer_rows.BASE, peer_rows.EXACT} <= set(names)


def test_rows_are_chosen_by_name_or_by_how_it_starts():
    names = [row.name for row in peer_rows.chosen(["llama.cpp", peer_rows.BASE])]
    assert names == [peer_rows.BASE, "llama.cpp BF16 plain", "llama.cpp Q8_0 plain", "llama.cpp Q4_0 plain"]
    assert [row.name for row in peer_rows.chosen(["ours bfloat16 self_speculative"])] == [
        "ours bfloat16 self_speculative"
    ]


def test_unknown_rows_are_refused(capsys):
    with pytest.raises(SystemExit) as error:
        cpu_peers.arguments_of(["--rows", "ours", "lama.cpp"])
    assert error.value.code == 2
    assert "'lama.cpp' begins no row's name, choose from ours, transformers, llama.cpp" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["llama2", "smollm2"])  # a head of its own, and a tied one
def test_transformers_reads_the_gguf_file_back(tmp_path, family):
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", family, torch.bfloat16)
    file = tmp_path / "model.gguf"
    gguf_file.write_gguf(checkpoint, file)
    model = tiny_model(family, torch.bfloat16)
    found = load_gguf_checkpoint(str(file), return_tensors=True, model_to_load=model)
    for name, value in found["config"].items():
        if name in (
            "hidden_size",
            "num_hidden_layers",
            "head_dim",
            "rms_norm_eps",
            "num_key_value_heads",
            "vocab_size",
        ):
            assert value == pytest.approx(getattr(model.config, name)), name
    tensors = found["tensors"]
    expected = model.state_dict()
    tied = model.config.tie_word_embeddings
    assert set(expected) - set(tensors) == ({"lm_head.weight"} if tied else set())
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to(torch.bfloat16), expected[name]), name
    whole = sum(
        t.nbytes for n, t in expected.items() if n != ("lm_head.weight" if tied else "model.embed_tokens.weight")
    )
    norms = sum(t.nbytes for t in expected.values() if t.dim() == 1)  # float32 in the file
    assert gguf_file.bytes_per_token(file)[0] == whole + norms


def test_scaled_rope_is_not_written(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", "llama3", tokenizer=False)
    with pytest.raises(ValueError, match="rope_type='default' is written, found 'llama' with 'llama3'"):
        gguf_file.write_gguf(checkpoint, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_calibration_finds_the_scale_of_an_acceptance():
    scale, found, _ = make_controlled.calibrate(lambda s: (1 - s, 1.0), wanted=0.9, tolerance=0.001, steps=30)
    assert found == pytest.approx(0.9, abs=0.001)
    assert scale == pytest.approx(0.1, abs=0.001)


def test_a_run_writes_settings_figures_and_every_turn(tmp_path):
    checkpoint = tiny_checkpoint(tmp_path / "tiny", "smollm2", torch.bfloat16, tokenizer=False)
    file = tmp_path / "result.json"
    options = ["--rounds", "1", "--steady", "1", "--new_tokens", "16", "--prompt_tokens", "8", "--threads", "1"]
    rows = ["--rows", "ours bfloat16 autoregressive", "ours bfloat16 self_speculative"]
    cpu_peers.main(["--model", str(checkpoint), "--cache", str(tmp_path), *options, *rows, "--json", str(file)])
    result = json.loads(file.read_text())
    assert (result["settings"]["exit_layer"], result["settings"]["model"]) == (1, "tiny")
    plain, speculative, *_ = result["rows"]
    assert plain["tokens_per_second"] > 0
    assert plain["bytes_per_token"] == sum(p.nbytes for p in tiny_model("smollm2", torch.bfloat16).parameters())
    assert (speculative["row"], speculative["same_as_plain"]) == ("ours bfloat16 self_speculative", 16)
    assert {t["row"] for t in result["turns"]} == {row["row"] for row in result["rows"]}
