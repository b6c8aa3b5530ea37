"""What upstream's `oneshot` is given beside our recipe: honoured, or refused by name before anything is sampled."""

import json
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from llmcompressor.args import DatasetArguments, RecipeArguments
from llmcompressor.modifiers.quantization import GPTQModifier
from loguru import logger
from transformers import AutoTokenizer

from rac_modifier import RacError
from rac_modifier.llmcompressor.oneshot_arguments import (
    check_arguments,
    find_oneshot,
    given_tokenizer,
    warn_of_overlooked,
)
from rac_modifier.traces.store import TraceStore
from tests.llmcompressor.modifier_helpers import generic_loader, gptq_w4
from tests.tiny import tiny_tokenizer

NAME = "ReasoningAwareSparseGPTModifier"
REFUSED = {
    "dataset": generic_loader(),
    "dataset_path": "rows.json",
    "dataset_config_name": "main",
    "splits": "train[:5%]",
    "text_column": "content",
    "preprocessing_func": "format.py:f",
    "preprocessing_num_workers": 2,
    "streaming": True,
    "overwrite_cache": True,
    "concatenate_data": True,
    "num_calibration_samples": 4,
    "max_seq_length": 128,
    "shuffle_calibration_samples": False,
    "batch_size": 4,
    "data_collator": "padding",
    "pad_to_max_length": True,
    "dataloader_num_workers": 2,
    "use_loss_mask": True,
    "min_tokens_per_module": 0.5,
    "propagate_error": False,
    "sequential_prefetch": True,
}
INSTEAD = {
    "dataset": "traces.problems",
    "num_calibration_samples": "calibration.tokens",
    "max_seq_length": "calibration.max_sequence_tokens",
    "shuffle_calibration_samples": "calibration.seed",
    "batch_size": "calibration.batch_tokens",
    "data_collator": "calibration.batch_tokens",
    "use_loss_mask": "calibration.prompt_weight",
}


def arguments(output_dir=None, stage=None, processor=None, **given):
    """What `Oneshot` holds, without loading a model."""
    return SimpleNamespace(
        dataset_args=DatasetArguments(**given),
        recipe_args=RecipeArguments(stage=stage),
        output_dir=None if output_dir is None else str(output_dir),
        processor=processor,
    )


@pytest.mark.parametrize("name", REFUSED)
def test_an_argument_without_effect_is_refused_by_name(name):
    with pytest.raises(RacError) as caught:
        check_arguments(arguments(**{name: REFUSED[name]}), NAME, prunes=True)
    message = str(caught.value)
    assert f"oneshot was given {name}=" in message
    assert f"leave the {name} argument out" in message
    assert INSTEAD.get(name, "") in message


def test_all_of_them_are_named_at_once():
    with pytest.raises(
        RacError, match=r"(?s)given max_seq_length=128.*\n.*given num_calibration_samples=4"
    ):
        check_arguments(arguments(max_seq_length=128, num_calibration_samples=4), NAME, prunes=True)


def test_defaults_and_what_is_honoured_pass():
    honoured = {
        "pipeline": "Sequential",
        "tracing_ignore": ["f"],
        "sequential_targets": ["Qwen3DecoderLayer"],
        "sequential_targets_per_subgraph": 2,
        "sequential_offload_device": "cpu",
        "moe_calibrate_all_experts": False,
    }
    check_arguments(arguments(), NAME, prunes=True)
    check_arguments(arguments(**honoured), NAME, prunes=True)
    check_arguments(arguments(pipeline=None), NAME, prunes=True)


@pytest.mark.parametrize("given", [{"propagate_error": False}, {"sequential_prefetch": True}])
def test_upstreams_own_loop_honours_what_ours_do_not(given):
    check_arguments(arguments(**given), NAME, prunes=False)


@dataclass
class LaterArguments(DatasetArguments):
    new_one: int = 0


