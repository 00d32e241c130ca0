"""Proposals are written so that a shell and a run file give back the same paths, keys and patterns."""

import shlex
import tomllib

from hypothesis import given
from hypothesis import strategies as st

from natgrad.app.diagnosis.proposals import Part, Proposal, advised

TEXT = st.text(st.characters(exclude_categories=("C",), exclude_characters="/"), min_size=1, max_size=12)


@given(st.lists(TEXT, min_size=1, max_size=3), st.dictionaries(st.sampled_from(["loss", "gradient"]), TEXT), TEXT)
def test_a_run_file_contains_the_same_options(tmp_path_factory, names, mapping, pattern):
    root = tmp_path_factory.mktemp("root")
    parts = tuple(Part(str(root / name), map=mapping, shift={"loss": -1}, pattern=pattern) for name in names)
    proposal = Proposal((*parts, Part(str(root / "plain"))), folder=root)
    path, content = proposal.run_file
    assert path == str(root / "run.toml")
    entries = tomllib.loads(content)["source"]
    given_map = {"map": mapping} if mapping else {}
    assert [root / entry.pop("path") for entry in entries] == [root / name for name in (*names, "plain")]
    assert entries == [{**given_map, "shift": {"loss": -1}, "pattern": pattern}] * len(names) + [{}]


@given(TEXT, TEXT)
def test_a_command_contains_the_same_words(name, pattern):
    part = Part(name, map={"loss": "a"}, pattern=pattern)
    assert shlex.split(Proposal((part,)).command) == [
        *("natgrad", "process", name, "OUT", "--map", "loss=a", "--pattern", pattern)
    ]


def test_the_options_of_several_sources_are_written_into_a_run_file(tmp_path):
    parts = (Part(str(tmp_path / "a"), pattern="x{step}"), Part(str(tmp_path / "b")))
    proposal = Proposal(parts, folder=tmp_path)
    assert shlex.split(proposal.command) == ["natgrad", "process", str(tmp_path / "run.toml"), "OUT"]
    plain = Proposal((Part(str(tmp_path / "a")), Part(str(tmp_path / "b"))), folder=tmp_path)
    assert shlex.split(plain.command) == ["natgrad", "process", str(tmp_path / "a"), str(tmp_path / "b"), "OUT"]
    assert plain.run_file is not None
    assert Proposal((Part(str(tmp_path / "a")),), folder=tmp_path).run_file is None


def test_options_that_apply_to_one_source_only_are_written_into_the_command(tmp_path):
    states = Part(str(tmp_path / "a"), map={"gradient": "g"}, pattern="x{step}")
    scalars = Part(str(tmp_path / "b"), map={"loss": "l", "line": "iter {step}: {loss}"}, scalars=True)
    assert shlex.split(Proposal((states, scalars), folder=tmp_path).command)[2:] == [
        *(str(tmp_path / "a"), str(tmp_path / "b"), "OUT", "--map", "gradient=g", "--map", "loss=l"),
        *("--map", "line=iter {step}: {loss}", "--pattern", "x{step}"),
    ]
    # Two logs of scalars, a shift, and a step number of the states are ambiguous.
    for others in (
        (states, scalars, Part("c", scalars=True)),
        (states, Part("c", shift={"loss": 1}, scalars=True)),
        (Part("a", map={"step": "n"}), Part("b", scalars=True)),
    ):
        assert Proposal(others, folder=tmp_path).needs_run_file


def test_advice_with_placeholders_is_not_followed():
    assert advised("specify the key with --map loss=KEY, or select --map 'loss=l[mode=VALUE]'") == []
    assert advised("select with --map 'loss=loss[mode=train]', or with map in a run file") == [
        {"map": {"loss": "loss[mode=train]"}}
    ]
    assert advised("use --shift gradient=-1 --shift loss=-1") == [{"shift": {"gradient": -1, "loss": -1}}]
    assert advised(
        "use --map line='iter {step}: loss {loss}', for example, or --map line=NAME: --map line=nanogpt"
    ) == [
        {"map": {"line": "iter {step}: loss {loss}"}},
        {"map": {"line": "nanogpt"}},
    ]
    assert advised('use --pattern "it\'s {step}"') == [{"pattern": "it's {step}"}]
