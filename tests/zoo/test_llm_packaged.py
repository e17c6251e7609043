"""The packaged LLMs: what they say, and that reading them from embeddings is reading them."""

from functools import cache

import pytest
import torch

from hyma_mllm.zoo.llm import LLM_CARDS, LanguageModel, llm_on_disk, load_llm

pytestmark = pytest.mark.zoo
EVERY = ["smollm2-135m", "qwen2.5-coder-0.5b", "gemma3-270m"]


@cache
def llm(name: str) -> LanguageModel:
    """In float32. Nobody accepts Gemma's terms by running tests: it is tested where it was fetched before."""
    card = LLM_CARDS[name]
    if card.terms and not llm_on_disk(card):
        pytest.skip(f"{name} was never fetched here; its terms are for its user to accept")
    return load_llm(card, dtype=torch.float32, accepted_terms=[card.terms or ""])


@pytest.fixture(params=EVERY)
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return llm(request.param)


def answer(model: LanguageModel, text: str, words: int = 8) -> str:
    ids = torch.tensor([model.tokenizer(text)["input_ids"]])
    return model.tokenizer.decode(model.generate(model.embed(ids), torch.ones_like(ids), words)[0])


def test_the_card_tells_the_truth(model: LanguageModel) -> None:
    assert sum(parameter.numel() for parameter in model.parameters()) == model.card.parameters
    assert model.width == model.card.width == model.embed(torch.tensor([5])).shape[1]
    assert llm_on_disk(model.card)


def test_embeddings_have_their_known_sizes(model: LanguageModel) -> None:
    expected = {"smollm2-135m": 0.1356, "qwen2.5-coder-0.5b": 0.01733, "gemma3-270m": 1.031}[model.card.id]
    assert model.embedding_rms == pytest.approx(expected, rel=0.02)


def test_hidden_states_behind_a_prefix(model: LanguageModel) -> None:
    text = "Paris is the capital of France, and Rome is the capital of Italy."
    ids = torch.tensor(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    with torch.no_grad():
        expected = model.model(input_ids=ids[None], use_cache=False).logits[0, 4:]
    embeddings = torch.cat([torch.zeros(1, 3, model.width), model.embed(ids[None, 4:])], dim=1).requires_grad_()
    mask = torch.tensor([[0] * 3 + [1] * (len(ids) - 4)])
    hidden = model.hidden(embeddings, mask, model.prefix(ids[:4]))
    torch.testing.assert_close(model.logits(hidden)[0, 3:], expected, atol=2e-4, rtol=1e-4)
    (gradient,) = torch.autograd.grad(hidden.square().sum(), embeddings)
    assert not gradient[:, :3].any() and gradient[:, 3:].any()


def test_smollm_knows_the_capital_of_france() -> None:
    assert "Paris" in answer(llm("smollm2-135m"), "The capital of France is", 4)


def test_gemma_knows_where_paris_is_and_writes_no_pictures() -> None:
    gemma = llm("gemma3-270m")
    assert "France" in answer(gemma, "Rome is the capital of Italy. Paris is the capital of", 2)
    assert gemma.tokenizer.convert_tokens_to_ids("<start_of_image>") in gemma.banned_ids
    assert gemma.tokenizer.chat_template is None


def test_qwen_knows_the_colour_of_the_sky_and_ends_its_turn() -> None:
    qwen = llm("qwen2.5-coder-0.5b")
    turns = [{"role": "user", "content": "What color is the sky? Answer in one short sentence."}]
    text = qwen.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    ids = torch.tensor([qwen.tokenizer(text, add_special_tokens=False)["input_ids"]])
    words = qwen.generate(qwen.embed(ids), torch.ones_like(ids), 24)[0]
    assert "blue" in qwen.tokenizer.decode(words) and len(words) < 24
    assert qwen.tokenizer.convert_tokens_to_ids("<|im_end|>") in qwen.end_ids
