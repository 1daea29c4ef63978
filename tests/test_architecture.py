"""The floors of the library: what may import what, how much an import loads, and which names are public."""

from __future__ import annotations

import ast
import graphlib
import importlib
import inspect
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import loopwright
import loopwright.callbacks

PACKAGE = Path(loopwright.__file__).parent

FLOORS = {
    4: [
        "loopwright",
        "loopwright.__main__",
        "loopwright.doctor",
        "loopwright.explain_command",
        "loopwright.testing",
        "loopwright.testing.contract",
        "loopwright.testing.tiny",
    ],
    3: ["loopwright.explain", "loopwright.saving", "loopwright.trainer"],
    2: [
        "loopwright.callbacks",
        "loopwright.callbacks.checkpoint",
        "loopwright.callbacks.csv_logger",
        "loopwright.callbacks.early_stopping",
        "loopwright.callbacks.gradient_inspector",
        "loopwright.callbacks.learning_rate_monitor",
        "loopwright.callbacks.progress_bar",
        "loopwright.callbacks.tensorboard_logger",
    ],
    1: [
        "loopwright.adapters",
        "loopwright.averages",
        "loopwright.batches",
        "loopwright.callback",
        "loopwright.checkpoint",
        "loopwright.checkpoint.files",
        "loopwright.checkpoint.folder",
        "loopwright.checkpoint.format",
        "loopwright.checkpoint.lock",
        "loopwright.checkpoint.manifest",
        "loopwright.checkpoint.reading",
        "loopwright.checkpoint.tensors",
        "loopwright.checkpoint.writing",
        "loopwright.checks",
        "loopwright.checks.failure",
        "loopwright.checks.held",
        "loopwright.checks.of_data",
        "loopwright.checks.of_loss",
        "loopwright.checks.of_training",
        "loopwright.checks.probing",
        "loopwright.checks.recorder",
        "loopwright.checks.rehearsal",
        "loopwright.checks.sampling",
        "loopwright.checks.seen",
        "loopwright.checks.surroundings",
        "loopwright.checks.tensors",
        "loopwright.data",
        "loopwright.explaining",
        "loopwright.explaining.batch",
        "loopwright.explaining.facts",
        "loopwright.explaining.lines",
        "loopwright.explaining.parts",
        "loopwright.explaining.source",
        "loopwright.fetching",
        "loopwright.guard",
        "loopwright.history",
        "loopwright.inspecting",
        "loopwright.inspecting.activations",
        "loopwright.inspecting.agenda",
        "loopwright.inspecting.diagnosis",
        "loopwright.inspecting.inspection",
        "loopwright.inspecting.listing",
        "loopwright.inspecting.plot",
        "loopwright.inspecting.probe",
        "loopwright.inspecting.rules",
        "loopwright.inspecting.rules_of_setup",
        "loopwright.inspecting.rules_of_size",
        "loopwright.inspecting.sampled",
        "loopwright.inspecting.small",
        "loopwright.inspecting.taken",
        "loopwright.layout",
        "loopwright.logger",
        "loopwright.metric_calls",
        "loopwright.monitor",
        "loopwright.nonfinite",
        "loopwright.nonfinite.culprit",
        "loopwright.nonfinite.gradients",
        "loopwright.nonfinite.rerun",
        "loopwright.nonfinite.skips",
        "loopwright.nonfinite.watch",
        "loopwright.nonfinite.words",
        "loopwright.planning",
        "loopwright.preflight",
        "loopwright.result",
        "loopwright.run",
        "loopwright.run_state",
        "loopwright.saver",
        "loopwright.scheduling",
        "loopwright.settings",
        "loopwright.sizes",
        "loopwright.step",
        "loopwright.window",
    ],
    0: [
        "loopwright.arguments",
        "loopwright.device",
        "loopwright.errors",
        "loopwright.forms",
        "loopwright.hook_names",
        "loopwright.metrics",
        "loopwright.mismatch",
        "loopwright.mismatch.layers",
        "loopwright.mismatch.losses",
        "loopwright.modes",
        "loopwright.nonfinite.census",
        "loopwright.nonfinite.reasons",
        "loopwright.mismatch.one_class",
        "loopwright.paths",
        "loopwright.pictures",
        "loopwright.plain",
        "loopwright.precision",
        "loopwright.randomness",
        "loopwright.schedule",
        "loopwright.scopes",
        "loopwright.signals",
        "loopwright.state",
        "loopwright.unrecorded",
        "loopwright.weights",
    ],
}
FLOOR = {module: floor for floor, modules in FLOORS.items() for module in modules}

