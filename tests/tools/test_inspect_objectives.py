"""`inspect_data.py --objective` prints what each objective makes of real text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapre.objectives.table import OBJECTIVES
from tools import inspect_data, pack_data, preprocess_data, train_tokenizer

SPECIALS = ["<cls>", "<sep>", "<fim_prefix>", "<fim_suffix>", "<fim_middle>"]
SHOWN = {
    "causal": ("writes after each token: ",),
    "infill": ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    "prefix": ("tokens both ways: ", "to be continued with: "),
    "masked": ("<mask>", "->"),
    "replaced": ("<mask>", "->"),
    "permuted": ("in this order",),
    "next_sentence": ("<cls>", "<sep>", "label: ", "second text: "),
    "sentence_order": ("<cls>", "<sep>", "label: ", "second text: "),
    "span_corruption": ("encoder reads: ", "<extra_id_0>", "decoder reads: <pad><extra_id_0>"),
    "denoising": ("encoder reads: ", "<mask>", "decoder writes: "),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder: Path = tmp_path_factory.mktemp("shown")
    rows = [json.dumps({"text": f"Text {i} begins. It says that {i} is a number. The end of it. Or {i * i}?"})
            for i in range(120)]  # fmt: skip
    (folder / "a.jsonl").write_text("\n".join(rows))
    source, tokenizer = str(folder / "a.jsonl"), str(folder / "t.json")
    extra = ["--special-tokens", *SPECIALS, "--vocab-extra-ids", "12", "--vocab-size", "400", "--report-mb", "0"]
    assert train_tokenizer.main(["--input", source, "--output", tokenizer, *extra]) == 0
    told = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer, "--append-eod"]
    assert (
        preprocess_data.main(["--input", source, "--output-prefix", str(folder / "a"), "--split-sentences", *told]) == 0
    )
    prefix = str(folder / "a_text_sentence")
    assert pack_data.main([prefix, "--sequence", "48", "--sentences"]) == 0
    return prefix, tokenizer


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_example_is_printed(name: str, made: tuple[str, str], capsys: pytest.CaptureFixture) -> None:
    prefix, tokenizer = made
    told = ["--objective", name, "--tokenizer-model", tokenizer, "--sequence", "48"]
    capsys.readouterr()
    assert inspect_data.main([prefix, *told, "--sample", *map(str, range(8))]) == 0
    out = capsys.readouterr().out
    assert out.count(f"--- {name}, sample ") == 8 and all(text in out for text in SHOWN[name])


def test_of_a_job_and_not_of_another(made: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    prefix, tokenizer = made
    job = tmp_path / "job.toml"
    job.write_text(
        f'[model]\narchitecture = "encoder"\nsequence = 32\n'
        f'[data]\npaths = ["{prefix}"]\nobjective = "masked"\nmask_unit = "word"\ntokenizer_model = "{tokenizer}"\n'
        "[train]\neval_samples = 0\n"
    )
    assert inspect_data.main(["--run", str(job), "--objective", "masked"]) == 0
    assert "asked for" in capsys.readouterr().out
    assert inspect_data.main(["--run", str(job), "--objective", "infill"]) == 2
    assert "data.objective = 'masked'" in capsys.readouterr().err
