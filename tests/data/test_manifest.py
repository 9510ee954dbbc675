"""A manifest in ``data.paths`` is the set of its pairs, with one weight."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megapre.data.check import check_data
from megapre.data.manifest import members
from megapre.data.samples import Samples
from tests.data.corpora import VOCAB, job, write_pair
from tools import inspect_data, merge_datasets, pack_data


@pytest.fixture
def manifest(tmp_path):
    names = [f"set_{n:05d}" for n in range(3)]
    for seed, name in enumerate(names):
        write_pair(tmp_path / name, [30] * (20 * (seed + 1)), seed=seed)
    path = tmp_path / "set.manifest.json"
    path.write_text(json.dumps({"pairs": names}))
    return str(path)


def test_its_pairs_are_sources_and_share_its_weight_by_tokens(tmp_path, manifest):
    other = write_pair(tmp_path / "other", [30] * 40, seed=9)
    pairs = members(manifest)
    assert check_data(job([manifest])) == VOCAB
    whole, listed = Samples(job([manifest, other]), vocab_size=VOCAB), Samples(job([*pairs, other]), vocab_size=VOCAB)
    assert [source.path for source in whole.sources] == [*pairs, other]
    for number in range(300):
        pair = [samples.sample(number).example.inputs.tolist() for samples in (whole, listed)]
        assert pair[0] == pair[1]
    config = job([manifest, other], weights=[3.0, 1.0, 1.0, 3.0], stages=[800])
    assert check_data(config) == VOCAB
    samples = Samples(config, vocab_size=VOCAB)
    counts = [[0] * 4, [0] * 4]
    for number in range(1600):
        counts[number >= 800][samples.blend.locate(number)[0]] += 1
    assert counts == [[100, 200, 300, 200], [pytest.approx(200 * k / 6, abs=1) for k in (1, 2, 3)] + [600]]
    with pytest.raises(ValueError, match="3 shares for the 2 prefixes"):
        check_data(replace(config, data=replace(config.data, weights=[1.0, 2.0, 3.0], stages=[])))


def test_tools_take_it(tmp_path, manifest, capsys):
    assert inspect_data.main([manifest]) == 0
    assert capsys.readouterr().out.count("  sequences  ") == 3
    assert pack_data.main([manifest, "--sequence", "64"]) == 0
    assert capsys.readouterr().out.count("rows") == 3
    assert merge_datasets.main(["--input", manifest, "--output-prefix", str(tmp_path / "all")]) == 0
    assert "120 documents" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["{", "[]", "{}", '{"pairs": []}', '{"pairs": ["a", "a"]}', '{"pairs": [3]}', '{"pairs": "ab"}']
)
def test_what_is_no_manifest_is_refused_in_one_sentence(tmp_path, content):
    path = tmp_path / "x.manifest.json"
    with pytest.raises(ValueError, match=r"x\.manifest\.json does not exist"):
        members(str(path))
    path.write_text(content)
    with pytest.raises(ValueError, match=r"x\.manifest\.json (is not a manifest|lists a pair twice)") as caught:
        members(str(path))
    assert "\n" not in str(caught.value)
