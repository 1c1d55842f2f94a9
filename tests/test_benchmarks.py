"""The benchmarks' committed results are only written when that is asked for."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


def writing(tree: ast.AST) -> list[ast.AST]:
    """Statements that write below ``benchmarks/results``, with the condition that they stand under."""
    return [
        node for node in ast.walk(tree) if isinstance(node, (ast.If, ast.IfExp)) and "publish" in ast.unparse(node.test)
    ]


@pytest.mark.parametrize("script", sorted(BENCHMARKS.glob("*.py")), ids=lambda path: path.name)
def test_results_are_published_on_demand_alone(script):
    source = script.read_text(encoding="utf-8")
    if '"results"' not in source:
        return
    tree = ast.parse(source)
    published = "\n".join(ast.unparse(node) for node in writing(tree))
    for node in ast.walk(tree):
        text = ast.unparse(node) if isinstance(node, ast.Call) else ""
        below = "'results'" in text or "RESULTS" in text or text.startswith(("(results /", "results /"))
        if below and ".write_text(" in text:
            assert text in published, text
