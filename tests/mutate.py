"""Change the code of theory and results in one place at a time, and count the changes that no test detects.

The operators are those of Cosmic Ray. It can neither draw a sample with a seed nor run mutants in forks of a
process that has imported everything, so this program does that. A mutant is one operator applied to one place. The
places are drawn, and not the mutants, because there are eleven replacements of a ``+``, but only two of a number.
Annotations are not changed: they are not evaluated.

``mutants.toml`` lists mutations that are always tested, and mutants that no test can detect, with the reason.

    python tests/mutate.py --mutants 200 --seed 0
    python tests/mutate.py --mutants 1 --seed 0 --first 17          # number 17 of the same sample

Exits with 1 if a listed mutation is not detected, or if more than 10 % of the drawn mutants survive.
"""

import argparse
import ast
import collections
import difflib
import importlib.machinery
import importlib.util
import json
import os
import random
import resource
import sys
import time
import tomllib
import traceback
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("mutants.toml")
LARGEST_SHARE = 0.1
"""Share of the mutants that may survive."""
PROCESSOR_SECONDS = 90
"""Time limit for the tests of a mutant, which may loop forever. Mutants that reach it count as detected."""

KINDS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod", "Pow"},
    {"BitOr", "BitAnd", "BitXor"},
    {"Eq", "NotEq", "Lt", "LtE", "Gt", "GtE"},
    {"Is", "IsNot"},
    {"In", "NotIn"},
    {"UAdd", "USub"},
    *({"Delete", unary} for unary in ("USub", "Invert", "Not")),
)
"""Operators that replace each other."""

PACKAGES = "results", "theory"
FURTHER = {
    "results.blocks": ["results/test_building"],
    "results.inputs": ["results/test_dataset"],
    "results.objective": ["results/test_dataset"],
    "results.pairs": ["results/test_dataset"],
    "results.recovery": ["ingestion/test_recovered_gradients", "results/test_variables"],
    "results.replicate_variables": ["results/test_replicates", "results/test_variables"],
    "results.sizes": ["results/test_building"],
    "results.updates": [
        "results/test_window_status",
        "results/test_variables",
        "results/test_pairs",
        "results/test_dataset",
    ],
    "results.dataset": ["results/test_variables"],
    "results.variables": ["results/test_pairs", "results/test_dataset"],
    "theory.discrete_time": ["theory/test_geometry", "results/test_dataset", "theory/test_theory"],
    "theory.geometry": ["results/test_pairs", "theory/test_theory", "results/test_dataset"],
    "theory.metric_operators": ["theory/test_theory"],
    "theory.symmetric_operators": [
        "theory/test_metric_operators",
        "theory/test_preconditioners",
        "theory/test_theory",
    ],
    "theory.windows": ["results/test_dataset"],
}
"""Tests that must detect the mutants of a module in addition to its own, in the order in which they run."""

SLOW = ("kernel_and_formulas", "poor_sample", "xarray_alone", "each_tensor_has_its_own")
"""Parts of the names of tests that take seconds and detect no additional mutants."""


@dataclass(frozen=True)
class Mutant:
    """A module with one change: the changed lines, and the function or class that contains them."""

    module: str
    where: str
    before: str
    after: str
    source: str = field(repr=False, compare=False)

    def __str__(self):
        return f"{self.module}, {self.where}:\n    - {self.before}\n    + {self.after}"


def modules():
    """Return the names of the modules of theory and results."""
    found = [path for package in PACKAGES for path in sorted(path_of(f"{package}.*").parent.glob("*.py"))]
    return [f"{path.parent.name}.{path.stem}" for path in found if path.stem != "__init__"]


def tests_of(module):
    """Return the tests that must detect the mutants of a module: those that mirror it, and further ones."""
    package, name = module.split(".")
    mirror = f"{package}/test_{name}"
    found = [mirror] if (ROOT / "tests" / f"{mirror}.py").is_file() else []
    found += FURTHER.get(module, [])
    assert found, f"no tests of {module}: add tests/{mirror}.py, or list other tests in FURTHER"
    return found


def path_of(module):
    return ROOT / "pipeline" / "natgrad" / f"{module.replace('.', '/')}.py"


# Mutants -----------------------------------------------------------------------------------------------------


