"""LLMs of every layout, tiny and random, against plain transformers without prefix, mask or cache."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from hyma_mllm.errors import HymaError
from hyma_mllm.zoo.llm import LanguageModel, Quantisation, llm_card, llm_on_disk, load_llm, load_tokenizer
from hyma_mllm.zoo.llm_prefix import compact

WORDS = 60
CONTEXT = 64
FAMILIES = ["llama", "qwen2", "gemma3", "gemma2", "gpt2", "cohere"]
TEMPLATE = "{% for turn in messages %}<turn>{{ turn.content }}</turn>\n{% endfor %}"


def causal_lm(family: str, **more: object) -> PreTrainedModel:
    """A random model whose weights are large enough for its layers to matter."""
    torch.manual_seed(0)
    plain = {
        "vocab_size": WORDS,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": CONTEXT,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "initializer_range": 0.3,
    }
    # Windows shorter than the rows, so that a window that slips would show.
    sliding = {"head_dim": 8, "sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}
    if family == "gpt2":
        config = GPT2Config(
            vocab_size=WORDS, n_embd=32, n_layer=3, n_head=4, n_positions=CONTEXT, bos_token_id=1, eos_token_id=2,
            resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5, initializer_range=0.3, **more,
        )  # fmt: skip
        return GPT2LMHeadModel(config)
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**plain | more))
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**plain | {"tie_word_embeddings": True} | more))
    if family == "gemma3":
        return Gemma3ForCausalLM(Gemma3TextConfig(**plain | sliding | {"query_pre_attn_scalar": 8} | more))
    if family == "gemma2":
        softcap = {"final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 8}
        return Gemma2ForCausalLM(Gemma2Config(**plain | sliding | softcap | more))
    return CohereForCausalLM(CohereConfig(**plain | {"logit_scale": 0.25} | more))


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", "<turn>", "</turn>", *(f"w{i}" for i in range(6, WORDS))]
    fast = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=fast, **special)


ORDINARY = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}


def save(folder: Path, family: str, special: dict[str, str] | None = None, **more: object) -> Path:
    causal_lm(family, **more).save_pretrained(folder)
    tokenizer(**(ORDINARY if special is None else special)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save(tmp_path_factory.mktemp(family), family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def llm(request: pytest.FixtureRequest, folders: dict[str, Path]) -> LanguageModel:
    return load_llm(f"hf:{folders[request.param]}", dtype=torch.float32)


BEFORE = torch.tensor([1, 17, 5, 40])
LENGTH = 14
# Full; padded right; left; between; in three places.
MASK = torch.tensor(
    [
        [1] * 14,
        [1] * 9 + [0] * 5,
        [0] * 6 + [1] * 8,
        [1] * 3 + [0] * 4 + [1] * 7,
        [0] + [1] * 2 + [0] * 3 + [1] * 6 + [0] * 2,
    ]
)


def rows(llm: LanguageModel, count: int = len(MASK)) -> Tensor:
    """Embeddings that belong to no word, as those of image tokens."""
    made = torch.randn(count, LENGTH, llm.width, generator=torch.Generator().manual_seed(1))
    return made * llm.embedding_rms


def plain_hidden(llm: LanguageModel, embeddings: Tensor, before: Tensor = BEFORE) -> Tensor:
    """One row without padding, the prefix recomputed, by the bare model."""
    whole = torch.cat([llm.embed(before), embeddings])[None]
    states: Tensor = llm.model.base_model(inputs_embeds=whole, use_cache=False).last_hidden_state
    return states[0, len(before) :]


@pytest.mark.parametrize("before", [BEFORE, BEFORE[:0]], ids=["prefix", "none"])
def test_hidden_behind_a_prefix_is_that_of_each_row_alone(llm: LanguageModel, before: Tensor) -> None:
    embeddings = rows(llm).requires_grad_()
    weights = torch.randn(LENGTH, llm.width, generator=torch.Generator().manual_seed(2))
    hidden = llm.hidden(embeddings, MASK, llm.prefix(before))
    (gradient,) = torch.autograd.grad((hidden * weights).sum(), embeddings)
    for row, mask in enumerate(MASK.bool()):
        alone = rows(llm)[row][mask].requires_grad_()
        expected = plain_hidden(llm, alone, before)
        torch.testing.assert_close(hidden[row][mask], expected, atol=1e-4, rtol=1e-4)
        (expected_gradient,) = torch.autograd.grad((expected * weights[mask]).sum(), alone)
        scale = float(expected_gradient.abs().max())
        torch.testing.assert_close(gradient[row][mask], expected_gradient, atol=1e-4 * scale, rtol=1e-4)
        assert not hidden[row][~mask].any() and not gradient[row][~mask].any()


def test_logits_from_embeddings_are_those_from_ids(llm: LanguageModel) -> None:
    ids = torch.randint(6, WORDS, (3, LENGTH), generator=torch.Generator().manual_seed(3))
    hidden = llm.hidden(llm.embed(ids), torch.ones_like(ids))
    found = llm.logits(hidden)
    assert found.dtype == torch.float32 and found.shape == (3, LENGTH, llm.vocabulary)
    torch.testing.assert_close(found, llm.model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_the_head_in_parts_gives_the_logits(llm: LanguageModel) -> None:
    hidden, head = rows(llm)[0], llm.head()
    logits = head.scale * (hidden @ head.weight.T + (0 if head.bias is None else head.bias))
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    torch.testing.assert_close(llm.logits(hidden), logits)


def test_a_prefix_is_never_changed_by_use(llm: LanguageModel) -> None:
    prefix, embeddings = llm.prefix(BEFORE), rows(llm)
    keys = [tensor.clone() for tensor in (*prefix.keys, *prefix.values)]
    first = llm.hidden(embeddings, MASK, prefix)
    llm.generate(embeddings, MASK, 3, prefix)
    llm.hidden(embeddings[:2].requires_grad_(), MASK[:2], prefix).sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(keys, (*prefix.keys, *prefix.values), strict=True))
    assert torch.equal(llm.hidden(embeddings.detach(), MASK, prefix), first)
    assert not any(tensor.requires_grad for tensor in keys) and prefix.length == len(BEFORE)


def plain_greedy(llm: LanguageModel, embeddings: Tensor, count: int, banned: Sequence[int] = ()) -> list[int]:
    """The next words by recomputing everything for each."""
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < count:
            logits = llm.logits(plain_hidden(llm, embeddings)[-1])
            logits[list(banned)] = -math.inf
            word = int(logits.argmax())
            if word in llm.end_ids:
                break
            answer.append(word)
            embeddings = torch.cat([embeddings, llm.embed(torch.tensor([word]))])
    return answer


def test_generate_is_the_greedy_answer_of_each_row_alone(llm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, prefix = rows(llm), llm.prefix(BEFORE)
    alone = [embeddings[row][mask] for row, mask in enumerate(MASK.bool())]
    assert llm.generate(embeddings, MASK, 9, prefix) == [plain_greedy(llm, row, 9) for row in alone]
    # Rows that end at different steps, some at once.
    free = [plain_greedy(llm, row, 9) for row in alone]
    monkeypatch.setattr(llm, "end_ids", (free[0][0], free[1][2], free[3][5]))
    expected = [plain_greedy(llm, row, 9) for row in alone]
    assert expected[0] == [] and len({len(row) for row in expected}) > 1
    assert llm.generate(embeddings, MASK, 9, prefix) == expected
    banned = [free[0][0], free[1][2]]
    answers = llm.generate(embeddings, MASK, 9, prefix, banned=banned)
    assert answers == [plain_greedy(llm, row, 9, banned) for row in alone]
    assert not {word for answer in answers for word in answer} & set(banned)


def test_generate_without_rows_or_words(llm: LanguageModel) -> None:
    embeddings = rows(llm)
    assert llm.generate(embeddings[:0], MASK[:0], 4) == []
    assert llm.generate(embeddings, MASK, 0) == [[]] * len(MASK)
    with pytest.raises(ValueError, match="at least one token"):
        llm.generate(embeddings, MASK * torch.tensor([1, 1, 0, 1, 1])[:, None], 4)


def test_banned_placeholders_are_found_by_name(folders: dict[str, Path], tmp_path: Path) -> None:
    plain = load_llm(f"hf:{folders['llama']}", dtype=torch.float32)
    assert plain.banned_ids == ()
    save(tmp_path, "llama")
    words = tokenizer(**ORDINARY)
    words.add_special_tokens({"extra_special_tokens": ["<start_of_image>"]})
    words.save_pretrained(tmp_path)
    causal_lm("llama", vocab_size=WORDS + 1).save_pretrained(tmp_path)
    llm = load_llm(f"hf:{tmp_path}", dtype=torch.float32)
    assert llm.banned_ids == (WORDS,)
    with torch.no_grad():  # now the placeholder would always win
        llm.model.get_output_embeddings().weight[WORDS] = 0
        last = llm.hidden(rows(llm), MASK)[torch.arange(len(MASK)), -1]
        llm.model.get_output_embeddings().weight[WORDS] = 1e4 * last[0]
    assert WORDS not in {word for answer in llm.generate(rows(llm), MASK, 5) for word in answer}


def test_frozen_and_always_in_eval_mode(llm: LanguageModel) -> None:
    torch.nn.Sequential(llm).train()
    assert not any(module.training for module in llm.modules())
    embeddings = rows(llm).requires_grad_()
    llm.hidden(embeddings, MASK, llm.prefix(BEFORE)).sum().backward()
    assert embeddings.grad is not None and embeddings.grad.any()
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in llm.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointing_recomputes_over_a_prefix_and_changes_nothing(family: str, folders: dict[str, Path]) -> None:
    plain = load_llm(f"hf:{folders[family]}", dtype=torch.float32)
    saving = load_llm(f"hf:{folders[family]}", dtype=torch.float32, checkpointing=True)
    torch.nn.Sequential(saving).train()
    assert not any(module.training for module in saving.modules())  # so no dropout: GPT-2's is one half here
    norms = [module for module in saving.modules() if "norm" in type(module).__name__.lower()]
    layers = sum(isinstance(module, GradientCheckpointingLayer) for module in saving.modules())
    calls = [0]
    for norm in norms:
        norm.register_forward_hook(lambda *_: calls.__setitem__(0, calls[0] + 1))
    found = []
    for llm in (plain, saving):
        embeddings = rows(llm).requires_grad_()
        hidden = llm.hidden(embeddings, MASK, llm.prefix(BEFORE))
        calls[0] = 0
        hidden.square().sum().backward()
        found.append((hidden.detach(), embeddings.grad))
    assert calls[0] >= layers, "no layer ran again in the backward pass"
    torch.testing.assert_close(found[0], found[1])
    assert plain.generate(rows(plain), MASK, 4) == saving.generate(rows(saving), MASK, 4)


def test_embedding_rms_counts_the_models_own_scaling(llm: LanguageModel) -> None:
    expected = llm.embed(torch.arange(WORDS)).square().mean().sqrt()
    assert llm.embedding_rms == pytest.approx(float(expected), rel=1e-5)
    if "Gemma3" in type(llm.model).__name__:
        raw = llm.model.get_input_embeddings().weight.square().mean().sqrt()
        assert llm.embedding_rms == pytest.approx(float(raw) * math.sqrt(llm.width), rel=1e-5)


def test_rows_beyond_the_context_are_refused(llm: LanguageModel) -> None:
    embeddings = rows(llm).repeat(1, 5, 1)
    with pytest.raises(HymaError, match=rf"74 tokens does not fit into the context of .*, {CONTEXT} tokens"):
        llm.hidden(embeddings, torch.ones(embeddings.shape[:2]), llm.prefix(BEFORE))
    with pytest.raises(HymaError, match="does not fit"):
        llm.generate(rows(llm), MASK, CONTEXT)
    # Padding takes no room.
    assert llm.hidden(embeddings, MASK.repeat(1, 5) * (torch.arange(70) < 14)).shape == embeddings.shape


def test_all_padding_is_all_zero(llm: LanguageModel) -> None:
    assert not llm.hidden(rows(llm), torch.zeros_like(MASK)).any()
    with pytest.raises(ValueError, match="a mask"):
        llm.hidden(rows(llm), MASK[:, :3])


def test_compact_keeps_order_and_restores() -> None:
    embeddings = torch.arange(5 * LENGTH * 2.0).reshape(5, LENGTH, 2) + 1
    moved = compact(embeddings, MASK)
    assert moved.lengths.tolist() == MASK.sum(1).tolist()
    for row, mask in enumerate(MASK.bool()):
        assert torch.equal(moved.embeddings[row, : int(mask.sum())], embeddings[row][mask])
    torch.testing.assert_close(moved.restore(moved.embeddings, LENGTH), embeddings * MASK[..., None])


def test_bfloat16_is_close_to_float32(folders: dict[str, Path]) -> None:
    exact, rough = (load_llm(f"hf:{folders['gemma3']}", dtype=kind) for kind in (torch.float32, torch.bfloat16))
    hidden = rough.hidden(rows(exact).bfloat16(), MASK, rough.prefix(BEFORE))
    assert hidden.dtype == torch.bfloat16 and rough.logits(hidden).dtype == torch.float32
    expected = exact.hidden(rows(exact), MASK, exact.prefix(BEFORE))
    assert (hidden.float() - expected).norm() < 0.05 * expected.norm()


# Names, cards and tokenizers


def test_the_card_tells_width_and_parameters_without_weights(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "from_pretrained", lambda *_: pytest.fail("weights were loaded"))
        card = llm_card(f"hf:{folders['llama']}")
    assert (card.kind, card.width, card.terms) == ("llm", 32, None)
    assert card.parameters == sum(p.numel() for p in load_llm(card).parameters())
    assert llm_on_disk(card)
    assert llm_card(f"hf:{folders['llama']}#2") == replace(card, id=f"hf:{folders['llama']}#2")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smollm2-135", "no LLM smollm2-135; did you mean smollm2-135m"),
        ("", "no LLM ; known are"),
        ("st:/dir", "no LLM st:/dir"),
        ("hf:/no/such/place", "no directory /no/such/place"),
        ("gguf:/no/such.gguf", r"gguf:/no/such\.gguf: there is no file /no/such\.gguf"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(HymaError, match=message):
        llm_card(name)


def test_terms_must_be_accepted_before_the_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HYMA_CACHE", str(tmp_path))
    for attempt in (load_llm, load_tokenizer):
        with pytest.raises(HymaError, match=r"gemma3-270m comes under terms of its own .*--accept-terms gemma"):
            attempt(llm_card("gemma3-270m"))  # type: ignore[operator]
    assert not any(tmp_path.iterdir())


def test_what_is_no_causal_lm(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(HymaError, match="is a t5 model and not a causal LLM"):
        llm_card(f"hf:{tmp_path}")


def test_broken_directories_and_wrong_cards(tmp_path: Path) -> None:
    card = llm_card(f"hf:{save(tmp_path, 'llama')}")
    with pytest.raises(HymaError, match="takes embeddings of width 32 but its card says 33"):
        load_llm(replace(card, width=33))
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(HymaError, match=f"cannot be loaded from {tmp_path}"):
        load_llm(card)


def test_a_reading_that_is_wrong_is_refused(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    right = LanguageModel.head
    monkeypatch.setattr(LanguageModel, "head", lambda self: right(self)._replace(scale=1.0))
    with pytest.raises(HymaError, match=r"CohereForCausalLM\) is not read correctly"):
        load_llm(f"hf:{folders['cohere']}", dtype=torch.float32)


def test_layers_with_another_memory_are_refused(tmp_path: Path) -> None:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    config = Qwen3NextConfig(
        vocab_size=WORDS, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, layer_types=["linear_attention", "full_attention"], num_experts=0,
        linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
    )  # fmt: skip
    Qwen3NextForCausalLM(config).save_pretrained(tmp_path)
    tokenizer(**ORDINARY).save_pretrained(tmp_path)
    with pytest.raises(HymaError, match="has layers with linear_attention"):
        load_llm(f"hf:{tmp_path}")


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        (ORDINARY, "<pad>"),
        ({"eos_token": "</s>", "unk_token": "<unk>"}, "</s>"),
        ({"unk_token": "<unk>"}, "<unk>"),
    ],
)
def test_padding_reuses_a_token(special: dict[str, str], pad: str, tmp_path: Path) -> None:
    words = load_tokenizer(llm_card(f"hf:{save(tmp_path, 'llama', special)}"))
    assert words.pad_token == pad and len(words) == WORDS and words.chat_template is None


def test_no_token_to_pad_with(tmp_path: Path) -> None:
    card = llm_card(f"hf:{save(tmp_path, 'llama', {})}")
    with pytest.raises(HymaError, match="has no padding, end or unknown token"):
        load_tokenizer(card)


def test_answers_end_at_the_turns_end_too(tmp_path: Path) -> None:
    save(tmp_path, "llama")
    words = tokenizer(**ORDINARY)
    words.chat_template = TEMPLATE
    words.add_special_tokens({"extra_special_tokens": ["<turn>", "</turn>"]})
    words.save_pretrained(tmp_path)
    assert load_llm(f"hf:{tmp_path}").end_ids == (2, 5)
    words.chat_template = "{{ raise_exception('one turn only') }}"
    words.save_pretrained(tmp_path)
    assert load_llm(f"hf:{tmp_path}").end_ids == (2,)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantisation_without_bitsandbytes(
    kind: Quantisation, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    with pytest.raises(HymaError, match=rf"{kind} needs bitsandbytes.*hyma_mllm\[quant\]"):
        load_llm(f"hf:{folders['llama']}", quantisation=kind)
