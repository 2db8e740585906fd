"""Peak memory of `fulltune corpus` on a small and a large text: it should grow by hashes alone.

    python benchmarks/corpus_memory.py --megabytes 20 200

Writes English and Chinese documents of random words, a tenth of them near duplicates, and prepares
each text with all stages but the language filter, in a process of its own. Prints the peak resident
memory of that process, and how many bytes a document the difference is.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CHILD = """
import json, resource, sys
from fulltune.config import build_config
from fulltune.recipes import corpus
manifest = corpus.run(build_config(corpus.Config, json.loads(sys.argv[1]))).manifest
print(json.dumps({
    "documents": manifest["read"]["documents"],
    "removed": {stage["name"]: stage["removed"]["documents"] for stage in manifest["stages"]},
    "parent_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
}))
"""


def write_text(path: Path, num_bytes: int) -> None:
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9)))
             for _ in range(20_000)]  # fmt: skip
    characters = [chr(code) for code in range(0x4E00, 0x5600)]
    written, last = 0, ""
    with path.open("wb") as file:
        while written < num_bytes:
            kind = draw.random()
            if kind < 0.1 and last:
                text = last + " once more"
            elif kind < 0.8:
                text = " ".join(draw.choices(words, k=draw.randint(50, 600)))
            else:
                text = "".join(draw.choices(characters, k=draw.randint(50, 1200)))
            last = text
            line = json.dumps({"text": text}, ensure_ascii=False) + "\n"
            written += file.write(line.encode())


def measure(folder: Path, megabytes: int, num_workers: int) -> dict[str, object]:
    source = folder / f"{megabytes}.jsonl"
    write_text(source, megabytes * 10**6)
    evaluation = folder / "evaluation.jsonl"
    evaluation.write_text(json.dumps({"text": " ".join(["never", "seen"] * 10)}) + "\n")
    settings = {
        "sources": str(source), "output": str(folder / f"{megabytes}"), "num_workers": num_workers,
        "near_duplicates": {"threshold": 0.8}, "decontaminate": {"against": [str(evaluation)]},
    }  # fmt: skip
    begin = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, json.dumps(settings)],
        stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    seconds = time.perf_counter() - begin
    return {
        "megabytes": source.stat().st_size / 1e6,
        "seconds": round(seconds, 1),
        **json.loads(done.stdout.splitlines()[-1]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, nargs=2, default=[20, 200])
    parser.add_argument("--workers", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small, large = (
            measure(Path(folder), megabytes, arguments.workers)
            for megabytes in sorted(arguments.megabytes)
        )
    for row in (small, large):
        print(json.dumps(row))
    grown = (large["parent_mib"] - small["parent_mib"]) * 2**20
    print(json.dumps({"bytes_per_document": grown / (large["documents"] - small["documents"])}))


if __name__ == "__main__":
    main()