def test_an_argument_of_a_later_version_is_refused():
    given = arguments()
    given.dataset_args = LaterArguments()
    check_arguments(given, NAME, prunes=True)
    given.dataset_args = LaterArguments(new_one=7)
    with pytest.raises(RacError, match=r"new_one=7.*does not know it"):
        check_arguments(given, NAME, prunes=True)


@pytest.mark.parametrize("pipeline", ["basic", "datafree"])
def test_pipelines_that_do_not_go_through_the_model_are_refused(pipeline):
    with pytest.raises(RacError, match=f'pipeline="{pipeline}" does not prune layer by layer'):
        check_arguments(arguments(pipeline=pipeline), NAME, prunes=True)


def test_an_output_folder_in_use_is_refused(tmp_path):
    (tmp_path / "killed" / ".rac_saving").mkdir(parents=True)
    for free in ("new", "killed"):
        check_arguments(arguments(tmp_path / free), NAME, prunes=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    with pytest.raises(RacError, match=r"full is in use"):
        check_arguments(arguments(tmp_path / "full"), NAME, prunes=True)
    with pytest.raises(RacError, match=r"file is a file"):
        check_arguments(arguments(tmp_path / "full" / "file"), NAME, prunes=True)


def test_with_a_stage_its_own_folder_is_looked_at(tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / "file").write_text("")
    check_arguments(arguments(tmp_path, stage="second"), NAME, prunes=True)
    with pytest.raises(RacError, match=r"first is in use"):
        check_arguments(arguments(tmp_path, stage="first"), NAME, prunes=True)


@pytest.fixture
def nothing_is_sampled(monkeypatch):
    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set", None
    )


@pytest.mark.usefixtures("nothing_is_sampled")
@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"num_calibration_samples": 8}, "num_calibration_samples=8"),
        ({"max_seq_length": 64}, "max_seq_length=64"),
        ({"shuffle_calibration_samples": False}, "shuffle_calibration_samples=False"),
        ({"dataset": generic_loader()}, "leave the dataset argument out"),
        ({"text_column": "content"}, "text_column='content'"),
    ],
)
def test_oneshot_refuses_them_before_anything_is_sampled(prune, calibrate, given, says):
    with pytest.raises(RacError, match=says):
        prune(oneshot_options=given)
    with pytest.raises(RacError, match=says):
        calibrate(later=[gptq_w4()], oneshot_options=given)


