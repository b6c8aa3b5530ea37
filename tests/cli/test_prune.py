import json


def test_prune_writes_a_checkpoint_and_says_where(rac, tiny_folder, recipe_file, tmp_path):
    out = tmp_path / "sparse"
    code, stdout, _ = rac("prune", tiny_folder, out, "-r", recipe_file, "-s", "calibration.tokens=500")
    assert code == 0
    assert f"rac inspect {out}" in stdout
    record = json.loads((out / "rac_run.json").read_text())
    assert record["calibration"]["tokens"] == 500


def test_a_mistake_ends_in_one_message_and_exit_code_2(rac, tiny_folder, recipe_file, tmp_path):
    code, stdout, stderr = rac("prune", tiny_folder, tmp_path / "out", "-r", recipe_file, "-s", "solver=admm")
    assert code == 2
    assert stderr.startswith("error: ")
    assert "'admm'" in stderr
    assert "Traceback" not in stderr + stdout
    assert not (tmp_path / "out").exists()
