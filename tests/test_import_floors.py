"""The floors of the house: a room imports only from lower floors, or from its left on its own floor.

Syntax trees are walked, so imports inside functions and under TYPE_CHECKING count too.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megapre"

FLOORS = (
    ("config", "monitor"),
    ("random", "kernels", "objectives", "data", "tokenizers", "corpus"),
    ("parallel",),
    ("optim", "models", "checkpoint", "hub"),
    ("training", "resilience"),
    ("verify", "planner", "evaluation", "report"),
    ("train", "cli", "__main__"),
)
"""Rooms from the ground up, each floor from left to right."""

NO_TORCH = ("config", "planner")
NO_TORCH_AT_MODULE_LEVEL = ("config", "monitor", "planner")


def room_of(path: Path, package: Path) -> str:
    """Room of a file: its folder under the package, or the name of a file that stands there itself."""
    parts = path.relative_to(package).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that a tree imports, with its line; ``from a import b`` gives ``a.b``."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                yield f"{'.' * node.level}{node.module or ''}.{alias.name}", node.lineno


def at_module_level(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Imports that run when the module is imported."""
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or typing_only:
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from imports(node)
        waiting.extend(ast.iter_child_nodes(node))


def allowed(room: str, target: str) -> bool:
    """Whether ``room`` may import ``target``."""
    place = {name: (floor, column) for floor, names in enumerate(FLOORS) for column, name in enumerate(names)}
    return room == target or place[target] < place[room]


def faults(package: Path) -> list[str]:
    """Every breach of the rules under ``package``, one sentence each."""
    found = []
    rooms = {name for names in FLOORS for name in names}
    for path in sorted(package.rglob("*.py")):
        name, room = str(path.relative_to(package)), room_of(path, package)
        text = path.read_text()
        if path.name == "__init__.py":
            if path.parent != package and text.strip():
                found.append(f"{name} is not empty")
            continue
        tree = ast.parse(text, name)
        if room not in rooms:
            found.append(f"{name} stands in no room of the table")
            continue
        for module, line in imports(tree):
            parts = module.split(".")
            if module.startswith("."):
                found.append(f"{name}:{line} imports {module} relatively")
            elif parts[0] == "megapre" and len(parts) > 1 and parts[1] in rooms and not allowed(room, parts[1]):
                found.append(f"{name}:{line} imports {module}, which stands above {room} or to its right")
            elif parts[0] == "torch" and room in NO_TORCH:
                found.append(f"{name}:{line} imports torch")
        if room in NO_TORCH_AT_MODULE_LEVEL:
            lines = [line for module, line in at_module_level(tree) if module.split(".")[0] == "torch"]
            found += [f"{name}:{line} imports torch at module level" for line in lines]
        found += [f"{name}:{node.lineno} uses global state" for node in ast.walk(tree) if isinstance(node, ast.Global)]
        found += [f"{name}:{line} changes a module-level value" for line in mutations(tree)]
    return found


def mutations(tree: ast.Module) -> Iterator[int]:
    """Lines in functions that change a list, dict or set which the module defines at its top."""
    tables = set()
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if isinstance(node.value, ast.List | ast.Dict | ast.Set | ast.Call):
            tables |= {target.id for target in targets if isinstance(target, ast.Name)}
    changing = {"append", "extend", "insert", "add", "update", "setdefault", "pop", "clear", "remove", "discard"}
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        names = [node for node in ast.walk(function) if isinstance(node, ast.Name)]
        local = {name.id for name in names if isinstance(name.ctx, ast.Store)}
        local |= {argument.arg for argument in ast.walk(function) if isinstance(argument, ast.arg)}
        for node in ast.walk(function):
            owner = None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in changing:
                owner = node.func.value
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
                owner = node.value
            if isinstance(owner, ast.Name) and owner.id in tables - local:
                yield node.lineno


def test_the_house_holds() -> None:
    assert faults(PACKAGE) == []


def test_training_does_not_load_the_compiler() -> None:
    """140 MiB of every rank, and seconds of its start; ``torch.compile`` loads it where it is used."""
    code = "import sys, megapre.train; print({'torch._dynamo', 'torch._inductor', 'sympy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "set()", done


BAD = {
    "config/a.py": ("import torch", "imports torch"),
    "config/b.py": ("def f():\n    from megapre.monitor import x", "megapre.monitor.x, which stands above config"),
    "kernels/a.py": ("from megapre import parallel", "megapre.parallel, which stands above kernels"),
    "kernels/b.py": ("def f():\n    import megapre.models.block", "megapre.models.block, which stands above kernels"),
    "data/d.py": ("from megapre.tokenizers.load import load", "which stands above data or to its right"),
    "optim/a.py": ("if TYPE_CHECKING:\n    from megapre.training import x", "megapre.training.x"),
    "monitor/a.py": ("try:\n    import torch.cuda\nexcept ImportError:\n    pass", "imports torch at module level"),
    "training/a.py": ("from . import loss", "relatively"),
    "attic/a.py": ("x = 1", "stands in no room"),
    "models/__init__.py": ("from megapre.models.block import Block", "is not empty"),
    "data/a.py": ("n = 0\ndef f():\n    global n\n    n += 1", "uses global state"),
    "data/b.py": ("CACHE = {}\ndef f(k):\n    CACHE[k] = 1", "changes a module-level value"),
    "data/c.py": ("SEEN: list[int] = []\ndef f(k):\n    SEEN.append(k)", "changes a module-level value"),
    "parallel/a.py": ("from megapre.train import run", "megapre.train.run, which stands above parallel"),
}
GOOD = {
    "monitor/a.py": "from megapre.config.schema import Config\ndef f():\n    import torch\n    return torch",
    "data/a.py": "from megapre.objectives.table import load\nT = {1: 2}\ndef f(T):\n    T[1] = 3",
    "verify/a.py": "from megapre.training.step import TrainStep",
    "cli.py": "import megapre\nfrom megapre.config.load import load",
    "__init__.py": "__version__ = '1'",
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_tree_fails(tmp_path: Path, name: str) -> None:
    source, expected = BAD[name]
    for place, text in {**GOOD, name: source}.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    found = faults(tmp_path)
    assert found and all(fault.startswith(name) for fault in found) and expected in " ".join(found), found


def test_a_good_tree_passes(tmp_path: Path) -> None:
    for place, text in GOOD.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(text)
    assert faults(tmp_path) == []
