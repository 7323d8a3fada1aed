"""`layerskip generate` on tiny checkpoints: what it prints, writes, and says about bad input."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
from click.testing import CliRunner
from tiny_models import tiny_checkpoint, tiny_tokenizer

import layerskip_kernels as lk
from layerskip_kernels import registry
from layerskip_kernels.cli import app
from layerskip_kernels.cli.options import BACKENDS, METHODS, STRATEGIES, VERIFICATIONS
from layerskip_kernels.decode import rejection
from layerskip_kernels.ops.verify_rejection import METHODS as REJECTION_METHODS


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama3", late_scale=0.05))


@pytest.fixture(scope="module")
def untokenized(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("untokenized"), "llama2", tokenizer=False))


@pytest.fixture
def run(checkpoint):
    def run(*arguments, model=checkpoint, stdin=None, steps=8):
        fixed = ["generate", "--model", model, "--max_steps", str(steps), "--backend", "reference"]
        return CliRunner().invoke(app, [*fixed, *map(str, arguments)], input=stdin, prog_name="layerskip")

    return run


@pytest.fixture(scope="module")
def answers(checkpoint):
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, backend="reference")

    def answers(*prompts, **options):
        return decoder.generate(list(prompts), max_new_tokens=8, **options).text

    return answers


def sentence(result) -> str:
    """The one sentence of a refused input."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("layerskip: ") and result.stderr.count("\n") == 1, result.stderr
    return result.stderr.removeprefix("layerskip: ").strip()


