"""Loading refuses what is incomplete, and what is saved loads as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from fulltune.errors import AssetError, ConfigError, MissingExtraError, ModelError
from fulltune.models.chat_template import set_chat_template
from fulltune.models.loading import (
    context_length,
    load_model,
    load_tokenizer,
    read_info,
    save_model,
)
from fulltune.models.sources import resolve_model

LABELS = ("no", "yes", "maybe")


def copy_of(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def classifier(path: Path, seed: int = 0, labels: tuple[str, ...] | None = LABELS) -> Any:
    return load_model(path, head="classification", labels=labels, dtype=torch.float32, seed=seed)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_causal_model_has_the_folders_weights(
    fixture: str, dtype: torch.dtype, request: pytest.FixtureRequest
) -> None:
    path = request.getfixturevalue(fixture)
    model = load_model(path, head="causal_lm", dtype=dtype, attention="fulltune")
    expected = AutoModelForCausalLM.from_pretrained(path).state_dict()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[name].to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("fixture", ["tiny_llama", "tiny_gpt2", "tiny_bert"])
def test_new_head_depends_on_the_seed_alone(fixture: str, request: pytest.FixtureRequest) -> None:
    path = request.getfixturevalue(fixture)
    first = classifier(path).state_dict()
    torch.rand(7)
    state = torch.get_rng_state()
    again, other = classifier(path).state_dict(), classifier(path, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert {name for name in first if not torch.equal(first[name], other[name])} == {
        "score.weight" if "score.weight" in first else "classifier.weight"
    }


def test_saved_classifier_keeps_head_labels_and_note(tiny_bert: Path, tmp_path: Path) -> None:
    model = classifier(tiny_bert)
    model.classifier.weight.data += 1  # as training would, away from its start
    save_model(model, load_tokenizer(tiny_bert), tmp_path, info={"kind": "classification"})
    assert read_info(tmp_path) == {"kind": "classification"}
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert tuple(loaded.config.id2label.values()) == LABELS
    same, own = classifier(tmp_path, seed=9), classifier(tmp_path, labels=None)
    assert torch.equal(same.classifier.weight, model.classifier.weight)
    assert torch.equal(own.classifier.weight, model.classifier.weight)
    # The same number of classes in another order: the old rows would be the wrong ones.
    reordered = classifier(tmp_path, labels=LABELS[::-1])
    assert not torch.equal(reordered.classifier.weight, model.classifier.weight)
    assert classifier(tmp_path, labels=("a", "b")).classifier.weight.shape[0] == 2


def test_saved_chat_model_is_plain_hugging_face(tiny_llama: Path, tmp_path: Path) -> None:
    model = load_model(tiny_llama, head="causal_lm", dtype=torch.bfloat16)
    save_model(model, load_tokenizer(tiny_llama), tmp_path, info={"kind": "chat"})
    assert (tmp_path / "generation_config.json").is_file()
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert resolve_model(str(tmp_path)) == tmp_path


def test_encoder_cannot_generate(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="encoder"):
        load_model(tiny_bert, head="causal_lm", dtype=torch.float32)


def test_own_labels_need_a_trained_head(tiny_bert: Path) -> None:
    with pytest.raises(ModelError, match="no classification head"):
        classifier(tiny_bert, labels=None)


def test_missing_weights_are_named(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"model\.layers\.2"):
        load_model(folder, head="causal_lm", dtype=torch.float32)


def test_vocabulary_larger_than_the_model_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    edit_config(folder, vocab_size=300)
    with pytest.raises(ModelError, match="300 embeddings"):
        load_model(folder, head="causal_lm", dtype=torch.float32)


def test_dropout_is_set_everywhere(tiny_gpt2: Path, tiny_llama: Path) -> None:
    model = load_model(tiny_gpt2, head="causal_lm", dtype=torch.float32, dropout=0.25)
    rates = {module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)}
    assert rates == {0.25}
    model = load_model(tiny_llama, head="causal_lm", dtype=torch.float32, dropout=0.25)
    assert model.config.attention_dropout == 0.25


def test_loading_and_saving_print_nothing(
    tiny_bert: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    save_model(classifier(tiny_bert), load_tokenizer(tiny_bert), tmp_path, info={})
    assert capfd.readouterr() == ("", "")


def test_context_is_the_longest_position(tiny_llama: Path, tiny_gpt2: Path) -> None:
    assert context_length(AutoConfig.from_pretrained(tiny_llama)) == 256
    assert context_length(AutoConfig.from_pretrained(tiny_gpt2)) == 256
    roberta = AutoConfig.for_model("roberta", max_position_embeddings=514, pad_token_id=1)
    assert context_length(roberta) == 512
    assert context_length(AutoConfig.for_model("xlnet")) > 100_000


def test_run_folder_stands_for_its_model(tiny_llama: Path, tmp_path: Path) -> None:
    copy_of(tiny_llama, tmp_path / "run" / "model")
    assert resolve_model(str(tmp_path / "run")) == tmp_path / "run" / "model"


@pytest.mark.parametrize(
    ("missing", "named"), [("config.json", "config.json"), ("model.safetensors", "safetensors")]
)
def test_missing_file_is_named(tiny_llama: Path, tmp_path: Path, missing: str, named: str) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    (folder / missing).unlink()
    with pytest.raises(ModelError, match=named):
        resolve_model(str(folder))


@pytest.mark.parametrize("keep", [4, 500, -10])
def test_weights_cut_short_are_named(tiny_llama: Path, tmp_path: Path, keep: int) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="corrupt or cut short") as caught:
        resolve_model(str(folder))
    assert str(path) in str(caught.value)


def test_sources_that_are_nowhere_say_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path / "absent"))
    with pytest.raises(ModelError, match="does not exist"):
        resolve_model(str(tmp_path / "absent.gguf"))
    with pytest.raises(AssetError, match="model hub"):
        resolve_model("nobody/no-such-model")
    with pytest.raises(AssetError, match="not a model"):
        resolve_model("asset:trec")


def write_gguf(path: Path, source: Path) -> None:
    """The tiny Llama as GGUF: float16 matrices, tokens as the tokenizer has them."""
    gguf = pytest.importorskip("gguf")
    tokenizer = AutoTokenizer.from_pretrained(source)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(256)
    writer.add_embedding_length(32)
    writer.add_block_count(2)
    writer.add_feed_forward_length(48)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(400)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokenizer.convert_ids_to_tokens(list(range(400))))
    writer.add_token_types([3] * 3 + [1] * 397)
    writer.add_token_merges([" ".join(pair) for pair in backend["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, value in AutoModelForCausalLM.from_pretrained(source).state_dict().items():
        name = name.removeprefix("model.")
        for ours, theirs in GGUF_NAMES:
            name = name.replace(ours, theirs)
        array = value.numpy().astype(np.float32)
        for key, heads in (("attn_q", 4), ("attn_k", 2)):
            if key + "." in name:  # GGUF keeps rotary pairs side by side
                array = array.reshape(heads, 2, 4, 32).swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(name, array if array.ndim == 1 else array.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


GGUF_NAMES = (
    ("layers.", "blk."),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
    ("post_attention_layernorm", "ffn_norm"),
    ("input_layernorm", "attn_norm"),
    ("embed_tokens", "token_embd"),
    ("lm_head", "output"),
)


def test_gguf_becomes_a_plain_folder_once(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    gguf_file = tmp_path / "tiny.gguf"
    write_gguf(gguf_file, tiny_llama)
    folder = resolve_model(str(gguf_file))
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    assert load_tokenizer(folder).eos_token == "<|im_end|>"
    written = (folder / "config.json").stat().st_mtime_ns
    assert resolve_model(str(gguf_file)) == folder
    assert (folder / "config.json").stat().st_mtime_ns == written
    original = load_model(tiny_llama, head="causal_lm", dtype=torch.float32).state_dict()
    converted = load_model(folder, head="causal_lm", dtype=torch.float32).state_dict()
    for name, value in original.items():
        assert torch.equal(converted[name], value.half().bfloat16().float()), name


def test_gguf_that_is_cut_short_or_something_else_is_named(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    gguf_file = tmp_path / "tiny.gguf"
    write_gguf(gguf_file, tiny_llama)
    whole = gguf_file.read_bytes()
    for content in (whole[:-100], whole[: len(whole) // 2], whole[:300], b"", b"not GGUF at all"):
        gguf_file.write_bytes(content)
        with pytest.raises(ModelError, match=r"tiny\.gguf"):
            resolve_model(str(gguf_file))


def test_gguf_without_its_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FULLTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (tmp_path / "x.gguf").touch()
    with pytest.raises(MissingExtraError) as caught:
        resolve_model(str(tmp_path / "x.gguf"))
    assert "fulltune[demo]" in str(caught.value.hint)


def test_chat_template_by_name_or_file(
    tiny_llama: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    expected = tokenizer.chat_template
    tokenizer.chat_template = None
    with caplog.at_level("INFO", logger="fulltune"):
        set_chat_template(tokenizer, "chatml")
    assert tokenizer.chat_template == expected
    assert caplog.text == ""
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}<|user|>{{ m.content }}{% endfor %}")
    with caplog.at_level("INFO", logger="fulltune"):
        set_chat_template(tokenizer, str(path))
    assert "`<|user|>` is" in caplog.text
    path.write_text("{% for m in messages %}")
    with pytest.raises(ConfigError, match="cannot be rendered"):
        set_chat_template(tokenizer, str(path))
    with pytest.raises(ConfigError, match="neither built in nor a file"):
        set_chat_template(tokenizer, "absent")


def test_a_tokenizer_that_was_saved_while_padding_and_cutting_does_neither(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    backend = load_tokenizer(folder).backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=6)
    backend.save(str(folder / "tokenizer.json"))
    whole = load_tokenizer(tiny_llama).backend_tokenizer.encode("She sells sea shells by the sea.")
    found = load_tokenizer(folder).backend_tokenizer.encode("She sells sea shells by the sea.")
    assert len(whole.ids) > 6
    assert found.ids == whole.ids


def test_a_generation_config_that_forgot_to_sample_can_be_written_again(
    tiny_llama: Path, tmp_path: Path
) -> None:
    folder = copy_of(tiny_llama, tmp_path / "model")
    path = folder / "generation_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, "temperature": 0.7, "top_p": 0.9}))
    model = load_model(folder, head="causal_lm", dtype=torch.float32)
    save_model(model, load_tokenizer(folder), tmp_path / "saved", info={})
    written = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (written["do_sample"], written["temperature"]) == (True, 0.7)


def test_damaged_note_is_refused(tmp_path: Path) -> None:
    assert read_info(tmp_path) == {}
    (tmp_path / "fulltune.json").write_text("{")
    with pytest.raises(ModelError, match=r"fulltune\.json"):
        read_info(tmp_path)


@pytest.mark.network
@pytest.mark.slow
def test_dequantized_chat_model_answers() -> None:
    path = resolve_model("asset:smollm2-135m-instruct")
    tokenizer = load_tokenizer(path)
    model: Any = load_model(path, head="causal_lm", dtype=torch.bfloat16)
    prompt: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=10)[0]
    assert "Paris" in tokenizer.decode(answer[prompt["input_ids"].shape[1] :])
