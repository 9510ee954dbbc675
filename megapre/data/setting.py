"""What an objective needs to know of a source: special ids, the table of words and lengths, or one sentence on what is
missing."""

from __future__ import annotations

import base64
from dataclasses import replace

import numpy as np

from megapre.config.lengths import corruption_of_source, noise
from megapre.config.schema import Config
from megapre.data.indexed import IndexedDataset
from megapre.data.sidecar import TokenizerRecord
from megapre.objectives.example import Setting
from megapre.objectives.table import OBJECTIVES

KEYS = {
    "eod": ("", "the end-of-document id"),
    "cls": ("data.cls_token", "the id that begins a row ([CLS])"),
    "sep": ("data.sep_token", "the id that ends a text ([SEP])"),
    "pad": ("data.pad_token", "the id of empty places"),
    "start": ("data.start_token", "the first id that a decoder reads"),
    "sentinels": ("data.sentinel_tokens", "the ids that stand for hidden spans (<extra_id_0>, ...)"),
    "fim": ("data.fim_tokens", "the ids that announce prefix, suffix and middle"),
}
"""Key of the job and meaning of what objectives need; the end-of-document id is recorded only beside the data."""
FIM = ("fim_prefix", "fim_suffix", "fim_middle")


def make_setting(config: Config, dataset: IndexedDataset, vocab_size: int, stream: int) -> Setting:
    """The setting of the job's objective on a source; ValueError naming the key of what it needs and nobody gives."""
    data, record = config.data, (dataset.sidecar.tokenizer if dataset.sidecar else None)
    known = (record.specials or {}) if record else {}
    eod = record.eod if record else None

    def token(name: str, fallback: int | None = None) -> int | None:
        asked: int = getattr(data, f"{name}_token")
        found = asked if asked >= 0 else known.get(name, fallback)
        return found if found is None else _inside(found, f"data.{name}_token", vocab_size)

    fim = data.fim_tokens or [known[name] for name in FIM if name in known]
    setting = Setting(
        vocab_size=vocab_size,
        seed=data.seed,
        length=config.model.sequence,
        stream=stream,
        eod=eod,
        eod_mask_loss=data.eod_mask_loss,
        mask_token=mask_token(config, record, vocab_size),
        mask_probability=data.mask_probability,
        mask_unit=data.mask_unit,
        mask_span=data.mask_span,
        joins=word_table(record),
        cls=token("cls"),
        sep=token("sep"),
        pad=token("pad"),
        start=token("start", known.get("pad", eod)),
        fim=(fim[0], fim[1], fim[2]) if len(fim) == len(FIM) else None,
        sentinels=_sentinels(config, record),
        fim_rate=data.fim_rate,
        fim_spm_rate=data.fim_spm_rate,
        permute_sentences=data.permute_sentences,
        rotate_documents=data.rotate_documents,
    )
    if data.objective == "span_corruption":
        setting = replace(setting, corruption=corruption_of_source(config.model.source_sequence, data))
    if data.objective == "denoising":
        setting = replace(setting, noise=noise(config.model.sequence, data))
    _check(config, setting, dataset)
    return setting


def mask_token(config: Config, record: TokenizerRecord | None, vocab_size: int) -> int:
    """Id that hides a token: the job's, else the tokenizer's, else the last of the vocabulary."""
    token = config.data.mask_token
    if token < 0:
        token = record.mask if record is not None and record.mask is not None else vocab_size - 1
    return _inside(token, "data.mask_token", vocab_size)


def word_table(record: TokenizerRecord | None) -> np.ndarray | None:
    """uint8 [ids]: bit 0, a word may go on into this token; bit 1, it may go on after it."""
    if record is None or record.words is None:
        return None
    bits = np.frombuffer(base64.b64decode(record.words), np.uint8)
    first, last = np.unpackbits(bits).reshape(2, -1)[:, : record.vocab_size]
    return first | last << 1


def _sentinels(config: Config, record: TokenizerRecord | None) -> np.ndarray | None:
    ends = config.data.sentinel_tokens
    if ends:
        step = 1 if ends[1] >= ends[0] else -1
        return np.arange(ends[0], ends[1] + step, step)
    return np.array(record.sentinels, np.int64) if record and record.sentinels else None


def _inside(token: int, name: str, vocab_size: int) -> int:
    if token >= vocab_size:
        raise ValueError(f"{name} = {token} is not one of the {vocab_size} ids of model.vocab_size.")
    return token


def _check(config: Config, setting: Setting, dataset: IndexedDataset) -> None:
    """Everything that the objective reads is known."""
    data, record = config.data, f"{dataset.prefix}.json"
    for name in (*OBJECTIVES[data.objective].needs, *(["eod"] if data.eod_mask_loss else [])):
        if getattr(setting, name) is None:
            key, meaning = KEYS[name]
            asker = "data.eod_mask_loss = true" if data.eod_mask_loss and name == "eod" else f"'{data.objective}'"
            hint = f"set {key}, or tokenize" if key else "tokenize"
            raise ValueError(
                f"{asker} needs {meaning}, and {record} records none: {hint} with a tokenizer that has one."
            )
    if data.mask_unit != "token" and setting.joins is None:
        raise ValueError(
            f"data.mask_unit = '{data.mask_unit}' needs the tokenizer's table of words, and {record} records none: "
            f"tokenize the data with tools/preprocess_data.py."
        )
    if setting.corruption is not None and setting.sentinels is not None:
        have = len(setting.sentinels)
        if setting.corruption.spans > have or int(setting.sentinels.max()) >= setting.vocab_size:
            raise ValueError(
                f"data.sentinel_tokens gives {have} ids up to {int(setting.sentinels.max())}, but "
                f"model.source_sequence = {config.model.source_sequence} needs {setting.corruption.spans} of them "
                f"below model.vocab_size = {setting.vocab_size}."
            )
    reads_sentences = OBJECTIVES[data.objective].pairs or setting.permute_sentences
    if reads_sentences and dataset.sequences <= dataset.n_documents:
        what = f"data.objective = '{data.objective}'" if OBJECTIVES[data.objective].pairs else "data.permute_sentences"
        raise ValueError(
            f"{what} needs sentences, and {dataset.prefix} holds one sequence a document: tokenize it with "
            f"tools/preprocess_data.py --split-sentences."
        )
