"""Reading a ``config.json`` so that nothing in it is ignored: what is not understood is refused by name. Torch-free."""

from __future__ import annotations

from typing import Any

PART = "generator"
"""Folder beside the files of a model that holds another one, trained with it (ELECTRA); its settings are under this key
and its tensors' names begin with it and a slash."""

NEUTRAL = frozenset(
    {
        "_attn_implementation", "_attn_implementation_autoset", "_name_or_path", "architectures", "auto_map",
        "bos_token_id", "chunk_size_feed_forward", "classifier_dropout", "classifier_dropout_prob",
        "decoder_start_token_id", "dtype", "eos_token_id", "finetuning_task", "forced_bos_token_id",
        "forced_eos_token_id", "gradient_checkpointing", "id2label", "label2id", "license", "max_window_layers",
        "model_type", "n_ctx", "output_attentions", "output_hidden_states", "output_past", "output_router_logits",
        "pad_token_id", "pretraining_tp", "problem_type", "return_dict", "sep_token_id", "task_specific_params",
        "torch_dtype", "transformers_version", "use_cache", "vocab_file",
    }
)  # fmt: skip
"""Keys that change no number of the model itself: token ids, file formats, heads for other tasks."""


class Settings:
    """The fields of a ``config.json``; every key must be taken, fixed or neutral by the time of ``finish``."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where = values, where
        self._seen: set[str] = set()

    def take(self, key: str, default: Any = None) -> Any:
        """The value of ``key``, or what ``transformers`` takes where it is missing or null."""
        self._seen.add(key)
        value = self.values.get(key)
        return default if value is None else value

    def number(self, key: str, default: float | None = None) -> Any:
        """A number; ValueError when there is neither one nor a default."""
        value = self.take(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{self.where} has {key} = {value!r}, which should be a number.")
        return value

    def one_of(self, key: str, table: dict[Any, Any], default: Any = None) -> Any:
        """What ``table`` makes of the value; ValueError for any other value."""
        value = self.take(key, default)
        if value not in table:
            known = ", ".join(map(repr, table))
            raise ValueError(f"{self.where} has {key} = {value!r}, which megapre cannot compute: only {known}.")
        return table[value]

    def fixed(self, **values: Any) -> None:
        """Keys that must have the given value where they are set."""
        for key, value in values.items():
            self.one_of(key, {value: value}, value)

    def unused(self, *keys: str) -> None:
        """Keys that change nothing here."""
        self._seen.update(keys)

    def finish(self) -> None:
        """Raises ValueError naming every key that nothing has read."""
        unknown = sorted(self.values.keys() - self._seen - NEUTRAL)
        if unknown:
            told = ", ".join(f"{key} = {self.values[key]!r}" for key in unknown)
            raise ValueError(f"{self.where} has settings that megapre does not know and will not ignore: {told}.")
