"""`load_checkpoint`: every layout a checkpoint comes in, and one sentence for every way it can be wrong."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import tiny_models
import torch
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import load_file, save_file
from tiny_models import edit_json, tiny_checkpoint

from layerskip_kernels.models import load_checkpoint
from layerskip_kernels.models.weights import layer_tensors, tensor_shapes


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of this module, saved once; tests that damage one work on a copy."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny_checkpoint(root / "tied", "smollm2")
    tiny_checkpoint(root / "untied", "llama2")
    tiny_checkpoint(root / "sharded", "llama2", max_shard_size="200KB")
    return root


@pytest.fixture
def copy_of(folders, tmp_path):
    def copy(name):
        return Path(shutil.copytree(folders / name, tmp_path / name))

    return copy


def rewrite(folder, change):
    """Saves the single safetensors file of a folder again after `change` edited its dictionary of tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def saved_weights(model):
    """Named tensors of a transformers model, as the loader should find them."""
    return {name: parameter.detach() for name, parameter in model.named_parameters(remove_duplicate=False)}


def loaded_weights(loaded):
    names = {"model.embed_tokens.weight": loaded.weights.embedding, "model.norm.weight": loaded.weights.final_norm}
    names["lm_head.weight"] = loaded.weights.lm_head
    for index, layer in enumerate(loaded.weights.layers):
        for field, (name, _) in layer_tensors(loaded.config).items():
            names[f"model.layers.{index}.{name}"] = getattr(layer, field)
    return names


def check_equal(loaded, model):
    found, expected = loaded_weights(loaded), saved_weights(model)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype, name


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_every_tensor_of_every_family(family, tmp_path):
    loaded = load_checkpoint(tiny_checkpoint(tmp_path, family, tokenizer=False))
    model = tiny_models.tiny_model(family)
    check_equal(loaded, model)
    assert (loaded.weights.lm_head is loaded.weights.embedding) == model.config.tie_word_embeddings
    assert [layer.sliding_window for layer in loaded.weights.layers] == list(loaded.config.sliding_windows)
    assert [layer.use_rope for layer in loaded.weights.layers] == list(loaded.config.use_rope)
    assert loaded.weights.lm_head_bias is None and loaded.tokenizer is None and loaded.path == tmp_path


def test_biases_of_llama(tmp_path):
    overrides = {"attention_bias": True, "mlp_bias": True}
    loaded = load_checkpoint(tiny_checkpoint(tmp_path, "llama2", tokenizer=False, **overrides))
    check_equal(loaded, tiny_models.tiny_model("llama2", **overrides))
    assert loaded.weights.layers[0].down_bias.shape == (64,)


def test_sharded_equals_single(folders):
    shards = sorted(path.name for path in (folders / "sharded").glob("*.safetensors"))
    assert len(shards) > 2
    single, sharded = load_checkpoint(folders / "untied"), load_checkpoint(folders / "sharded")
    for name, tensor in loaded_weights(single).items():
        assert torch.equal(loaded_weights(sharded)[name], tensor), name


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_auto_is_the_checkpoints_own(stored, tmp_path):
    loaded = load_checkpoint(tiny_checkpoint(tmp_path, "llama2", stored, tokenizer=False))
    assert loaded.config.dtype == stored
    check_equal(loaded, tiny_models.tiny_model("llama2", stored))


def test_dtype_auto_without_one_in_the_configuration(tmp_path):
    tiny_checkpoint(tmp_path, "llama2", torch.float16, tokenizer=False)
    edit_json(tmp_path / "config.json", dtype=None, torch_dtype=None)
    assert load_checkpoint(tmp_path).config.dtype == torch.float16


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_given_dtype(folders, dtype):
    loaded = load_checkpoint(folders / "tied", dtype=dtype)
    assert loaded.config.dtype == torch.bfloat16
    check_equal(loaded, tiny_models.tiny_model("smollm2", torch.bfloat16))


def test_unknown_dtype(folders):
    with pytest.raises(ValueError, match="dtype=int8 is not supported, choose float32, float16 or bfloat16"):
        load_checkpoint(folders / "tied", dtype="int8")


def test_norms_stored_in_float32_take_the_models_dtype(tmp_path):
    tiny_checkpoint(tmp_path, "llama2", torch.bfloat16, tokenizer=False)

    def widen(tensors):
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    rewrite(tmp_path, widen)
    assert load_checkpoint(tmp_path).weights.final_norm.dtype == torch.bfloat16


def test_weights_are_mapped_not_copied(tmp_path):
    tiny_checkpoint(tmp_path, "llama2", tokenizer=False, intermediate_size=40_000)
    size = (tmp_path / "model.safetensors").stat().st_size
    before = anonymous_memory()
    loaded = load_checkpoint(tmp_path)
    grown = anonymous_memory() - before
    assert size > 100e6 and grown < size / 4
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    assert loaded.weights.layers[3].down.shape == (64, 40_000)


