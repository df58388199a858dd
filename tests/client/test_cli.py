"""The command, in this process where it can be, in one of its own where signals and pipes matter."""

import io
import json
import signal
import subprocess
import sys

import pytest
from charonia_client.cli import main

pytestmark = pytest.mark.timeout(120)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def command(*arguments):
    return [sys.executable, "-m", "charonia_client", *arguments]


def slow(delay):
    return ["--sampling-params", json.dumps({"fake": {"delay": delay}})]


@pytest.mark.server
@pytest.mark.parametrize("protocol", ["grpc", "http"])
class TestAgainstTheServer:
    @pytest.fixture
    def at(self, protocol, triton):
        return ["--url", triton.grpc_url if protocol == "grpc" else triton.http_url]

    def test_generate(self, at, capsys):
        assert main(["generate", *at, "a", "b"]) == 0
        assert capsys.readouterr().out == "a b\n"

    def test_generate_json_and_stats(self, at, capsys):
        assert main(["generate", *at, "--json", "--stats", "--max-tokens", "1", "a b"]) == 0
        captured = capsys.readouterr()
        (sequence,) = json.loads(captured.out)["sequences"]
        assert (sequence["text"], sequence["finish_reason"], len(sequence["token_ids"])) == ("a", "length", 1)
        assert "1 out" in captured.err

    def test_stream_reads_standard_input(self, at, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", io.StringIO("a b c"))
        assert main(["stream", *at]) == 0
        assert capsys.readouterr().out == "a b c\n"

    def test_stream_json_is_one_object_a_line(self, at, capsys):
        assert main(["stream", *at, "--json", "a b"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["sequences"][0]["text"] for line in lines] == ["a", " b"]

    def test_chat_once(self, at, capsys):
        assert main(["chat", *at, "--system", "short", "hi"]) == 0
        assert capsys.readouterr().out == "system: short user: hi\n"

    def test_chat_keeps_the_conversation(self, at, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Terminal("one\n\ntwo\n/reset\nthree\n"))
        assert main(["chat", *at]) == 0
        assert capsys.readouterr().out.replace("> ", "").splitlines() == [
            "user: one",
            "user: one assistant: user: one user: two",
            "user: three",
            "",
        ]

    def test_chat_survives_an_error(self, at, capsys, monkeypatch):
        monkeypatch.setattr(sys, "stdin", Terminal("one\n/exit\n"))
        assert main(["chat", *at, "--model", "nope"]) == 0
        assert "unknown model" in capsys.readouterr().err

    def test_health(self, at, capsys):
        assert main(["health", *at]) == 0
        assert "model 'llm': ready" in capsys.readouterr().out
        assert main(["health", *at, "--json", "--model", "nope"]) == 1
        assert json.loads(capsys.readouterr().out)["model_ready"] is False

    def test_a_failure_is_one_line(self, at, capsys):
        assert main(["stream", *at, "--timeout", "0.3", *slow(0.2), "a b c"]) == 1
        captured = capsys.readouterr()
        assert captured.out == "a\n"
        assert captured.err.count("\n") == 1
        assert "not finished within 0.3 s" in captured.err

    def test_interrupt_cancels_and_exits_130(self, at):
        process = subprocess.Popen(command("stream", *at, *slow(0.1), "word " * 200), stdout=subprocess.PIPE)
        assert process.stdout.read(4) == b"word"
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
        assert process.returncode == 130

    def test_a_reader_that_leaves_is_no_traceback(self, at):
        process = subprocess.Popen(
            command("stream", *at, *slow(0.05), "--max-tokens", "500", "word " * 400),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdout.read(4) == b"word"
        process.stdout.close()
        assert process.wait(20) == 1
        assert process.stderr.read() == b""
        process.stderr.close()


def test_no_server(capsys, free_port):
    assert main(["generate", "--url", f"localhost:{free_port}", "--retries", "0", "x"]) == 1
    error = capsys.readouterr().err
    assert "no Triton server answers" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["generate", "--url", "ftp://x", "hi"],
        ["generate", "--retries", "-1", "hi"],
        ["generate", "--sampling-params", "[1]", "hi"],
        ["generate", "--sampling-params", "{", "hi"],
    ],
)
def test_wrong_usage_exits_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_the_package_imports_neither_torch_nor_the_engine():
    code = (
        "import sys, charonia_client.cli; "
        "print([m for m in sys.modules if m.split('.')[0] in ('torch', 'charonia', 'transformers')])"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
