"""The threads behind the kernels: right results whatever runs beside a launch, and nothing left behind."""

import os
import subprocess
import sys
import threading

import charonia_kernels as kernels
import pytest
import torch


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_launches_from_several_threads_at_once():
    weight = torch.randn(500, 512)
    inputs = [torch.randn(3, 512) for _ in range(4)]
    expected = [kernels.linear(x, weight) for x in inputs]
    failures = []

    def work(index):
        same = all(torch.equal(kernels.linear(inputs[index], weight), expected[index]) for _ in range(200))
        if not same:
            failures.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("threads", [1, 2, 3, 7])
def test_the_result_does_not_depend_on_the_number_of_threads(threads):
    x, weight = torch.randn(5, 512), torch.randn(700, 512)
    expected = kernels.linear(x, weight)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            assert torch.equal(kernels.linear(x, weight), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_computes_without_its_parents_helpers():
    x, weight = torch.randn(3, 512), torch.randn(500, 512)
    expected = kernels.linear(x, weight)
    child = os.fork()
    if child == 0:
        same = all(torch.equal(kernels.linear(x, weight), expected) for _ in range(5))
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(kernels.linear(x, weight), expected)


def test_a_process_with_helpers_ends_cleanly():
    code = (
        "import torch, charonia_kernels as k; torch.set_num_threads(3);"
        "k.linear(torch.randn(4, 512), torch.randn(600, 512)); print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_a_read_only_installation_compiles_for_the_process_alone(tmp_path):
    code = (
        "from numba.core import caching\n"
        "caching.CacheImpl._locator_classes = []\n"
        "import torch, charonia_kernels as k\n"
        "print(k.silu_mul(torch.zeros(1, 4)).tolist())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[[0.0, 0.0]]\n"
