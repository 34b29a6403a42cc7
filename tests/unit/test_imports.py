"""What DESIGN promises of the pure parts: they import without torch, and never depend on the order of a set."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "opara_backend"
PURE = (
    "kernel_graph",
    "memory",
    "lowering.dependencies",
    "lowering.statements",
    "profiling.profile",
    "scheduling.policies",
    "scheduling.launch_order",
    "scheduling.schedule",
    "scheduling.streams",
)
SCHEDULED = """
from opara_backend.memory import plan_memory
from opara_backend.scheduling.policies import build
from tests.strategies import layered_graph, random_profile
graph, profile = layered_graph(200, 7), random_profile(200)
schedule = build(graph, profile, policy="opara", launch_order="opara", streams=4)
print(schedule, plan_memory(graph, schedule), graph.to_json())
"""


def output_of(program: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, env={**os.environ, **environment}
    )
    return done.stdout


def test_the_pure_parts_import_without_torch() -> None:
    modules = ", ".join(f"opara_backend.{name}" for name in PURE)
    loaded = output_of(f"import sys, {modules}; print(*sys.modules)").split()
    assert "opara_backend.scheduling.policies" in loaded
    assert "torch" not in loaded


def test_plans_do_not_depend_on_how_strings_hash() -> None:
    assert output_of(SCHEDULED, PYTHONHASHSEED="1") == output_of(SCHEDULED, PYTHONHASHSEED="2")


def test_what_is_public_is_found_by_completion_without_loading_torch() -> None:
    loaded = output_of("import sys, opara_backend; print(*dir(opara_backend)); print(*sys.modules)").splitlines()
    assert {"explain", "Report", "OparaFallbackError", "__version__"} <= set(loaded[0].split())
    assert "torch" not in loaded[1].split()


def test_private_parts_of_torch_are_imported_by_one_module_alone() -> None:
    """What a release of torch's moves is looked for in one place."""
    found = {
        str(path.relative_to(PACKAGE))
        for path in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in _modules(node)
        if name.startswith("torch.") and any(part.startswith("_") for part in name.split("."))
    }
    assert found == {"upstream/private.py"}


def _modules(node: ast.AST) -> list[str]:
    """What a statement imports, dotted."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module}.{alias.name}" for alias in node.names]
    return []
