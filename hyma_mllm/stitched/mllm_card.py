"""The README.md of a stitched MLLM: what it is, how it loads and scores, and whom it owes credit."""

from hyma_mllm.stitched.mllm_config import Form, MLLMConfig
from hyma_mllm.zoo.cards import ModelCard

_LOADS: dict[Form, str] = {
    "llava": "This directory is a plain `LlavaForConditionalGeneration`: it loads with transformers alone, and "
    "lmms-eval evaluates it as `llava_hf`.",
    "fastvlm": "This directory is a plain `FastVlmForConditionalGeneration` with a timm network as its vision tower: "
    "it loads with transformers and timm alone. lmms-eval's `llava_hf` does not know this class; use `eval/vqa.py`.",
    "own": "LLaVA has no words for this pair (joined tokens, another connector or another output head), so the "
    "directory holds a class of hyma_mllm: `import hyma_mllm.stitched.mllm_own` registers it with transformers.",
}

_USE = """\
```python
{register}from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("path/to/this/directory")
processor = AutoProcessor.from_pretrained("path/to/this/directory")
content = [{{"type": "image", "path": "cat.jpg"}}, {{"type": "text", "text": "What is this?"}}]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
ids = model.generate(**inputs, max_new_tokens=16)
print(processor.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

It also runs under `pipeline("image-text-to-text", model="path/to/this/directory")`, and with hyma_mllm installed:

```bash
hyma answer path/to/this/directory cat.jpg "What is this?"
```

The picture stands first in the first user turn, as in training; a transparent picture is laid on white beforehand.
"""


def mllm_card(config: MLLMConfig) -> str:
    """The model card as Markdown with a front matter that model hubs read.

    Args:
        config: of the stitched MLLM.
    """
    register = "import hyma_mllm.stitched.mllm_own  # registers the class\n" if config.form == "own" else ""
    frozen = "both frozen" if not config.tuned else f"the LLM tuned afterwards ({config.tuned})"
    sections = [
        "---\nlibrary_name: transformers\npipeline_tag: image-text-to-text\nlicense: other\n"
        "license_name: the-licences-of-its-parts\n---",
        f"# {config.model_id}",
        f"The vision tower `{config.vision.id}` and the LLM `{config.llm.id}`, {frozen}, joined by a small trained "
        f"connector ({config.connector.name}, {config.connector.activation}) from {config.vision.tokens} vision "
        f"tokens of width {config.vision.width} to the LLM's input embeddings of width {config.llm.width}.",
        "## How it loads",
        _LOADS[config.form],
        _USE.format(register=register),
        "## Scores",
        _scores(config),
        "## Parts and attribution",
        _part("vision tower", config.vision),
        _part("LLM", config.llm),
        _data(config),
        "Whoever passes this model on passes on the licences of its parts.",
        "## Written by",
        ", ".join(f"{name} {version}" for name, version in config.versions.items()),
    ]
    return "\n\n".join(section.strip() for section in sections) + "\n"


def _scores(config: MLLMConfig) -> str:
    if not config.scores:
        return "This model was not evaluated."
    lines = ["| evaluation | with the picture, percent | without it (blind), percent |", "|---|---|---|"]
    for task, score in config.scores.items():
        blind = f"{config.blind[task]:.1f}" if task in config.blind else "not measured"
        lines.append(f"| {task} | {score:.1f} | {blind} |")
    return "\n".join(lines) + "\n\nBlind: the same LLM on the same questions without the picture."


def _part(side: str, card: ModelCard) -> str:
    facts = {
        "revision": f"`{card.revision}`",
        "parameters": f"{card.parameters:,}",
        "licence": card.licence,
        "weights from": card.source,
        "first published": card.origin,
    }
    told = "; ".join(f"{name} {fact}" for name, fact in facts.items() if fact)
    return f"- **{side}** `{card.id}`: {told}."


def _data(config: MLLMConfig) -> str:
    if not config.data:
        return "The data that the connector was trained on is not recorded."
    lines = ["Trained on:", ""]
    for credit in config.data:
        by = f", {credit.attribution}" if credit.attribution else ""
        lines.append(f"- {credit.name}: licence {credit.licence}{by}")
    return "\n".join(lines)