def places(module):
    """Return the places at which operators apply, and for each place the operators with their occurrence."""
    source = path_of(module).read_text()
    annotations = []
    for node in ast.walk(ast.parse(source)):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            if part is not None:
                annotations.append(((part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)))
    nodes, found = list(ast_nodes(get_ast(source))), collections.defaultdict(list)
    for names in operators().values():
        starts = [start for node in nodes for start, _ in get_operator(names[0])().mutation_positions(node)]
        for occurrence, start in enumerate(starts):
            if not any(first <= start < end for first, end in annotations):
                found[start] += [(name, occurrence) for name in names]
    return found


def operators():
    """Return the names of operators, by what they replace."""
    found = collections.defaultdict(list)
    for name in sorted(operator_names()):
        kind, *replaced = name.removeprefix("core/").split("_")
        # Operators with arguments insert variables that the user names. A replacement by an operator of another
        # kind, such as + by <<, is only a type error.
        if get_operator(name).arguments() or (len(replaced) == 2 and not any({*replaced} <= one for one in KINDS)):
            continue
        found[kind, replaced[-1 if "Delete" in replaced else 0] if replaced else ""].append(name)
    return found


def mutant(module, operator, occurrence):
    """Apply an operator. Return None if the result is not valid Python or is the same program."""
    return compared(module, mutate_code(path_of(module).read_text(), get_operator(operator)(), occurrence))


def listed(entry):
    """Return the mutant of an entry of the list, which replaces a text that the module contains once."""
    source = path_of(entry["module"]).read_text()
    assert source.count(entry["before"]) == 1, f"{entry['module']} does not contain once: {entry['before']}"
    return compared(entry["module"], source.replace(entry["before"], entry["after"]))


def identity(entry):
    """Return an identifier of a mutant that does not depend on line numbers."""
    return [entry[name] for name in ("module", "where", "before", "after")]


def compared(module, changed):
    source = path_of(module).read_text()
    try:
        with warnings.catch_warnings(action="ignore"):
            compile(changed, module, "exec")
            if ast.dump(ast.parse(changed)) == ast.dump(ast.parse(source)):
                return None
    except SyntaxError:
        return None
    old, new = source.splitlines(), changed.splitlines()
    matched = difflib.SequenceMatcher(None, old, new, autojunk=False)
    blocks = [block for block in matched.get_opcodes() if block[0] != "equal"]
    before = joined(line for _, first, last, _, _ in blocks for line in old[first:last])
    after = joined(line for _, _, _, first, last in blocks for line in new[first:last])
    return Mutant(module, _scope(ast.parse(source), blocks[0][1] + 1), before, after, changed)


def joined(lines):
    return " ".join(line.strip() for line in lines)


def _scope(tree, line):
    """Return the name of the innermost function or class that contains a line."""
    names = []
    for node in ast.walk(tree):  # breadth first
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            names += [node.name] if first <= line <= node.end_lineno else []
    return ".".join(names) or "module"


def sample(count, seed, chosen):
    """Draw places, and an operator for each. A smaller sample is a prefix of a larger one."""
    drawn = random.Random(seed)
    every = [(module, operators) for module in chosen for _, operators in sorted(places(module).items())]
    drawn.shuffle(every)
    mutants = []
    while len(mutants) < count and every:
        module, operators = every.pop()
        changed = mutant(module, *drawn.choice(operators))
        mutants += [] if changed is None else [changed]
    return mutants


# Tests -------------------------------------------------------------------------------------------------------


class Changed(importlib.machinery.SourceFileLoader):
    """Finder and loader of a mutant instead of its module."""

    def __init__(self, changed):
        super().__init__(f"natgrad.{changed.module}", str(path_of(changed.module)))
        self.changed = changed

    def find_spec(self, name, path=None, target=None):
        return importlib.util.spec_from_file_location(name, self.path, loader=self) if name == self.name else None

    def get_code(self, fullname):
        with warnings.catch_warnings(action="ignore"):
            return compile(self.changed.source, self.path, "exec", dont_inherit=True)


class Report:
    """Plugin of pytest: keep the first failure."""

    failed = ""

    def pytest_runtest_logreport(self, report):
        self.failed = self.failed or (report.nodeid if report.failed else "")

    pytest_collectreport = pytest_runtest_logreport


