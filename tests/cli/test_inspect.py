def test_inspect_lists_the_modules_and_their_pattern(rac, sparse_folder):
    code, stdout, _ = rac("inspect", sparse_folder)
    assert code == 0
    assert "model.layers.1.mlp.down_proj" in stdout
    assert "2:4" in stdout