def anonymous_memory():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def test_tied_checkpoint_that_stores_the_same_head_twice(copy_of):
    folder = copy_of("tied")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    loaded = load_checkpoint(folder)
    assert loaded.config.tie_word_embeddings and loaded.weights.lm_head is loaded.weights.embedding


def test_tied_checkpoint_with_another_head_keeps_it(copy_of):
    folder = copy_of("tied")
    rewrite(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1}))
    loaded = load_checkpoint(folder)
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.weights.lm_head, loaded.weights.embedding + 1)


@pytest.mark.parametrize("case", ["tied", "untied", "converted"])
def test_the_head_that_copies_are_made_from_has_a_mapping_of_its_own(case, tmp_path):
    folder = tiny_checkpoint(tmp_path, "llama2", dtype=torch.bfloat16, tie_word_embeddings=case == "tied")
    loaded = load_checkpoint(folder, dtype="float32" if case == "converted" else "auto")
    head = loaded.head_to_copy()
    assert torch.equal(head, loaded.weights.lm_head)
    assert (head.data_ptr() == loaded.weights.lm_head.data_ptr()) == (case == "converted")


def test_rotary_frequencies_of_old_checkpoints_are_left_out(copy_of):
    folder = copy_of("untied")
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    check_equal(load_checkpoint(folder), tiny_models.tiny_model("llama2"))


def test_tokenizer_and_chat_template(folders):
    tokenizer = load_checkpoint(str(folders / "tied")).tokenizer
    ids = tokenizer("héllo").input_ids
    assert ids[0] == 1 and tokenizer.decode(ids[1:]) == "héllo"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>hi<|assistant|>"
    assert tokenizer(chat, add_special_tokens=False).input_ids[0] == tiny_models.SPECIAL_TOKENS.index("<|user|>")


def test_end_of_sequence_ids_of_the_generation_config(copy_of):
    folder = copy_of("tied")
    edit_json(folder / "generation_config.json", eos_token_id=[2, 17])
    assert load_checkpoint(folder).config.eos_token_ids == (2, 17)
    (folder / "generation_config.json").unlink()
    assert load_checkpoint(folder).config.eos_token_ids == (2,)


def rename(folder, tensor, new):
    rewrite(folder, lambda tensors: tensors.update({new: tensors.pop(tensor)}))


def truncate(folder):
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def scramble(folder):
    (folder / "model.safetensors").write_bytes(b"not a checkpoint at all, but long enough to have a header")


