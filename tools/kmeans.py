"""k-means of faiss and of scikit-learn on the same embeddings: time, how near the centroids are, the same bits or not.

    python tools/kmeans.py EMBEDDINGS.npy [--clusters 224] [--threads 1 2] [--out docs/bench/kmeans.json]

Each run is a fresh process, since both libraries read the number of threads when they are loaded. ``build`` uses the result:
see docs/build.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

_SEED = 42


def unit(path: Path) -> NDArray[np.float32]:
    """Embeddings of length 1."""
    rows: NDArray[np.float32] = np.load(path).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def with_faiss(rows: NDArray[np.float32], clusters: int) -> NDArray[np.float32]:
    """Spherical Lloyd on 128 rows for each cluster, 20 iterations, as ``build`` calls it but for the threads."""
    import faiss

    chosen = np.random.default_rng(_SEED).permutation(len(rows))[: 128 * clusters]
    sample = rows[np.sort(chosen)]
    kmeans: Any = faiss.Kmeans(
        rows.shape[1],
        clusters,
        niter=20,
        spherical=True,
        seed=_SEED,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample),
    )
    kmeans.train(sample)
    return np.array(kmeans.centroids)


def with_sklearn(rows: NDArray[np.float32], clusters: int) -> NDArray[np.float32]:
    """Mini-batches of 4 096 rows of all of them; Euclidean, which on rows of length 1 orders as the cosine does."""
    from sklearn.cluster import MiniBatchKMeans

    found = MiniBatchKMeans(clusters, batch_size=4096, n_init=1, random_state=_SEED).fit(rows)
    centroids: NDArray[np.float32] = found.cluster_centers_.astype(np.float32)
    centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


LIBRARIES = {"faiss": with_faiss, "sklearn": with_sklearn}


def measure(library: str, path: Path, clusters: int) -> dict[str, Any]:
    """One run in this process."""
    rows = unit(path)
    train = LIBRARIES[library]
    train(rows[: 40 * 8], 8)  # imports, and starts the threads
    began = time.perf_counter()
    centroids = train(rows, clusters)
    seconds = time.perf_counter() - began
    cosines = np.concatenate([(part @ centroids.T).max(axis=1) for part in np.array_split(rows, 50)])
    return {
        "library": library,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "seconds": round(seconds, 2),
        "mean_cosine": round(float(cosines.mean()), 5),
        "hash": xxhash.xxh3_64_hexdigest(centroids.tobytes()),
    }


def main() -> None:
    """Measure each library with each number of threads, twice; print and keep the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("path", type=Path)
    parser.add_argument("--clusters", type=int, default=224)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", choices=LIBRARIES, help="run one library in this process, with OMP_NUM_THREADS")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.path, options.clusters)))
        return
    runs = []
    for library in LIBRARIES:
        for threads in (*options.threads, options.threads[0]):
            command = [
                sys.executable,
                __file__,
                str(options.path),
                "--clusters",
                str(options.clusters),
                "--one",
                library,
            ]
            counts = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
            done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **counts})
            runs.append(json.loads(done.stdout))
            print(json.dumps(runs[-1]), flush=True)
    shape = list(np.load(options.path, mmap_mode="r").shape)
    if options.out:
        options.out.write_text(
            json.dumps({"shape": shape, "clusters": options.clusters, "runs": runs}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
