"""`charonia install-backend`: what is written, what is left alone."""

from pathlib import Path

import pytest
from charonia.entrypoints.cli import main
from charonia.entrypoints.install_backend import install_backend
from charonia.entrypoints.launch_error import LaunchError

SHIPPED = Path(__file__).resolve().parents[2] / "model_repository" / "llm" / "1" / "model.py"


def foreign(directory: Path, name: str) -> Path:
    folder = directory / name
    folder.mkdir()
    (folder / "model.py").write_text("import vllm\n")
    (folder / "utils").mkdir()
    return folder


def test_installs_under_both_names_and_over_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert main(["install-backend", str(tmp_path)]) == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == ["charonia", "vllm"]
    for name in ("charonia", "vllm"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["model.py"]
        assert (tmp_path / name / "model.py").read_bytes() == SHIPPED.read_bytes()
    assert "needs Triton's Python backend" in capsys.readouterr().out


def test_another_vllm_stays(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "python").mkdir()
    (tmp_path / "python" / "libtriton_python.so").touch()
    folder = foreign(tmp_path, "vllm")
    assert main(["install-backend", str(tmp_path)]) == 0
    assert (tmp_path / "charonia" / "model.py").is_file()
    assert (folder / "model.py").read_text() == "import vllm\n"
    said = capsys.readouterr().out
    assert "another backend and stays" in said
    assert "Beware" not in said


def test_another_backend_is_replaced_only_by_force(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = foreign(tmp_path, "vllm")
    arguments = ["install-backend", str(tmp_path), "--name", "vllm"]
    assert main(arguments) == 1
    assert "--force" in capsys.readouterr().err
    assert sorted(path.name for path in folder.iterdir()) == ["model.py", "utils"]
    assert main([*arguments, "--force"]) == 0
    assert [path.name for path in folder.iterdir()] == ["model.py"]
    assert not (tmp_path / "charonia").exists()


def test_a_link_is_replaced_and_what_it_points_to_left_alone(tmp_path: Path) -> None:
    (tmp_path / "backends").mkdir()
    elsewhere = foreign(tmp_path, "elsewhere")
    (tmp_path / "backends" / "vllm").symlink_to(elsewhere)
    install_backend(tmp_path / "backends", ["vllm"], replace=True)
    assert (elsewhere / "model.py").read_text() == "import vllm\n"
    assert (tmp_path / "backends" / "vllm" / "model.py").read_bytes() == SHIPPED.read_bytes()


@pytest.mark.parametrize("name", ["python", "../x", "", "-x", "A"])
def test_unfit_names(tmp_path: Path, name: str) -> None:
    with pytest.raises(LaunchError):
        install_backend(tmp_path, ["charonia", name], replace=True)
    assert list(tmp_path.iterdir()) == []


def test_no_such_directory(tmp_path: Path) -> None:
    with pytest.raises(LaunchError, match="no such directory"):
        install_backend(tmp_path / "missing", ["charonia"])
