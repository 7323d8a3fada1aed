import json
import os
import socket
import subprocess
import sys

import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_model

from layerskip_kernels.training import LayerSkipArguments, LayerSkipTrainer
from layerskip_kernels.training.early_exit_loss import early_exit_loss

TEXT = (
    b"The early layers draft, the late layers verify. One model, one cache. "
    b"A draft that the whole model agrees with is kept; the rest is rolled back. "
) * 8


def examples(length=24, count=24):
    ids = [6 + byte for byte in TEXT]
    rows = [ids[start : start + length] for start in range(0, length * count, length)]
    # uneven targets, so that a mean of means would not be the mean over tokens
    return [
        dict(input_ids=row, attention_mask=[1] * length, labels=[-100] * (3 * (n % 5)) + row[3 * (n % 5) :])
        for n, row in enumerate(rows)
    ]


def collate(rows):
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}


def trainer(model, path, rows=None, **options):
    options = (
        dict(
            output_dir=str(path),
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            per_device_train_batch_size=4,
            learning_rate=3e-3,
            logging_steps=2,
            save_strategy="no",
            max_steps=8,
            layer_dropout=0.2,
            e_scale=1.0,
            curriculum_interval=2,
            seed=11,
        )
        | options
    )
    rows = rows or examples()
    return LayerSkipTrainer(
        model, LayerSkipArguments(**options), data_collator=collate, train_dataset=rows, eval_dataset=rows[:4]
    )


def logs(run):
    return [entry for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_end_to_end(tmp_path, bf16):
    """Dropout, rotation, checkpointing and accumulation together; then the model is as one never wrapped."""
    model = tiny_model("llama2")
    run = trainer(
        model, tmp_path, gradient_checkpointing=True, gradient_accumulation_steps=2, max_steps=10, bf16=bf16,
        eval_strategy="steps", eval_steps=5,
    )  # fmt: skip
    run.train()
    history = logs(run)
    # interval 2 and the last layer: layers 0 (weight 0), 2, 3 and layers 1, 3 in turn
    assert all({f"exit_{e}_loss" for e in (2, 3, 4)} == {k for k in e if k.startswith("exit")} for e in history)
    for name in ("loss", "exit_2_loss", "exit_3_loss", "exit_4_loss"):
        assert history[-1][name] < 0.8 * history[0][name], name
    assert len([e for e in run.state.log_history if "eval_loss" in e]) == 2

    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers)
    model = run.accelerator.unwrap_model(model, keep_fp32_wrapper=False)  # Accelerate's own autocast, of any Trainer
    fresh = tiny_model("llama2", seed=9)
    fresh.load_state_dict(model.state_dict())
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(model.eval()(ids).logits, fresh(ids).logits)


