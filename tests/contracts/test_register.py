"""What is replaced in other libraries: each with its reason, its contract test, and its end."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIBRARIES = ("llmcompressor", "compressed_tensors", "transformers")
FILES = {path: ast.parse(path.read_text()) for path in (ROOT / "rac_modifier").rglob("*.py")}
ENTRIES = {
    node: text
    for tree in FILES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and "Contract:" in (text := ast.get_docstring(node) or "")
}


def test_each_entry_has_a_contract_test_and_an_end():
    tests = "\n".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert 5 < len(ENTRIES) < 10, "what can go through a public interface does"
    for function, text in ENTRIES.items():
        (name,) = re.findall(r"^Contract: (\w+)$", text, re.MULTILINE)
        assert f"def {name}(" in tests, function.name
        assert re.search(r"^Until: \S.*\.$", text, re.MULTILINE), function.name


def imported(tree: ast.Module) -> set[str]:
    """The names that a file takes from the libraries."""
    return {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in LIBRARIES
        for alias in node.names
    }


def test_nothing_else_is_replaced():
    """Neither by an assignment to a name of theirs, nor by `patch_attr`."""
    inside = {id(node) for function in ENTRIES for node in ast.walk(function)}
    wrong = []
    for path, tree in FILES.items():
        theirs = imported(tree)
        for node in ast.walk(tree):
            owners = []
            if isinstance(node, ast.Assign):
                owners = [t.value for t in node.targets if isinstance(t, ast.Attribute)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("patch_attr", "setattr"):
                owners = node.args[:1]
            names = {owner.id for owner in owners if isinstance(owner, ast.Name)}
            if names & theirs and id(node) not in inside:
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert wrong == []


def test_private_names_of_the_libraries_are_imported_by_the_register_alone():
    register = "rac_modifier/llmcompressor/upstream.py"
    for path, tree in FILES.items():
        if str(path.relative_to(ROOT)) != register:
            assert not [name for name in imported(tree) if re.match("_[^_]", name)], path
