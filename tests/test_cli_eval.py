"""`layerskip eval` on local tasks: scores, statistics, what is written, interruption and refusals."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import lm_eval.tasks
import pytest
from cli_examples import examples
from click.testing import CliRunner
from tiny_models import tiny_checkpoint

from layerskip_kernels.cli import app
from layerskip_kernels.decode.generate import Generation

PAGE = (Path(__file__).parent.parent / "docs" / "eval.md").read_text(encoding="utf-8")
CHOICES = """
task: legs
dataset_path: json
dataset_kwargs: {data_files: {test: legs.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{animal}}:"
doc_to_choice: ["two", "four", "eight legs"]
doc_to_target: "{{legs}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
task: words
dataset_path: json
dataset_kwargs: {data_files: {test: legs.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{animal}}"
metric_list: [{metric: byte_perplexity}]
"""
GROUP = "{group: animals, task: [legs, words]}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "llama2", late_scale=0.1))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The files of the page, and tasks that are rated."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # which takes seconds
    for kind in ("yaml", "json"):
        (text,) = re.findall(rf"```{kind}\n(.*?)```", PAGE, re.DOTALL)
        Path({"yaml": "python_lines.yaml", "json": "python_lines.jsonl"}[kind]).write_text(text)
    for name, text in {"legs": CHOICES, "words": ROLLING, "animals": GROUP}.items():
        Path(f"{name}.yaml").write_text(text)
    animals = [{"animal": name, "legs": legs} for name, legs in (("hen", 0), ("cow", 1), ("spider", 2))]
    Path("legs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in animals))
    return tmp_path


@pytest.fixture
def few_tasks(monkeypatch):
    """Whether lm_eval's own tasks were asked for, each time; there are none of them here, as they take seconds."""
    asked = []

    class Few(lm_eval.tasks.TaskManager):
        def __init__(self, include_defaults=True, **options):
            asked.append(include_defaults)
            super().__init__(include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", Few)
    return asked


def run(*arguments):
    arguments = ["eval", *map(str, arguments)]
    return CliRunner().invoke(app, arguments, prog_name="layerskip", env={"COLUMNS": "60"})


def reports(folder):
    found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return found[0] if len(found) == 1 else found


def test_speculation_changes_no_score():
    page = Path("python_lines.jsonl").read_text()
    nobody = {**json.loads(page.splitlines()[0]), "end": "what no model says"}  # so that the score is not the best one
    Path("python_lines.jsonl").write_text(page.rstrip() + "\n" + json.dumps(nobody) + "\n")
    found = []
    for strategy in ("self_speculative", "autoregressive"):
        out = f"new/{strategy}"
        result = run(
            "--tasks", "python_lines.yaml", "--generation_strategy", strategy, "--log_samples", "--output_dir", out
        )
        assert result.exit_code == 0, result.output
        found.append((result.stdout, *reports(out)))
    (shown, drafted, answers), (_, plain, plain_answers) = found
    assert drafted["results"] == plain["results"]
    rows, plain_rows = answers["python_lines"], plain_answers["python_lines"]
    right = sum(row["resps"] == [[row["doc"]["end"]]] for row in rows)
    score = drafted["results"]["python_lines"]["exact_match,none"]
    assert 3 <= right < 7 and score == pytest.approx(right / 7) and f"{score:.4f}" in shown
    assert [row["resps"] for row in rows] == [row["resps"] for row in plain_rows]
    assert all(text and "\n" not in text for row in rows for (text,) in row["resps"])
    made = drafted["config"]["layerskip"]["generation"]
    assert made["answers"] == 7 and 0 < made["acceptance_rate"] <= 1 < made["tokens_per_round"]
    assert f"{made['acceptance_rate']:.1%}" in shown and f"{made['tokens_per_round']:.2f}" in shown
    assert "acceptance_rate" not in plain["config"]["layerskip"]["generation"]
    assert drafted["settings"]["tasks"] == ["python_lines.yaml"] and drafted["config"]["model"] == "layerskip"


def test_rated_tasks_by_name_pattern_and_group(checkpoint, few_tasks):
    found = []
    for tasks in (["legs", "words"], ["legs,w*rds"], ["animals"]):
        out = f"out{len(found)}"
        arguments = ["--tasks", *tasks, "--include_path", ".", "--output_dir", out, "--model", checkpoint]
        result = run(*arguments, "--limit", 2)
        assert result.exit_code == 0, result.output
        found.append(reports(out))
        assert found[-1]["n-samples"]["legs"]["effective"] == 2
        rated = found[-1]["config"]["layerskip"]["loglikelihood"]
        assert rated["texts"] == 2 * 3 + 2 and "texts/s" in result.stdout
        assert "legs" in result.stdout and "byte_perplexity" in result.stdout
        for name in ("legs", "words"):
            scores = [{key: value for key, value in report["results"][name].items() if "," in key} for report in found]
            assert scores[0] and scores[-1] == scores[0]
    assert few_tasks == [False, False, False, True]  # lm_eval's own tasks only for groups


def test_the_chat_template_is_asked_for(checkpoint):
    arguments = ["--tasks", "python_lines.yaml", "--model", checkpoint, "--limit", 1, "--num_fewshot", 1]
    result = run(*arguments, "--apply_chat_template", "--system_instruction", "Be brief.", "--log_samples")
    assert result.exit_code == 0, result.output
    _, samples = reports("logs")
    (((prompt, _),),) = (row["arguments"] for row in samples["python_lines"])
    assert prompt.startswith("<|system|>Be brief.<|user|>") and prompt.count("<|assistant|>") == 2


def test_gen_kwargs_and_seed(checkpoint):
    answers = []
    for seed in (1, 1, 2):
        out = f"out{len(answers)}"
        kwargs = '{"do_sample": true, "temperature": 1.5, "until": []}'
        arguments = ["--tasks", "python_lines.yaml", "--model", checkpoint, "--gen_kwargs", kwargs, "--log_samples"]
        result = run(*arguments, "--max_gen_toks", 9, "--seed", seed, "--output_dir", out)
        assert result.exit_code == 0, result.output
        found, samples = reports(out)
        assert found["configs"]["python_lines"]["generation_kwargs"]["max_gen_toks"] == 9
        assert found["config"]["layerskip"]["generation"]["tokens"] <= 6 * 9
        answers.append([row["resps"] for row in samples["python_lines"]])
    assert answers[0] == answers[1] != answers[2]


def test_interrupted_it_writes_nothing_and_goes_on_from_the_cache(monkeypatch):
    started = []
    start = Generation._start

    def interrupted(self, requests):
        started.extend(requests)
        if len(started) == 3:
            raise KeyboardInterrupt
        start(self, requests)

    arguments = ["--tasks", "python_lines.yaml", "--max_batch_size", 1]
    assert run(*arguments, "--output_dir", "whole").exit_code == 0
    arguments += ["--use_cache", "answers"]
    monkeypatch.setattr(Generation, "_start", interrupted)
    result = run(*arguments)
    assert result.exit_code == 130 and "interrupted" in result.stderr, result.output
    assert not list(Path("logs").iterdir())
    monkeypatch.setattr(Generation, "_start", start)
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    found = reports("logs")
    assert found["config"]["layerskip"]["generation"]["answers"] == 6 - 2
    assert found["results"] == reports("whole")["results"]


def test_the_examples_work_as_printed():
    found = examples("eval")
    assert len(found) == 3
    for arguments in found:
        result = run(*arguments)
        assert result.exit_code == 0, result.output


def test_the_python_of_the_page_runs_as_printed(few_tasks, monkeypatch, capsys):
    monkeypatch.setattr("lm_eval.evaluator.TaskManager", lm_eval.tasks.TaskManager)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(block, {})
    assert 0 < float(capsys.readouterr().out) <= 1 and few_tasks


def test_the_command_of_lm_eval(checkpoint, folder):
    # lm_eval's own tasks take seconds to find
    program = (
        "import functools, runpy, lm_eval.tasks as t, lm_eval.evaluator as e\n"
        "t.TaskManager = functools.partial(t.TaskManager, include_defaults=False)\n"
        "e.add_env_info = lambda results: None\n"
        "runpy.run_module('layerskip_kernels.integrations.lm_eval', run_name='__main__', alter_sys=True)"
    )
    model = f"pretrained={checkpoint},exit_layer=2,num_speculations=3"
    arguments = ["--model", "layerskip", "--model_args", model, "--tasks", "legs.yaml", "--device", "cpu"]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments, "--output_path", "out"],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"\|legs\s*\|", done.stdout)
    (path,) = Path("out").rglob("results_*.json")
    ran = json.loads(path.read_text())["config"]["layerskip"]
    assert ran["exit_layer"] == 2 and ran["num_speculations"] == 3 and ran["loglikelihood"]["texts"] == 9


def test_without_lm_eval_it_says_what_to_install(monkeypatch):
    found = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "lm_eval" else found(name))
    result = run("--tasks", "python_lines.yaml")
    assert result.exit_code == 2
    assert result.stderr == 'layerskip: lm_eval is not installed: pip install "layerskip_kernels[eval]"\n'


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "nowhere.yaml"], "--tasks nowhere.yaml: there is no such file"),
        (["--tasks", "legs.yaml", "--limit", 0], "--limit 0: must be above 0"),
        (["--tasks", "legs.yaml", "--fewshot_as_multiturn"], "--fewshot_as_multiturn: needs --apply_chat_template"),
        (["--tasks", "legs.yaml", "--gen_kwargs", "warm"], "--gen_kwargs 'warm': does not look like key=value"),
        (["--tasks", "legs.yaml", "--gen_kwargs", "{'a'"], "--gen_kwargs {'a': is not JSON"),
        (["--tasks", "legs.yaml", "--output_dir", "legs.yaml"], "legs.yaml"),
        (["--tasks", "legs.yaml", "--exit_layer", 4], "exit_layer=4: the model has 4 layers, choose 1..3"),
        (["--tasks", "broken.yaml"], "broken.yaml"),
        (["--tasks", "lost.yaml"], "lost.jsonl"),
        (["--tasks", "animals.yaml"], "animals.yaml: a group goes by its name, with --include_path for its folder"),
        (["--tasks", "undefined.yaml"], "--tasks undefined.yaml: UndefinedError: 'nothing' is undefined"),
        (["--tasks", "gap.yaml"], "a task's template: 'None' has no attribute 'upper'"),
        (["--tasks", "python_lines.yaml", "--gen_kwargs", "num_beams=3"], "generation_kwargs num_beams=3: choose from"),
        (["--tasks", "python_lines.yaml", "--max_gen_toks", 512], "max_gen_toks=512: the model takes 512 tokens"),
    ],
)
def test_bad_input(checkpoint, arguments, message):
    Path("broken.yaml").write_text("task: [unclosed")
    Path("lost.yaml").write_text(CHOICES.replace("legs.jsonl", "lost.jsonl"))
    Path("undefined.yaml").write_text(CHOICES.replace("{{animal}}", "{{nothing}}"))
    Path("gap.yaml").write_text(CHOICES.replace("{{animal}}", "{{animal.upper()}}").replace("legs.jsonl", "gap.jsonl"))
    Path("gap.jsonl").write_text(Path("legs.jsonl").read_text() + '{"animal": null, "legs": 1}\n')
    result = run("--model", checkpoint, *arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr and "Traceback" not in result.stderr
    assert not list(Path().glob("logs/*"))


def test_an_unknown_task_is_named_with_near_ones(few_tasks):
    result = run("--tasks", "pithon_lines", "--include_path", ".")
    assert result.exit_code == 2
    assert "--tasks pithon_lines: there is no such task; did you mean python_lines?" in result.stderr
    result = run("--tasks", "qqqq", "--include_path", ".")
    assert "--tasks qqqq: there is no such task; `lm_eval ls tasks` lists them" in result.stderr
    assert few_tasks == [False, True, False, True]