@pytest.mark.usefixtures("nothing_is_sampled")
def test_oneshot_refuses_a_folder_in_use_before_anything_is_sampled(prune, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(RacError, match="is in use; name an empty or a new one"):
        prune(output_dir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.usefixtures("nothing_is_sampled")
def test_a_run_that_was_stopped_while_it_saved_says_how_to_go_on(prune, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    (tmp_path / "out.unfinished").mkdir()
    with pytest.raises(
        RacError, match=r"stopped while it saved.* remove \S+out and start the same run again"
    ):
        prune(output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == b"half"


def test_a_session_without_oneshot_has_no_arguments():
    assert find_oneshot() is None


class TokenizerUsed(Exception):  # noqa: N818 - a result, not an error
    """Holds the tokenizer that would be calibrated with."""


@pytest.fixture
def used_tokenizer(monkeypatch):
    """Runs up to where the calibration set is built, and returns the tokenizer that it would be built with."""

    def build(model, tokenizer, *args, **kwargs):
        raise TokenizerUsed(tokenizer)

    monkeypatch.setattr(
        "rac_modifier.llmcompressor.calibration_modifier.build_calibration_set", build
    )

    def used(prune, **options):
        with pytest.raises(TokenizerUsed) as caught:
            prune(**options)
        return caught.value.args[0]

    return used


def test_the_tokenizer_that_oneshot_is_given_is_used(prune, used_tokenizer, tmp_path):
    other = tiny_tokenizer("{% for m in messages %}OTHER{{ m.content }}{% endfor %}")
    assert used_tokenizer(prune, oneshot_options={"tokenizer": other}) is other
    assert used_tokenizer(prune, oneshot_options={"processor": other}) is other
    other.save_pretrained(tmp_path / "tokenizer")
    by_path = used_tokenizer(prune, oneshot_options={"tokenizer": str(tmp_path / "tokenizer")})
    assert by_path.chat_template == other.chat_template


def test_the_recipes_tokenizer_is_used_where_oneshot_is_given_none(prune, used_tokenizer, tmp_path):
    tiny_tokenizer("{% for m in messages %}OTHER{{ m.content }}{% endfor %}").save_pretrained(
        tmp_path / "tokenizer"
    )
    assert "OTHER" in used_tokenizer(prune, tokenizer=str(tmp_path / "tokenizer")).chat_template


@pytest.mark.usefixtures("nothing_is_sampled")
def test_two_tokenizers_are_refused(prune, tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "recipes")
    tiny_tokenizer().save_pretrained(tmp_path / "given")
    with pytest.raises(
        RacError, match=r"given the tokenizer '.*given', and the recipe names '.*recipes'"
    ):
        prune(
            tokenizer=str(tmp_path / "recipes"),
            oneshot_options={"tokenizer": str(tmp_path / "given")},
        )


def test_a_processor_gives_its_tokenizer(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert (
        given_tokenizer(arguments(processor=SimpleNamespace(tokenizer=tokenizer)), None, "model")
        is tokenizer
    )
    assert given_tokenizer(arguments(processor=None), None, "model") is None


def test_the_given_tokenizer_renders_the_traces(prune, tmp_path):
    """From `oneshot` to the prompts that are sampled and the tokenizer that is saved."""
    other = tiny_tokenizer(
        "{% for m in messages %}<user><user>{{ m.content }}{% endfor %}<assistant>"
    )
    traces = {
        "store": str(tmp_path / "t.jsonl"),
        "sampling": {"max_new_tokens": 20, "template": "chat"},
    }
    prune(
        traces=traces, calibration={"tokens": 200}, output_dir=tmp_path / "out", oneshot_options={"tokenizer": other},
        preset="paper",
    )  # fmt: skip
    record = json.loads((tmp_path / "out" / "rac_run.json").read_text())
    assert record["trace_stores"]["traces"]["prompt"]["chat_template"]
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == other.chat_template
    prompts = [trace.prompt_ids for trace in TraceStore.read(tmp_path / "t.jsonl")]
    user = other.convert_tokens_to_ids("<user>")
    assert prompts
    assert all(prompt[:2] == (user, user) for prompt in prompts)


def test_sequential_targets_are_honoured(prune, tmp_path):
    for given in (
        {"sequential_targets": ["Qwen3DecoderLayer"]},
        {"sequential_targets_per_subgraph": 2},
    ):
        name = next(iter(given))
        prune(output_dir=tmp_path / name, oneshot_options=given)
        order = json.loads((tmp_path / name / "rac_run.json").read_text())["order"]
        assert order["order"] == "layer"
        assert order["why"].startswith(f"oneshot was given {name}=")


def test_a_calibrated_gptq_takes_the_given_tokenizer_too(calibrate, used_tokenizer):
    other = tiny_tokenizer()
    gptq = GPTQModifier(targets=["Linear"], ignore=["lm_head"], scheme="W8A8")
    assert used_tokenizer(calibrate, later=[gptq], oneshot_options={"tokenizer": other}) is other


def test_a_stage_that_upstream_does_not_read_is_named(tmp_path):
    warnings = []
    sink = logger.add(warnings.append, format="{message}", level="WARNING")
    modifiers = "pruning_modifiers: {ReasoningAwareSparseGPTModifier: {sparsity: 0.5}}"
    (tmp_path / "r.yaml").write_text(
        f"a_stage: {{{modifiers}}}\nquant_stag: {{q_modifiers: {{GPTQModifier: {{}}}}}}\n"
    )
    warn_of_overlooked(str(tmp_path / "r.yaml"))
    warn_of_overlooked(f"a_stage: {{{modifiers}}}")
    logger.remove(sink)
    assert [line.partition(":")[0] for line in warnings] == [
        "llm-compressor does not read quant_stag"
    ]
