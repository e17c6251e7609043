"""What can be known of a text encoder in a directory or on the hub before its weights are loaded."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    EntryNotFoundError,
    HTTPError,
    LocalEntryNotFoundError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
)
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from hyma_mllm.errors import HymaError
from hyma_mllm.foreign import UNREADABLE, is_file, parse_json, reason
from hyma_mllm.packages import sha256_once

# The hub's client moved from one HTTP library to the next; the name that it imports is right under either.
_HUB_FAILS = (HTTPError, OSError)
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class TextPlace:
    """A local directory, or a repository of the hub at one commit.

    Attributes:
        address: what transformers and sentence-transformers load from: the directory, or the hub id.
        revision: hub commit; for a directory the sha256 over its files.
        local: True for a directory, one of the hub's cache included.
    """

    address: str
    revision: str
    local: bool

    def json(self, file: str) -> Any:
        """A JSON file of the place, None where it has none.

        Raises:
            HymaError: the file is not JSON, or the hub does not answer.
        """
        if self.local:
            path = Path(self.address) / file
            if not is_file(path):
                return None
        else:
            try:
                path = Path(huggingface_hub.hf_hub_download(self.address, file, revision=self.revision))
            except LocalEntryNotFoundError as error:  # the hub was not asked, or did not answer
                raise self._not_given(file, error) from error
            except EntryNotFoundError:
                return None
            except _HUB_FAILS as error:
                raise self._not_given(file, error) from error
        try:
            return parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise HymaError(f"{path} is not JSON ({error}); save the model again.") from error

    def parameters(self) -> int:
        """Number of weights in the place's safetensors files, read from their headers.

        Raises:
            HymaError: there is no safetensors file, or the hub does not answer.
        """
        nothing = f"{self.address} holds no .safetensors file; save the model with safetensors first."
        if not self.local:
            try:
                metadata = huggingface_hub.get_safetensors_metadata(self.address, revision=self.revision)
            except NotASafetensorsRepoError as error:
                raise HymaError(nothing) from error
            except (*_HUB_FAILS, SafetensorsParsingError) as error:
                raise self._not_given("the headers of its weights", error) from error
            return sum(metadata.parameter_count.values())
        files = sorted(Path(self.address).rglob("*.safetensors"))
        if not files:
            raise HymaError(nothing)
        try:
            return sum(_numbers(file) for file in files)
        except (SafetensorError, OSError) as error:
            raise HymaError(f"The weights in {self.address} are damaged ({reason(error)}); save it again.") from error

    def hidden_size(self, folder: str = "") -> int:
        """Width of the transformer in a folder of the place, from its config.

        Raises:
            HymaError: there is no config.json that transformers understands.
        """
        where = {"subfolder": folder} if folder else {}
        if not self.local:
            where["revision"] = self.revision
        try:
            config = AutoConfig.from_pretrained(self.address, trust_remote_code=False, **where)
        except (*_HUB_FAILS, *UNREADABLE) as error:
            raise HymaError(
                f"{self.address} has no config.json that transformers understands: {reason(error)}"
            ) from error
        width = getattr(config, "hidden_size", None)
        if not isinstance(width, int):
            raise HymaError(f"The config of {self.address} names no hidden_size; it is not a text encoder.")
        return width

    def sentence_width(self) -> int:
        """Width of what a sentence-transformers model at this place returns, from its module configs."""
        modules = self.json("modules.json")
        if modules is None:
            return self.hidden_size()
        try:
            return self._joined_width(modules)
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise HymaError(
                f"{self.address}/modules.json, or a config that it names, is damaged ({reason(error)}); save the model "
                "again."
            ) from error

    def _joined_width(self, modules: Any) -> int:
        width = 0
        for module in modules:
            kind = module["type"].rsplit(".", 1)[-1]
            if kind == "Transformer":
                width = self.hidden_size(module["path"])
                continue
            config = self.json(f"{module['path']}/config.json") or {}
            if kind == "Pooling":
                width *= _pooling_modes(config)
            elif kind == "Dense":
                width = int(config["out_features"])
        if not width:
            raise HymaError(f"{self.address}/modules.json starts with no Transformer; its width cannot be told.")
        return width

    def _not_given(self, what: str, error: Exception) -> HymaError:
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        return HymaError(f"The hub did not give {what} of {self.address} ({said}); check the network and try again.")


def find_place(name: str, address: str) -> TextPlace:
    """What `st:ADDRESS` or `hf:ADDRESS` means: a directory, else the hub, else what was fetched from it before.

    Raises:
        HymaError: neither a directory nor a repository that the hub knows.
    """
    path = Path(address).expanduser()
    if path.is_dir():
        return TextPlace(str(path), _fingerprint(path), local=True)
    if not _HUB_NAME.fullmatch(address) or path.exists():
        raise HymaError(f"{name}: there is no directory {address}; give a model's directory or its hub id.")
    try:
        commit = huggingface_hub.model_info(address).sha
    except _HUB_FAILS as error:
        config = huggingface_hub.try_to_load_from_cache(address, "config.json")
        if isinstance(config, str) and any(Path(config).parent.rglob("*.safetensors")):
            snapshot = Path(config).parent  # fetched before; the hub's cache names the folder by the commit
            return TextPlace(str(snapshot), snapshot.name, local=True)
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise HymaError(
            f"{name}: there is no directory {address} and the hub did not give it ({said}); "
            "check the name and the network."
        ) from error
    return TextPlace(address, str(commit), local=False)


def fetch_snapshot(name: str, repository: str, commit: str) -> Path:
    """The hub repository's configs, tokenizer and safetensors as a local directory; no code, no pickles.

    Raises:
        HymaError: the hub did not give it.
    """
    wanted = ["*.json", "*.txt", "*.model", "*.safetensors"]
    try:
        return Path(huggingface_hub.snapshot_download(repository, revision=commit, allow_patterns=wanted))
    except _HUB_FAILS as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise HymaError(f"{name} could not be fetched ({said}); check the network.") from error


def _fingerprint(folder: Path) -> str:
    """The sha256 over names and contents of all files, hidden ones left out."""
    total = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        relative = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            total.update(f"{relative.as_posix()}\0{sha256_once(path)}\n".encode())
    return total.hexdigest()


def _numbers(file: Path) -> int:
    total = 0
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 (safe_open is no mapping)
            count = 1
            for side in tensors.get_slice(name).get_shape():
                count *= side
            total += count
    return total


def _pooling_modes(config: dict[str, Any]) -> int:
    """How many vectors a Pooling module joins: its config lists them, or has one flag for each."""
    mode = config.get("pooling_mode")
    if isinstance(mode, str):
        return 1
    if isinstance(mode, list):
        return len(mode)
    return sum(value is True for key, value in config.items() if key.startswith("pooling_mode_"))
