"""llm-compressor's recipes: how they find our modifiers, and what they overlook."""

from rac_modifier import ReasoningAwareSparseGPTModifier
from rac_modifier.settings.entries import ENTRIES
from rac_modifier.settings.recipe import MODIFIERS
from tests.tiny import NAME


def test_seam_modifier_factory_refresh_keeps_registered_modifiers():
    """Its docstring says that it clears them."""
    from llmcompressor.modifiers import ModifierFactory

    ModifierFactory.refresh()
    made = ModifierFactory.create(NAME, True, True, mask_structure="2:4")
    assert type(made) is ReasoningAwareSparseGPTModifier


def test_seam_modifiers_of_llm_compressor():
    """The names that settings/recipe.py lets through."""
    from llmcompressor.modifiers import ModifierFactory

    if not ModifierFactory._loaded:
        ModifierFactory.refresh()
    assert MODIFIERS - ENTRIES.keys() == ModifierFactory._main_registry.keys() - {"Modifier"}
