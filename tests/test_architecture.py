"""Who may know whom, read from the syntax trees: floors, doors of third parties, and habits that are not let in."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tdq_exp.commands import VERBS

PACKAGE = Path(__file__).resolve().parents[1] / "tdq_exp"
NAME = PACKAGE.name
MODULES = {
    ".".join([NAME, *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(
        ".__init__"
    ): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
TREES = {name: ast.parse(path.read_text(), str(path)) for name, path in MODULES.items()}

# A folder (or module) of the top level, and its floor. Nothing imports from a higher one.
FLOORS = {
    "quant": 0, "diffusion": 0,
    "runtime": 0, "config": 0,  # what is about the machine and the configuration: any floor may use it
    "models": 1, "data": 1, "metrics": 1, "deploy": 1,
    "fit": 2,
    "experiment": 3, "report": 4, "analysis": 4,
    # The root of the configuration is made of what the components declare.
    "config.schema": 3, "config.groups": 3, "config.compose": 3, "config.naming": 3, "config.experiments": 3,
    "commands": 5,
    "run": 6, "__init__": 6, "__main__": 6,
}  # fmt: skip
MACHINE = {"runtime", "config"}

# Attributes of diffusers' modules, which `models` alone may know.
OF_DIFFUSERS = {
    "to_q", "to_k", "to_v", "group_norm", "nonlinearity", "time_embedding_norm", "conv_act", "processor",
}  # fmt: skip

# Who may import a third party: folders or modules, from the package's root.
DOORS = {
    "diffusers": {"models"},
    "torch_fidelity": {"metrics"},
    "wandb": {"runtime.tracking"},
    "accelerate": {"runtime.processes"},
    "datasets": {"data.tables"},
    "lmdb": {"data.lsun"},
    "matplotlib": {"runtime.figures", "report.axes", "report.charts", "report.drawings"},
    "rich": {"runtime.progress"},
    "onnx": {"deploy.onnx", "metrics.lite_runtime"},
    "triton": {"quant.kernels.triton", "quant.kernels.triton_integer"},
    "onnxruntime": {"deploy.onnx", "commands.export", "metrics.lite_runtime"},
    "hydra": {
        "config.compose",
        "config.experiments",
        "experiment.build",
        "experiment.nodes",
        "run",
    },
    "omegaconf": {
        "config.assets",
        "config.compose",
        "config.experiments",
        "config.naming",
        "config.schema",
        "config.setting",
        "experiment.adapt",
        "experiment.build",
        "experiment.nodes",
        "run",
    },
}


# Who may read a file by these: everybody else goes through the doors, which verify checksums.
READERS = {
    "json.load": set(),
    "np.load": {"data.arrays", "data.given"},  # and what strangers give to be measured
    "np.fromfile": set(),
    "np.memmap": set(),
    "torch.load": {"runtime.tensor_files"},
    "torch.save": {"runtime.tensor_files", "metrics.features"},  # the latter into memory
    "safe_open": {"runtime.tensor_files"},
    "load_file": set(),
    "save_file": set(),
    "pickle.load": set(),
    "json.loads": {
        "runtime.files",
        "runtime.lock",  # who holds a lock
        "runtime.stage",  # of what it has just dumped, as `report.compared`
        "report.compared",
        "models.unet_arguments",  # of a network's own config
        "deploy.packed",  # of a header whose checksum is verified
        "models.weights.folder",  # the config of a diffusers folder
        "models.weights.process",  # and of its scheduler
    },
}

# Ceilings that only fall: where there is less than one allows, lower it.
WIDE_LINES = 0  # lines of more than 100 columns
CROWDED: set[str] = set()  # functions of more than 8 parameters


def place(module: str) -> str:
    """`tdq_exp.quant.ops` -> `quant`; the package itself -> `__init__`."""
    parts = module.split(".")
    if ".".join(parts[1:]) in FLOORS:
        return ".".join(parts[1:])
    return parts[1] if len(parts) > 1 else "__init__"


def imports(module: str, as_program: bool = True) -> list[tuple[int, str]]:
    """(line, what) of every import in a module, wherever it stands; own modules by their full name.

    Args:
        module: its full name.
        as_program: those under `if __name__ == "__main__"` too?
    """
    found = []
    for node in ast.walk(TREES[module]):
        if not as_program and node in program_only(TREES[module]):
            continue
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                is_package = MODULES[module].name == "__init__.py"
                base = module.split(".")[: len(module.split(".")) - node.level + is_package]
                source = ".".join([*base, *([source] if source else [])])
            for alias in node.names:
                whole = f"{source}.{alias.name}"
                found.append((node.lineno, whole if whole in MODULES else source))
    return found


def program_only(tree: ast.Module) -> set[ast.AST]:
    """What runs only if the module is the program."""
    guards = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test)
    ]
    return {part for guard in guards for part in ast.walk(guard)}


def third_parties(module: str) -> list[tuple[int, str]]:
    """(line, top-level package) of every import that is neither ours nor the standard library's."""
    tops = [(line, name.split(".")[0]) for line, name in imports(module)]
    return [(line, top) for line, top in tops if top != NAME and top not in sys.stdlib_module_names]