PUBLIC = [
    "Callback",
    "Check",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Every",
    "LockedError",
    "LoopwrightError",
    "LossFn",
    "Metric",
    "NonFiniteError",
    "Output",
    "Preflight",
    "Progress",
    "Result",
    "SaveError",
    "Schedule",
    "ShapeMismatchError",
    "State",
    "Step",
    "Trainer",
    "UnknownMetricError",
    "best_checkpoint",
    "latest_checkpoint",
    "load_weights",
]
PUBLIC_CALLBACKS = [
    "CSVLogger",
    "Checkpoint",
    "EarlyStopping",
    "Finding",
    "GradientInspector",
    "LearningRateMonitor",
    "Logger",
    "ProgressBar",
    "TensorBoardLogger",
]


@dataclass(frozen=True)
class Import:
    """One module that another imports: ``by`` imports ``name``, when it is loaded, later, or only for its types."""

    by: str
    name: str
    line: int
    types_only: bool
    in_function: bool

    def __str__(self) -> str:
        return f"{self.by}, line {self.line}: {self.name}"


def read_sources() -> dict[str, ast.Module]:
    sources = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        sources[name] = ast.parse(path.read_text(encoding="utf-8"))
    return sources


SOURCES = read_sources()


def imports_below(node: ast.AST, by: str, types_only: bool = False, in_function: bool = False) -> list[Import]:
    found: list[Import] = []
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            found += [Import(by, alias.name, child.lineno, types_only, in_function) for alias in child.names]
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{by}, line {child.lineno}: imports are absolute here"
            names = {f"{child.module}.{alias.name}" for alias in child.names}
            modules = {name if name in SOURCES else str(child.module) for name in names}
            found += [Import(by, name, child.lineno, types_only, in_function) for name in sorted(modules)]
        elif isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            found += imports_below(ast.Module(child.body, []), by, types_only=True, in_function=in_function)
            found += imports_below(ast.Module(child.orelse, []), by, types_only, in_function)
        else:
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            found += imports_below(child, by, types_only, inside)
    return found


IMPORTS = [found for by, source in SOURCES.items() for found in imports_below(source, by)]
OWN_IMPORTS = [found for found in IMPORTS if found.name.split(".")[0] == "loopwright"]


def test_the_reader_sees_imports_of_every_kind() -> None:
    source = ast.parse(
        "import torch\n"
        "from loopwright import errors, Trainer\n"
        "if TYPE_CHECKING:\n"
        "    from loopwright.state import State\n"
        "def plot():\n"
        "    with torch.no_grad():\n"
        "        import matplotlib\n"
    )
    found = {(i.name, i.types_only, i.in_function) for i in imports_below(source, "a module")}
    assert found == {
        ("torch", False, False),
        ("loopwright.errors", False, False),
        ("loopwright", False, False),
        ("loopwright.state", True, False),
        ("matplotlib", False, True),
    }


def test_every_module_stands_on_one_floor() -> None:
    assert sorted(FLOOR) == sorted(SOURCES)
    assert sum(map(len, FLOORS.values())) == len(FLOOR)


def test_no_import_goes_up_a_floor() -> None:
    assert OWN_IMPORTS
    up = [str(found) for found in OWN_IMPORTS if FLOOR[found.name] > FLOOR[found.by]]
    assert up == []


def test_there_is_no_import_cycle() -> None:
    graph = graphlib.TopologicalSorter[str]()
    for found in OWN_IMPORTS:
        if not found.types_only:
            graph.add(found.by, found.name)
    graph.prepare()  # a CycleError here names the cycle


def test_callbacks_never_import_each_other_or_the_trainer() -> None:
    callbacks = {name for name in SOURCES if name.startswith("loopwright.callbacks.")}
    forbidden = {"loopwright", "loopwright.callbacks", "loopwright.trainer", *callbacks}
    assert callbacks
    assert [str(found) for found in OWN_IMPORTS if found.by in callbacks and found.name in forbidden] == []


