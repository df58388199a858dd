import pytest
import torch
from charonia_kernels.gpu._launch import H100
from charonia_kernels.gpu.embedding import embedding, gather_last_rows, row_copy_config
from charonia_kernels.reference.embedding import embedding as embedding_oracle
from charonia_kernels.reference.embedding import gather_last_rows as last_rows_oracle
from support.gpu_kernels import DEVICE
from support.kernel_checks import assert_close, poison

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def make(rows, width, dtype=torch.bfloat16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, width, generator=generator).to(dtype).to(DEVICE)


def ids(count, below, dtype=torch.int32):
    generator = torch.Generator().manual_seed(count)
    return torch.randint(0, below, (count,), generator=generator, dtype=dtype).to(DEVICE)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("tokens", "width"), [(0, 64), (1, 1), (5, 96), (3, 2500), (33, 64)])
def test_embedding(tokens, width, id_dtype, dtype):
    weight, token_ids = make(50, width, dtype), ids(tokens, 50, id_dtype)
    poison(make(tokens, width, dtype))
    actual = embedding(token_ids, weight)
    assert actual.dtype == dtype
    assert torch.equal(actual, weight[token_ids.long()])
    assert torch.equal(actual, embedding_oracle(token_ids, weight))
    scaled = embedding(token_ids, weight, 33.9)
    assert scaled.dtype == dtype
    assert_close(scaled, embedding_oracle(token_ids, weight.double(), 33.9), depth=2)


def test_embedding_of_a_slice_of_a_wider_matrix():
    weight, token_ids = make(20, 160)[:, 16:112], ids(7, 20)
    assert torch.equal(embedding(token_ids, weight), weight[token_ids.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", [[], [1], [3, 1, 5], [1, 2, 0, 0], [0], [4, 1, 1, 1, 0]])
def test_last_rows(lengths, dtype):
    total = max(sum(lengths), 1)
    x = make(total, 1040, dtype)
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32).to(DEVICE)
    actual = gather_last_rows(x, starts)
    assert torch.equal(actual, last_rows_oracle(x, starts))
    for entry, length in enumerate(lengths):
        if length > 0:
            assert torch.equal(actual[entry], x[sum(lengths[: entry + 1]) - 1])


def test_last_rows_of_a_strided_batch_shorter_than_its_offsets():
    x = make(6, 96)[:, :64]
    starts = torch.tensor([0, 2, 7, 99], dtype=torch.int32, device=DEVICE)
    assert torch.equal(gather_last_rows(x, starts), x[[1, 5, 5]])


def test_no_rows_and_no_entries():
    x, starts = make(0, 64), torch.zeros(1, dtype=torch.int32, device=DEVICE)
    assert gather_last_rows(x, starts).shape == (0, 64)
    assert last_rows_oracle(x, starts).shape == (0, 64)
    with pytest.raises(ValueError, match="x has no rows"):
        gather_last_rows(x, torch.zeros(2, dtype=torch.int32, device=DEVICE))


def test_launch_parameters():
    assert row_copy_config(4096, H100).block == 1024
    assert row_copy_config(100, H100).block == 128
    assert row_copy_config(1, H100).num_warps == 1


def test_misfits_are_refused():
    with pytest.raises(ValueError, match=r"weight \[8, 4\] \[V, H\], without gaps"):
        embedding(ids(3, 4), make(4, 8).T)
    with pytest.raises(ValueError, match=r"x \[8, 4\] \[T, H\], without gaps"):
        gather_last_rows(make(4, 8).T, ids(3, 4))
