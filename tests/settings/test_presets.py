from rac_modifier.settings.presets import with_preset


def test_what_the_entry_sets_is_kept():
    filled = with_preset({"preset": "paper", "solver": "wanda", "sparsity": 0.5})
    assert filled == {
        "preset": "paper", "solver": "wanda", "sparsity": 0.5, "refit": False, "reconstruct": "pruned", "order": "layer",
    }  # fmt: skip


def test_an_unknown_preset_is_left_to_the_schema():
    assert with_preset({"preset": "best"}) == {"preset": "best"}
    assert with_preset({"preset": ["paper"]}) == {"preset": ["paper"]}
