"""One training run from start to finish: data, training, the best exit. `layerskip train` is its command line."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from layerskip_kernels.models.hub import DEMO, checkpoint_folder
from layerskip_kernels.training.data import load_texts, pack
from layerskip_kernels.training.log import TrainingLog
from layerskip_kernels.training.parts import model_parts
from layerskip_kernels.training.trainer import LayerSkipArguments, LayerSkipTrainer


@dataclass
class TrainingRun:
    """What to train, and on what. `arguments` are keyword arguments of `LayerSkipArguments`."""

    output_dir: Path
    dataset: str
    model: str | None = None  # checkpoint to go on with, or
    config: str | None = None  # config.json of a new model
    tokenizer: str | None = None  # None: the model's, or the one beside the config
    heldout: str = "0.01"  # a data set, or the share of `dataset` to hold out
    text_field: str = "text"
    split: str = "train"
    sequence_length: int = 512
    lora_rank: int = 0
    resume: bool = False
    seed: int = 42
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.model == DEMO:
            self.model = str(checkpoint_folder(DEMO))

    def trainer(self) -> LayerSkipTrainer:
        """Everything loaded, nothing trained yet.

        Raises ValueError, TypeError or OSError for arguments, models and data that can't be used.
        """
        if (self.model is None) == (self.config is None):
            raise ValueError("give either model or config")
        checkpoint = self.last_checkpoint()
        if checkpoint and not self.resume:
            raise ValueError(f"output_dir={self.output_dir} has {Path(checkpoint).name}: resume it, or choose another")
        if self.resume and not checkpoint:
            raise ValueError(f"resume: {self.output_dir} has no checkpoint")
        gpu = torch.accelerator.is_available()
        arguments = LayerSkipArguments(
            output_dir=str(self.output_dir),
            seed=self.seed,
            disable_tqdm=True,
            use_cpu=not gpu,  # without it, processes on CPUs would not know of each other
            dataloader_pin_memory=gpu,
            **self.arguments,
        )
        tokenizer = self._tokenizer()
        with arguments.main_process_first(desc="data"):
            train, heldout = self._rows(tokenizer)
        set_seed(self.seed)
        model = self._model(tokenizer)
        trainer = LayerSkipTrainer(
            model,
            arguments,
            train_dataset=train,
            eval_dataset=heldout,
            processing_class=tokenizer,
            data_collator=stack,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(TrainingLog(self.output_dir))
        return trainer

    def last_checkpoint(self) -> str | None:
        return get_last_checkpoint(str(self.output_dir)) if self.output_dir.is_dir() else None

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        source = self.tokenizer or self.model or str(Path(self.config).parent)
        try:
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise ValueError(f"tokenizer={source}: no tokenizer can be read there") from error

    def _rows(self, tokenizer):
        texts = load_texts(self.dataset, text_field=self.text_field, split=self.split)
        try:
            share = float(self.heldout)
        except ValueError:
            heldout = load_texts(self.heldout, text_field=self.text_field, split=self.split)
        else:
            if not 0 < share < 1:
                raise ValueError(f"heldout={self.heldout}: choose a share above 0 and below 1, or a data set")
            if len(texts) < 2:
                raise ValueError(f"dataset={self.dataset} has a single text: name another one with heldout")
            parts = texts.train_test_split(test_size=share, seed=self.seed)
            texts, heldout = parts["train"], parts["test"]
        return pack(texts, tokenizer, self.sequence_length), pack(heldout, tokenizer, self.sequence_length)

    def _model(self, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
        if self.model:
            model = AutoModelForCausalLM.from_pretrained(
                self.model, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
            )
        else:
            from transformers import AutoConfig

            config = AutoConfig.from_pretrained(self.config, trust_remote_code=False)
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
        model_parts(model)
        if len(tokenizer) > model.config.vocab_size:
            raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}")
        if self.lora_rank:
            from peft import LoraConfig, get_peft_model

            lora = LoraConfig(r=self.lora_rank, lora_alpha=2 * self.lora_rank, target_modules="all-linear")
            model = get_peft_model(model, lora)
        return model


def stack(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """A batch of rows of one length."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def save(trainer: LayerSkipTrainer, folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Writes the trained model as a plain transformers checkpoint: adapters merged, in `dtype`. Returns it."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    if hasattr(model, "merge_and_unload"):
        model = model.merge_and_unload()
    model = model.to(dtype).eval()
    model.config.use_cache = True  # training had switched it off
    model.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    return model