def test_accumulation_weighs_tokens(tmp_path):
    """Four micro-batches of one step give the gradient of the whole batch, and its loss is logged."""
    found = {}
    for size, accumulation in ((8, 1), (2, 4)):
        model = tiny_model("llama2")
        run = trainer(
            model, tmp_path, examples(count=8), max_steps=1, logging_steps=1, layer_dropout=0, curriculum="all",
            per_device_train_batch_size=size, gradient_accumulation_steps=accumulation, optim="sgd", max_grad_norm=0,
            lr_scheduler_type="constant", learning_rate=1.0,
        )  # fmt: skip
        run.train()
        found[size] = logs(run)[0], [p.detach() for p in model.parameters()]
    (one, parameters), (many, same) = found.values()
    for a, b in zip(parameters, same, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)
    model = tiny_model("llama2")
    expected = early_exit_loss(model, collate(examples(count=8)), layers=range(4), e_scale=1.0)
    for log in (one, many):
        assert log["loss"] == pytest.approx(expected.loss.item(), rel=1e-5)
        for layer, loss in zip(expected.layers, expected.exit_losses):
            assert log[f"exit_{layer + 1}_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_curriculum_follows_the_optimizer_step(tmp_path, monkeypatch):
    seen = []

    def recorded(*args, layers, **kwargs):
        seen.append(layers)
        return early_exit_loss(*args, layers=layers, **kwargs)

    monkeypatch.setattr("layerskip_kernels.training.trainer.early_exit_loss", recorded)
    trainer(tiny_model("llama2"), tmp_path, gradient_accumulation_steps=2, max_steps=4, curriculum_interval=3).train()
    assert seen == [(0, 3), (0, 3), (1, 3), (1, 3), (2, 3), (2, 3), (0, 3), (0, 3)]
    seen.clear()
    trainer(tiny_model("llama2"), tmp_path, max_steps=4, curriculum="gradual").train()
    assert seen == [(3,), (1, 2, 3), (0, 1, 2, 3), (0, 1, 2, 3)]


def test_a_resumed_run_ends_where_the_whole_run_ends(tmp_path):
    options = dict(max_steps=6, layer_dropout=0.5, layer_dropout_schedule="exponential", logging_steps=1)
    whole = trainer(tiny_model("llama2"), tmp_path / "whole", save_strategy="steps", save_steps=3, **options)
    whole.train()
    resumed = trainer(tiny_model("llama2", seed=5), tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    for a, b in zip(logs(whole), logs(resumed), strict=True):
        assert a["loss"] == b["loss"]
    for a, b in zip(whole.model.parameters(), resumed.model.parameters()):
        assert torch.equal(a, b)


def test_lora(tmp_path):
    """Only the adapters learn; what they are merged into is a plain model that exits better."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama2")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear"))
    run = trainer(model, tmp_path, max_steps=12, learning_rate=1e-2, gradient_checkpointing=True)
    run.train()
    history = logs(run)
    assert history[-1]["exit_2_loss"] < 0.9 * history[0]["exit_2_loss"]
    for name, value in model.get_base_model().state_dict().items():
        if "lora" not in name:
            assert torch.equal(value, before[name.replace(".base_layer", "")]), name
    merged = model.merge_and_unload()
    losses = early_exit_loss(merged, collate(examples()), layers=(1, 3), e_scale=1.0).exit_losses
    fresh = early_exit_loss(tiny_model("llama2"), collate(examples()), layers=(1, 3), e_scale=1.0).exit_losses
    assert (losses < 0.9 * fresh).all()


def test_an_adapter_on_the_head_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model("llama2"), LoraConfig(target_modules=["lm_head", "q_proj"]))
    with pytest.raises(ValueError, match=r"^lm_head is a Linear: .*leave it out of adapters and quantization$"):
        trainer(model, tmp_path)


def test_an_error_while_training_restores_the_model(tmp_path):
    model, rows = tiny_model("llama2"), examples()
    for row in rows:
        row["labels"] = [VOCAB_SIZE] * len(row["labels"])
    with pytest.raises(ValueError, match=rf"choose 0..{VOCAB_SIZE - 1}"):
        trainer(model, tmp_path, rows).train()
    assert not any("forward" in vars(layer) or layer._forward_hooks for layer in model.model.layers)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(layer_dropout=1.2), r"layer_dropout=1.2: choose 0\.\.1$"),
        (dict(layer_dropout_schedule="linear"), "layer_dropout_schedule='linear': choose constant, exponential$"),
        (dict(curriculum="some"), "curriculum='some': choose all, rotational, gradual$"),
        (dict(curriculum_interval=9), r"curriculum_interval=9: the model has 4 layers, choose 1\.\.4$"),
        (dict(e_scale=-1.0), "e_scale=-1.0: must be >= 0$"),
        (dict(distill_weight=-1.0), "distill_weight=-1.0: must be >= 0$"),
        (dict(distill_temperature=0.0), "distill_temperature=0.0: must be > 0$"),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match="^" + message):
        trainer(tiny_model("llama2"), tmp_path, **options)


WORKER = """
import json, sys
sys.path[:0] = {path!r}
import torch
torch.set_num_threads(1)
from test_training_trainer import examples, logs, tiny_model, trainer

for name, options in json.loads({runs!r}).items():
    model = tiny_model("llama2")
    run = trainer(model, {out!r}, examples(count=8), **options)
    run.train()
    if run.is_world_process_zero():
        torch.save([p.detach() for p in model.parameters()], {out!r} + f"/{{name}}.pt")
        json.dump(logs(run), open({out!r} + f"/{{name}}.json", "w"))
"""


def test_two_processes(tmp_path):
    """torchrun. Without dropout two ranks of 4 samples learn what one of 8 does, also at steps that don't enable the
    last layer. With dropout, ranks of one sample disagree about which layers have gradients, and finish."""
    sgd = dict(optim="sgd", learning_rate=0.1, max_grad_norm=0, lr_scheduler_type="constant")
    equal = dict(max_steps=3, logging_steps=1, layer_dropout=0, curriculum_include_last=False, **sgd)
    dropping = dict(max_steps=3, layer_dropout=1.0, per_device_train_batch_size=1, gradient_checkpointing=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    runs = json.dumps({"equal": equal | dict(per_device_train_batch_size=4), "dropping": dropping})
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(path=sys.path, out=str(tmp_path), runs=runs))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}", script]
    done = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    assert done.returncode == 0, done.stderr[-3000:]

    model = tiny_model("llama2")
    run = trainer(model, tmp_path / "one", examples(count=8), **equal, per_device_train_batch_size=8)
    run.train()
    for log, single in zip(json.loads((tmp_path / "equal.json").read_text()), logs(run), strict=True):
        assert log.keys() == single.keys()
        for name in single:
            if name.endswith("loss"):
                assert log[name] == pytest.approx(single[name], rel=1e-4), name
    for a, b in zip(torch.load(tmp_path / "equal.pt"), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), atol=1e-5, rtol=1e-4)
    assert json.loads((tmp_path / "dropping.json").read_text())
