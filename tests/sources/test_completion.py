"""Test that completing a sequence of steps gives the same as completing each of them separately."""

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from natgrad.schema.errors import InputError
from natgrad.sources.base import Difference, StepContent
from natgrad.sources.completion import Completion, complete
from natgrad.sources.steps import LoggedStep, LoggedTensor
from natgrad.storage import LocalStorage

STEP = LoggedStep(0, LocalStorage(Path("/log/step_0")))
tensors = st.dictionaries(
    st.sampled_from(["a", "b.2", "b.10"]),
    st.builds(LoggedTensor, st.sampled_from([(2,), (3,)]), st.just("float32")),
    min_size=1,
)
arrays = st.dictionaries(st.sampled_from(["parameter", "gradient", "hvp"]), tensors, min_size=1)
contents = st.builds(
    StepContent,
    st.one_of(arrays, tensors.map(lambda named: {"parameter": named, "gradient": named})),
    st.dictionaries(st.sampled_from(["loss", "learning_rate"]), st.floats(0, 1)),
    notes=st.sampled_from([(), ("a note",)]),
    ties=st.sampled_from([{}, {"b.2": "a"}]),
    untrained=st.booleans(),
    replicate_loss=st.sampled_from([(), (1.0,), (2.0,)]),
    no_gradient=st.sampled_from(["", "a reason"]),
    differences=st.sampled_from([(), (Difference("loss", "one", 1.0, "other", 2.0),)]),
)
options = st.fixed_dictionaries(
    {"tensors": st.sampled_from([None, ("a",)]), "is_last": st.booleans(), "gradients": st.booleans()}
)


def outcome(complete, *arguments, **options):
    try:
        return complete(*arguments, **options)
    except InputError as error:
        return str(error)


@given(
    st.lists(contents, min_size=1, max_size=3),
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), options), max_size=12),
)
def test_each_step_is_completed_as_if_it_were_alone(described, steps):
    completion = Completion()
    for first, second, chosen in steps:
        # The numbers of one step, and everything else from another.
        content, numbers = described[first % len(described)], described[second % len(described)]
        content = StepContent(
            **{**vars(content), "scalars": numbers.scalars, "replicate_loss": numbers.replicate_loss}
        )
        assert outcome(completion.of, STEP, content, **chosen) == outcome(complete, STEP, content, **chosen)