def test_nobody_but_the_front_door_and_the_test_helpers_imports_the_trainer() -> None:
    importers = {found.by for found in OWN_IMPORTS if found.name == "loopwright.trainer"}
    assert importers <= {"loopwright", "loopwright.testing.tiny"}


def test_the_lower_floors_load_torch_and_the_standard_library_only() -> None:
    allowed = {"torch", "typing_extensions", "loopwright", *sys.stdlib_module_names}
    others = [
        str(found)
        for found in IMPORTS
        if FLOOR[found.by] <= 1
        and not (found.types_only or found.in_function)
        and found.name.split(".")[0] not in allowed
    ]
    assert others == []


@pytest.mark.parametrize("module", ["loopwright", "loopwright.callbacks", "loopwright.testing"])
def test_an_import_loads_nothing_heavy_beyond_torch(module: str) -> None:
    program = (
        "import sys, json, torch\n"
        "before = set(sys.modules)\n"
        f"import {module}\n"
        "print(json.dumps(sorted({name.split('.')[0] for name in set(sys.modules) - before})))\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(json.loads(ran.stdout))
    assert "loopwright" in loaded
    assert loaded - sys.stdlib_module_names <= {"loopwright", "typing_extensions"}


def test_importing_the_front_door_leaves_out_what_only_some_runs_need() -> None:
    program = "import sys, loopwright; print([name for name in sys.modules if name.startswith('loopwright.')])"
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    needed_by_some = ("inspecting", "checks", "explain", "explaining", "doctor", "callbacks.gradient_inspector")
    loaded = set(ast.literal_eval(ran.stdout))
    assert "loopwright.trainer" in loaded
    assert not {name for name in loaded if name.startswith(tuple(f"loopwright.{part}" for part in needed_by_some))}


def test_the_public_names_are_these() -> None:
    assert sorted(loopwright.__all__) == PUBLIC
    assert sorted(loopwright.callbacks.__all__) == PUBLIC_CALLBACKS


def test_the_exceptions_are_related_as_the_documentation_says() -> None:
    parents = {
        name: [base.__name__ for base in getattr(loopwright, name).__bases__] for name in PUBLIC if "Error" in name
    }
    assert parents == {
        "LoopwrightError": ["Exception"],
        "ConfigError": ["LoopwrightError", "ValueError"],
        "NonFiniteError": ["LoopwrightError", "FloatingPointError"],
        "ShapeMismatchError": ["LoopwrightError", "ValueError"],
        "UnknownMetricError": ["LoopwrightError", "KeyError"],
        "DataError": ["LoopwrightError"],
        "CheckpointError": ["LoopwrightError"],
        "SaveError": ["CheckpointError", "OSError"],
        "LockedError": ["LoopwrightError"],
    }


def test_every_public_name_is_listed_where_it_is_imported_from() -> None:
    for module in ("loopwright", "loopwright.callbacks"):
        imported = {found for found in vars(importlib.import_module(module)) if not found.startswith("_")}
        others = {name.rpartition(".")[2] for name in SOURCES} | {"TYPE_CHECKING", "Any"}
        listed = set(importlib.import_module(module).__all__)
        assert imported - others <= listed
        assert all(hasattr(importlib.import_module(module), name) for name in listed)


def docstring(module: str, name: str) -> str | None:
    """What documents a public name: a class's own docstring, or the string under the assignment of an alias."""
    value = getattr(importlib.import_module(module), name)
    if inspect.isfunction(value):
        return value.__doc__
    if inspect.isclass(value):
        text = vars(value).get("__doc__")
        return None if text is None or text.startswith(f"{name}(") else text  # dataclasses write one themselves
    for source in SOURCES.values():
        for statement, following in zip(source.body, source.body[1:], strict=False):
            target = statement.target if isinstance(statement, ast.AnnAssign) else None
            if isinstance(target, ast.Name) and target.id == name and isinstance(following, ast.Expr):
                return ast.literal_eval(following.value) if isinstance(following.value, ast.Constant) else None
    return None


@pytest.mark.parametrize(
    ("module", "name"),
    [("loopwright", name) for name in PUBLIC] + [("loopwright.callbacks", name) for name in PUBLIC_CALLBACKS],
)
def test_every_public_name_has_a_docstring(module: str, name: str) -> None:
    assert (docstring(module, name) or "").strip()
