"""Tensors out of `.pt` files of others: nothing that runs, and nothing larger than the file that it comes from."""

import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hyma_mllm.foreign import UNREADABLE, reason


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote, as tensors in plain containers; mapped into memory where the format allows it.

    Raises:
        ValueError: the file names anything but tensors and plain values, is damaged, or is packed (which torch never
            does) so that it could unpack to any size.
        OSError: it cannot be opened.
    """
    try:
        packed = zipfile.is_zipfile(path)
        if packed:
            _refuse_packed(path)
        # Mapped, a tensor that claims more than the file holds is refused; read, torch trusts the claim.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=packed)
    except OSError:
        raise
    except (*UNREADABLE, MemoryError) as error:  # a length that lies asks for more memory than there is
        raise ValueError(reason(error)) from error


def check_plain(tensor: Tensor) -> None:
    """Refuse a tensor that is not floating numbers in memory, each with a place of its own.

    Raises:
        ValueError: it is sparse, quantised, has no data, or is a small one repeated to a huge one.
    """
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise ValueError("it is sparse, quantised or without data, not a plain tensor")
    if not tensor.is_floating_point():
        raise ValueError(f"it is of {tensor.dtype}, not floating")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"its shape {tuple(tensor.shape)} is larger than what is stored")


def _refuse_packed(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise ValueError("it is a compressed archive, which torch never writes")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError("it unpacks to more than the file holds")
