"""The readers of models, runs, recipes and archives under the fuzzer."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np
import safetensors.torch
import torch

from hyma_mllm import packages
from hyma_mllm.connectors import ConnectorSpec
from hyma_mllm.data.standardise import Standardiser
from hyma_mllm.stitched.config import StitchedConfig
from hyma_mllm.stitched.mllm import check_files
from hyma_mllm.stitched.mllm_config import MLLMConfig
from hyma_mllm.stitched.release import load_release_connector
from hyma_mllm.stitched.vlm import StitchedVLM
from hyma_mllm.zoo.cards import ModelCard
from hyma_mllm.zoo.llm_gguf import gguf_card
from hyma_mllm.zoo.restricted_pickle import load_arrays
from hyma_mllm.zoo.text_places import find_place
from hyma_mllm.zoo.towers import open_timm

if TYPE_CHECKING:  # mypy takes the folder for a package; a script that is run finds what stands beside it
    from benchmarks.fuzz_data import TAR, as_bytes, odd_tensor, safetensors_bytes, tar_bytes, tar_files, torch_bytes
    from benchmarks.fuzz_mutate import json_files, mutated_bytes, mutated_tree, nested, odd_values
    from benchmarks.fuzz_reader import Reader
else:
    from fuzz_data import TAR, as_bytes, odd_tensor, safetensors_bytes, tar_bytes, tar_files, torch_bytes
    from fuzz_mutate import json_files, mutated_bytes, mutated_tree, nested, odd_values
    from fuzz_reader import Reader

CARDS = (
    ModelCard("v", "image", "s", "r", 3, 9, "MIT", tokens=4),
    ModelCard("t", "text", "s", "r", 4, 9, "MIT"),
    ModelCard("l", "llm", "s", "r", 4, 9, "MIT"),
)


def stitched_vlm() -> Reader:
    """`config.json` and the standardiser of an exported pair; it ends where the text side would be loaded."""
    config = json.loads(StitchedConfig(CARDS[0], CARDS[1], ConnectorSpec(0, 0), scores={"a": 1.0}).to_json())
    tensors = safetensors.torch.save(dict(Standardiser(3).state_dict()))
    length = struct.unpack("<Q", tensors[:8])[0]
    header = json.loads(tensors[8 : 8 + length])
    configs = json_files({"config.json": config})

    def draw(rng: Random) -> dict[str, bytes]:
        if rng.random() < 0.6:
            return configs(rng)
        changed = safetensors_bytes(mutated_tree(header, rng), tensors[8 + length :], rng)
        return {"image_standardiser.safetensors": changed}

    files = {**as_bytes({"config.json": config}), "image_standardiser.safetensors": tensors}
    return Reader("stitched vlm", files, draw, lambda folder, changed: StitchedVLM.from_pretrained(folder))


def stitched_mllm() -> Reader:
    """`hyma.json` and the weights' index of an exported MLLM."""
    config = json.loads(MLLMConfig(CARDS[0], CARDS[2], ConnectorSpec(1, 8, "gelu"), scores={"a": 1.0}).to_json())
    index = {"metadata": {}, "weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    trees = {"hyma.json": config, "model.safetensors.index.json": index}
    weights = safetensors.torch.save({"a": torch.ones(3)})
    plain = [
        "config.json",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ]
    files = {
        **as_bytes(trees),
        **dict.fromkeys(plain, b"{}"),
        "model-1.safetensors": weights,
        "model-2.safetensors": weights,
    }

    def read(folder: Path, changed: str) -> object:
        check_files(folder)
        return MLLMConfig.read(folder)

    return Reader("stitched mllm", files, json_files(trees), read)


STATE = {"0.weight": torch.ones(5, 4), "0.bias": torch.ones(5), "2.weight": torch.ones(3, 5), "2.bias": torch.ones(3)}


def release() -> Reader:
    """The authors' connectors."""
    names = [f"vit_s16_mlp1_minilm.{suffix}" for suffix in ("pt", "pth", "safetensors")]
    files = {names[0]: torch_bytes(STATE), names[1]: torch_bytes({"model": STATE}, True)}
    files[names[2]] = safetensors.torch.save(STATE)

    def draw(rng: Random) -> dict[str, bytes]:
        state: dict[Any, Any] = dict(STATE)
        for _ in range(rng.choice([1, 2])):
            state[rng.choice([*STATE, "x", "layers.0.weight", 3, "9" * 5000 + ".bias"])] = odd_tensor(rng)
        wrapped = rng.choice([state, state, {"model": state}, {"model_state_dict": [state]}, [state], odd_values(rng)])
        name = rng.choice(names[:2])
        try:
            return {name: torch_bytes(wrapped, legacy=name == names[1])}
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, RecursionError):
            return {name: mutated_bytes(files[name], rng)}

    return Reader("release connectors", files, draw, lambda folder, changed: load_release_connector(folder / changed))


