"""Fetches the libraries that HumanEval-X's programs use beside the standard ones: once, with network, before any code is evaluated.

    python -m data_tools.code_libraries [--out FOLDER]

JavaScript: js-md5 (npm). Go: testify, with a build cache (go). Rust: rand, regex and md5, compiled (cargo). A language whose package manager is not
installed is left out. C++ needs the headers of OpenSSL for one problem: libssl-dev of the distribution.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
from pathlib import Path

from data_tools.common import run
from mftcoder_coba.errors import UserError
from mftcoder_coba.evaluation.code import libraries_folder
from mftcoder_coba.evaluation.code.languages import GO_PACKAGES, GO_TEST, go_environment

JS_MD5 = "js-md5@0.7.3"
TESTIFY = "github.com/stretchr/testify@v1.8.1"
CRATES = {"rand": "0.4", "regex": "1", "md5": "0.7"}
# Sources that the distribution's packages bring are taken before those of the network.
GO_OF_DEBIAN = Path("/usr/share/gocode/src")  # golang-github-stretchr-testify-dev
CRATES_OF_DEBIAN = Path("/usr/share/cargo/registry")  # librust-rand-dev, librust-regex-dev, librust-md5-dev


def javascript(folder: Path) -> None:
    _call(folder, "npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), JS_MD5)


def go(folder: Path) -> None:
    """A GOPATH with testify, and a build cache in which it and the standard packages are."""
    place = folder / "go"
    (place / "use").mkdir(parents=True, exist_ok=True)
    imports = "".join(f'import _ "{name}"\n' for name in GO_PACKAGES)
    test = 'import "github.com/stretchr/testify/assert"\n\nfunc TestAll(t *testing.T) { assert.True(t, true) }\n'
    (place / "use" / "program_test.go").write_text(f'package main\n\nimport "testing"\n{imports}{test}')
    if (GO_OF_DEBIAN / "github.com/stretchr/testify").is_dir():
        shutil.copytree(GO_OF_DEBIAN, place / "src", dirs_exist_ok=True)
    else:
        (place / "use" / "go.mod").write_text("module program\n\ngo 1.18\n")
        for command in (("get", "-t", TESTIFY), ("mod", "tidy"), ("mod", "vendor")):
            _call(place / "use", "go", *command)
        shutil.copytree(place / "use" / "vendor", place / "src", dirs_exist_ok=True)
        for name in ("go.mod", "go.sum", "vendor"):
            shutil.move(place / "use" / name, place / name)
    _call(place / "use", *GO_TEST, "-o", "program", ".", **go_environment(folder))
    shutil.rmtree(place / "use")


def rust(folder: Path) -> None:
    """The crates, compiled for `rustc --extern`."""
    place = folder / "rust"
    (place / "src").mkdir(parents=True, exist_ok=True)
    (place / "src" / "lib.rs").write_text("")
    of_debian = any(CRATES_OF_DEBIAN.glob("regex-1*"))
    # Debian's rand is a newer one, with which one problem's own solution (Rust/50) does not compile.
    needs = "".join(f'{name} = "{"*" if of_debian else version}"\n' for name, version in CRATES.items())
    (place / "Cargo.toml").write_text(f'[package]\nname = "libraries"\nversion = "0.1.0"\nedition = "2018"\n\n[dependencies]\n{needs}')
    source = []
    if of_debian:
        settings = ('source.crates-io.replace-with="debian"', f'source.debian.directory="{CRATES_OF_DEBIAN}"')
        source = ["--offline", *(word for setting in settings for word in ("--config", setting))]
    _call(place, "cargo", "build", "--release", *source)
    shutil.copytree(place / "target" / "release" / "deps", place / "deps", dirs_exist_ok=True)
    shutil.rmtree(place / "target")


def _call(folder: Path, *command: str, **environment: str) -> None:
    finished = subprocess.run(command, cwd=folder, env=os.environ | environment, capture_output=True, text=True)
    if finished.returncode:
        raise UserError(f"{' '.join(command[:2])} failed: {(finished.stderr or finished.stdout).strip()[-1500:]}", str(folder))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=None, help="else where `evaluate` looks")
    folder = (parser.parse_args().out or libraries_folder(None)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for program, fetch in {"npm": javascript, "go": go, "cargo": rust}.items():
        if shutil.which(program) is None:
            print(f"{program} is not installed: left out")
            continue
        fetch(folder)
        print(f"{program}: done")
    print(folder)


if __name__ == "__main__":
    run(main)