def warm():
    """Import the modules that the tests import, and compile the kernel. No thread is started."""
    import mpmath
    from hypothesis import Phase, settings

    from natgrad.kernel import gram
    from natgrad.results import dataset, replicates
    from natgrad.schema.names import ledger_vectors

    # Fewer examples, and no search for the simplest one: only the outcome matters.
    settings.register_profile(
        "mutants", deadline=None, derandomize=True, max_examples=15, phases=[Phase.explicit, Phase.generate]
    )
    for dtype in (np.float32, np.float64):
        for hvp in (None, [np.ones((2, 3), dtype)]):
            products = np.empty((1, 1, *[len(ledger_vectors(hvp=hvp is not None))] * 2))
            state = [np.ones((2, 3), dtype)]
            gram.products(state, state, np.array([0, 3]), products, np.empty((1, 1)), hvp)
    # Every fork imports these again, because they may import the changed module.
    kept = ("natgrad.schema", "natgrad.kernel", "natgrad.storage")
    for name in [name for name in sys.modules if name.startswith("natgrad") and not name.startswith(kept)]:
        del sys.modules[name]
    return mpmath, dataset, replicates


def fork(files, changed):
    """Run tests in a fork, with a mutant or the unchanged code; return its id and a pipe for the result."""
    read, write = os.pipe()
    process = os.fork()
    if process:
        os.close(write)
        return process, read
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if changed is not None:
            resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))
            sys.meta_path.insert(0, Changed(changed))
        options = ["--exitfirst", "--assert=plain", "--timeout=0", "-p", "no:cacheprovider", "-p", "no:benchmark"]
        options += ["--hypothesis-profile=mutants", "-k", f"not ({' or '.join(SLOW)})"]
        report = Report()
        code = pytest.main([*options, *(f"tests/{name}.py" for name in files)], plugins=[report])
        with open(write, "w") as pipe:  # noqa: PTH123
            json.dump(report.failed or (f"exit code {code}" if code else ""), pipe)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(0)


def outcomes(tasks, jobs):
    """Yield the name and the mutant of each task, and the test that fails, or an empty string."""
    waiting, running = list(tasks)[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name, changed, files = waiting.pop()
            process, read = fork(files, changed)
            running[process] = name, changed, read
        process, _ = os.wait()
        name, changed, read = running.pop(process)
        with open(read) as pipe:  # noqa: PTH123
            yield name, changed, json.loads(pipe.read() or '"the limit of the processor time"')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--first", type=int, default=0, help="omit this many mutants of the sample before the first"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--module", action="append", choices=modules(), help="default: all modules")
    options = parser.parse_args()
    os.chdir(ROOT)
    start, chosen = time.monotonic(), options.module or modules()
    entries = tomllib.loads(LIST.read_text())
    equivalent = [identity(entry) for entry in entries.get("equivalent", [])]
    for module, _, before, _ in equivalent:
        assert before in joined(path_of(module).read_text().splitlines()), f"{LIST.name}: {module} has no {before}"
    always = {entry["name"]: listed(entry) for entry in entries["always"] if entry["module"] in chosen}
    drawn = dict(enumerate(sample(options.first + options.mutants, options.seed, chosen)))
    drawn = {number: changed for number, changed in drawn.items() if number >= options.first}
    possible = {number: changed for number, changed in drawn.items() if identity(vars(changed)) not in equivalent}
    tasks = [(name, changed, tests_of(changed.module)) for name, changed in (always | possible).items()]
    # The unchanged code must pass the same tests.
    tasks.append(("no change", None, sorted({file for _, _, files in tasks for file in files})))
    warm()
    survived = set()
    for name, changed, failed in outcomes(tasks, options.jobs):
        if changed is not None:
            print(f"{name}: {'detected' if failed else 'SURVIVED'} {changed}\n    {failed}", flush=True)
            survived |= set() if failed else {name}
        elif failed:
            print(f"the tests fail without any change: {failed}")
            return 1
    missed, lived = survived & {*always}, survived & {*possible}
    print(f"{len(always) - len(missed)} of {len(always)} listed mutations are detected.")
    print(
        f"Of {len(drawn)} mutants (seed {options.seed}), {len(drawn) - len(possible)} are equivalent, "
        f"{len(possible) - len(lived)} are detected and {len(lived)} survive ({time.monotonic() - start:.0f} s)."
    )
    return int(bool(missed) or len(lived) > LARGEST_SHARE * len(possible))


if __name__ == "__main__":
    raise SystemExit(main())
