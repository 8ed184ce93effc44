import numpy as np
from hypothesis import given, strategies as st

from jasper_store.paging.madvise import _MAX_RANGE_NBYTES, PAGE, split_ranges


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 200)), min_size=1, max_size=20))
def test_split_ranges_cover_the_same_pages(drawn):
    ranges = np.array([(start * PAGE + i * 2**30, pages * PAGE) for i, (start, pages) in enumerate(drawn)], np.int64)
    found = split_ranges(ranges)
    assert found.dtype == np.int64
    assert found[:, 1].max() <= _MAX_RANGE_NBYTES
    assert found.flags.c_contiguous

    def pages(array):
        return [page for start, nbytes in array.tolist() for page in range(start, start + nbytes, PAGE)]

    assert pages(found) == pages(ranges)
