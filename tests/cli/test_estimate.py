def test_estimate_names_each_preset_and_loads_no_weights(rac, recipe_file, tmp_path):
    from transformers import AutoConfig

    from rac_modifier import reasoner_path

    AutoConfig.from_pretrained(reasoner_path()).save_pretrained(tmp_path / "config-only")
    code, out, err = rac("estimate", tmp_path / "config-only", "-r", recipe_file, "--set", "calibration.tokens=1000")
    assert code == 0, err
    assert "1,000 tokens" in out
    costs = {line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line.startswith(("q", "fa", "pa"))}
    assert costs.keys() == {"quality", "fast", "paper"}
    assert costs["paper"] < costs["fast"] < costs["quality"]
