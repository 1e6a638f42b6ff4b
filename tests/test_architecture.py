"""The house's laws, read from the source: who imports whom, what stays free of JAX, and how large a file may be."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jaxserve", "pallas_kernels", "api")
MAX_LINES = 300
MAX_KERNEL_LINES = 450

# Anyone may import these; they import nothing of jaxserve but each other.
VOCABULARY = (
    "jaxserve.checkpoint_values",
    "jaxserve.config",
    "jaxserve.config_deploy",
    "jaxserve.config_file",
    "jaxserve.config_parallel",
    "jaxserve.config_paths",
    "jaxserve.config_speculative",
    "jaxserve.config_values",
    "jaxserve.errors",
    "jaxserve.nesting",
    "jaxserve.outputs",
    "jaxserve.request",
    "jaxserve.sampling_params",
    "jaxserve.structured_outputs",
)

# Package or module -> what of this project it may import, beside itself and the vocabulary. The longest name that
# fits a module rules it. A package stands for everything in it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "jaxserve": (),  # the package's own module: lazy names alone
    **dict.fromkeys(VOCABULARY, ()),
    "jaxserve.__main__": ("jaxserve.cli.main",),
    "jaxserve.cli": PACKAGES,
    "jaxserve.bench": PACKAGES,
    "jaxserve.plan": (
        "jaxserve.engine",
        "jaxserve.runner",
        "jaxserve.models",
        "jaxserve.scheduler",
        "jaxserve.cache",
        "jaxserve.parallel",
        "jaxserve.weights",
        "pallas_kernels",
    ),
    "jaxserve.plan.environment": (),
    "jaxserve.llm": ("jaxserve.engine", "jaxserve.tokenizer"),
    "jaxserve.metrics": ("jaxserve.engine.core_facts",),
    "jaxserve.deploy": (
        "api",
        "jaxserve.engine",
        "jaxserve.cache.prefix_cache",
        "jaxserve.tokenizer",
        "jaxserve.metrics",
    ),
    "jaxserve.deploy.prefix_index": ("jaxserve.cache.prefix_cache",),
    "api": ("jaxserve.engine.client", "jaxserve.metrics", "jaxserve.tokenizer"),
    "jaxserve.engine": (
        "jaxserve.scheduler",
        "jaxserve.cache",
        "jaxserve.runner",
        "jaxserve.speculative",
        "jaxserve.structured",
        "jaxserve.layers",
        "jaxserve.parallel",
        "jaxserve.weights",
        "jaxserve.tokenizer",
        "jaxserve.metrics",
    ),
    "jaxserve.speculative": ("jaxserve.scheduler.draft_planner",),
    "jaxserve.scheduler": ("jaxserve.cache.block_pool", "jaxserve.cache.prefix_cache"),
    "jaxserve.scheduler.plan": (),
    "jaxserve.cache": ("jaxserve.parallel", "pallas_kernels"),
    "jaxserve.cache.block_pool": (),
    "jaxserve.cache.prefix_cache": ("jaxserve.cache.block_pool",),
    "jaxserve.runner": (
        "jaxserve.models",
        "jaxserve.layers",
        "jaxserve.weights",
        "jaxserve.cache.kv_cache",
        "jaxserve.sampling",
        "jaxserve.structured",
        "jaxserve.parallel",
        "jaxserve.scheduler.plan",
        "pallas_kernels",
    ),
    "jaxserve.models": ("jaxserve.layers", "jaxserve.cache.kv_cache"),
    "jaxserve.layers": ("jaxserve.cache.kv_cache", "jaxserve.parallel", "pallas_kernels"),
    "jaxserve.weights": ("jaxserve.models.base", "jaxserve.parallel"),
    "jaxserve.sampling": ("jaxserve.parallel",),
    "jaxserve.structured": ("jaxserve.tokenizer",),
    "jaxserve.parallel": (),
    "jaxserve.tokenizer": ("jaxserve.weights",),
    "pallas_kernels": (),
}

# Importing these must bring in neither JAX nor NumPy: they run where a step is planned, and where flags are read.
FREE_OF_JAX = (
    *VOCABULARY,
    "jaxserve",
    "jaxserve.scheduler",
    "jaxserve.cache.block_pool",
    "jaxserve.cache.prefix_cache",
    "jaxserve.deploy.prefix_index",
    "jaxserve.cli.main",
)

# What only an extra brings, and who may import it.
OPTIONAL = {"ray": ("jaxserve.deploy", "jaxserve.cli.deploy")}

# Modules whose package goes by another name.
PACKAGE_OF = {"yaml": "pyyaml", "zmq": "pyzmq", "pydantic_core": "pydantic"}

FORBIDDEN_FILE_NAMES = {"utils.py", "helpers.py", "common.py", "misc.py"}
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "shelve"}


def source_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in source_files()}


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def imports_of(path: Path) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a file imports, inside functions and for types alone included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            base = node.module or ""
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in MODULES else base


def rule_of(module: str) -> str:
    return max((name for name in MAY_IMPORT if is_within(module, name)), key=len)


def may_import(module: str, imported: str) -> bool:
    rule = rule_of(module)
    allowed = {rule, *MAY_IMPORT[rule]} | (set() if rule == "pallas_kernels" else {*VOCABULARY})
    return imported == "jaxserve" or any(is_within(imported, name) for name in allowed)


def test_every_module_imports_only_what_its_room_may_know():
    offences = [
        f"{path.relative_to(ROOT)}:{line}: {module} must not import {imported}"
        for module, path in MODULES.items()
        if module != "jaxserve"
        for line, imported in imports_of(path)
        if imported.split(".")[0] in PACKAGES and not may_import(module, imported)
    ]
    assert offences == []


def test_every_module_has_a_rule_of_its_own():
    without = [module for module in MODULES if module != "jaxserve" and rule_of(module) == "jaxserve"]
    assert without == []


def test_the_pure_modules_import_neither_jax_nor_numpy():
    modules = [
        module for module in MODULES if any(is_within(module, free) for free in FREE_OF_JAX if free != "jaxserve")
    ]
    code = f"""
