"""llm-compressor's session: its state, the calls that a modifier gets, and `oneshot` around it."""

import inspect

import pytest
import torch

from rac_modifier import ReasoningAwareSparseGPTModifier


def test_seam_state_data_calib_is_there_and_kept_as_it_is():
    from llmcompressor.core import active_session
    from llmcompressor.core.state import State

    state = State()
    assert state.data.calib is None
    marker = object()
    state.data.calib = marker
    state.update(model=torch.nn.Linear(1, 1), calib_data=None, start=-1)
    assert state.data.calib is marker
    session = active_session()
    session.state.data.calib = marker
    assert session.lifecycle.state.data.calib is marker
    session.reset()
    assert session.state.data.calib is None


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("on_initialize", ["self", "state"]),
        ("on_calibration_start", ["self", "state", "event"]),
        ("on_calibration_end", ["self", "state", "event"]),
        ("on_finalize", ["self", "state"]),
    ],
)
def test_seam_modifier_lifecycle_hooks(name, parameters):
    from llmcompressor.modifiers import Modifier

    actual = list(inspect.signature(getattr(Modifier, name)).parameters)
    assert actual[: len(parameters)] == parameters


def test_seam_modifier_has_no_method_of_a_name_that_is_ours():
    from llmcompressor.modifiers import Modifier

    from rac_modifier import ReasoningAwareCalibrationModifier

    modifiers = ReasoningAwareSparseGPTModifier, ReasoningAwareCalibrationModifier
    classes = {c for m in modifiers for c in m.__mro__ if "rac_modifier" in c.__module__}
    ours = {name for c in classes for name in vars(c)}
    overridden = {name for name in ours if name.startswith(("on_", "__", "model_", "_abc"))}
    ours -= overridden | {"requires_calibration_data", "initialize", "finalize"}
    assert len(ours) > 10
    assert not ours & set(dir(Modifier))


def test_seam_reset_finalizes_a_modifier_whose_run_failed():
    """With that our pipeline is taken away at the latest."""
    from llmcompressor.core import create_session
    from llmcompressor.modifiers.quantization import QuantizationModifier

    class Watched(QuantizationModifier):
        def on_finalize(self, state, **kwargs):
            finalized.append(self.ended_)
            return True

    finalized = []
    with create_session() as session:
        modifier = Watched(targets=["Linear"], scheme="FP8_DYNAMIC")
        modifier.initialized_ = True
        session.lifecycle.recipe.modifiers = [modifier]
        session.reset()
    assert finalized == [False]


def test_seam_oneshot_holds_its_arguments():
    """What a modifier reads of the caller, before anything is sampled."""
    from llmcompressor.entrypoints.oneshot import Oneshot

    made = inspect.getsource(Oneshot.__init__)
    names = ("model_args", "dataset_args", "recipe_args", "output_dir", "processor", "recipe")
    assert [name for name in names if f"self.{name}" not in made] == []
    assert list(inspect.signature(Oneshot.__call__).parameters) == ["self"]
