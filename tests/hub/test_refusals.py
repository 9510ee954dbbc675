"""Folders that are not what they say, or say what megapre cannot compute, are refused by name."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megapre.config.model import ModelConfig
from megapre.hub.export import export
from megapre.hub.families import family_of
from megapre.hub.folder import INDEX, SINGLE
from megapre.hub.load import Import
from tests.hub.test_families import VOCAB, theirs

Config, Tensors = dict[str, Any], dict[str, Tensor]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    theirs("llama", folder)
    return folder


def changed(good: Path, folder: Path, change: Callable[[Config, Tensors], None]) -> Path:
    """A copy of ``good`` with other settings or tensors."""
    config, tensors = json.loads((good / "config.json").read_text()), load_file(good / SINGLE)
    change(config, tensors)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / SINGLE)
    return folder


def drop(c: Config, t: Tensors) -> None:
    del t["model.norm.weight"], t["model.layers.1.mlp.up_proj.weight"]


def add(c: Config, t: Tensors) -> None:
    t["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)


def reshape(c: Config, t: Tensors) -> None:
    t["model.layers.0.self_attn.k_proj.weight"] = torch.zeros(32, 32)


def untie(c: Config, t: Tensors) -> None:
    t["lm_head.weight"] = torch.zeros(VOCAB, 32)


CHANGES = [
    (drop, r"it lacks model\.layers\.1\.mlp\.up_proj\.weight, model\.norm\.weight\.$"),
    (add, r"it also has model\.layers\.2\.mlp\.up_proj\.weight\.$"),
    (reshape, r"it has mis-shaped model\.layers\.0\.self_attn\.k_proj\.weight \[32, 32\] instead of \[16, 32\]\.$"),
    (untie, r"ties lm_head\.weight to model\.embed_tokens\.weight in its config\.json, but they differ"),
    (
        lambda c, t: c.update(logit_scale=2.0),
        r"settings that megapre does not know and will not ignore: logit_scale = 2\.0",
    ),
    (lambda c, t: c.update(hidden_act="relu6"), r"has hidden_act = 'relu6', which megapre cannot compute: only 'silu'"),
    (lambda c, t: c.update(attention_bias=True), r"attention_bias = true, a bias of o_proj too"),
    (lambda c, t: c.update(mlp_bias=True), r"mlp_bias = True, which megapre cannot compute: only False"),
    (
        lambda c, t: c.update(model_type="mamba"),
        r"model_type = 'mamba' is unknown to megapre, which reads and writes llama",
    ),
    (
        lambda c, t: c.update(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        r"rope_type = 'longrope': megapre knows default, linear, yarn and llama3",
    ),
    (
        lambda c, t: c.update(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "spin": 3}),
        r"rope_parameters of .*config\.json has settings that megapre does not know and will not ignore: spin = 3",
    ),
]


@pytest.mark.parametrize(("change", "told"), CHANGES)
def test_a_folder_that_is_another_model_is_refused(
    change: Callable[[Config, Tensors], None], told: str, good: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=told):
        Import(changed(good, tmp_path / "bad", change))


def test_an_equal_copy_of_a_tied_head_is_no_fault(good: Path, tmp_path: Path) -> None:
    def copy(c: Config, t: Tensors) -> None:
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()

    assert Import(changed(good, tmp_path / "tied", copy)).model.tied_embeddings


def test_files_of_the_bare_model_lack_the_prefix(good: Path, tmp_path: Path) -> None:
    def bare(c: Config, t: Tensors) -> None:
        for name in list(t):
            t[name.removeprefix("model.")] = t.pop(name)

    assert Import(changed(good, tmp_path / "bare", bare)).model == Import(good).model


def test_no_pickle_is_opened(good: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(ValueError, match=r"only pytorch_model\.bin, a pickle, which megapre does not open"):
        Import(tmp_path)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        (
            {"weight_map": {"x": "../model.safetensors"}},
            r"names '\.\./model\.safetensors', which is not a file of its own",
        ),
        ({"weight_map": {"x": "/etc/passwd"}}, r"names '/etc/passwd', which is not a file of its own folder"),
        ({"weight_map": [1]}, r"has no weight_map of file names"),
        ({"weight_map": {"x": "gone.safetensors"}}, r"gone\.safetensors cannot be read"),
    ],
)
def test_an_index_leads_nowhere_else(index: Any, told: str, good: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(ValueError, match=told):
        Import(tmp_path)


def test_a_damaged_file_is_refused(good: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((good / "config.json").read_text())
    (tmp_path / SINGLE).write_bytes((good / SINGLE).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        Import(tmp_path)


def test_a_job_of_another_model_is_refused(good: Path) -> None:
    source = Import(good)
    source.refuse_other_model(replace(source.model, sequence=7, dropout=0.1), VOCAB)
    with pytest.raises(
        ValueError, match=r"model\.rope_theta = 5\.0, the folder's 10000\.0; model\.vocab_size = 9, the"
    ):
        source.refuse_other_model(replace(source.model, rope_theta=5.0), 9)


def test_a_model_of_no_family_is_not_exported() -> None:
    with pytest.raises(ValueError, match=r"no family of Hugging Face can be this model"):
        family_of(ModelConfig(norm="rmsnorm", positions="none"), VOCAB)


def test_an_export_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ValueError, match="is not empty: export to a new folder"):
        export(tmp_path, tmp_path, None, VOCAB)  # type: ignore[arg-type]


def test_a_bias_of_logits_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    theirs("bart", tmp_path / "bart")

    def bias(c: Config, t: Tensors) -> None:
        t["final_logits_bias"][0, 3] = 0.1

    with pytest.raises(ValueError, match=r"has a final_logits_bias that is not zero, which megapre cannot add"):
        Import(changed(tmp_path / "bart", tmp_path / "bad", bias))


def test_an_output_layer_of_its_own_is_seen_in_the_files(tmp_path: Path) -> None:
    """As flan-T5 is saved by older releases: nothing in the settings tells."""
    theirs("t5-gated", tmp_path / "t5")

    def own(c: Config, t: Tensors) -> None:
        t["lm_head.weight"] = t["shared.weight"] + 1

    assert Import(tmp_path / "t5").model.tied_embeddings
    assert not Import(changed(tmp_path / "t5", tmp_path / "own", own)).model.tied_embeddings


@pytest.fixture(scope="module")
def xlnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("xlnet")
    theirs("xlnet", folder)
    return folder


XLNETS = [
    ({"mem_len": 384}, r"has mem_len = 384, a memory that megapre does not have: only null"),
    ({"reuse_len": 0}, r"has reuse_len = 0, a memory that megapre does not have: only null"),
    ({"use_mems_train": True}, r"has use_mems_train = True, which megapre cannot compute: only False"),
    ({"attn_type": "uni"}, r"has attn_type = 'uni', which megapre cannot compute: only 'bi'"),
    ({"bi_data": True}, r"has bi_data = True, which megapre cannot compute: only False"),
    ({"same_length": True}, r"has same_length = True, which megapre cannot compute: only False"),
    ({"untie_r": False}, r"has untie_r = False, which megapre cannot compute: only True"),
    ({"d_head": 16}, r"has d_head = 16, which megapre cannot compute: only 8"),
    ({"ff_activation": "silu"}, r"has ff_activation = 'silu', which megapre cannot compute: only 'gelu'"),
    ({"tie_word_embeddings": False}, r"has tie_word_embeddings = False, which megapre cannot compute: only True"),
]


@pytest.mark.parametrize(("settings", "told"), XLNETS, ids=[next(iter(settings)) for settings, _ in XLNETS])
def test_what_megapres_xlnet_is_not_is_refused(settings: Config, told: str, xlnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=told):
        Import(changed(xlnet, tmp_path / "bad", lambda c, t: c.update(settings)))


def test_an_xlnet_that_does_not_say_its_memory_has_one(xlnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has mem_len = 512, a memory"):
        Import(changed(xlnet, tmp_path / "bad", lambda c, t: c.pop("mem_len")))