def only_pickle(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def only_gguf(folder):
    (folder / "model.safetensors").rename(folder / "model-q4.gguf")


DOWN = "model.layers.1.mlp.down_proj.weight"
BROKEN = {
    "missing tensor": (lambda f: rewrite(f, lambda t: t.pop(DOWN)), rf"model\.safetensors has no tensor {DOWN}"),
    "missing head": (lambda f: edit_json(f / "config.json", tie_word_embeddings=False), "has no tensor lm_head.weight"),
    "shape": (
        lambda f: rewrite(f, lambda t: t.update({DOWN: t[DOWN][:, :-1].contiguous()})),
        rf"{DOWN} in .*model\.safetensors has shape \[48, 111\], the configuration says \[48, 112\]",
    ),
    "more layers": (
        lambda f: edit_json(f / "config.json", num_hidden_layers=3),
        r"model\.safetensors has a tensor model\.layers\.3\..*, which its configuration does not describe",
    ),
    "bias": (
        lambda f: rewrite(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(48)})),
        r"has a tensor model\.layers\.0\.self_attn\.q_proj\.bias, which its configuration does not",
    ),
    "integer weights": (
        lambda f: rewrite(f, lambda t: t.update({DOWN: t[DOWN].to(torch.int8)})),
        rf"{DOWN} in .*model\.safetensors is stored as I8, only F32, F16 and BF16 are supported",
    ),
    "truncated": (truncate, r"model\.safetensors is damaged or not a safetensors file"),
    "scrambled": (scramble, r"model\.safetensors is damaged or not a safetensors file"),
    "pickle": (only_pickle, r"weights in pytorch_model\.bin, only safetensors are loaded; convert .*save_pretrained"),
    "gguf": (only_gguf, r"model-q4\.gguf: GGUF files are not supported"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has neither model.safetensors nor model.safetensors"),
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json, so it is not a Hugging Face checkpoint"),
    "config not json": (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
    "config a list": (
        lambda f: (f / "config.json").write_text("[]"),
        r"config\.json must hold a JSON object",
    ),
    "model type": (
        lambda f: edit_json(f / "config.json", model_type="gpt2"),
        r"config\.json: model_type='gpt2'",
    ),
    "no model type": (lambda f: edit_json(f / "config.json", model_type=None), "model_type=None is not supported"),
    "remote code": (
        lambda f: edit_json(f / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"}),
        r"config\.json: auto_map=.* code of a checkpoint is never run",
    ),
    "quantized": (
        lambda f: edit_json(f / "config.json", quantization_config={"quant_method": "bitsandbytes"}),
        r"config\.json: quantization_config \(quant_method='bitsandbytes'\) is not supported",
    ),
    "rope without factor": (
        lambda f: edit_json(f / "config.json", rope_parameters={"rope_type": "linear", "rope_theta": 1e4}),
        r"config\.json: .*Missing required keys.*factor",
    ),
    "wrong type": (lambda f: edit_json(f / "config.json", hidden_size="big"), r"config\.json: .*hidden_size"),
    "recorded exit": (
        lambda f: edit_json(f / "config.json", layerskip={"exit_layer": 4}),
        r"config\.json: layerskip\.exit_layer=4 in config\.json: the model has 4 layers, choose 1\.\.3",
    ),
    "tokenizer": (
        lambda f: (f / "tokenizer.json").write_text('{"model": {"type": "Spell"}}'),
        "the tokenizer in .* cannot be read",
    ),
    "generation config": (
        lambda f: (f / "generation_config.json").write_text("nope"),
        r"generation_config\.json is not valid JSON",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(case, copy_of):
    damage, message = BROKEN[case]
    folder = copy_of("tied")
    damage(folder)
    with pytest.raises(ValueError, match=message) as raised:
        load_checkpoint(folder)
    assert str(folder) in str(raised.value)


def drop_shard(folder, index):
    (folder / sorted(set(index["weight_map"].values()))[-1]).unlink()


def move_tensor(folder, index):
    index["weight_map"][DOWN] = index["weight_map"]["model.norm.weight"]
    assert sorted(set(index["weight_map"].values()))[-1] == index["weight_map"]["model.norm.weight"]


def escape(folder, index):
    index["weight_map"][DOWN] = "../model.safetensors"


def forget_map(folder, index):
    del index["weight_map"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (drop_shard, r"index\.json names the file model-.*\.safetensors, which is missing: the download is incomplete"),
        (
            move_tensor,
            rf"model-.*\.safetensors has no tensor {DOWN}, which model\.safetensors\.index",
        ),
        (escape, r"names the file '\.\./model\.safetensors', which is not in its folder"),
        (forget_map, "has no weight_map naming the file of each tensor"),
    ],
)
def test_broken_shards(damage, message, copy_of):
    folder = copy_of("sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    damage(folder, index)
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=message):
        load_checkpoint(folder)


def test_missing_tensor_of_a_sharded_checkpoint_names_the_index(copy_of):
    folder = copy_of("sharded")
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"][DOWN]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=rf"index\.json has no tensor {DOWN}"):
        load_checkpoint(folder)


def test_not_a_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"")
    with pytest.raises(ValueError, match="is a file, give the folder that holds"):
        load_checkpoint(file)
    with pytest.raises(ValueError, match="GGUF files are not supported"):
        load_checkpoint(tmp_path / "model.gguf")
    with pytest.raises(ValueError, match="is neither an existing folder nor the id of a model on the hub"):
        load_checkpoint(tmp_path / "nowhere")


def hub_error(kind):
    if kind is LocalEntryNotFoundError:
        return kind("cannot find the requested files in the local cache\nand more")
    return kind("refused", response=SimpleNamespace(headers={}, request=None))


@pytest.mark.parametrize(
    ("kind", "raised", "message"),
    [
        (GatedRepoError, PermissionError, "model is gated on the hub: accept its licence .* `hf auth login`"),
        (RepositoryNotFoundError, ConnectionError, "'someone/model' is neither an existing folder nor a model on"),
        (HfHubHTTPError, ConnectionError, "'someone/model' is not an existing folder, .* not be reached .*: refused$"),
        (LocalEntryNotFoundError, ConnectionError, "is not an existing folder, and the hub .* the local cache$"),
    ],
)
def test_hub_says_no(kind, raised, message, monkeypatch):
    def download(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(raised, match=message):
        load_checkpoint("someone/model")


def test_offline(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConnectionError, match="'someone/not-downloaded' is not an existing folder"):
        load_checkpoint("someone/not-downloaded")


def test_hub_download_takes_only_what_is_needed(folders, monkeypatch):
    asked = {}

    def download(repo_id, **kwargs):
        asked.update(kwargs, repo_id=repo_id)
        return str(folders / "tied")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = load_checkpoint("someone/model")
    assert asked["repo_id"] == "someone/model" and loaded.path == folders / "tied"
    offered = [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.model",
        "chat_template.jinja",
        "pytorch_model.bin",
        "modeling_mine.py",
        "original/params.json",
        "consolidated.safetensors",
        "model.gguf",
    ]
    taken = huggingface_hub.utils.filter_repo_objects(
        offered, allow_patterns=asked["allow_patterns"], ignore_patterns=asked["ignore_patterns"]
    )
    assert list(taken) == offered[:5]


def test_every_name_has_a_shape(folders):
    loaded = load_checkpoint(folders / "untied")
    shapes = {name: tuple(tensor.shape) for name, tensor in loaded_weights(loaded).items()}
    assert shapes == tensor_shapes(loaded.config)
