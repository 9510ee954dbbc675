"""A checkpoint folder of Hugging Face: ``config.json`` and safetensors. No pickle is read and no code of it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from megapre.hub.settings import PART

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LARGEST_JSON = 64 << 20
"""Bytes of a configuration or index file that are read at most."""


class Folder:
    """The tensors of a folder by name, read box by box, with those of the model beside it (`PART`).

    Raises ValueError in a sentence for a folder without safetensors, a damaged file, or an index that leads elsewhere.
    """

    def __init__(self, path: Path, *, alone: bool = False) -> None:
        self.path = path
        self.config = read_json(path / "config.json")
        self._files: dict[str, Any] = {}
        self._place: dict[str, str] = {}
        for file in self._names():
            for name in self._open(file).keys():
                if self._place.setdefault(name, file) != file:
                    raise ValueError(f"{path} holds {name!r} twice, in {self._place[name]} and in {file}.")
        self.shapes = {name: tuple(self._slice(name).get_shape()) for name in self._place}
        self.beside = Folder(path / PART, alone=True) if not alone and is_folder(path / PART) else None
        if self.beside is not None:
            self.config = {**self.config, PART: self.beside.config}
            self.shapes |= {f"{PART}/{name}": shape for name, shape in self.beside.shapes.items()}

    def read(self, name: str, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box of a tensor, in the file's number format."""
        if name not in self._place and self.beside is not None:
            return self.beside.read(name.removeprefix(f"{PART}/"), offset, size)
        if not offset:
            return self._open(self._place[name]).get_tensor(name)
        return self._slice(name)[tuple(slice(o, o + n) for o, n in zip(offset, size))]

    def _slice(self, name: str) -> Any:
        return self._open(self._place[name]).get_slice(name)

    def _names(self) -> list[str]:
        if (self.path / INDEX).exists():
            places = read_json(self.path / INDEX).get("weight_map")
            if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
                raise ValueError(f"{self.path / INDEX} has no weight_map of file names.")
            strange = [file for file in places.values() if Path(file).name != file]
            if strange:
                raise ValueError(f"{self.path / INDEX} names {strange[0]!r}, which is not a file of its own folder.")
            return sorted(set(places.values()))
        if (self.path / SINGLE).exists():
            return [SINGLE]
        old = sorted(file.name for file in self.path.glob("*.bin"))
        more = f", only {old[0]}, a pickle, which megapre does not open: save it again as safetensors" if old else ""
        raise ValueError(f"{self.path} has neither {SINGLE} nor {INDEX}{more}.")

    def _open(self, file: str) -> Any:
        if file not in self._files:
            try:
                self._files[file] = safe_open(self.path / file, framework="pt")
            except (SafetensorError, OSError) as problem:
                raise ValueError(f"{self.path / file} cannot be read: {problem}.") from None
        return self._files[file]


def read_json(path: Path) -> dict[str, Any]:
    """An object of a JSON file; ValueError in a sentence when it is none."""
    try:
        if path.stat().st_size > LARGEST_JSON:
            raise ValueError(
                f"{path} has {path.stat().st_size} bytes; a file of settings has less than {LARGEST_JSON}."
            )
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as problem:
        raise ValueError(f"{path} cannot be read: {problem}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object.")
    return found


def is_folder(path: Path) -> bool:
    """Whether ``path`` looks like a checkpoint of Hugging Face rather than one of megapre."""
    return (path / "config.json").exists() and not (path / "checkpoint.json").exists()