def own(module: str, as_program: bool = True) -> list[tuple[int, str]]:
    """(line, module) of every import of ours."""
    return [
        (line, name) for line, name in imports(module, as_program) if name.split(".")[0] == NAME
    ]


def docstrings(tree: ast.AST) -> set[ast.AST]:
    """The constants that only document."""
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def documented() -> Iterable[tuple[str, ast.AST, str]]:
    """Yield (place, definition, docstring) of all of the package, without the indent of the code."""
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node, clean=False)
                if text:
                    statement = node.body[0]
                    indent = " " * statement.col_offset
                    lines = [line.removeprefix(indent) for line in text.splitlines()]
                    yield f"{module}:{statement.lineno}", node, "\n".join(lines)


def none(violations: Iterable[str]) -> None:
    """Fails, with the list."""
    found = list(violations)
    assert not found, "\n" + "\n".join(found)


def test_the_package_is_found():
    assert {
        f"{NAME}.quant.ops",
        f"{NAME}.diffusion.ddim",
        f"{NAME}.models.pixel",
        f"{NAME}.run",
        NAME,
    } <= set(MODULES)


def test_every_module_has_a_floor():
    none(
        [
            f"{module}: give {place(module)} a floor"
            for module in MODULES
            if place(module) not in FLOORS
        ]
    )


@pytest.mark.parametrize("floor", ["quant", "diffusion"])
def test_the_ground_floor_knows_torch_and_itself_alone(floor):
    violations = []
    for module in MODULES:
        if place(module) == floor:
            # Triton comes with torch; who may import it is a door's business.
            violations += [
                f"{module}:{line} imports {top}"
                for line, top in third_parties(module)
                if top not in ("torch", "triton")
            ]
            violations += [
                f"{module}:{line} imports {name}"
                for line, name in own(module)
                if place(name) not in {floor, *MACHINE}
            ]
    none(violations)


def test_modules_about_the_machine_know_nothing_of_the_method():
    none(
        f"{module}:{line} imports {name}"
        for module in MODULES if place(module) in MACHINE
        for line, name in own(module) if place(name) not in MACHINE
    )  # fmt: skip


def test_nothing_imports_upward():
    none(
        [
            f"{module}:{line} (floor {FLOORS[place(module)]}) imports {name} (floor {FLOORS[place(name)]})"
            for module in MODULES
            for line, name in own(module)
            if FLOORS[place(name)] > FLOORS[place(module)]
        ]
    )


def test_no_module_imports_itself_by_a_detour():
    edges = {
        module: {name for _, name in own(module, as_program=False)} - {module} for module in MODULES
    }
    for start in MODULES:
        reached, todo = set(), [start]
        while todo:
            for name in edges.get(todo.pop(), ()):
                if name == start:
                    pytest.fail(f"{start} is part of a circle of imports")
                if name not in reached:
                    reached.add(name)
                    todo.append(name)


@pytest.mark.parametrize("party", DOORS)
def test_a_third_party_enters_by_one_door(party):
    users = {
        (module, line) for module in MODULES for line, top in third_parties(module) if top == party
    }
    doors = tuple(f"{NAME}.{door}" for door in DOORS[party])
    none(
        f"{module}:{line} imports {party}"
        for module, line in sorted(users)
        if not any(module == door or module.startswith(door + ".") for door in doors)
    )
    # The rule is about something: a door that nobody uses any more should leave the list.
    assert users, f"nobody imports {party}"


def test_attributes_of_diffusers_are_known_to_the_models_alone():
    violations = []
    for module, tree in TREES.items():
        if place(module) == "models":
            continue
        documents = docstrings(tree)
        for node in ast.walk(tree):
            named = ""
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("F", "platform"):
                named = node.attr
            elif (
                isinstance(node, ast.Constant)
                and isinstance(node.value, str)
                and node not in documents
            ):
                named = node.value.rpartition(".")[2]  # in getattr, or as part of a module's name
            if named in OF_DIFFUSERS:
                violations.append(f"{module}:{node.lineno} {named}")
    none(violations)