@pytest.mark.parametrize("streamer", ["standard", "speculative", "none"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_prints_the_answer_and_nothing_else(run, answers, streamer, strategy):
    result = run("--prompt", "Hello", "--streamer", streamer, "--generation_strategy", strategy, "--exit_layer", 2)
    assert result.exit_code == 0, result.output
    assert result.stdout == answers("Hello", generation_strategy=strategy, exit_layer=2)[0] + "\n"
    assert "\x1b" not in result.stdout + result.stderr


def test_table_says_what_ran(run):
    header, _, row = [line for line in run("--prompt", "Hello", "--exit_layer", 2).stderr.splitlines() if line.strip()]
    cells = dict(zip(header.replace("prefill ms", "prefill").split(), row.split(), strict=True))
    assert list(cells) == ["strategy", "E", "K", "tokens", "tok/s", "acceptance", "rounds", "prefill"]
    assert (cells["strategy"], cells["E"], cells["K"], cells["tokens"]) == ("self_speculative", "2", "3", "8")
    assert cells["acceptance"].endswith("%") and int(cells["rounds"]) > 0 and float(cells["prefill"]) > 0
    row = run("--prompt", "Hello", "--generation_strategy", "autoregressive").stderr.splitlines()[-2].split()
    assert row[:4] == ["autoregressive", "n/a", "n/a", "8"] and row[5:7] == ["n/a", "n/a"]


def test_profile_prints_the_phases(run, answers):
    result = run("--prompt", "Hello", "--profile", "--exit_layer", 2)
    assert result.exit_code == 0 and result.stdout == answers("Hello", exit_layer=2)[0] + "\n"
    for phase in ("draft layers", "draft head", "verify layers", "verify head", "accept", "roll back", "Python"):
        assert phase in result.stderr
    assert "verify head" not in run("--prompt", "Hello").stderr


def test_compare_prints_the_speed_up(run, answers):
    result = run("--prompt", "Hello", "--compare", "--exit_layer", 2)
    assert result.exit_code == 0 and result.stdout == answers("Hello", exit_layer=2)[0] + "\n"
    rows = [line.split() for line in result.stderr.splitlines()]
    plain = next(float(row[1]) for row in rows if row[:1] == ["autoregressive"])
    (speculative, ratio) = next((float(row[1]), float(row[2])) for row in rows if row[-1:] == ["x"])
    assert ratio == pytest.approx(speculative / plain, abs=0.02)
    assert ["same", "tokens"] in rows
    assert "x" not in {row[-1] for row in map(str.split, run("--prompt", "Hello").stderr.splitlines()) if row}


def test_rejection_draws_what_the_decoder_draws(run, answers):
    options = dict(sample=True, seed=42, temperature=1.5, verification="rejection", rejection_method="block")
    arguments = ("--sample", "--temperature", 1.5, "--verification", "rejection", "--rejection_method", "block")
    result = run("--prompt", "Hello", "--exit_layer", 2, *arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout == answers("Hello", exit_layer=2, **options)[0] + "\n"
    compared = run("--prompt", "Hello", "--compare", *arguments)
    assert compared.exit_code == 0 and "speed-up" in compared.stderr and "tokens: please" not in compared.stderr
    assert "needs sample=True" in sentence(run("--prompt", "Hello", "--verification", "rejection"))
    assert "which was not chosen" in sentence(run("--prompt", "Hello", "--rejection_method", "block"))


def test_drafts_that_end_early(run, answers):
    def drafted(*arguments):
        result = run("--prompt", "Hello", "--exit_layer", 2, *arguments, steps=24)
        assert result.exit_code == 0, result.output
        row = result.stderr.splitlines()[-2].split()
        return result.stdout, int(row[6])

    text, rounds = drafted()
    for arguments in (("--draft_confidence", 0.999), ("--adaptive_speculations",)):
        shorter, more = drafted(*arguments)
        assert shorter == text and more >= rounds
    assert drafted("--draft_confidence", 0.999)[1] > rounds
    assert sentence(run("--prompt", "Hello", "--draft_confidence", 2)) == "draft_confidence=2.0: must be in 0..1"


def test_several_prompts_stand_above_their_answers(run, answers, tmp_path):
    (tmp_path / "more.jsonl").write_text('{"prompt": "two\\nlines"}\n\n{"prompt": "three", "other": 1}\n')
    (tmp_path / "text.md").write_bytes("\ufefffour ü\r\n".encode())
    result = run("--prompt", "one", "--prompt_file", tmp_path / "more.jsonl", "--prompt_file", tmp_path / "text.md")
    assert result.exit_code == 0, result.output
    prompts = ["one", "two\nlines", "three", "four ü"]
    texts = answers(*prompts)
    expected = [f"[{i}/4] {prompt}\n{text}\n\n" for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True), 1)]
    assert result.stdout == "".join(expected)


def test_piped_standard_input_is_one_prompt(run, answers):
    assert run(stdin="two\nlines\n").stdout == answers("two\nlines")[0] + "\n"


def test_chat_applies_the_template_and_ends_at_the_tokenizers_eos(run, answers):
    ids = tiny_tokenizer()("<|user|>Hi<|assistant|>", add_special_tokens=False)["input_ids"]
    assert run("--prompt", "Hi", "--chat").stdout == answers(ids)[0] + "\n"


def test_sampling_follows_the_seed(run, answers):
    options = ["--prompt", "Hello", "--sample", "--temperature", 5, "--top_p", 1.0]
    first, again = run(*options).stdout, run(*options, "--seed", 42).stdout
    assert first == again == answers("Hello", sample=True, temperature=5.0, top_p=1.0, seed=42)[0] + "\n"
    assert run(*options, "--seed", 43).stdout != first
    assert run("--prompt", "Hello", "--sample", "False").stdout == answers("Hello")[0] + "\n"


def test_stops_at_any_of_the_words_and_tokens(checkpoint, run):
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, backend="reference")
    (ids,) = decoder.generate("Hello", max_new_tokens=8).sequences
    stop = ids[3]
    kept = decoder.tokenizer.decode(ids[: ids.index(stop) + 1])
    for given in (["--stop_token_ids", 0, stop], ["--stop_token_ids", stop, "--stop-token-ids=1"]):
        assert run("--prompt", "Hello", *given).stdout == kept + "\n"
    text = decoder.generate("Hello", max_new_tokens=8, stop_strings=["|", "k"]).text[0]
    assert text != decoder.tokenizer.decode(ids)
    assert run("--stop_words", "|", "k", "--prompt", "Hello").stdout == text + "\n"


