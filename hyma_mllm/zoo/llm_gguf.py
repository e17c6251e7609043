"""GGUF files: what their headers say, and the transformers directory that one is converted into, once."""

import functools
import importlib.util
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, reason
from hyma_mllm.packages import sha256_of
from hyma_mllm.paths import cache_dir
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.gguf_check import check_gguf

logger = logging.getLogger("hyma_mllm")

# What the converted weights are kept in. The rounding is far below that of the 4 to 8 bits they come from: on SmolLM2
# it moves the next-word distribution by a divergence of 8e-5 nats and no first choice, of 85.
STORED = torch.bfloat16

MAX_WIDTH = 1 << 20
"""Of embeddings: a header that says more is damaged."""


def gguf_folder(revision: str) -> Path:
    """Where the converted model of a GGUF file with this sha256 is, or will be."""
    return cache_dir() / "models" / f"gguf-{revision[:12]}"


def gguf_card(name: str, file: Path) -> ModelCard:
    """The card of a GGUF file, from its header.

    Raises:
        HymaError: there is no such file, it is no GGUF file, or the package gguf is missing.
    """
    if not file.is_file():
        raise HymaError(f"{name}: there is no file {file}; give the path of a GGUF file.")
    width, parameters, licence = _header(file)
    return ModelCard(
        id=name,
        kind="llm",
        source=str(file),
        revision=_revision(file, file.stat().st_mtime_ns),
        width=width,
        parameters=parameters,
        licence=licence or "see where the file comes from",
        origin=file.name,
    )


def convert_gguf(file: Path, revision: str) -> Path:
    """The transformers directory of a GGUF file, converted the first time.

    Raises:
        HymaError: the file cannot be read, or transformers does not know its architecture.
    """
    return convert_dir_once(gguf_folder(revision), lambda scratch: file)


def convert_dir_once(target: Path, gguf_file: Callable[[Path], Path]) -> Path:
    """The directory `target`, made from a GGUF file when it is not there yet.

    It appears in one step, so that a kill leaves no half of it, and one process at a time converts.

    Args:
        target: the directory.
        gguf_file: given a scratch directory, the file to convert; called only when there is need.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not target.is_dir():
            with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
                scratch, finished = Path(temporary) / "scratch", Path(temporary) / "finished"
                scratch.mkdir()
                dequantise(gguf_file(scratch), finished)
                finished.replace(target)
    return target


def dequantise(file: Path, target: Path) -> None:
    """Write a GGUF file's model and tokenizer as a transformers directory with plain bfloat16 weights.

    Raises:
        HymaError: the file cannot be read, or transformers does not know its architecture.
    """
    _need_gguf()
    logger.info("dequantising %s, which takes a minute and happens once", file.name)
    try:
        check_gguf(file)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name, trust_remote_code=False)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, trust_remote_code=False
        )
    except UNREADABLE as error:
        raise HymaError(f"{file} cannot be read as an LLM: {reason(error)}") from error
    _forget_quantisation(model)
    model.to(STORED).save_pretrained(target)
    tokenizer.save_pretrained(target)


def _forget_quantisation(model: PreTrainedModel) -> None:
    """Transformers takes a model that came from GGUF for a quantised one, and would refuse to save it."""
    model.hf_quantizer = None
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config


def _need_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise HymaError("GGUF files need the package gguf, which is not installed; run `pip install 'hyma_mllm[zoo]'`.")


def _header(file: Path) -> tuple[int, int, str]:
    """(width of the embeddings, number of weights, licence or nothing)."""
    _need_gguf()
    from gguf import GGUFReader  # an optional package

    try:
        check_gguf(file)
        reader = GGUFReader(file)
        architecture = reader.fields["general.architecture"].contents()
        width = int(reader.fields[f"{architecture}.embedding_length"].contents())
        if not 0 < width <= MAX_WIDTH:
            raise ValueError(f"embeddings of width {width}")
        licence = reader.fields.get("general.license")
        parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
        return width, parameters, str(licence.contents()) if licence else ""
    except UNREADABLE as error:
        raise HymaError(f"{file} is not the GGUF file of an LLM ({reason(error)}); fetch it again.") from error


@functools.cache
def _revision(file: Path, changed: int) -> str:
    """The file's sha256; `changed`, its time of change, makes the answer of an older file void."""
    return sha256_of(file)
