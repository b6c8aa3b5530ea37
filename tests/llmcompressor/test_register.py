"""The stand-ins that a recipe finds, with a small package in place of llm-compressor; test_import_orders.py has the real one."""

import subprocess
import sys

import pytest

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.llmcompressor.register import MODULES

MODIFIERS = """
class Modifier:
    pass

class ModifierFactory:
    registered = {}

    @staticmethod
    def register(name, modifier):
        assert issubclass(modifier, Modifier)
        ModifierFactory.registered[name] = modifier
"""


@pytest.fixture
def output_of(tmp_path):
    """Runs code in a process of its own and returns its last line."""
    package = tmp_path / "llmcompressor"
    (package / "modifiers").mkdir(parents=True)
    (package / "__init__.py").write_text("import llmcompressor.modifiers\n")
    (package / "modifiers" / "__init__.py").write_text(MODIFIERS)

    def output_of(code: str) -> str:
        code = f"import sys\nsys.path.insert(0, {str(tmp_path)!r})\n{code}"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip().splitlines()[-1]

    return output_of


@pytest.mark.parametrize(
    "order",
    [
        "import llmcompressor, rac_modifier",
        "import rac_modifier, llmcompressor",
        "import rac_modifier, llmcompressor.modifiers",
        "import rac_modifier.llmcompressor.register",
    ],
)
def test_both_modifiers_are_registered_whatever_is_imported_first(output_of, order):
    code = "from llmcompressor.modifiers import ModifierFactory\nprint(*sorted(ModifierFactory.registered))"
    assert (
        output_of(f"{order}\n{code}")
        == "ReasoningAwareCalibrationModifier ReasoningAwareSparseGPTModifier"
    )


def test_registering_imports_none_of_our_modules(output_of):
    code = (
        "import rac_modifier, llmcompressor\n"
        "print(sorted(m for m in sys.modules if m.startswith('rac_modifier.llmcompressor.')))"
    )
    assert output_of(code) == "['rac_modifier.llmcompressor.register']"


def test_a_stand_in_makes_the_modifier_itself():
    from llmcompressor.modifiers import ModifierFactory

    made = ModifierFactory.create(
        "ReasoningAwareSparseGPTModifier", True, True, mask_structure="2:4", group="pruning"
    )
    assert type(made) is ReasoningAwareSparseGPTModifier
    assert (made.mask_structure, made.group) == ("2:4", "pruning")
    assert set(MODULES) == {"ReasoningAwareSparseGPTModifier", "ReasoningAwareCalibrationModifier"}