def test_no_environment_variable_steers_anything():
    violations = []
    for module, tree in TREES.items():
        allowed = set()
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Call) and ast.unparse(node.func) in (
                "os.environ.get",
                "os.getenv",
            )
            named = (
                reads
                and isinstance(node.args[0], ast.Constant)
                and node.args[0].value == "XDG_CACHE_HOME"
            )
            if named and module == f"{NAME}.data.images":
                allowed |= set(ast.walk(node.func))
        for node in ast.walk(tree):
            attribute = isinstance(node, ast.Attribute) and node.attr in (
                "environ",
                "getenv",
                "putenv",
                "environb",
            )
            imported = isinstance(node, ast.ImportFrom) and node.module == "os"
            imported = imported and any(
                alias.name in ("environ", "getenv", "putenv") for alias in node.names
            )
            if (attribute or imported) and node not in allowed:
                violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    none(violations)


def test_nothing_is_loaded_loosely():
    violations = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("load_state_dict"):
                strict = [word.value for word in node.keywords if word.arg == "strict"] + node.args[
                    1:2
                ]
                if any(
                    not (isinstance(value, ast.Constant) and value.value is True)
                    for value in strict
                ):
                    violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    none(violations)


@pytest.mark.parametrize("reader", READERS)
def test_files_are_read_and_written_through_the_doors_that_check_them(reader):
    none(
        f"{module}:{node.lineno} {ast.unparse(node.func)}"
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and (ast.unparse(node.func) == reader or ast.unparse(node.func).endswith(f".{reader}"))
        and module.removeprefix(f"{NAME}.") not in READERS[reader]
    )


def test_no_device_is_named():
    violations = []
    for module, tree in TREES.items():
        if module == f"{NAME}.runtime.processes" or place(module) == "run":
            continue
        documents = docstrings(tree)
        for node in ast.walk(tree):
            text = (
                node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            )
            if node not in documents and re.fullmatch(r"cuda(:\d*)?", text.strip().lower()):
                violations.append(f"{module}:{node.lineno} {text!r}")
            if (
                isinstance(node, ast.Attribute)
                and node.attr == "cuda"
                and isinstance(node.value, ast.Name | ast.Call)
            ):
                if isinstance(node.value, ast.Name) and node.value.id == "torch":
                    continue  # torch.cuda asks; `.cuda()` moves
                violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    none(violations)


def test_whoever_may_compute_on_a_gpu_says_at_which_precision():
    """Left alone, torch rounds the operands of convolutions to TF32 there: other images."""
    silent = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Processes":
                on_cpu = any(ast.unparse(keyword) == "cpu=True" for keyword in node.keywords)
                known = ("tdq_exp.runtime.precision", "tdq_exp.runtime.precision.products")
                if not on_cpu and not any(what in known for _, what in imports(module)):
                    silent.append(f"{MODULES[module]}:{node.lineno}")
    assert silent == []


def test_no_module_is_called_utils():
    bad = {"util", "utils", "common", "helper", "helpers", "misc"}
    none([name for name in MODULES if bad & set(name.split("."))])
    none([str(path) for path in PACKAGE.rglob("*") if path.is_dir() and path.name in bad])


def test_no_two_modules_have_one_name():
    # Options lie beside what they are for, and quantized layers have a form in torch and one in ONNX.
    names = [
        module.rpartition(".")[2] for module, path in MODULES.items() if path.stem != "__init__"
    ]
    twice = {name for name in names if names.count(name) > 1}
    none(twice - {"options", "layers"})


def test_no_file_is_longer_than_400_lines():
    lengths = {module: len(path.read_text().splitlines()) for module, path in MODULES.items()}
    none([f"{module}: {length} lines" for module, length in lengths.items() if length > 400])


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Return the number of a function's named parameters, `self` and `cls` left out."""
    arguments = function.args
    names = [
        argument.arg
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)
    ]
    return len([name for name in names if name not in ("self", "cls")])


def test_no_function_has_more_than_8_parameters():
    crowded = {
        f"{module}.{function.name}": parameters(function)
        for module, tree in TREES.items()
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        and parameters(function) > 8
        # The arguments of a kernel, and of the autograd function that calls it, are what it computes with.
        and not module.startswith((f"{NAME}.quant.kernels", f"{NAME}.quant.ops"))
    }
    none(f"{name}: {count} parameters" for name, count in crowded.items() if name not in CROWDED)


def test_lines_end_before_column_100():
    wide = [
        f"{module}:{number} has {len(line)} columns"
        for module, path in MODULES.items()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > 100
    ]
    none(wide if len(wide) > WIDE_LINES else [])


# Headings of a docstring under which lines are indented.
SECTIONS = ("Args:", "Returns:", "Raises:", "Yields:", "References:")


