"""Attention weights: what they are, that the equation gives them, and that the check can fail."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    ElectraConfig,
    ElectraModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    RobertaConfig,
    RobertaForMaskedLM,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)

from fulltune.cli import main
from fulltune.data.token_labels import label_tokens
from fulltune.errors import ConfigError, DataError, MissingExtraError, ModelError
from fulltune.models import attention_equation
from fulltune.models.loading import load_body, load_tokenizer
from fulltune.recipes import attention as recipe

TEXT = "The capital of the country is a city by the river. 你好，世界！"
FAMILIES = ("gpt2", "llama", "bert", "xlnet", "t5")
KIN = ("electra", "mistral", "qwen2", "qwen3", "roberta")
Folders = Callable[[str], Path]


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Words with `▁` before them, as XLNet and T5 write them, and segment ids 0 and 1."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    special_tokens = ["<pad>", "<unk>", "</s>"]
    backend.train_from_iterator(
        [TEXT] * 8,
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special_tokens, unk_token="<unk>", show_progress=False
        ),
    )
    # The end is a segment of its own, so that both rows of XLNet's segment embedding are used.
    backend.post_processor = processors.TemplateProcessing(
        single="$A:0 </s>:1", special_tokens=[("</s>", backend.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def tiny_model(name: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    torch.manual_seed(7)
    sizes = {
        "vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    decoder = {**sizes, "num_key_value_heads": 2, "bos_token_id": None, "head_dim": 16}
    if name == "xlnet":
        return XLNetLMHeadModel(
            XLNetConfig(
                vocab_size=len(tokenizer), d_model=32, n_layer=2, n_head=4, d_inner=48,
                pad_token_id=0, bos_token_id=1, eos_token_id=2,
            )
        )  # fmt: skip
    if name == "t5":
        return T5ForConditionalGeneration(
            T5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4,
                relative_attention_num_buckets=8, relative_attention_max_distance=12,
            )
        )  # fmt: skip
    if name == "mistral":
        return MistralForCausalLM(MistralConfig(**decoder, sliding_window=5))
    if name == "qwen2":
        del decoder["head_dim"]
        return Qwen2ForCausalLM(Qwen2Config(**decoder))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**decoder))
    if name == "electra":
        return ElectraModel(ElectraConfig(**sizes, embedding_size=16))
    return RobertaForMaskedLM(RobertaConfig(**sizes))


@pytest.fixture(scope="session")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, tiny_gpt2: Path, tiny_llama: Path, tiny_bert: Path
) -> Folders:
    """A tiny model by its type. Weights are drawn large, so that attention is far from even."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name in made:
            return made[name]
        shared = {"gpt2": tiny_gpt2, "llama": tiny_llama, "bert": tiny_bert}
        tokenizer = load_tokenizer(shared[name]) if name in shared else sentencepiece_like()
        if name in shared:
            model = load_body(shared[name], attention="eager")
        else:
            model = tiny_model(name, tokenizer)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for _, parameter in sorted(model.named_parameters()):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
        made[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(made[name])
        tokenizer.save_pretrained(made[name])
        return made[name]

    return folder


@pytest.mark.parametrize("name", [*FAMILIES, *KIN])
def test_the_equation_gives_the_weights_and_the_output_of_every_family(
    folder_of: Folders, name: str
) -> None:
    report = recipe.run(str(folder_of(name)), TEXT, layers="all")
    assert [layer.layer for layer in report.layers] == [0, 1]
    for layer in report.layers:
        assert layer.weights_difference <= 1e-5  # float32 rounding of weights of at most 1
        assert layer.output_difference <= layer.output_tolerance
        assert layer.passed
        num_tokens = len(report.labels)
        assert layer.weights_NQK.shape == (4, num_tokens, num_tokens)
        torch.testing.assert_close(layer.weights_NQK.sum(-1), torch.ones(4, num_tokens))
        # Far from even, or much of the equation could be wrong without being seen.
        assert float(layer.weights_NQK.max()) > 3 / num_tokens


@pytest.mark.parametrize("name", ["gpt2", "llama", "mistral", "qwen3"])
def test_a_decoder_gives_later_tokens_a_weight_of_exactly_zero(
    folder_of: Folders, name: str
) -> None:
    for layer in recipe.run(str(folder_of(name)), TEXT).layers:
        assert not layer.weights_NQK.triu(1).any()


@pytest.mark.parametrize("name", ["bert", "xlnet", "t5"])
def test_an_encoder_looks_both_ways(folder_of: Folders, name: str) -> None:
    for layer in recipe.run(str(folder_of(name)), TEXT).layers:
        assert layer.weights_NQK.triu(1).any()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_of_another_scale_fails_the_check(folder_of: Folders, name: str) -> None:
    folder = folder_of(name)
    body = load_body(folder, attention="eager")
    module = attention_equation.equation_of(body.config).layers(body)[1]
    module = getattr(module, "self", module)
    scale = "scale" if name == "xlnet" else "scaling"
    setattr(module, scale, 2 * getattr(module, scale))
    inputs = load_tokenizer(folder)(TEXT, return_tensors="pt")
    first, second = attention_equation.trace_attention(body, dict(inputs), [0, 1])
    assert first.passed
    assert not second.passed
    assert second.weights_difference > 1e-3


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("gpt2", "c_proj.weight"), ("llama", "o_proj.weight"), ("bert", "output.dense.weight"),
        ("xlnet", "o"), ("t5", "o.weight"),
    ],
)  # fmt: skip
def test_another_output_projection_fails_the_check_though_the_weights_agree(
    folder_of: Folders, name: str, changed: str
) -> None:
    """Changed after the model has used it, so that the equation sees another one."""
    folder = folder_of(name)
    body = load_body(folder, attention="eager")
    module = attention_equation.equation_of(body.config).layers(body)[1]
    parameter = module.get_parameter(changed)

    def change(*_: object) -> None:
        parameter.data *= 1.5

    module.register_forward_hook(change)
    inputs = load_tokenizer(folder)(TEXT, return_tensors="pt")
    (layer,) = attention_equation.trace_attention(body, dict(inputs), [1])
    assert layer.weights_difference <= layer.weights_tolerance
    assert not layer.passed