def gguf_bytes(rng: Random | None = None) -> bytes:
    """A small GGUF file; with `rng` some of its lengths, kinds and values are others."""

    def odd(value: int, top: int) -> int:
        if rng is None or rng.random() > 0.06:
            return value
        return rng.choice([0, 1, 9, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]) % (top + 1)

    def text(value: bytes) -> bytes:
        return struct.pack("<Q", odd(len(value), 2**64 - 1)) + value

    def pair(key: bytes, kind: int, value: bytes) -> bytes:
        return text(key) + struct.pack("<I", odd(kind, 2**32 - 1)) + value

    pairs = [
        pair(b"general.architecture", 8, text(b"llama")),
        pair(b"llama.embedding_length", 4, struct.pack("<I", odd(32, 2**32 - 1))),
        pair(b"general.license", 8, text(b"mit")),
        pair(b"tokens", 9, struct.pack("<IQ", odd(8, 2**32 - 1), odd(2, 2**64 - 1)) + text(b"a") + text(b"b")),
        pair(b"scores", 9, struct.pack("<IQ", 6, odd(2, 2**64 - 1)) + bytes(8)),
    ]
    shape = struct.pack("<IQQII", odd(2, 2**32 - 1), odd(4, 2**64 - 1), odd(2, 2**64 - 1), 0, 0)[:-4]
    tensor = text(b"a.weight") + shape + struct.pack("<Q", odd(0, 2**64 - 1))
    head = b"GGUF" + struct.pack("<IQQ", odd(3, 2**32 - 1), odd(1, 2**64 - 1), odd(len(pairs), 2**64 - 1))
    body = head + b"".join(pairs) + tensor
    return body + bytes(-len(body) % 32) + bytes(32)


def array_pickles(rng: Random) -> dict[str, bytes]:
    """Pickles of odd objects, and hand-written ones that number, repeat and nest."""
    loop: list[Any] = []
    loop.append(loop)
    values = [
        np.ones(3, object),
        np.ones(3),
        {"a": np.float32(3)},
        loop,
        nested(900),
        {1, 2},
        Path,
        odd_values(rng),
        3 + 4j,
        np.dtype("V9"),
        np.array([b"a"]),
        np.ma.ones(3),
        torch.ones(3),
        np.datetime64("2020-01-01"),
        b"a" * 99,
    ]
    written = [
        b"\x80\x02]r\xff\xff\xff\x7f.",
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x04\x8e" + b"\xff" * 7 + b"\x7f.",
        b"(" * 5000 + b"t" * 5000 + b".",
        b"cnumpy\ndtype\n(S'O'\ntR.",
        b"cnumpy\ndtype\n(S'f8'\ntR(I1\nI2\nI3\ntb.",
        b"cnumpy\nndarray\n((I-1\ntS'f8'\ntR.",
        b"I" + b"9" * 5000 + b"\n.",
    ]
    if rng.random() < 0.4:
        return {"x.pkl": rng.choice(written)}
    try:
        return {"x.pkl": pickle.dumps(rng.choice(values), protocol=rng.randrange(6))}
    except (pickle.PicklingError, TypeError, RecursionError, AttributeError):
        return {"x.pkl": rng.choice(written)}


def archive() -> Reader:
    """Zip and tar archives, unpacked whole."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/b.txt", b"text" * 99)
        file.writestr("c.txt", b"")
    files = {"x.zip": buffer.getvalue(), "x.tar": tar_bytes(TAR), "x.tgz": tar_bytes(TAR, "w:gz")}

    def draw(rng: Random) -> dict[str, bytes]:
        if rng.random() < 0.5:
            return tar_files(rng)
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w", rng.choice([0, 8, 12, 14])) as file:
            for _ in range(2):
                info = zipfile.ZipInfo(
                    rng.choice(["a", "a/b", "../a", "/a", "a\\b", ".", "c:/x", "a//b", "x" * 300, "é", "a/"])
                )
                info.external_attr = rng.choice([0, 0, 0o120777 << 16, 0o60666 << 16])
                file.writestr(info, bytes(rng.choice([0, 9, 3_000_000])))
        return {"x.zip": made.getvalue()}

    def read(folder: Path, changed: str) -> object:
        import shutil

        target = folder / "out"
        shutil.rmtree(target, ignore_errors=True)
        return packages.open_tree(folder / changed, target, limit=1_000_000)

    return Reader("archives", files, draw, read)


def text_place() -> Reader:
    """The module list and configs of a sentence-transformers directory, from which a card is made."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
    ]
    trees = {
        "modules.json": modules,
        "config.json": {"model_type": "bert", "hidden_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1},
        "1_Pooling/config.json": {"word_embedding_dimension": 4, "pooling_mode_mean_tokens": True},
        "2_Dense/config.json": {"in_features": 4, "out_features": 3},
    }

    def read(folder: Path, changed: str) -> object:
        place = find_place("st:x", str(folder))
        return place.sentence_width(), place.parameters()

    weights = safetensors.torch.save({"a": torch.ones(3)})
    return Reader("text encoder directory", {**as_bytes(trees), "model.safetensors": weights}, json_files(trees), read)


def timm_directory() -> Reader:
    """`config.json` of a directory in timm's layout; the network is built without weights."""
    config = {"architecture": "squeezenet", "num_classes": 3, "model_args": {}, "pretrained_cfg": {"tag": "x"}}
    config = config | {
        "architecture": "vit_tiny_patch16_224",
        "model_args": {"depth": 1, "embed_dim": 12, "num_heads": 1},
    }
    trees = {"config.json": config}

    def read(folder: Path, changed: str) -> object:
        return open_timm("vit_tiny_patch16_224", folder, weights=False).parameters

    return Reader("timm directory", as_bytes(trees), json_files(trees), read)


def readers() -> list[Reader]:
    """All of them."""
    pickled = {"x.pkl": pickle.dumps({"a": np.ones((3, 2), np.float32), "b": [np.ones(2)]}, protocol=2)}
    return [
        stitched_vlm(),
        stitched_mllm(),
        release(),
        Reader(
            "gguf",
            {"x.gguf": gguf_bytes()},
            lambda rng: {"x.gguf": gguf_bytes(rng)},
            lambda folder, changed: gguf_card("gguf:x", folder / "x.gguf"),
        ),
        Reader("numpy pickles", pickled, array_pickles, lambda folder, changed: load_arrays(folder / "x.pkl")),
        archive(),
        text_place(),
        timm_directory(),
    ]
