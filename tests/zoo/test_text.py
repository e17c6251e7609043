import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, HTTPError, LocalEntryNotFoundError
from sentence_transformers import SentenceTransformer
from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.text import TEXT_CARDS, load_text_encoder, text_card, text_on_disk
from hyma_mllm.zoo.text_places import TextPlace

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "red", "fox", "blue", "bird", "flies", "say:"]
SENTENCES = ["a red fox", "a blue bird flies", "fox"]


def tiny_bert(folder: Path) -> Path:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        initializer_range=0.5,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", model_max_length=16
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def sentence(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Transformer, mean and max pooling joined (48), Dense to 10, Normalize, and a default prompt."""
    folder = tmp_path_factory.mktemp("sentence")
    pooling = Pooling(24, pooling_mode=("mean", "max"))
    modules = [Transformer(str(bert)), pooling, Dense(48, 10), Normalize()]
    prompts = {"prompts": {"query": "say: "}, "default_prompt_name": "query"}
    SentenceTransformer(modules=modules, device="cpu", **prompts).save_pretrained(str(folder), create_model_card=False)
    return folder


def mean_of_states(folder: Path, texts: list[str]) -> torch.Tensor:
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    rows = []
    with torch.no_grad():
        for text in texts:  # one by one: no padding, so no mask to get wrong
            rows.append(model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0))
    return torch.stack(rows)


def test_hf_is_the_mean_of_the_last_states(bert: Path) -> None:
    encoder = load_text_encoder(f"hf:{bert}")
    vectors = encoder.encode(SENTENCES, batch_size=2)
    assert vectors.dtype == torch.float32 and vectors.shape == (3, 24)
    torch.testing.assert_close(vectors, mean_of_states(bert, SENTENCES), atol=1e-5, rtol=1e-5)


def test_st_is_what_sentence_transformers_gives_with_its_prompt(sentence: Path) -> None:
    encoder = load_text_encoder(f"st:{sentence}")
    model = SentenceTransformer(str(sentence), device="cpu")
    vectors = encoder.encode(SENTENCES)
    with_prompt = model.encode([f"say: {text}" for text in SENTENCES], prompt="", convert_to_tensor=True)
    without = model.encode(SENTENCES, prompt="", convert_to_tensor=True)
    torch.testing.assert_close(vectors, with_prompt, atol=1e-6, rtol=1e-5)
    assert (vectors - without).abs().max() > 1e-3
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))


@pytest.mark.parametrize("scheme", ["hf", "st"])
def test_card_tells_width_and_parameters_without_weights(
    scheme: str, bert: Path, sentence: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = bert if scheme == "hf" else sentence
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "load_state_dict", lambda *_: pytest.fail("weights were loaded"))
        card = text_card(f"{scheme}:{folder}")
    encoder = load_text_encoder(card)
    assert card.width == encoder.encode(["a"]).shape[1] == {"hf": 24, "st": 10}[scheme]
    assert card.parameters == sum(parameter.numel() for parameter in encoder.parameters())
    assert card.kind == "text" and text_on_disk(card)


def test_st_of_a_bare_transformer_is_its_mean(bert: Path) -> None:
    assert text_card(f"st:{bert}").width == 24
    torch.testing.assert_close(load_text_encoder(f"st:{bert}").encode(["fox"]), mean_of_states(bert, ["fox"]))


def test_revision_follows_the_files(tmp_path: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    before = text_card(f"hf:{folder}").revision
    assert text_card(f"hf:{folder}#2").revision == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 1e-6}))
    assert text_card(f"hf:{folder}").revision != before


def test_frozen_and_always_in_eval_mode(bert: Path) -> None:
    encoder = load_text_encoder(f"hf:{bert}")
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert torch.equal(encoder.encode(SENTENCES), encoder.encode(SENTENCES))


def test_order_is_kept_whatever_the_batch(bert: Path) -> None:
    encoder = load_text_encoder(f"hf:{bert}")
    texts = [" ".join(WORDS[4 + (i * 7 + j) % 6] for j in range(1 + i * 5 % 11)) for i in range(17)]
    alone = torch.cat([encoder.encode([text]) for text in texts])
    torch.testing.assert_close(encoder.encode(texts, batch_size=4), alone, atol=1e-5, rtol=1e-5)


def test_half_precision_still_returns_float32(bert: Path) -> None:
    exact = load_text_encoder(f"hf:{bert}").encode(SENTENCES)
    encoder = load_text_encoder(f"hf:{bert}", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in encoder.parameters()} == {torch.bfloat16}
    vectors = encoder.encode(SENTENCES)
    assert vectors.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(vectors, exact).min() > 0.99


def test_no_texts_and_one_string(bert: Path) -> None:
    encoder = load_text_encoder(f"hf:{bert}")
    assert encoder.encode([]).shape == (0, 24)
    with pytest.raises(TypeError, match="one string"):
        encoder.encode("fox")


def test_cut_texts_are_counted(sentence: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = load_text_encoder(f"st:{sentence}")
    with caplog.at_level(logging.WARNING, "hyma_mllm"):
        # 13 words with the prompt's one, [CLS] and [SEP] make just 16 tokens
        encoder.encode(["fox " * 13, "a blue bird flies a blue bird"])
        assert not caplog.records
        encoder.encode(["fox " * 14, "fox"])
    assert "cut 1 of 2 texts at its limit of 16 tokens" in caplog.text


def test_sentence_transformer_can_be_saved_again(sentence: Path, tmp_path: Path) -> None:
    encoder = load_text_encoder(f"st:{sentence}")
    encoder.sentence_transformer().save_pretrained(str(tmp_path / "again"), create_model_card=False)
    again = load_text_encoder(f"st:{tmp_path / 'again'}")
    assert torch.equal(again.encode(SENTENCES), encoder.encode(SENTENCES))


def test_a_control_has_its_own_id_only() -> None:
    assert text_card("minilm-l6#2").id == "minilm-l6#2"
    assert text_card("minilm-l6#2").revision == TEXT_CARDS["minilm-l6"].revision


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("minilm-l5", "no text encoder minilm-l5; did you mean minilm-l6"),
        ("", "no text encoder ; known are"),
        ("st:", "no text encoder st:"),
        ("hf:/no/such/place", "no directory /no/such/place"),
        ("timm:vit", "no text encoder timm:vit"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(HymaError, match=message):
        text_card(name)


@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), HTTPError("offline")])
def test_an_unreachable_hub_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "model_info", Mock(side_effect=error))
    with pytest.raises(
        HymaError, match=r"^st:some/model: there is no directory some/model and the hub did not .*offline"
    ):
        text_card("st:some/model")


@pytest.mark.parametrize("call", ["hf_hub_download", "get_safetensors_metadata"])
@pytest.mark.parametrize("error", [LocalEntryNotFoundError("offline"), HTTPError("offline"), OSError("offline")])
def test_a_hub_that_fails_after_it_named_the_commit_is_one_sentence(
    call: str, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = TextPlace("some/model", "abc", local=False)
    monkeypatch.setattr(huggingface_hub, call, Mock(side_effect=error))
    with pytest.raises(HymaError, match=r"^The hub did not give .* of some/model \(offline\); check the network"):
        place.json("modules.json") if call == "hf_hub_download" else place.parameters()


def test_a_file_that_the_hub_does_not_have_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", Mock(side_effect=EntryNotFoundError("404")))
    assert TextPlace("some/model", "abc", local=False).json("modules.json") is None


def test_what_the_hub_gave_before_serves_without_it(
    tmp_path: Path, bert: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / "snapshots" / "abc"
    shutil.copytree(bert, snapshot)
    monkeypatch.setattr(huggingface_hub, "model_info", Mock(side_effect=HTTPError("offline")))
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", Mock(return_value=str(snapshot / "config.json")))
    card = text_card("hf:some/model")
    assert (card.revision, card.width, card.source) == ("abc", 24, "Hugging Face hub, some/model")
    assert text_on_disk(card)


def test_the_hub_is_read_at_one_commit(bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local snapshot stands in for the hub."""
    asked: list[str] = []

    def snapshot(repository: str, revision: str, allow_patterns: list[str]) -> str:
        asked.append(f"{repository}@{revision}")
        assert not any("bin" in pattern or "py" in pattern for pattern in allow_patterns)
        return str(bert)

    card = replace(text_card(f"hf:{bert}"), id="hf:some/model", revision="abc")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    torch.testing.assert_close(load_text_encoder(card).encode(["fox"]), mean_of_states(bert, ["fox"]))
    assert asked == ["some/model@abc"] and not text_on_disk(card)


def test_no_config_and_no_safetensors(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HymaError, match=r"empty has no config\.json that transformers understands"):
        text_card(f"hf:{tmp_path / 'empty'}")
    folder = tiny_bert(tmp_path / "bert")
    (folder / "model.safetensors").unlink()
    with pytest.raises(HymaError, match=r"holds no \.safetensors file"):
        text_card(f"hf:{folder}")


def test_broken_weights_and_wrong_width(tmp_path: Path, bert: Path) -> None:
    folder = tiny_bert(tmp_path / "bert")
    card = text_card(f"hf:{folder}")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(HymaError, match=f"hf:{folder} cannot be loaded from {folder}"):
        load_text_encoder(card)
    with pytest.raises(HymaError, match="gives vectors of width 24 but its card says 25"):
        load_text_encoder(replace(text_card(f"st:{bert}"), width=25))


def test_modules_json_that_is_not_json(tmp_path: Path, sentence: Path) -> None:
    (tmp_path / "modules.json").write_text("nonsense")
    with pytest.raises(HymaError, match=r"modules\.json is not JSON"):
        text_card(f"st:{tmp_path}")