@pytest.mark.parametrize("terms", ["r", "r_w_bias", "r_r_bias", "r_s_bias", "seg_embed"])
def test_every_term_of_xlnet_is_part_of_the_check(folder_of: Folders, terms: str) -> None:
    folder = folder_of("xlnet")
    body = load_body(folder, attention="eager")
    module = attention_equation.equation_of(body.config).layers(body)[1]
    parameter = module.get_parameter(terms)

    def change(*_: object) -> None:
        parameter.data *= 1.5

    module.register_forward_hook(change)
    inputs = load_tokenizer(folder)(TEXT, return_tensors="pt")
    (layer,) = attention_equation.trace_attention(body, dict(inputs), [1])
    assert layer.weights_difference > 1e-3


def test_another_position_bias_of_t5_fails_the_check(folder_of: Folders) -> None:
    folder = folder_of("t5")
    body = load_body(folder, attention="eager")
    modules = attention_equation.equation_of(body.config).layers(body)

    def change(*_: object) -> None:
        modules[0].relative_attention_bias.weight.data *= 1.5

    modules[0].register_forward_hook(change)
    inputs = load_tokenizer(folder)(TEXT, return_tensors="pt")
    (layer,) = attention_equation.trace_attention(body, dict(inputs), [1])
    assert not layer.passed


def test_the_command_prints_a_table_and_the_check_and_writes_a_page_and_a_picture(
    folder_of: Folders, tmp_path: Path, say: Callable[..., tuple[int, str, str]]
) -> None:
    pytest.importorskip("matplotlib")
    html, png = tmp_path / "page.html", tmp_path / "picture.png"
    code, out, _ = say(
        "attention", folder_of("llama"), "The capital<script>", "--layers", "1",
        "--heads", "0,2-3", "--html", html, "--png", png,
    )  # fmt: skip
    assert code == 0
    assert re.search(r"^1 +3 +\d\.\d{3} +The→The", out, flags=re.MULTILINE)
    assert "softmax(" in out
    assert "layer 1: verified" in out
    assert "Ġ" not in out
    assert png.read_bytes().startswith(b"\x89PNG")
    page = html.read_text(encoding="utf-8")
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:)?//", page)
    weights = re.search(r'id="weights">(.*?)</script>', page, flags=re.DOTALL)
    assert weights is not None
    data = json.loads(weights[1])
    assert "".join(data["labels"]) == "Thecapital<script>"
    assert [head["head"] for head in data["layers"][0]["heads"]] == [0, 2, 3]
    assert all(abs(total - 1) < 1e-3 for total in data["layers"][0]["heads"][0]["sums"])


def test_a_decoder_reads_no_segments_as_in_training(folder_of: Folders) -> None:
    """GPT-2 would add the embedding of a token to each, where a tokenizer gives segment ids."""
    folder = folder_of("gpt2")
    tokenizer = load_tokenizer(folder)
    body = load_body(folder, attention="eager")
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"]
    (alone,) = attention_equation.trace_attention(body, {"input_ids": ids}, [1])
    report = recipe.run(str(folder), TEXT, layers="1")
    torch.testing.assert_close(report.layers[0].weights_NQK, alone.weights_NQK)


