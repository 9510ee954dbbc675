"""The container recipes keep the rules of their trade; building them needs a registry.

The rules are hadolint's, by its numbers; each is shown to fail on a recipe that breaks it.
"""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKERFILE = ROOT / "containers" / "Dockerfile"
DEFINITION = ROOT / "containers" / "megapre.def"
KNOWN = "ARG FROM SHELL ENV RUN WORKDIR COPY USER ENTRYPOINT CMD LABEL EXPOSE VOLUME HEALTHCHECK".split()


def instructions(text: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, lines joined and comments left out."""
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


def shell_faults(script: str) -> list[str]:
    """What is wrong with a shell script's syntax or with how it installs."""
    found = []
    checked = subprocess.run(["bash", "-n", "-c", script], capture_output=True, text=True)
    if checked.returncode:
        found.append(f"shell: {checked.stderr.strip()}")
    for command in re.split(r"&&|;|\n", re.sub(r"\\\n", " ", script)):
        words = command.split()
        if words[:2] == ["apt-get", "install"] and not {"-y", "--no-install-recommends"} <= set(words):
            found.append("DL3014/DL3015 apt-get install without -y --no-install-recommends")
        if "pip" in words[:2] and "install" in words and "--no-cache-dir" not in words:
            found.append("DL3042 pip without --no-cache-dir")
        if words[:1] == ["apt"]:
            found.append("DL3027 apt is for people")
        if words[:1] == ["sudo"]:
            found.append("DL3004 sudo")
    if "apt-get install" in script and "rm -rf /var/lib/apt/lists" not in script:
        found.append("DL3009 lists of apt are left")
    if re.search(r"curl[^|\n]*\|\s*(ba)?sh", script):
        found.append("a script from the network is piped into a shell")
    return found


def docker_faults(text: str) -> list[str]:
    """Breaches of hadolint's rules."""
    found, steps = [], instructions(text)
    names = [name for name, _ in steps]
    found += [f"unknown instruction {name}" for name in names if name not in KNOWN]
    pipefail = any(name == "SHELL" and "pipefail" in rest for name, rest in steps)
    for name, rest in steps:
        if name == "FROM":
            tag = rest.split()[0].rpartition("/")[2].partition(":")[2]
            if not tag or tag == "latest":
                found.append("DL3006/DL3007 the base image has no fixed tag")
        if name == "WORKDIR" and not rest.startswith(("/", "$")):
            found.append("DL3000 WORKDIR is relative")
        if name in ("CMD", "ENTRYPOINT", "SHELL"):
            try:
                json.loads(rest)
            except ValueError:
                found.append(f"DL3025 {name} is no JSON list")
        if name == "RUN":
            found += shell_faults(rest)
            if rest.startswith("cd ") or "&& cd " in rest:
                found.append("DL3003 cd in RUN")
            if "|" in rest.replace("||", "") and not pipefail:
                found.append("DL4006 a pipe without pipefail")
        if name == "COPY":
            sources = [word for word in rest.split()[:-1] if not word.startswith("--")]
            found += [f"COPY of {source}, which is not there" for source in sources if not (ROOT / source).exists()]
    found += [f"DL4003/DL4004 {names.count(n)} times {n}" for n in ("CMD", "ENTRYPOINT") if names.count(n) > 1]
    users = [rest for name, rest in steps if name == "USER"]
    if not users or users[-1] in ("root", "0"):
        found.append("DL3002 it ends as root")
    return found


def test_the_dockerfile_keeps_the_rules() -> None:
    assert docker_faults(DOCKERFILE.read_text()) == []


@pytest.mark.parametrize(
    "old,new,told",
    [
        ("RUN useradd", "RUN true | true && useradd", "DL4006"),
        ("FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04", "FROM nvidia/cuda", "DL3006"),
        ("FROM nvidia/cuda:${CUDA}-devel-ubuntu24.04", "FROM nvidia/cuda:latest", "DL3007"),
        ("WORKDIR /src", "WORKDIR src", "DL3000"),
        ("--no-install-recommends", "", "DL3015"),
        ("&& rm -rf /var/lib/apt/lists/*", "", "DL3009"),
        (
            "pip install --no-cache-dir -c constraints.txt --no-build",
            "pip install -c constraints.txt --no-build",
            "DL3042",
        ),
        ('ENTRYPOINT ["megapre"]', "ENTRYPOINT megapre", "DL3025"),
        ("USER megapre", "USER root", "DL3002"),
        ("COPY csrc csrc", "COPY csrc2 csrc", "which is not there"),
        ("COPY csrc csrc", "ADD csrc csrc", "unknown instruction ADD"),
        ("RUN useradd --create-home megapre", "RUN cd /tmp && if true", "DL3003"),
        ("RUN useradd --create-home megapre", "RUN if true; then echo", "shell: "),
    ],
)
def test_each_rule_can_fail(old: str, new: str, told: str) -> None:
    text = DOCKERFILE.read_text()
    assert text.count(old) >= 1
    if told == "DL4006":
        text = text.replace("pipefail", "errexit")
    assert any(told in fault for fault in docker_faults(text.replace(old, new))), docker_faults(text.replace(old, new))


SECTIONS = ("files", "post", "environment", "runscript", "test")


def test_the_apptainer_recipe_is_the_same_image() -> None:
    head, *parts = re.split(r"^%(\w+)\n", DEFINITION.read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[::2], parts[1::2]))
    assert tuple(sections) == SECTIONS
    fields = dict(re.findall(r"^(\w+): (\S+)$", head, re.MULTILINE))
    assert fields["Bootstrap"] == "docker"
    cuda = re.search(r"^ARG CUDA=(\S+)$", DOCKERFILE.read_text(), re.MULTILINE)
    assert cuda and fields["From"] == f"nvidia/cuda:{cuda[1]}-devel-ubuntu24.04"
    for line in sections["files"].split("\n"):
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists() and target == f"/src/{source}"
    for name in SECTIONS[1:]:
        assert shell_faults(sections[name]) == [], name
    assert sections["post"].lstrip().startswith("set -eu")
    packages = [re.findall(r"g\+\+[^\n]*python3-venv", text) for text in (sections["post"], DOCKERFILE.read_text())]
    assert packages[0] == packages[1] and packages[0]
    copied = {
        word for name, rest in instructions(DOCKERFILE.read_text()) if name == "COPY" for word in rest.split()[:-1]
    }
    assert copied == {line.split()[0] for line in sections["files"].splitlines() if line.strip()}


def test_what_the_page_says_is_in_the_recipes() -> None:
    page = (ROOT / "docs" / "install_cluster.md").read_text()
    for word in ("--no-build-isolation", "TORCH_CUDA_ARCH_LIST", "MEGAPRE_CUDA_ARCH", "flash-attn", "apex"):
        assert word in page and word in DOCKERFILE.read_text(), word
