"""The module map, enforced: what a file may import follows from its layer."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "rlkit"
LAYERS = {
    "errors": 0,
    "resources": 0,
    "core": 1,
    "types": 2,
    "settings": 2,
    "config": 2,
    "overrides": 2,
    "checks": 2,
    "examine": 2,
    "compose": 2,
    "choices": 2,
    "schedule": 2,
    "metrics": 2,
    "data": 3,
    "workers": 4,
    "controller": 5,
    "sweep": 6,
    "report": 6,
    "cli": 6,
}


def modules() -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(PACKAGE.rglob("*.py")):
        yield file.relative_to(PACKAGE), ast.parse(file.read_text(encoding="utf-8"))


def imports(tree: ast.AST) -> set[str]:
    """Every imported module, also inside functions; `from rlkit import types` counts as rlkit.types."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write absolute imports"
            name = str(node.module)
            found |= {f"{name}.{alias.name}" for alias in node.names} if name == "rlkit" else {name}
    return found


def layer_of(file: Path) -> int:
    return LAYERS[file.parts[0].removesuffix(".py")]


def test_every_module_is_on_the_map():
    known = {file.parts[0].removesuffix(".py") for file, _ in modules()} - {"__init__"}
    assert known <= LAYERS.keys(), f"give {sorted(known - LAYERS.keys())} a layer here and in the module map of the README"


def test_no_file_imports_from_a_lower_layer():
    wrong = [
        f"rlkit/{file} imports {name}: move the shared part up a layer"
        for file, tree in modules()
        for name in imports(tree)
        if name.startswith("rlkit.") and file.name != "__init__.py" and LAYERS[name.split(".")[1]] > layer_of(file)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_packages_with_few_doors_are_imported_there_only():
    doors = {
        "vllm": lambda file: file.parent == Path("workers/rollout") and file.name.startswith("vllm_"),
        "ray": lambda file: file == Path("controller/cluster.py"),
        "hydra": lambda file: file.name in ("config.py", "overrides.py", "compose.py"),
    }
    wrong = [
        f"rlkit/{file} imports {name}"
        for file, tree in modules()
        for name in imports(tree)
        if (allowed := doors.get(name.partition(".")[0])) is not None and not allowed(file)
    ]
    assert not wrong, "\n".join(wrong)


def test_the_math_knows_nothing_but_torch_and_numpy():
    allowed = {*sys.stdlib_module_names, "torch", "numpy"}
    wrong = [
        f"rlkit/{file} imports {name}"
        for file, tree in modules()
        if file.parts[0] == "core"
        for name in imports(tree)
        if name.partition(".")[0] not in allowed and not name.startswith("rlkit.core") and name != "rlkit.errors"
    ]
    assert not wrong, "\n".join(wrong)


def test_layer_zero_and_the_command_line_start_with_the_standard_library():
    allowed = {*sys.stdlib_module_names, "rlkit"}
    for file, tree in modules():
        if layer_of(file) == 0 if file.name != "__init__.py" else False:
            assert {name.partition(".")[0] for name in imports(tree)} <= allowed, file
        if file == Path("cli.py"):
            at_once = imports(ast.Module([node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)], []))
            assert {name for name in at_once if name.partition(".")[0] not in sys.stdlib_module_names} == {"rlkit.errors"}


def test_the_controller_does_not_import_what_only_workers_need():
    """It would cost every start of a run seconds."""
    heavy = ["transformers", "torch.distributed.tensor", "torch._dynamo", "vllm", "ray", "matplotlib"]
    code = f"import sys, rlkit.controller.loop; print(sorted(set(sys.modules) & set({heavy})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
