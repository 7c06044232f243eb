"""The compilers that torch.compile calls, without which a recipe with compile = true cannot run."""

import os
import platform
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from raydit.errors import Failed


def compiler_commands(gpu: bool) -> list[str]:
    """Return the commands of which torch.compile needs one: Triton a C compiler for GPUs, Inductor a C++ compiler."""
    if gpu:
        return [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    return [os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")]


def find_compiler(gpu: bool) -> str | None:
    """Return the path of the compiler that torch.compile calls on this machine; None if there is none."""
    programs = [(shlex.split(command) or [""])[0] for command in compiler_commands(gpu)]  # CXX may be "ccache g++"
    return next((path for program in programs if (path := shutil.which(program))), None)


def lacks_compiler(gpu: bool) -> bool:
    """Return whether this machine has no compiler for torch.compile."""
    return find_compiler(gpu) is None and not os.environ.get("TORCH_INDUCTOR_INSTALL_GXX")  # torch then installs one


def require_compiler(gpu: bool) -> None:
    """Raise Failed if this machine has no compiler for torch.compile. gpu: whether what is compiled runs on one."""
    if lacks_compiler(gpu):
        raise no_compiler(gpu, platform.node())


def no_compiler(gpu: bool, nodes: str) -> Failed:
    """Return the error for machines without a compiler. nodes: their names."""
    language, variable, package = ("C", "CC", "gcc") if gpu else ("C++", "CXX", "g++")
    return Failed(
        f"compile = true, and no {language} compiler ({' or '.join(compiler_commands(gpu))}) on {nodes}",
        "one on every machine where workers run",
        f"install one there (`apt install {package}`) or name it in {variable}; or set compile = false",
    )


@contextmanager
def explain_failed_compilation() -> Iterator[None]:
    """Replace the errors of torch's compiler, which would recur in every attempt, by Failed.

    They are RuntimeErrors, as that of a worker that lost its peer is.
    """
    try:
        yield
    except RuntimeError as error:
        if not type(error).__module__.startswith(("torch._dynamo.", "torch._inductor.")):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if re.search(r"\berror: ", line)), "")  # of the C++ compiler
        raise Failed(
            "; ".join(filter(None, [f"torch could not compile the network: {lines[0]}", reason])),
            "",
            "see whether the compiler and Python's header files are installed completely, or set compile = false",
        ) from error