def test_model_args_reach_the_decoder(run):
    assert "max_length=9" in sentence(run("--prompt", "Hello", "--model_args", "max_length=9"))
    assert sentence(run("--prompt", "x", "--model_args", "num_layers=2")).endswith(
        "quantization, draft_layers, draft_head, head_screen"
    )
    assert "both given" in sentence(run("--prompt", "x", "--model_args", "backend=cpu"))
    assert "'dtype' does not look like key=value" in run("--prompt", "x", "--model_args", "dtype").stderr


def test_autoregressive_with_an_exit_layer_says_how_ours_differs(run, answers):
    result = run("--prompt", "Hello", "--generation_strategy", "autoregressive", "--exit_layer", 1)
    assert "use --generation_strategy early_exit" in result.stderr
    assert result.stdout == answers("Hello")[0] + "\n"


def test_output_dir_gets_every_answer(run, answers, tmp_path):
    folder = tmp_path / "new" / "logs"
    assert run("--prompt", "one", "--prompt", "two", "--output_dir", folder).exit_code == 0
    (file,) = folder.iterdir()
    content = json.loads(file.read_text(encoding="utf-8"))
    (call,) = content["calls"]
    assert [answer["prompt"] for answer in call["answers"]] == ["one", "two"]
    assert [answer["text"] for answer in call["answers"]] == answers("one", "two")
    assert call["stats"]["tokens"] == sum(len(answer["tokens"]) for answer in call["answers"]) == 16
    assert content["settings"]["max_steps"] == 8


def test_most_tokens_under_the_name_of_transformers(run):
    result = run("--prompt", "one", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert result.stdout.rstrip("\n") == run("--prompt", "one", "--max_steps", 3).stdout.rstrip("\n")
    assert result.stdout != run("--prompt", "one").stdout


def test_refuses_prompts_that_are_none(run, tmp_path):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "bad.jsonl").write_text('{"prompt": "ok"}\n{"text": "x"}\n')
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    (tmp_path / "blank.jsonl").write_text("\n")
    assert sentence(run("--prompt", "a", "--prompt", "")) == "prompt 2 is empty"
    assert "there is no prompt" in sentence(run(stdin=" \n"))
    assert "byte 0xff at position 0" in sentence(run(stdin=b"\xff"))
    for name, words in {
        "empty.txt": "is empty",
        "latin.txt": "is not UTF-8 text (byte 0xe9 at position 3)",
        "bad.jsonl": 'line 2 must be an object with a text "prompt"',
        "broken.jsonl": "line 1 is not JSON",
        "blank.jsonl": "is empty",
        "none.txt": "does not exist",
        "": "is a folder",
    }.items():
        message = sentence(run("--prompt_file", tmp_path / name))
        assert words in message and str(tmp_path) in message


def test_refuses_what_the_decoder_refuses(run, untokenized):
    assert sentence(run("--prompt", "x", "--exit_layer", 40)) == "exit_layer=40: the model has 4 layers, choose 1..3"
    assert "num_speculations=99" in sentence(run("--prompt", "x", "--num_speculations", 99))
    assert "stop_token_ids=999" in sentence(run("--prompt", "x", "--stop_token_ids", 999))
    assert "top_p=3.0" in sentence(run("--prompt", "x", "--sample", "--top_p", 3))
    assert "/nowhere" in sentence(run("--prompt", "x", model="/nowhere"))
    assert "has no tokenizer" in sentence(run("--prompt", "x", model=untokenized))
    assert "has no chat template" in sentence(run("--prompt", "x", "--chat", model=str(_without_template(untokenized))))


def _without_template(folder):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    return folder


