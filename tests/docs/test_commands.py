"""The documents' form: fences, links and the settings that they name. `make docs` runs their commands."""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from megapre.config.schema import Config

ROOT = Path(__file__).parents[2]


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_commands", ROOT / "docs" / "run_commands.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


commands = _load()
PAGES = [*commands.documents(ROOT), ROOT / "CONTRIBUTING.md", ROOT / "examples" / "README.md"]
TABLES = {table.name: {entry.name for entry in fields(getattr(Config(), table.name))} for table in fields(Config)}
FILES = ("py", "md", "json", "jsonl", "toml", "bin", "idx")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_and_links(page: Path) -> None:
    assert list(commands.blocks(page)) or page.name in ("LOG.md", "README.md")
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#\s]+)", text):
        assert "://" in target or (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page: Path) -> None:
    for table, key in re.findall(rf"`({'|'.join(TABLES)})\.([a-z_0-9]+)(?: ?=[^`]*)?`", page.read_text()):
        assert key in FILES or key in TABLES[table], f"{page.name} names {table}.{key}"


def test_only_sh_blocks_run_and_the_first_failure_ends_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\necho shown\n```\n```sh\nmegapre --version\nls README.md\n```\n")
    assert commands.main([str(page)]) == 0
    out = capfd.readouterr().out
    assert "\nmegapre " in out and "\nREADME.md\n" in out and "shown" not in out
    page.write_text("```sh\nfalse\necho after\n```\n```sh\necho later\n```\n")
    assert commands.main([str(page)]) == 1
    captured = capfd.readouterr()
    assert "page.md:1 failed" in captured.err and "echo later" not in captured.out
    assert "\nafter\n" not in captured.out


@pytest.mark.parametrize("text", ["```\nls\n```\n", "```bash\nls\n```\n", "```sh\nls\n"])
def test_a_bad_fence_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "page.md").write_text(text)
    with pytest.raises(ValueError, match=r"page\.md:1"):
        list(commands.blocks(tmp_path / "page.md"))
