"""From a checkpoint of any layout into a step, unless the job has become another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megapre.checkpoint import store
from megapre.config.schema import Config
from megapre.hub.folder import is_folder
from megapre.hub.load import Import
from megapre.training.step import TrainStep

FIXED = {
    "model": (),
    "data": (
        "paths", "weights", "stages", "packing", "split", "fraction", "seed", "objective", "mask_probability",
        "mask_unit", "mask_span", "delete_probability", "permute_sentences", "rotate_documents", "fim_rate",
        "fim_spm_rate", "mask_token", "cls_token", "sep_token", "pad_token", "start_token", "sentinel_tokens",
        "fim_tokens",
    ),
    "train": ("global_batch", "batch_ramp", "sequence_ramp", "seed"),
}  # fmt: skip
"""What must not change on resume, by table; no names: the whole table."""


def restore(path: Path, config: Config, step: TrainStep) -> dict[str, Any]:
    """Load a checkpoint of any layout into ``step``; returns its state."""
    state = store.read_state(path)
    refuse_changes(state["job"], asdict(config), path, config.checkpoint.allow_changes)
    store.load(path, step.pieces(share=False))
    step.optimizer.copy_to_model()
    step.optimizer.steps.fill_(state["optimizer_steps"])
    if step.scaler.dynamic:
        step.scaler.load(state["loss_scale"])
    return state


def start_from(path: Path, config: Config, step: TrainStep) -> None:
    """Take the weights of a Hugging Face folder or of a checkpoint, and nothing else: a run begins with them."""
    if is_folder(path):
        source = Import(path)
        source.refuse_other_model(config.model, step.model.vocab_size)
        source.fill(step.pieces(share=False))
    else:
        wanted = {"model": asdict(config)["model"]}
        refuse_changes({"model": store.read_state(path)["job"]["model"]}, wanted, path, config.checkpoint.allow_changes)
        store.load(path, ((a, data) for a, data in step.pieces(share=False) if a.name.startswith("weight/")))
    step.optimizer.copy_to_model()


def refuse_changes(old: dict[str, Any], new: dict[str, Any], path: Path, allowed: Sequence[str] = ()) -> None:
    """ValueError with a table when a job resumes with another model, batch or data order than its checkpoint's.

    A key that the checkpoint does not know is newer than it, and had its default then.
    """
    changed, defaults = [], asdict(Config())
    for table, keys in FIXED.items():
        for key in (keys or sorted(new[table])) if table in new else ():
            before, after = old.get(table, {}).get(key, defaults[table][key]), new[table][key]
            if before != after and f"{table}.{key}" not in allowed:
                changed.append((f"{table}.{key}", before, after))
    if not changed:
        return
    told = "; ".join(f"{key} = {before!r}, but the job has {after!r}" for key, before, after in changed)
    names = ", ".join(f'"{key}"' for key, _, _ in changed)
    raise ValueError(
        f"{path} was written with {told}: set {'it' if len(changed) == 1 else 'them'} back, start a new run with "
        f"another train.run_dir, or allow it with checkpoint.allow_changes = [{names}]."
    )
