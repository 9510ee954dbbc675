"""Weights from a Hugging Face folder straight into any layout: each rank reads the boxes that it holds."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import prod
from pathlib import Path

from torch import Tensor

from megapre.checkpoint.reshard import Box, boxes
from megapre.config.model import ModelConfig
from megapre.hub.families import Family, differences, family
from megapre.hub.folder import Folder
from megapre.hub.link import Link, their_shapes
from megapre.hub.settings import Settings
from megapre.models.spec import tensors
from megapre.parallel.placement import Address

MOST_NAMES = 20
"""Tensors that an error lists."""


class Import:
    """A folder that has been found to be a model of a known family, with all of its tensors and no others."""

    def __init__(self, path: Path) -> None:
        self.folder = Folder(path)
        self.family: Family = family(str(self.folder.config.get("model_type")))
        settings = Settings(self.folder.config, str(path / "config.json"))
        self.model: ModelConfig = self.family.read(settings, set(self.folder.shapes))
        self.shapes = {spec.name: spec.shape for spec in tensors(self.model, self.model.vocab_size)}
        self.links = {link.ours: link for link in self.family.links(self.model, self.family.kind)}
        self.names = self._names()
        self._check()

    def refuse_other_model(self, model: ModelConfig, vocab_size: int) -> None:
        """ValueError where a job's [model] would compute something else with these weights."""
        wrong = differences(model, self.model)
        if vocab_size != self.model.vocab_size:
            wrong.append(("vocab_size", vocab_size, self.model.vocab_size))
        if wrong:
            told = "; ".join(f"model.{name} = {ours!r}, the folder's {theirs!r}" for name, ours, theirs in wrong)
            raise ValueError(
                f"{self.folder.path} is another model than the job's: {told} "
                f"(tools/convert_checkpoint.py import writes a fitting job)."
            )

    def fill(self, pieces: Iterable[tuple[Address, Tensor]]) -> None:
        """Give every piece of a weight its values; other state stays as it is."""
        for address, data in pieces:
            kind, _, name = address.name.partition("/")
            if kind == "weight":
                for box in boxes(address):
                    data[box.at : box.at + prod(box.size)] = self._read(self.links[name], box).to(data.dtype)

    def whole(self, name: str) -> Tensor:
        """One of our tensors in full, fp32."""
        shape = self.shapes[name]
        return self._read(self.links[name], Box((0,) * len(shape), shape, 0)).view(shape).float()

    def _read(self, link: Link, box: Box) -> Tensor:
        """A box of our tensor, flat."""
        base, whole = link.box(self.shapes[link.ours])
        offset, size = (box.offset[::-1], box.size[::-1]) if link.transposed else (box.offset, box.size)
        if link.heads:
            found = self._read_heads(link, whole[-1], offset, size)
        else:
            lead = len(base) - len(offset)
            offset = base[:lead] + tuple(b + o for b, o in zip(base[lead:], offset))
            found = self.folder.read(self.names[link.theirs], offset, (1,) * lead + size).reshape(size)
        return (found.T if link.transposed else found).reshape(-1)

    def _read_heads(self, link: Link, width: int, offset: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
        """A box [rows, heads x features], which may begin and end inside a head of ``width`` features."""
        (row, column), (rows, columns) = offset, size
        first, last = column // width, -(-(column + columns) // width)
        found = self.folder.read(self.names[link.theirs], (row, first, 0), (rows, last - first, width)).flatten(1)
        return found[:, column - first * width :][:, :columns]

    def _names(self) -> dict[str, str]:
        """Name as the family has it -> name in the files, which may lack the prefix."""
        prefix, held = self.family.prefix, list(self.folder.shapes)
        bare = not any(name.startswith(prefix) for name in held)
        wanted = {link.theirs for link in self.links.values()}
        full = {prefix + name if bare and name not in wanted else name: name for name in held}
        dropped = {n for n in full if any(re.fullmatch(pattern, n) for pattern in self.family.ignored)} - wanted
        return {name: held for name, held in full.items() if name not in dropped}

    def _check(self) -> None:
        wanted = their_shapes(self.links.values(), self.shapes)
        extra = sorted(self.names.keys() - wanted.keys() - self._copies() - self._zeros())
        missing = sorted(wanted.keys() - self.names.keys())
        wrong = [
            f"{name} {list(self.folder.shapes[self.names[name]])} instead of {list(shape)}"
            for name, shape in sorted(wanted.items())
            if name in self.names and self.folder.shapes[self.names[name]] != shape
        ]
        told = {"lacks": missing, "also has": extra, "has mis-shaped": wrong}
        if missing or extra or wrong:
            faults = "; ".join(f"{what} {_some(names)}" for what, names in told.items() if names)
            raise ValueError(f"{self.folder.path} is no {self.family.kind} model of its config.json: it {faults}.")

    def _zeros(self) -> set[str]:
        """Tensors that add nothing; ValueError where they would."""
        found = {name for name in self.family.zeros if name in self.folder.shapes}
        for name in found:
            if bool(self.folder.read(name, (), ()).any()):
                raise ValueError(f"{self.folder.path} has a {name} that is not zero, which megapre cannot add.")
        return {name for name, held in self.names.items() if held in found}

    def _copies(self) -> set[str]:
        """Tensors that the files hold although tying makes them another's; ValueError where they differ from it."""
        wanted = {link.theirs for link in self.links.values()}
        found = {name for name in self.family.copies if name in self.names and name not in wanted}
        for name in sorted(found):
            original = self.family.copies[name]
            one, other = (self.folder.read(self.names.get(n, n), (), ()) for n in (name, original))
            if not one.equal(other):
                raise ValueError(f"{self.folder.path} ties {name} to {original} in its config.json, but they differ.")
        return found


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + more