import importlib, sys
import jaxserve
for name in {modules!r}:
    importlib.import_module(name)
    heavy = sorted({{"jax", "jaxlib", "numpy", "flax"}} & sys.modules.keys())
    assert not heavy, f"{{name}} imports {{heavy}}"
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr.splitlines()[-1:]


@pytest.mark.parametrize("package", [*PACKAGES, "tests"])
def test_no_file_outgrows_its_budget(package):
    limit = MAX_KERNEL_LINES if package == "pallas_kernels" else MAX_LINES
    sizes = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / package).rglob("*.py")}
    too_long = {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > limit}
    assert too_long == {}


def test_files_are_named_for_their_subject():
    assert [str(path) for path in source_files() if path.name in FORBIDDEN_FILE_NAMES] == []


def test_every_file_says_in_its_first_line_what_it_holds():
    silent = [
        str(path.relative_to(ROOT))
        for path in source_files()
        if (source := path.read_text(encoding="utf-8")) and ast.get_docstring(ast.parse(source)) is None
    ]
    assert silent == []


def test_nothing_is_pickled():
    offences = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in source_files()
        for line, imported in imports_of(path)
        if imported.split(".")[0] in FORBIDDEN_MODULES
    ]
    assert offences == []


def test_three_names_are_installed_and_no_more():
    installed = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert installed - {"tests"} == set(PACKAGES)


def test_every_imported_package_is_a_declared_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {re.split(r"[^\w-]", entry)[0].lower().replace("-", "_") for entry in project["dependencies"]}
    imported = {
        PACKAGE_OF.get(name.split(".")[0], name.split(".")[0])
        for module, path in MODULES.items()
        for _, name in imports_of(path)
        if not any(is_within(module, user) for user in OPTIONAL.get(name.split(".")[0], ()))
    }
    assert imported - set(sys.stdlib_module_names) - set(PACKAGES) - declared == set()
    assert OPTIONAL.keys() <= project["optional-dependencies"].keys()