def test_refused_values_come_with_the_allowed_ones(run):
    def usage(*arguments):
        result = run("--prompt", "x", *arguments)
        assert result.exit_code == 2, result.output
        return result.stderr

    assert "Did you mean '--max_batch_size'" in usage("--max_batch_siz", 3)
    assert all(strategy in usage("--generation_strategy", "greedy") for strategy in STRATEGIES)
    assert "'maybe' is not True or False" in usage("--sample", "maybe")
    assert "x>=1" in usage("--max_steps", 0)
    assert "'gpu' is not auto, cpu, cuda or cuda:N" in usage("--device", "gpu")
    assert set(BACKENDS) == {"auto", *registry._MODULES}
    assert VERIFICATIONS == rejection.VERIFICATIONS and METHODS == REJECTION_METHODS


def test_debug_keeps_the_traceback(checkpoint):
    arguments = ["--debug", "generate", "--model", checkpoint, "--prompt", "x", "--exit_layer", "40"]
    assert isinstance(CliRunner().invoke(app, arguments).exception, ValueError)


class Session:
    """The command in a pseudo terminal."""

    def __init__(self, *arguments):
        master, slave = pty.openpty()
        command = [sys.executable, "-m", "layerskip_kernels", "generate", "--backend", "reference", *arguments]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )
        os.close(slave)
        self.master, self.output, self.seen = master, "", 0

    def wait_for_prompt_after(self, text: str) -> None:
        """What is typed before the prompt is there may be lost, as the line editor has not yet set up the terminal."""
        self._read(lambda: "> " in self._after(text))
        assert "> " in self._after(text), self.output
        self.seen = len(self.output)

    def _after(self, text: str) -> str:
        return self.output[self.seen :].partition(text)[2]

    def send(self, text: str) -> None:
        os.write(self.master, text.encode())

    def exit_code(self) -> int:
        self._read(lambda: False)
        os.close(self.master)
        return self.process.wait(60)

    def _read(self, done) -> None:
        end = time.monotonic() + 120
        while not done() and time.monotonic() < end:
            if select.select([self.master], [], [], 1)[0]:
                try:
                    self.output += os.read(self.master, 65536).decode(errors="replace")
                except OSError:  # how Linux reports that the other end is closed
                    return


def test_typed_prompts_keep_the_conversation_and_survive_an_error(checkpoint, tmp_path):
    options = ["--chat", "--streamer", "speculative", "--max_steps", "8", "--model_args", "max_length=50"]
    session = Session("--model", checkpoint, "--output_dir", str(tmp_path), *options)
    session.wait_for_prompt_after("Ctrl-D ends.")
    session.send("Hi\n")
    session.wait_for_prompt_after("written:")
    session.send("x" * 60 + "\n")
    session.wait_for_prompt_after("max_length=50")
    session.send("\nYou\n")
    session.wait_for_prompt_after("written:")
    session.send("\x04")
    assert session.exit_code() == 0, session.output
    assert "\x1b7" in session.output and "\x1b8\x1b[J" in session.output  # drafts were shown and taken back
    (file,) = tmp_path.iterdir()
    first, second = json.loads(file.read_text(encoding="utf-8"))["calls"]
    assert (first["answers"][0]["prompt"], second["answers"][0]["prompt"]) == ("Hi", "You")
    decoder = lk.SelfSpeculativeDecoder.from_pretrained(checkpoint, backend="reference")
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": first["answers"][0]["text"]},
        {"role": "user", "content": "You"},
    ]
    text = decoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = decoder.tokenizer(text, add_special_tokens=False)["input_ids"]
    assert decoder.generate([ids], max_new_tokens=8).sequences == [second["answers"][0]["tokens"]]


def test_ctrl_c_prints_what_there_is_and_exits_with_130(checkpoint):
    command = [sys.executable, "-m", "layerskip_kernels", "generate", "--model", checkpoint, "--backend", "reference"]
    process = subprocess.Popen(
        [*command, "--prompt", "Hello", "--max_steps", "100000", "--stop_token_ids", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )
    assert process.stdout.read(1)  # the answer has begun
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err.decode()
    assert out.endswith(b"\n") and b"self_speculative" in err and b"Traceback" not in err
