"""Files read into the page cache in huge pages, so that every map of them has huge pages too.

Linux takes huge pages for a file when it reads it for a map that asks for them (``MADV_HUGEPAGE``), and only then: reading
with ``read`` or prefetching takes small ones. Other maps of the file, of other processes too, get what is in the page cache.
A map that rows are gathered from cannot ask itself, since each row that is missing would then cost 2 MiB; so a map is made
for the reading alone.
"""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final

from jasper_store.errors import JasperStoreError
from jasper_store.paging import madvise, residency
from jasper_store.paging.huge import HUGE_PAGE
from jasper_store.paging.loose_map import LooseMap

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["HugeReader"]

_LEAST: Final = 4 * HUGE_PAGE  # a smaller file has hardly a huge page that is whole
_SPLIT: Final = 32 << 20


class HugeReader:
    """Reads ranges of files that are hardly in the page cache into it, in huge pages where the system has them.

    Not safe for concurrent use.
    """

    def __init__(self) -> None:
        self._map: LooseMap | None = None

    def read(self, path: Path, offset: int, nbytes: int) -> bool:
        """Read a range of a file; waits for it.

        Returns:
            False where the system has no huge pages for files, the file is small, or a page could not be read; the
            caller has to read it in another way.
        """
        fmap = self._mapped(path)
        if fmap is None or fmap.nbytes < _LEAST or offset + nbytes > fmap.nbytes:
            return False
        # One small page, such as that of a header, keeps the kernel from taking huge ones there and behind it.
        begin = offset // HUGE_PAGE * HUGE_PAGE
        residency.drop_cache(path, begin, offset + nbytes - begin)
        if nbytes < _SPLIT:
            return madvise.populate(fmap.address + offset, nbytes)
        # Two halves at once: the kernel reads one huge page ahead, which keeps only one request under way. Where they meet,
        # some megabytes get small pages.
        middle = (offset + nbytes // 2) // HUGE_PAGE * HUGE_PAGE
        done: list[bool] = []
        first = threading.Thread(
            target=lambda: done.append(madvise.populate(fmap.address + offset, middle - offset)), daemon=True
        )
        first.start()
        done.append(madvise.populate(fmap.address + middle, offset + nbytes - middle))
        first.join()
        return all(done)

    def _mapped(self, path: Path) -> LooseMap | None:
        if self._map is None or self._map.path != path:
            self._map = None
            if sys.platform != "linux":
                return None
            try:
                fmap = LooseMap(path)
            except JasperStoreError:
                return None  # what is wrong with the file is said where its rows are needed
            if not fmap.nbytes or not madvise.advise(fmap.address, fmap.nbytes, "hugepage"):
                return None
            self._map = fmap
        return self._map
