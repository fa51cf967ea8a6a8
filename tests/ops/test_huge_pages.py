"""A copy in huge pages is a copy, whatever its size, and a system without them gives one too."""

from __future__ import annotations

import mmap

import pytest
import torch

from moesaic.ops.huge_pages import in_huge_pages

SIZES = [(0, 3), (5, 7), (512, 1024), (513, 1025)]  # the last two are a page of float32 or more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("size", SIZES)
def test_is_a_contiguous_copy(size, dtype):
    x = torch.arange(size[0] * size[1]).reshape(size).to(dtype)
    for source in (x, x.T, x[:1].expand(3, *size)):
        copy = in_huge_pages(source)
        assert torch.equal(copy, source)
        assert copy.dtype == dtype
        assert copy.is_contiguous()
    if x.numel():
        in_huge_pages(x).zero_()
        assert x.any(), "the copy has memory of its own"


@pytest.mark.parametrize("without", ["refused", "absent"])
def test_without_huge_pages_it_is_still_a_copy(monkeypatch, without):
    x = torch.randn(600, 1024)
    if without == "absent":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    else:
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1)
    assert torch.equal(in_huge_pages(x), x)


def test_the_copy_outlives_its_source():
    copy = in_huge_pages(torch.full((700, 1024), 3.0))
    assert copy.sum() == 3 * 700 * 1024
