import json
import shutil

import pytest
from transformers import AutoTokenizer

from rac_modifier.sampling import generate as generate_module
from tests.cli.conftest import prune
from tests.tiny import entry

FEW = ("--problems", 2, "--cap", 4)


@pytest.fixture(scope="session")
def brief_folder(tiny_folder, tmp_path_factory):
    """The tiny model, calibrated with a system prompt and with thinking switched off."""
    folder = tmp_path_factory.mktemp("brief")
    settings = entry(folder / "traces.jsonl")
    settings["traces"]["sampling"] |= {"system_prompt": "Be brief.", "thinking": False}
    return prune(tiny_folder, folder, settings, tokens=300)


@pytest.fixture
def asked(monkeypatch):
    """The prompts that each model is asked with, as text, in the order of the models."""
    texts: list[str] = []
    inner = generate_module.decode
    tokenizers = {}

    def decode(model, prompts, **options):
        name = model.config._name_or_path
        tokenizer = tokenizers.setdefault(name, AutoTokenizer.from_pretrained(name))
        texts.extend(tokenizer.decode(prompt).replace(" ", "") for prompt in prompts)
        return inner(model, prompts, **options)

    monkeypatch.setattr(generate_module, "decode", decode)
    return texts


def test_all_models_are_asked_as_the_compressed_one_was_calibrated(
    rac, tiny_folder, brief_folder, asked, tmp_path
):
    results = tmp_path / "eval.json"
    out = rac.output("eval", tiny_folder, brief_folder, *FEW, "--json", results)
    assert len(asked) == 4
    assert {text[:17] for text in asked} == {"<system>Bebrief.<"}
    assert {text[-11:] for text in asked} == {"<assistant>"}  # no <think>
    assert "Prompt: chat template, system prompt 'Be brief.', thinking off." in out
    assert "another prompt" not in out
    prompt = {"template": "chat", "system_prompt": "Be brief.", "thinking": False}
    assert json.loads(results.read_text())["prompt"] == prompt


def test_divergence_with_an_option_that_replaces_the_calibrated_prompt(
    rac, tiny_folder, brief_folder, asked, tmp_path
):
    options = ("--divergence", *FEW, "--template", "none", "--json", "d.json")
    out = rac.output("eval", tiny_folder, brief_folder, *options)
    assert asked
    assert all("<" not in text for text in asked)
    assert "the bare question, without a template." in out
    was = "chat template, system prompt 'Be brief.', thinking off"
    assert f"{brief_folder} was calibrated with another prompt: {was}." in out
    assert "KL" in out
    (measured,) = json.loads((tmp_path / "d.json").read_text())["divergence"]
    assert measured["kl"] > 0


def test_prompts_without_answers_are_measured_by_how_their_answers_end(
    rac, tiny_folder, sparse_folder, tmp_path
):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"problem": f"Say {i}."}) + "\n" for i in range(3)))
    asking = ("eval", tiny_folder, sparse_folder, "--source", source, "--problems", 3, "--cap", 4)
    assert "rac eval --stopping" in rac(*asking)[2]
    out = rac.output(*asking, "--stopping", "--json", "s.json")
    assert "finished" in out
    assert "accuracy" not in out
    assert f"tokens of {sparse_folder} over {tiny_folder}: x" in out
    content = json.loads((tmp_path / "s.json").read_text())
    for result, shares in zip(content["results"], content["stopping"], strict=True):
        assert result["accuracy"] is None
        assert shares["finished"] + shares["looping"] + shares["going"] == pytest.approx(1)
    (paired,) = content["paired"]
    assert (paired["problems"], paired["difference"], paired["p_value"]) == (3, None, None)


def test_errors_of_the_file_of_answers_and_of_samples_are_in_the_words_of_the_command(
    rac, tiny_folder, tmp_path
):
    words = ("eval", tiny_folder, "--problems", 2, "--answers", "a.jsonl", "--cap")
    rac.output(*words, 4)
    errors = [rac(*words, 5)[2], rac(*words, 4, "--samples", 3)[2]]
    assert "4 in the file, 5 asked for); use these, or name another file" in errors[0]
    assert "3 samples per problem at temperature 0 would be the same completion" in errors[1]
    (tmp_path / "a.jsonl").open("a").write("{}\n")
    errors.append(rac(*words, 4)[2])
    assert "a.jsonl', line 4 is corrupt" in errors[2]
    assert "and run the command again" in errors[2]
    (tmp_path / "a.jsonl").write_text("my diary")
    errors.append(rac(*words, 4)[2])
    assert "is no file of traces or answers; name another file" in errors[3]
    for error in errors:
        for word in ("trace store", "traces.", "samples_per_problem"):
            assert word not in error


def test_figures_on_the_card(rac, tiny_folder, sparse_folder, tmp_path):
    own = shutil.copytree(sparse_folder, tmp_path / "own")
    code, out, _ = rac("eval", tiny_folder, own, *FEW, "--card", "--json", tmp_path / "r.json")
    assert (code, out.splitlines()[-1]) == (0, f"written into the model card of {own}")
    assert rac("eval", tiny_folder, own, *FEW, "--divergence", "--card")[0] == 0
    card = (own / "README.md").read_text()
    record = json.loads((own / "rac_run.json").read_text())["evaluation"]
    result = json.loads((tmp_path / "r.json").read_text())["results"][1]
    assert record["accuracy"][1]["ci_low"] == result["ci_low"]
    assert record["divergence"][0]["tokens"] > 0
    assert "0.0-65.8" in card  # Wilson's interval of 0 of 2
    assert f"\nown against {tiny_folder.name}: +0.0 points (" in card
    assert card.count("Measured with rac eval") == 2
    assert str(tmp_path) not in card + json.dumps(record)
    # alone, with what was measured of the dense model
    options = ("--card", "--baseline", tmp_path / "r.json", "--json", "-")
    code, out, err = rac("eval", own, *FEW, *options)
    names = ["prompt", "results", "protocol", "stopping", "paired"]
    assert (code, list(json.loads(out))) == (0, names)
    assert err.splitlines()[-1] == f"written into the model card of {own}"
    again = (own / "README.md").read_text()
    assert again.count("Measured with rac eval") == 2
    assert f"\nown against {tiny_folder.name}: +0.0 points (" in again