def test_json_holds_the_weights_and_the_differences(
    folder_of: Folders, say: Callable[..., tuple[int, str, str]]
) -> None:
    code, out, _ = say("attention", folder_of("xlnet"), "世界 by the river", "--json")
    data = json.loads(out)
    assert code == 0
    assert data["passed"]
    assert data["tokens"][-1] == "</s>"
    assert [layer["layer"] for layer in data["layers"]] == [0, 1]
    head = data["layers"][1]["heads"][3]
    assert sum(head["weights"][0]) == pytest.approx(1, abs=1e-6)
    largest = max(range(len(head["weights"])), key=head["weights"][0].__getitem__)
    assert head["most_attended"][0] == largest


def test_a_failed_check_is_said_and_has_exit_code_one(
    folder_of: Folders,
    say: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    # What no folder can say: its scores are scaled by twice what its config asks for.
    def load_tampered(folder: Path, *, attention: str) -> PreTrainedModel:
        body = load_body(folder, attention=attention)
        body.h[0].attn.scaling *= 2
        return body

    monkeypatch.setattr(recipe, "load_body", load_tampered)
    page = tmp_path / "page.html"
    code, out, _ = say("attention", folder_of("gpt2"), TEXT, "--html", page)
    assert code == 1
    assert "layer 0: NOT MET" in out
    assert "layer 1: verified" in out
    assert "equation NOT met" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"layers": "2"}, ConfigError, "layer 2 does not exist"),
        ({"layers": "0-9"}, ConfigError, "layer 9 does not exist"),
        ({"heads": "4"}, ConfigError, "head 4 does not exist"),
        ({"heads": "-1"}, ConfigError, "`--heads -1` is neither"),
        ({"layers": "1-0"}, ConfigError, "`--layers 1-0` is neither"),
        ({"layers": "first"}, ConfigError, "`--layers first` is neither"),
        ({"text": " \n"}, DataError, "the text is empty"),
        ({"text": "ab\udcffcd"}, DataError, "character 3 of the text"),
        ({"text": "river " * 300}, DataError, "reads 1 to 256"),
    ],
)
def test_what_cannot_be_shown_is_said_with_what_is_possible(
    folder_of: Folders, options: dict[str, str], kind: type[Exception], words: str
) -> None:
    given = {"text": TEXT, **options}
    with pytest.raises(kind, match=re.escape(words)) as caught:
        recipe.run(str(folder_of("llama")), given.pop("text"), **given)
    hint = getattr(caught.value, "hint", None)
    assert hint
    assert options.keys() == {"text"} or "0 to" in hint


def test_too_many_tokens_to_draw_are_an_error_but_can_be_read(
    folder_of: Folders, tmp_path: Path
) -> None:
    text = "river " * 150
    assert recipe.run(str(folder_of("t5")), text).passed
    with pytest.raises(ConfigError, match="up to 128 can be drawn"):
        recipe.run(str(folder_of("t5")), text, html=tmp_path / "page.html")


def test_a_model_without_attention_is_said_to_have_none(tmp_path: Path) -> None:
    tokenizer = sentencepiece_like()
    model = MambaForCausalLM(
        MambaConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="`mamba` have no attention") as caught:
        recipe.run(str(tmp_path), TEXT)
    assert "llama" in str(caught.value.hint)


def test_a_picture_without_matplotlib_names_what_to_install(
    folder_of: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtraError) as caught:
        recipe.run(str(folder_of("bert")), TEXT, png=tmp_path / "picture.png")
    assert "fulltune[plot]" in str(caught.value.hint)


def test_a_character_that_no_font_has_is_an_error_and_not_a_box() -> None:
    pytest.importorskip("matplotlib")
    from fulltune.errors import AssetError
    from fulltune.report.attention_picture import fonts_for

    assert fonts_for("river") == ["DejaVu Sans"]
    private = "\U0010fffd"  # of private use, so in no font
    with pytest.raises(AssetError, match="no installed font") as caught:
        fonts_for(f"river {private}")
    assert "install a font" in str(caught.value.hint)


def test_labels_are_readable_and_one_for_each_token(folder_of: Folders) -> None:
    tokenizer = load_tokenizer(folder_of("llama"))
    ids = tokenizer("by the river\n\t 界龘<|im_end|>")["input_ids"]
    labels = label_tokens(tokenizer.decode, ids, tokenizer.convert_ids_to_tokens(ids))
    assert len(labels) == len(ids)
    shown = "".join(labels)
    assert "Ġ" not in shown
    assert "\n" not in shown
    assert labels[-1] == "<|im_end|>"
    assert labels[-4:-1] == ["龘 1/3", "龘 2/3", "龘 3/3"]


def test_pieces_of_words_keep_their_mark(folder_of: Folders) -> None:
    tokenizer = load_tokenizer(folder_of("bert"))
    ids = tokenizer("the riverbank")["input_ids"]
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert any(token.startswith("##") for token in tokens)
    assert label_tokens(tokenizer.decode, ids, tokens) == tokens


@pytest.fixture
def say(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: its exit code, stdout and stderr."""

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setenv("COLUMNS", "100")
        monkeypatch.setattr(sys, "argv", ["fulltune", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return run
