"""Which compiler torch.compile would call, and its errors as errors for users."""

import os

import pytest
from torch._inductor.exc import CppCompileError, InductorError

from raydit.compilers import explain_failed_compilation, find_compiler, require_compiler
from raydit.errors import Failed


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """programs(NAME, ...): let these programs, and no others, be installed on this machine."""
    for name in ("CC", "CXX", "TORCH_INDUCTOR_INSTALL_GXX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def install(*names):
        for name in names:
            (tmp_path / name).touch(mode=0o755)

    return install


def test_gpus_need_a_c_compiler_and_cpus_one_for_c_plus_plus(programs, tmp_path, monkeypatch):
    programs("clang", "ccache")
    assert find_compiler(gpu=True) == os.path.join(tmp_path, "clang") and find_compiler(gpu=False) is None
    monkeypatch.setenv("CC", "/opt/none/gcc")
    monkeypatch.setenv("CXX", "ccache g++")
    assert find_compiler(gpu=True) is None and find_compiler(gpu=False) == os.path.join(tmp_path, "ccache")


def test_a_machine_without_a_compiler_is_named_with_what_to_install(programs, monkeypatch):
    monkeypatch.setattr("platform.node", lambda: "node-7")
    with pytest.raises(
        Failed, match=r"no C\+\+ compiler \(g\+\+\) on node-7, .* Install .*apt install g\+\+.* CXX; or set"
    ):
        require_compiler(gpu=False)
    with pytest.raises(Failed, match=r"no C compiler \(gcc or clang\) on node-7, .*`apt install gcc`"):
        require_compiler(gpu=True)
    monkeypatch.setenv("TORCH_INDUCTOR_INSTALL_GXX", "1")
    require_compiler(gpu=False)


def test_an_error_of_torchs_compiler_is_one_line_with_the_reason():
    output = "main.cpp:3:10: fatal error: Python.h: No such file or directory\ncompilation terminated."
    with pytest.raises(Failed) as raised, explain_failed_compilation():
        raise InductorError(CppCompileError(["g++", "main.cpp"], output), None)
    assert str(raised.value).startswith(
        "torch could not compile the network: CppCompileError: C++ compile error; main.cpp:3:10: fatal error: "
        "Python.h: No such file or directory. See whether"
    )
    with pytest.raises(RuntimeError, match=r"^connection closed$"), explain_failed_compilation():
        raise RuntimeError("connection closed")
