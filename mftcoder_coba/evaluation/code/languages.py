"""The languages of HumanEval and HumanEval-X: a problem and a completion -> a program that passes or fails.

A program passes if all its commands end with 0 and the last one prints its mark, which comes after the tests: who ends the process before them
has not passed. How the parts of a problem make a program follows the two benchmarks' own definitions.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mftcoder_coba.evaluation.code.sandbox import Command

Record = dict[str, Any]

COMPILE_SECONDS = 60
# Includes and imports that completions may expect beside those of the prompt.
CPP_HEADERS = ("stdlib.h", "algorithm", "math.h", "stdio.h", "vector", "string", "climits", "cstring", "iostream", "map", "set")
GO_PACKAGES = ("math", "strings", "fmt", "strconv", "time", "bytes", "regexp", "sort", "math/rand", "crypto/md5", "encoding/hex", "unicode")
GO_TEST = ("go", "test", "-vet=off", "-trimpath", "-c")
# What two problems include; the standard library has had it since C++17.
BOOST_ANY = "#include <any>\n#include <string>\nnamespace boost { using std::any; using std::any_cast; using std::bad_any_cast; }\n"
PYTHON_STOPS = ("\nclass ", "\ndef ", "\n#", "\nif ", "\nprint(", "\nassert ", "\n@", "\nimport ", "\nfrom ", "\n```", '\n"""')
JAVA_FLAGS = ("-XX:ActiveProcessorCount=1", "-XX:+UseSerialGC", "-Xss16m", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


@dataclass(frozen=True)
class Program:
    """Attributes:
    files: name -> text.
    mark: what the last command prints if all tests have been run and passed.
    """

    files: dict[str, str]
    commands: list[Command]
    mark: str


@dataclass(frozen=True)
class Language:
    """Attributes:
    name: as in the `task_id`s of HumanEval-X.
    programs: what has to be installed.
    libraries: a file in the folder of libraries -> what it is there for, as a person reads it.
    build: (record, completion, mark, folder of libraries) -> program.
    prompt: what a model is to continue.
    cut: a completion without what follows the function.
    """

    name: str
    programs: tuple[str, ...]
    build: Callable[[Record, str, str, Path], Program]
    cut: Callable[[str], str]
    prompt: Callable[[Record], str] = lambda record: record["prompt"]
    libraries: dict[str, str] = field(default_factory=dict)

    def missing(self, libraries: Path) -> str:
        """What is not installed, or ""."""
        lacking = [name for name in self.programs if not find_program(name)]
        return ", ".join([*lacking, *(what for name, what in self.libraries.items() if not (libraries / name).exists())])

    def visible(self, libraries: Path) -> list[str]:
        """Paths outside the system's that the programs need."""
        folders = {folder for name in self.programs if (folder := _home_of(find_program(name)))}
        return sorted({*folders, *([str(libraries.resolve())] if self.libraries else [])})


@functools.cache
def find_program(name: str) -> str:
    """The real path of a program, or ""."""
    if name == "python":
        return os.path.realpath(sys.executable)
    found = shutil.which(name)
    if found and name == "rustc":  # rustup's is a stand-in that looks for the real one in the home folder
        root = subprocess.run([found, "--print", "sysroot"], capture_output=True, text=True).stdout.strip()
        found = os.path.join(root, "bin", "rustc") if root else None
    return os.path.realpath(found) if found else ""


def _home_of(program: str) -> str:
    """The folder that an installation lies in, if that is not the system's."""
    folder = Path(sys.base_prefix) if program == find_program("python") else Path(program).parent.parent
    inside_home = Path.home().is_relative_to(folder)  # an installation that is the home folder itself would show all of it
    return "" if not program or folder.is_relative_to("/usr") or folder == Path("/") else program if inside_home else str(folder)


def _python(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    call = "" if record["task_id"].startswith("Python/") else f"\ncheck({record['entry_point']})"
    source = f"{record['prompt']}{completion}\n{record['test']}{call}\nprint({mark!r})\n"
    return Program({"program.py": source}, [Command([find_program("python"), "-I", "program.py"])], mark)


def _cpp(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    headers = "".join(f"#include <{name}>\n" for name in CPP_HEADERS)
    # Its destructor runs where main ends, and not where the process is ended.
    finished = f'#include <cstdio>\nstruct Finished {{ ~Finished() {{ std::puts("{mark}"); }} }};\n'
    test = re.sub(r"\bint\s+main\s*\([^)]*\)\s*\{", lambda found: found[0] + " Finished finished;", record["test"], count=1)
    source = f"{headers}{record['prompt']}{completion}\n{finished}{test}"
    compiler = [find_program("g++"), "-std=c++17", "-w", "-O0", "program.cpp", "-o", "program", "-I.", "-lcrypto"]
    files = {"program.cpp": source, "boost/any.hpp": BOOST_ANY}
    return Program(files, [Command(compiler, COMPILE_SECONDS, COMPILE_SECONDS), Command(["./program"])], mark)


def _java(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    runner = (
        "public class Runner { public static void main(String[] arguments) throws Exception { "
        f'Main.main(arguments); System.out.println("{mark}"); }} }}'
    )
    files = {"Main.java": f"{record['prompt']}{completion}\n{record['test']}", "Runner.java": runner}
    flags = [f"-J{flag}" for flag in JAVA_FLAGS]
    compiler = [find_program("javac"), *flags, "-J-Xmx512m", "-nowarn", "-encoding", "UTF-8", "-proc:none", "Main.java", "Runner.java"]
    return Program(
        files,
        [
            Command(compiler, COMPILE_SECONDS, COMPILE_SECONDS, None),
            Command([find_program("java"), *JAVA_FLAGS, "-Xmx1g", "-cp", ".", "Runner"], address_bytes=None),
        ],
        mark,
    )


def _javascript(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    strict = "console.assert = (holds, ...message) => { if (!holds) throw new Error(['Assertion failed', ...message].join(' ')) };\n"
    source = f"{strict}{record['prompt']}{completion}\n{record['test']}\nconsole.log({mark!r})\n"
    node = [
        "env",
        f"NODE_PATH={libraries.resolve()}/node_modules",
        find_program("node"),
        "--max-old-space-size=1024",
        "--stack-size=4000",
        "program.js",
    ]
    return Program({"program.js": source}, [Command(node, address_bytes=None)], mark)


def _go(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    header, body = record["test_setup"], record["prompt"].replace(record["import"], "") + completion + "\n" + record["test"]
    known = dict.fromkeys([*re.findall(r'"([^"]+)"', record["import"]), *GO_PACKAGES])
    code = re.sub(r"//.*", "", body)
    # Go refuses imports that are not used, so those of the prompt are taken only where the completion uses them.
    used = [name for name in known if re.search(rf"\b{name.rsplit('/', 1)[-1]}\.", code) and f'"{name}"' not in header]
    imports = "".join(f'import "{name}"\n' for name in used)
    settings = [f"{name}={value}" for name, value in go_environment(libraries).items()]
    build = ["env", *settings, find_program("go"), *GO_TEST[1:], "-o", "program", "."]
    commands = [Command(build, COMPILE_SECONDS, COMPILE_SECONDS, None), Command(["./program"], address_bytes=None)]
    return Program({"program_test.go": f"{header}\n{imports}\n{body}"}, commands, "PASS")


def go_environment(libraries: Path) -> dict[str, str]:
    """Variables of the go command: packages are in a GOPATH, already compiled, and nothing is fetched."""
    place = libraries.resolve() / "go"
    return {"GO111MODULE": "off", "GOPATH": str(place), "GOCACHE": str(place / "cache"), "GOPROXY": "off", "GOTELEMETRY": "off", "GOMAXPROCS": "2"}


def _rust(record: Record, completion: str, mark: str, libraries: Path) -> Program:
    crates = libraries.resolve() / "rust" / "deps"
    source = f"fn main() {{}}\n{_rust_prompt(record)}{completion}\n{record['test']}"
    compiler = [find_program("rustc"), "--test", "--edition=2018", "--cap-lints=allow", "-Ccodegen-units=1", "program.rs", "-o", "program"]
    for name in ("rand", "regex", "md5"):
        found = next(iter(sorted(crates.glob(f"lib{name}-*.rlib"))), None)
        compiler += [f"--extern={name}={found}"] if found else []
    compile = Command([*compiler, f"-Ldependency={crates}"], COMPILE_SECONDS, COMPILE_SECONDS, None)
    return Program({"program.rs": source}, [compile, Command(["./program", "--test-threads=1"])], "test result: ok")


def _rust_prompt(record: Record) -> str:
    return record["prompt"] + record["declaration"]


def cut_python(completion: str) -> str:
    places = [place for stop in PYTHON_STOPS if (place := completion.find(stop)) >= 0]
    return completion[: min(places)] if places else completion


def cut_braces(completion: str) -> str:
    """Up to the first brace that closes at the start of a line, which is the function's own."""
    found = re.search(r"^\}.*$", completion, re.MULTILINE)
    return completion[: found.end()] + "\n" if found else completion


def cut_java(completion: str) -> str:
    """Up to the brace that closes the method, of four blanks or fewer, and one for its class."""
    found = re.search(r"^ {0,4}\}", completion, re.MULTILINE)
    return completion[: found.end()] + "\n}\n" if found else completion


LANGUAGES = {
    language.name: language
    for language in (
        Language("Python", ("python",), _python, cut_python),
        Language("CPP", ("g++",), _cpp, cut_braces),
        Language("Java", ("java", "javac"), _java, cut_java),
        Language("JavaScript", ("node",), _javascript, cut_braces, libraries={"node_modules/js-md5": "the package js-md5"}),
        Language("Go", ("go",), _go, cut_braces, libraries={"go/cache": "the module testify"}),
        Language("Rust", ("rustc",), _rust, cut_braces, _rust_prompt, {"rust/deps": "the crates rand, regex and md5"}),
    )
}
