"""What foreign files could do beside breaking a reader: take memory, name other files, leak secrets, lose an answer."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from hyma_mllm import command, run_directory
from hyma_mllm.data.imports import import_tensor
from hyma_mllm.data.manifest import Manifest
from hyma_mllm.data.pictures import BadPicture, open_picture
from hyma_mllm.data.sources import open_source
from hyma_mllm.errors import HymaError
from hyma_mllm.redaction import HIDDEN, redacted, redacted_arguments
from hyma_mllm.stitched.mllm_evaluation import AnswerFile
from hyma_mllm.zoo.towers import open_timm

SECRETS = ["hf_abcdefghijklmnopqrstuv", "s3cr3t-w0rd"]


@pytest.mark.parametrize(
    "line",
    [
        ["recipe.py", "--hub_token", SECRETS[1]],
        ["recipe.py", f"--api-key={SECRETS[1]}"],
        ["recipe.py", "--data", f"https://me:{SECRETS[1]}@host/x"],
        ["recipe.py", "--data", f"https://host/x?X-Amz-Signature={SECRETS[1]}&a=1"],
        ["recipe.py", SECRETS[0]],
        ["recipe.py", f"Authorization: Bearer {SECRETS[1]}"],
    ],
)
def test_secrets_are_hidden(line: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", line)
    written = json.dumps(run_directory.environment())
    assert not any(secret in written for secret in SECRETS)
    assert HIDDEN in written
    with pytest.raises(SystemExit), pytest.MonkeyPatch.context() as patch:
        said = io.StringIO()
        patch.setattr("sys.stderr", said)
        command.run(lambda: (_ for _ in ()).throw(HymaError(" ".join(["--option", *line[1:]]))))
    assert SECRETS[0] not in redacted(" ".join(line))


def test_what_is_no_secret_stays() -> None:
    line = ["vlm.py", "--tokens.disk_gb", "8", "--max_new_tokens=16", "--llms", "[hf:/models/x]", "--author", "me"]
    assert redacted_arguments(line) == line
    folders = "/cache/features/dd74/hf__models_clip-vit-base-patch32-image-fp32 and /src/sk-image, /pypi-mirror"
    assert redacted(folders) == folders
    assert redacted("The tokenizer: has no padding, end or unknown token; name one in /x.") == (
        "The tokenizer: has no padding, end or unknown token; name one in /x."
    )


def test_a_picture_of_another_program_is_not_opened() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (9, 9)).save(buffer, "EPS")
    with pytest.raises(BadPicture, match="known format"):
        open_picture(buffer.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_a_table_is_no_picture(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "x.csv").write_text("image,caption\npipe.png,a\n/dev/zero,b\n")
    source = open_source(str(tmp_path / "x.csv"))
    for row in source.rows():
        with pytest.raises(BadPicture, match="device or a pipe"):
            open_picture(row.image)
    assert source.fingerprint


def packed(path: Path) -> None:
    """Compress the members of a `.pt` file, as torch never does."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)


def test_a_packed_pt_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(1000, 100), path)
    packed(path)
    with pytest.raises(HymaError, match="compressed archive"):
        import_tensor(path, tmp_path / "store", "m")


def test_a_small_tensor_repeated_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.ones(1, 1).expand(10**6, 10**6), path)
    assert path.stat().st_size < 10_000
    with pytest.raises(HymaError, match="larger than what is stored"):
        import_tensor(path, tmp_path / "store", "m")


def test_npy_objects_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[open, 1]], dtype=object), allow_pickle=True)
    with pytest.raises(HymaError, match="cannot be read as a tensor"):
        import_tensor(tmp_path / "x.npy", tmp_path / "store", "m")


def test_a_shard_outside_its_store_is_refused(tmp_path: Path) -> None:
    shard = {"file": "../other/shard-00000.safetensors", "rows": 1, "sha256": "x"}
    content = {
        "format": 1, "model": "m", "revision": "r", "kind": "image", "rows": 1, "width": 1, "dtype": "fp32",
        "source": "s", "unit_norm": False, "keys_sha256": "x", "compute_dtype": "fp32", "shards": [shard],
        "seconds": 0.0, "versions": {},
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(HymaError, match="outside"):
        Manifest.read(tmp_path / "manifest.json")


@pytest.mark.parametrize("content", [b"a letter to somebody", b"good\nbad", b"\x89PNG\r\n\x1a\n..."])
def test_another_file_is_not_cut(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(HymaError):
        AnswerFile(path, "m", False, [])
    assert path.read_bytes() == content


def test_timm_takes_no_weights_from_a_config(tmp_path: Path) -> None:
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"checkpoint_path": "/tmp/evil.pth"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(HymaError, match="model_args may not hold checkpoint_path"):
        open_timm("vit_tiny_patch16_224", tmp_path)