def broken_sentences(text: str) -> list[str]:
    """Return the lines of a docstring that are indented deeper than the sentence they belong to.

    A line may be indented deeper than the one before it in a section, in a list, in code or a table
    that is indented as a whole, or where a heading that ends in a colon comes before it.
    """
    lines = text.splitlines()
    broken, section = [], False
    for before, line in zip(lines, lines[1:], strict=False):
        if line and not line.startswith(" "):
            section = line in SECTIONS

        indented = before.startswith(" ")
        deeper = len(line) - len(line.lstrip()) > len(before) - len(before.lstrip())
        listed = re.match(r"\s*(-|\d+\.) ", before)
        headed = before.endswith(":") or not before.strip()
        if deeper and not (indented or section or listed or headed):
            broken.append(line)
    return broken


def test_a_sentence_that_a_formatter_has_broken_is_found():
    assert broken_sentences("It is what a formatter does with\n    long\nlines.") == ["    long"]
    assert broken_sentences("Args:\n    x: what is\n        given.\n\n- an\n  item") == []


def test_the_sentences_of_docstrings_keep_their_indent():
    none(f"{at}: {line}" for at, _, text in documented() for line in broken_sentences(text))


# First words that are no verb in the imperative, beside those that end in "s" (Writes, Codes).
NO_VERBS = {
    "A", "All", "An", "Both", "From", "How", "In", "Number", "Nothing", "Of", "One", "Range", "See",
    "The", "What", "When", "Where", "Whether", "Which", "Who", "Why",
}  # fmt: skip
VERBS_IN_S = {"Discuss", "Express", "Guess", "Pass", "Press", "Process"}


def opens_with_a_verb(text: str) -> bool:
    """Return whether a docstring opens with a verb in the imperative, as far as that shows."""
    words = text.split("\n\n")[0].split()
    first = words[0].rstrip(",")
    is_word = re.fullmatch("[A-Z][a-z]+", first) is not None
    noun_or_third_person = first.endswith("s") and first not in VERBS_IN_S
    question = words[-1].endswith("?")
    return (
        is_word and len(words) > 1 and not (question or noun_or_third_person or first in NO_VERBS)
    )


def test_a_docstring_that_opens_without_a_verb_is_found():
    bad = (
        "Is it whole?", "Args:\n    x: it.", "Of s and of z.", "See `forward`.", "T.", "x_hat.",
        "Codes of x.", "Writes a file.", "The hash.", "Return.", "`[B, C]`.", "(s, z) at t.",
    )  # fmt: skip
    assert [text for text in bad if opens_with_a_verb(text)] == []
    assert opens_with_a_verb("Return x_hat.")


def test_docstrings_of_functions_open_with_a_verb():
    violations = []
    for at, node, text in documented():
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            is_property = any(name.endswith("property") for name in decorators)
            if not is_property and not opens_with_a_verb(text):
                violations.append(f"{at} {node.name}: {text.splitlines()[0]}")
    none(violations)


def test_docstrings_are_no_questions_and_open_with_a_summary():
    none(
        f"{at}: {text.splitlines()[0]}"
        for at, _, text in documented()
        if text.splitlines()[0].endswith("?") or text.startswith(SECTIONS) or len(text.split()) < 2
    )


def test_every_command_has_a_console_script():
    scripts = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {
        "tdq-exp" if verb == "run" else f"tdq-exp-{verb}": f"{module}:main"
        for verb, (module, _) in VERBS.items()
    }


def test_nothing_calls_the_network_with_a_counter():
    # State that moves in `forward` would be a hidden clock.
    violations = []
    for module, tree in TREES.items():
        for function in ast.walk(tree):
            if isinstance(function, ast.FunctionDef) and function.name == "forward":
                for node in ast.walk(function):
                    target = node.target if isinstance(node, ast.AugAssign) else None
                    if isinstance(target, ast.Attribute) and ast.unparse(target).startswith(
                        "self."
                    ):
                        violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
                    if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(
                        ("nn.Parameter", "register_parameter")
                    ):
                        violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    none(violations)


def test_nothing_compares_the_kind_of_a_fit():
    # Its class knows: `options.quantizes`, `options.needs_weights`, ... One registry reads the name.
    violations = []
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
            sides += [node.subject] if isinstance(node, ast.Match) else []
            if any(
                ast.unparse(side).endswith(("fit.kind", "fit.part", "['fit']['kind']"))
                for side in sides
            ):
                violations.append(f"{module}:{node.lineno} {ast.unparse(node)}")
    none(violations)


def test_options_are_read_without_torch():
    command = (
        "import sys; from tdq_exp.config import compose, schema; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", command], check=True, cwd=PACKAGE.parent)
