"""Finding a server, naming launches, ports and the log: what needs no server to run."""

import importlib.metadata
import os
import re
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from charonia.entrypoints import triton_binary
from charonia.entrypoints.launch_error import LaunchError
from charonia.entrypoints.ports import PortUse, check_ports, connect_address, connect_host, http_status
from charonia.entrypoints.processes import (
    LAUNCH_MARK,
    LaunchToken,
    launch_folder,
    marked_processes,
    process_start_time,
    remove_launch,
    remove_leftovers,
)
from charonia.entrypoints.server_log import ServerLog
from charonia.entrypoints.spawn import spawn_tied
from charonia.entrypoints.triton_binary import TritonBinary, find_server
from support.launch import eventually, free_ports, is_running


def make_executable(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n")
    path.chmod(0o755)
    return path


def make_wheel(root: Path, *versions: str) -> TritonBinary:
    home = root / "pytriton" / "tritonserver"
    binary = make_executable(home / "bin" / "tritonserver")
    for name in ("libtriton_python.so", "triton_python_backend_utils.py"):
        make_executable(home / "backends" / "python" / name)
    for version in versions:
        make_executable(home / "python_backend_stubs" / version / "triton_python_backend_stub")
    return find_server(binary)


class TestFindServer:
    def test_path_given_wins(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        on_path = make_executable(tmp_path / "path" / "tritonserver")
        monkeypatch.setenv("PATH", str(on_path.parent))
        binary = make_executable(tmp_path / "opt" / "bin" / "tritonserver")
        assert find_server(binary) == find_server(tmp_path / "opt") == TritonBinary(binary)
        assert find_server() == TritonBinary(on_path)

    def test_wheel_is_last(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        found = find_server()
        assert found.wheel_root is not None
        assert found.path == found.wheel_root / "bin" / "tritonserver"

    def test_none(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setattr(triton_binary.importlib.util, "find_spec", lambda name: None)
        with pytest.raises(
            LaunchError, match=r"no Triton server found.*\n.*pip install 'charonia\[server\]'"
        ):
            find_server()
        with pytest.raises(LaunchError, match=r"--server .*nowhere: no executable"):
            find_server(tmp_path / "nowhere")

    def test_wheel_gets_this_pythons_stub_and_path(self, tmp_path: Path) -> None:
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        server = make_wheel(tmp_path, version, "3.8")
        arguments = server.prepare(tmp_path / "run")
        home = tmp_path / "run" / "backends" / "python"
        assert f"--backend-directory={home.parent}" in arguments
        stub = (home / "triton_python_backend_stub").resolve()
        assert stub.parent.name == version
        assert len(list(home.iterdir())) == 3
        environment = server.environment({"PATH": "/bin", "LD_LIBRARY_PATH": "/mine", "KEPT": "1"})
        assert environment["PATH"].split(":") == [str(Path(sys.executable).parent), "/bin"]
        libraries = environment["LD_LIBRARY_PATH"].split(":")
        assert libraries[0] == str(tmp_path / "nvidia_pytriton.libs")
        assert libraries[-1] == "/mine"
        assert environment["KEPT"] == "1"

    def test_wheel_without_stub_for_this_python(self, tmp_path: Path) -> None:
        with pytest.raises(LaunchError, match=r"it serves 3.8"):
            make_wheel(tmp_path, "3.8").prepare(tmp_path / "run")

    def test_numpy_2_is_refused_for_the_wheel_only(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(importlib.metadata, "version", lambda name: {"numpy": "2.1.0"}[name])
        with pytest.raises(LaunchError, match=r"numpy 2\.1\.0 is installed.*\n.*pip install 'numpy<2'"):
            make_wheel(tmp_path, "3.11", "3.12").prepare(tmp_path / "run")
        full = find_server(make_executable(tmp_path / "opt" / "bin" / "tritonserver"))
        assert full.prepare(tmp_path / "run") == []


class TestLaunchToken:
    def test_round_trip_inside_names(self) -> None:
        token = LaunchToken.fresh()
        assert LaunchToken.parse(f"{token.shm_prefix}0a1b") == LaunchToken.parse(str(token)) == token
        assert LaunchToken.fresh() != token
        assert LaunchToken.parse("charonia_1_2") is LaunchToken.parse("probe_1") is None

    def test_orphans(self) -> None:
        token = LaunchToken.fresh()
        ended = subprocess.Popen([sys.executable, "-c", ""])
        ended.wait()
        assert not token.is_orphaned()
        assert LaunchToken(token.uid, token.pid_namespace, ended.pid, 1, 1).is_orphaned()
        # The pid lives, but it is another process than the launcher was.
        assert LaunchToken(token.uid, token.pid_namespace, token.pid, token.start_time - 1, 1).is_orphaned()
        # Other users' and other containers' are not for us to judge.
        assert not LaunchToken(token.uid + 1, token.pid_namespace, ended.pid, 1, 1).is_orphaned()
        assert not LaunchToken(token.uid, token.pid_namespace + 1, ended.pid, 1, 1).is_orphaned()

    def test_only_the_launch_itself_is_removed(self) -> None:
        ours, other = LaunchToken.fresh(), LaunchToken.fresh()
        children = {token: sleeper(token) for token in (ours, other)}
        regions = {token: Path("/dev/shm", f"{token.shm_prefix}region") for token in (ours, other)}
        try:
            for region in regions.values():
                region.touch()
            assert set(marked_processes(lambda token: token == ours)) == {children[ours].pid}
            (line,) = remove_launch(ours)
            assert re.search(rf"process {children[ours].pid} \(.*python", line)
            assert children[ours].wait(5) == -9
            assert children[other].poll() is None
            assert not regions[ours].exists()
            assert regions[other].exists()
        finally:
            for token, child in children.items():
                child.kill()
                child.wait()
                regions[token].unlink(missing_ok=True)

    def test_leftovers_of_a_dead_launcher(self) -> None:
        token = LaunchToken.fresh()
        dead = LaunchToken(token.uid, token.pid_namespace, token.pid, token.start_time - 1, 7)
        child = sleeper(dead)
        region, folder = Path("/dev/shm", f"{dead.shm_prefix}region"), launch_folder(dead, "server")
        region.touch()
        (folder / "backends").mkdir(parents=True)
        assert folder.parent == Path(tempfile.gettempdir()) or len(tempfile.gettempdir()) > len("/var/tmp")
        remove_leftovers()
        assert child.wait(5) == -9
        assert not region.exists()
        assert not folder.exists()


def sleeper(token: LaunchToken) -> "subprocess.Popen[bytes]":
    """A process that is marked as part of a launch."""
    child = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"], env={**os.environ, LAUNCH_MARK: str(token)}
    )
    assert eventually(lambda: child.pid in marked_processes(lambda other: other == token))
    return child


def test_zombies_do_not_run() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    assert eventually(lambda: not is_running(child.pid))
    assert process_start_time(child.pid) is None
    child.wait()


class TestPorts:
    def test_taken_port_names_holder_and_flag(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as holder:
            port = holder.getsockname()[1]
            with pytest.raises(LaunchError) as caught:
                check_ports("127.0.0.1", [PortUse("gRPC", port, "--grpc-port")])
        assert f"gRPC port {port} on 127.0.0.1 is taken by process {os.getpid()}" in caught.value.cause
        assert "--grpc-port" in caught.value.mend
        check_ports("127.0.0.1", [PortUse("gRPC", port, "--grpc-port")])

    def test_lingering_connections_do_not_count(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            with socket.create_connection(("127.0.0.1", port)) as client:
                accepted, _ = server.accept()
                accepted.close()  # closed on the server's side first: TIME_WAIT holds the server's port
                assert client.recv(1) == b""
        check_ports("127.0.0.1", [PortUse("HTTP", port, "--http-port")])

    def test_same_or_impossible_ports(self) -> None:
        (port,) = free_ports(1)
        uses = [PortUse("HTTP", port, "--http-port"), PortUse("gRPC", port, "--grpc-port")]
        with pytest.raises(LaunchError, match="--http-port and --grpc-port both ask"):
            check_ports("127.0.0.1", uses)
        with pytest.raises(LaunchError, match="--http-port must be between"):
            check_ports("127.0.0.1", [PortUse("HTTP", 65536, "--http-port")])
        with pytest.raises(LaunchError, match=r"--host 192.0.2.1"):
            check_ports("192.0.2.1", [PortUse("HTTP", port, "--http-port")])

    def test_probe(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as silent:
            assert http_status("127.0.0.1", silent.getsockname()[1], "/", timeout_s=0.1) is None
        (port,) = free_ports(1)
        assert http_status("0.0.0.0", port, "/", timeout_s=1) is None
        assert connect_host("0.0.0.0") == "127.0.0.1"
        assert connect_host("10.1.2.3") == "10.1.2.3"
        assert [connect_address(host, 1) for host in ("::", "fe80::2", "0.0.0.0", "box")] == [
            "[::1]:1", "[fe80::2]:1", "127.0.0.1:1", "box:1",
        ]  # fmt: skip


@pytest.mark.parametrize("path", ["nowhere/log", "."])
def test_a_log_that_cannot_be_written_is_told_as_such(tmp_path: Path, path: str) -> None:
    with pytest.raises(LaunchError, match=r"^cannot write the log .*: (No such file|Is a directory)"):
        spawn_tied([sys.executable, "-c", ""], os.environ, tmp_path / path)


class TestServerLog:
    LOAD = (
        'E1122 18:54:57.782832 22770 server.cc:241] "CudaDriverHelper has not been initialized."\n'
        "E1122 18:54:59.464282 22770 model_lifecycle.cc:642] \"failed to load 'tiny' version 1: Internal: "
        'ValueError: no \\"x\\"\\nmend it\\n\\nAt:\\n  /r/model.py(3): f\\n"\n'
        "+-------+\n| Model |\n+-------+\n\n"
        "error: creating server: Internal - failed to load all models\n"
    )

    def test_cause(self, tmp_path: Path) -> None:
        path = tmp_path / "log"
        path.write_text('E1122 18:00:00.000000 1 main.cc:1] "of an earlier run"\n')
        log = ServerLog(path)
        assert log.cause() is None
        with path.open("a") as file:
            file.write(self.LOAD)
        assert log.cause() == "model 'tiny' failed to load: ValueError: no \"x\"\nmend it"
        assert "Model" not in log.tail()
        assert log.tail(1).startswith("error: creating server")

    def test_other_causes(self, tmp_path: Path) -> None:
        log = ServerLog(tmp_path / "log")
        assert log.cause() is None
        assert log.tail() == log.new_text() == ""
        log.path.write_text("error: creating server: Internal - something\n")
        assert log.cause() == "creating server: Internal - something"
        with log.path.open("a") as file:
            file.write('E1122 18:55:08.427766 22942 main.cc:245] "failed to start GRPC service"\n')
        assert log.cause() == "failed to start GRPC service"

    def test_what_is_no_file_is_not_read(self) -> None:
        """A read of /dev/full never ends; one of a terminal waits for somebody to type."""
        log = ServerLog(Path("/dev/full"))
        assert log.text() == log.new_text() == log.tail() == "" and log.cause() is None

    def test_new_text_is_whole_lines_once(self, tmp_path: Path) -> None:
        log = ServerLog(tmp_path / "log")
        log.path.write_text("one\ntw")
        assert log.new_text() == "one\n"
        log.path.write_text("one\ntwo\n")
        assert log.new_text() == "two\n"
        assert log.new_text() == ""
